"""Pipelines and tiny autoencoders from an id or a folder, by diffusers' `from_pretrained`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from flowfast.errors import ModelError, OptionError, WeightError
from flowfast.models.diffusers.base import part_of

LOADING = (
    "dtype", "torch_dtype", "variant", "subfolder", "revision", "token", "cache_dir", "local_files_only",
    "force_download", "proxies", "device_map", "max_memory", "low_cpu_mem_usage", "offload_folder",
    "offload_state_dict", "quantization_config", "disable_mmap", "use_safetensors",
)  # fmt: skip
"""Options of `from_pretrained` that are passed on."""
PARTS = (
    "transformer", "transformer_2", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer",
    "tokenizer_2", "tokenizer_3", "image_encoder", "feature_extractor",
)  # fmt: skip
"""Parts of a pipeline: given as they shall be, or None, they are not loaded."""


def load_pipeline(name: str, options: dict[str, Any]) -> Any:
    """DiffusionPipeline.from_pretrained (safetensors only, no remote code) with options of LOADING and PARTS.

    Raises:
        OptionError: a wrong type, or a part that the pipeline does not have. WeightError: what is not on this machine
            or not safetensors, and how to get it. ModelError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ModelError(f"model {name!r} needs diffusers: pip install 'flowfast[diffusers]'") from None
    options, name = dict(options), os.path.expanduser(name)
    if options.pop("use_safetensors", True) is not True:
        raise OptionError("use_safetensors: only True, other files can run code when they are read; leave it out")
    for part in PARTS:
        if isinstance(options.get(part), str | int | float | list | dict):
            raise OptionError(f"{part} must be a loaded part of the pipeline, or None to leave it out, got a value")
    if "torch_dtype" in options:  # the older name of the same
        options["dtype"] = options.pop("torch_dtype")
    if isinstance(options.get("dtype"), dict):
        options["dtype"] = {part: dtype_of(value) for part, value in options["dtype"].items()}
    elif "dtype" in options:
        options["dtype"] = dtype_of(options["dtype"])
    subfolder = options.pop("subfolder", None)
    try:
        folder = name if subfolder is None else str(within(name, subfolder, options))
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
    except Exception as error:  # damaged files raise whatever their readers raise
        raise missing(repr(name), name, error) from error
    absent = sorted(set(options) & set(PARTS) - set(pipe.components))
    if absent:
        raise OptionError(
            f"this {type(pipe).__name__} has no part {', '.join(absent)}: choose from {', '.join(pipe.components)}"
        )
    if "device_map" not in options:  # which may leave weights on the disk
        check_whole(name, pipe)
    return pipe


def check_whole(name: str, pipe: Any) -> None:
    """Raises WeightError where files lack weights of their model: diffusers leaves these without values."""
    for part, model in pipe.components.items():
        weights = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
        lacking = [weight for weight, value in weights if value.is_meta]
        if lacking:
            raise WeightError(
                f"cannot load {name!r}: the files of its {part} lack {len(lacking)} weights of what its config.json "
                f"describes, {lacking[0]} for one; get them anew"
            )


def within(name: str, subfolder: str, options: dict[str, Any]) -> Path:
    """The folder of a pipeline that lies deeper in a folder or repository: from_pretrained looks at the top only."""
    root = Path(name)
    if not root.is_dir():
        from huggingface_hub import snapshot_download

        access = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
        root = Path(snapshot_download(name, allow_patterns=f"{subfolder}/*", **access))
    return root / subfolder


def load_tiny(name: str, pipe: Any, options: dict[str, Any]) -> Any:
    """An AutoencoderTiny beside a pipeline's own autoencoder. Raises WeightError."""
    from diffusers import AutoencoderTiny

    access = {key: options[key] for key in ("local_files_only", "cache_dir", "token") if key in options}
    try:
        tiny = AutoencoderTiny.from_pretrained(os.path.expanduser(name), use_safetensors=True, **access)
    except Exception as error:
        raise missing(f"preview_decoder {name!r}", name, error) from error
    return tiny.to(pipe._execution_device, part_of(pipe, "vae").dtype).eval()


def dtype_of(name: Any) -> torch.dtype:
    """A storage type, also by its name, for command lines and files. Raises OptionError."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"unknown dtype {name!r}: choose bfloat16, float16 or float32")
    return found


def missing(what: str, name: str, error: Exception) -> WeightError:
    """Says what cannot be loaded, and what may be done."""
    known = isinstance(error, OSError | ValueError) and str(error)
    reason, folder = str(error).splitlines()[0] if known else f"{type(error).__name__}: {error}", Path(name)
    if folder.is_file():
        return WeightError(f"cannot load {what}: expected the folder of a pipeline, got a file; load it with diffusers")
    if not folder.is_dir():
        return WeightError(f"cannot load {what}: {reason}; where there is a network, `hf download {name}` gets it")
    names = [re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", path.name) for path in folder.rglob("*.safetensors")]
    variants = sorted({found[1] for found in names if found})
    there = f"; it has files of variant {', '.join(variants)}: give variant={variants[0]!r}" if variants else ""
    return WeightError(f"cannot load {what}: {reason}{there}")
