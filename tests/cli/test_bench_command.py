"""`flowfast bench`: tables, bench.json, pictures, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowfast import secrets
from flowfast.benchmark import results
from flowfast.benchmark.run import Run, Served, Setting, Workload
from flowfast.cli.options import WITHOUT
from flowfast.config import SearchConfig, make_config
from tests.cli.conftest import PROMPTS
from tests.cli.conftest import Run as Call
from tests.cli.test_options import names_in

SMALL = ("--reward", "sharpness", "--steps", "4", "--method", "bon", "--budget", "12")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def read(out: Path) -> Any:
    return json.loads((out / "bench.json").read_text())


@pytest.mark.usefixtures("drawn", "ticking")
def test_latency(run: Call, tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "o"
    sizes = ("--num-prompts", 6, "--warmup", 2, "--micro-batch", 4, "--slots", 3)
    text = run("bench", "latency", *SMALL, "--prompts", prompts, *sizes, "--out", out)
    found = read(out)
    assert (found["benchmark"], found["warmup"], found["requests"], found["nfe"]) == ("latency", 2, 6, 72)
    assert (found["slots"], found["micro_batch"], found["prompts"]) == (3, 4, 4)
    assert len(found["latencies_s"]) == len(found["first_samples_s"]) == 6
    assert found["latency_s"]["p50"] <= found["latency_s"]["p95"] <= found["latency_s"]["p99"]
    assert found["fill"] == 72 / found["rows"]
    assert sum(found["share"].values()) == pytest.approx(1)
    assert {"machine", "versions", "config"} <= found.keys()
    assert found["config"]["budget"] == 12
    row = next(line for line in text.split("\n") if line.startswith("| latency"))
    shown = [float(cell) for cell in re.findall(r"[\d.]+", row)]
    want = [1000 * found["latency_s"][name] for name in ("mean", "p50", "p95", "p99")]
    assert shown == pytest.approx(want, abs=0.051)
    assert f"6 requests, bon, 12 NFE: {found['nfe_per_s']:.0f} NFE/s" in text
    assert text.endswith(f"{out}/bench.json  {out}/bench.png\n")
    assert Image.open(out / "bench.png").size[0] > 500
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.usefixtures("drawn", "ticking")
def test_throughput(run: Call, tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "o"
    sizes = ("--slots", "3,1", "--micro-batch", "2,4,2", "--num-prompts", 5)
    text = run("bench", "throughput", *SMALL, "--prompts", prompts, *sizes, "--out", out)
    found = read(out)
    assert [(row["slots"], row["micro_batch"]) for row in found["rows"]] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    assert {(row["requests"], row["images"], row["nfe"]) for row in found["rows"]} == {(5, 5, 60)}
    fastest = max(found["rows"], key=lambda row: row["requests_per_s"])
    assert found["best"] == f"--slots {fastest['slots']} --micro-batch {fastest['micro_batch']}"
    assert text.count("| best |") == 1
    (marked,) = [line for line in text.split("\n") if "| best |" in line]
    assert re.match(rf"\| {fastest['slots']} +\| {fastest['micro_batch']} +\| {fastest['requests_per_s']:.2f} ", marked)
    assert f"most requests/s: {found['best']}\n" in text
    assert (found["warmup"], found["config"]["slots"]) == ("slots", None)
    assert {len(row["requests_per_s_of_turns"]) for row in found["rows"]} == {2}
    assert Image.open(out / "bench.png").size[0] > 500


def test_built_in_prompts_and_defaults(run: Call, tmp_path: Path) -> None:
    run("bench", "latency", "--reward", "sharpness", "--steps", "2", "--budget", "8", "--out", tmp_path)
    found = read(tmp_path)
    assert (found["requests"], found["warmup"], found["prompts"]) == (30, 5, 30)
    assert found["config"]["method"] == "auto"


def test_a_setting_that_did_not_fit_into_memory_says_so(tmp_path: Path) -> None:
    took = Run([Served(1.0, 1.0, 8, 1)], 1.0, 8, dict.fromkeys(("model", "decode", "reward", "search"), 0.2))
    work = Workload(make_config({"budget": 8}), ("a",), None, None)  # type: ignore[arg-type]
    text = results.throughput_results(work, [Setting(16, 8, took, 4, 8), Setting(16, 9, took, 16, 2)], None, tmp_path)
    assert "| 16 (4 fit) | 8 " in text and "| 9 (2 fit) " in text
    assert [row["slots_held"] for row in read(tmp_path)["rows"]] == [4, 16]


def test_no_secret_is_written(tmp_path: Path) -> None:
    secret = "s3same0pen55"
    options = {"reward": f"http://ann:{secret}@host/score", "model_options": {"token": secret}, "budget": 8}
    try:
        work = Workload(make_config(options), ("a",), None, None)  # type: ignore[arg-type]
        results.write(work, "latency", {}, tmp_path, lambda: b"")
        assert secret not in (tmp_path / "bench.json").read_text()
    finally:
        secrets.forget()


def test_a_picture_that_fails_takes_no_figures_with_it(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "latency_picture", lambda *_: 1 / 0)
    run("bench", "latency", *SMALL, "--num-prompts", 1, "--warmup", 0, "--out", tmp_path)
    assert read(tmp_path)["requests"] == 1
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["latency", "--folks", "3"], "No such option: --folks"),
        (["latency", "--seconds", "3"], "No such option: --seconds"),
        (["throughput", "--baseline", "diffusers"], "No such option: --baseline"),
        (["server"], "No such command 'server'"),
        ([], "Missing command"),
        (["latency", "--num-prompts", "0"], "--num-prompts"),
        (["latency", "--warmup", "-1"], "--warmup"),
        (["latency", "--budget", "0"], "option 'budget': must be in 1 .. 10,000,000, got 0"),
        (["latency", "--budget", "3", "--steps", "4", "--reward", "sharpness"], "raise the budget or lower --steps"),
        (
            ["latency", "--method", "rbf", "--option", "warmth=3"],
            "method 'rbf' has no option 'warmth': choose of margin",
        ),
        (["latency", "--method", "luck"], "luck"),
        (["latency", "--reward", "luck"], "unknown reward 'luck'"),
        (["latency", "--model", "luck"], "model 'luck' has no built-in prompts: give --prompts FILE"),
        (["latency", "--prompts", "gone.txt"], "cannot read --prompts gone.txt"),
        (["latency", "--baseline", "vllm"], "unknown --baseline 'vllm': choose diffusers"),
        (["latency", "--baseline", "diffusers", "--reward", "sharpness"], "--baseline diffusers is for FluxPipeline"),
        (["throughput", "--slots", "0,4"], "option 'slots': must be in 1 .. 65,536, got 0"),
        (["throughput", "--micro-batch", "4,many"], "--micro-batch: expected numbers with commas between them"),
        (["throughput", "--slots", ","], "expected at least one number in --slots and in --micro-batch"),
    ],
)
def test_refused_in_one_line(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in run.refused("bench", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_cannot_be_read_is_named_before_anything_runs(run: Call, tmp_path: Path, prompts: Path) -> None:
    prompts.write_text("two red circles\nnonsense\n")
    said = run.refused("bench", "latency", *SMALL, "--prompts", prompts, "--out", tmp_path / "o")
    assert "prompt 2 of 2: cannot read 'nonsense'" in said
    assert not (tmp_path / "o").exists()


def test_help_has_every_field_of_a_search_that_a_request_may_have(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("latency", "throughput"):
        text = run("bench", name, "--help")
        assert f"Usage: flowfast bench {name}" in text
        assert SearchConfig.model_fields.keys() - names_in(text) == WITHOUT.keys() | {
            "seconds", "repeat", "first_chain", "pool", "pool_wave",
        }  # fmt: skip
        assert {"num_prompts", "warmup", "out", "prompts"} <= names_in(text)
