"""The runner's reader of prompt lists: the table of cases of Python's, mutants of them, and flowfast-run with lists."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flowfast.errors import OptionError, PromptError
from flowfast.ops.noise import noise_key
from flowfast.prompts import fields_of, read_prompts
from tests.cpp import PREFIX, TESTS, command
from tests.test_prompt_lists import CASES, content, laid

pytestmark = pytest.mark.usefixtures("prefix")
Listed = tuple[str, int | None]
KITE, POT = "a red circle", "two blue squares"


def in_cpp(place: str, column: str | None = None, given: bytes = b"") -> list[Listed] | str:
    """(prompt, its own seed), or what the refusal says."""
    words = [TESTS / "flowfast_list_prompts", place, *([column] if column else [])]
    done = subprocess.run(words, input=given, capture_output=True)
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert done.stderr.count(b"\n") == 1
        return done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.decode().split("\n") if line]
    return [(row[0], int(row[1]) if len(row) > 1 else None) for row in rows]


def in_python(place: str, column: str | None = None) -> list[Listed] | str:
    try:
        return [(str(prompt), fields_of(prompt).get("seed")) for prompt in read_prompts(place, column)]
    except (OptionError, PromptError) as error:
        return str(error)


def test_the_table(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        place = laid(case, folder)
        found = in_cpp(place, case.get("column"), content(case) if place == "-" else b"")
        if "error" in case:
            assert isinstance(found, str) and case["error"] in found, (case["name"], found)
            continue
        entries = [entry if isinstance(entry, dict) else {"prompt": entry} for entry in case["prompts"]]
        assert found == [(entry["prompt"], entry.get("seed")) for entry in entries], case["name"]


def mutant(data: bytes, r: random.Random) -> bytes:
    """Some bytes flipped, left out, doubled, or exchanged for one that means something to a reader."""
    changed = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 4])):
        at = r.randrange(len(changed) + 1)
        kind = r.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([r.choice(b'"{}[],:;\t\n\r\\ 0.-eu\xef\xbb\xbf\x85\xa0')])
        elif kind == 1:
            changed[at : at + r.randrange(6)] = b""
        elif kind == 2:
            changed[at:at] = changed[at : at + r.randrange(12)]
        else:
            changed[at : at + 1] = r.randbytes(1)
    return bytes(changed)


def assert_read_alike(count: int, seed: int, folder: Path) -> None:
    r = random.Random(seed)
    cases = [case for case in CASES if "files" not in case and case["file"] != "-" and len(content(case)) < 2000]
    for number in range(count):
        case = r.choice(cases)
        place = folder / f"{number}{Path(case['file']).suffix}"
        place.write_bytes(mutant(content(case), r))
        found, wanted = (reader(str(place), case.get("column")) for reader in (in_cpp, in_python))
        assert (isinstance(found, str), isinstance(wanted, str)) in ((True, True), (False, False)), (found, wanted)
        assert isinstance(found, str) or found == wanted, place.read_bytes()


def test_mutants_are_read_alike(tmp_path: Path) -> None:
    assert_read_alike(200, 0, tmp_path)


@pytest.mark.slow
def test_many_mutants_are_read_alike(tmp_path: Path) -> None:
    assert_read_alike(5000, 1, tmp_path)


def test_flowfast_run_reads_lists_and_seeds_of_their_own(scenes: Path, tmp_path: Path) -> None:
    seeds = [17982163893102248868, -5, 2**100, 0]
    entries: list[dict[str, Any]] = [{"prompt": POT, "seed": seed} for seed in seeds]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, {"prompt": KITE}]))
    (tmp_path / "p.csv").write_text(f"id,words,seed\n1,{KITE},12.0\n", encoding="utf-8-sig")
    argv = [PREFIX / "bin/flowfast-run", scenes, "--budget", 24, "--seed", 3, "--threads", 1, "--json"]
    said = command(*argv, "--prompt", KITE, "--prompts", tmp_path / "p.jsonl", "--prompts", "-", input=f"{POT}\r\n")
    wanted = [(KITE, 3), *((POT, seed) for seed in seeds), (KITE, 3), (POT, 3)]
    found = [json.loads(line) for line in said.splitlines()]
    assert [(entry["prompt"], entry["key"]) for entry in found] == [(text, noise_key(s, text)) for text, s in wanted]
    (found,) = map(json.loads, command(*argv, "--prompts", tmp_path / "p.csv", "--prompt-column", "words").splitlines())
    assert found["key"] == noise_key(12, KITE)

    done = subprocess.run([*map(str, argv), "--prompts", tmp_path / "p.csv"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "p.csv, line 1: no column one of prompt" in done.stderr and done.stderr.count("\n") == 1
