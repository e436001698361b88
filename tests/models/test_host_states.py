"""Every pipeline class in other states than a fresh float32 one: in bfloat16, under another default dtype, without text
encoders."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from flowfast.models.diffusers import FAMILIES, from_diffusers
from flowfast.models.diffusers.embeds import arguments_of
from tests.models.test_diffusers import CASES, PROMPTS, STEPS, Watched, run
from tests.models.tiny import MODULES, Case

ONE_OF_EACH = [*(next(iter(module.CASES)) for module in MODULES), "flux2-klein"]
Built = tuple[Case, Any, Any]


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def built(request: pytest.FixtureRequest) -> Built:
    """A case, its pipeline, and the flow of that."""
    case = CASES[request.param]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    return case, pipe, from_diffusers(pipe, steps=STEPS, **case.size, **case.options)


def test_every_family_is_here() -> None:
    assert len(ONE_OF_EACH) == len(FAMILIES)


@torch.no_grad()
def test_a_host_program_with_another_default_dtype_gets_the_same(built: Built) -> None:
    """A flow that is made and used under it has the same bits."""
    case, pipe, _ = built
    t, expected = torch.tensor([0.6]), []
    for kind in (torch.float32, torch.float64):
        torch.set_default_dtype(kind)
        try:
            flow = from_diffusers(pipe, steps=STEPS, **case.size, **case.options)
            x = torch.randn(1, *flow.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
            found = [flow.velocity(x, t, flow.encode(PROMPTS[:1])), flow.decode(x), torch.tensor(flow.own_times(STEPS))]
        finally:
            torch.set_default_dtype(torch.float32)
        expected = expected or found
        assert found[0].dtype == found[1].dtype == torch.float32
        for value, like in zip(found, expected, strict=True):
            assert torch.equal(value, like.to(value.dtype))


@torch.no_grad()
def test_prompts_that_were_encoded_elsewhere(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given under the names that the pipeline's call has for them, and need no text encoder."""
    case, pipe, flow = built
    expected, arguments = flow.encode(PROMPTS), arguments_of(flow.conditions)
    assert set(arguments) <= set(inspect.signature(type(pipe).__call__).parameters)
    embeds: dict[str, dict[str, Any]] = {}
    plain = flow.conditions

    def watch(*values: Any) -> Any:
        embeds[PROMPTS[len(embeds)]] = dict(zip(arguments, values, strict=True))
        return plain(*values)

    monkeypatch.setattr(flow, "conditions", watch)
    flow.encode(PROMPTS)
    for name in pipe.components:
        if name.startswith(("text_encoder", "tokenizer")):
            monkeypatch.setattr(pipe, name, None)
    found = from_diffusers(pipe, embeds=embeds, **case.size, **case.options).encode(PROMPTS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@torch.no_grad()
def test_velocity_in_bfloat16_is_the_pipelines_own(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times too are rounded as the pipeline rounds them: in bfloat16 one of 820 and its neighbour are 4 apart, which is
    another angle of every sine that the model makes of them."""
    case, pipe, flow = built
    pipe.to(dtype=torch.bfloat16)
    watched = Watched(pipe, monkeypatch)
    run(pipe, case, torch.randn(len(PROMPTS), *flow.shape, generator=torch.Generator().manual_seed(3)).bfloat16())
    cond, null = flow.encode(PROMPTS), flow.encode([case.negative] * len(PROMPTS))
    for (x, _, expected), time in zip(watched.steps, flow.own_times(STEPS), strict=True):
        t = torch.full((len(PROMPTS),), time)
        u = flow.velocity(x.float(), t, cond)
        assert u.dtype == torch.float32
        if flow.guidance != 1.0:
            base = flow.velocity(x.float(), t, null)
            u = base + flow.guidance * (u - base)
        assert float((u - expected.float()).abs().max()) < 0.02 * float(expected.abs().max())
