from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    parts.seeded()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    ).eval()  # fmt: skip
    return AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=parts.autoencoder(4), text_encoder=parts.umt5(),
        tokenizer=parts.tokenizer(48), transformer=parts.spread(transformer, 0.12),
    )  # fmt: skip


CASES = {
    "aura-flow": Case(
        aura_flow,
        options={"max_sequence_length": 48},
        call={"max_sequence_length": 48, "negative_prompt": ["blurry"] * 2},
        negative="blurry",
    ),
}
