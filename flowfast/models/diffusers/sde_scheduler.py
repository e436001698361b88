"""The scheduler that takes flowfast's SDE step inside diffusers' own pipelines (see scheduler.py)."""

from __future__ import annotations

import inspect
from typing import Any, cast

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import flowfast.ops  # noqa: F401  (registers torch.ops.flowfast)
from flowfast.errors import ModelError, OptionError
from flowfast.flow import Schedule, ScheduleSpec, build_schedule
from flowfast.models.diffusers.after_step import calling_pipeline
from flowfast.models.diffusers.samplers import config_of, sampler_changed, sampler_facts, sampler_from, sampler_times
from flowfast.ops.noise import noise_key

LATE = 0.9 + 1e-6  # a pipeline that begins below this time does not begin at noise, where schedules do


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
        # Pipelines look for shifts, sequence lengths, ... in the config of their scheduler. The class tells a config of
        # ours from one that diffusers made of it for another scheduler.
        self.register_to_config(**{key: value for key, value in self.own.config.items() if key[0] != "_"})
        self.register_to_config(base=sampler_facts(self.own), _class_name=type(self).__name__)
        if "_use_default_values" in self.config:
            defaults = sorted(set(self.config["_use_default_values"]) - {"base"})
            self.register_to_config(_use_default_values=defaults)
        self.interpolant, self.diffusion, self.seed = interpolant, diffusion, seed
        self.integrator = integrator or ("euler-maruyama" if diffusion else "coefficient-preserving:0.5")
        self._schedule_at([1.0, 0.5])  # wrong names are known now, not in the pipeline
        self.transitions = 0
        self.num_inference_steps: int | None = None
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.timesteps: Tensor = self.own.timesteps
        self.sigmas: Tensor = self.own.sigmas

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """The scheduler for a pipeline, from its own scheduler or that one's config, or from one of these classes.

        A scheduler says more than its config, where `set_shift` was called on it. options: those of the class, and such
        as the pipeline's own scheduler takes (shift, ...).

        Raises:
            OptionError: unknown or wrong options. ModelError: not the scheduler of a flow.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        # diffusers keeps options of ours in the config of a scheduler that was made from one of ours: they count again.
        facts = config_of(config or {})
        unset = facts.get("_use_default_values", ())
        kept = {key: facts[key] for key in known if key in facts and key not in unset}
        ours = "base" in facts and not hasattr(diffusers, facts.get("_class_name", ""))
        if isinstance(config, FlowSDEScheduler):
            kept["base"] = sampler_facts(config.own)
        elif not ours:
            kept["base"] = sampler_facts(config or {})
        kept["base"], given = sampler_changed(kept.get("base") or {}, options)
        wrong = sorted(set(given) - set(known))
        if wrong:
            raise OptionError(f"unknown option {', '.join(wrong)} of {cls.__name__}: choose from {', '.join(known)}")
        scheduler = cls(**(kept | given))
        if ours and "_diffusers_version" in facts:
            scheduler.register_to_config(_diffusers_version=facts["_diffusers_version"])
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @property
    def compatibles(self) -> list[Any]:
        """Classes that take this config: that of the pipeline's own scheduler."""
        return [type(self.own)]

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
        late = times[0] < LATE  # from an image on the way
        schedule = self._schedule_at([1.0, *times] if late else times)
        self.table, self.noisy = schedule.table[late:].float().to(device), schedule.searchable[late:].tolist()
        self.transitions = len(self.noisy)
        times_left = schedule.time[late:].float()
        self.sigmas = torch.cat([times_left, times_left.new_zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * self.own.config.num_train_timesteps
        if timesteps is not None:  # the model sees these, whatever times they were shifted to
            given = torch.as_tensor(timesteps, dtype=torch.float32, device=self.sigmas.device)
            self.timesteps = given[: self.transitions]
        self.num_inference_steps = self.transitions
        self.step_index = self.begin_index = None
        self._begin()

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """sample: a flow's model takes it as it is."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """sample (N, ...) at the times of timestep (N,), for pipelines that start from an image."""
        sigma = (timestep / self.own.config.num_train_timesteps).to(sample).view(-1, *[1] * (sample.dim() - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise` by the name that it has in diffusers' other schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The batch (N, ...) at the next time, from its velocities at this one. generator is not used: see `seed`.

        Raises:
            OptionError: a time that is none of the schedule's, an index for one, or a step before or after all steps.
            ModelError: what the pipeline or its model gives does not fit.
        """
        if self.num_inference_steps is None:
            raise OptionError("step was called before set_timesteps: call that first")
        if per_token_timesteps is not None:
            pipe = calling_pipeline()[0]
            name = "this loop" if pipe is None else type(pipe).__name__
            raise ModelError(f"{name} gives each token a time of its own, which flowfast's schedulers cannot")
        if model_output.shape != sample.shape:
            raise ModelError(
                f"expected a velocity of the latents' shape {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        given = torch.as_tensor(timestep)
        if not given.is_floating_point():
            raise OptionError(
                f"expected one of scheduler.timesteps, which are floating point, got {timestep!r}: an index, as of "
                "enumerate(scheduler.timesteps), is no time"
            )
        if self.step_index is None:
            self.step_index = self._index_of(given) if self.begin_index is None else self.begin_index
        if not 0 <= self.step_index < self.transitions:
            raise OptionError(f"all {self.transitions} steps have been made: call set_timesteps for another run")
        x, u = (value.detach().float().reshape(len(sample), -1).contiguous() for value in (sample, model_output))
        self._comes_back(sample)
        moved = self._advance(x, u, self.step_index, model_output).view(sample.shape).to(model_output.dtype)
        self.step_index += 1
        self._hands_out(moved)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=cast(Any, moved)) if return_dict else (moved,)

    def __len__(self) -> int:
        return int(self.own.config.num_train_timesteps)

    # ---- the step ----

    def _begin(self) -> None:
        """A run begins and its schedule is known."""
        self._key(0)

    def _comes_back(self, latents: Tensor) -> None:
        """Latents as the pipeline brings them to a step."""

    def _hands_out(self, latents: Tensor) -> None:
        """Latents as a step gives them to the pipeline."""

    def _index_of(self, timestep: Tensor) -> int:
        """The step of a time, which may have been rounded to bfloat16. Raises OptionError."""
        asked = timestep.to(self.timesteps).flatten()
        off = (self.timesteps - asked[:1]).abs()
        index = int(off.argmin())
        if not bool((asked == asked[:1]).all() & (off[index] <= 2**-8 * self.timesteps[index])):
            shown = ", ".join(f"{float(value):.6g}" for value in asked[:4])
            raise OptionError(f"expected one of scheduler.timesteps, got {shown}, which is none of them")
        return index

    def _key(self, place: int) -> int:
        """Key of the noise of the prompt at this place of the batch. Raises OptionError."""
        try:
            return noise_key(self.seed, "", place)
        except TypeError:
            raise OptionError(f"seed must be an integer, got {self.seed!r}") from None

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

    def _advance(self, x: Tensor, u: Tensor, at: int, like: Tensor) -> Tensor:
        """x, u (N, n) at evaluation `at` to x at the next, or to the sample. like (N, ...): what the pipeline gets."""
        if at + 1 == self.transitions:
            return self._posterior_mean(x, u, at)
        chain = torch.arange(len(x), device=x.device)
        return self._branch(x, u, at + 1, chain, torch.full_like(chain, self._key(0)), chain)

    def _branch(self, x: Tensor, u: Tensor, transition: int, parent: Tensor, key: Tensor, chain: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rows, candidate = torch.full_like(chain, transition), torch.zeros_like(chain)
        torch.ops.flowfast.branch_step(x, u, parent, rows, key, candidate, chain, self.table.to(x.device), out)
        return out

    def _posterior_mean(self, x: Tensor, u: Tensor, transition: int) -> Tensor:
        x0_hat = torch.empty_like(x)
        rows = torch.full((len(x),), transition, device=x.device)
        torch.ops.flowfast.posterior_mean(x, u, None, None, rows, self.table.to(x.device), None, x0_hat)
        return x0_hat
