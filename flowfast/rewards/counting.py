"""Counting: are there as many objects of each kind as the prompt says? Kinds are found by zero-shot detection with
GroundingDINO or OWLv2 of transformers (`pip install flowfast[diffusers]`); the reward is the paper's quantity reward
(arXiv 2503.19385): minus the residual sum of squares of the counts.

One box is one object: of boxes that overlap, the most certain one counts, whatever its kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowfast.errors import FlowfastError, OptionError, PromptError, RewardError, WeightError
from flowfast.prompts import field_of, show
from flowfast.rewards.host import CallableReward
from flowfast.rewards.pixels import to_pixels

ONE_LINE = "minus the sum of squared errors of the counts in the prompt, by GroundingDINO or OWLv2: counting:ID"
DEFAULT = "IDEA-Research/grounding-dino-tiny"
THRESHOLDS = {"grounding-dino": 0.35, "owlv2": 0.1}
"""By model type: GroundingDINO's demo and OWLv2's example in transformers."""
OVERLAP = 0.5

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "wolves": "wolf", "knives": "knife", "leaves": "leaf", "loaves": "loaf",
    "shelves": "shelf", "scarves": "scarf", "cookies": "cookie", "ties": "tie", "pies": "pie", "axes": "axe",
    "shoes": "shoe", "toes": "toe", "canoes": "canoe", "buses": "bus", "lenses": "lens", "octopuses": "octopus",
    "glasses": "glasses", "scissors": "scissors", "jeans": "jeans",
}  # fmt: skip
PICTURE = r"(?:photo|photograph|picture|image|painting|drawing|sketch|illustration|render|rendering|scene|view|group)"
END = r"on|in|inside|at|with|and|or|next|under|below|above|over|near|by|beside|behind|between|before|after|against"
END += r"|around|to|from|left|right|that|which|who|are|is|sitting|standing|lying|walking|playing|arranged"

# A kind also ends before its verb, "three cats | chased a dog": an auxiliary, or a past tense that follows a plural or
# comes before an article, a preposition, an adverb or the end ("a big striped cat" has none).
AUXILIARY = re.compile("was|were|has|have|had|can|will|for")
PAST = r"ate|became|began|blew|built|came|clung|cut|drank|drew|drove|fell|felt|flew|found|fought|froze|gave|grew|held"
PAST += (
    r"|hung|kept|lay|led|left|let|lit|lost|made|met|put|ran|rang|rode|rose|sang|sat|saw|shone|shot|slept|slid|spread"
)
PAST += r"|spun|stood|stole|stuck|swam|swept|swung|took|tore|went|wore|won|wove|\w{2,}(?<!b)(?<!e)(?<!sh)(?<!sl)ed"
VERB = re.compile(rf"(?!hundred$|moped$|biped$|quadruped$|infrared$)(?:{PAST}|climbed|grabbed|rubbed|freed)")
AFTER_VERB = re.compile(
    "an?|the|their|its|his|her|some|down|up|off|across|through(?:out)?|along(?:side)?|past|away|out|into|onto|of|as"
    "|together|.*ly"
)
UNCHANGED = {"fish", "goldfish", "sheep", "deer", "shrimp"}

Detector = Callable[[Tensor, Sequence[str]], list[tuple[Tensor, Tensor]]]
"""(pixels (N, 3, H, W) uint8, K kinds) -> for each image boxes (Q, 4), x0 y0 x1 y1 in any unit, and the certainty
(Q, K) in [0, 1] that each is of each kind."""


class CountingReward(CallableReward):
    """-sum over kinds of (count - asked)^2 of images (N, 3, H, W) in [0, 1]; 0 is perfect.

    Args:
        detector: a checkpoint of GroundingDINO or OWLv2, by id or folder, loaded at the first call; or a callable.
        counts: {kind: number}, for every prompt; default: what each prompt says.
        threshold: certainty from which on a box counts; default: by model.
        overlap: intersection over union from which on two boxes are one object.
        device: of the model; default: CUDA where there is one.
    """

    def __init__(
        self,
        detector: str | Detector = DEFAULT,
        counts: Mapping[str, int] | None = None,
        threshold: float | None = None,
        overlap: float = OVERLAP,
        device: str | torch.device | None = None,
    ) -> None:
        for name, value in (("threshold", threshold), ("overlap", overlap)):
            if value is not None and not 0 < value <= 1:
                raise OptionError(f"reward counting: {name} must be above 0 and at most 1, got {value}")
        if counts is not None and (not counts or min(counts.values()) < 0):
            raise OptionError(f"reward counting: expected counts {{kind: number}}, got {dict(counts)}")
        super().__init__(self.scores, name="counting", range=(-math.inf, 0.0))
        self.detector, self.counts = detector, counts
        self.threshold, self.overlap, self.device = threshold, overlap, device

    def check(self, prompt: str) -> None:
        if not self.counts:
            asked_counts(prompt)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Scores (N,). Raises PromptError: a prompt without a count. WeightError: the model is not there."""
        asked = [dict(self.counts) if self.counts else asked_counts(prompt) for prompt in prompts]
        pixels, found = to_pixels(images), [0.0] * len(prompts)
        # Images that are asked for the same kinds share a call; so no text is padded to the length of another.
        for kinds in dict.fromkeys(tuple(counts) for counts in asked):
            rows = [i for i, counts in enumerate(asked) if tuple(counts) == kinds]
            for i, (boxes, certainty) in zip(rows, self.loaded()(pixels[rows], kinds), strict=True):
                counted = count(boxes, certainty, self.threshold or 0.0, self.overlap)
                found[i] = -float(sum((n - asked[i][kind]) ** 2 for n, kind in zip(counted, kinds, strict=True)))
        return found

    def loaded(self) -> Detector:
        """The detector, loaded once."""
        if isinstance(self.detector, str):
            self.detector = ZeroShotDetector(self.detector, self.device)
        if self.threshold is None:
            self.threshold = getattr(self.detector, "threshold", 0.5)
        return self.detector


