"""What a recording searcher hands over and what the driver writes of it, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flowfast import cli
from flowfast.cli import on_ray
from flowfast.config import make_config
from flowfast.prompts import Prompt
from flowfast.ray import generate, record
from flowfast.ray.generate import RayConfig
from flowfast.ray.record import RecordingSearcher

CONFIG = make_config({"method": "bon", "budget": 20, "micro_batch": 4, "steps": 10})
TEXTS = [Prompt("two red circles", seed=7), "", "one blue square"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Prompts are searched for in this process, one a batch; those that were asked for."""
    asked: list[Any] = []

    def found_by(prompts: Any, config: Any, where: Any) -> Any:
        searcher = RecordingSearcher(config.model_dump())
        for number, prompt in prompts[::-1]:
            asked.append(number)
            entry = json.dumps(prompt.as_entry() if isinstance(prompt, Prompt) else prompt)
            columns = searcher({"number": np.array([number]), "prompt": np.array([prompt]), "entry": np.array([entry])})
            yield {name: plain(values[0]) for name, values in columns.items()}
        searcher.engine.close()

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    monkeypatch.setattr(generate, "found_by", found_by)
    return asked


def draw(out: Path, resumed: bool = False) -> Any:
    return on_ray.gathered(out, list(TEXTS), CONFIG, RayConfig(), resumed, "plain")


def test_the_files_are_those_of_a_call_in_one_process(
    here: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, folders, failed = draw(tmp_path / "one")
    assert [folder.name for folder in folders] == ["00-two-red-circles", "02-one-blue-square"] and not failed
    call = {"prompts": [TEXTS[0].as_entry(), "", TEXTS[2]], **CONFIG.model_dump()}  # type: ignore[attr-defined]
    (tmp_path / "call.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(call))))
    assert cli.main(["generate", "--config", str(tmp_path / "call.yaml"), "--out", str(tmp_path / "two")]) == 2
    for name in ("best.png", "search.png", "candidates.jsonl"):
        for folder in folders:
            assert (folder / name).read_bytes() == (tmp_path / "two" / folder.name / name).read_bytes()
    assert json.loads((folders[0] / "result.json").read_text())["seed"] == 7
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(folder.name for folder in folders)


def test_what_could_not_be_drawn_is_asked_for_again_and_nothing_else_is(
    here: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record.search_picture

    def fails(sample: Any, *rest: Any) -> bytes:
        if "square" in sample.prompt:
            raise ValueError("no ink")
        return real(sample, *rest)

    monkeypatch.setattr(record, "search_picture", fails)
    draw(tmp_path)
    assert here == [1, 0] and (tmp_path / "call.yaml").exists()
    assert (tmp_path / "02-one-blue-square" / "best.png").exists()
    monkeypatch.setattr(record, "search_picture", real)
    here.clear()
    draw(tmp_path, resumed=True)
    assert here == [1] and not (tmp_path / "call.yaml").exists()
    assert (tmp_path / "02-one-blue-square" / "search.png").exists()


def test_a_call_that_was_killed_with_all_done_ends(here: list[Any], tmp_path: Path) -> None:
    draw(tmp_path)
    lines = [{"prompt": number, "config": CONFIG.model_dump(), "batch": batch(number)} for number in range(2)]
    (tmp_path / "gathered.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt": 1, "con')
    here.clear()
    shown, folders, _ = draw(tmp_path, resumed=True)
    assert here == [] and len(shown) == len(folders) == 2
    assert not (tmp_path / "gathered.jsonl").exists()


def batch(number: int) -> dict[str, Any]:
    seconds = {"model": 1.0, "decode": 0.0, "reward": 0.0, "search": 0.0}
    return {"id": str(number), "rows_padded": 3, "nan_rewards": 0, "seconds": seconds}
