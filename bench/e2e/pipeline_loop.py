"""A plain sample through flowfast beside the same through diffusers' own pipeline: what the loop costs.

    python -m bench pipeline_loop

Random pipelines (random_pipelines.py) draw 4 prompts of 128 x 128 pixels in 8 steps, float32. Ours is
`flowfast.search` with method "ode", a budget of 8 evaluations a prompt and a reward that is a plain Python callable,
the mean brightness; the peer is the pipeline's call for all prompts at once, and that reward called once with its
images. Both start from the same latents, and what they end at, latents, images and rewards, is compared first. Cases:
FLUX with its distilled guidance and SD3 without guidance, one pass, and SD3 with guidance in two passes on both sides
(16 NFE a prompt). Settings: `default`, and `micro_batch=4`.

Both sides encode the prompts and decode the final latents; ours decodes each of them twice, once for the reward and
once for the sample that is handed out. Also in a row: how many rows the model (`rows`, `peer_rows`) and the decoder
(`decoded`, `peer_decoded`) saw, and in how many calls of the model (`calls`, `peer_calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from bench.timing import Suite, paired

PROMPTS = [
    "a red circle", "two yellow crosses and a green triangle", "one blue square left of a red circle", "three crosses",
]  # fmt: skip
STEPS = 8
SIDE = 128
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "micro_batch=4": {"micro_batch": 4}}


@dataclass(frozen=True)
class Case:
    """A pipeline by its function in random_pipelines.py; options of its adapter; what its own call takes for them."""

    build: str
    options: dict[str, Any]
    call: dict[str, Any]
    passes: int = 1


CASES = {
    "flux": Case("flux", {"distilled_guidance": 3.5}, {"guidance_scale": 3.5}),
    "sd3": Case("sd3", {"guidance": 1.0}, {"guidance_scale": 1.0}),
    "sd3-two-passes": Case("sd3", {"guidance": 3.0}, {"guidance_scale": 3.0}, passes=2),
}


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3))


@dataclass
class Sides:
    """The same work done by either: `ours(**settings)` and `theirs(output)`."""

    case: Case
    quick: bool
    pipe: Any = field(init=False)

    def __post_init__(self) -> None:
        from bench.e2e import random_pipelines

        self.pipe = getattr(random_pipelines, self.case.build)(self.quick)
        self.pipe.set_progress_bar_config(disable=True)
        side = 16 if self.quick else SIDE
        self.shared = {"height": side, "width": side, "max_sequence_length": random_pipelines.TOKENS}
        self.flow = flowfast.from_diffusers(self.pipe, steps=STEPS, **self.shared, **self.case.options)
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(len(PROMPTS), *self.flow.shape, generator=generator)

    def ours(self, **settings: Any) -> flowfast.SearchResult:
        budget = STEPS * self.case.passes
        return flowfast.search(
            self.flow, PROMPTS, reward=brightness, method="ode", budget=budget, latents=self.latents, **settings
        )

    def theirs(self, output: str = "pt") -> tuple[Tensor, Tensor]:
        """Images, or latents, and their rewards."""
        found = self.pipe(
            prompt=PROMPTS, num_inference_steps=STEPS, latents=self.latents, output_type=output, **self.shared,
            **self.case.call,
        ).images  # fmt: skip
        return found, brightness(found, PROMPTS) if output == "pt" else found.new_zeros(len(found))

    def check(self, **settings: Any) -> flowfast.SearchResult:
        """Both end at the same latents, images and rewards, up to rounding. Returns ours."""
        result = self.ours(**settings)
        latents, (images, rewards) = self.theirs("latent")[0], self.theirs()
        assert latents.std() > 0.1 and not torch.allclose(latents, self.latents, atol=0.1), "this model does nothing"
        assert images.std() > 0.01, "these pictures are empty"
        for name, expected in (("latent", latents), ("image", images)):
            found = torch.stack([getattr(sample, name) for sample in result.samples])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor([sample.reward for sample in result.samples]), rewards)
        assert {sample.nfe for sample in result.samples} == {STEPS * self.case.passes}
        return result

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Calls and rows of the model, rows that are decoded."""
        seen = {"calls": 0, "rows": 0, "decoded": 0}
        decode = self.pipe.vae.decode

        def model(_module: Any, _given: Any, named: dict[str, Tensor]) -> None:
            seen["calls"] += 1
            seen["rows"] += len(named["hidden_states"])

        def decoder(latents: Tensor, **named: Any) -> Any:
            seen["decoded"] += len(latents)
            return decode(latents, **named)

        hook = self.pipe.transformer.register_forward_pre_hook(model, with_kwargs=True)
        self.pipe.vae.decode = decoder
        try:
            yield seen
        finally:
            hook.remove()
            del self.pipe.vae.decode


@pytest.mark.parametrize("case", CASES)
def test_pipeline_loop(benchmark: Any, suite: Suite, case: str) -> None:
    sides = Sides(CASES[case], suite.options.quick)
    runs: dict[str, Callable[[], object]] = {}
    counts, micro_batches = {}, {}
    for setting, options in SETTINGS.items():
        runs[setting] = lambda options=options: sides.ours(**options)
        micro_batches[setting] = sides.check(**options).micro_batch
    runs["diffusers"] = sides.theirs
    for name, run in runs.items():
        with sides.counted() as counts[name]:
            run()
    peer = counts["diffusers"]
    assert peer == {
        "calls": STEPS, "rows": STEPS * sides.case.passes * len(PROMPTS), "decoded": len(PROMPTS)
    }, peer  # fmt: skip
    times = paired(benchmark, runs, suite.options.turns(9))
    weights = sum(weight.numel() for weight in sides.pipe.transformer.parameters())
    for setting in SETTINGS:
        suite.row(
            "pipeline_loop", batch=len(PROMPTS), shape=sides.flow.shape, dtype=torch.float32, ours=times[setting],
            peer="diffusers", theirs=times["diffusers"], case=case, setting=setting, steps=STEPS,
            passes=sides.case.passes, weights=weights, micro_batch=micro_batches[setting], **counts[setting],
            **{f"peer_{name}": value for name, value in peer.items()},
        )  # fmt: skip
