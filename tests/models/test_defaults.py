"""What a flow tells a search beside its protocol."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flowfast
from flowfast import FlowDefaults
from flowfast.errors import ModelError, OptionError
from flowfast.models.answers import CheckedFlow, defaults_of
from flowfast.models.compiled import PreviewFlow
from tests.toys import GaussianFlow, NearTarget

OPTIONS: dict[str, Any] = {"reward": NearTarget(), "budget": 40, "steps": 6, "micro_batch": 4}


class Loose(GaussianFlow):
    """As a flow of 0.1.0 said it."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            setattr(self, name, value)


def told(**facts: Any) -> GaussianFlow:
    return Loose(defaults=FlowDefaults(**facts))


def test_a_flow_without_any_has_the_defaults_of_all() -> None:
    assert defaults_of(GaussianFlow()) == FlowDefaults()
    assert not Loose(preview=None).preview and defaults_of(Loose(preview=None)) == FlowDefaults()


def test_wrappers_of_a_flow_hand_them_on() -> None:
    flow = told(waits_because="it counts", preview=lambda x0: x0)
    assert defaults_of(CheckedFlow(PreviewFlow(flow))) is flow.defaults


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("path_defaults", {"interpolation": "vp"}, "a dict of some of interpolant, diffusion, .* got {'interpolation'"),
        ("path_defaults", [("grid", "uniform")], "a dict of some of"),
        ("ode_paths", [{"colour": 1}], r"a list of dicts of some of interpolant, .* got \[{'colour'"),
        ("ode_paths", {"steps": 4}, "a list of dicts of some of"),
        ("method_defaults", {"rbf": 1.0}, "a dict of a dict of options for each method's name, got {'rbf': 1.0}"),
        ("own_times", [1.0, 0.5], "a function of a number of steps"),
        ("fps", 0, "a positive number, got 0"),
        ("fps", math.inf, "a positive number, got inf"),
        ("fps", True, "a positive number, got True"),
        ("fps", "16", "a positive number, got '16'"),
        ("waits_because", None, "a text, got None"),
        ("preview", torch.zeros(1), "a function of latents, got tensor"),
        ("reads_prompts", 1, "True or False, got 1"),
    ],
)
def test_a_wrong_type_is_refused_by_name(name: str, wrong: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=f"expected {name} of FlowDefaults to be {expected}"):
        FlowDefaults(**{name: wrong})


@pytest.mark.parametrize(
    "members",
    [
        {"path_defaults": {"steps": 3}},
        {"method_defaults": {"rbf": {"margin": 1.0}}},
        {"preview": lambda x0: x0},
        {"own_times": lambda steps: [1.0, 0.1], "own_steps": 2},
        {"fps": 8.0},
        {"waits_because": "it counts"},
    ],
    ids=lambda members: next(iter(members)),
)
def test_a_loose_member_is_refused_and_says_where_it_belongs(members: dict[str, Any]) -> None:
    name = next(iter(members))
    with pytest.raises(ModelError, match=rf"the model has {name} .*defaults=flowfast\.FlowDefaults\({name}=\.\.\.\)"):
        flowfast.search(Loose(**members), ["a"], **OPTIONS)


@pytest.mark.parametrize("wrong", [{"preview": None}, FlowDefaults, 3])
def test_defaults_of_another_kind_are_refused(wrong: Any) -> None:
    with pytest.raises(ModelError, match="expected defaults of the model to be a flowfast.FlowDefaults, got"):
        flowfast.search(Loose(defaults=wrong), ["a"], **OPTIONS)


def test_a_path_and_options_of_a_method_are_read() -> None:
    flow = told(path_defaults={"interpolant": "vp", "steps": 4}, method_defaults={"rbf": {"margin": 1e9}})
    options = {**OPTIONS, "method": "rbf", "steps": None}
    found = flowfast.search(flow, ["a"], **options).config
    assert (found.interpolant, found.steps) == ("vp", 4)
    assert flowfast.search(flow, ["a"], **{**options, "interpolant": "linear"}).config.interpolant == "linear"
    winner = flowfast.search(flow, ["a"], **options).samples[0].winner
    given = {"interpolant": "vp", "steps": 4, "method_options": {"margin": 1e9}}
    assert flowfast.search(GaussianFlow(), ["a"], **{**options, **given}).samples[0].winner == winner
    given["method_options"] = {"margin": 0.0}
    assert flowfast.search(flow, ["a"], **{**options, **given}).samples[0].winner != winner


def test_own_times_are_asked_for_in_so_many_steps() -> None:
    asked = []

    def own_times(steps: int | None) -> list[float]:
        asked.append(steps)
        return [1.0, 0.6, 0.3, 0.05][: steps or 4]

    found = flowfast.search(told(own_times=own_times), ["a"], method="bon", **{**OPTIONS, "steps": None}).config
    assert found.grid == "linear-times:1.0,0.6,0.3,0.05" and set(asked) == {None}
    flowfast.search(told(own_times=own_times), ["a"], method="svdd", grid="model", **{**OPTIONS, "steps": 4})
    assert 4 in asked
    with pytest.raises(ModelError, match="the model's own_times raised ZeroDivisionError"):
        flowfast.search(told(own_times=lambda steps: 1 / 0), ["a"], method="bon", **OPTIONS)


def test_an_empty_prompt_is_for_flows_that_read_none() -> None:
    assert flowfast.search(told(reads_prompts=False), [""], method="bon", **OPTIONS).samples[0].prompt == ""
    with pytest.raises(flowfast.errors.PromptError):
        flowfast.search(GaussianFlow(), [""], method="bon", **OPTIONS)
