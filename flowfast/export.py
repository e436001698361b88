"""`flowfast export`: a model, a reward and the search in one TorchScript file, for C++ servers and for Python.

What the file can do is `flowfast.searcher.archive.Archive`. Sizes are fixed at export: slots, micro-batch, the largest
budget, and for each smaller budget the plan that Python makes of it, so that the same request gives the same bits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast import rewards
from flowfast.config import SearchConfig, make_config
from flowfast.driver import Setup, fitting_rows
from flowfast.errors import ArchiveError, FlowfastError
from flowfast.files import write_bytes
from flowfast.ops.noise import STREAM_VERSION
from flowfast.seal import FORMAT_VERSION, seal, seal_of
from flowfast.searcher.archive import Archive, Encoder, NoReward
from flowfast.searcher.plan import Plan
from flowfast.types import Flow
from flowfast.version import versions

BUDGET, SLOTS = 500, 4


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notes that TorchScript is deprecated: C++ has nothing else that carries a program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
        yield


def load_archive(path: str | Path) -> torch.jit.ScriptModule:
    """The archive in a file, ready to be driven (flowfast/searcher/archive.py). It is a program: load what you trust.

    Raises:
        ArchiveError: missing, damaged, not an archive, or of another format or noise stream.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArchiveError(f"cannot read the archive {path}: {error.strerror or error}") from None
    facts = seal_of(data)
    if facts is None:
        raise ArchiveError(f"{path} is not a flowfast archive, or it is damaged: write it again with flowfast export")
    for name, own in (("format_version", FORMAT_VERSION), ("noise_stream", STREAM_VERSION)):
        if facts[name] != own:
            raise ArchiveError(
                f"the archive {path} has {name} {facts[name]}, this flowfast has {own}: export it again with this one"
            )
    try:
        with quiet():
            return torch.jit.load(io.BytesIO(data))
    except RuntimeError as error:
        raise ArchiveError(f"PyTorch {torch.__version__} cannot load the archive {path}: {error}") from None


def read_info(path: str | Path) -> dict[str, str]:
    """The manifest of an archive file. Raises ArchiveError."""
    return dict(load_archive(path).info())


@torch.no_grad()
def export(
    flow: Flow,
    out: str | Path,
    *,
    reward: Any = None,
    config: SearchConfig | None = None,
    prompts: Sequence[str] = (),
    **options: Any,
) -> dict[str, str]:
    """Writes an archive to `out`; returns its manifest.

    reward: a name or a module of the Reward protocol; "host": none, the driver brings rewards. options: fields of
    SearchConfig, as of `flowfast.search`; budget (500) is the largest one it can run, slots (4) how many requests run
    at once.

    Raises:
        OptionError, BudgetError: as `flowfast.search`. ModelError, RewardError: they can be neither scripted nor
        traced. OutputError: it cannot be written.
    """
    if config is not None:
        options = {**config.model_dump(), **options}
    if isinstance(reward, str):
        options["reward"] = reward
    options = {"budget": BUDGET, "slots": SLOTS, **{k: v for k, v in options.items() if v is not None}}
    setup = Setup(flow, make_config(options))
    chosen = setup.config.reward if reward is None or isinstance(reward, str) else reward
    scorer = NoReward() if chosen == "host" else rewards.load(chosen, flow)
    module = archive_of(flow, scorer, setup, list(prompts), str(chosen))
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.script(module), buffer)
    write_bytes(Path(out), seal(buffer.getvalue(), STREAM_VERSION))
    return module.manifest


def archive_of(flow: Any, reward: Any, setup: Setup, prompts: list[str], name: str) -> Archive:
    """The module, still in Python."""
    config = setup.config
    plan, slots = setup.plan(config.budget or 0), config.slots or 1
    micro_batch = config.micro_batch or fitting_rows(slots, plan)
    encoder = Encoder(flow, reward)
    cond = encoder([""])
    null = encoder([config.negative_prompt]) if setup.passes == 2 else {}
    own = {k.removeprefix("cond/"): v for k, v in cond.items() if k.startswith("cond/")}
    asked = {k.removeprefix("reward/"): v for k, v in cond.items() if k.startswith("reward/")}
    engine = setup.engine(flow, reward, plan, slots, micro_batch, own, asked, next(iter(own.values())).device)
    limits, rounds, plan_of = plans_of(setup, plan)
    supported = [e * setup.passes for e, found in enumerate(plan_of) if found >= 0]
    manifest = {
        "format": "flowfast-archive",
        "format_version": str(FORMAT_VERSION),
        **{key: value for key, value in versions().items() if key in ("flowfast", "noise_stream", "torch")},
        "model": config.model,
        "reward": name,
        "method": config.method,
        "loader": "torchscript",
        "shape": ",".join(map(str, flow.shape)),
        "slots": str(slots),
        "chains": str(plan.chains),
        "lanes": str(plan.lanes),
        "rows": str(setup.schedule.rows),
        "micro_batch": str(micro_batch),
        "passes": str(setup.passes),
        "guidance": repr(float(config.guidance or 1.0)),
        "top": str(config.top_k),
        "budget_min": str(supported[0]),
        "budget_max": str(supported[-1]),
        "host_reward": str(int(isinstance(reward, NoReward))),
        "scripted_encode": "1",
        "config": config.model_dump_json(),
    }
    null = {k.removeprefix("cond/"): v for k, v in null.items() if k.startswith("cond/")}
    return Archive(engine, encoder, manifest, limits, rounds, plan_of, null)


def plans_of(setup: Setup, largest: Plan) -> tuple[tuple[Tensor, Tensor, Tensor], list[list[int]], list[int]]:
    """The plans of all budgets that an engine made for the largest one can run: their limits (quota (P, C, T), left and
    start (P, C)), their rounds as [lanes, rounds, ...], and the plan of each number of evaluations, -1: none."""
    found: dict[str, int] = {}
    quotas, lefts, starts, rounds, plan_of = [], [], [], [], []
    C, T = largest.chains, len(largest.accept)
    for evaluations in range((setup.config.budget or 0) // setup.passes + 1):
        try:
            plan = setup.plan(evaluations * setup.passes)
        except FlowfastError:  # below what the method needs
            plan = None
        if plan is None or not runs_on(plan, largest):
            plan_of.append(-1)
            continue
        missing = C - plan.chains
        facts = (plan.quota, plan.left, plan.start or [True] * plan.chains)
        key = repr(facts)
        if key not in found:
            found[key] = len(found)
            quotas.append(plan.quota + [[0] * T] * missing)
            lefts.append(plan.left + [0] * missing)
            starts.append(facts[2] + [False] * missing)
            rounds.append([n for width, times in groupby(plan.widths()) for n in (width, len(list(times)))])
        plan_of.append(found[key])
    return (torch.tensor(quotas), torch.tensor(lefts), torch.tensor(starts)), rounds, plan_of


def runs_on(plan: Plan, largest: Plan) -> bool:
    """Does an engine made for the largest plan do with this one exactly what one of its own would do?"""
    return plan.chains <= largest.chains
