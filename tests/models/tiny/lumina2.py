from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def lumina2(dynamic_shift: bool = False) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    parts.seeded()
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32), cap_feat_dim=32,
    ).eval()  # fmt: skip
    # The pipeline takes 8 pixels a latent for granted.
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic_shift),
        vae=vae, text_encoder=parts.gemma2(), tokenizer=parts.tokenizer(256), transformer=parts.spread(transformer),
    )  # fmt: skip


SIZE = {"height": 32, "width": 48}
CASES = {
    "lumina2": Case(lumina2, call={"cfg_normalization": False}, size=SIZE),
    "lumina2-one-pass": Case(
        lambda: lumina2(dynamic_shift=True), options={"guidance": 1.0}, call={"guidance_scale": 1.0}, size=SIZE
    ),
}
