"""What a pipeline does to its latents after a step, which it does not tell its scheduler.

A scheduler sees latents where its `step` is called, not after the last one. Inpainting pipelines put their image back
after each step, at the time reached: y = m h + (1 - m) z, with h the latents handed out, z the image as the scheduler's
`scale_noise` noised it, and a mask m that nobody shows. It can be read off the y that come to the next step, and then
the end is known as well: m h + (1 - m) image. Two pipelines that begin with a frame are read up in their own variables.
What cannot be told in advance makes the end unknown, and is said so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipelineBlocks
from torch import Tensor

from flowfast.errors import ModelError

FRAME = "puts the frame that it was given beside or over the latents that its scheduler sees"
PARTS = "makes its output of several runs of its scheduler"
CUT = "decodes a part of its latents only"
LAST = {
    "SanaImageToVideoPipeline": FRAME,
    "Kandinsky5I2VPipeline": FRAME,
    "HunyuanVideoImageToVideoPipeline": FRAME,
    "JoyImageEditPlusPipeline": "puts its reference pictures back after the last step",
    "HunyuanVideoFramepackPipeline": PARTS,
    "WanAnimatePipeline": PARTS,
    "Cosmos2_5_TransferPipeline": PARTS,
    "Kandinsky6SRPipeline": PARTS,
    "LTXI2VLongMultiPromptPipeline": PARTS,
    "SanaWMLTX2Refiner": PARTS,
    "VisualClozeGenerationPipeline": CUT,
    "WanVACEPipeline": CUT,
    "ChronoEditPipeline": CUT,
    "QwenImageLayeredPipeline": CUT,
    "LTXImage2VideoLoopAfterDenoiser": FRAME,
    "WanAnimate2SegmentDenoiseInner": PARTS,
}
"""Pipelines and blocks of modular ones (diffusers 0.42) whose output is not what their last step hands out, and why."""
SOUND = "walks its sound with a copy of its scheduler, which would choose other rows than for the pictures"
ROWS = "walks each frame with a copy of its scheduler"
NEVER = {
    **dict.fromkeys(
        (
            *("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX2InContextPipeline"),
            *("LTX2HDRPipeline", "LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"),
            *("Kandinsky6TI2VAPipeline", "Cosmos3OmniPipeline", "Cosmos3OmniModularPipeline"),
            *("LTX2ModularPipeline", "LTX25ModularPipeline"),
        ),
        SOUND,
    ),
    "SkyReelsV2DiffusionForcingPipeline": ROWS,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": ROWS,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": ROWS,
}
"""Pipelines in which a scheduler cannot search at all, and why."""


def ltx_frame(pipe: Any, call: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """LTX steps all frames but the first."""
    first, sizes = (
        call["latents"][:, :, :1],
        (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size),
    )
    return lambda x0: pipe._pack_latents(torch.cat([first.to(x0), x0], 2), *sizes)


def wan_frame(pipe: Any, call: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Wan 2.2 of 5B steps all frames, and its pipeline exchanges the first at the end; the others change nothing."""
    if not pipe.config.expand_timesteps:
        return None
    mask, condition = call["first_frame_mask"], call["condition"]
    return lambda x0: (1 - mask) * condition + mask * x0


FRAMES = {"LTXImageToVideoPipeline": ltx_frame, "WanImageToVideoPipeline": wan_frame}
"""Pipelines that complete their latents with a frame, and how, from the variables of their call."""


