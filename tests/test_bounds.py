"""Every number of a configuration has bounds: what is out of them is one error that names them, and nothing runs."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
import torch

import flowfast
from flowfast import cli
from flowfast.bounds import Whole, Within
from flowfast.config import SearchConfig, make_config
from flowfast.errors import BudgetError, FlowfastError, OptionError
from flowfast.methods import METHODS
from flowfast.methods.base import make_method
from tests.toys import GaussianFlow, NearTarget

WRONG = [
    ("top_k", 0), ("micro_batch", -1), ("slots", -1), ("slots", 10**9), ("until", math.nan), ("chains", 0),
    ("lanes", -3), ("finalists", 0), ("repeat", -1), ("steps", 0), ("tail", -1), ("shift", math.inf),
    ("guidance", math.nan), ("guidance", 1e30), ("reward_deadline", 0.0), ("reward_deadline", math.nan),
    ("seconds", math.inf), ("seconds", -1.0), ("budget", 0), ("budget", 10**30), ("budget", -5), ("top_k", True),
    ("seed", True), ("seed", 0.5), ("splits", [[0, 0]]), ("cuts", [[0, -1, 3]]), ("budget", 1e300), ("lanes", 2.5),
    ("until", -math.inf), ("until", -1e300),
]  # fmt: skip


class Unseen(GaussianFlow):
    def velocity(self, *args: Any) -> Any:
        raise AssertionError("a model call before the options were checked")


def test_no_number_of_the_configuration_is_without_bounds() -> None:
    for name, field in SearchConfig.model_fields.items():
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            assert any(isinstance(bound, Within | Whole) for bound in field.metadata), name


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_is_out_of_bounds_is_refused_with_both_ends(name: str, value: Any) -> None:
    asked = {"budget": 40, "steps": 6, name: value}
    with pytest.raises(FlowfastError) as caught:
        flowfast.search(Unseen(), ["a"], reward=NearTarget(), method="svdd", **asked)
    message = str(caught.value)
    assert f"'{name}" in message and "got" in message
    assert "must be" in message or "expected a number" in message or "whole" in message or "integer" in message
    assert isinstance(caught.value, BudgetError if name in ("budget", "seconds") else OptionError)


@pytest.mark.parametrize("name", ["seed", "repeat", "top_k", "budget"])
def test_more_digits_than_python_writes_are_refused_in_a_line(name: str) -> None:
    with pytest.raises(FlowfastError, match=f"option '{name}': must have at most 4300 digits.* of about 5000 digits"):
        make_config({name: -(10**5000)})
    assert make_config({"seed": -(10**4000)}).seed == -(10**4000)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("rbf", "margin", math.nan),
        ("rbf", "weights", [1.0, -1.0]),
        ("svdd", "temperature", 0.0),
        ("svdd", "temperature", "warm"),
        ("smc", "ess_gate", 1.5),
        ("smc", "temperature", math.inf),
        ("code", "block", 0),
        ("code", "k", -2),
        ("bon", "n", 0),
        ("sop", "t_start", math.nan),
        ("sop", "k", True),
        ("rbf-official", "init_candidates", 0),
    ],
)
def test_so_are_numbers_of_a_method(method: str, option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"method {method!r}.*{option}.*got"):
        make_method(method, {option: value})


def test_no_number_of_a_method_is_without_bounds() -> None:
    for name, method in METHODS.items():
        for field in fields(method):
            if field.type in (int, float, "int", "float", int | None, float | None):
                raise AssertionError(f"{name}.{field.name} is {field.type} without Within")


def test_numbers_of_other_libraries_are_numbers() -> None:
    found = make_config(
        {"budget": np.int64(40), "top_k": torch.tensor(2), "until": np.float32(0.5), "seed": np.uint64(2**63)}
    )
    assert (found.budget, found.top_k, found.until, found.seed) == (40, 2, 0.5, 2**63)
    assert make_config({"until": math.inf}).until == math.inf  # never
    assert make_config({"budget": 40.0}).budget == 40


@pytest.mark.parametrize(
    "asked", [{"slots": 60_000, "chains": 300, "budget": 400_000}, {"top_k": 65_536, "slots": 60_000}]
)
def test_a_batch_that_no_memory_holds_is_refused_before_it_is_made(asked: dict[str, Any]) -> None:
    flow = Unseen((16, 128, 128))
    with pytest.raises(OptionError, match=r"needs [\d,]+ GB, but cpu has \d+ GB: lower"):
        flowfast.search(flow, ["a"], reward=NearTarget(), **{"method": "svdd", "budget": 40, "steps": 6, **asked})


@pytest.mark.parametrize("method", ["bon", "smc", "code", "sop"])
def test_a_budget_of_too_many_chains_is_refused(method: str) -> None:
    with pytest.raises(BudgetError, match="chains of a prompt, at most 65,536"):
        flowfast.search(Unseen(), ["a"], reward=NearTarget(), method=method, budget=10_000_000, steps=6)


@pytest.mark.parametrize("shape", [(), (0, 4), (4, -1), (2.0,)])
def test_the_shape_of_an_own_flow_is_checked(shape: Any) -> None:
    with pytest.raises(OptionError, match="expected shape"):
        flowfast.flow_from(lambda x, t, cond: x, shape=shape)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "two red circles", "--top-k", "0"],
        ["generate", "two red circles", "--micro-batch", "-1"],
        ["generate", "two red circles", "--until", "nan"],
        ["generate", "two red circles", "--steps", "1000000000000000000000"],
        ["generate", "two red circles", "--method", "rbf", "--option", "margin=NaN"],
        ["compare", "--limit", "-1"],
        ["compare", "--seeds", "0"],
        ["compare", "--chunk", "0"],
        ["compare", "--workers", "0"],
        ["compare", "--micro-batch", "0"],
        ["export", "--slots", "-1"],
        ["export", "--micro-batch", "0"],
        ["reward-server", "--port", "-1"],
    ],
)
def test_the_command_line_says_it_in_a_line(arguments: list[str], tmp_path: Any, capsys: Any) -> None:
    out = [] if arguments[0] == "reward-server" else ["--out", str(tmp_path / "out")]
    assert cli.main([*arguments, *out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("must be" in said or "equal to" in said), said
    assert not (tmp_path / "out").exists()


def test_bounds_are_written_in_full() -> None:
    with pytest.raises(BudgetError, match=r"^option 'budget': must be in 1 \.\. 10,000,000, got 0$"):
        make_config({"budget": 0})
    with pytest.raises(OptionError, match=r"^option 'shift': must be in -20 \.\. 20, got inf$"):
        make_config({"shift": math.inf})
