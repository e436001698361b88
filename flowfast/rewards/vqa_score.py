"""VQAScore (Lin et al., ECCV 2024, arXiv:2404.01291): P("Yes") to 'Does this figure show "{prompt}"? Please answer yes
or no.', asked of a model that reads images and text; and BLIP's image-text matching (Li et al., arXiv:2201.12086).

| argument                         | model                                                    | where                  |
|----------------------------------|----------------------------------------------------------|------------------------|
| none, ID or FOLDER               | AutoModelForImageTextToText with a fixed input size      | device, differentiable |
|                                  | any other AutoModelForImageTextToText                    | images on the host     |
| blip_itm, blip_itm:ID or :FOLDER | BlipForImageTextRetrieval: P(match) of the prompt itself | device, differentiable |

Which of the first two holds is measured when it is loaded: on the device stay the families whose processor makes one
pixel_values (3, h, w) of fixed size that `Pixels` reproduces, such as LLaVA 1.5, BLIP-2, InstructBLIP, PaliGemma and
Gemma 3. LLaVA-NeXT, SmolVLM or Qwen-VL cut an image into pieces that depend on its size: their processors get 8-bit
images on the host (the last two need torchvision to load).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowfast.errors import PromptError, RewardError
from flowfast.prompts import show
from flowfast.rewards import _clip
from flowfast.rewards.host import CallableReward
from flowfast.rewards.pixels import to_pixels

ONE_LINE = "P(Yes) that the image shows the prompt, by a vision-language model, 0 to 1; :ID, :FOLDER or :blip_itm"
DEFAULT = "llava-hf/llava-1.5-7b-hf"
DEFAULT_ITM = "Salesforce/blip-itm-base-coco"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"
PROBES = ((48, 64), (72, 40))
"""Height and width of the images that tell whether a processor can be replaced."""
SLACK = 8
"""Tokens by which a question may be shorter than one with an empty prompt, where tokens merge."""
TOLERANCE = 0.06
"""Largest difference of normalised pixels that counts as the processor's: about 4 steps of 8 bits, 1/255 over std."""


class Asked:
    """A vision-language model and its processor: the text of a question, and P(answer) in the logits.

    Padding is on the right, so that a causal model places a prompt alone and in a batch alike.
    """

    def __init__(self, source: str, question: str = QUESTION, answer: str = ANSWER):
        self.model = _clip.model("AutoModelForImageTextToText", source, dtype="auto")
        self.processor = _clip.pretrained("AutoProcessor", source)
        self.question, self.tokenizer = question, self.processor.tokenizer
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1:
            raise RewardError(
                f"expected an answer of one token, but {answer!r} has {len(ids)} in {source!r}: choose another model"
            )
        self.answer = ids[0]
        config, text_config = self.model.config, self.model.config.get_text_config()
        self.decodes = bool(config.is_encoder_decoder or text_config.is_encoder_decoder)
        start = getattr(text_config, "decoder_start_token_id", None)
        self.start = self.tokenizer.pad_token_id if start is None else start
        self.mark = str(getattr(self.processor, "image_token", ""))
        self.few_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters and not self.decodes

    def inputs(self, prompts: Sequence[str], images: Sequence[Any]) -> dict[str, Tensor]:
        """All that the processor makes of N prompts and N pictures (H, W, 3) uint8."""
        texts = [self.text(prompt) for prompt in prompts]
        bos = self.tokenizer.bos_token  # a chat template writes it too
        more = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        pictures = [[image] for image in images]
        made = self.processor(
            text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt", **more
        )
        return {key: value for key, value in made.items() if key != "labels"}  # PaliGemma's, for training

    def text(self, prompt: str) -> str:
        if self.mark and self.mark in prompt:
            raise PromptError(
                f"reward vqascore: the model takes {self.mark!r} for an image; leave it out of {show(prompt)}"
            )
        question = self.question.format(prompt)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        if hasattr(self.processor, "num_query_tokens"):  # BLIP-2 and InstructBLIP put the image in front themselves
            return question
        return f"{self.mark}{question}"

    def probability(self, inputs: dict[str, Tensor], shortest: int) -> Tensor:
        """P(answer) (N,) float32 after the last token of each row; no row has fewer than `shortest` tokens."""
        if self.decodes:
            first = torch.full_like(inputs["input_ids"][:, :1], self.start)
            logits = self.model(**inputs, decoder_input_ids=first).logits[:, -1]
        else:
            length = inputs["input_ids"].shape[1]
            few = {"logits_to_keep": length - shortest + 1} if self.few_logits else {}  # each is a vocabulary wide
            logits = self.model(**inputs, **few).logits
            last = inputs["attention_mask"].sum(1) - 1 - (length - logits.shape[1])
            logits = logits[torch.arange(len(last), device=last.device), last]
        return logits.float().softmax(-1)[:, self.answer]


