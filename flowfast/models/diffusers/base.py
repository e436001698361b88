"""What all families of diffusers' flow pipelines share. A family says how its prompts, latents and velocity look.

Latents and velocities between flowfast and an adapter are float32 with t = 1 noise and u = dx/dt = noise - data; a
family translates to its own sign, scale of time and storage type. Conditions have one length per pipeline, padded to
`max_sequence_length` the way the pipeline pads, so that prompts can share a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.models.diffusers.samplers import own_sampler, sampler_times
from flowfast.types import Conditions

KEPT_TEXTS = 32  # encoded prompts a flow keeps, for the next search and for replays


class DiffusersFlow:
    """A loaded pipeline as a `flowfast.types.Flow`. Families derive from it and carry `pipelines`.

    Args:
        pipe: the loaded pipeline; its modules stay where they are.
        height, width: of the images, in pixels; default: the pipeline's own.
        steps: evaluations of the pipeline's own sampler that `grid="model"` and `t_finish` refer to; default: its own.
        guidance: its guidance scale. Two passes an evaluation where the pipeline runs the model twice, else embedded.
        max_sequence_length: tokens of a prompt, padding included.
        preview_decoder: a diffusers `AutoencoderTiny` for this family's latents: a search looks through it, and only
            its finalists are decoded in full. It stays where it is.
    """

    pipelines: tuple[str, ...] = ()
    interpolant = "linear"
    waits_because = ""
    """What makes the host wait in each call of the model, which then cannot run from a CUDA graph; "": nothing."""
    tiny_decoder: str | None = None
    """The `AutoencoderTiny` that was made for this family's latents; None: none that is known here."""

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
    ):
        self.pipe, self.transformer = pipe, pipe.transformer
        self._encoded: dict[str, Conditions] = {}
        self.height, self.width = height or self.default_size(), width or self.default_size()
        asked = {"num_inference_steps": None, "guidance_scale": guidance, "max_sequence_length": max_sequence_length}
        signature = inspect.signature(type(pipe).__call__).parameters
        own = {name: signature[name].default for name in asked if name in signature}
        self.settings = own | {name: value for name, value in asked.items() if value is not None}
        self.shape = self.latent_shape()
        self.guidance = self.two_pass_guidance()
        self.own_steps = steps or self.default_steps()
        # The model's own sampler ends at its last time: what it hands out there is a finished sample.
        self.t_finish = min(1.0, max(0.1, self.own_times(self.own_steps)[-1] + 1e-6))
        self.path_defaults = {"grid": "model", "steps": None}
        self.preview_decoder = preview_decoder
        self.preview = None if preview_decoder is None else self._checked_preview()

    # ---- what a family says ----

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

    def encode_texts(self, texts: list[str]) -> Conditions:
        """Conditions (N, ...) of N texts, without gradients."""
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        raise NotImplementedError

    def decode(self, x0: Tensor) -> Tensor:
        raise NotImplementedError

    def unpacked(self, x0: Tensor) -> Tensor:
        """(N, C, h, w) in the model's own scale, as tiny autoencoders take latents."""
        return x0

    # ---- what they share ----

    def encode(self, prompts: list[str]) -> Conditions:
        """Each text alone, so that a prompt's conditions do not depend on its neighbours; the last ones are kept."""
        for text in dict.fromkeys(map(str, prompts)):
            found = self._encoded.pop(text) if text in self._encoded else self.encode_texts([text])
            self._encoded[text] = found  # as the last one
        rows = [self._encoded[str(prompt)] for prompt in prompts]
        for text in list(self._encoded)[:-KEPT_TEXTS]:
            del self._encoded[text]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the modules that a gradient of the reward passes through (flowfast/searcher/steered.py)."""
        parts = (getattr(self.pipe, name, None) for name in ("transformer", "transformer_2", "vae"))
        return chain.from_iterable(part.parameters() for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the transformer's inputs."""
        return self.transformer.dtype

    def own_times(self, steps: int) -> list[float]:
        """Linear times at which the pipeline's own sampler evaluates the model, for grid "model"."""
        return sampler_times(own_sampler(self.pipe.scheduler), **self.sampler_arguments(steps))

    def to_images(self, latents: Tensor, vae: Any = None) -> Tensor:
        """(N, 3, H, W) in [0, 1], float32, of latents as the autoencoder (default: the pipeline's) takes them."""
        vae = vae or self.pipe.vae
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def _checked_preview(self) -> Callable[[Tensor], Tensor]:
        """x0 to images by the tiny decoder, as the pipeline would with it for its autoencoder. Raises OptionError."""
        family, tiny = type(self.pipe).__name__, self.preview_decoder
        if self.tiny_decoder is None:
            raise OptionError(f"{family}: no AutoencoderTiny is known for its latents; leave out preview_decoder")
        if type(tiny).__name__ != "AutoencoderTiny":
            raise OptionError(f"preview_decoder must be a diffusers AutoencoderTiny, got {type(tiny).__name__}")
        config = tiny.config
        channels, rows = self.unpacked(torch.zeros(1, *self.shape)).shape[1:3]
        enlarged = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
        if (config.latent_channels, enlarged) != (channels, self.height // rows):
            raise OptionError(
                f"preview_decoder: {family} has {channels} latent channels at 1/{self.height // rows} of the size, "
                f"this decoder takes {config.latent_channels} and enlarges {enlarged} times; {self.tiny_decoder} was "
                "made for it"
            )
        return lambda x0: self.to_images(self.unpacked(x0) / config.scaling_factor + config.shift_factor, tiny)


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
