"""PickScore (Kirstain et al., NeurIPS 2023, arXiv:2305.01569, section 3): exp(logit_scale) cos(image, text).

A CLIP-H fine-tuned on people's choices between two images of one prompt; differences of scores are log-odds of that
choice. Good images lie near 20 to 23.
"""

from __future__ import annotations

from torch import Tensor

from flowfast.rewards._clip import CLIP_H, ClipReward, own_processor

ONE_LINE = "PickScore, the preference model of Pick-a-Pic, about 15 to 25; :ID or :FOLDER of another"
DEFAULT = "yuvalkirstain/PickScore_v1"
PROCESSOR = CLIP_H


class PickScore(ClipReward):
    """Scores (N,) of images (N, 3, H, W)."""

    def __init__(self, source: str = DEFAULT, processor: str = PROCESSOR):
        super().__init__("pickscore", source, processor)
        self.scale = float(self.clip.logit_scale.exp())
        self.range = (-self.scale, self.scale)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.scale * self.cosine(images, cond)


def load(argument: str | None = None) -> PickScore:
    """argument: id, id@revision or folder of a CLIPModel; default: yuvalkirstain/PickScore_v1. A folder with a
    processor of its own uses that, all else CLIP-H's."""
    source = argument or DEFAULT
    return PickScore(source, own_processor(source) or PROCESSOR)
