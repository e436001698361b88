"""What rewards on transformers share: loading by id or folder, images as the processor's tensors, CLIP's two towers.

Weights are safetensors, no remote code is run, and transformers is imported when a reward is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowfast.errors import RewardError, WeightError

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and image processor the preference models use that were made of it."""
MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers for filters: interpolate's mode. With antialias both are Pillow's own filters."""


def pretrained(kind: str, source: str, **options: Any) -> Any:
    """`transformers.KIND.from_pretrained` of an id, an id@revision or a folder.

    Raises:
        RewardError: no transformers. WeightError: not on this machine and not to be had, or not safetensors.
    """
    try:
        import transformers
    except ImportError:
        raise RewardError("this reward needs transformers: pip install 'transformers>=5'") from None
    name, revision = split_revision(source)
    if revision:
        options["revision"] = revision
    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except ImportError as error:  # a processor without a version for Pillow
        raise RewardError(f"{kind} {name!r} needs a package that is not installed: {_line(error)}") from error
    except Exception as error:  # whatever a damaged folder makes the libraries raise
        raise missing(source, error) from error


def model(kind: str, source: str, **options: Any) -> Any:
    """A model for scoring: safetensors only, in evaluation mode, its weights without gradients."""
    loaded, info = pretrained(kind, source, use_safetensors=True, output_loading_info=True, **options)
    if info["missing_keys"]:  # transformers would draw them at random
        raise WeightError(
            f"{source!r} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}; expected a checkpoint of "
            f"{type(loaded).__name__}"
        )
    return loaded.eval().requires_grad_(False)


def missing(source: str, error: Exception) -> WeightError:
    name, revision = split_revision(source)
    if Path(name).exists():
        return WeightError(f"cannot load {name!r}: {_line(error)}; expected a folder that save_pretrained wrote")
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return WeightError(
        f"cannot load {name!r}: {_line(error)}; on a machine with access, `{command}` gets it, or name a folder"
    )


def split_revision(source: str) -> tuple[str, str | None]:
    """("id", "revision") of "id@revision"; a folder may have @ in its name."""
    name, at, revision = source.rpartition("@")
    return (name, revision) if at and not Path(source).exists() else (source, None)


def revision_of(loaded: nn.Module, source: str) -> str:
    """The commit on the hub that the weights came from, or "local" for a folder."""
    return getattr(loaded.config, "_commit_hash", None) or split_revision(source)[1] or "local"


def check_images(name: str, images: Tensor, rows: int | None = None) -> None:
    """Shape and type only, so a device does not wait. Raises RewardError."""
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
        raise RewardError(
            f"reward {name!r}: expected images (N, 3, H, W), float in [0, 1], "
            f"got {tuple(images.shape)} of {images.dtype}"
        )
    if rows is not None and rows != images.shape[0]:
        raise RewardError(
            f"reward {name!r}: expected one prompt for each image, got {images.shape[0]} images and {rows} prompts"
        )


def own_processor(source: str) -> str | None:
    """The folder itself where it holds a processor."""
    names = ("preprocessor_config.json", "processor_config.json")
    return source if any((Path(source) / name).exists() for name in names) else None


class Pixels(nn.Module):
    """Images (N, 3, H, W) in [0, 1] as an image processor makes its pixel_values (N, 3, h, w), float32, by tensors.

    Resized, cropped in the middle and normalised as the processor's configuration says; like Pillow's, what a filter
    overshoots is clamped. Pillow also rounds to 8 bits: the two differ by about a step of that, 1/255 before
    normalising, which differentiates through here and does not through Pillow.

    Raises:
        RewardError: the configuration does something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any):
        super().__init__()
        say = processor.to_dict().get
        self.size = {key: value for key, value in (say("size") or {}).items() if value} if say("do_resize") else {}
        crop = say("crop_size") if say("do_center_crop") else None
        self.crop = (crop["height"], crop["width"]) if crop else None
        known = set(self.size) in (set(), {"shortest_edge"}, {"height", "width"})
        scale = say("rescale_factor", 1 / 255) if say("do_rescale", True) else 1.0
        if not known or say("resample", 3) not in MODES or not 0.9 < 255 * scale < 1.1:
            raise RewardError(
                "expected an image processor that resizes to a shortest edge or to height and width, bilinear or "
                f"bicubic, got {type(processor).__name__} with size {self.size}, resample {say('resample')}, "
                f"rescale_factor {scale}"
            )
        self.mode = MODES[say("resample", 3)]
        normal = say("do_normalize", True)
        for name, plain in (("mean", 0.0), ("std", 1.0)):
            value = say(f"image_{name}") if normal else [plain] * 3
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, before the crop."""
        if "shortest_edge" in self.size:
            short, edge = min(height, width), self.size["shortest_edge"]
            long = int(edge * max(height, width) / short)
            return (edge, long) if height <= width else (long, edge)
        return (self.size["height"], self.size["width"]) if self.size else (height, width)

    def forward(self, images: Tensor) -> Tensor:
        x, (height, width) = images.float(), self.target(images.shape[2], images.shape[3])
        if (height, width) != tuple(images.shape[2:]):
            x = F.interpolate(x, (height, width), mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise RewardError(f"the crop {self.crop} is larger than the resized image ({height}, {width})")
            x = x[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return (x - self.mean) / self.std


class ClipReward(nn.Module):
    """CLIP's two towers: texts once a prompt in `encode`, images in `cosine`. Subclasses say what the score is.

    Args:
        source: id, id@revision or folder of a CLIPModel in safetensors.
        processor: the same for its tokenizer and image processor; default: `source`.
    """

    prefix = ""

    def __init__(self, name: str, source: str, processor: str | None = None):
        super().__init__()
        self.name, self.model_id, self.differentiable = name, split_revision(source)[0], True
        self.clip = model("CLIPModel", source, dtype=torch.float32)
        self.revision = revision_of(self.clip, source)
        self.tokenizer = pretrained("AutoTokenizer", processor or source)
        self.pixels = Pixels(pretrained("AutoImageProcessor", processor or source))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"text": (N, D)}, unit vectors. What is longer than CLIP's 77 tokens is cut, as everywhere with CLIP."""
        tokens = self.tokenizer(
            [self.prefix + prompt for prompt in prompts],
            padding="max_length",
            max_length=self.clip.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self.pixels.mean.device)
        features = self.clip.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return {"text": F.normalize(features, dim=-1)}

    def cosine(self, images: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Cosine (N,) float32 between images (N, 3, H, W) and their prompts."""
        check_images(self.name, images, cond["text"].shape[0])
        features = self.clip.get_image_features(self.pixels(images)).pooler_output
        return (F.normalize(features, dim=-1) * cond["text"]).sum(-1).float()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
