"""LAION's improved aesthetic predictor (Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor):
how much people like an image, about 1 to 10, from the unit CLIP ViT-L/14 embedding. The prompt is not read.

The head, sac+logos+ava1-l14-linearMSE, is five linear layers (768, 1024, 128, 64, 16, 1) with nothing between them: one
linear function, and that is what is evaluated. The author's file is a pickle, which is not read here. Its weights
(layers.0, .2, .4, .6, .7) come from safetensors: those of the default id, tower and head in one, or of a file.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from flowfast.errors import RewardError, WeightError
from flowfast.rewards import _clip

ONE_LINE = "LAION's aesthetic predictor, about 1 to 10, ignores the prompt; :HEAD.safetensors, :ID or :FOLDER"
DEFAULT = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
TOWER = "openai/clip-vit-large-patch14"
LAYERS = (0, 2, 4, 6, 7)


class Aesthetic(nn.Module):
    """Scores (N,) of images (N, 3, H, W).

    Args:
        head: id, id@revision or folder with model.safetensors, or a .safetensors file.
        tower: id, id@revision or folder of a CLIP model with its image processor.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: str = DEFAULT, tower: str = DEFAULT):
        super().__init__()
        self.name, self.differentiable = "aesthetic", True
        self.clip = _clip.model("CLIPVisionModelWithProjection", tower, dtype=torch.float32)
        self.revision = _clip.revision_of(self.clip, tower)
        self.pixels = _clip.Pixels(_clip.pretrained("AutoImageProcessor", tower))
        weight, bias = read_head(head)
        if len(weight) != self.clip.config.projection_dim:
            raise WeightError(
                f"{head!r} is for embeddings of {len(weight)} numbers, but {tower!r} gives "
                f"{self.clip.config.projection_dim}; name the tower it was trained on"
            )
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        reach = float(weight.norm())
        self.range = (float(bias) - reach, float(bias) + reach)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Nothing of the prompt matters: an empty column, so that rows can be counted."""
        return {"none": torch.zeros(len(prompts), 0, dtype=torch.float32, device="cpu")}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Scores (N,) float32; t and cond are not read."""
        _clip.check_images(self.name, images)
        embedding = F.normalize(self.clip(self.pixels(images)).image_embeds, dim=-1)
        return (embedding @ self.weight + self.bias).float()


def read_head(source: str) -> tuple[Tensor, Tensor]:
    """The head as one linear function: weight (D,) and bias (), float32. Raises WeightError."""
    path = find_weights(source)
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if re.fullmatch(r"layers\.\d+\.(weight|bias)", name)]  # noqa: SIM118
            layers = {name: file.get_tensor(name).double() for name in names}
    except Exception as error:
        raise WeightError(f"cannot read {source!r}: {error}; expected a safetensors file") from error
    if set(layers) != {f"layers.{i}.{part}" for i in LAYERS for part in ("weight", "bias")}:
        raise WeightError(
            f"{source!r}: expected the linear head with layers {', '.join(map(str, LAYERS))}, weight and bias, "
            f"got {sorted(layers) or 'none'}; the head with ReLU is another model"
        )
    weight, bias = layers["layers.0.weight"], layers["layers.0.bias"]
    for i in LAYERS[1:]:
        weight, bias = layers[f"layers.{i}.weight"] @ weight, layers[f"layers.{i}.weight"] @ bias
        bias = bias + layers[f"layers.{i}.bias"]
    return weight[0].float(), bias[0].float()


def find_weights(source: str) -> Path:
    """The safetensors file of a file's path, a folder or an id."""
    if source.endswith(".safetensors"):
        if not Path(source).is_file():
            raise WeightError(f"no file {source!r}: expected the head's weights as safetensors")
        return Path(source)
    if Path(source).is_dir():
        return Path(source) / "model.safetensors"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise RewardError("this reward needs transformers: pip install 'transformers>=5'") from None
    name, revision = _clip.split_revision(source)
    try:
        return Path(hf_hub_download(name, "model.safetensors", revision=revision))
    except Exception as error:
        raise _clip.missing(source, error) from error


def load(argument: str | None = None) -> Aesthetic:
    """argument: a .safetensors file with the head (the tower is then openai/clip-vit-large-patch14), or id,
    id@revision or folder with tower and head; default: shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE.
    """
    source = argument or DEFAULT
    return Aesthetic(source, TOWER if source.endswith(".safetensors") else source)
