"""Videos: frames as an .mp4 that reads back, a strip where a picture is expected, a search whose samples are videos."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import flowfast
from flowfast.config import SearchConfig
from flowfast.report.generate import GenerateFiles
from flowfast.report.video import strip, write_video


def moving(count: int = 9, side: int = 32) -> Tensor:
    """A white column that goes from left to right on black."""
    frames = torch.zeros(count, 3, side, side)
    for i in range(count):
        at = i * (side - 4) // (count - 1)
        frames[i, :, :, at : at + 4] = 1
    return frames


def test_an_mp4_reads_back(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v3", reason="flowfast[diffusers] brings it")
    frames = moving()
    assert write_video(tmp_path / "a" / "clip.mp4", frames, fps=8)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip.mp4"]
    read = torch.from_numpy(imageio.imread(tmp_path / "a" / "clip.mp4", plugin="FFMPEG")).permute(0, 3, 1, 2) / 255
    assert read.shape == frames.shape
    assert float((read - frames).abs().mean()) < 0.05
    assert float((read.flip(0) - frames).abs().mean()) > 0.1  # backwards would be seen


def test_without_ffmpeg_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with caplog.at_level(logging.WARNING):
        assert not write_video(tmp_path / "clip.mp4", moving())
    assert "pip install 'flowfast[diffusers]'" in caplog.text and not list(tmp_path.iterdir())


def test_a_strip_goes_from_the_first_to_the_last_frame() -> None:
    frames = moving()
    found = strip(frames, 3)
    assert found.shape == (3, 32, 96)
    assert torch.equal(found[..., :32], frames[0]) and torch.equal(found[..., -32:], frames[-1])
    assert torch.equal(strip(frames[:2]), torch.cat([frames[0], frames[1]], -1))


def test_a_search_over_videos_leaves_strip_video_and_picture_of_the_search(tmp_path: Path) -> None:
    """Latents (4, 3, 8, 8) that decode to themselves; the reward is over frames."""

    def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x_t - 0.5

    flow = flowfast.flow_from(velocity, (4, 3, 8, 8), decode=lambda x0: x0.clamp(0, 1))
    files = GenerateFiles(tmp_path, ["waves"], SearchConfig(model="none"), fps=8)
    result = flowfast.search(
        flow, ["waves"], reward=lambda images, prompts: images.mean((1, 2, 3, 4)), method="rbf", budget=40, steps=6,
        on_round=files.on_round, on_sample=files.on_sample,
    )  # fmt: skip
    files.finish(flow, result)
    assert result.samples[0].image.shape == (4, 3, 8, 8)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names: set[Any] = {path.name for path in folder.iterdir()}
    assert {"best.png", "best.mp4", "search.png", "result.json"} <= names
    assert Image.open(folder / "best.png").size == (32, 8)
    assert json.loads((folder / "result.json").read_text())["reward"] == result.samples[0].reward
