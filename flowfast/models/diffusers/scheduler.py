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

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import flowfast.ops  # noqa: F401  (registers torch.ops.flowfast)
from flowfast.errors import FlowfastError, ModelError, OptionError, RewardError
from flowfast.flow import Schedule, ScheduleSpec, build_schedule
from flowfast.models.diffusers.samplers import sampler_facts, sampler_from, sampler_times

METHODS = ("bon", "smc", "svdd", "code")
ROLLOVER = (
    "a chain that takes a child early spends what it saved on its next step, so its chains come to stand at different "
    "times; svdd is the same without the rollover"
)
ELSEWHERE = {
    "rbf": ROLLOVER,
    "rbf-official": ROLLOVER,
    "sop": "it goes back towards the noise again and again",
    "ode": "it is the pipeline's own scheduler",
}
"""Why a method cannot run inside a pipeline, which runs its whole batch once at each of its times."""
SYSTEMATIC = 2  # flowfast.ops.resample


class UnknownPrompts(list[str]):
    """As many prompts as there are images; who reads one hears that the scheduler was not told."""

    def __getitem__(self, index: Any) -> Any:
        return next(iter(self))

    def __iter__(self) -> Iterator[str]:
        raise OptionError(
            "this reward reads the prompts, which a pipeline does not show its scheduler: set scheduler.prompts to "
            "those of the call, or give them to from_config(..., prompts=[...])"
        )


class FlowSDEScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both name their config's file
    """flowfast's SDE step in place of a pipeline's own step, at the times of its own scheduler.

    Row i of a batch is chain i of the noise of `seed`: the same whatever stands beside it. The last step ends at the
    posterior mean. With diffusion "zero" all this is the Euler method.

    Args:
        base: config of the pipeline's own scheduler; `from_config` fills it in.
        interpolant, diffusion, integrator: as for `flowfast.search`, in its words.
        seed: of the noise; set `scheduler.seed` for another draw.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        base: dict[str, Any] | None = None,
        interpolant: str = "linear",
        diffusion: str | None = None,
        integrator: str | None = None,
        seed: int = 0,
    ):
        self.own: Any = sampler_from(dict(base or {}))
        # Pipelines look for shifts, sequence lengths, ... in the config of their scheduler.
        self.register_to_config(**{key: value for key, value in self.own.config.items() if key[0] != "_"})
        self.interpolant, self.diffusion, self.seed = interpolant, diffusion, seed
        self.integrator = integrator or ("euler-maruyama" if diffusion else "coefficient-preserving:0.5")
        self._schedule_at([1.0, 0.5])  # wrong names are known now, not in the pipeline
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.timesteps: Tensor = self.own.timesteps

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """The scheduler for a pipeline, from its own scheduler or that one's config, or from one of these classes.

        A scheduler says more than its config, where `set_shift` was called on it.

        Raises:
            OptionError: unknown or wrong options. ModelError: not the scheduler of a flow.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        wrong = sorted(set(options) - set(known))
        if wrong:
            raise OptionError(f"unknown option {', '.join(wrong)} of {cls.__name__}: choose from {', '.join(known)}")
        ours = isinstance(config, FlowSDEScheduler)
        facts = {**config.config, "base": sampler_facts(config.own)} if ours else sampler_facts(config or {})
        kept = {key: facts[key] for key in known if key in facts} if "base" in facts else {"base": facts}
        scheduler = cls(**(kept | options))
        return (scheduler, {}) if return_unused_kwargs else scheduler

    # ---- what pipelines call ----

    @property
    def sigma_min(self) -> float:
        return float(self.own.sigma_min)

    @sigma_min.setter
    def sigma_min(self, value: float) -> None:
        self.own.sigma_min = value  # Z-Image's pipeline does this

    def set_shift(self, shift: float) -> None:
        """That of the pipeline's own scheduler, where it has one."""
        self.own.set_shift(shift)
        self.register_to_config(base=sampler_facts(self.own))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """The times of the pipeline's own scheduler, once each, below the highest that the interpolant reaches.

        Raises:
            OptionError: arguments that the pipeline's own scheduler cannot take. ModelError: times of no flow.
        """
        times = sampler_times(
            self.own, num_inference_steps=num_inference_steps, sigmas=sigmas, mu=mu, timesteps=timesteps
        )
        self.schedule = self._schedule_at(times)
        self.table = self.schedule.table.float().to(device)
        self.sigmas = torch.cat([self.schedule.time.float(), torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * self.own.config.num_train_timesteps
        self.num_inference_steps = self.schedule.rows
        self.step_index = self.begin_index = None
        self._begin()

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """sample (N, ...) at the times of timestep (N,), for pipelines that start from an image."""
        sigma = (timestep / self.own.config.num_train_timesteps).to(sample).view(-1, *[1] * (sample.dim() - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The batch (N, ...) at the next time, from its velocities at this one. generator is not used: see `seed`."""
        if per_token_timesteps is not None:
            raise ModelError("this pipeline gives each token a time of its own, which flowfast's schedulers cannot")
        if self.step_index is None:
            here = (self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin()
            self.step_index = int(here) if self.begin_index is None else self.begin_index
        x, u = (value.detach().float().reshape(len(sample), -1).contiguous() for value in (sample, model_output))
        moved = self._advance(x, u, self.step_index, tuple(sample.shape)).view(sample.shape).to(model_output.dtype)
        self.step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=cast(Any, moved)) if return_dict else (moved,)

    # ---- the step ----

    def _begin(self) -> None:
        """A run begins and its schedule is known."""

    def _schedule_at(self, times: list[float]) -> Schedule:
        return build_schedule(
            ScheduleSpec(
                interpolant=self.interpolant,
                diffusion=self.diffusion,
                integrator=self.integrator,
                grid="linear-times:" + ",".join(map(repr, times)),
                tail=0,
                t_finish=min(1.0, max(1e-4, times[-1])),
            )
        )

    def _advance(self, x: Tensor, u: Tensor, at: int, shape: tuple[int, ...]) -> Tensor:
        """x, u (N, n) at evaluation `at` to x at the next, or to the sample."""
        if at + 1 == self.schedule.rows:
            return self._posterior_mean(x, u, at)
        chain = torch.arange(len(x), device=x.device)
        return self._branch(x, u, at + 1, chain, torch.full_like(chain, self.seed), chain)

    def _branch(self, x: Tensor, u: Tensor, row: int, parent: Tensor, key: Tensor, chain: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rows, candidate = torch.full_like(chain, row), torch.zeros_like(chain)
        torch.ops.flowfast.branch_step(x, u, parent, rows, key, candidate, chain, self.table.to(x.device), out)
        return out

    def _posterior_mean(self, x: Tensor, u: Tensor, row: int) -> Tensor:
        x0_hat = torch.empty_like(x)
        rows = torch.full((len(x),), row, device=x.device)
        torch.ops.flowfast.posterior_mean(x, u, None, None, rows, self.table.to(x.device), None, x0_hat)
        return x0_hat


class FlowSearchScheduler(FlowSDEScheduler):
    """Search inside a pipeline: the batch is the particle set, `num_images_per_prompt` particles a prompt.

    | method | what a step does                                                                                       |
    |--------|--------------------------------------------------------------------------------------------------------|
    | bon    | nothing; the best final reward wins (the plain ODE unless a diffusion or an integrator is given)       |
    | smc    | weights exp(change of reward / temperature), systematic resampling at low ESS (arXiv 2501.05803)       |
    | svdd   | all of a group go on from the one with the best reward (arXiv 2408.08252)                              |
    | code   | the same every `block` steps (arXiv 2502.00968)                                                        |

    Rewards are of posterior means. After the pipeline has run, `rewards` (N,) are those of its images and `best` has
    the row of each prompt's best one. All random numbers of a prompt hang on the seed and its place in the batch.

    Args:
        base, interpolant, diffusion, integrator, seed: as for `FlowSDEScheduler`.
        method: one of the table.
        k: rows of a group, for svdd and code; default: all of a prompt.
        block: steps between two choices of code.
        temperature, ess_gate: of smc; it resamples where ESS <= ess_gate x particles.
        reward: (images, prompts) -> N scores, higher is better, or a device-side reward of `flowfast.rewards.load`.
        decode: latents (N, ...) as the pipeline holds them, float32, to images, e.g. `from_diffusers(pipe).decode`;
            default: the reward sees the latents.
        prompts: those of the call; only the reward reads them, but their number divides the batch. None: one, and an
            error where a reward reads it, since a pipeline does not show its prompts to its scheduler.

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
        if method in ELSEWHERE:
            raise OptionError(
                f"method {method!r} cannot run inside a pipeline, which runs its whole batch once at each of its "
                f"times: {ELSEWHERE[method]}. Use flowfast.search(from_diffusers(pipe), prompts, method={method!r}, "
                f"...), or choose one of {', '.join(METHODS)}"
            )
        if method not in METHODS:
            raise OptionError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        if temperature <= 0 or not 0 <= ess_gate <= 1 or block < 1 or (k is not None and k < 1):
            raise OptionError(
                "expected temperature > 0, ess_gate in [0, 1], block >= 1 and k >= 1, got "
                f"{temperature}, {ess_gate}, {block} and {k}"
            )
        super().__init__(base, interpolant, diffusion, integrator, seed)
        if method == "bon" and diffusion is None and integrator is None:
            self.diffusion, self.integrator = "zero", "euler-maruyama"
        self.method, self.k, self.block, self.temperature, self.ess_gate = method, k, block, temperature, ess_gate
        self.reward, self.decode, self.prompts = reward, decode, prompts
        self.rewards: Tensor | None = None
        self.best: list[int] = []
        self.log_weights: Tensor | None = None

    def _begin(self) -> None:
        if self.reward is None:
            raise OptionError("this scheduler has no reward: give from_config(..., reward=...) or set scheduler.reward")
        noisy = self.schedule.searchable.tolist()
        if self.method != "bon" and not any(noisy[1:]):
            raise OptionError(
                f"method {self.method!r} needs noise, but this diffusion is zero and copies would stay identical: "
                "choose diffusion='square:3' (or another), or method 'bon'"
            )
        every = self.block if self.method == "code" else 1
        self.chooses = [
            self.method != "bon" and (row + 1) % every == 0 and any(noisy[row + 1 :]) for row in range(len(noisy))
        ]
        self.rewards, self.best, self.log_weights = None, [], None

    def _advance(self, x: Tensor, u: Tensor, at: int, shape: tuple[int, ...]) -> Tensor:
        slots = 1 if self.prompts is None or isinstance(self.prompts, str) else len(self.prompts)
        if len(x) % slots or (len(x) // slots) % (self.k or 1):
            raise OptionError(
                f"a batch of {len(x)} is not {slots} prompts with groups of k = {self.k}: set scheduler.prompts to the "
                "prompts of the call, and num_images_per_prompt to a multiple of k"
            )
        particles = len(x) // slots
        slot = torch.arange(slots, device=x.device)
        key = self.seed + (slot << 32)
        ancestors = torch.arange(particles, device=x.device).expand(slots, -1)
        last = at + 1 == self.schedule.rows
        if last or self.chooses[at]:
            means = self._posterior_mean(x, u, at)
            found = self._score(means.view(shape), at).view(slots, particles)
            if last:
                self.rewards, self.best = found.flatten(), (found.argmax(1) + slot * particles).tolist()
                return means
            ancestors = self._resample(found, key, at) if self.method == "smc" else self._best_of_groups(found)
        chain = torch.arange(particles, device=x.device).repeat(slots)
        parent = (ancestors + slot[:, None] * particles).flatten()
        return self._branch(x, u, at + 1, parent, key.repeat_interleave(particles), chain)

    def _best_of_groups(self, rewards: Tensor) -> Tensor:
        size = self.k or rewards.shape[1]
        first = torch.arange(0, rewards.shape[1], size, device=rewards.device)
        return (rewards.unflatten(1, (-1, size)).argmax(2) + first).repeat_interleave(size, 1)

    def _resample(self, rewards: Tensor, key: Tensor, at: int) -> Tensor:
        """Ancestors (S, C). The weights of particles are kept until their prompt resamples."""
        if self.log_weights is None:
            self.log_weights, self.potential = torch.zeros_like(rewards), torch.zeros_like(rewards)
        dead, potential = rewards.isinf(), rewards / self.temperature
        change = torch.where(dead, -torch.inf, potential - self.potential)
        log_weights = self.log_weights + change
        self.potential = torch.where(dead, self.potential, potential)
        weights, ess = torch.empty_like(rewards), torch.empty_like(rewards[:, 0])
        torch.ops.flowfast.normalize_log_weights(log_weights, weights, ess, torch.empty_like(ess))
        now = (ess <= self.ess_gate * rewards.shape[1]) & (ess > 0)
        ancestors = torch.empty(weights.shape, dtype=torch.int64, device=weights.device)
        row = torch.full_like(key, at)
        torch.ops.flowfast.resample(weights, key, row, now, SYSTEMATIC, ancestors)
        self.potential = self.potential.gather(1, ancestors)
        self.log_weights = log_weights.masked_fill(now[:, None], 0.0)
        return ancestors

    def _score(self, means: Tensor, at: int) -> Tensor:
        """Rewards (N,) float32 of posterior means; NaN counts as -inf. Raises RewardError as a search does."""
        prompts: list[str] = UnknownPrompts([""] * len(means))
        if self.prompts is not None:
            own = [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)
            prompts = [prompt for prompt in own for _ in range(len(means) // len(own))]
        images = means if self.decode is None else self.decode(means)
        name = str(getattr(self.reward, "name", getattr(self.reward, "__name__", type(self.reward).__name__)))
        try:
            if hasattr(self.reward, "encode"):
                answer = self.reward(images, self.sigmas[at].expand(len(means)), self.reward.encode(prompts))
            else:
                answer = self.reward(images, prompts)
            rewards = torch.as_tensor(answer).detach().to(means.device, torch.float32)
        except FlowfastError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}; mend it or choose another reward"
            ) from error
        if tuple(rewards.shape) != (len(means),):
            raise RewardError(
                f"reward {name!r}: expected shape ({len(means)},), one score an image, got {tuple(rewards.shape)}"
            )
        return torch.where(rewards.isnan(), -torch.inf, rewards)
