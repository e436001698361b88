"""Text rendering: what is asked for, how alike it is, and real words drawn with Pillow and read by rapidocr."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flowfast
from flowfast.errors import OptionError, PromptError, RewardError
from flowfast.prompts import Prompt
from flowfast.rewards import ocr, on_host
from flowfast.rewards.ocr import TextReward, asked_texts, load, quoted_texts
from tests.toys import GaussianFlow

reads = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rapidocr", "onnxruntime", "rapidfuzz")),
    reason="flowfast[ocr] (rapidocr, onnxruntime, rapidfuzz) is not installed",
)


def drawn(text: str, size: int = 32, ink: str = "black", paper: str = "white") -> Tensor:
    """(3, 192, 256) in [0, 1]: `text` near the middle."""
    image = Image.new("RGB", (256, 192), paper)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((128, 96), text, fill=ink, font=font, anchor="mm", align="center")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a dog's collar with 'Rex' on the dog's neck", ["Rex"]),
        ("the words 'it's here' on a wall", ["it's here"]),
        ("“Café” over „Bar“ over «Tee» over ‘Rum’", ["Café", "Bar", "Tee", "Rum"]),
        ('"one" and "two words"', ["one", "two words"]),
    ],
)
def test_what_stands_in_quotes_is_asked_for(prompt: str, texts: list[str]) -> None:
    assert asked_texts(prompt) == texts


@pytest.mark.parametrize("prompt", ["", "a dog's collar", 'an empty ""', 'a blank " "', 'five 5" nails'])
def test_a_prompt_without_quotes_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="expected the text to draw in quotes"):
        asked_texts(prompt)


@reads
@pytest.mark.parametrize(
    ("lines", "score"),
    [
        (["HELLO"], 1),
        (["hello"], 1),
        (["HEL", "LO"], 1),
        (["the HELLO there"], 1),
        (["HELLC"], 0.8),
        (["HELL"], 0.8),
        (["HELLOO"], 5 / 6),
        (["JUMBI"], 0),
        ([], 0),
        (["xx", "HALLO", "HELP"], 0.8),
    ],
)
def test_likeness(lines: list[str], score: float) -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert float(TextReward(read=lambda _: lines)(image, ['"Hello"'])) == pytest.approx(score)
    assert float(TextReward("exact", read=lambda _: lines)(image, ['"Hello"'])) == (score == 1)


@reads
def test_several_texts_are_a_mean() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert float(TextReward(read=lambda _: ["OPEN"])(image, ['"open" "shut"'])) == pytest.approx(0.5)
    assert float(TextReward("exact", read=lambda _: ["OPEN"])(image, ['"open" "shut"'])) == 0


@reads
@pytest.mark.parametrize(
    ("word", "size"), [("HELLO", 20), ("coffee", 32), ("OPEN", 56), ("search budget", 28), ("two\nlines", 40)]
)
def test_real_words_are_read(word: str, size: int) -> None:
    prompt = f'a card that says "{" ".join(word.split())}"'
    assert load("exact")(drawn(word, size)[None], [prompt]).tolist() == [1]


@reads
def test_a_wrong_letter_scores_lower_and_a_batch_is_its_images() -> None:
    reward = load()
    assert on_host(reward)
    assert reward.range == (0, 1)
    words = ["WELCOME", "WELCOMB", "WINDOW", ""]
    images = torch.stack([drawn(word, ink="white", paper="navy") for word in words])
    prompts = ['a neon sign "Welcome"'] * len(words)
    scores = reward(images, prompts).tolist()
    assert scores[0] == 1
    assert scores[1] == pytest.approx(6 / 7)
    assert 0 < scores[2] < 0.5
    assert scores[3] == 0
    assert float(reward(images[1:2], prompts[:1])) == scores[1]
    assert load("exact")(images[:2], prompts[:2]).tolist() == [1, 0]


@reads
def test_the_engine_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import rapidocr

    made = 0
    real = rapidocr.RapidOCR

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        return real(*args, **options)

    monkeypatch.setattr(rapidocr, "RapidOCR", counted)
    monkeypatch.setattr(ocr, "_engine", None)
    first, second = load(), load()
    assert made == 0
    for reward in (first, second):
        reward(torch.zeros(1, 3, 16, 16), ['"a"'])
    assert made == 1


def test_the_engine_gets_blue_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenCV has it; words in black on white do not tell."""
    seen: list[Any] = []

    def engine(image: np.ndarray, use_cls: bool) -> Any:
        seen.append((image[0, 0].tolist(), image.flags.c_contiguous, use_cls))
        return SimpleNamespace(txts=None)

    monkeypatch.setattr(ocr, "_engine", engine)
    assert ocr.read_lines(np.full((4, 4, 3), [1, 2, 3], dtype=np.uint8)) == []
    assert seen == [([3, 2, 1], True, False)]


@pytest.mark.parametrize("module", ["rapidocr", "rapidfuzz.distance.Levenshtein"])
def test_without_the_package_the_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(ocr, "_engine", None)
    with pytest.raises(RewardError, match=r"reward ocr needs .*pip install 'flowfast\[ocr\]'"):
        load()(torch.zeros(1, 3, 16, 16), ['"a"'])


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown mode 'fuzzy', choose one of levenshtein, exact"):
        load("fuzzy")


def test_a_prompts_own_text_stands_before_its_quotes() -> None:
    assert asked_texts(Prompt('a sign saying "SHUT"', text="OPEN")) == ["OPEN"]
    assert asked_texts(Prompt("two signs", text=["OPEN", "24H"])) == ["OPEN", "24H"]


def test_a_prompt_without_a_text_is_refused_before_the_search() -> None:
    flow = GaussianFlow()
    with pytest.raises(PromptError, match="prompt 2 of 2: reward ocr: expected the text to draw in quotes"):
        flowfast.search(flow, ['a mug with "TEA"', "a mug"], reward=TextReward(read=lambda image: []), budget=20)
    assert flow.seen == 0


@pytest.mark.parametrize("opened", ["'a ", "“", "„", "«", "‘a "])
def test_quotes_that_are_not_closed_cost_little(opened: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(PromptError, match="expected the text to draw in quotes") as caught:
        quoted_texts(opened * 20_000)
    assert time.perf_counter() - begun < 4
    assert len(str(caught.value)) < 300
