"""`flowfast export`: a model, a reward and the search in one TorchScript file, for C++ servers and for Python.

What the file can do stands in module.py. Sizes are fixed at export: slots, micro-batch, the largest budget, and for
each smaller budget the plan that Python makes of it, so that the same request gives the same bits.

A model or reward that does not script is traced; prompts whose encoding does not script are encoded at export. With
`format="aoti"` model, decoder and reward are compiled by AOTInductor into packages beside the file. They take the
tensors of their function in its order, conditions by their sorted names: velocity (x, t, ...), decode (x0), reward
(images, t, ...), each of one micro-batch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowfast import rewards
from flowfast.archive.encode import scripted_encoder, table_of
from flowfast.archive.load import quiet
from flowfast.archive.module import Archive
from flowfast.archive.parts import Outside, Part, compiled, parts_of, torchscript
from flowfast.archive.plans import Plans, all_plans
from flowfast.archive.seal import FORMAT_VERSION, digest, seal_file
from flowfast.calibration.auto import settled_config
from flowfast.config import SearchConfig, make_config, options_over
from flowfast.errors import ModelError, OptionError, RewardError
from flowfast.files import locked_file, replacing, write_bytes
from flowfast.methods.plan import Plan
from flowfast.models.answers import CheckedFlow, conditions_of, defaults_of
from flowfast.ops.noise import STREAM_VERSION
from flowfast.prompts import encoded
from flowfast.resolve import Resolved, fitting_rows, resolve
from flowfast.rounds.steered import frozen
from flowfast.surroundings import evaluating, modules_of, own_ground
from flowfast.types import Conditions, Flow
from flowfast.version import versions

BUDGET, SLOTS = 500, 4
COMPILED = "call its packages between branch and observe"
FORMATS = ("torchscript", "aoti")


@own_ground()
def export(
    flow: Flow,
    out: str | Path,
    *,
    reward: Any = None,
    prompts: Sequence[str] = (),
    format: str = "torchscript",
    config: SearchConfig | None = None,
    **options: Any,
) -> dict[str, str]:
    """Writes an archive to `out`; returns its manifest.

    Args:
        reward: a name, a module of the Reward protocol, or "host": none, the driver brings rewards.
        prompts: where encoding does not script: all prompts that the archive will know.
        format: "torchscript", or "aoti": model, decoder and reward in packages beside `out`, compiled for this machine.
        options: fields of SearchConfig, as of `flowfast.search`, or a whole `config`. budget (500) is the largest one
            that the archive can run, slots (4) how many requests run at once; what belongs to one request (seed, ...)
            is not read.

    Raises:
        OptionError, BudgetError: as `flowfast.search`. ModelError: model or reward can be neither scripted nor traced,
        or do something else then. OutputError: it cannot be written.
    """
    options = options_over(config, options, reward)
    given = {name: value for name, value in options.items() if value is not None}
    asked = make_config({"budget": BUDGET, "slots": SLOTS, **given})
    chosen = asked.reward if reward is None or isinstance(reward, str) else reward
    scorer = _device_reward(chosen, flow)
    config, resolved = _resolved(flow, scorer, format, asked, given)
    named = chosen if isinstance(chosen, str) else str(getattr(scorer, "name", type(scorer).__name__))
    config = config.model_copy(update={"model": options.get("model", type(flow).__name__), "reward": named})
    known = list({str(prompt): prompt for prompt in ([prompts] if isinstance(prompts, str) else prompts)}.values())
    path = Path(out)
    with locked_file(path):
        with (
            quiet(),
            frozen(*modules_of(flow), *modules_of(scorer)),
            evaluating(flow, scorer),
        ):  # only such weights can be constants of a trace
            module, packages = _module(flow, scorer, config, resolved, known, path.stem if format == "aoti" else None)
            data = torch.jit.script(module).save_to_buffer()  # PyTorch's own writer ends the process on a full disk
        for name, package in packages.items():
            write_bytes(path.with_name(name), package)
        with replacing(path) as temporary, temporary.open("r+b") as file:
            file.write(data)
            seal_file(file, STREAM_VERSION)
    return module.manifest


def _resolved(
    flow: Flow, reward: Any, format: str, config: SearchConfig, given: dict[str, Any]
) -> tuple[SearchConfig, Resolved]:
    """What an archive is asked to be; method auto is what it takes at the largest budget. Raises OptionError."""
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    if config.seconds is not None:
        raise OptionError("an archive takes budgets in NFE only: leave seconds out, and give the largest budget")
    for name in ("gradient", "finalists"):
        if name in given:
            raise OptionError(f"an archive has no {name}, only flowfast.search has: leave it out")
    config = settled_config(flow, reward, config)
    resolved = resolve(flow, config.params)
    params = resolved.params.model_copy(update={"finalists": None})  # it decodes in full, with no preview
    return config.with_params(params), replace(resolved, params=params)


def _device_reward(chosen: Any, flow: Flow) -> Any:
    """The reward as a module. Raises OptionError where it runs on the host."""
    scorer = Outside("give rewards to observe") if chosen == "host" else rewards.load(chosen, flow)
    if rewards.on_host(scorer):
        raise OptionError(
            f"reward {scorer.name!r} runs on the host: export with reward 'host', and score in the server"
        )
    return scorer


def _module(
    flow: Any, reward: Any, config: SearchConfig, resolved: Resolved, prompts: list[str], stem: str | None
) -> tuple[Archive, dict[str, bytes]]:
    """The archive, still in Python, and the packages beside it. stem: how their names begin; None: there are none."""
    budget, slots = config.budget or 0, config.slots or SLOTS
    plan = resolved.plan(budget)
    M = config.micro_batch or fitting_rows(slots, plan)
    cond, null, asked = _conditions(flow, reward, resolved, prompts or [""], packed=stem is not None)
    encoder = table_of(prompts, cond, asked) if prompts else scripted_encoder(flow, reward)
    parts, plans = parts_of(flow, reward, cond, asked, M), all_plans(resolved, budget, plan)
    manifest = _manifest(config.model_copy(update={"micro_batch": M}), resolved, plan, plans, flow.shape)
    manifest |= _size(parts["decode"])
    manifest |= {"host_reward": str(int(isinstance(reward, Outside))), "scripted_encode": str(int(not prompts))}
    manifest |= {"reads_prompts": str(int(defaults_of(flow).reads_prompts))}
    packages: dict[str, bytes] = {}
    if stem is None:
        flow, reward = torchscript(flow, reward, parts, null, M)
    else:
        packages, facts = _packages(parts, stem, M)
        manifest |= facts
        flow, reward = Outside(COMPILED, flow.shape), reward if isinstance(reward, Outside) else Outside(COMPILED)
    one, asked_one = ({name: value[:1] for name, value in of.items()} for of in (cond, asked))
    device = next(iter(cond.values())).device
    batch = resolved.batch(flow, reward, plan, slots, M, one, asked_one, device, null_cond=null)
    return Archive(batch, encoder, manifest, plans, null, hollow=stem is not None), packages


def _conditions(
    flow: Any, reward: Any, resolved: Resolved, prompts: list[str], packed: bool
) -> tuple[Conditions, Conditions, Conditions]:
    """The model's of the prompts, of the null prompt ({} with one pass), and the reward's. Raises ModelError where
    packages could not take them."""
    encode = CheckedFlow(flow).encode
    cond = encoded(encode, prompts)
    null = encode([resolved.params.negative_prompt]) if resolved.passes == 2 else {}
    asked = conditions_of(encoded(reward.encode, prompts), len(prompts), "the reward's encode", RewardError)
    shapes = [{name: list(value.shape[1:]) for name, value in of.items()} for of in (cond, null)]
    if packed and null and shapes[0] != shapes[1]:
        raise ModelError(f"packages take prompts of one shape, but the null prompt has {shapes[1]}, others {shapes[0]}")
    return cond, null, asked


def _packages(parts: dict[str, Part], stem: str, M: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """Compiled parts by the names of their files, and what the manifest says of them."""
    made = {name: compiled(part, M) for name, part in parts.items()}
    facts = {"loader": "aoti", "packages": ",".join(made)}
    for name, data in made.items():
        facts |= {f"{name}_file": f"{stem}.{name}.pt2", f"{name}_hash": digest(io.BytesIO(data), len(data))}
    return {f"{stem}.{name}.pt2": data for name, data in made.items()}, facts


def _manifest(
    config: SearchConfig, resolved: Resolved, plan: Plan, plans: Plans, shape: Sequence[int]
) -> dict[str, str]:
    """Facts of an archive, for `info`."""
    facts = {
        "format": "flowfast-archive",
        "format_version": FORMAT_VERSION,
        **{name: value for name, value in versions().items() if name in ("flowfast", "noise_stream", "torch")},
        "model": config.model,
        "reward": config.reward,
        "method": config.method,
        "loader": "torchscript",
        "shape": ",".join(map(str, shape)),
        "slots": config.slots,
        "chains": plan.chains,
        "lanes": plan.lanes,
        "transitions": resolved.schedule.transitions,
        "micro_batch": config.micro_batch,
        "passes": resolved.passes,
        "guidance": resolved.guidance,
        "top": config.top_k,
        "budget_min": next(e for e, found in enumerate(plans.of) if found >= 0) * plans.unit,
        "budget_max": config.budget,
        "config": config.model_dump_json(),
    }
    return {name: str(fact) for name, fact in facts.items()}


def _size(decode: Part) -> dict[str, str]:
    """Width and height of the images, where the decoder makes any, as a server's clients write them."""
    shape = decode.function(*decode.rows(1)).shape
    return {"size": f"{shape[-1]}x{shape[-2]}"} if len(shape) >= 4 else {}
