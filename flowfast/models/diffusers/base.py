"""What all families of diffusers' flow pipelines share. A family says how its prompts, latents and velocity look.

Latents and velocities between flowfast and an adapter are float32 with t = 1 noise and u = dx/dt = noise - data; a
family translates to its own sign, scale of time and storage type. Conditions have one length per pipeline, padded to
`max_sequence_length` the way the pipeline pads, so that prompts can share a batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowfast.errors import ModelError, OptionError, PromptError
from flowfast.models.diffusers.embeds import arguments_of, conditions_of_embeds
from flowfast.models.diffusers.samplers import own_sampler, sampler_times
from flowfast.types import Conditions, FlowDefaults


class DiffusersFlow:
    """A loaded pipeline as a `flowfast.types.Flow`. Families derive from it and carry `pipelines`.

    The pipeline is read as it stands: what is changed in it later (a LoRA, another transformer, text encoder,
    autoencoder or sampler, a device, a type) holds from the next search on.

    Args:
        pipe: the loaded pipeline; its modules stay where they are.
        height, width: of the images, in pixels; default: the pipeline's own.
        steps: evaluations of the pipeline's own sampler that `grid="model"` and `t_finish` refer to; default: its own.
        guidance: its guidance scale, two passes an evaluation; up to 1: off, one pass.
        max_sequence_length: tokens of a prompt, padding included.
        preview_decoder: a diffusers `AutoencoderTiny` for this family's latents: a search looks through it, and only
            its finalists are decoded in full. It goes where the pipeline is.
        embeds: prompts that were encoded elsewhere: for each text what the pipeline's call takes for it, {"a red cat":
            {"prompt_embeds": (1, tokens, channels), ...}}; with two passes for the negative prompt, too ("" by
            default). These texts need no text encoder.
    """

    pipelines: tuple[str, ...] = ()
    interpolant = "linear"
    tiny_decoder: str | None = None
    """The `AutoencoderTiny` that was made for this family's latents; None: none that is known here."""
    spare: tuple[str, ...] = ()
    """Parts for which the pipeline has something else where they are left out."""

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
        preview_decoder: Any = None,
        embeds: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if not isinstance(embeds, Mapping | None):
            raise OptionError(f"embeds: expected a mapping from texts to tensors, got {type(embeds).__name__}")
        self.pipe, self.embeds = pipe, dict(embeds or {})
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._check_parts()
        self.height = self.default_size() if height is None else height
        self.width = self.default_size() if width is None else width
        asked = {"num_inference_steps": None, "guidance_scale": guidance, "max_sequence_length": max_sequence_length}
        defaults = self.call_defaults(pipe)
        own = {name: defaults[name] for name in asked if name in defaults}
        self.settings = own | {name: value for name, value in asked.items() if value is not None}
        self._steps = steps
        self.latent_shape()  # a wrong size is known now
        for text, given in self.embeds.items():
            conditions_of_embeds(self.conditions, text, given)
        self.own_times()  # a sampler that cannot be used is known now
        self.preview_decoder = preview_decoder
        self.preview = None if preview_decoder is None else tiny_preview(self)

    @classmethod
    def call_defaults(cls, pipe: Any) -> dict[str, Any]:
        """What the call of the family's pipeline takes where nothing is said; a user's class may have another call."""
        kind = next((kind for kind in type(pipe).__mro__ if kind.__name__ in cls.pipelines), type(pipe))
        return {name: entry.default for name, entry in inspect.signature(kind.__call__).parameters.items()}

    # ---- the pipeline as it stands ----

    @property
    def transformer(self) -> Any:
        return self._part("transformer")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latent_shape()

    @property
    def guidance(self) -> float:
        return self.two_pass_guidance()

    @property
    def own_steps(self) -> int:
        return self.default_steps() if self._steps is None else self._steps

    @property
    def defaults(self) -> FlowDefaults:
        return FlowDefaults(
            path_defaults={"grid": "model", "steps": None},
            own_times=self.own_times,
            fps=self.fps,
            waits_because=self.waits_because,
            preview=self.preview,
        )

    @property
    def t_finish(self) -> float:
        """The model's own sampler ends at its last time: what it hands out there is a finished sample."""
        return min(1.0, max(0.1, self.own_times()[-1] + 1e-6))

    def kept(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Small tensors that every call of the model reads: made once for a key, which names what they depend on."""
        if name not in self._kept or self._kept[name][0] != key:
            with torch.inference_mode(False):  # of a host program: a later search may want gradients
                self._kept[name] = key, make()
        return self._kept[name][1]

    # ---- what a family says ----

    @property
    def waits_because(self) -> str:
        """What makes the host wait in each call of the model, which then cannot run from a CUDA graph; "": nothing."""
        return ""

    @property
    def fps(self) -> float | None:
        """Frames a second that a video is made for; None: not known."""
        return None

    @property
    def needed(self) -> tuple[str, ...]:
        """Parts without which nothing can be searched."""
        return "transformer", "vae", "scheduler"

    def default_size(self) -> int:
        """Pixels of the pipeline's default height and width."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    def default_steps(self) -> int:
        """Steps of the pipeline's own sampler."""
        return int(self.settings["num_inference_steps"])

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent as the transformer takes it, packed where it packs."""
        raise NotImplementedError

    def two_pass_guidance(self) -> float:
        """The default scale of classifier-free guidance in two passes; 1 where guidance is embedded or distilled."""
        return 1.0

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        """What the pipeline passes to its scheduler's set_timesteps."""
        return {"num_inference_steps": steps}

    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        """Conditions (N, ...) of N texts on a device, the pipeline's, without gradients."""
        raise NotImplementedError

    conditions: Callable[..., Conditions]
    """Conditions (N, ...) from what the pipeline's call takes for N encoded prompts; a family names these arguments."""

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        raise NotImplementedError

    def decode(self, x0: Tensor) -> Tensor:
        raise NotImplementedError

    def unpacked(self, x0: Tensor) -> Tensor:
        """(N, C, h, w) in the model's own scale, as tiny autoencoders take latents."""
        return x0

    # ---- what they share ----

    def encode(self, prompts: list[str]) -> Conditions:
        """Each text alone, so that a prompt's conditions do not depend on its neighbours. Nothing is kept for the next
        call: by then text encoders may have other weights, which nothing but running them would show. Raises
        PromptError, ModelError."""
        device = self.device
        if self.preview_decoder is not None:
            self.preview_decoder.to(device)
        found = {text: self._encode_alone(text, device) for text in dict.fromkeys(map(str, prompts))}
        rows = [found[str(prompt)] for prompt in prompts]
        for name, value in rows[0].items():
            for prompt, row in zip(prompts, rows, strict=True):
                if row[name].shape != value.shape:
                    raise PromptError(
                        f"embeds: prompts of one search need one shape; {name} of {str(prompts[0])!r} is "
                        f"{tuple(value.shape)}, of {str(prompt)!r} {tuple(row[name].shape)}: pad them alike"
                    )
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encode_alone(self, text: str, device: torch.device) -> Conditions:
        if text in self.embeds:
            cond = conditions_of_embeds(self.conditions, text, self.embeds[text])
            return {name: value.to(device) for name, value in cond.items()}
        absent = [name for name in self._parts("text_encoder", "tokenizer") if getattr(self.pipe, name) is None]
        unused = [name for name in self.spare if getattr(self.pipe, name.replace("tokenizer", "text_encoder")) is None]
        absent = [name for name in absent if name not in unused]
        if absent:
            names = ", ".join(arguments_of(self.conditions))
            raise ModelError(
                f"this {type(self.pipe).__name__} has no {', '.join(absent)} and no embeds for the prompt {text!r}: "
                f"load it whole, or give from_diffusers(..., embeds={{{text!r}: {{{names}}}}})"
            )
        return self.encode_texts([text], device)

    def _parts(self, *kinds: str) -> list[str]:
        return [name for name in self.pipe.components if name.startswith(kinds)]

    def _check_parts(self) -> None:
        for name in self.needed:
            if keeps_results(self._part(name)):
                raise ModelError(
                    f"the {name} keeps results from one call for the next (a cache of diffusers), which particles at "
                    f"other times cannot share: pipe.{name}.disable_cache() where enable_cache began it, else load it "
                    "anew"
                )

    def _part(self, name: str) -> Any:
        return part_of(self.pipe, name)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the modules that a gradient of the reward passes through (flowfast/rounds/steered.py)."""
        parts = (getattr(self.pipe, name, None) for name in ("transformer", "transformer_2", "vae"))
        return chain.from_iterable(part.parameters() for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs. diffusers walks through all modules for it: read it once a search."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the transformer's inputs. diffusers walks through its modules for it: read it once a call."""
        return self.transformer.dtype

    def own_times(self, steps: int | None = None) -> list[float]:
        """Linear times at which the pipeline's own sampler evaluates the model, for grid "model". Each search asks for
        them first. Raises ModelError."""
        self._check_parts()
        return sampler_times(own_sampler(self.pipe.scheduler), **self.sampler_arguments(steps or self.own_steps))

    def to_images(self, latents: Tensor, vae: Any = None) -> Tensor:
        """(N, 3, H, W) in [0, 1], float32, of latents as the autoencoder (default: the pipeline's) takes them."""
        vae = vae or self.pipe.vae
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def latent_scale(self, latents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1, 1) of the latents that the autoencoder was trained on, from its config."""
        config, device = self.pipe.vae.config, latents.device
        scale = tuple(config.latents_mean), tuple(config.latents_std)

        def make() -> tuple[Tensor, ...]:
            return tuple(torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1, 1) for values in scale)

        return self.kept("latent scale", (scale, device, dtype), make)


class EmbeddedGuidance(DiffusersFlow):
    """A family whose model was distilled from a guided one and takes the scale as an input.

    Args:
        distilled_guidance: that scale, the pipeline's `guidance_scale`: one pass, 1 NFE an evaluation. A model without
            the input ignores it.
        true_cfg: classifier-free guidance in two passes, 2 NFE an evaluation, the pipeline's `true_cfg_scale`; up to 1:
            off. `search(guidance=...)` is this one.
        guidance: refused where it could mean either.
        options: as for `DiffusersFlow`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        distilled_guidance: float | None = None,
        true_cfg: float = 1.0,
        guidance: float | None = None,
        **options: Any,
    ):
        self.true_cfg = true_cfg
        super().__init__(pipe, guidance=distilled_guidance, **options)
        if guidance is not None and (self.takes_guidance() or guidance > 1):
            raise OptionError(
                f"guidance={guidance} can mean two things for a {type(pipe).__name__}: say "
                f"distilled_guidance={guidance} (the pipeline's guidance_scale, an input of the model, 1 NFE an "
                f"evaluation) or true_cfg={guidance} (two passes, 2 NFE, as in search(guidance={guidance}))"
            )

    def takes_guidance(self) -> bool:
        """Whether the model has the input."""
        return bool(self.transformer.config.get("guidance_embeds", True))

    @property
    def distilled_guidance(self) -> float:
        return float(self.settings["guidance_scale"])

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.true_cfg))


