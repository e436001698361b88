from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def flux(guidance_embeds: bool = True, dynamic_shift: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    parts.seeded()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic_shift),
        vae=parts.autoencoder(4), text_encoder=parts.clip(), tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.t5(), tokenizer_2=parts.tokenizer(48), transformer=parts.spread(transformer),
    )  # fmt: skip


CASES = {
    "flux-dev": Case(
        flux,
        options={"distilled_guidance": 2.5, "max_sequence_length": 48},
        call={"guidance_scale": 2.5, "max_sequence_length": 48},
    ),
    "flux-schnell": Case(
        lambda: flux(guidance_embeds=False, dynamic_shift=False),
        options={"max_sequence_length": 48},
        call={"max_sequence_length": 48},
    ),
    "flux-true-cfg": Case(
        flux,
        options={"true_cfg": 3.0, "distilled_guidance": 2.5, "max_sequence_length": 48},
        call={"true_cfg_scale": 3.0, "guidance_scale": 2.5, "max_sequence_length": 48, "negative_prompt": "blurry"},
        negative="blurry",
    ),
}
