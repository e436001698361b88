"""`flowfast compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowfast import api
from flowfast.bounds import MOST_ROWS
from flowfast.cli.options import Column, Given, Lists, Out, config_options
from flowfast.cli.shown import progress
from flowfast.errors import OptionError
from flowfast.prompts import read_lists


@config_options(
    only=("model", "reward", "steps", "micro_batch"), help={"micro_batch": "Rows in one model call, for all arms."}
)
def command(
    lists: Lists = None,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Half of the hard prompts: tuning or heldout.")] = "tuning",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    methods: Annotated[
        str, typer.Option(help="See `flowfast methods`; rbf+dps:1 is steered by the reward.")
    ] = "ode,bon,sop,smc,code,svdd,rbf",
    budgets: Annotated[str, typer.Option(help="NFE a prompt.")] = "100,200,500",
    seconds: Annotated[str, typer.Option(help="Seconds a prompt, beside --budgets.")] = "",
    seeds: Annotated[int, typer.Option(min=1, max=1_000_000, help="Seeds 0 .. N-1.")] = 3,
    interpolants: Annotated[str, typer.Option(help="Paths of the SDE, or presets: linear,vp,paper.")] = "linear",
    *,
    given: Given,
    chunk: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Prompts in one search call.")] = 16,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the machine's threads.")] = 1,
    out: Out = Path("compare-out"),
) -> None:
    """Compare methods on the same prompts and seeds; run again with the same --out to go on after a stop."""
    from flowfast.comparison.design import Comparison, check, fitting_batch
    from flowfast.comparison.run import run
    from flowfast.report.tables import HEAD, comparison_rows, markdown

    model = given.setdefault("model", Comparison.model)
    texts = read_lists(lists, column, seeds=False) if lists else built_in_prompts(model, split)
    texts = texts[:limit]
    given.setdefault("micro_batch", fitting_batch(min(chunk, len(texts))))
    plan = Comparison(
        prompts=tuple(dict.fromkeys(texts)),
        methods=tuple(words(methods)),
        budgets=tuple(numbers(budgets, int, "--budgets")),
        seconds=tuple(numbers(seconds, float, "--seconds")),
        interpolants=tuple(words(interpolants)),
        seeds=seeds,
        chunk=chunk,
        **given,
    )
    flow = api.load(model)
    check(plan, flow)
    with progress() as advance:
        rows = run(plan, flow, out, advance, workers)
    print(markdown(HEAD, comparison_rows(rows)))
    print(f"{out}/contact.png  {out}/curve.png  {out}/table.md  {out}/results.json")


def built_in_prompts(model: str, split: str) -> list[str]:
    """A half of the model's hard prompts. Raises OptionError."""
    if model != "scenes":
        raise OptionError(f"model {model!r} has no built-in prompts: give --prompts FILE")
    if split not in ("tuning", "heldout"):
        raise OptionError(f"unknown split {split!r}: choose tuning or heldout")
    from flowfast.models.scenes.prompts import hard_prompts

    return hard_prompts(split)  # type: ignore[arg-type]


def words(text: str) -> list[str]:
    """The parts between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, kind: type, option: str) -> list[Any]:
    """The numbers between commas, sorted. Raises OptionError."""
    try:
        return sorted({kind(word) for word in words(text)})
    except ValueError:
        raise OptionError(f"{option}: expected numbers with commas between them, got {text!r}") from None
