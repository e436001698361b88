"""`--layout geneval`: what GenEval's evaluate_images.py walks over."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowfast import api
from flowfast.engine import call
from flowfast.engine.runner import LiveRunner
from flowfast.errors import RewardError
from tests.cli.conftest import Run

FAST = ("--reward", "sharpness", "--budget", "40", "--steps", "5", "--method", "bon")
LIST: list[dict[str, Any]] = [
    {
        "tag": "color_attr",
        "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
        "prompt": "a red circle and a blue square",
    },
    {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "three green crosses",
    },
]


def evaluated(out: Path) -> dict[str, tuple[Any, list[str]]]:
    """Folder: (metadata, samples), walked over as the evaluator does (commit 16f1681)."""
    found = {}
    for name in os.listdir(out):
        if (out / name).is_dir() and name.isdigit():
            samples = [sample for sample in os.listdir(out / name / "samples") if re.match(r"\d+\.png", sample)]
            found[name] = (json.loads((out / name / "metadata.jsonl").read_text()), sorted(samples))
    return found


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LIST))
    return path


def test_top_k_and_repeats_are_the_samples(run: Run, tmp_path: Path, metadata: Path) -> None:
    argv = ("--prompts", metadata, *FAST, "--layout", "geneval", "--top-k", "2", "--out", tmp_path / "o")
    run("generate", *argv)
    first = (tmp_path / "o" / "00001" / "samples" / "00000.png").read_bytes()
    run("generate", *argv, "--repeat", "1")
    names = [f"{number:05d}.png" for number in range(4)]
    assert evaluated(tmp_path / "o") == {"00000": (LIST[0], names), "00001": (LIST[1], names)}
    pictures = {(tmp_path / "o" / "00001" / "samples" / name).read_bytes() for name in names}
    assert len(pictures) == 4 and first in pictures


@pytest.mark.parametrize(
    "other",
    [("--top-k", "1"), ("--top-k", "1", "--repeat", "1"), ("--top-k", "3", "--method", "ode"), ("--seed", "7")],
    ids=" ".join,
)
def test_samples_of_another_call_are_not_counted(
    run: Run, tmp_path: Path, metadata: Path, other: tuple[str, ...]
) -> None:
    argv = ("--prompts", metadata, *FAST, "--layout", "geneval", "--out")
    run("generate", *argv, tmp_path / "o", "--top-k", "3")
    run("generate", *argv, tmp_path / "o", "--top-k", "3", "--repeat", "1", "--micro-batch", "8")
    (tmp_path / "o" / "00000" / "samples" / "notes.txt").write_text("mine")
    run("generate", *argv, tmp_path / "o", *other)
    run("generate", *argv, tmp_path / "alone", *other)
    assert evaluated(tmp_path / "o") == evaluated(tmp_path / "alone")
    for path in (tmp_path / "alone").glob("*/samples/*"):
        assert path.read_bytes() == (tmp_path / "o" / path.relative_to(tmp_path / "alone")).read_bytes()
    assert (tmp_path / "o" / "00000" / "samples" / "notes.txt").exists()


def test_folders_of_other_prompts_are_refused(run: Run, tmp_path: Path, metadata: Path) -> None:
    argv = ("generate", *FAST, "--layout", "geneval", "--out", tmp_path / "o", "--prompts")
    run(*argv, metadata)
    (tmp_path / "one.jsonl").write_text(json.dumps(LIST[1]))
    before = sorted(path.read_bytes() for path in (tmp_path / "o").rglob("*.*"))
    line = run.refused(*argv, tmp_path / "one.jsonl")
    assert "o has samples of other prompts (folder 00001), which GenEval would count too" in line
    assert sorted(path.read_bytes() for path in (tmp_path / "o").rglob("*.*")) == before


def test_a_call_that_does_not_begin_removes_nothing(
    run: Run, tmp_path: Path, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("generate", *FAST, "--prompts", metadata, "--layout", "geneval", "--out", tmp_path / "o", "--top-k")
    run(*argv, "2")
    before = evaluated(tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(LiveRunner, "_decide", lambda *a: pytest.fail("began"))
        run.refused(*argv, "1", "--budget", "1")
    assert evaluated(tmp_path / "o") == before


def test_the_pictures_are_those_of_the_plain_layout_and_rerun(run: Run, tmp_path: Path, metadata: Path) -> None:
    run("generate", "--prompts", metadata, *FAST, "--out", tmp_path / "plain")
    run("generate", "--prompts", metadata, *FAST, "--layout", "geneval", "--out", tmp_path / "a")
    config = tmp_path / "a" / "00000" / "config.yaml"
    run("generate", "--config", config, "--out", tmp_path / "b")
    run("generate", "--config", config, "--layout", "plain", "--out", tmp_path / "c")
    for out, layout in (("plain", None), ("a", "geneval"), ("c", None)):
        folder = sorted(path for path in (tmp_path / out).iterdir() if path.is_dir())[0]
        assert yaml.safe_load((folder / "config.yaml").read_text()).get("layout") == layout
    plain = (tmp_path / "plain" / "00-a-red-circle-and-a-blue-square" / "best.png").read_bytes()
    for out in ("a", "b"):
        assert (tmp_path / out / "00000" / "samples" / "00000.png").read_bytes() == plain
    assert evaluated(tmp_path / "a") == evaluated(tmp_path / "b")
    assert (tmp_path / "c" / "01-three-green-crosses" / "best.png").exists()


def test_a_stopped_call_goes_on_in_its_layout(
    run: Run, tmp_path: Path, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)

    def dies(self: Any, found: Any) -> None:
        rounds[0] += 1
        if rounds[0] == 3:
            raise RewardError("killed")
        decide(self, found)

    decide, rounds = LiveRunner._decide, [0]
    with monkeypatch.context() as patch:
        patch.setattr(LiveRunner, "_decide", dies)
        run("generate", "--prompts", metadata, *FAST, "--layout", "geneval", "--out", tmp_path / "o", expect=2)
    run("generate", "--resume", tmp_path / "o")
    assert evaluated(tmp_path / "o") == {f"{i:05d}": (line, ["00000.png"]) for i, line in enumerate(LIST)}


def test_classes_and_counts_will_do(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "two red circles", "classes": ["circle", "square"], "counts": [2, 0]}')
    run("generate", "--prompts", path, *FAST, "--layout", "geneval", "--out", tmp_path / "o")
    include, exclude = (
        [{"class": "circle", "count": 2}],
        [{"class": "circle", "count": 3}, {"class": "square", "count": 1}],
    )
    about = {"tag": "counting", "include": include, "exclude": exclude, "prompt": "two red circles"}
    assert evaluated(tmp_path / "o") == {"00000": (about, ["00000.png"])}


def test_what_it_cannot_hold_is_refused_before_the_model_is_there(
    run: Run, tmp_path: Path, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("loaded"))
    argv = ("--prompts", metadata, *FAST, "--out", tmp_path / "o", "--layout")
    line = run.refused("generate", "a blue cross", *argv, "geneval")
    assert "prompt 1 of 3: --layout geneval: expected a prompt with GenEval's include" in line
    assert "unknown --layout 'genval': choose one of plain, geneval" in run.refused("generate", *argv, "genval")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a kite", "include": ["circle"]}')
    argv = ("--prompts", tmp_path / "wrong.jsonl", *FAST, "--out", tmp_path / "o", "--layout", "geneval")
    assert "wrong.jsonl, entry 1: field 'include' must be a list of objects" in run.refused("generate", *argv)
    assert not (tmp_path / "o").exists()
