"""The baseline: the pipeline of diffusers in its own loop, which draws as many plain samples as a budget pays."""

from __future__ import annotations

from typing import Any

import torch

from flowfast.config import SearchConfig
from flowfast.engine import clock
from flowfast.errors import BudgetError, OptionError
from flowfast.models.diffusers import DiffusersFlow
from flowfast.models.diffusers.base import EmbeddedGuidance
from flowfast.types import Flow

PIPELINES = ("FluxPipeline", "StableDiffusion3Pipeline")
"""Whose call takes guidance as its adapter does, which a test holds to the rows that the model sees."""
OF_THE_MODEL = ("guidance", "guidance_interval", "gradient")


class PipelineLoop:
    """Plain samples of one prompt by the pipeline's call, with the size, the steps and the guidance that its adapter
    has; no reward looks at them.

    Raises:
        OptionError: no pipeline that it knows, or a guidance of the search's own. BudgetError: the budget pays no
            sample.
    """

    def __init__(self, flow: Flow, config: SearchConfig):
        kinds = [kind.__name__ for kind in type(getattr(flow, "pipe", flow)).__mro__]
        if not isinstance(flow, DiffusersFlow) or not set(kinds) & set(PIPELINES):
            raise OptionError(
                f"--baseline diffusers is for {' and '.join(PIPELINES)}, got a {kinds[0]}: leave it out, or give the "
                "id or folder of one of these as --model"
            )
        if any(getattr(config, name) is not None for name in OF_THE_MODEL):
            raise OptionError(
                "--baseline diffusers has the model's own guidance: leave out --guidance, and say it as --model-option "
                "guidance=..., distilled_guidance=... or true_cfg=..."
            )
        assert config.budget is not None
        self.flow, self.pipe = flow, flow.pipe
        self.passes = 2 if flow.guidance > 1 else 1
        cost = flow.own_steps * self.passes
        self.images = config.budget // cost
        if self.images < 1:
            raise BudgetError(
                f"a budget of {config.budget} NFE pays no sample of the pipeline, which takes {cost}: raise it"
            )
        self.call = {**flow.settings, "num_inference_steps": flow.own_steps, "height": flow.height, "width": flow.width}
        if isinstance(flow, EmbeddedGuidance) and self.passes == 2:
            self.call |= {"true_cfg_scale": flow.true_cfg, "negative_prompt": ""}
        self.pipe.set_progress_bar_config(disable=True)

    def seconds(self, request: dict[str, Any], rows: int) -> float:
        """What the samples of a request's prompt took, in model calls of at most so many rows."""
        left, most, start = self.images, max(1, rows // self.passes), clock.now()
        generator = torch.Generator("cpu").manual_seed(request["seed"] % 2**63)
        while left:
            count = min(left, most)
            self.pipe(
                prompt=request["prompt"], generator=generator, output_type="pt", num_images_per_prompt=count,
                **self.call,
            )  # fmt: skip
            left -= count
        if self.flow.device.type == "cuda":
            torch.cuda.synchronize(self.flow.device)
        return clock.now() - start
