"""The three protocols that meet in a search (Flow, Reward, and the methods' Plan in flowfast/methods) and what a
search returns.

Notation (docs/design.md): t = 1 is noise, t = 0 is data, x_t = alpha_t x0 + sigma_t eps, u_t = dx/dt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from flowfast.errors import OptionError

Conditions = dict[str, Tensor]
"""What a model or reward knows of N prompts: named tensors, each (N, ...)."""


PATH_OPTIONS = ("interpolant", "diffusion", "integrator", "grid", "steps", "tail", "shift")
"""The options of a search that say which way it goes through time."""
WALK_OPTIONS = (*PATH_OPTIONS, "guidance", "guidance_interval")
"""And by which velocity: all that tells one path of the plain ODE from another."""


@dataclass(frozen=True, kw_only=True)
class FlowDefaults:
    """What a flow may tell a search beside the members of `Flow`, as its member `defaults`: none of it is needed.

    Raises OptionError, which names what has a wrong type.
    """

    path_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Interpolant, diffusion, integrator, grid, steps, tail and shift that suit it."""
    ode_paths: Sequence[Mapping[str, Any]] = ()
    """Options of other paths of its plain ODE that may be worth their cost, for `flowfast calibrate` to look at."""
    calibration_file: str | Path | None = None
    """What `flowfast calibrate` wrote for it, for method auto."""
    method_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of methods that suit it, by the name of the method."""
    own_times: Callable[[int | None], Sequence[float]] | None = None
    """Linear times at which its own sampler evaluates it, for grid "model", in so many steps; None: in its own
    number."""
    fps: float | None = None
    """Frames a second of its videos."""
    waits_because: str = ""
    """Why its velocity makes the host wait, so that no CUDA graph is tried."""
    preview: Callable[[Tensor], Tensor] | None = None
    """`decode` with a cheaper decoder: a search looks through that, and decodes only its finalists in full."""
    reads_prompts: bool = True
    """False: any prompt will do, the empty one too, for it only names the noise."""

    def __post_init__(self) -> None:
        options, fps = self.method_defaults, self.fps
        number = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < math.inf
        paths = self.ode_paths
        right = {
            "ode_paths": (
                isinstance(paths, list | tuple)
                and all(isinstance(each, Mapping) and set(each) <= set(WALK_OPTIONS) for each in paths),
                f"a list of dicts of some of {', '.join(WALK_OPTIONS)}",
            ),
            "calibration_file": (
                self.calibration_file is None or isinstance(self.calibration_file, str | Path),
                "the path of a file",
            ),
            "path_defaults": (
                isinstance(self.path_defaults, Mapping) and set(self.path_defaults) <= set(PATH_OPTIONS),
                f"a dict of some of {', '.join(PATH_OPTIONS)}",
            ),
            "method_defaults": (
                isinstance(options, Mapping) and all(isinstance(each, Mapping) for each in options.values()),
                "a dict of a dict of options for each method's name",
            ),
            "own_times": (self.own_times is None or callable(self.own_times), "a function of a number of steps"),
            "fps": (fps is None or number, "a positive number"),
            "waits_because": (isinstance(self.waits_because, str), "a text"),
            "preview": (self.preview is None or callable(self.preview), "a function of latents"),
            "reads_prompts": (isinstance(self.reads_prompts, bool), "True or False"),
        }
        for name, (fits, expected) in right.items():
            if not fits:
                raise OptionError(f"expected {name} of FlowDefaults to be {expected}, got {getattr(self, name)!r:.80}")


@runtime_checkable
class Flow(Protocol):
    """A pretrained flow model. A `torch.nn.Module` with these members can also be scripted for C++. One that has more
    to tell (what suits it, a cheaper decoder, ...) has a member `defaults`, a `FlowDefaults`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""

    @property
    def interpolant(self) -> str:
        """The path it was trained on, e.g. "linear"."""

    @property
    def t_finish(self) -> float:
        """A sample is finished when its last evaluation stood at linear-equivalent t <= t_finish."""

    @property
    def guidance(self) -> float:
        """Default scale of classifier-free guidance; up to 1 it is off, one pass."""

    def encode(self, prompts: list[str]) -> Conditions:
        """Conditions of N prompts; the empty prompt is the null condition. Raises PromptError."""

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """u_t (N, *shape) at x_t (N, *shape) and model times t (N,)."""

    def decode(self, x0: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] of latents x0 (N, *shape)."""


@runtime_checkable
class Reward(Protocol):
    """A verifier on the device: higher is better."""

    name: str
    range: tuple[float, float]
    differentiable: bool

    def encode(self, prompts: list[str]) -> Conditions:
        """What it needs to know of N prompts."""

    def __call__(self, images: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """Rewards (N,) float32 of images (N, 3, H, W) in [0, 1] that are posterior means at linear times t (N,)."""


HostReward = Callable[[Tensor, Sequence[str]], Any]
"""A plain callable (images (N, 3, H, W), prompts) -> N scores; it runs on the host."""


class Candidate(NamedTuple):
    """One evaluated proposal, as it goes to `on_round` and `candidates.jsonl`."""

    prompt: int
    round: int
    chain: int
    transition: int
    candidate: int
    t: float
    reward: float | None
    """None where no decision reads it, so that nothing was scored (`score_all` scores everything)."""
    finished: bool
    status: str
    """"" seen, "best" best child so far of its step, "accepted" took the chain on, "discarded" a speculative lane
    behind an acceptor, "ended" the best child of a chain that none goes on from once the method has regrouped them."""
    nfe: int
    """NFE this prompt had spent after the round."""


@dataclass(frozen=True)
class Winner:
    """The address of a sample: with the key it can be drawn again, bit for bit (`flowfast.replay`)."""

    key: int
    chain: int
    transition: int
    candidate: int
    path: tuple[tuple[int, int, int], ...]
    """(chain, transition, candidate) of every step from the initial noise on; the chain changes where it was
    resampled."""


@dataclass(frozen=True)
class Ranked:
    """One finished sample with its reward."""

    reward: float
    """Of the image, which is the full decoder's."""
    image: Tensor
    """(3, H, W) float32 in [0, 1], on the CPU."""
    latent: Tensor
    """x0_hat (*shape)."""
    x_t: Tensor
    """The state (*shape) at which the last evaluation stood."""
    winner: Winner
    preview_reward: float | None = None
    """What the search saw, where it looked through a preview decoder."""


