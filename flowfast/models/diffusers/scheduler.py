"""Schedulers for diffusers' own pipelines: SDE sampling, and search inside the pipeline's loop.

    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler, diffusion="square:3", seed=0)

    pipe.scheduler = FlowSearchScheduler.from_config(
        pipe.scheduler, method="svdd", reward=reward, decode=from_diffusers(pipe).decode, prompts=[prompt]
    )
    images = pipe(prompt, num_images_per_prompt=8).images
    images[pipe.scheduler.best[0]]

The pipeline evaluates its model at its own times and hands out velocities; the scheduler does the rest. What needs
particles at different times is `flowfast.search` (see ELSEWHERE). Imported only when it is asked for: unlike the rest
of flowfast it derives from classes of diffusers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (loading a pipeline looks for it here)
from torch import Tensor

from flowfast.errors import FlowfastError, ModelError, OptionError, RewardError
from flowfast.methods.base import Chains
from flowfast.methods.code import BestOfGroup
from flowfast.methods.smc import Particles
from flowfast.models.diffusers.after_step import AfterStep, calling_pipeline
from flowfast.models.diffusers.sde_scheduler import FlowSDEScheduler
from flowfast.ops.resample import RESAMPLING

METHODS = ("bon", "smc", "svdd", "code")
ROLLOVER = (
    "a chain that takes a child early spends what it saved on its next step, so its chains come to stand at different "
    "times; svdd is the same without the rollover"
)
ELSEWHERE = {
    "rbf": ROLLOVER,
    "rbf-official": ROLLOVER,
    "auto": "it chooses the times and may end most of its particles",
    "prune": "it ends most of its particles on the way, and a pipeline runs all of its batch to the end",
    "sop": "it goes back towards the noise again and again",
    "ode": "it is the pipeline's own scheduler",
}
"""Why a method cannot run inside a pipeline, which runs its whole batch once at each of its times."""


class UnknownPrompts(list[str]):
    """As many prompts as there are images; who reads one hears that the scheduler was not told."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # the share of some images is not read yet
            return UnknownPrompts([""] * len(range(*index.indices(len(self)))))
        return next(iter(self))

    def __iter__(self) -> Iterator[str]:
        raise OptionError(
            "this reward reads the prompts, which a loop of one's own and a call with embeddings do not show the "
            "scheduler: set scheduler.prompts to those of the call, or give them to from_config(..., prompts=[...])"
        )