def tiny_preview(flow: DiffusersFlow) -> Callable[[Tensor], Tensor]:
    """x0 to images by the flow's tiny decoder, as its pipeline would with that for its autoencoder. Raises
    OptionError."""
    family, tiny = type(flow.pipe).__name__, flow.preview_decoder
    if flow.tiny_decoder is None:
        raise OptionError(f"{family}: no AutoencoderTiny is known for its latents; leave out preview_decoder")
    if type(tiny).__name__ != "AutoencoderTiny":
        raise OptionError(f"preview_decoder must be a diffusers AutoencoderTiny, got {type(tiny).__name__}")
    config = tiny.config
    channels, rows = flow.unpacked(torch.zeros(1, *flow.shape)).shape[1:3]
    enlarged = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    if (config.latent_channels, enlarged) != (channels, flow.height // rows):
        raise OptionError(
            f"preview_decoder: {family} has {channels} latent channels at 1/{flow.height // rows} of the size, "
            f"this decoder takes {config.latent_channels} and enlarges {enlarged} times; {flow.tiny_decoder} was "
            "made for it"
        )
    return lambda x0: flow.to_images(flow.unpacked(x0) / config.scaling_factor + config.shift_factor, tiny)


def part_of(pipe: Any, name: str) -> Any:
    """A part of a pipeline. Raises ModelError where it has none."""
    part = getattr(pipe, name, None)
    if part is None:
        raise ModelError(
            f"this {type(pipe).__name__} has no {name}, which a search needs: load it whole, or set pipe.{name}"
        )
    return part


def keeps_results(part: Any) -> bool:
    """Whether a model has a cache of diffusers, be it by `enable_cache` or by one of the functions (apply_...)."""
    modules = part.modules() if isinstance(part, torch.nn.Module) else ()
    registries: list[Any] = [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]
    return getattr(part, "is_cache_enabled", False) or any(
        hook._is_stateful for registry in registries for hook in registry.hooks.values()
    )


def resized(flow: DiffusersFlow, height: int, width: int) -> DiffusersFlow:
    """The same pipeline, its modules shared, for images of another size. Raises OptionError where it has no such."""
    other = copy.copy(flow)
    other.height, other.width, other._kept = height, width, {}
    other.latent_shape()
    other.own_times()
    other.preview = None if flow.preview_decoder is None else tiny_preview(other)
    return other


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises OptionError where a side is not a multiple."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            raise OptionError(f"{name} must be a positive multiple of {multiple} pixels for this model, got {value}")


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows (L_i, d) as (N, length, d) with zeros behind, and a mask (N, length) bool."""
    out = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=out.device)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise OptionError(f"a prompt has {len(row)} tokens, more than max_sequence_length = {length}: raise it")
        out[i, : len(row)], mask[i, : len(row)] = row, True
    return out, mask


def resolution_shift(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """mu of a scheduler with `use_dynamic_shifting`: linear in the number of tokens of an image (SD 3 paper, 5.3.2)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return float(base_shift + (max_shift - base_shift) * (tokens - low) / (high - low))
