"""HPS v2 (Wu et al. 2023, arXiv:2306.09341, section 4): 100 cos(image, text), as in the paper's tables.

A CLIP-H fine-tuned on people's choices between images of one prompt; good images lie near 25 to 30. The authors publish
pickled weights of open_clip, which are not loaded here: name a CLIPModel in safetensors that was made of them. The
authors' code pads images that are not square; here the processor crops them, as for every CLIP.
"""

from __future__ import annotations

from torch import Tensor

from flowfast.errors import OptionError
from flowfast.rewards._clip import CLIP_H, ClipReward, own_processor

ONE_LINE = "HPS v2, a preference model, 100 cos of image and prompt, about 20 to 30; needs :ID or :FOLDER"


class Hpsv2(ClipReward):
    """Scores (N,) of images (N, 3, H, W)."""

    def __init__(self, source: str, processor: str = CLIP_H):
        super().__init__("hpsv2", source, processor)
        self.range = (-100.0, 100.0)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return 100.0 * self.cosine(images, cond)


def load(argument: str | None = None) -> Hpsv2:
    """argument: id, id@revision or folder of a CLIPModel. A folder with a processor of its own uses that, all else
    CLIP-H's."""
    if not argument:
        raise OptionError(
            "reward hpsv2: expected a checkpoint, got none; write hpsv2:ID_OR_FOLDER of a transformers CLIPModel in "
            "safetensors. xswu/HPSv2 is a pickle of open_clip; adams-story/HPSv2-hf is a CLIPModel made of it, which "
            "from_pretrained and save_pretrained of transformers write to a folder as safetensors"
        )
    return Hpsv2(argument, own_processor(argument) or CLIP_H)
