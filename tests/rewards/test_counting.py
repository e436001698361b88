"""Counting: what prompts ask for, boxes to counts by a stub, both families of detectors as tiny random checkpoints."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import OptionError, PromptError, RewardError, WeightError
from flowfast.prompts import Prompt, read_prompts
from flowfast.rewards import on_host, weighted_sum
from flowfast.rewards.counting import (
    CountingReward,
    ZeroShotDetector,
    asked_counts,
    count,
    load,
    parse_counts,
    suppress,
)
from flowfast.rewards.frames import frames
from tests.toys import GaussianFlow, NearTarget

KINDS = ("red circle", "cat")


# ---- prompts ----


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ("three red circles and one blue square", {"red circle": 3, "blue square": 1}),
        ("3 cats, 2 dogs", {"cat": 3, "dog": 2}),
        ("Twelve cherries and 11 boxes.", {"cherry": 12, "box": 11}),
        ("a photo of four sandwiches on a table", {"sandwich": 4, "table": 1}),
        ("an old high quality photograph of eight tomatoes", {"tomato": 8}),
        ("five horses next to six houses", {"horse": 5, "house": 6}),
        ("two children sitting in a bus with two glasses of wine", {"child": 2, "bus": 1, "glass of wine": 2}),
        ("one lens, two buses and a cat's eye", {"lens": 1, "bus": 2, "cat's eye": 1}),
        ("two cats left of a dog and two more cats, zero birds", {"cat": 2, "dog": 1, "more cat": 2, "bird": 0}),
        ("two cats and 3 cats", {"cat": 5}),
        ("one cat and two cats", {"cat": 3}),
        ("ten left-handed gloves", {"left-handed glove": 10}),
        # what stands behind the noun, as in T2I-CompBench's numeracy
        ("seven goats climbed the hill", {"goat": 7}),
        ("one tractor rattled down the lane", {"tractor": 1}),
        ("nine pens lay on the desk", {"pen": 9}),
        ("six lamps were dim and old", {"lamp": 6}),
        ("four foxes swiftly crossed the road", {"fox": 4}),
        ("two sheep and three deer chased one bee", {"sheep": 2, "deer": 3, "bee": 1}),
        ("three tired men met a big striped cat", {"tired man": 3, "big striped cat": 1}),
        ("two flower beds and a red sled", {"flower bed": 2, "red sled": 1}),
        ("two sports balls", {"sports ball": 2}),
    ],
)
def test_prompts(prompt: str, counts: dict[str, int]) -> None:
    assert parse_counts(prompt) == counts
    assert list(parse_counts(prompt)) == list(counts)


@pytest.mark.parametrize("prompt", ["", "cats", "some cats in the snow", "someone", "thirty"])
def test_a_prompt_without_a_count_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="expected counts such as 'three cats and one dog'"):
        parse_counts(prompt)


# ---- arithmetic ----


def test_suppression_keeps_the_best_of_boxes_that_overlap() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5], [2, 0, 6, 4], [0, 3, 4, 7], [9, 9, 9, 9]]).float()
    scores = torch.tensor([0.5, 0.9, 0.8, 0.3, 0.2])
    # Over union with box 1: box 0 16/20, box 2 8/28, box 3 8/28; box 0 is covered, the others stay, best first.
    assert suppress(boxes, scores, 0.5).tolist() == [1, 2, 3, 4]
    assert suppress(boxes, scores, 8 / 28 - 1e-6).tolist() == [1, 4]
    assert suppress(boxes, scores, 0.81).tolist() == [1, 2, 0, 3, 4]
    assert suppress(boxes[:0], scores[:0], 0.5).tolist() == []


def test_a_suppressed_box_suppresses_nothing() -> None:
    boxes = torch.tensor([[0, 0, 4, 1], [1, 0, 5, 1], [2, 0, 6, 1]]).float()  # neighbours share 3/5, the ends 2/6
    assert suppress(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


def test_one_object_is_one_kind() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 9, 9]]).float()
    certainty = torch.tensor([[0.9, 0.8], [0.3, 0.7], [0.1, 0.4]])
    assert count(boxes, certainty, 0.35, 0.5) == [1, 1]
    assert count(boxes, certainty, 0.41, 0.5) == [1, 0]
    assert count(boxes, certainty, 0.95, 0.5) == [0, 0]


class Stub:
    """Sees as many objects of kind k, far apart, as pixel (0, k) of the red channel says."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, pixels: Tensor, kinds: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        self.calls.append((len(pixels), tuple(kinds)))
        found = []
        for picture in pixels:
            rows = [k for k in range(len(kinds)) for _ in range(int(picture[0, 0, k]))]
            corner = 2.0 * torch.arange(len(rows)).view(-1, 1)
            certainty = 0.2 + 0.6 * torch.nn.functional.one_hot(torch.tensor(rows).long(), len(kinds)).float()
            found.append((torch.cat([corner, corner, corner + 1, corner + 1], 1), certainty))
        return found


