"""A flow that costs nothing, in the place of the scenes model: the command line is tested, not the model."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowfast import api, cli
from flowfast.benchmark import results as bench_results
from flowfast.comparison import results
from flowfast.engine import clock
from flowfast.errors import PromptError
from flowfast.report import generate
from flowfast.types import Sample

PROMPTS = ["two red circles", "a green cross and a blue square", "one yellow triangle", "three blue crosses"]


def encode(prompts: list[str]) -> dict[str, Tensor]:
    if any(text == "nonsense" for text in prompts):
        raise PromptError("cannot read 'nonsense': write counts, colours and kinds")
    return {"length": torch.tensor([float(len(text)) for text in prompts])}


def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Towards a grey that depends on the prompt, and half of the noise stays: so seeds and candidates differ."""
    grey = (cond["length"] / 40.0).clamp(max=1).view(-1, 1, 1, 1)
    return (x_t - grey) * 0.5


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> Any:
        if name != "scenes":
            return real(name, **options)
        return api.flow_from(velocity, (3, 32, 32), decode=lambda x: x.mul(0.1).add(0.5).clamp(0, 1), encode=encode)

    real = api.load
    monkeypatch.setattr(api, "load", load)


def noted(*given: Any) -> bytes:
    """In the place of a picture: what it would show, so that two are equal where the pictures are."""
    return hashlib.blake2b(repr(plain(given)).encode()).hexdigest().encode()


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, Sample):
        return value.prompt, value.method, value.nfe, value.reward, plain(value.image)
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look at it moves on: a budget in seconds buys the same on every machine."""
    looks = itertools.count()
    monkeypatch.setattr(clock, "now", lambda: next(looks) / 1600)


@pytest.fixture
def drawn() -> None:
    """For tests that look at the pictures: they are drawn."""


@pytest.fixture(autouse=True)
def noted_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes most of the time of a small search, so it is drawn only where a test looks at it."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(generate, "search_picture", noted)
        monkeypatch.setattr(results, "curve_picture", noted)
        monkeypatch.setattr(results, "contact_picture", noted)
        monkeypatch.setattr(bench_results, "latency_picture", noted)
        monkeypatch.setattr(bench_results, "throughput_picture", noted)


class Run:
    """One call of the command line: exit code and what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *argv: Any, expect: int = 0) -> str:
        code = cli.main([str(word) for word in argv])
        out, err = self.capfd.readouterr()
        self.err = err
        assert code == expect, err
        return out

    def refused(self, *argv: Any) -> str:
        """The one line of an error, exit code 2, nothing else printed."""
        out = self(*argv, expect=2)
        assert out == ""
        assert self.err.startswith("flowfast: ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd)


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
