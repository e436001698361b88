"""`flowfast explain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flowfast import api, rewards
from flowfast.calibration.explain import Explained, explained
from flowfast.cli.generate import DEFAULT_BUDGET, asked_search
from flowfast.cli.options import Given, Guidance, MethodOption, ModelOption, config_options, with_options
from flowfast.config import make_config
from flowfast.flow.gradient import parse_guidance
from flowfast.prompts import check_each, check_no_lists, check_prompts
from flowfast.report.calibration import told
from flowfast.report.tables import markdown


@config_options(defaults={"budget": DEFAULT_BUDGET})
def command(
    given: Given,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="As of generate.")] = None,
    guidance: Guidance = None,
    model_option: ModelOption = None,
    option: MethodOption = None,
) -> None:
    """Show what generate would do with the same options, and why: the plan, what it costs, what else there is."""
    if guidance is not None:
        given |= parse_guidance(guidance)
    check_no_lists(prompts or [])
    config = make_config(with_options(asked_search({}, given), option, model_option))
    flow = api.load(config.model, **config.model_options)
    if prompts:
        check_prompts(prompts)
        check_each(prompts, lambda text: flow.encode([text]))
    found = explained(flow, rewards.load(config.reward, flow, config.reward_deadline), config)
    for line in lines_of(found, config.budget or 0):
        print(line)


def lines_of(found: Explained, budget: int) -> list[str]:
    """What is printed."""
    lines = [f"method: {found.method}{shown(found.options)}"]
    if found.picked is not None:
        lines.append(f"why: {found.picked.why}")
    lines += [f"path:{shown(found.path)}", "", plan_table(found)]
    cost = f"cost: {found.nfe} of {budget} NFE, {found.scores} pictures decoded and scored, at most"
    if found.seconds is not None:
        cost += f"; {found.seconds:.2g} s by the calibration's times"
    lines.append(cost)
    if found.bank is not None and found.chosen is not None:
        P, n, _ = found.bank.paths[0].rewards.shape
        lines += [
            f"calibration: {found.bank.digest}, {P} prompts, {n} trajectories each, reward {found.bank.reward}",
            f"plans at {found.chosen.budget} NFE, the last step of its ladder up to {budget}:",
            "",
            markdown(
                ("plan", "chains", "NFE", "expected reward"),
                [
                    [name, told(choice), str(choice.nfe), f"{choice.mean:.3f}"]
                    for name, choice in found.alternatives.items()
                ],
            ),
        ]
    return lines


def plan_table(found: Explained) -> str:
    """One row a transition."""
    rows = [
        [f"{step.t:.3f}", str(step.chains), str(step.candidates), "yes" * step.scored, str(step.passes), str(step.nfe)]
        for step in found.steps
    ]
    return markdown(("t", "chains", "candidates", "scored", "passes", "NFE so far"), rows)


def shown(options: dict[str, Any]) -> str:
    """ " at=0.7,0.55 keep=0.4,0.15", what is None left out."""
    told = {name: value for name, value in options.items() if value is not None}
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in told.items()}
    return "".join(f" {name}={text}" for name, text in texts.items())
