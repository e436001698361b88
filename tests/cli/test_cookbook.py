"""Every recipe of docs/cookbook.md runs: its own words, with a tiny random pipeline or checkpoint for each id."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import flowfast
from tests.cli.conftest import Run

COOKBOOK = Path(__file__).resolve().parents[2] / "docs" / "cookbook.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", COOKBOOK.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [text.replace("\\\n", " ") for language, text in BLOCKS if not language]
SMALL = ["--model-option", "height=16", "--model-option", "width=32", "--model-option", "steps=3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Words of the recipes: what stands in for them."""
    from tests.models.tiny.flux import flux
    from tests.models.tiny.parts import tiny_decoder
    from tests.models.tiny.sd3 import CASES as SD3
    from tests.models.tiny.wan import CASES as WAN
    from tests.rewards.test_aesthetic import save_aesthetic
    from tests.rewards.test_counting import grounding_dino
    from tests.rewards.test_vqa_score import save_llava
    from tests.rewards.tiny import save_clip

    folder = tmp_path_factory.mktemp("tiny")

    def saved(name: str, pipe: Any) -> str:
        pipe.save_pretrained(folder / name, safe_serialization=True)
        return str(folder / name)

    clip = save_clip(folder / "clip")
    grounding_dino(folder / "dino")
    return {
        "black-forest-labs/FLUX.1-schnell": saved("flux", flux(guidance_embeds=False, dynamic_shift=False)),
        "stabilityai/stable-diffusion-3.5-medium": saved("sd3", next(iter(SD3.values())).build()),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": saved("wan", next(iter(WAN.values())).build()),
        "madebyollin/taef1": saved("taef1", tiny_decoder()),
        "IDEA-Research/grounding-dino-tiny": str(folder / "dino"),
        "clipscore": f"clipscore:{clip}",
        "aesthetic": f"aesthetic:{save_aesthetic(folder / 'aesthetic')}",
        "vqascore": f"vqascore:{save_llava(folder / 'vlm')}",
    }


def stand_in(word: str, tiny: dict[str, str]) -> str:
    for name in sorted(tiny, key=len, reverse=True):
        word = word.replace(name, tiny[name])
    return word


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: re.sub(r"\W+", "-", text)[18:50])
def test_a_recipe_runs(command: str, tiny: dict[str, str], run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    program, *words = [stand_in(word, tiny) for word in shlex.split(command)]
    assert program == "flowfast"
    words[words.index("--out") + 1] = str(tmp_path / "out")
    words[words.index("--budget") + 1] = "12" if "ocr" in words else "60"  # it takes a second an image
    lines = [{"prompt": "two cats", "classes": ["cat"], "counts": [2], "seed": 3}, {"prompt": "one dog"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"tag": "counting", "include": [{"class": word, "count": 2}], "prompt": f"two {word}s"} for word in "ab"]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    video = "wan" in command.lower()
    run(*words, *SMALL, *(["--model-option", "frames=5"] if video else []))
    if words[0] == "export":
        assert flowfast.load_archive(tmp_path / "out").info()["budget_max"] == "60"
        return
    folders = sorted(place for place in (tmp_path / "out").iterdir() if place.is_dir())
    assert len(folders) == (2 if "--prompts" in words else 1)
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert result["nfe"] > 0 and result["reward"] == pytest.approx(result["reward"])  # a number, not null
        best = "samples" if "--layout" in words else "best.png"
        assert {best, "search.png", "config.yaml"} <= {path.name for path in folder.iterdir()}
        assert (folder / "best.mp4").exists() == video


def test_the_recipe_of_a_calibration_runs(
    tiny: dict[str, str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [text for language, text in BLOCKS if language == "sh"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two cats"}\n{"prompt": "one dog"}\n')
    for command in block.strip().splitlines():
        program, *words = [stand_in(word, tiny) for word in shlex.split(command)]
        assert program == "flowfast"
        if words[0] == "calibrate":
            words += ["--chains", "4"]
        else:
            words[words.index("--budget") + 1] = "30"
        told = run(*words, *SMALL)
        if words[0] == "explain":
            assert "calibration: " in told and "best-of-n, path 2" in told
    assert {"sd3.json", "sd3.png"} <= {path.name for path in tmp_path.iterdir()}
    (folder,) = (tmp_path / "sd3-out").iterdir()
    picked = json.loads((folder / "result.json").read_text())["picked"]
    assert picked["calibration"] and picked["budget"] == 30 and picked["path"]["guidance"] == 4.5


def test_the_recipe_in_python_runs_and_search_helps(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [text for language, text in BLOCKS if language == "python" and "flowfast.search(" in text]
    names: dict[str, Any] = {}
    exec(compile(code, str(COOKBOOK), "exec"), names)
    rewards = [sample.reward for sample in names["result"].samples]
    plain = names["flowfast"].search(
        names["flow"], ["first", "second"], reward=names["score"], method="ode", budget=120
    )
    assert capsys.readouterr().out.startswith("[(")
    assert sum(rewards) >= sum(sample.reward for sample in plain.samples)


def test_the_recipe_for_inpainting_runs(tiny: dict[str, str]) -> None:
    from diffusers import FluxPipeline

    from tests.models.tiny.edits import flux_edit, left_half, picture

    (code,) = [text for language, text in BLOCKS if language == "python" and "mask_image" in text]
    names = {"flowfast": flowfast, "FluxPipeline": FluxPipeline, "pipe": flux_edit("FluxInpaintPipeline")}
    names |= {"prompt": "a cat", "image": picture(32, 32), "mask": left_half(32, 32)}
    names["pipe"].set_progress_bar_config(disable=True)
    code = stand_in(code.replace("1024", "32").replace("num_images", "num_inference_steps=4, num_images"), tiny)
    exec(compile(code, str(COOKBOOK), "exec"), names)
    assert len(names["images"]) == 8 and len(names["pipe"].scheduler.best) == 1
