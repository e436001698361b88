"""How a reward is named: name, argument, weight, sums of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowfast import rewards
from flowfast.errors import OptionError
from flowfast.rewards import CallableReward, available, load, parse
from flowfast.rewards.sharpness import Sharpness

FOLDER = Path(rewards.__file__).parent


def terms(text: str) -> list[tuple[str, str | None, float]]:
    return [term[:3] for term in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sharpness", [("sharpness", None, 1.0)]),
        (" sharpness * 0.5 ", [("sharpness", None, 0.5)]),
        ("clipscore:a/b", [("clipscore", "a/b", 1.0)]),
        ("clipscore:a/b@main*0.7 + sharpness*-2", [("clipscore", "a/b@main", 0.7), ("sharpness", None, -2.0)]),
        ("vqascore:blip_itm:a/b*2", [("vqascore", "blip_itm:a/b", 2.0)]),
        ("clipscore:/x/a+b/c++*3+sharpness", [("clipscore", "/x/a+b/c++", 3.0), ("sharpness", None, 1.0)]),
        ("clipscore:C:/models/clip", [("clipscore", "C:/models/clip", 1.0)]),
    ],
)
def test_terms(text: str, expected: list[tuple[str, str | None, float]]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize("text", ["http://[::1]:8000/score?a=b", "https://host/a+b"])
def test_a_url_is_an_argument_of_http(text: str) -> None:
    assert terms(text) == terms("http:" + text) == [("http", text, 1.0)]
    assert terms(f"{text}*0.5+sharpness*0.5+{text}") == [
        ("http", text, 0.5), ("sharpness", None, 0.5), ("http", text, 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beauty", "unknown reward 'beauty': choose one of scenes, sharpness, aesthetic, clipscore"),
        ("beauty:a/b", "unknown reward 'beauty'"),
        ("sharpness+beauty", "unknown reward 'beauty'"),
        ("sharpness+", "unknown reward ''"),
        ("sharpness:3", "'sharpness' takes nothing after ':', got '3'"),
        ("clipscore:", "expected something after 'clipscore:'"),
        ("clipscore:a*b", "expected a weight after '\\*', got 'b'"),
    ],
)
def test_what_cannot_be_is_named(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse(text)


def test_the_argument_weight_and_deadline_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def one(argument: str | None = None) -> Any:
        asked.append(argument)
        return CallableReward(lambda images, prompts: [2.0] * len(prompts), name="one")

    real = rewards.module_of
    monkeypatch.setattr(
        rewards, "module_of", lambda name: SimpleNamespace(load=one) if name == "clipscore" else real(name)
    )
    assert load("clipscore:a/b", deadline=3).deadline == 3
    both = load("clipscore*0.5+sharpness*10", deadline=3)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both(images, ["", ""]), 1 + 10 * Sharpness()(images, torch.zeros(2), {}))
    assert asked == ["a/b", None]


def test_every_file_has_a_name_and_every_name_a_file() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if "\nONE_LINE = " in path.read_text(encoding="utf-8")}
    assert set(rewards.NAMES.values()) == files


def test_listing_them_imports_no_transformers() -> None:
    code = "import sys; from flowfast.rewards import available; available(); print('transformers' in sys.modules)"
    root = FOLDER.parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "False"
    assert all(line and "\n" not in line for line in available().values())
