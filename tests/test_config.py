"""Configurations: what an engine is, what is asked of it, what happened, and all three in one."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

import flowfast
from flowfast.bounds import Whole, Within
from flowfast.config import (
    Config,
    EngineConfig,
    PoolConfig,
    Rerun,
    SearchConfig,
    SearchParams,
    make,
    make_config,
    options_over,
)
from flowfast.errors import OptionError
from flowfast.methods.base import Method
from flowfast.resolve import Resolved, resolve
from tests.toys import GaussianFlow, NearTarget

KINDS = [EngineConfig, PoolConfig, SearchParams, Rerun]


def test_each_field_of_a_search_is_of_one_kind() -> None:
    names = [name for kind in KINDS for name in kind.model_fields]
    assert len(set(names)) == len(names) and set(names) == set(SearchConfig.model_fields)
    assert {"model", "slots", "micro_batch"} <= set(EngineConfig.model_fields)
    assert {"method", "budget", "seed", "steps"} <= set(SearchParams.model_fields)
    assert set(Rerun.model_fields) == {"splits", "cuts", "picked"}


def bounds_within(annotation: Any) -> list[Any]:
    """Those of the numbers in a tuple or a choice of types."""
    own = getattr(annotation, "__metadata__", ())
    return [*own, *(bound for part in get_args(annotation) for bound in bounds_within(part))]


@pytest.mark.parametrize("kind", [*KINDS, SearchConfig])
def test_every_field_has_help_and_every_number_bounds(kind: type[Config]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, f"{name}: no help under the field"
        if any(number in str(field.annotation) for number in ("int", "float")) and name not in Rerun.model_fields:
            found = [*field.metadata, *bounds_within(field.annotation)]
            assert any(isinstance(bound, Within | Whole) for bound in found), f"{name}: no bounds"


@pytest.mark.parametrize("kind", [*KINDS, SearchConfig])
def test_unknown_names_are_refused_with_the_valid_ones(kind: type[Config]) -> None:
    valid = ", ".join(sorted(kind.model_fields))
    with pytest.raises(OptionError, match=f"unknown option 'colour': choose of {valid}"):
        make(kind, {"colour": "red"})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(kind(), next(iter(kind.model_fields)), 1)


def test_a_name_of_another_kind_is_unknown() -> None:
    with pytest.raises(OptionError, match="unknown option 'slots'"):
        make(SearchParams, {"slots": 3})
    with pytest.raises(OptionError, match="unknown option 'seed'"):
        make(EngineConfig, {"seed": 3})


def test_params_alone_and_back() -> None:
    config = make_config({"budget": 60, "slots": 3, "method_options": {"margin": 1.0}, "splits": [(2, 8)]})
    assert type(config.params) is SearchParams and config.params.budget == 60
    other = config.with_params(make(SearchParams, {"budget": 70}))
    assert (other.budget, other.method_options, other.slots, other.splits) == (70, {}, 3, ((2, 8),))
    assert other == make_config({"budget": 70, "slots": 3, "splits": [(2, 8)]})


@pytest.mark.parametrize("wrong", [{"splits": [(-1, 8)]}, {"splits": [(1, 0)]}, {"cuts": [(0, 0, 2**63)]}])
def test_what_happened_has_bounds_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        make(Rerun, wrong)


def test_secrets_are_sealed_in_an_engine_too() -> None:
    found = make(EngineConfig, {"model_options": {"token": "s3cret"}})
    assert "s3cret" not in repr(found)


def test_options_override_a_whole_configuration() -> None:
    config = make_config({"budget": 60, "seed": 3, "reward": "sharpness"})
    assert make_config(options_over(config, {"seed": 4})) == config.model_copy(update={"seed": 4})
    assert options_over(None, {"seed": 4}, NearTarget()) == {"seed": 4}
    assert options_over(config, {}, "scenes")["reward"] == "scenes"
    with pytest.raises(OptionError, match="expected config to be a SearchConfig, got dict"):
        options_over({}, {})


def resolved(flow: Any = None, **options: Any) -> Resolved:
    return resolve(flow or GaussianFlow(), make(SearchParams, options))


def test_params_on_a_flow_are_filled_in_and_fixed() -> None:
    found = resolved(method="rbf", budget=60)
    params = found.params
    assert isinstance(found.method, Method) and found.method.name == "rbf"
    assert (params.interpolant, params.grid, params.steps, params.guidance) == ("linear", "uniform", 10, 1.0)
    assert found.passes == 1 and found.plan(60).left == [30, 30]
    with pytest.raises(AttributeError):
        found.guidance = 2.0  # type: ignore[misc]
    again = resolve(GaussianFlow(), params)
    assert again.params == params and (again.schedule.table == found.schedule.table).all()


def test_two_passes_halve_the_evaluations() -> None:
    found = resolved(method="bon", guidance=3.0)
    assert found.passes == 2 and len(found.plan(60).quota) == len(resolved(method="bon").plan(30).quota)


def test_a_wrong_path_default_of_a_model_is_the_models_error() -> None:
    flow = GaussianFlow()
    flow.defaults = flowfast.FlowDefaults(path_defaults={"steps": "ten"})
    with pytest.raises(flowfast.errors.ModelError, match="path_defaults of the model: option 'steps'"):
        resolved(flow)


def test_a_result_says_what_was_asked_and_what_happened() -> None:
    result = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), budget=40, steps=6, method="bon", slots=2)
    assert result.config.params.budget == 40 and result.config.slots == 2 and result.config.cuts == ()
    assert make(EngineConfig, {name: getattr(result.config, name) for name in EngineConfig.model_fields}).slots == 2
