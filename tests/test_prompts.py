"""Prompt files: a prompt a line or JSONL with fields; fields survive a rerun, a seed of its own moves its noise."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import flowfast
from flowfast.errors import OptionError, PromptError
from flowfast.prompts import Prompt, field_of, fields_of, prompt_of, read_prompts
from tests.toys import GaussianFlow, NearTarget


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_lines_and_objects(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", "a cat", "", "  a dog ")) == ["a cat", "a dog"]
    lines = [
        {"prompt": "three cats", "classes": ["cat"], "counts": [3], "seed": 7, "category": "animals"},
        {"prompt": 'a sign that says "OPEN"', "text": "OPEN", "id": 12},
        "a plain text",
    ]
    found = read_prompts(written(tmp_path, "p.jsonl", *map(json.dumps, lines)))
    assert found == ["three cats", 'a sign that says "OPEN"', "a plain text"]
    assert [fields_of(prompt) for prompt in found] == [
        {"classes": ["cat"], "counts": [3], "seed": 7},
        {"text": "OPEN"},
        {},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{prompt", r"line 1: not JSON.*write an object a line"),
        ('{"prompt": " "}', "field 'prompt': it is empty"),
        ("3", "expected a list of texts or objects, got 3"),
        ('{"prompt": "x", "seed": "seven"}', "field 'seed' must be a whole number, got 'seven'"),
        ('{"prompt": "x", "seed": true}', "field 'seed' must be a whole number, got True"),
        ("", "has no prompt"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts(written(tmp_path, "p.jsonl", line))


def test_a_missing_file_and_an_unknown_field_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot read --prompts.*nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(PromptError, match="unknown field 'sead'; choose of classes, counts, text, seed"):
        Prompt("x", sead=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": "seven"}, "field 'seed' must be a whole number, got 'seven'"),
        ({"seed": 10**5000}, "field 'seed' must be a whole number, got a number of about 5000 digits"),
        ({"counts": [1.5], "classes": ["a"]}, "field 'counts' must be a list of whole numbers from 0 on, got a list"),
        ({"counts": [-1], "classes": ["a"]}, "field 'counts' must be a list of whole numbers from 0 on, got a list"),
        ({"counts": [1, 2], "classes": ["a"]}, "field 'counts' must be as many counts as classes, got 2 for 1"),
        ({"classes": "cat, dog"}, "field 'classes' must be a list of texts, got 'cat, dog'"),
    ],
)
def test_a_prompt_made_by_hand_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=f"prompt 'x': {message}"):
        Prompt("x", **fields)


def test_a_prompt_is_its_text_and_survives_copies() -> None:
    prompt = Prompt("a cat", seed=3)
    assert prompt == "a cat" and {prompt: 1}["a cat"] == 1 and isinstance(prompt, str)
    assert fields_of(copy.deepcopy(prompt)) == {"seed": 3} == fields_of(copy.copy(prompt))
    wrong = prompt_of({"prompt": "a cat", "classes": [3]}, "list.jsonl, line 1")
    for same in (wrong, copy.deepcopy(wrong), pickle.loads(pickle.dumps(wrong))):
        with pytest.raises(PromptError, match="list.jsonl, line 1: field 'classes' must be a list of texts"):
            field_of(same, "classes")


def test_a_seed_of_its_own_is_the_seed_of_the_call() -> None:
    def search(prompt: str, seed: int) -> flowfast.Sample:
        options = {"reward": NearTarget(), "method": "rbf", "budget": 30, "steps": 6}
        return flowfast.search(GaussianFlow(), [prompt, "other"], seed=seed, **options).samples[0]

    own, plain, other = search(Prompt("a", seed=5), 1), search("a", 5), search("a", 1)
    assert (own.winner, own.seed) == (plain.winner, 5) != (other.winner, other.seed)


class Refuses(GaussianFlow):
    """A model that knows no dragons."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if any("dragon" in prompt for prompt in prompts):
            raise PromptError("cannot draw dragons")
        return super().encode(prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "", "b"], "prompt 2 of 3: it is empty"),
        (["a", " \t\n"], "prompt 2 of 2: it is empty"),
        ([""], "prompt 1 of 1: it is empty"),
        (["a", None], "prompt 2 of 2: expected a text, got None"),
        ([b"a"], "prompt 1 of 1: expected a text, got bytes"),
        (["a", 3.5], "prompt 2 of 2: expected a text, got 3.5"),
        (["a\0b"], "prompt 1 of 1: it has a NUL character"),
        (["a", "b \udce9"], r"prompt 2 of 2: character 3 is half of a pair \(U\+DCE9\)"),
        (["a", "b", "a dragon"], "prompt 3 of 3: cannot draw dragons"),
        (["a dragon"], "^cannot draw dragons"),
        (None, "expected a list of texts as prompts, got None"),
        (b"a", "expected a list of texts as prompts, got bytes"),
        ({"1": "a"}, "expected a list of texts as prompts, got an object"),
        ([], "expected at least one prompt"),
        (np.array("a"), "expected a list of texts as prompts, got ndarray"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_named_before_anything_runs(prompts: Any, message: str) -> None:
    flow = Refuses()
    with pytest.raises(PromptError, match=message):
        flowfast.search(flow, prompts, reward=NearTarget(), budget=20, steps=4)
    assert flow.seen == 0


def test_texts_of_other_classes_are_their_text(tmp_path: Path) -> None:
    """An enum's text once had the noise of its name."""

    class Motif(str, enum.Enum):  # noqa: UP042 - a StrEnum shows as its text
        CAT = "a cat"

    class Named(str):
        def __str__(self) -> str:
            return "something else"

    def search(prompt: str, name: str) -> Any:
        options: dict[str, Any] = {"budget": 20, "steps": 4, "method": "bon", "checkpoint": tmp_path / name}
        return flowfast.search(GaussianFlow(), [prompt], reward=NearTarget(), **options).samples[0]

    plain = search("a cat", "plain")
    for number, text in enumerate((Motif.CAT, Named("a cat"), np.str_("a cat"))):
        found = search(text, f"{number}")
        assert (found.winner, type(found.prompt), found.prompt) == (plain.winner, str, "a cat")


def test_lists_of_texts_of_any_kind_are_drawn() -> None:
    """And a model that reads no prompts draws the empty one."""
    options: dict[str, Any] = {
        "reward": lambda images, _: [0.0] * len(images),
        "method": "bon",
        "budget": 8,
        "steps": 4,
    }
    for prompts in (np.array(["a", "b"]), ("a", "b"), iter(["a", "b"])):
        found = flowfast.search(GaussianFlow(), prompts, **options)
        assert [sample.prompt for sample in found.samples] == ["a", "b"]
    flow = flowfast.flow_from(lambda x, t, cond: x * 0, (3,))
    assert len(flowfast.search(flow, ["", ""], **options).samples) == 2


def test_fields_come_back_as_they_were() -> None:
    """In one order, so that a call that was stopped knows its prompts again."""
    given = Prompt("x", tag="counting", include=[{"class": "cat", "count": 2}], seed=1)
    again = prompt_of(given.as_entry(), "call.yaml")
    assert json.dumps(given.as_entry()) == json.dumps(again.as_entry())  # type: ignore[attr-defined]
    assert fields_of(again)["classes"] == ["cat"]
