"""Pipelines from folders: arguments of `from_pretrained` arrive there, or are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flowfast
from flowfast.cli import app
from flowfast.errors import FlowfastError, OptionError, WeightError
from flowfast.models.diffusers import from_diffusers
from tests.models.tiny.flux import flux

SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with *.fp16.safetensors alone."""
    folder = tmp_path_factory.mktemp("model")
    pipe = flux(guidance_embeds=False)
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True, variant="fp16")
    assert all(".fp16." in path.name for path in folder.rglob("*.safetensors"))
    return folder


def test_a_folder_with_a_variant_alone_loads(halved: Path) -> None:
    for dtype in ("float16", torch.float32):
        flow: Any = flowfast.load(halved, variant="fp16", dtype=dtype, device="cpu", **SIZE)
        assert flow.dtype == (torch.float16 if dtype == "float16" else dtype)
    with pytest.raises(WeightError, match="cannot load .*it has files of variant fp16: give variant='fp16'"):
        from_diffusers(halved, **SIZE)
    with pytest.raises(WeightError, match="variant=bf16.*it has files of variant fp16: give variant='fp16'"):
        from_diffusers(halved, variant="bf16", **SIZE)


def test_the_command_line_passes_it_on(halved: Path, tmp_path: Path) -> None:
    options = ["variant=fp16", "dtype=float32", "height=16", "width=24", "steps=2"]
    call = ["generate", "a red cat", "--model", str(halved), "--reward", "sharpness", "--method", "ode"]
    call += ["--budget", "2", "--out", str(tmp_path / "out")]
    for option in options:
        call += ["--model-option", option]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "00-a-red-cat" / "best.png").exists()


def test_other_arguments_arrive(halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"variant": "fp16", "device": "cpu", **SIZE}
    flow: Any = from_diffusers(halved.parent, subfolder=halved.name, **options)
    assert flow.shape == (24, 16)
    flow = from_diffusers(halved, text_encoder_2=None, tokenizer_2=None, **options)
    assert flow.pipe.text_encoder_2 is None and flow.pipe.text_encoder is not None
    other = flux(guidance_embeds=False).transformer
    assert from_diffusers(halved, transformer=other, **options).transformer is other
    flow = from_diffusers(halved, dtype={"transformer": "bfloat16", "default": torch.float32}, **options)
    assert flow.dtype == torch.bfloat16 and flow.pipe.vae.dtype == torch.float32
    flow = from_diffusers(halved, use_safetensors=True, dtype="torch.float32", **options)
    assert flow.dtype == torch.float32
    monkeypatch.setenv("HOME", str(halved.parent))
    assert flowfast.load(f"~/{halved.name}", **options).shape == (24, 16)
    monkeypatch.chdir(halved.parent)
    assert flowfast.load(halved.name, **options).shape == (24, 16)  # a name without a slash that is a folder


def test_what_goes_astray_is_refused(halved: Path) -> None:
    for wrong, message in (
        ({"text_encoder_3": None}, "this FluxPipeline has no part text_encoder_3: choose from .*text_encoder_2"),
        ({"text_encoder": "none"}, "text_encoder must be a loaded part of the pipeline, or None to leave it out"),
        ({"use_safetensors": False}, "use_safetensors: only True"),
        ({"dtype": "half-ish"}, "unknown dtype 'half-ish': choose bfloat16"),
        (
            {"variants": "fp16"},
            "unknown option variants of FluxFlow: choose from .*height.*for an id or folder .*variant",
        ),
        ({"num_inference_steps": 4}, "unknown option num_inference_steps of FluxFlow: it is called steps here"),
        ({"device": "cpu", "device_map": "cuda"}, "device=cpu goes with neither offload nor device_map"),
        ({"device": "cpu", "offload": "model"}, "device=cpu goes with neither offload nor device_map"),
    ):
        with pytest.raises(OptionError, match=message):
            from_diffusers(halved, **{"variant": "fp16", **wrong})
    with pytest.raises(OptionError, match="text_encoder, variant: only for an id or folder"):
        from_diffusers(flux(), variant="fp16", text_encoder=None)
    with pytest.raises(WeightError, match="not-there"):
        from_diffusers(halved.parent, subfolder="not-there")


def index(folder: Path, **changed: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def deepen(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 2}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a class that diffusers does not have": (
        lambda to: index(to, _class_name="Flux9Pipeline"),
        "no attribute Flux9Pip",
    ),
    "cut weights": (lambda to: os.truncate(next((to / "vae").glob("*.safetensors")), 99), "Unable to load weights"),
    "no index": (lambda to: (to / "model_index.json").write_text("{"), "not a valid JSON"),
    "fewer layers than described": (
        lambda to: deepen(to / "transformer" / "config.json"),
        "the files of its transformer lack .* weights .* transformer_blocks.1",
    ),
    "no tokenizer": (lambda to: shutil.rmtree(to / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_one_clear_error(halved: Path, tmp_path: Path, damage: str) -> None:
    edit, message = DAMAGE[damage]
    shutil.copytree(halved, tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(WeightError, match=f"cannot load .*{message}"):
        from_diffusers(tmp_path / "model", variant="fp16", **SIZE)


def test_places_that_are_not_there_are_named(halved: Path) -> None:
    with pytest.raises(WeightError, match="expected the folder of a pipeline, got a file"):
        from_diffusers(next(halved.rglob("*.safetensors")))
    with pytest.raises(OptionError, match="device='gpu' cannot be used"):
        from_diffusers(halved, variant="fp16", device="gpu", **SIZE)


def test_a_token_is_not_told_again(halved: Path) -> None:
    for name in ("no/such-model", str(halved)):
        with pytest.raises(FlowfastError) as caught:
            from_diffusers(name, token="hf_NotToBeSeen", local_files_only=True)
        assert "NotToBeSeen" not in f"{caught.value}"
