"""One pipeline at several sizes: what each draws is what the pipeline draws that was made for it, on the same
weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flowfast
from flowfast.errors import OptionError
from flowfast.models.diffusers import from_diffusers
from flowfast.models.diffusers.base import DiffusersFlow, resized
from flowfast.models.named import load_sizes
from tests.models.tiny.flux import flux
from tests.models.tiny.parts import tiny_decoder
from tests.models.tiny.sd3 import sd3


def picture(flow: DiffusersFlow) -> torch.Tensor:
    found = flowfast.search(flow, ["a cat"], reward="sharpness", method="ode", budget=6, micro_batch=1)
    return found.samples[0].image


@pytest.mark.parametrize("make", [flux, sd3], ids=["flux", "sd3"])
def test_it_draws_what_one_made_for_that_size_draws(make: object) -> None:
    pipe = make(dynamic_shift=True)  # type: ignore[operator]
    first = from_diffusers(pipe, steps=3, height=16, width=24)
    before = picture(first)
    other = resized(first, 32, 16)
    assert other.pipe is first.pipe and tuple(picture(other).shape) == (3, 32, 16)
    assert torch.equal(picture(other), picture(from_diffusers(pipe, steps=3, height=32, width=16)))
    assert torch.equal(picture(first), before)
    with pytest.raises(OptionError, match="height must be a positive multiple"):
        resized(first, 33, 16)


def test_a_preview_decoder_is_shared() -> None:
    tiny = tiny_decoder()
    first = from_diffusers(flux(), steps=3, height=16, width=24, preview_decoder=tiny)
    other = resized(first, 32, 16)
    latents = torch.randn(1, *other.shape, generator=torch.Generator().manual_seed(0))
    assert other.preview is not None and tuple(other.preview(latents).shape) == (1, 3, 32, 16)
    assert other.preview_decoder is tiny


def test_by_name(tmp_path: Path) -> None:
    flux().save_pretrained(tmp_path, safe_serialization=True)
    flows = load_sizes(str(tmp_path), ["24x16", "16x32"], steps=3)
    assert [tuple(picture(flow).shape) for flow in flows] == [(3, 16, 24), (3, 32, 16)]  # type: ignore[arg-type]
    assert flows[0].pipe is flows[1].pipe  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="'scenes' draws pictures of one size"):
        load_sizes("scenes", ["32x32"])