def seen(*counts: tuple[int, ...]) -> Tensor:
    images = torch.zeros(len(counts), 3, 4, 6)
    for image, numbers in zip(images, counts, strict=True):
        image[0, 0, : len(numbers)] = torch.tensor(numbers) / 255
    return images


def test_the_reward_is_minus_the_sum_of_squares() -> None:
    stub = Stub()
    reward = CountingReward(stub)
    assert on_host(reward)
    images = seen((3, 1), (3, 1), (1, 4), (0, 0), (2,))
    prompts = ["three cats and one dog", "two cats, five dogs", "3 cats, 1 dog", "one cat, two cows", "seven cats"]
    scores = reward(images, prompts)
    assert scores.tolist() == [0, -1 - 16, -4 - 9, -1 - 4, -25]
    assert stub.calls == [(3, ("cat", "dog")), (1, ("cat", "cow")), (1, ("cat",))]
    alone = [float(reward(images[i : i + 1], prompts[i : i + 1])) for i in range(5)]
    assert alone == scores.tolist()


def test_counts_may_be_given() -> None:
    reward = CountingReward(Stub(), counts={"cat": 2, "dog": 0})
    assert reward(seen((2, 0), (2, 3)), ["snow", "seven birds"]).tolist() == [0, -9]


def test_the_threshold_counts() -> None:
    assert CountingReward(Stub(), threshold=0.79)(seen((3,)), ["three cats"]).tolist() == [0]
    assert CountingReward(Stub(), threshold=0.81)(seen((3,)), ["three cats"]).tolist() == [-9]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0"),
        ({"overlap": 1.5}, "overlap must be"),
        ({"counts": {}}, "expected counts"),
        ({"counts": {"cat": -1}}, "expected counts"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        CountingReward(Stub(), **options)


# ---- detectors ----


def grounding_dino(folder: Path) -> None:
    from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, SwinConfig
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoForObjectDetection
    from transformers.models.grounding_dino.processing_grounding_dino import GroundingDinoProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    words += [*string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase)]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, window_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2],
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=10, max_text_len=32,
    )  # fmt: skip
    size = {"shortest_edge": 48, "longest_edge": 96}
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=size), tokenizer).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    from transformers import CLIPTokenizer, Owlv2Config
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
    from transformers.models.owlv2.modeling_owlv2 import Owlv2ForObjectDetection
    from transformers.models.owlv2.processing_owlv2 import Owlv2Processor

    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    words = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="!", model_max_length=32
    )
    start, end = len(words) - 2, len(words) - 1
    config = Owlv2Config(
        text_config=dict(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=start, eos_token_id=end,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16,
        ),
        projection_dim=16,
    )  # fmt: skip
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)


FAMILIES = {"grounding-dino": (grounding_dino, 10), "owlv2": (owlv2, 16)}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """Family, folder, boxes an image."""
    build, boxes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    build(folder)
    return request.param, str(folder), boxes


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_a_detector_gives_boxes_and_certainties(tiny: tuple[str, str, int], pixels: Tensor) -> None:
    family, folder, boxes = tiny
    detector = ZeroShotDetector(folder, "cpu")
    assert detector.kind == family
    together = detector(pixels, KINDS)
    assert len(together) == 3
    for i, (corners, certainty) in enumerate(together):
        assert corners.shape == (boxes, 4)
        assert certainty.shape == (boxes, 2)
        assert (corners[:, 2:] >= corners[:, :2]).all()
        assert ((certainty >= 0) & (certainty <= 1)).all()
        (alone,) = detector(pixels[i : i + 1], KINDS)
        torch.testing.assert_close(alone[0], corners, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1], certainty, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0][1][:, 0], together[0][1][:, 1]), "the kinds are not told apart"
    assert not torch.equal(together[0][1], together[1][1]), "the images are not told apart"


def test_the_certainty_is_what_transformers_itself_says(tiny: tuple[str, str, int], pixels: Tensor) -> None:
    """Its own post-processing: the same boxes and best certainties, with one kind that stands for all tokens."""
    _, folder, _ = tiny
    detector = ZeroShotDetector(folder, "cpu")
    kinds = ["cat"]
    text = "cat." if detector.kind == "grounding-dino" else [["a photo of a cat"]]
    picture = pixels[0].permute(1, 2, 0).numpy()
    given = detector.processor(images=[picture], text=text, return_tensors="pt")
    with torch.no_grad():
        out = detector.model(**given)
    more = {"input_ids": given["input_ids"]} if detector.kind == "grounding-dino" else {}
    (theirs,) = detector.processor.post_process_grounded_object_detection(out, threshold=0.0, **more)
    ((corners, certainty),) = detector(pixels[:1], kinds)
    torch.testing.assert_close(corners, theirs["boxes"])
    if detector.kind == "owlv2":
        torch.testing.assert_close(certainty[:, 0], theirs["scores"])
    else:  # theirs takes the period and the ends for words too
        assert (certainty[:, 0] <= theirs["scores"]).all()
        torch.testing.assert_close(certainty[:, 0], out.logits[0, :, 1:4].sigmoid().amax(1))


