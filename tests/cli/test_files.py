"""What `generate` and `compare` leave on disk: beside another call, with odd texts, rewards and places."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flowfast import api, rewards
from flowfast.comparison import results as result_files
from flowfast.comparison import run as comparing
from flowfast.engine import call
from flowfast.engine.runner import LiveRunner
from flowfast.errors import OutputError
from flowfast.files import LOCK, locked_file, locked_folder
from flowfast.report import generate as generating
from flowfast.report import write as writing
from tests.cli.conftest import PROMPTS, Run, lines_of
from tests.cli.test_generate import FAST, FILES, folders
from tests.cli.test_kills import CALL, files_of

# ---- two calls, and things in the way ----


def test_a_second_call_into_one_folder_is_refused_naming_the_first(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with locked_folder(out):
        for argv in (CALL, ("compare", "--limit", "2", "--methods", "bon", "--budgets", "16", "--steps", "4")):
            line = run.refused(*argv, "--out", out)
            assert f"{out} is in use by another flowfast (process {os.getpid()} on " in line
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert not out.parent.exists()
    run(*CALL, "--out", out)
    assert not (out / LOCK).exists()


def test_a_second_export_to_one_file_is_refused(run: Run, tmp_path: Path) -> None:
    argv = ("export", "--reward", "sharpness", "--prompt", PROMPTS[0], "--steps", "4", "--out", tmp_path / "a.pt")
    with locked_file(tmp_path / "a.pt"):
        assert "a.pt is in use by another flowfast" in run.refused(*argv)
    (tmp_path / "a.pt").mkdir()
    assert "a.pt: it is not a file" in run.refused(*argv)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        (True, "call.yaml"),
        (True, "checkpoint.safetensors"),
        (False, "00-two-red-circles"),
        (True, "01-a-green-cross-and-a-blue-square/result.json"),
        (True, "01-a-green-cross-and-a-blue-square/search.png"),
        (False, "checkpoint.safetensors"),
    ],
)
def test_what_is_in_the_way_is_named_before_anything_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, place: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if folder else path.write_text("mine")
    monkeypatch.setattr(api, "search", lambda *a, **k: pytest.fail("searched"))
    before = files_of(tmp_path)
    assert str(path) in run.refused(*CALL, "--out", tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("place", ["rows.jsonl", "contact.png"])
def test_what_is_in_the_way_of_a_comparison(run: Run, tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    argv = ("compare", "--limit", "2", "--methods", "bon", "--budgets", "16", "--steps", "4", "--reward", "sharpness")
    assert f"{tmp_path / place}: it is a folder" in run.refused(*argv, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [place]


def test_links_to_folders(run: Run, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(*CALL, "--out", tmp_path / "link")
    assert len(folders(tmp_path / "real")) == 3
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deeper")
    assert f"cannot write {tmp_path / 'nowhere'}" in run.refused(*CALL, "--out", tmp_path / "nowhere")
    assert not (tmp_path / "gone").exists()


# ---- texts, pictures, rewards ----


@pytest.fixture
def no_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out verifier of scenes reads scenes only."""
    for module in (generating, comparing):
        monkeypatch.setattr(module, "heldout", lambda *given: None)


ODD = [
    'a price tag, "$5" then "$10", 100%',
    "a sum $x^{2$ of \\frac{1} and $",
    "two lines\nand a\ttab \\n and \\",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b \U0001f431 \u0645\u0631\u062d\u0628\u0627",
    "word " * 900 + "x" * 900,
    "a bell \x07, an escape \x1b[31m and a null \x00",
]


@pytest.mark.usefixtures("drawn")
def test_prompts_are_drawn_as_they_stand(
    run: Run, tmp_path: Path, recwarn: pytest.WarningsRecorder, no_verifier: None
) -> None:
    run("generate", *ODD[:-1], *FAST, "--method", "bon", "--out", tmp_path / "o")
    assert run.err == "" and not [w for w in recwarn if "Glyph" in str(w.message)]
    for prompt, place in zip(ODD, folders(tmp_path / "o"), strict=False):
        assert {path.name for path in place.iterdir()} == FILES
        assert json.loads((place / "result.json").read_text())["prompt"] == prompt
        assert Image.open(place / "search.png").size[1] < 1000


@pytest.mark.usefixtures("drawn")
def test_a_comparison_of_odd_prompts_goes_on(run: Run, tmp_path: Path, no_verifier: None) -> None:
    """U+2028 and U+0085 end a line for some, not in JSON."""
    texts = [*ODD[:2], ODD[3], ODD[4], "one\u2028two\x85three"]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    argv = ("--prompts", tmp_path / "list.jsonl", "--methods", "bon,rbf", "--budgets", "16", "--steps", "4")
    argv += ("--seeds", "1", "--reward", "sharpness", "--out", tmp_path / "o")
    run("compare", *argv)
    rows = (tmp_path / "o" / "rows.jsonl").read_bytes()
    run("compare", *argv)
    assert (tmp_path / "o" / "rows.jsonl").read_bytes() == rows


def test_a_picture_that_fails_takes_nothing_with_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw = generating.search_picture

    def fails(sample: Any, *rest: Any) -> bytes:
        if sample.prompt == PROMPTS[1]:
            raise ValueError("no such\nglyph")
        return draw(sample, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generating, "search_picture", fails)
        run(*CALL, "--out", tmp_path)
    (record,) = caplog.records
    place = folders(tmp_path)[1]
    assert f"{place / 'search.png'} was not drawn (ValueError: no such glyph)" in record.message
    for folder in folders(tmp_path):
        assert {path.name for path in folder.iterdir()} == FILES - ({"search.png"} if folder == place else set())
    monkeypatch.setattr(LiveRunner, "start", lambda *given: pytest.fail("searched again"))
    run("generate", "--resume", tmp_path)
    assert {path.name for path in place.iterdir()} == FILES and len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("drawn")