class VqaScore(nn.Module):
    """P("Yes") (N,) of images (N, 3, H, W), on the device: the processor's pixels are made by tensors."""

    def __init__(self, asked: Asked, source: str, pixels: _clip.Pixels):
        super().__init__()
        self.name, self.range, self.differentiable = "vqascore", (0.0, 1.0), True
        self.asked, self.model, self.pixels = asked, asked.model, pixels
        self.revision = _clip.revision_of(self.model, source)
        self.shortest = max(1, asked.inputs([""], [blank()])["input_ids"].shape[1] - SLACK)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The processor's text tensors, each (N, L), L the longest question's tokens with those of the image."""
        return _texts(self.asked.inputs(prompts, [blank()] * len(prompts)))

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _clip.check_images(self.name, images, cond["input_ids"].shape[0])
        inputs = dict(cond) | {"pixel_values": self.pixels(images).to(self.model.dtype)}
        return self.asked.probability(inputs, self.shortest)


class HostVqaScore:
    """The same through the processor: images (N, 3, H, W) on the CPU and prompts to P("Yes") (N,), no gradient."""

    def __init__(self, asked: Asked, device: str | torch.device | None = None):
        self.asked = asked
        asked.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        _clip.check_images("vqascore", images, len(prompts))
        inputs = self.asked.inputs(prompts, list(to_pixels(images).permute(0, 2, 3, 1).numpy()))
        shortest = int(inputs["attention_mask"].sum(1).min())
        model = self.asked.model
        for key, value in inputs.items():
            inputs[key] = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        return self.asked.probability(inputs, shortest)


class BlipItm(nn.Module):
    """P(match) (N,) of images (N, 3, H, W) and prompts by BLIP's cross-encoder with its matching head."""

    def __init__(self, source: str = DEFAULT_ITM):
        super().__init__()
        self.name, self.range, self.differentiable = "vqascore:blip_itm", (0.0, 1.0), True
        self.model = _clip.model("BlipForImageTextRetrieval", source, dtype=torch.float32)
        self.revision = _clip.revision_of(self.model, source)
        self.tokenizer = _clip.pretrained("AutoTokenizer", source)
        self.pixels = _clip.Pixels(_clip.pretrained("AutoImageProcessor", source))

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, each (N, L)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _clip.check_images(self.name, images, cond["input_ids"].shape[0])
        # By its parts: the whole model (transformers 5.23) makes a mask for the image, all ones, on the CPU.
        seen = self.model.vision_model(pixel_values=self.pixels(images)).last_hidden_state
        read = self.model.text_encoder(
            input_ids=cond["input_ids"],
            attention_mask=cond["attention_mask"],
            encoder_hidden_states=seen,
        ).last_hidden_state
        return self.model.itm_head(read[:, 0]).float().softmax(-1)[:, 1]


def on_device(asked: Asked) -> _clip.Pixels | None:
    """Tensors in the processor's place where they give its result at any size of the image, else None."""
    try:
        pixels = _clip.Pixels(asked.processor.image_processor)
    except (RewardError, AttributeError, KeyError, TypeError):  # a configuration of another kind
        return None
    for height, width in PROBES:
        picture = _waves(height, width)
        inputs = asked.inputs(["a cat"], [picture])
        if set(inputs) - set(_texts(inputs)) != {"pixel_values"}:
            return None
        mine = pixels(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
        if mine.shape != inputs["pixel_values"].shape or (mine - inputs["pixel_values"]).abs().max() > TOLERANCE:
            return None
    return pixels


def _texts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the text: integers (N, L)."""
    return {key: value for key, value in inputs.items() if value.dim() == 2 and not value.is_floating_point()}


def _waves(height: int, width: int) -> Any:
    """A smooth picture (height, width, 3): Pillow clips between its two passes, which shows on hard edges only."""
    y, x = (grid[..., None] for grid in np.mgrid[0:height, 0:width])
    return (127.5 + 100 * np.sin(0.11 * x + 0.07 * y * np.array([1, 2, 3]))).astype(np.uint8)


def blank() -> Any:
    """A picture for a processor that only has to count its tokens."""
    return np.zeros((*PROBES[0], 3), dtype=np.uint8)


def load(argument: str | None = None) -> VqaScore | BlipItm | CallableReward:
    """argument: none, id, id@revision or folder of a vision-language model (default llava-hf/llava-1.5-7b-hf), or
    blip_itm, blip_itm:ID (default Salesforce/blip-itm-base-coco)."""
    kind, _, rest = (argument or "").partition(":")
    if kind == "blip_itm":
        return BlipItm(rest or DEFAULT_ITM)
    source = argument or DEFAULT
    asked = Asked(source)
    pixels = on_device(asked)
    if pixels is not None:
        return VqaScore(asked, source, pixels)
    reward = CallableReward(HostVqaScore(asked), name="vqascore", range=(0.0, 1.0))
    reward.revision = _clip.revision_of(asked.model, source)  # type: ignore[attr-defined]
    return reward
