"""Shipped weights: safetensors in float16, a card with their SHA-256, and loaders that check it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from flowfast.errors import WeightError
from flowfast.models.scenes.model import SceneModel
from flowfast.models.scenes.verifier import SceneReward

FOLDER = Path(__file__).resolve().parent / "weights"
MODEL_FILE, REWARD_FILE, CARD_FILE = "model.safetensors", "reward.safetensors", "card.json"
_REMEDY = "re-install flowfast, or train it again with 'python -m flowfast.models.scenes.{script} --out DIR'"


def _write(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename: the file is whole or it is the old one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_card(folder: Path = FOLDER) -> dict[str, Any]:
    """The card: per weight file its SHA-256 and how it was made. Raises WeightError."""
    path = folder / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"cannot read the weight card {path} ({error}); {_REMEDY.format(script='train')}") from error
    if not isinstance(card, dict):
        raise WeightError(f"the weight card {path} is not an object; {_REMEDY.format(script='train')}")
    return card


def export(module: nn.Module, name: str, details: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write `module` as `name` in float16 and enter its SHA-256 and `details` in the card."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save({key: value.detach().half().contiguous() for key, value in module.state_dict().items()})
    card = read_card(folder) if (folder / CARD_FILE).exists() else {}
    parameters = sum(p.numel() for p in module.parameters())
    card[name] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": parameters,
    } | details
    _write(folder / name, content)
    _write(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())


def _load(module: nn.Module, name: str, script: str, folder: Path) -> None:
    path, remedy = folder / name, _REMEDY.format(script=script)
    entry = read_card(folder).get(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightError(f"cannot read the weight file {path} ({error.strerror}); {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    expected = entry.get("sha256") if isinstance(entry, dict) else None
    if found != expected:
        raise WeightError(f"the weight file {path} is damaged: expected SHA-256 {expected}, got {found}; {remedy}")
    try:
        state = {key: value.float() for key, value in load(content).items()}
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise WeightError(f"the weight file {path} does not fit this version ({error}); {remedy}") from error


def load_scenes(folder: Path = FOLDER) -> SceneModel:
    """The embedded model, float32, in eval mode, without gradients. Raises WeightError on missing or damaged files."""
    with torch.random.fork_rng(devices=[]):
        model = SceneModel()
    _load(model, MODEL_FILE, "train", folder)
    return model.eval().requires_grad_(False)


def load_scene_reward(folder: Path = FOLDER) -> SceneReward:
    """The given verifier, float32, in eval mode, without gradients. Raises WeightError on missing or damaged files."""
    with torch.random.fork_rng(devices=[]):
        reward = SceneReward()
    _load(reward, REWARD_FILE, "train_verifier", folder)
    return reward.eval().requires_grad_(False)
