"""VQAScore on tiny vision-language models: fixed inputs on the device, tiles on the host, an encoder-decoder, BLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowfast.errors import PromptError, RewardError, WeightError
from flowfast.rewards import CallableReward, load, on_host
from flowfast.rewards.vqa_score import BlipItm, VqaScore
from tests.models.tiny import parts
from tests.rewards import tiny

PROMPTS = ["a red cat", "two dogs on a blue sofa", ""]
T = torch.zeros(3)
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, and the two tokens that matter: <image> and Yes."""
    made = parts.tokenizer(4096)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.add_tokens(["Yes"])
    made.padding_side = "left"  # as most of these checkpoints have it
    return made


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=parts.PAD, eos_token_id=parts.END,
    )  # fmt: skip


def save_llava(folder: Path, template: str | None = TEMPLATE) -> Path:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    own = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION), text_config=llama(), vision_feature_layer=-2,
        image_token_id=own.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    parts.spread(LlavaForConditionalGeneration(config).eval(), 0.4).save_pretrained(folder)  # type: ignore[operator]
    LlavaProcessor(
        image_processor=tiny.image_processor(), tokenizer=own, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_llava_next(folder: Path) -> Path:
    """Cuts an image into tiles: how many depends on its size."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    own, grid = tokenizer(), [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION), text_config=llama(), vision_feature_layer=-2,
        image_token_id=own.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    model = parts.spread(LlavaNextForConditionalGeneration(config).eval(), 0.4)
    model.save_pretrained(folder)  # type: ignore[operator]
    square = {"height": tiny.SIDE, "width": tiny.SIDE}
    edge = {"shortest_edge": tiny.SIDE}
    pictures = LlavaNextImageProcessorPil(size=edge, crop_size=square, image_grid_pinpoints=grid)
    LlavaNextProcessor(
        image_processor=pictures, tokenizer=own, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_blip2(folder: Path) -> Path:
    """Its language model is T5: the answer is the decoder's first token."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    own = tokenizer()
    own.image_token = "<image>"
    narrow = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    language = {
        "model_type": "t5", "vocab_size": 264, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4,
        "pad_token_id": parts.PAD, "eos_token_id": parts.END, "decoder_start_token_id": parts.PAD,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=narrow | {"image_size": tiny.SIDE, "patch_size": 8},
        qformer_config=narrow | {"vocab_size": 264, "encoder_hidden_size": 32},
        text_config=language, num_query_tokens=4, image_token_index=own.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    parts.spread(Blip2ForConditionalGeneration(config).eval(), 0.4).save_pretrained(folder)  # type: ignore[operator]
    Blip2Processor(tiny.image_processor(kind="blip"), own, num_query_tokens=4).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    narrow = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BlipConfig(
        vision_config=narrow | {"image_size": tiny.SIDE, "patch_size": 8},
        text_config=narrow | {"vocab_size": 264, "encoder_hidden_size": 32, "max_position_embeddings": 48,
                              "pad_token_id": parts.PAD, "bos_token_id": parts.END, "sep_token_id": parts.END},
        projection_dim=16,
    )  # fmt: skip
    parts.spread(BlipForImageTextRetrieval(config).eval()).save_pretrained(folder)  # type: ignore[operator]
    parts.tokenizer(48).save_pretrained(folder)
    tiny.image_processor(kind="blip").save_pretrained(folder)
    return folder


MAKERS = {"llava": save_llava, "blip2": save_blip2, "blip_itm": save_blip, "llava_next": save_llava_next}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(params=["llava", "blip2", "blip_itm"])
def reward(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """Those that stay on the device."""
    before = "blip_itm:" if request.param == "blip_itm" else ""
    return load(f"vqascore:{before}{folders[request.param]}")


def asked(prompt: str) -> str:
    return f'Does this figure show "{prompt}"? Please answer yes or no.'


# ---- on the device ----


@torch.no_grad()
def test_llava_is_transformers_own(folders: dict[str, Path]) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    reward = load(f"vqascore:{folders['llava']}")
    assert isinstance(reward, VqaScore) and not on_host(reward)
    assert reward.range == (0.0, 1.0) and reward.differentiable and reward.revision == "local"
    batch = tiny.images(3)
    found = reward(batch, T, reward.encode(PROMPTS))
    model = LlavaForConditionalGeneration.from_pretrained(folders["llava"]).eval()
    processor = AutoProcessor.from_pretrained(folders["llava"])
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    for i, prompt in enumerate(PROMPTS):  # one by one: no padding at all
        text = f"USER: <image>\n{asked(prompt)} ASSISTANT:"
        inputs = processor(text=[text], images=tiny.pictures(batch[i : i + 1]), return_tensors="pt")
        inputs["pixel_values"] = reward.pixels(batch[i : i + 1])
        expected = model(**inputs).logits[0, -1].softmax(-1)[yes]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_encoder_decoder_is_transformers_own(folders: dict[str, Path]) -> None:
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    reward = load(f"vqascore:{folders['blip2']}")
    assert isinstance(reward, VqaScore)
    batch = tiny.images(3)
    found = reward(batch, T, reward.encode(PROMPTS))
    model = Blip2ForConditionalGeneration.from_pretrained(folders["blip2"]).eval()
    processor = AutoProcessor.from_pretrained(folders["blip2"])
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    for i, prompt in enumerate(PROMPTS):
        inputs = processor(text=[asked(prompt)], images=tiny.pictures(batch[i : i + 1]), return_tensors="pt")
        inputs["pixel_values"] = reward.pixels(batch[i : i + 1])
        expected = model(**inputs, decoder_input_ids=torch.tensor([[parts.PAD]])).logits[0, -1].softmax(-1)[yes]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_blip_is_transformers_own(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    reward = load(f"vqascore:blip_itm:{folders['blip_itm']}")
    assert isinstance(reward, BlipItm) and reward.name == "vqascore:blip_itm"
    batch = tiny.images(3)
    tokens = AutoTokenizer.from_pretrained(folders["blip_itm"])(PROMPTS, padding=True, return_tensors="pt")
    own = BlipForImageTextRetrieval.from_pretrained(folders["blip_itm"]).eval()(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=reward.pixels(batch)
    )
    found = reward(batch, T, reward.encode(PROMPTS))
    torch.testing.assert_close(found, own.itm_score.softmax(-1)[:, 1], rtol=1e-5, atol=1e-6)
    assert reward.encode(["x" * 100])["input_ids"].shape == (1, 48)  # what the model cannot read is cut


@torch.no_grad()
def test_alone_and_in_a_batch(reward: Any) -> None:
    tiny.same_alone_and_in_a_batch(reward, tiny.images(3), PROMPTS)


def test_gradient(reward: Any) -> None:
    tiny.gradient_is_finite_differences(reward, tiny.images(3), PROMPTS, 1e-3, 1e-2)  # norms and T5 stay in float32


def test_wrong_input_is_rejected(reward: Any) -> None:
    cond = reward.encode(PROMPTS)
    with pytest.raises(RewardError, match="expected images"):
        reward(torch.zeros(3, 8, 8), T, cond)
    with pytest.raises(RewardError, match="got 2 images and 3 prompts"):
        reward(tiny.images(2), T[:2], cond)


def test_only_the_end_of_the_logits_is_asked_for(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load(f"vqascore:{folders['llava']}")
    asked_for, forward = [], reward.model.forward

    def watch(**inputs: Any) -> Any:
        asked_for.append(inputs["logits_to_keep"])
        return forward(**inputs)

    monkeypatch.setattr(reward.model, "forward", watch)
    cond = reward.encode(PROMPTS)
    few = reward(tiny.images(3), T, cond)
    reward.shortest = 1
    torch.testing.assert_close(reward(tiny.images(3), T, cond), few)
    assert asked_for[0] < 40 < cond["input_ids"].shape[1] == asked_for[1]


def test_a_checkpoint_without_a_chat_template(tmp_path: Path) -> None:
    reward = load(f"vqascore:{save_llava(tmp_path, None)}")
    ids = reward.encode(["a cat"])["input_ids"][0].tolist()
    image = reward.asked.tokenizer.convert_tokens_to_ids("<image>")
    assert ids[:16] == [image] * 16 and ids.count(image) == 16
    assert reward.asked.tokenizer.decode(ids[16:], skip_special_tokens=True) == asked("a cat")


# ---- on the host ----


@torch.no_grad()
def test_tiles_that_depend_on_the_size_go_through_the_processor(folders: dict[str, Path]) -> None:
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    reward = load(f"vqascore:{folders['llava_next']}", deadline=60)
    assert isinstance(reward, CallableReward) and not reward.differentiable
    assert reward.deadline == 60 and reward.range == (0.0, 1.0) and reward.name == "vqascore"
    model = LlavaNextForConditionalGeneration.from_pretrained(folders["llava_next"]).eval()
    processor = AutoProcessor.from_pretrained(folders["llava_next"])
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    for size in ((40, 52), (64, 30)):
        batch = tiny.images(3, *size)
        found = reward(batch, PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            text = f"USER: <image>\n{asked(prompt)} ASSISTANT:"
            inputs = processor(text=[text], images=tiny.pictures(batch[i : i + 1]), return_tensors="pt")
            expected = model(**inputs).logits[0, -1].softmax(-1)[yes]
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RewardError, match="expected images"):
        reward(torch.zeros(3, 1, 8, 8), PROMPTS)


# ---- what is missing ----


def test_missing_weights_are_named() -> None:
    for argument, model_id in (
        ("", "llava-hf/llava-1.5-7b-hf"),
        (":no/such-model", "no/such-model"),
        (":blip_itm", "Salesforce/blip-itm-base-coco"),
        (":blip_itm:no/such-itm", "no/such-itm"),
    ):
        with pytest.raises(WeightError, match=f"cannot load '{model_id}'.*`hf download {model_id}`"):
            load("vqascore" + argument)


def test_a_prompt_with_the_models_image_token_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(PromptError, match="takes '<image>' for an image"):
        load(f"vqascore:{folders['llava']}").encode(["a cat", "an <image> of a cat"])


def test_an_answer_of_several_tokens_is_refused(folders: dict[str, Path]) -> None:
    from flowfast.rewards.vqa_score import Asked

    with pytest.raises(RewardError, match="'Maybe' has 5"):
        Asked(str(folders["llava"]), answer="Maybe")