def test_a_folder_is_a_reward(tiny: tuple[str, str, int], pixels: Tensor) -> None:
    _, folder, _ = tiny
    reward = load(folder)
    reward.device, reward.threshold = "cpu", 1e-9  # every box counts
    prompts = ["three red circles and one cat", "two dogs", "one cat"]
    scores = reward(pixels / 255, prompts)
    detector = reward.detector
    assert isinstance(detector, ZeroShotDetector)
    for i, (kinds, asked) in enumerate([(("red circle", "cat"), (3, 1)), (("dog",), (2,)), (("cat",), (1,))]):
        counted = count(*detector(pixels[i : i + 1], kinds)[0], 1e-9, reward.overlap)
        assert sum(counted) > 0
        assert scores[i] == -sum((n - m) ** 2 for n, m in zip(counted, asked, strict=True))
    alone = [float(reward(pixels[i : i + 1] / 255, prompts[i : i + 1])) for i in range(3)]
    assert alone == scores.tolist()
    assert reward.detector is detector, "loaded once"


def test_kinds_that_are_too_long_are_refused(tmp_path: Path, pixels: Tensor) -> None:
    grounding_dino(tmp_path)
    with pytest.raises(RewardError, match="34 tokens of kinds, more than the model's 32"):
        ZeroShotDetector(str(tmp_path), "cpu")(pixels[:1], ["a" * 31])


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="cannot load 'no/such-detector'.*`hf download no/such-detector` gets it"):
        load("no/such-detector")(torch.zeros(1, 3, 8, 8), ["two cats"])
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="is a bert, expected one of grounding-dino, owlv2"):
        ZeroShotDetector(str(tmp_path))
    owlv2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightError, match="cannot load"):
        ZeroShotDetector(str(tmp_path))


def test_a_prompts_own_counts_stand_before_its_text() -> None:
    assert asked_counts(Prompt("some pets", classes=["cat", "dog"], counts=[3, 0])) == {"cat": 3, "dog": 0}
    assert asked_counts(Prompt("two cats", seed=1)) == {"cat": 2}


def test_what_a_list_says_reaches_the_reward(tmp_path: Path) -> None:
    """GenEval's include, one class as a text, kinds that come twice; a lone sentence of a numeracy list."""
    lines = [
        {
            "tag": "counting",
            "include": [{"class": "oven", "count": 2}],
            "exclude": [],
            "prompt": "a photo of two ovens",
        },
        {"prompt": "x", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "cup", "count": 1}]},
        {"prompt": "x", "classes": "zebra", "counts": "4"},
        {"prompt": "x", "classes": ["zebra", "zebra"], "counts": [1, 2]},
        "five owls hooted at night",
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [asked_counts(prompt) for prompt in read_prompts(tmp_path / "list.jsonl")]
    assert found == [{"oven": 2}, {"red cup": 1, "cup": 1}, {"zebra": 4}, {"zebra": 3}, {"owl": 5}]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", {"cat": 3}, "field 'classes' must be a list of texts, got an object"),
        ("counts", ["many"], "field 'counts' must be a list of whole numbers from 0 on, got a list"),
        ("include", "cats", "field 'include' must be a list of objects"),
    ],
)
def test_a_wrong_field_is_an_error_where_it_is_read(tmp_path: Path, field: str, value: Any, message: str) -> None:
    """Before the model is called, with file and line; without a reward that reads it, the list is drawn."""
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"prompt": "two cats"}) + "\n" + json.dumps({"prompt": "three cats", field: value}))
    prompts = read_prompts(path)
    options: dict[str, Any] = {"method": "bon", "budget": 12, "steps": 4}
    flow = GaussianFlow()
    assert len(flowfast.search(flow, prompts, reward=NearTarget(), **options).samples) == 2
    flow.velocity = lambda *_: pytest.fail("searched before the prompts were looked at")  # type: ignore[method-assign]
    reward = CountingReward(detector=lambda pixels, kinds: pytest.fail("scored"))
    for scorer in (reward, weighted_sum([reward, NearTarget()], [1, 1]), frames(reward)):
        with pytest.raises(PromptError, match=f"prompt 2 of 2: .*list.jsonl, line 2: {message}"):
            flowfast.search(flow, prompts, reward=scorer, **options)
