"""The three protocols that meet in a search (Flow, Reward, and the methods' Plan in flowfast/methods) and what a
search returns.

Notation (docs/design.md): t = 1 is noise, t = 0 is data, x_t = alpha_t x0 + sigma_t eps, u_t = dx/dt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

Conditions = dict[str, Tensor]
"""What a model or reward knows of N prompts: named tensors, each (N, ...)."""


@runtime_checkable
class Flow(Protocol):
    """A pretrained flow model. A `torch.nn.Module` with these members can also be scripted for C++."""

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
        """Images (N, 3, H, W) in [0, 1] of latents x0 (N, *shape). A flow may also have `preview`, the same with a
        cheaper decoder: a search then looks through that, and decodes only its finalists in full; and `waits_because`,
        why its velocity makes the host wait, so that no CUDA graph is tried."""


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
"""A plain callable (images (N, 3, H, W), prompts) -> N scores; scored by the driver on the host."""


class Candidate(NamedTuple):
    """One evaluated proposal, as it goes to `on_round` and `candidates.jsonl`."""

    prompt: int
    round: int
    chain: int
    row: int
    candidate: int
    t: float
    reward: float
    finished: bool
    status: str
    """"" seen, "best" best child so far of its step, "accepted" took the chain on, "discarded" a speculative lane
    behind an acceptor."""
    nfe: int
    """NFE this prompt had spent after the round."""


@dataclass(frozen=True)
class Winner:
    """The address of a sample: with the key it can be drawn again, bit for bit (`flowfast.replay`)."""

    key: int
    chain: int
    row: int
    candidate: int
    path: tuple[tuple[int, int, int], ...]
    """(chain, row, candidate) of every transition from the initial noise on; the chain changes where it was
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
    """nfe / passes: with two-pass guidance an evaluation costs 2 NFE."""
    reward_calls: int
    unspent: int

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
