"""`flowfast export` and `flowfast info ARCHIVE`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

import flowfast
from tests.cli.conftest import PROMPTS, Run

FAST = ("--reward", "sharpness", "--method", "rbf", "--budget", "40", "--steps", "5", "--slots", "2")


def test_it_writes_an_archive_and_says_what_it_is(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.pt"
    text = run("export", *FAST, "--prompt", PROMPTS[0], "--out", file)
    assert text == run("info", file)
    info = json.loads(run("info", file, "--json"))
    assert {"method": "rbf", "reward": "sharpness", "slots": "2", "budget_max": "40"}.items() <= info.items()
    assert json.loads(info["config"])["steps"] == 5
    with torch.no_grad():
        assert list(flowfast.load_archive(file).encode([PROMPTS[0]])) == ["cond/length", "reward/none"]


def test_prompt_files_and_a_config(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "svdd", "budget": 90, "integrator": "exponential"}))
    asked = ("--prompts", tmp_path / "prompts.txt", "--config", tmp_path / "config.yaml", "--out", tmp_path / "a.pt")
    run("export", *(word for word in FAST if word not in ("--method", "rbf")), *asked, "--option", "choice=softmax")
    info = json.loads(run("info", tmp_path / "a.pt", "--json"))
    config = json.loads(info["config"])
    assert (config["method"], config["budget"], config["integrator"]) == ("svdd", 40, "exponential")
    assert config["method_options"] == {"choice": "softmax"}
    with torch.no_grad():
        assert len(flowfast.load_archive(tmp_path / "a.pt").encode(PROMPTS)["cond/length"]) == len(PROMPTS)


def test_what_cannot_work_is_refused(run: Run, tmp_path: Path) -> None:
    assert "give all prompts" in run.refused("export", *FAST, "--out", tmp_path / "a.pt")
    assert "unknown format" in run.refused("export", *FAST, "--format", "onnx", "--out", tmp_path / "a.pt")
    assert "runs on the host" in run.refused("export", "--reward", "compressibility", "--out", tmp_path / "a.pt")
    assert "cannot read" in run.refused("info", tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