def load(argument: str | None = None) -> CountingReward:
    """argument: id or folder of the checkpoint."""
    return CountingReward(argument or DEFAULT)


def count(boxes: Tensor, certainty: Tensor, threshold: float, overlap: float) -> list[int]:
    """Objects of each of K kinds: boxes (Q, 4), certainty (Q, K)."""
    best, kind = certainty.max(1)
    seen = (best >= threshold).nonzero()[:, 0]
    kept = seen[suppress(boxes[seen], best[seen], overlap)]
    return torch.bincount(kind[kept], minlength=certainty.shape[1]).tolist()


def suppress(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Non-maximum suppression: numbers of the boxes (Q, 4) that no better box covers by `overlap` or more, best
    first."""
    low, high = boxes[:, :2], boxes[:, 2:]
    shared = (torch.min(high[:, None], high) - torch.max(low[:, None], low)).clamp(min=0).prod(2)
    area = (high - low).clamp(min=0).prod(1)
    covers = shared >= overlap * (area[:, None] + area - shared).clamp(min=1e-12)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not covers[i, kept].any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


# ---- what the prompt asks for ----


def asked_counts(prompt: str) -> dict[str, int]:
    """What the prompt's fields say (`flowfast.prompts.Prompt`: classes and counts, or GenEval's include), else its
    text: lists such as T2I-CompBench's numeracy and GenAI-Bench say counts nowhere else. Raises PromptError."""
    classes, counts = field_of(prompt, "classes"), field_of(prompt, "counts")
    if not classes or not counts:
        field_of(prompt, "include")  # raises where there is one that could not be read
        return parse_counts(prompt)
    asked: dict[str, int] = {}
    for kind, number in zip(classes, counts, strict=True):
        asked[kind] = asked.get(kind, 0) + number
    return asked


def parse_counts(prompt: str) -> dict[str, int]:
    """{kind in the singular: number}: "three red circles and a cat" -> {"red circle": 3, "cat": 1}.

    A kind goes from its number (digits, words to twelve, a, an) to the next number, comma, "and", preposition or verb.
    It is a rule of thumb. In T2I-CompBench's 1,000 numeracy prompts it takes a verb into the kind three times, and some
    have a thing more than the list counts ("four dogs gathered for a picnic": one picnic).

    Raises:
        PromptError: there is no number.
    """
    text = re.sub(rf"\b(?:an?|the)\s+(?:[\w-]+\s+){{0,3}}{PICTURE}\s+of\b", ";", prompt.lower())
    number = rf"(?:\d+|an?|{'|'.join(NUMBERS)})"
    counts: dict[str, int] = {}
    pattern = rf"\b({number})\s+([^\W\d_][\w' -]*?)(?=\s+(?:{END}|{number})\b|\s*[^\w' -]|\s*$)"
    for amount, kind in re.findall(pattern, text):
        value = int(amount) if amount.isdigit() else 1 if amount in ("a", "an") else NUMBERS.index(amount)
        kind = before_verb(kind, value != 1)
        name = kind if value == 1 else singular(kind)
        counts[name] = counts.get(name, 0) + value
    if not counts:
        raise PromptError(f"reward counting: expected counts such as 'three cats and one dog', got {show(prompt)}")
    return counts


