from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def sana(out_channels: int = 4) -> Any:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    parts.seeded()
    transformer = SanaTransformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, out_channels=out_channels, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=32,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41407,
    ).eval()  # fmt: skip
    return SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=parts.gemma2(),
        tokenizer=parts.tokenizer(4096), transformer=parts.spread(transformer),
    )  # fmt: skip


SIZE = {"height": 32, "width": 64}
CALL = {"max_sequence_length": 48, "use_resolution_binning": False}
CASES = {
    "sana": Case(sana, options={"max_sequence_length": 48}, call=CALL, size=SIZE),
    "sana-learned-variance": Case(
        lambda: sana(out_channels=8),
        options={"guidance": 1.0, "max_sequence_length": 48},
        call=CALL | {"guidance_scale": 1.0},
        size=SIZE,
    ),
}
