"""What the pipelines are made of: tokenizers over bytes, text encoders and an autoencoder of a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PAD, END = 0, 1
VOCABULARY = 260


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A token a byte, an end, padding on the right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": 2} | {char: 3 + i for i, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def clip(projection: bool = False, hidden: int = 32) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=37, projection_dim=hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(hidden: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=hidden, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = 4, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(4, 4), layers_per_block=1,
        latent_channels=channels, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5, shift_factor=0.06, **more,
    ).eval()  # fmt: skip


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def spread(module: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Redraws all weights so that no part of the model is switched off by an initialisation with zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return module


def tiny_decoder(channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    """An AutoencoderTiny whose images are 2^(blocks - 1) times as large as its latents."""
    from diffusers import AutoencoderTiny

    seeded(5)
    sizes = {f"{side}_block_out_channels": (8,) * blocks for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1,) * blocks for side in ("encoder", "decoder")}
    return AutoencoderTiny(latent_channels=channels, **sizes, **counts, **more).eval()


def umt5(hidden: int = 32) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=VOCABULARY, d_model=hidden, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def llama(hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaModel(config).eval()


DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    "pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END,
}  # fmt: skip
"""What the configs of language models have in common."""


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**DECODER, sliding_window=64)).eval()


def qwen3(layers: int = 2, head: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    return (Qwen3ForCausalLM if head else Qwen3Model)(Qwen3Config(**DECODER | {"num_hidden_layers": layers})).eval()


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = DECODER | {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def mistral3(layers: int = 2) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1,
        "num_attention_heads": 4, "head_dim": 8, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = DECODER | {"model_type": "mistral", "num_hidden_layers": layers}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)
    return Mistral3ForConditionalGeneration(config).eval()


def chat_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """With a template for conversations: the role, then the text. Once is enough: ZImagePipeline writes into the list
    of prompts that it is given."""
    made = tokenizer(length)
    made.chat_template = (
        "{% for message in messages %}{% set text = message.content if message.content is string else "
        "message.content[0].text %}{% set role = message.role + ': ' %}"
        "{{ '' if text.startswith(role) else role }}{{ text }}{% endfor %}"
    )
    return made
