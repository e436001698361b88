"""config.yaml and --option as users write them: read, or refused in one line and in bounded memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowfast import api
from flowfast.cli.config_file import parse_options, parse_yaml, read_config
from flowfast.config import make_config
from flowfast.errors import FlowfastError, OptionError
from flowfast.prompts import field_of
from flowfast.report.write import write_yaml
from flowfast.resolve import resolve
from tests.cli.conftest import PROMPTS, Run
from tests.cli.test_generate import FAST, folders
from tests.engine.test_checkpoint_files import mutants

LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"seed: " + b"7" * 5000, "a number of 5000 digits in line 1"),
        (b"steps: 5\nseed: 0x" + b"f" * 5000, "digits in line 2"),
        (b"seed: !!int '" + b"7" * 5000 + b"'", "a number of 5000 digits"),
        (b"seed: " + b"1:" * 3000 + b"1", "a number of"),
        (b"model_options: " + b"[" * 100_000, "33 deep in line 1"),
        (b"model_options:\n" + b"".join(b" " * n + b"- \n" for n in range(1, 99)), "deep in line"),
        (b"{" * 5000, "deep"),
        (LAUGHS.encode(), "an alias (*a) in line 2: write the value out"),
        (b"a: &a {b: *a}", "an alias"),
        (b"budget: 40\nsteps: 5\nbudget: 80\n", "'budget' stands twice in line 3, column 1"),
        (b"model_options: {height: 8, width: 8, height: 16}", "'height' stands twice"),
        (b"budget: 40\n\tsteps: 5", "line 2"),
        (b"- budget: 40", "expected a mapping of options, got a list"),
        (b"", "expected a mapping of options, got nothing"),
        (b"40", "got a number"),
        (b"just words", "got a text"),
        (b"1: 2\nbudget: 40", "expected names of options, got a number"),
        (b"method_options: [1]", "expected method_options to be a mapping, got a list"),
        (b"model_options: x", "expected model_options to be a mapping, got a text"),
        (b"prompts: a red circle", "expected prompts to be a list of texts, got a text"),
        (b"prompts: [one, 2]", "got a number as entry 2: put it in quotes"),
        (b"prompts: [2026-01-02]", "got a date as entry 1"),
        (b"prompts: [no]", "got yes or no as entry 1"),
        (b"seed: 2026-99-99", "not YAML, a value is not what it should be"),
        (b"seed: !!int x", "not YAML"),
        (b"seed: !!float x", "not YAML"),
        (b"seed: !!bool x", "not YAML"),
        (b"seed: !!timestamp x", "not YAML"),
        (b"seed: !!binary x", "not YAML"),
        (b"seed: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"? [a]\n: 3", "not YAML"),
        (b"a: 1\n---\nb: 2", "not YAML"),
        (b"seed: \xff", "byte 6 is no UTF-8 text"),
        (bytes(range(256)), "no UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "no UTF-8 text"),
        (b"seed: \x00\x01", "not YAML"),
        (b"token: [hunter2", "not YAML"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_what_cannot_be_read_is_one_line(run: Run, tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    line = run.refused("generate", PROMPTS[0], *FAST, "--config", tmp_path / "mine.yaml", "--out", tmp_path / "o")
    assert says in line and "mine.yaml" in line and len(line) < 400 and "hunter2" not in line
    assert not (tmp_path / "o").exists()


def test_a_file_that_never_ends_and_a_folder(run: Run, tmp_path: Path) -> None:
    assert "more than 64 MiB" in run.refused("generate", *FAST, "--config", "/dev/zero")
    assert "Is a directory" in run.refused("generate", *FAST, "--config", tmp_path)
    assert "File name too long" in run.refused("generate", "--resume", "x" * 5000)
    assert "File name too long" in run.refused("generate", PROMPTS[0], *FAST, "--out", "x" * 5000)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """In 2 GiB of address space beside the imports' own."""
    (tmp_path / "mine.yaml").write_text(LAUGHS)
    code = """if 1:
        import resource, sys
        from pathlib import Path
        from flowfast.cli.config_file import read_config
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
        for place in sys.argv[1:]:
            try:
                read_config(Path(place))
            except ValueError as error:
                print(error)
    """
    (tmp_path / "long.yaml").write_text("prompts:\n" + "- a\n" * 16_000_000)
    argv = [sys.executable, "-c", code, tmp_path / "mine.yaml", tmp_path / "long.yaml", "/dev/zero"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ}, check=True)
    assert [("alias" in line, "more than" in line) for line in done.stdout.splitlines()] == [
        *((True, False), (False, True), (False, True))
    ]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: ("---\n" + text + "...\n").encode(),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    ],
)
def test_other_encodings_and_line_ends(tmp_path: Path, encode: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(encode("prompts:\n- ein gr\u00fcner Kreis\n- {prompt: two, seed: 5}\nseed: 9\nbudget: 40\n"))
    found = read_config(path)
    assert found == {"prompts": ["ein gr\u00fcner Kreis", "two"], "seed": 9, "budget": 40}
    assert found["prompts"][1].fields == {"seed": 5}


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("margin=[1", "cannot read --option margin: not YAML"),
        ("margin=" + "9" * 5000, "cannot read --option margin: a number of 5000 digits"),
        ("margin=" + "[" * 5000, "deep"),
        ("margin=*a", "alias"),
        ("margin=!!int x", "not YAML"),
        ("margin=\udc80", "not YAML"),
        ("=1", "--option: expected NAME=VALUE, got no name"),
        ("margin", "--option: expected NAME=VALUE"),
        ("", "--option: expected NAME=VALUE"),
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_options_that_cannot_be_read(run: Run, tmp_path: Path, pair: str, says: str) -> None:
    for option in ("--option", "--model-option"):
        line = run.refused("generate", PROMPTS[0], *FAST, f"{option}={pair}", "--out", tmp_path / "o")
        assert says.replace("--option", option) in line and len(line) < 300
    assert not (tmp_path / "o").exists()


def test_values_of_options() -> None:
    found = parse_options(["n=4", "a=", " b = 1.5", "c=x=y", "d=[1, 2]", "e=true", "f=1e-3"])
    assert found == {"n": 4, "a": None, "b": 1.5, "c": "x=y", "d": [1, 2], "e": True, "f": "1e-3"}
    with pytest.raises(OptionError, match="cannot read it"):
        parse_yaml("]", "it")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """One object in two places, long texts, other letters, texts that look like something else."""
    shared = [{"class": "cat", "count": 2}]
    prompts = [
        {"prompt": text, "include": shared} for text in ("two cats", "no", "5", "2026-01-02", "a: b # c", "x" * 999)
    ]
    prompts += [{"prompt": "one\u2028two \u4e00\x85 \t three\n", "include": shared}, {"prompt": "9" * 5000}]
    write_yaml(tmp_path / "mine.yaml", {"prompts": prompts, "seed": 3, "until": float("inf")})
    found = read_config(tmp_path / "mine.yaml")
    assert found["prompts"] == [entry["prompt"] for entry in prompts] and found["until"] == float("inf")
    assert all(field_of(prompt, "include") == shared for prompt in found["prompts"][:-1])


def test_500_mutants_of_a_config(run: Run, tmp_path: Path) -> None:
    """Each is read as a configuration, or refused in one line of one kind of error."""
    run("generate", *PROMPTS[:2], *FAST, "--option", "margin=0.5", "--method", "rbf", "--out", tmp_path / "o")
    whole, path = (folders(tmp_path / "o")[0] / "config.yaml").read_bytes(), tmp_path / "mine.yaml"
    flow, refused, same = api.load("scenes"), 0, 0
    right = read_config(folders(tmp_path / "o")[0] / "config.yaml")
    for mutant in [whole, *mutants(whole, 500, random.Random(5))]:
        path.write_bytes(mutant)
        try:
            asked = read_config(path)
            same += asked == right
            asked.pop("prompts")
            resolve(flow, make_config(asked).params)
        except FlowfastError as error:
            refused += 1
            assert len(" ".join(str(error).split())) < 1500
    assert 200 < refused < 500 and same > 0
