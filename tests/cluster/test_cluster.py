"""Searches on a small cluster: the bits of one process, whoever dies; errors in one line and in time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import yaml
from ray.data import ActorPoolStrategy

import flowfast
from flowfast import cli
from flowfast.config import make_config
from flowfast.errors import FlowfastError, OptionError
from flowfast.ray import Searcher, generate
from flowfast.ray.cluster import NAMESPACE
from flowfast.ray.generate import RayConfig, found_by
from flowfast.ray.record import RecordingSearcher
from flowfast.ray.rewards import start_reward
from flowfast.report.gathered import GatheredFiles
from tests.cluster.test_searcher import bits, rows_of

pytestmark = pytest.mark.usefixtures("cluster")
KINDS = ("circles", "squares", "triangles", "crosses")
PROMPTS = [
    f"{count} {colour} {kind}" for count in ("two", "three") for colour in ("red", "blue", "green") for kind in KINDS
]
OPTIONS: dict[str, Any] = {"method": "rbf", "budget": 40, "micro_batch": 4}


class Dies(Searcher):
    """Kills its process in its second batch, once: `mark` is a file that says that it has."""

    def __init__(self, mark: str, **options: Any) -> None:
        super().__init__(**options)
        self.mark, self.calls = Path(mark), 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 2:
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_24_prompts_on_2_actors_of_which_one_is_killed_have_the_bits_of_one_process(tmp_path: Path) -> None:
    own = Searcher("scenes", "scenes", **OPTIONS)
    expected = {row["prompt"]: bits(row) for row in rows_of(own({"prompt": np.array(PROMPTS)}))}
    own.engine.close()
    shuffled = [PROMPTS[place] for place in np.random.default_rng(1).permutation(len(PROMPTS))]
    mark = tmp_path / "died"
    dataset = ray.data.from_items([{"prompt": prompt} for prompt in shuffled], override_num_blocks=6).map_batches(
        Dies, fn_constructor_kwargs=dict(mark=str(mark), **OPTIONS), batch_size=4, num_cpus=1,
        compute=ActorPoolStrategy(size=2),
    )  # fmt: skip
    rows = dataset.take_all()
    assert mark.exists()
    assert len(rows) == 24
    assert {row["prompt"]: bits(row) for row in rows} == expected


FILES = ("best.png", "search.png", "candidates.jsonl")
CALL = ["generate", *PROMPTS[:3], "--budget", "40", "--micro-batch", "4", "--seed", "2"]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for name in FILES for path in sorted(out.glob(f"*/{name}"))}


def test_generate_leaves_the_folders_of_a_call_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where it was stopped in the middle: what is done is not searched again."""
    alone, out = tmp_path / "alone", tmp_path / "ray"
    assert cli.main([*CALL, "--out", str(alone)]) == 0
    on_ray = ["--ray", "local", "--actors", "2"]
    on_row, left = GatheredFiles.on_row, [1]

    def stops(files: GatheredFiles, row: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        on_row(files, row)

    monkeypatch.setattr(GatheredFiles, "on_row", stops)
    monkeypatch.setattr(generate, "BATCH", 1)
    assert cli.main([*CALL, *on_ray, "--out", str(out)]) == 130
    monkeypatch.setattr(GatheredFiles, "on_row", on_row)
    assert len((out / "gathered.jsonl").read_text().splitlines()) == 1 and (out / "call.yaml").exists()

    asked: list[int] = []
    found_by = generate.found_by

    def noted(prompts: Any, *rest: Any) -> Any:
        asked.extend(number for number, _ in prompts)
        return found_by(prompts, *rest)

    monkeypatch.setattr(generate, "found_by", noted)
    capfd.readouterr()
    assert cli.main(["generate", "--resume", str(out), *on_ray]) == 0
    assert len(asked) == 2
    assert files_of(out) == files_of(alone) and len(files_of(out)) == 9
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    for folder in alone.iterdir():
        one, two = (json.loads((each / folder.name / "result.json").read_text()) for each in (alone, out))
        assert list(one) == list(two)
        assert {name for name in one if one[name] != two[name]} <= {"rows_padded"}
        one, two = (yaml.safe_load((each / folder.name / "config.yaml").read_text()) for each in (alone, out))
        assert {name for name in one if one[name] != two[name]} == {"slots"} and list(one) == list(two)
    assert "| reward | held-out | NFE |" in capfd.readouterr().out


class Exits(RecordingSearcher):
    """Its process ends as it starts."""

    def __init__(self, **_: Any) -> None:
        os._exit(1)


class Slow(RecordingSearcher):
    def __init__(self, **_: Any) -> None:
        time.sleep(600)


def refused(config: dict[str, Any], where: dict[str, Any]) -> str:
    """What a call says, in time."""
    started = time.monotonic()
    with pytest.raises(FlowfastError) as found:
        list(found_by([(0, "two red circles")], make_config({"budget": 40, **config}), RayConfig(**where)))
    assert time.monotonic() - started < 150
    return str(found.value)


def test_a_model_that_does_not_exist_is_said_as_without_ray() -> None:
    said = refused({"model": "scenery"}, {})
    assert said.startswith("unknown model 'scenery': choose one of") and "\n" not in said


def test_an_actor_that_dies_as_it_starts_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "RecordingSearcher", Exits)
    assert "did not start within 15 s" in refused({}, {"start_seconds": 15})


