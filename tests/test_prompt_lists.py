"""Every kind of list that the commands read, by a table of cases that the C++ reader is held to as well."""

from __future__ import annotations

import base64
import io
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from flowfast.errors import OptionError, PromptError
from flowfast.prompts import Prompt, fields_of, read_lists, read_prompts

CASES = json.loads((Path(__file__).parent / "prompt_lists.json").read_text())


def laid(case: dict[str, Any], folder: Path) -> str:
    """Writes what the case reads; returns its place."""
    if "files" in case:
        for name, text in case["files"].items():
            (folder / case["file"]).mkdir(exist_ok=True)
            (folder / case["file"] / name).write_bytes(text.encode())
        for name, target in case.get("links", {}).items():
            (folder / case["file"] / name).symlink_to(target)
        return str(folder / case["file"])
    (folder / case["file"].replace("-", "in")).write_bytes(content(case))
    return "-" if case["file"] == "-" else str(folder / case["file"])


def content(case: dict[str, Any]) -> bytes:
    return base64.b64decode(case["base64"]) if "base64" in case else case["text"].encode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_table(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = laid(case, tmp_path)
    if place == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content(case))))
    if "error" in case:
        with pytest.raises((OptionError, PromptError)) as caught:
            read_prompts(place, case.get("column"))
        assert case["error"] in str(caught.value)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
        return
    found = read_prompts(place, case.get("column"))
    assert [prompt.as_entry() if isinstance(prompt, Prompt) else prompt for prompt in found] == case["prompts"]


def test_an_empty_name_is_no_folder() -> None:
    """`--prompts "$LIST"` where LIST is not set: the texts of this folder are none of the user's prompts."""
    with pytest.raises(OptionError, match="cannot read --prompts '': expected a file or a folder, got an empty name"):
        read_prompts("")


def test_several_lists_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a kite")
    (tmp_path / "b.csv").write_text("prompt,seed\na pot,4\n")
    assert read_lists([tmp_path / "b.csv", tmp_path / "a.txt", str(tmp_path / "b.csv")]) == ["a pot", "a kite", "a pot"]
    with_seed, without = (read_lists([tmp_path / "b.csv"], seeds=seeds)[0] for seeds in (True, False))
    assert (fields_of(with_seed), fields_of(without), with_seed) == ({"seed": 4}, {}, without)


def test_long_lists_are_read_in_a_second(tmp_path: Path) -> None:
    """100,000 lines; the bound leaves room for a machine with other work."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "kite {i}", "seed": {i}}}\n' for i in range(100_000)))
    (tmp_path / "b.csv").write_text("id,prompt\n" + "".join(f'{i},"kite, {i}"\n' for i in range(100_000)))
    for name in ("a.jsonl", "b.csv"):
        started = time.process_time()
        assert len(read_prompts(tmp_path / name)) == 100_000
        assert time.process_time() - started < 5, name


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="standard input is closed"):
        read_prompts("-")


def test_memory_follows_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "kite {i}"}}\n' for i in range(20_000)))
    tracemalloc.start()
    try:
        assert len(read_prompts(tmp_path / "a.jsonl")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 30 * (tmp_path / "a.jsonl").stat().st_size
    finally:
        tracemalloc.stop()


def test_a_large_file_that_is_no_text_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "weights.txt").open("wb") as file:
        file.truncate(1 << 40)  # of holes, which take no disk
    with pytest.raises(PromptError, match="weights.txt is a binary file"):
        read_prompts(tmp_path / "weights.txt")