def before_verb(kind: str, several: bool) -> str:
    """ "cats chased" -> "cats", "truck rumbled down the highway" -> "truck"."""
    words = kind.split()
    for i in range(1, len(words)):
        before, word, after = words[i - 1], words[i], words[i + 1] if i + 1 < len(words) else "the"
        plural = before in UNCHANGED or before in IRREGULAR or re.search(r"(?<![sui])s$", before)
        verb = VERB.fullmatch(word) and ((several and plural) or AFTER_VERB.fullmatch(after))
        if verb or AUXILIARY.fullmatch(word) or (several and plural and word.endswith("ly")):
            return " ".join(words[:i])
    return kind


def singular(kind: str) -> str:
    """ "red boxes" -> "red box", "glasses of wine" -> "glass of wine"."""
    head, of, rest = kind.partition(" of ")
    *before, noun = head.split()
    if of and noun == "glasses":
        noun = "glass"
    elif noun in IRREGULAR:
        noun = IRREGULAR[noun]
    elif len(noun) > 4 and noun.endswith("ies"):
        noun = noun[:-3] + "y"
    elif re.search(r"(?:ss|zz|x|ch|sh|o)es$", noun):
        noun = noun[:-2]
    elif noun.endswith("s") and not re.search(r"(?:ss|us|is)$", noun):
        noun = noun[:-1]
    return " ".join([*before, noun]) + of + rest


# ---- the detectors ----


class ZeroShotDetector:
    """GroundingDINO or OWLv2: a `Detector`.

    Raises:
        RewardError: transformers is missing, or a model of another kind. WeightError: the checkpoint is not there.
    """

    def __init__(self, name: str, device: str | torch.device | None = None) -> None:
        try:
            from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor
        except ImportError:
            raise RewardError("reward counting needs transformers: pip install 'flowfast[diffusers]'") from None
        try:
            self.kind = str(AutoConfig.from_pretrained(name).model_type)
            if self.kind not in THRESHOLDS:
                raise RewardError(
                    f"reward counting: {name} is a {self.kind}, expected one of {', '.join(THRESHOLDS)}, e.g. {DEFAULT}"
                )
            self.processor = AutoProcessor.from_pretrained(name)
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(name, use_safetensors=True).eval()
        except FlowfastError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise WeightError(
                f"cannot load {name!r}: {str(error).splitlines()[0]}; on a machine with access, "
                f"`hf download {name}` gets it"
            ) from error
        self.threshold = THRESHOLDS[self.kind]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, kinds: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        names = [re.sub(r"[.?]", " ", kind).strip() for kind in kinds]
        pictures = list(pixels.permute(0, 2, 3, 1).numpy())
        ask = self.grounding_dino if self.kind == "grounding-dino" else self.owlv2
        boxes, certainty = ask(pictures, names)
        middle, size = boxes.float().split(2, dim=-1)
        corners = torch.cat([middle - size / 2, middle + size / 2], dim=-1).cpu()
        return list(zip(corners, certainty.float().cpu(), strict=True))

    def grounding_dino(self, pictures: list[Any], names: list[str]) -> tuple[Tensor, Tensor]:
        """One caption, "red circle. cat."; a kind is as certain as the most certain of its tokens."""
        caption = "".join(f"{name}. " for name in names).strip()
        given = self.processor(images=pictures, text=[caption] * len(pictures), return_tensors="pt").to(self.device)
        tokens, longest = given["input_ids"][0].tolist(), self.model.config.max_text_len
        if len(tokens) > longest:
            raise RewardError(f"reward counting: {len(tokens)} tokens of kinds, more than the model's {longest}")
        out = self.model(**given)
        dot = self.processor.tokenizer.convert_tokens_to_ids(".")
        ends = [0] + [place for place, token in enumerate(tokens) if token == dot]  # 0: [CLS]
        spans = [out.logits[:, :, a + 1 : b].amax(2) for a, b in zip(ends, ends[1:], strict=False)]
        return out.pred_boxes, torch.stack(spans, dim=2).sigmoid()

    def owlv2(self, pictures: list[Any], names: list[str]) -> tuple[Tensor, Tensor]:
        """A query a kind, "a photo of a cat". Boxes are relative to the padded square."""
        queries = [[f"a photo of a {name}" for name in names]] * len(pictures)
        given = self.processor(images=pictures, text=queries, return_tensors="pt").to(self.device)
        out = self.model(**given)
        return out.pred_boxes, out.logits.sigmoid()
