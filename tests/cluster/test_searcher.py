"""A searcher without Ray: what rows say, what they get, and that neither order nor batches change a bit."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import flowfast
from flowfast import secrets
from flowfast.errors import OptionError, PromptError
from flowfast.ray.searcher import COLUMNS, Searcher

PROMPTS = [f"prompt {'x' * number} of many" for number in range(7)]
OPTIONS: dict[str, Any] = {"method": "rbf", "budget": 40, "steps": 4, "micro_batch": 4, "slots": 3}


def encode(prompts: list[str]) -> dict[str, Tensor]:
    if any(text == "nonsense" for text in prompts):
        raise PromptError("cannot read 'nonsense'")
    return {"length": torch.tensor([float(len(text)) for text in prompts])}


def toy() -> Any:
    def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return (x_t - (cond["length"] / 40.0).view(-1, 1, 1, 1)) * 0.5

    return flowfast.flow_from(velocity, (3, 8, 6), decode=lambda x: x.mul(0.1).add(0.5).clamp(0, 1), encode=encode)


def searcher(**options: Any) -> Searcher:
    return Searcher(toy(), "sharpness", **{**OPTIONS, **options})


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["prompt"]))]


def bits(row: dict[str, Any]) -> Any:
    return row["reward"], row["nfe"], row["address"], np.asarray(row["image"]).tobytes()


def in_batches(found: Searcher, prompts: list[str], size: int) -> dict[str, Any]:
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return {row["prompt"]: bits(row) for part in parts for row in rows_of(found({"prompt": np.array(part)}))}


def test_rows_have_the_bits_of_a_search_in_any_order_and_batch() -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "slots"}
    result = flowfast.search(toy(), PROMPTS, reward="sharpness", **options)
    found = searcher()
    whole = rows_of(found({"prompt": np.array(PROMPTS), "id": np.arange(7)}))
    assert [row["id"] for row in whole] == list(range(7))
    for row, sample in zip(whole, result.samples, strict=True):
        assert row["error"] is None and row["micro_batch"] == 4
        assert (row["reward"], row["nfe"]) == (sample.reward, sample.nfe)
        assert json.loads(row["address"])["key"] == sample.winner.key
        assert row["image"].dtype == np.uint8 and row["image"].shape == (8, 6, 3)
        assert (row["image"] == (sample.image * 255).round().byte().permute(1, 2, 0).numpy()).all()
    expected = {row["prompt"]: bits(row) for row in whole}
    shuffled = random.Random(1).sample(PROMPTS, 7)
    for size in (1, 2, 5):
        assert in_batches(found, shuffled, size) == expected
    assert in_batches(searcher(slots=1), shuffled, 7) == expected


def test_another_seed_has_other_bits() -> None:
    """The control of the test above: what it compares can differ."""
    other = in_batches(searcher(), PROMPTS, 7)
    assert other != in_batches(searcher(seed=1), PROMPTS, 7)


def test_columns_are_parameters_of_their_row_and_gaps_are_none() -> None:
    found = searcher()
    batch = {
        "prompt": np.array(["one"] * 6),
        "seed": np.array([0, 0, 5, 0, 0, 0]),
        "budget": np.array([np.nan, 20, np.nan, np.nan, np.nan, np.nan]),
        "repeat": np.array([0, 0, 0, 2, 0, 0]),
        "method": np.array([None, None, None, None, "ode", None], dtype=object),
        "note": np.array(list("abcdef")),
    }
    rows = rows_of(found(batch))
    assert [row["error"] for row in rows] == [None] * 6
    assert [row["nfe"] for row in rows] == [40, 20, 40, 40, 6, 40]
    assert len({bits(row) for row in rows}) == 5  # the first and the last are the same search
    alone = flowfast.search(toy(), ["one"], reward="sharpness", **{**OPTIONS, "slots": None, "seed": 5})
    assert rows[2]["reward"] == alone.samples[0].reward


def test_a_row_that_cannot_be_drawn_has_an_error_and_costs_no_other() -> None:
    batch = {
        "prompt": np.array(["one", "", "nonsense", "one", "one", "one"], dtype=object),
        "budget": np.array([40, 40, 40, 1, 501, 40]),
        "seed": np.array([3.0, 3.0, 3.0, 3.0, 3.0, 2.0**60]),
    }
    rows = rows_of(searcher()(batch))
    assert rows[0]["error"] is None and rows[0]["image"].shape == (8, 6, 3)
    for row, says in zip(
        rows[1:], ["PromptError", "cannot read 'nonsense'", "BudgetError", "up to 500 NFE, got 501", "write texts"],
        strict=True,
    ):  # fmt: skip
        assert says in row["error"] and row["nfe"] == 0 and row["address"] is None and np.isnan(row["reward"])
        assert row["image"].shape == (0, 0, 3)


def test_pictures_may_come_as_files() -> None:
    array = rows_of(searcher()({"prompt": np.array(["one"])}))[0]["image"]
    for images in ("png", "jpeg", "webp"):
        one, none = rows_of(searcher(images=images)({"prompt": np.array(["one", ""])}))
        assert np.asarray(Image.open(io.BytesIO(one["image"]))).shape == array.shape and none["image"] is None
        if images == "png":
            assert (np.asarray(Image.open(io.BytesIO(one["image"]))) == array).all()


def test_fields_of_prompts_are_columns() -> None:
    seen = []

    def counts(images: Tensor, prompts: list[str]) -> list[float]:
        seen.extend(getattr(prompt, "fields", {}) for prompt in prompts)
        return [0.0] * len(prompts)

    batch = {"prompt": np.array(["two cats"]), "classes": np.array([["cat"]]), "counts": np.array([[2]])}
    (row,) = rows_of(Searcher(toy(), counts, **OPTIONS)(batch))
    assert row["error"] is None and seen[0] == {"classes": ["cat"], "counts": [2]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": "gif"}, "array, png, jpeg, webp"),
        ({"threads": 0}, "1 .. 1024"),
        ({"bugdet": 3}, "unknown option 'bugdet': choose of"),
        ({"seconds": 3}, "give a budget in NFE"),
        ({"budget": 0}, "budget"),
        ({"secrets": {"HOME": "x"}}, "begin with FLOWFAST_"),
    ],
)
def test_what_cannot_work_is_said_as_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(flowfast.errors.FlowfastError, match=says):
        searcher(**options)


def test_batches_that_are_none_are_refused() -> None:
    found = searcher()
    with pytest.raises(OptionError, match='column "prompt"'):
        found({"text": np.array(["one"])})
    with pytest.raises(OptionError, match="batch_format"):
        found([{"prompt": "one"}])  # type: ignore[arg-type]
    for name in COLUMNS:
        with pytest.raises(OptionError, match=f"column '{name}'.*rename"):
            found({"prompt": np.array(["one"]), name: np.array([0])})


def test_secrets_are_passed_by_name_and_stand_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.forget()
    monkeypatch.delenv("FLOWFAST_REWARD_LOGIN", raising=False)
    text = secrets.sealed("http://me:hush-hush@127.0.0.1:9")
    assert "hush" not in text
    named = secrets.named_in({"reward": [text], "model": "scenes"})
    assert named == {"FLOWFAST_REWARD_LOGIN": "me:hush-hush"}
    secrets.forget()
    with pytest.raises(OptionError, match="FLOWFAST_REWARD_LOGIN"):
        secrets.named_in(text)  # its value is not here
    made = Searcher(toy(), text, secrets=named, reward_deadline=0.2, **OPTIONS)
    (row,) = rows_of(made({"prompt": np.array(["one"])}))
    assert "RewardError" in row["error"] and "hush" not in row["error"]
    secrets.forget()


def test_relative_paths_begin_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    searcher(folder=str(tmp_path / "inner"))
    assert Path.cwd() == tmp_path / "inner"
    searcher(folder=str(tmp_path / "absent"))
    assert Path.cwd() == tmp_path / "inner"
