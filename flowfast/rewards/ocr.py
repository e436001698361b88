"""Text rendering: is the text that stands in quotes in the prompt readable in the image? Read by rapidocr (PP-OCR on
onnxruntime, its weights are in the package): `pip install flowfast[ocr]`.

Case and spaces do not count, and neither do other words of the image: the best run of words is taken. Of several quoted
texts the score is the mean.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowfast.errors import OptionError, PromptError, RewardError
from flowfast.prompts import field_of, show
from flowfast.rewards.host import CallableReward
from flowfast.rewards.pixels import to_pixels

ONE_LINE = 'is the text in quotes in the prompt readable in the image? 0 to 1; "ocr:exact" asks for every letter'
MODES = ("levenshtein", "exact")

# An apostrophe inside a word (dog's) is no quote. A quote that is not closed within 1,000 letters is none either, or a
# long text full of them would take hours.
QUOTED = re.compile(
    r'"([^"]+)"|“([^”]{1,1000})”|„([^“”]{1,1000})[“”]|«([^»]{1,1000})»|‘([^’]{1,1000})’(?!\w)'
    r"|(?<!\w)'(.{1,1000}?)'(?!\w)"
)

_lock = threading.Lock()
_engine: Any = None


class TextReward(CallableReward):
    """1 for the asked text; else 0 (exact) or 1 - Levenshtein distance / length of the longer text (levenshtein).

    Args:
        mode: "levenshtein" or "exact".
        read: image (H, W, 3) uint8, RGB -> the lines read, top to bottom; default: rapidocr.
    """

    def __init__(self, mode: str = "levenshtein", read: Callable[[np.ndarray], list[str]] | None = None) -> None:
        if mode not in MODES:
            raise OptionError(f"reward ocr: unknown mode {mode!r}, choose one of {', '.join(MODES)}")
        super().__init__(self.scores, name="ocr", range=(0.0, 1.0))
        self.mode, self.read = mode, read or read_lines

    def check(self, prompt: str) -> None:
        asked_texts(prompt)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Scores of images (N, 3, H, W) in [0, 1]. Raises PromptError where a prompt has nothing in quotes."""
        asked = [asked_texts(prompt) for prompt in prompts]
        found = []
        for image, texts in zip(to_pixels(images).permute(0, 2, 3, 1).numpy(), asked, strict=True):
            words = " ".join(self.read(image)).split()
            found.append(sum(likeness(text, words) for text in texts) / len(texts))
        return [float(score == 1) for score in found] if self.mode == "exact" else found


def load(argument: str | None = None) -> TextReward:
    """argument: the mode."""
    return TextReward(argument or "levenshtein")


def asked_texts(prompt: str) -> list[str]:
    """The texts to read: the prompt's own field (`flowfast.prompts.Prompt`), else what stands in quotes. Raises
    PromptError."""
    given = field_of(prompt, "text")
    if given is None:
        return quoted_texts(prompt)
    return [given] if isinstance(given, str) else list(given)


def quoted_texts(prompt: str) -> list[str]:
    """What stands in quotes. Raises PromptError where there is nothing."""
    texts = [text for groups in QUOTED.findall(prompt) for text in groups if plain(text)]
    if not texts:
        raise PromptError(
            f'reward ocr: expected the text to draw in quotes, got {show(prompt)}; write a sign saying "OPEN"'
        )
    return texts


def likeness(text: str, words: Sequence[str]) -> float:
    """1 - normalised Levenshtein distance of `text` to the run of consecutive `words` that is most like it."""
    levenshtein = _needed("rapidfuzz.distance.Levenshtein")
    want, read = plain(text), [plain(word) for word in words]
    best = 0.0
    for first in range(len(read)):
        run = ""
        for word in read[first:]:
            run += word
            best = max(best, levenshtein.normalized_similarity(want, run))
            if len(run) > 2 * len(want):
                break  # longer runs are only further off
    return best


def plain(text: str) -> str:
    """Without case and spaces."""
    return "".join(text.casefold().split())


def read_lines(image: np.ndarray) -> list[str]:
    """The lines of text in an image (H, W, 3) uint8 RGB, by one engine a process."""
    global _engine
    with _lock:  # the engine keeps the settings of a call in itself
        if _engine is None:
            _engine = _needed("rapidocr").RapidOCR(params={"Global.log_level": "critical"})
        answer = _engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False)  # BGR; no text upside down
    return list(answer.txts or ())


def _needed(module: str) -> Any:
    """A module of the extra. Raises RewardError."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(f"reward ocr needs {error.name or module}: pip install 'flowfast[ocr]'") from None
