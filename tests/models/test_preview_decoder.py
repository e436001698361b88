"""Preview decoders of diffusers pipelines: what a tiny autoencoder shows is what the pipeline shows with it in place of
its own, for every family that has one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError, OptionError, WeightError
from flowfast.models.diffusers import from_diffusers
from tests.models.test_diffusers import CASES, PROMPTS, STEPS
from tests.models.tiny import Case
from tests.models.tiny.flux import flux
from tests.models.tiny.parts import tiny_decoder
from tests.models.tiny.wan import wan

FAMILIES = ["flux-dev", "flux-schnell", "sd3", "z-image", "lumina2", "aura-flow"]
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_decoder().save_pretrained(path, safe_serialization=True)
    return path


@torch.no_grad()
@pytest.mark.parametrize("scale", [{}, {"scaling_factor": 0.7, "shift_factor": 0.2}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_shows_what_the_pipeline_shows_with_it(name: str, scale: dict[str, float]) -> None:
    case: Case = CASES[name]
    if name == "aura-flow":  # its pipeline knows no shift
        scale = {**scale, "shift_factor": 0.0}
    pipe, tiny = case.build(), tiny_decoder(blocks=4 if name == "lumina2" else 2, **scale)
    flow = from_diffusers(pipe, steps=STEPS, preview_decoder=tiny, **case.size, **case.options)
    latents = torch.randn(len(PROMPTS), *flow.shape, generator=torch.Generator().manual_seed(3))
    own = flow.decode(latents)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, **case.size, **case.call}
    pipe.vae = tiny
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final = pipe(PROMPTS, latents=latents.clone(), output_type="latent", **arguments)[0]
        expected = pipe(PROMPTS, latents=latents.clone(), output_type="pt", **arguments)[0]
    found = flow.preview(final)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert found.shape == own.shape and float(found.std()) > 1e-2


def test_a_search_looks_through_it_and_hands_out_the_pipelines_own_images(folder: Path) -> None:
    from diffusers import AutoencoderTiny

    seen: list[Tensor] = []

    def red(images: Tensor, prompts: Any) -> Tensor:
        seen.append(images)
        return images[:, 0].flatten(1).mean(1)

    plain = from_diffusers(flux(), steps=3, **SIZE)
    for decoder in (str(folder), folder, AutoencoderTiny.from_pretrained(folder, local_files_only=True)):
        seen.clear()
        flow = from_diffusers(flux(), steps=3, preview_decoder=decoder, **SIZE)
        result = flowfast.search(flow, PROMPTS[:1], reward=red, method="bon", budget=18, chains=6, finalists=3)
        (sample,) = result.samples
        assert torch.equal(sample.image, plain.decode(sample.latent[None])[0])
        assert sum(map(len, seen)) == sample.reward_calls == 6 + 3  # the ends by the preview, the finalists
        assert sample.reward == float(red(sample.image[None], None))
        with torch.no_grad():
            preview = flow.preview(sample.latent[None])
        assert sample.top[0].preview_reward == pytest.approx(float(red(preview, None)), abs=1e-5)
        assert torch.equal(flowfast.replay(flow, sample, result.config)[-1][1], sample.image)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="WanPipeline: no AutoencoderTiny is known for its latents"):
        from_diffusers(wan(), frames=5, height=16, width=32, preview_decoder=folder)
    with pytest.raises(OptionError, match="4 latent channels at 1/2 of.*takes 16.*; madebyollin/taef1 was made for it"):
        from_diffusers(flux(), preview_decoder=tiny_decoder(16), **SIZE)
    with pytest.raises(OptionError, match="takes 4 and enlarges 4 times"):
        from_diffusers(flux(), preview_decoder=tiny_decoder(blocks=3), **SIZE)
    with pytest.raises(OptionError, match="must be a diffusers AutoencoderTiny, got AutoencoderKL"):
        from_diffusers(flux(), preview_decoder=flux().vae, **SIZE)
    bare = flux()
    bare.vae = None
    for options in ({"preview_decoder": folder}, {"vae_tiling": True}):
        with pytest.raises(ModelError, match="this FluxPipeline has no vae"):
            from_diffusers(bare, **options, **SIZE)
    with pytest.raises(WeightError, match=f"preview_decoder '{tmp_path}'"):
        from_diffusers(flux(), preview_decoder=tmp_path, **SIZE)