def test_a_comparison_draws_what_it_can(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cell whose picture is gone or damaged stays empty; a figure that fails takes no other with it."""
    argv = ("compare", "--limit", "3", "--methods", "bon", "--budgets", "16", "--steps", "4", "--reward", "sharpness")
    argv += ("--seeds", "1", "--out", tmp_path)
    run(*argv)
    cells = sorted((tmp_path / "pictures").rglob("*.png"))
    cells[0].unlink()
    cells[1].write_bytes(cells[1].read_bytes()[:60])
    before = (tmp_path / "contact.png").read_bytes()
    (tmp_path / "table.md").unlink()
    monkeypatch.setattr(result_files, "curve_picture", lambda *given: 1 / 0)
    run(*argv)
    assert [path for path in cells if f"{path} cannot be read" in caplog.text] == cells[:2]
    assert "curve.png was not drawn (ZeroDivisionError: division by zero)" in caplog.text
    assert (tmp_path / "contact.png").read_bytes() != before and (tmp_path / "table.md").exists()


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that is +inf for one prompt, -inf for some candidates of another."""

    def score(images: Any, prompts: list[str]) -> list[float]:
        some = [0.5 if int(1e4 * float(image.mean())) % 8 else float("-inf") for image in images]
        known = {PROMPTS[0]: [float("inf")] * len(images), PROMPTS[1]: some}
        return [known.get(prompt, [0.25] * len(images))[k] for k, prompt in enumerate(prompts)]

    monkeypatch.setattr(rewards, "load", lambda *given, **named: rewards.CallableReward(score))


@pytest.mark.usefixtures("drawn")
def test_infinite_rewards_are_said_in_every_file(
    run: Run, tmp_path: Path, endless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(generating, "heldout", lambda *given: (_ for _ in ()).throw(OutputError("stopped")))
        run(*CALL, "--method", "bon", "--until", "inf", "--score-all", "--out", tmp_path, expect=2)
    run("generate", "--resume", tmp_path)
    for number, place in enumerate(folders(tmp_path)):
        result = strict((place / "result.json").read_text())
        assert result["reward"] == ("inf" if number == 0 else 0.5 if number == 1 else 0.25)
        found = [strict(line)["reward"] for line in (place / "candidates.jsonl").read_text().splitlines()]
        assert set(found) - {None} == [{"inf"}, {"-inf", 0.5}, {0.25}][number]
        strict((place / "timing.json").read_text())
        assert yaml.safe_load((place / "config.yaml").read_text())["until"] == float("inf")
        assert {path.name for path in place.iterdir()} == FILES


@pytest.mark.usefixtures("drawn")
def test_a_comparison_with_infinite_rewards_goes_on(run: Run, tmp_path: Path, endless: None) -> None:
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    argv = ("compare", "--prompts", tmp_path / "list.txt", "--methods", "bon,rbf", "--budgets", "16", "--steps", "4")
    argv += ("--seeds", "1", "--out", tmp_path / "o")
    run(*argv)
    assert run.err == ""
    for line in (tmp_path / "o" / "rows.jsonl").read_text().splitlines():
        assert strict(line)["reward"][0] == "inf"
    first = strict((tmp_path / "o" / "results.json").read_text())
    assert first["rows"][0]["reward"] == {"mean": "inf", "low": None, "high": None}
    run(*argv)
    assert strict((tmp_path / "o" / "results.json").read_text())["rows"] == first["rows"]


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b"3", b"{}", b"null", b'{"arm": []}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'"x"',
        b'{"arm": ["bon", "linear", 16, null], "seed": 0, "prompts": ["a"], "reward": [1, 2], "heldout": null, '
        b'"nfe": [16], "unspent": [0], "seconds": {"total": 1}, "versions": {}}',
    ],
    ids=lambda line: line[:12].decode("latin-1"),
)  # fmt: skip
def test_lines_that_another_wrote_are_one_line_of_error(run: Run, tmp_path: Path, line: bytes) -> None:
    argv = ("compare", "--limit", "2", "--methods", "bon", "--budgets", "16", "--steps", "4", "--reward", "sharpness")
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n")
    assert f"{tmp_path / 'rows.jsonl'}, line 1, is damaged" in run.refused(*argv, "--out", tmp_path)


def test_what_is_written_grows_with_the_prompts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_verifier: None
) -> None:
    """Twice the prompts, twice the bytes: a list of all prompts in every folder made it four times."""
    monkeypatch.setattr(writing, "LARGE", 1000)
    sizes = []
    for count in (30, 60):
        out = tmp_path / str(count)
        texts = [f"prompt {i} " + "of many " * 100 for i in range(count)]
        run("generate", *texts, *FAST, "--method", "ode", "--out", out)
        seen = {(path.stat().st_ino, path.stat().st_size) for path in out.rglob("*") if path.is_file()}
        sizes.append(sum(size for _, size in seen))
        configs = [folder / "config.yaml" for folder in folders(out)]
        assert all(config.read_bytes() == configs[0].read_bytes() for config in configs)
    assert sizes[1] < 2.1 * sizes[0]
    assert len(lines_of(folders(tmp_path / "60")[7] / "candidates.jsonl")) >= 1