@dataclass(frozen=True)
class Sample:
    """What one prompt got."""

    prompt: str
    method: str
    seed: int
    top: tuple[Ranked, ...]
    budget_nfe: int
    nfe: int
    """Rows through the model for this prompt, speculative ones included; padding is counted apart."""
    nfe_speculative: int
    evaluations: int
    """Children that the model saw; one costs 2 NFE where guidance acts, else 1."""
    reward_calls: int
    unspent: int
    """Of its budget; below 0: others of its pool had that to spare."""
    waves: int = 1
    """Searches that it got of a shared budget."""

    @property
    def reward(self) -> float:
        return self.top[0].reward

    @property
    def image(self) -> Tensor:
        return self.top[0].image

    @property
    def latent(self) -> Tensor:
        return self.top[0].latent

    @property
    def winner(self) -> Winner:
        return self.top[0].winner


@dataclass(frozen=True)
class SearchResult:
    """Samples in the order of the prompts, the resolved configuration, and the costs of the whole call."""

    samples: tuple[Sample, ...]
    config: Any
    micro_batch: int
    """Rows of a model call, at the end; where memory ran out on the way, config.splits has the larger ones before."""
    rows_padded: int
    rounds: int
    nan_rewards: int
    seconds: dict[str, float] = field(default_factory=dict)
    """total, model, decode, reward, search; what a CUDA graph holds counts as model, and so do decoder, reward and
    backward pass of a steered search; reward: waiting for one on the host."""
    overshoot: float | None = None
    """Seconds beyond a budget in seconds (below 0: left over); None where the budget is in NFE."""
    versions: dict[str, str] = field(default_factory=dict)