class FlowSearchScheduler(FlowSDEScheduler):
    """Search inside a pipeline: the batch is the particle set, `num_images_per_prompt` particles a prompt.

    | method | what a step does                                                                                       |
    |--------|--------------------------------------------------------------------------------------------------------|
    | bon    | nothing; the best final reward wins (the plain ODE unless a diffusion or an integrator is given)       |
    | smc    | weights exp(change of reward / temperature), systematic resampling at low ESS (arXiv 2501.05803)       |
    | svdd   | all of a group go on from the one with the best reward (arXiv 2408.08252)                              |
    | code   | the same every `block` steps (arXiv 2502.00968)                                                        |

    Rewards are of posterior means. After the pipeline has run, `rewards` (N,) are those of its images and `best` has
    the row of each prompt's best one, also where the pipeline puts an image or a frame back after its last step (see
    after_step.py); where that cannot be known, both raise its name, and `pick` scores what came out. All random numbers
    of a prompt hang on the seed and its place in the batch.

    Args:
        base, interpolant, diffusion, integrator, seed: as for `FlowSDEScheduler`.
        method: one of the table.
        k: rows of a group, for svdd and code; default: all of a prompt.
        block: steps between two choices of code.
        temperature, ess_gate: of smc; it resamples where ESS <= ess_gate x particles.
        reward: (images, prompts) -> N scores, higher is better, or a device-side reward of `flowfast.rewards.load`.
        decode: latents (N, ...) as the pipeline holds them, float32, to images, e.g. `from_diffusers(pipe).decode`, for
            an inpainting pipeline that of its family's own: `from_diffusers(FluxPipeline.from_pipe(pipe), ...)`;
            default: the reward sees the latents.
        prompts: their number divides the batch, and the reward reads them; default: those that the pipeline was called
            with. To be given where it shows none (a loop of one's own, a call with embeddings), which is taken for one.

    reward, decode and prompts are attributes too, and are not saved.
    """

    ignore_for_config = ["reward", "decode", "prompts"]

    @register_to_config
    def __init__(
        self,
        base: dict[str, Any] | None = None,
        interpolant: str = "linear",
        diffusion: str | None = None,
        integrator: str | None = None,
        seed: int = 0,
        method: str = "smc",
        k: int | None = None,
        block: int = 2,
        temperature: float = 0.1,
        ess_gate: float = 0.5,
        reward: Any = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        prompts: Sequence[str] | None = None,
    ):
        _check_options(method, k, block, temperature, ess_gate)
        super().__init__(base=base, interpolant=interpolant, diffusion=diffusion, integrator=integrator, seed=seed)
        if method == "bon" and diffusion is None and integrator is None:
            self.diffusion, self.integrator = "zero", "euler-maruyama"
        self.method, self.k, self.block, self.temperature, self.ess_gate = method, k, block, temperature, ess_gate
        self.reward, self.decode, self.prompts = reward, decode, prompts
        self._rewards: Tensor | None = None
        self._best: list[int] = []
        self._after: AfterStep | None = None
        self._drawn: list[str] | None = None  # the prompts of a run, as the pipeline shows them
        self._shape: torch.Size | None = None  # of the latents of the last run
        self._unseen = ""  # why the rewards of the last run are not known
        self._keys: Tensor | None = None  # (S,) of the noise of a run's prompts
        self.chains: Chains | None = None  # of a run

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowSearchScheduler:
        """A copy with the same reward and decode, which may be large models, or hold what cannot be copied."""
        memo |= {id(part): part for part in (self.reward, self.decode)}
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    # ---- what came out ----

    @property
    def rewards(self) -> Tensor | None:
        """(N,) of the images that came out; None before a run has ended. Raises ModelError where they are unknown."""
        self._known()
        return self._rewards

    @property
    def best(self) -> list[int]:
        """The row of each prompt's best image; [] before a run has ended. Raises ModelError where it is unknown."""
        self._known()
        return self._best

    def pick(self, images: Any) -> list[int]:
        """Scores what a pipeline returned, for those that go on where their scheduler does not see it.

        Args:
            images: its output, or the `.images` or `.frames` of that: PIL images, arrays (N, H, W, 3) or tensors
                (N, 3, H, W) in [0, 1], of videos one more dimension or list; or its latents, which are decoded where
                there is a `decode`.

        Returns:
            `best`, which is set like `rewards`.
        """
        if self.num_inference_steps is None:
            raise OptionError("pick scores what a pipeline has returned: run it first")
        seen = as_tensor(images)
        slots = self._slots(len(seen))
        score = self._score if seen.shape == self._shape else self._score_images
        scores = score(seen.float(), self.transitions - 1).view(slots, -1)
        self._unseen = ""
        self._ranked(scores)
        return self._best

    def _known(self) -> None:
        if self._unseen:
            raise ModelError(
                f"{self._unseen}: its scheduler does not see what comes out; give that to scheduler.pick(images), "
                "which scores it"
            )

    def _ranked(self, scores: Tensor) -> None:
        """Keeps the rewards (S, C) of a run's images."""
        first = torch.arange(len(scores), device=scores.device) * scores.shape[1]
        self._rewards, self._best = scores.flatten(), (scores.argmax(1) + first).tolist()

    # ---- the search ----

    def _begin(self) -> None:
        super()._begin()
        if self.reward is None:
            raise OptionError("this scheduler has no reward: give from_config(..., reward=...) or set scheduler.reward")
        if not callable(self.reward):
            raise OptionError(
                f"reward: expected a callable, got {self.reward!r}; flowfast.rewards.load makes one of a name"
            )
        if self.method != "bon" and self.transitions > 1 and not any(self.noisy[1:]):
            raise OptionError(
                f"method {self.method!r} needs noise, but this diffusion is zero and copies would stay identical: "
                "choose diffusion='square:3' (or another), or method 'bon'"
            )
        every = self.block if self.method == "code" else 1
        self.chooses = [
            self.method != "bon" and (at + 1) % every == 0 and any(self.noisy[at + 1 :])
            for at in range(self.transitions)
        ]
        self._rewards, self._best, self.chains = None, [], None
        self._after, self._keys, self._drawn, self._unseen = None, None, None, ""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        noised = super().scale_noise(sample, timestep, noise)
        if self._after is not None:
            self._after.noises(sample, noised)
        return noised

    def _comes_back(self, latents: Tensor) -> None:
        if self._after is None:
            self._after = AfterStep(*calling_pipeline())
            self._drawn = self._after.prompts
            if self._drawn is not None and len(self._drawn) != len(self._texts() or []):
                raise OptionError(
                    f"{self._after.name} was called with {len(self._drawn)} prompts, but scheduler.prompts has "
                    f"{len(self._texts() or [])}: set it to those of the call, or to None"
                )
        self._after.comes_back(latents)

    def _hands_out(self, latents: Tensor) -> None:
        assert self._after is not None
        if self.step_index == self.transitions:  # what the run held is let go
            self._after = None
        else:
            self._after.hands_out(latents)

    def _texts(self) -> list[str] | None:
        """The prompts of this run; None: unknown."""
        if self.prompts is None:
            return self._drawn
        if not isinstance(self.prompts, Sequence):
            raise OptionError(f"prompts: expected a text or several, got {self.prompts!r:.200}")
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)

    def _slots(self, rows: int) -> int:
        """Prompts of a batch. Raises OptionError where it cannot be divided among them."""
        texts = self._texts()
        slots = 1 if texts is None else len(texts)
        if rows == 0 or slots == 0 or rows % slots or (rows // slots) % (self.k or 1):
            raise OptionError(
                f"a batch of {rows} is not {slots} prompts with groups of k = {self.k}: set scheduler.prompts to the "
                "prompts of the call, and num_images_per_prompt to a multiple of k"
            )
        return slots

    def _advance(self, x: Tensor, u: Tensor, at: int, like: Tensor) -> Tensor:
        assert self._after is not None
        slots = self._slots(len(x))
        particles = len(x) // slots
        slot = torch.arange(slots, device=x.device)
        if self._keys is None or len(self._keys) != slots:
            self._keys = torch.tensor([self._key(place) for place in range(slots)], device=x.device)
        key = self._keys
        ancestors = torch.arange(particles, device=x.device).expand(slots, -1)
        last = at + 1 == self.transitions
        if last or self.chooses[at]:
            means = self._posterior_mean(x, u, at)
            if last:
                self._after.ends()
            seen = means.to(like.dtype).float() if last else means
            seen = self._after.come_out(seen.view(like.shape))
            found = self._score(seen, at).view(slots, particles)
            if last:
                self._shape = seen.shape
                self._ranked(found)
                self._unseen = f"{self._after.name} {self._after.unknown}" if self._after.unknown else ""
                return means
            if self.chains is None:
                self.chains = self._method(slots, particles, x.device)
            every = torch.ones_like(key, dtype=torch.bool)
            ancestors = self.chains.regroup(found, torch.full_like(key, at), every, key)
        chain = torch.arange(particles, device=x.device).repeat(slots)
        parent = (ancestors + slot[:, None] * particles).flatten()
        return self._branch(x, u, at + 1, parent, key.repeat_interleave(particles), chain)

    def _method(self, slots: int, particles: int, device: torch.device) -> Chains:
        """What regroups particles: the method's own code."""
        at = torch.tensor(self.chooses, device=device)
        if self.method == "smc":
            strength = torch.full((self.transitions,), 1 / self.temperature, device=device)
            return Particles(slots, particles, at, strength, RESAMPLING["systematic"], self.ess_gate).to(device)
        return BestOfGroup(self.k or particles, at)

    def _score(self, latents: Tensor, at: int) -> Tensor:
        """Rewards (N,) float32 of finished latents (N, ...), -inf where they or their image are not finite."""
        images = _decoded(self.decode, latents)
        finite = latents.flatten(1).isfinite().all(1)
        return self._score_images(images, at).to(latents.device).masked_fill(~finite, -torch.inf)

    def _score_images(self, images: Tensor, at: int) -> Tensor:
        """Rewards (N,) float32; NaN counts as -inf. Raises RewardError as a search does."""
        prompts: list[str] = UnknownPrompts([""] * len(images))
        texts = self._texts()
        if texts is not None:
            prompts = [text for text in texts for _ in range(len(images) // len(texts))]
        return _scores(self.reward, images, prompts, self.sigmas[at])


def _check_options(method: str, k: int | None, block: int, temperature: float, ess_gate: float) -> None:
    """Raises OptionError."""
    if method in ELSEWHERE:
        raise OptionError(
            f"method {method!r} cannot run inside a pipeline, which runs its whole batch once at each of its "
            f"times: {ELSEWHERE[method]}. Use flowfast.search(from_diffusers(pipe), prompts, method={method!r}, "
            f"...), or choose one of {', '.join(METHODS)}"
        )
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    whole = isinstance(block, int) and block >= 1 and (k is None or (isinstance(k, int) and k >= 1))
    if not (whole and 0 < temperature < float("inf") and 0 <= ess_gate <= 1):
        raise OptionError(
            "expected a finite temperature > 0, ess_gate in [0, 1], whole numbers block >= 1 and k >= 1, got "
            f"{temperature}, {ess_gate}, {block} and {k}"
        )


def _decoded(decode: Callable[[Tensor], Tensor] | None, latents: Tensor) -> Tensor:
    """Images (N, ...) of latents (N, ...). Raises ModelError."""
    try:
        images = latents if decode is None else as_tensor(decode(latents))
    except FlowfastError:
        raise
    except Exception as error:
        raise ModelError(
            f"decode raised {type(error).__name__} for latents of shape {tuple(latents.shape)}: {error}; it must "
            "be made for the size of the call"
        ) from error
    if len(images) != len(latents):
        raise ModelError(f"decode: expected {len(latents)} images, one for each latent, got {len(images)}")
    return images


def _scores(reward: Any, images: Tensor, prompts: list[str], time: Tensor) -> Tensor:
    """Rewards (N,) float32 of images (N, ...) at one linear time; NaN, and what is not finite, counts as -inf. Raises
    RewardError."""
    name = str(getattr(reward, "name", getattr(reward, "__name__", type(reward).__name__)))
    try:
        if hasattr(reward, "encode"):
            answer = reward(images, time.to(images.device).expand(len(images)), reward.encode(prompts))
        else:
            answer = reward(images, prompts)
        rewards = torch.as_tensor(answer).detach().to(images.device, torch.float32)
    except FlowfastError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error}; mend it or choose another reward"
        ) from error
    if tuple(rewards.shape) != (len(images),):
        raise RewardError(
            f"reward {name!r}: expected shape ({len(images)},), one score an image, got {tuple(rewards.shape)}"
        )
    finite = images.flatten(1).isfinite().all(1)  # 8-bit pixels, as some rewards see them, have no NaN
    return rewards.masked_fill(~finite | rewards.isnan(), -torch.inf)


def as_tensor(images: Any) -> Tensor:
    """What a pipeline returns, as rewards see it: (N, 3, H, W) in [0, 1], (N, F, 3, H, W) for videos; tensors as they
    are."""
    images = getattr(images, "images", getattr(images, "frames", images))
    if isinstance(images, Tensor):
        return images
    try:
        if not isinstance(images, np.ndarray):
            images = list(images)
            if isinstance(images[0], Tensor):
                return torch.stack(images)
            if isinstance(images[0], list | tuple):
                return torch.stack([as_tensor(frames) for frames in images])
            rgb = [image.convert("RGB") if hasattr(image, "convert") else image for image in images]
            images = np.stack([np.asarray(image) for image in rgb])
        array = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise OptionError(
            f"expected pictures of one size (PIL images, arrays or tensors), got {type(images).__name__}: {error}"
        ) from None
    if array.ndim not in (4, 5) or array.shape[-1] != 3:
        raise OptionError(f"expected pictures (N, H, W, 3) or videos (N, F, H, W, 3), got {array.shape}")
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


__all__ = ["METHODS", "FlowSDEScheduler", "FlowSearchScheduler"]
