"""The pipeline's own loop beside a search: as many samples as the budget pays, in as many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowfast
from flowfast.benchmark.pipeline import PipelineLoop
from flowfast.config import make_config
from flowfast.errors import BudgetError, OptionError

pytest.importorskip("diffusers")
from tests.models.tiny.flux import flux  # noqa: E402
from tests.models.tiny.sd3 import sd3  # noqa: E402

SIZE: dict[str, Any] = {"height": 16, "width": 16, "steps": 3}
REQUEST = {"prompt": "a red cat", "seed": -5}


@pytest.mark.parametrize(
    ("build", "options", "passes"),
    [
        (flux, {"distilled_guidance": 2.5}, 1),
        (flux, {"true_cfg": 3.0, "distilled_guidance": 2.5}, 2),
        (sd3, {"guidance": 3.0}, 2),
        (sd3, {"guidance": 1.0}, 1),
    ],
)
def test_it_draws_what_the_budget_pays(build: Any, options: dict[str, Any], passes: int) -> None:
    pipe, rows, guidance = build(), list[int](), list[Any]()

    def model(_module: Any, _given: Any, named: dict[str, torch.Tensor]) -> None:
        rows.append(len(named["hidden_states"]))
        guidance.append(named.get("guidance"))

    pipe.transformer.register_forward_pre_hook(model, with_kwargs=True)
    flow = flowfast.from_diffusers(pipe, **SIZE, **options)
    cost = 3 * passes
    loop = PipelineLoop(flow, make_config({"budget": 5 * cost + cost - 1}))
    assert loop.images == 5
    assert loop.seconds(REQUEST, 4) > 0
    assert sum(rows) == 5 * cost
    assert max(rows) <= 4
    if "distilled_guidance" in options:
        assert all(float(scale.max()) == 2.5 for scale in guidance)


def test_what_it_cannot_run_beside() -> None:
    flow = flowfast.from_diffusers(flux(), **SIZE)
    with pytest.raises(BudgetError, match="a budget of 2 NFE pays no sample of the pipeline, which takes 3: raise it"):
        PipelineLoop(flow, make_config({"budget": 2}))
    for own in ({"guidance": 3.0}, {"gradient": "dps:1"}):
        with pytest.raises(OptionError, match="has the model's own guidance: leave out --guidance"):
            PipelineLoop(flow, make_config({"budget": 9, **own}))
    with pytest.raises(OptionError, match="is for FluxPipeline and StableDiffusion3Pipeline, got a SceneModel"):
        PipelineLoop(flowfast.load("scenes"), make_config({"budget": 9}))