def calling_pipeline() -> tuple[Any, dict[str, Any]]:
    """The pipeline that is calling its scheduler, with the variables of its call (of a modular pipeline: of its block);
    (None, {}) in a loop of the user's own. A pipeline does not show itself to its scheduler, but it stands on the
    stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DiffusionPipeline):
            return owner, frame.f_locals
        if isinstance(owner, ModularPipelineBlocks):
            return frame.f_locals.get("components"), frame.f_locals
        frame = frame.f_back
    return None, {}


class AfterStep:
    """Follows the latents of one run of a pipeline from step to step.

    name: of the pipeline. prompts: that it was called with; None where it shows none. unknown: why what comes out of it
    cannot be told from its last step; "" where it can.

    Raises:
        ModelError: a pipeline in which no search can run.
    """

    def __init__(self, pipe: Any, call: dict[str, Any]):
        kinds = [kind.__name__ for kind in type(pipe).__mro__]
        self.name = "this loop" if pipe is None else kinds[0]
        kinds.append(type(call.get("self")).__name__)  # the block of a modular pipeline
        prompts = call.get("prompt")
        self.prompts = [prompts] if isinstance(prompts, str) else prompts and list(prompts)
        never = next((NEVER[kind] for kind in kinds if kind in NEVER), "")
        if never:
            raise ModelError(f"{self.name} {never}: no search can run inside it; use a FlowSDEScheduler there")
        self.unknown = next((LAST[kind] for kind in kinds if kind in LAST), "")
        self.completed: Callable[[Tensor], Tensor] | None = None
        for kind in FRAMES.keys() & set(kinds):
            try:
                self.completed = FRAMES[kind](pipe, call)
            except (KeyError, AttributeError):  # another version of diffusers
                self.unknown = FRAME
        if call.get("padding_mask_crop") is not None and call.get("output_type") != "latent":
            self.unknown = "pastes its pictures into the original (padding_mask_crop)"
        self.handed: Tensor | None = None
        self.version: int | None = None
        self.image: Tensor | None = None
        self.noised: Tensor | None = None
        self.shares: tuple[Tensor, Tensor] | None = None  # sums of (y - z)(h - z) and of (h - z)^2
        self.packed: Callable[[Tensor], Tensor] | None = None
        if "FluxControlInpaintPipeline" in kinds:  # it packs its image after it was noised
            self.packed = lambda image: pipe._pack_latents(image, *image.shape)
        self.inpaints = any("Inpaint" in kind for kind in kinds)
        self.lost = False  # latents came back as nothing here explains
        self.steps = 0

    def hands_out(self, latents: Tensor) -> None:
        self.handed, self.version, self.noised = latents, _version(latents), None
        self.steps += 1

    def noises(self, image: Tensor, noised: Tensor) -> None:
        """scale_noise was called: inpainting pipelines noise their image anew after each step but the last."""
        image, noised = image.detach(), noised.detach()
        self.image, self.noised = (image, noised) if self.packed is None else map(self.packed, (image, noised))

    def comes_back(self, latents: Tensor) -> None:
        """Compares the latents (N, ...) of a step with what the step before handed out."""
        if self.handed is None or self.lost:
            return
        if latents is self.handed and _version(latents) == self.version:
            return
        same = latents.shape == self.handed.shape and latents is not self.handed
        if self.noised is not None and same and self.noised.shape == latents.shape:
            self.lost = not self._mixed(latents, self.handed, self.noised)
        else:
            self.lost = not same or not torch.equal(latents, self.handed.to(latents.dtype))
        if self.lost:
            self.shares = None
            self.unknown = self.unknown or "changes its latents between steps in a way that is not known here"

    def ends(self) -> None:
        """The last step is being made."""
        if not self.unknown and self.steps == 0 and self.inpaints:
            self.unknown = "puts its image back after its only step, where its mask has not shown yet"

    def come_out(self, x0: Tensor) -> Tensor:
        """Finished latents (N, ...) of a step as the pipeline completes them, as far as is known by now."""
        if self.completed is not None:
            return self.completed(x0)
        if self.shares is None or self.image is None or self.image.shape != x0.shape:
            return x0
        mask = self._mask()
        return (1.0 - mask) * self.image.to(x0) + mask * x0

    def _mixed(self, latents: Tensor, handed: Tensor, noised: Tensor) -> bool:
        """Takes the mask from y = m h + (1 - m) z; whether there is one that explains all y so far."""
        precision = max(torch.finfo(part.dtype).eps for part in (latents, handed, noised))
        y, h, z = latents.detach().float(), handed.float(), noised.float()
        here = ((y - z) * (h - z), (h - z).square())
        self.shares = here if self.shares is None else (self.shares[0] + here[0], self.shares[1] + here[1])
        error = (y - z - self._mask() * (h - z)).abs()
        return bool((error <= 16 * precision * (h.abs() + z.abs() + y.abs())).all())

    def _mask(self) -> Tensor:
        assert self.shares is not None
        return (self.shares[0] / self.shares[1]).nan_to_num(1.0).clamp(0.0, 1.0)  # 0 / 0: image and latents are equal


def _version(latents: Tensor) -> int | None:
    """Rises with each change in place; tensors of torch.inference_mode have none."""
    return None if latents.is_inference() else latents._version