@pytest.mark.parametrize(("searcher", "where"), [(Slow, {}), (RecordingSearcher, {"gpus": 1})])
def test_actors_that_do_not_start_in_time_end_the_call(
    searcher: type, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "RecordingSearcher", searcher)
    said = refused({}, {"start_seconds": 5, **where})
    assert "did not start within 5 s" in said and "\n" not in said


@pytest.mark.parametrize(
    ("config", "says"), [({"seconds": 1, "budget": None}, "--budget"), ({"cuts": [(0, 1, 2)]}, "without --ray")]
)
def test_what_one_process_alone_can_do_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        list(found_by([(0, "two red circles")], make_config({"budget": 40, **config}), RayConfig()))


def search_with(name: str) -> Any:
    return flowfast.search(
        flowfast.load("scenes"), PROMPTS[:2], reward=f"ray:{name}", method="rbf", budget=40, micro_batch=4
    )


def summary(result: Any) -> Any:
    return [(sample.reward, sample.winner, sample.image.numpy().tobytes()) for sample in result.samples]


def test_a_reward_actor_that_is_killed_starts_anew_and_scores_its_batch_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Started, asked and ended by the command line; two searches at once have the bits of one."""
    assert cli.main(["reward-server", "--ray", "judge", "--reward", "scenes"]) == 0
    assert "reward scenes at ray:judge" in capfd.readouterr().out
    alone = summary(search_with("judge"))
    pid = ray.get(ray.get_actor("judge", namespace=NAMESPACE).about.remote())["pid"]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(search_with, "judge") for _ in range(2)]
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        assert [summary(each.result()) for each in both] == [alone] * 2
    assert ray.get(ray.get_actor("judge", namespace=NAMESPACE).about.remote())["pid"] != pid
    assert cli.main(["reward-server", "--ray", "judge"]) == 2
    assert "stop the other one" in capfd.readouterr().err
    assert cli.main(["reward-server", "--ray", "judge", "--stop"]) == 0
    with pytest.raises(OptionError, match="no reward actor 'judge'.*flowfast reward-server --ray judge"):
        search_with("judge")


def test_a_reward_actor_that_cannot_load_its_reward_says_why() -> None:
    with pytest.raises(FlowfastError, match="unknown reward 'beauty'"):
        start_reward("other", "beauty")
    with pytest.raises(OptionError, match="did not start within 2 s: it takes 1 CPU and 1 GPU, the cluster has 2 CPU"):
        start_reward("other", "scenes", gpus=1, start_seconds=2)


@pytest.fixture
def error(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*words: str) -> str:
        assert cli.main([*CALL, *words]) == 2
        return capfd.readouterr().err

    return call


def test_options_that_do_not_go_together(error: Callable[..., str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "are for --ray" in error("--actors", "2", *out)
    assert "actors" in error("--ray", "local", "--actors", "0", *out)
    assert "leave out --ray" in error("--ray", "local", "--profile", str(tmp_path / "trace"), *out)
    assert not (tmp_path / "out").exists()
