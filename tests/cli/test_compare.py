"""`flowfast compare`: arms and order, resuming, statistics, pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import flowfast
from flowfast import api
from tests.cli.conftest import PROMPTS, Run, lines_of

SMALL = (
    *("--reward", "sharpness", "--steps", "4", "--methods", "ode,bon,rbf", "--budgets", "16,32", "--seeds", "2"),
    *("--chunk", "3", "--micro-batch", "8"),
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    return path


@pytest.mark.usefixtures("drawn", "ticking")
def test_it_writes_table_curve_contact_and_results(run: Run, tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "o"
    text = run("compare", "--prompts", prompts, *SMALL, "--interpolants", "linear,vp", "--seconds", "0.1", "--out", out)
    assert "held-out minus" in text
    found = json.loads((out / "results.json").read_text())
    rows = found["rows"]
    want = [("ode", "linear", 16, None)]
    for method in ("bon", "rbf"):
        for path in ("linear", "vp"):
            want += [(method, path, 16, None), (method, path, 32, None), (method, path, None, 0.1)]
    assert [(r["method"], r["interpolant"], r["budget"], r["seconds"]) for r in rows] == want
    for row in rows:
        assert row["prompts"] == 4
        assert row["seeds"] == 2
        assert row["reward"]["low"] <= row["reward"]["mean"] <= row["reward"]["high"]
        assert row["seconds_per_prompt"] > 0
        if row["budget"]:
            assert row["nfe"] + row["unspent"] == row["budget"]
        is_baseline = row["method"] == "bon" and row["interpolant"] == "linear"
        assert (row["difference"] is None) == is_baseline
    assert {"comparison", "machine", "versions", "interval"} <= found.keys()
    overview, full = (out / "table.md").read_text().split("\n\n")
    assert full.count("\n") == len(rows) + 2
    paths = {(row["method"], row["interpolant"]) for row in rows}
    assert overview.count("\n") + 1 == len(paths) + 2
    for name in ("curve.png", "contact.png"):
        assert Image.open(out / name).size[0] > 500
    jobs = [
        (line["arm"][0], line["arm"][1], line["seed"], len(line["prompts"])) for line in lines_of(out / "rows.jsonl")
    ]
    assert jobs[0] == ("ode", "linear", 0, 3)
    assert jobs[len(want)] == ("bon", "linear", 0, 1)  # the next chunk starts with the next arm
    assert len(jobs) == len(want) * 2 * 2


def test_it_goes_on_where_it_was_stopped(
    run: Run, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deterministic(folder: Path) -> Any:
        rows = json.loads((folder / "results.json").read_text())["rows"]
        return [{k: v for k, v in row.items() if "seconds_per" not in k} for row in rows]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("compare", "--prompts", prompts, *SMALL, "--out", whole)
    real, calls = api.search, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(api, "search", stops)
    run("compare", "--prompts", prompts, *SMALL, "--out", parts, expect=130)
    assert len(lines_of(parts / "rows.jsonl")) == 5
    with (parts / "rows.jsonl").open("a") as file:
        file.write('{"arm": ["rb')  # killed inside a write
    run("compare", "--prompts", prompts, *SMALL, "--out", parts)
    assert calls == 6 + len(lines_of(whole / "rows.jsonl")) - 5
    assert deterministic(parts) == deterministic(whole)
    assert (parts / "contact.png").read_bytes() == (whole / "contact.png").read_bytes()
    run("compare", "--prompts", prompts, *SMALL, "--seeds", "3", "--out", parts)  # more seeds: only those are run
    assert calls == 6 + len(lines_of(parts / "rows.jsonl")) - 5


@pytest.mark.usefixtures("drawn", "ticking")
def test_a_method_steered_by_the_reward_is_another_arm(run: Run, tmp_path: Path, prompts: Path) -> None:
    argv = (
        "--reward",
        "scenes",
        "--steps",
        "4",
        "--budgets",
        "16",
        "--seconds",
        "0.03",
        "--seeds",
        "1",
        "--chunk",
        "4",
    )
    run("compare", "--prompts", prompts, *argv, "--methods", "bon,rbf,rbf+dps:1", "--out", tmp_path / "o")
    lines = lines_of(tmp_path / "o/rows.jsonl")
    counted = {line["arm"][0]: line for line in lines if line["arm"][2]}
    assert counted.keys() == {"bon", "rbf", "rbf+dps:1"}
    assert counted["rbf"]["nfe"] == counted["rbf+dps:1"]["nfe"]
    assert counted["rbf"]["reward"] != counted["rbf+dps:1"]["reward"]
    steered = flowfast.search(
        flowfast.load("scenes"), counted["rbf"]["prompts"], reward="scenes", method="rbf", gradient="dps:1", steps=4,
        budget=16, micro_batch=8, slots=4,
    )  # fmt: skip
    assert [sample.reward for sample in steered.samples] == pytest.approx(counted["rbf+dps:1"]["reward"], rel=1e-5)
    rows = json.loads((tmp_path / "o/results.json").read_text())["rows"]
    assert [row["method"] for row in rows if row["difference"]] == ["rbf", "rbf", "rbf+dps:1", "rbf+dps:1"]
    assert Image.open(tmp_path / "o/curve.png").size[0] > 500


def test_another_comparison_is_refused_there(run: Run, tmp_path: Path, prompts: Path) -> None:
    run("compare", "--prompts", prompts, *SMALL, "--out", tmp_path / "o")
    line = run.refused("compare", "--prompts", prompts, *SMALL, "--limit", "2", "--out", tmp_path / "o")
    assert "holds a comparison with other prompts" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--methods", "bon,best"], "best on linear at 16 NFE: unknown method 'best'"),
        (["--methods", ""], "at least one of --methods"),
        (["--methods", "bon,rbf+dsp:1"], "rbf+dsp:1 on linear at 16 NFE: unknown gradient 'dsp'"),
        (["--methods", "bon,rbf+"], "rbf+ on linear at 16 NFE"),
        (["--interpolants", "cubic"], "cubic"),
        (["--budgets", "16,few"], "--budgets: expected numbers with commas between them, got '16,few'"),
        (["--budgets", ""], "--budgets or --seconds"),
        (["--budgets", "2"], "at least 6 NFE"),
        (["--split", "test"], "unknown split 'test'"),
        (["--prompts", "not-there.txt"], "cannot read --prompts"),
        (["--seeds", "0"], "equal to 1"),
        (["--model", "flux"], "flux"),
        (["--out", "/proc/none"], "cannot write /proc/none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, argv: list[str], says: str) -> None:
    assert says in run.refused("compare", "--limit", "3", *SMALL, "--out", tmp_path / "o", *argv)
    assert not (tmp_path / "o").exists()


def test_empty_prompt_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "has no prompt" in run.refused("compare", "--prompts", tmp_path / "empty.txt", "--out", tmp_path / "o")


def test_lists_of_any_kind_and_their_own_seeds(run: Run, tmp_path: Path) -> None:
    """The list's seeds would be the same noise for every seed compared; U+2028 in a prompt is no end of a line."""
    rows = ['{"prompt": "one red\u2028circle", "seed": 5}', '{"prompt": "a blue square", "seed": 6}']
    (tmp_path / "list.JSONL").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "more.tsv").write_text("Prompt\tseed\na green cross\t7\n")
    argv = ("--prompts", tmp_path / "list.JSONL", "--prompts", tmp_path / "more.tsv", *SMALL, "--out", tmp_path / "o")
    for _ in range(2):  # the second reads what the first wrote
        run("compare", *argv)
    rewards = {
        line["seed"]: line["reward"] for line in lines_of(tmp_path / "o" / "rows.jsonl") if line["arm"][0] == "ode"
    }
    assert rewards[0] != rewards[1]
    compared = json.loads((tmp_path / "o" / "results.json").read_text())["comparison"]["prompts"]
    assert compared == ["one red\u2028circle", "a blue square", "a green cross"]


def test_a_prompt_that_is_refused_is_named_by_its_number(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\nnonsense\n")
    argv = ("compare", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o")
    assert "prompt 2 of 2: cannot read 'nonsense'" in run.refused(*argv, *SMALL)
    (tmp_path / "p.txt").write_text("a sign 'a'\na red circle\n")
    assert "prompt 2 of 2: reward ocr: expected the text" in run.refused(*argv, "--reward", "ocr")
    assert not (tmp_path / "o").exists()
