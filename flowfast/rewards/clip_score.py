"""CLIPScore (Hessel et al., EMNLP 2021, arXiv:2104.08718, section 3): 2.5 max(cos(image, text), 0).

Captions get the prefix of the paper, "A photo depicts"; factor and prefix are those of the authors' own clipscore.py.
The paper's figures are of ViT-B/32 ("clipscore:openai/clip-vit-base-patch32"); the default here is the larger ViT-L/14.
Some tools report 100 max(cos, 0) without the prefix.
"""

from __future__ import annotations

from torch import Tensor

from flowfast.rewards._clip import ClipReward

ONE_LINE = "CLIPScore, 2.5 max(cos, 0) of image and prompt, 0 to 2.5; :ID or :FOLDER of a CLIP model"
DEFAULT = "openai/clip-vit-large-patch14"


class ClipScore(ClipReward):
    """Scores (N,) of images (N, 3, H, W). The gradient is 0 where the cosine is negative."""

    prefix = "A photo depicts "

    def __init__(self, source: str = DEFAULT):
        super().__init__("clipscore", source)
        self.range = (0.0, 2.5)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return 2.5 * self.cosine(images, cond).clamp(min=0)


def load(argument: str | None = None) -> ClipScore:
    """argument: id, id@revision or folder of a CLIPModel; default: openai/clip-vit-large-patch14."""
    return ClipScore(argument or DEFAULT)
