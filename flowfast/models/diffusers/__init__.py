"""Flow pipelines of Hugging Face diffusers (`pip install flowfast[diffusers]`), one family a file.

`from_diffusers` picks the adapter by the pipeline's class. Nothing here imports diffusers before a pipeline is asked
for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from flowfast.errors import ModelError, OptionError
from flowfast.models.diffusers.base import DiffusersFlow, part_of
from flowfast.models.diffusers.loading import LOADING, PARTS, load_pipeline, load_tiny
from flowfast.models.diffusers.options import checked_options

FAMILIES = {
    "FluxPipeline": "flux.FluxFlow",
    "HunyuanVideoPipeline": "hunyuan_video.HunyuanVideoFlow",
    "LTXPipeline": "ltx.LTXFlow",
    "WanPipeline": "wan.WanFlow",
    "StableDiffusion3Pipeline": "sd3.StableDiffusion3Flow",
    "QwenImagePipeline": "qwen_image.QwenImageFlow",
    "ZImagePipeline": "z_image.ZImageFlow",
    "SanaPipeline": "sana.SanaFlow",
    "Lumina2Pipeline": "lumina2.Lumina2Flow",
    "AuraFlowPipeline": "aura_flow.AuraFlowFlow",
    "Flux2Pipeline": "flux2.Flux2Flow",
    "Flux2KleinPipeline": "flux2.Flux2KleinFlow",
}
"""Pipeline class: file and class of its adapter."""


def from_diffusers(
    pipe: Any,
    *,
    device: str | torch.device | None = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    preview_decoder: Any = None,
    **options: Any,
) -> DiffusersFlow:
    """A diffusers pipeline as a Flow.

    Args:
        pipe: a loaded pipeline, or the id or folder of one (safetensors only, no remote code).
        device: where an id's pipeline goes; default: CUDA where there is one. Not with device_map or offload.
        offload: "model" or "sequential": parts go to the device only while they run (accelerate).
        vae_tiling: decode in pieces, for large images.
        vae_slicing: decode one after the other, for many images.
        preview_decoder: an `AutoencoderTiny` of diffusers, or the id or folder of one: the search scores what it
            decodes, and the best few samples (`finalists`) are decoded in full, scored again and ranked anew.
        options: for an id or folder those of its `from_pretrained` (dtype, variant, subfolder, revision, token,
            cache_dir, local_files_only, device_map, quantization_config, ..., and parts of the pipeline:
            text_encoder=None leaves one out); the rest goes to the family's adapter (height, width, steps, guidance or,
            where the model takes a scale as an input, distilled_guidance and true_cfg, embeds, ...).

    Raises:
        OptionError: unknown options. ModelError: not a flow pipeline, or one without an adapter. WeightError: weights
            that are not on this machine, or not safetensors.
    """
    given = {name: options.pop(name) for name in (*LOADING, *PARTS) if name in options}
    if isinstance(pipe, str | Path):
        if device is not None and (offload or "device_map" in given):
            raise OptionError(f"device={device} goes with neither offload nor device_map, which place the parts")
        pipe = load_pipeline(str(pipe), given)
        if offload is None and "device_map" not in given:
            place(pipe, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif given or device is not None:
        wrong = sorted(given) or ["device"]
        raise OptionError(
            f"{', '.join(wrong)}: only for an id or folder; the pipeline that was given is loaded already"
        )
    family = adapter_of(pipe)
    options = checked_options(family, options)
    if offload not in (None, "model", "sequential"):
        raise OptionError(f"unknown offload {offload!r}: choose model or sequential")
    if offload:
        try:
            pipe.enable_model_cpu_offload() if offload == "model" else pipe.enable_sequential_cpu_offload()
        except (RuntimeError, ValueError, ImportError) as error:
            raise OptionError(f"offload={offload} is not possible here: {error}") from error
    for wanted, name in ((vae_tiling, "tiling"), (vae_slicing, "slicing")):
        if wanted and not hasattr(part_of(pipe, "vae"), f"enable_{name}"):
            raise OptionError(f"vae_{name}: the pipeline's {type(pipe.vae).__name__} cannot; leave it out")
        if wanted:
            getattr(pipe.vae, f"enable_{name}")()
    if isinstance(preview_decoder, str | Path):
        preview_decoder = load_tiny(str(preview_decoder), pipe, given)
    return family(pipe, preview_decoder=preview_decoder, **options)


def place(pipe: Any, device: str | torch.device) -> None:
    """Brings a pipeline to a device. Raises OptionError where there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error
    pipe.to(device)


def adapter_of(pipe: Any) -> type[DiffusersFlow]:
    """The family's adapter. Raises ModelError for what is no flow pipeline or has none."""
    name = type(pipe).__name__
    for kind in type(pipe).__mro__:  # a class of one's own derives from its family's
        if kind.__name__ in FAMILIES:
            module, _, cls = FAMILIES[kind.__name__].partition(".")
            return getattr(importlib.import_module(f"flowfast.models.diffusers.{module}"), cls)
    prediction = getattr(getattr(pipe, "scheduler", None), "config", {}).get("prediction_type", "flow_prediction")
    if hasattr(pipe, "unet") or prediction in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{name} predicts {prediction}, not a flow's velocity: flowfast searches flow models only")
    raise ModelError(f"{name} has no adapter; there are {', '.join(FAMILIES)}. See docs/design.md, Adding a model")


__all__ = ["FAMILIES", "DiffusersFlow", "from_diffusers"]
