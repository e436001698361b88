"""Flow pipelines of Hugging Face diffusers (`pip install flowfast[diffusers]`), one family a file.

`from_diffusers` picks the adapter by the pipeline's class. Nothing here imports diffusers before a pipeline is asked
for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from flowfast.errors import ModelError, OptionError, WeightError
from flowfast.models.diffusers.base import DiffusersFlow

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
LOADING = (
    "dtype",
    "torch_dtype",
    "device_map",
    "quantization_config",
    "local_files_only",
    "revision",
    "cache_dir",
    "token",
)


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
        vae_tiling, vae_slicing: decode in pieces, for large images and many of them.
        preview_decoder: an `AutoencoderTiny` of diffusers, or the id or folder of one: the search scores what it
            decodes, and the best few samples (`finalists`) are decoded in full, scored again and ranked anew.
        options: dtype, device_map, quantization_config, local_files_only, revision, cache_dir, token for an id;
            the rest goes to the family's adapter (height, width, steps, guidance, ...).

    Raises:
        OptionError: unknown options. ModelError: not a flow pipeline, or one without an adapter. WeightError: weights
            that are not on this machine, or not safetensors.
    """
    loading = {name: options.pop(name) for name in LOADING if name in options}
    if "torch_dtype" in loading:  # the older name of the same
        loading["dtype"] = loading.pop("torch_dtype")
    if isinstance(loading.get("dtype"), str):
        loading["dtype"] = dtype_of(loading["dtype"])
    if isinstance(pipe, str | Path):
        pipe = load_pipeline(str(pipe), loading)
        if offload is None and "device_map" not in loading:
            pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif loading or device is not None:
        wrong = sorted(loading) or ["device"]
        raise OptionError(
            f"{', '.join(wrong)}: only for an id or folder; the pipeline that was given is loaded already"
        )
    family = adapter_of(pipe)
    if offload not in (None, "model", "sequential"):
        raise OptionError(f"unknown offload {offload!r}: choose model or sequential")
    if offload:
        pipe.enable_model_cpu_offload() if offload == "model" else pipe.enable_sequential_cpu_offload()
    for wanted, name in ((vae_tiling, "enable_tiling"), (vae_slicing, "enable_slicing")):
        if wanted:
            getattr(pipe.vae, name)()
    if isinstance(preview_decoder, str | Path):
        preview_decoder = load_tiny(str(preview_decoder), pipe, loading)
    try:
        return family(pipe, preview_decoder=preview_decoder, **options)
    except TypeError as error:
        raise OptionError(f"{family.__name__}: {error}; see its docstring for the options") from None


def dtype_of(name: str) -> torch.dtype:
    """A storage type by its name, for command lines and files. Raises OptionError."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"unknown dtype {name!r}: choose bfloat16, float16 or float32")
    return found


def load_pipeline(name: str, loading: dict[str, Any]) -> Any:
    """DiffusionPipeline.from_pretrained; says which id is missing and how to get it."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ModelError(f"model {name!r} needs diffusers: pip install 'flowfast[diffusers]'") from None
    try:
        return DiffusionPipeline.from_pretrained(name, use_safetensors=True, **loading)
    except (OSError, ValueError) as error:
        raise missing(repr(name), name, error) from error


def load_tiny(name: str, pipe: Any, loading: dict[str, Any]) -> Any:
    """An AutoencoderTiny beside a pipeline's own autoencoder. Raises WeightError."""
    from diffusers import AutoencoderTiny

    access = {key: loading[key] for key in ("local_files_only", "cache_dir", "token") if key in loading}
    try:
        tiny = AutoencoderTiny.from_pretrained(name, use_safetensors=True, **access)
    except (OSError, ValueError) as error:
        raise missing(f"preview_decoder {name!r}", name, error) from error
    return tiny.to(pipe._execution_device, pipe.vae.dtype).eval()


def missing(what: str, name: str, error: Exception) -> WeightError:
    reason = str(error).splitlines()[0]
    return WeightError(f"cannot load {what}: {reason}; where there is a network, `hf download {name}` gets it")


def adapter_of(pipe: Any) -> type[DiffusersFlow]:
    """The family's adapter. Raises ModelError for what is no flow pipeline or has none."""
    name = type(pipe).__name__
    if name in FAMILIES:
        module, _, cls = FAMILIES[name].partition(".")
        return getattr(importlib.import_module(f"flowfast.models.diffusers.{module}"), cls)
    prediction = getattr(getattr(pipe, "scheduler", None), "config", {}).get("prediction_type", "flow_prediction")
    if hasattr(pipe, "unet") or prediction in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{name} predicts {prediction}, not a flow's velocity: flowfast searches flow models only")
    raise ModelError(f"{name} has no adapter; there are {', '.join(FAMILIES)}. See docs/design.md, Adding a model")


__all__ = ["FAMILIES", "DiffusersFlow", "from_diffusers"]
