"""What goes into an engine and what comes out of it: a `Request`, then events with its id, of which the last is
`Finished` or `Failed`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from flowfast.config import Picked, Rerun, SearchParams
from flowfast.errors import FlowfastError
from flowfast.methods.forecast import Forecast
from flowfast.methods.plan import Plan
from flowfast.ops.noise import noise_key
from flowfast.prompts import fields_of
from flowfast.resolve import Resolved
from flowfast.types import Candidate, Conditions, Sample


@dataclass(frozen=True, kw_only=True)
class Request:
    """A search for one prompt. `flowfast.Engine.add_request` makes one of its arguments."""

    id: str
    prompt: str
    params: SearchParams
    """With a budget in NFE."""
    reward: str
    """One of the engine's, by name."""
    picked: Picked | None = None
    """What method auto took for it; `params` have it already."""
    latents: Tensor | None = None
    """Its own initial noise, (*shape) or (chains, *shape)."""
    priority: int = 0
    """Lower is earlier. Who waits gains one in ten seconds, so that none waits for ever."""
    deadline: float | None = None
    """Seconds from its arrival to its end: its budget shrinks where time is short."""
    candidates: bool = False
    """Tell with each round what it evaluated, in `Progress.candidates`."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request."""

    id: str


@dataclass(frozen=True)
class Progress(Event):
    """A round of it was decided; the device may be up to two rounds further."""

    nfe: int
    budget: int
    candidates: tuple[Candidate, ...] = ()
    """What the round evaluated, where its request asked for that."""


@dataclass(frozen=True)
class Found(Event):
    """It has a better finished sample than before."""

    reward: float
    nfe: int


@dataclass(frozen=True)
class Partial(Event):
    """How it looks so far, for a task that asked for pictures on the way (`AsyncEngine.generate(looks=...)`)."""

    image: Tensor
    """(3, H, W) in [0, 1], on the CPU."""
    nfe: int


@dataclass(frozen=True)
class Finished(Event):
    """It is done."""

    sample: Sample
    rerun: Rerun
    """What happened on the way (cuts of a deadline, micro-batches that memory made smaller): with it, a search for this
    prompt alone repeats it."""
    seconds: float
    """From its arrival."""
    micro_batch: int = 0
    """Rows of its model calls, at the end: `flowfast.search` with as many has the same bits."""
    waited: float = 0.0
    """Seconds before it had a slot."""


@dataclass(frozen=True)
class Failed(Event):
    """It ended without a sample."""

    reason: str
    """aborted, full, deadline, prompt, reward, model, closed (of `AsyncEngine`), or engine (of several, as `flowfast
    serve` has them: those that ran it died)."""
    error: FlowfastError


@dataclass
class Job:
    """A request on its way through an engine."""

    request: Request
    number: int
    """In the order of arrival."""
    arrived: float
    resolved: Resolved
    plan: Plan
    room: Plan
    """The largest plan that a batch of its kind has room for."""
    forecast: Forecast
    """Of its plan."""
    cond: Conditions
    null_cond: Conditions
    reward_cond: Conditions
    kind: Hashable
    """Jobs of one kind may share a batch."""
    due: float | None = None
    """The end of its deadline by the engine's clock."""
    moved_in: float | None = None
    """When it got a slot; None: it waits, or an engine that was restored has it from another one."""
    rows: int | None = None
    """Of its model calls at most; None: any number."""
    repeats: list[tuple[int, int]] = field(default_factory=list)
    """Cuts that it is to repeat: (round, evaluations left)."""
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """Those that were made."""
    splits: list[tuple[int, int]] = field(default_factory=list)
    """(its rounds, rows): until then its micro-batches had so many rows, more than the device's memory holds."""
    nfe: int = 0
    counted: int | None = 0
    """NFE of it that the engine has counted; None: it is restored, and nothing was heard of it."""
    best: float = float("-inf")
    aborted: bool = False

    @property
    def rerun(self) -> Rerun:
        """What happened to it, as that of a search for this prompt alone."""
        cuts = tuple((0, *cut) for cut in self.cuts)
        return Rerun(splits=tuple(self.splits), cuts=cuts, picked=self.request.picked)

    @property
    def seed(self) -> int:
        return int(fields_of(self.request.prompt).get("seed", self.request.params.seed))

    @property
    def noise_key(self) -> int:
        return noise_key(self.seed, self.request.prompt, self.request.params.repeat)

    @property
    def place(self) -> float:
        """Of the waiting, the lowest one moves in first. Large budgets stand a little earlier than they came: of many
        that come together the longest would else run alone at the end, in half-empty model calls."""
        return self.arrived + AGEING * self.request.priority - 0.05 * ((self.request.params.budget or 0) // 50)


AGEING = 10.0
"""Seconds of waiting that outweigh one level of priority."""
