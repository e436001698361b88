"""The bits of a search, against a table: whatever is rebuilt, the same request keeps its latents, path and NFE.

The flow and the reward are made of +, - and * on single elements, so their bits hang on no library's vector width or
order of summation; noise, weights and decisions come from flowfast's own ops, which give the same bits everywhere.
`python -m tests.engine.test_bits` writes the table anew; a change of it is a change of every user's pictures.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfast
from tests.toys import METHODS

TABLE = Path(__file__).with_name("bits.json")
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
NO_LANES = {
    "ode",
    "bon",
    "prune",
    "smc",
}  # each chain of these tries one child a step, so further lanes have nothing to do


class Killed(BaseException):
    pass


class Polynomial(nn.Module):
    """u = x (t + 1/4) + m (t - 1) + x y / 16 element by element, y the elements in reverse, m from the prompt."""

    def __init__(self, preview: bool = False, life: int = 1 << 30) -> None:
        super().__init__()
        self.shape, self.interpolant, self.t_finish, self.guidance = (4,), "linear", 0.1, 1.0
        self.defaults = flowfast.FlowDefaults(preview=self.rough if preview else None)
        self.life = life

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"mean": torch.tensor([[len(prompt) * 0.25] for prompt in prompts])}

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.life -= 1
        if self.life < 0:
            raise Killed
        time = t.view(-1, 1)
        return x_t * (time + 0.25) + cond["mean"] * (time - 1.0) + x_t * x_t.flip(1) * 0.0625

    def decode(self, x0: Tensor) -> Tensor:
        return x0 * 0.5 + 0.25

    def rough(self, x0: Tensor) -> Tensor:
        return x0 * 0.4375 + 0.25


class Corner(nn.Module):
    """a b - (c - m)^2 + d / 8 of the four elements, m from the prompt."""

    name, range, differentiable = "corner", (-1e9, 1e9), True

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"target": torch.tensor([[1.0 - len(prompt) * 0.125] for prompt in prompts])}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        a, b, c, d = images.unbind(1)
        off = c - cond["target"][:, 0]
        return a * b - off * off + d * 0.125


def on_the_host(images: Tensor, prompts: Any) -> Tensor:
    reward = Corner()
    return reward(images, torch.zeros(len(images)), reward.encode(list(prompts)))


SETTINGS: dict[str, dict[str, Any]] = {
    "one prompt": {"prompts": PROMPTS[:1]},
    "five prompts": {"slots": 2},
    "lanes": {"slots": 2, "lanes": 4},
    "guided": {"guidance": 3.0, "negative_prompt": "no", "budget": 80, "slots": 2},
    "steered": {"gradient": "dps:0.5", "slots": 2},
    "preview": {"preview": True, "slots": 2, "finalists": 3, "top_k": 2},
    "host reward": {"reward": on_the_host, "slots": 4},
    "vp": {"interpolant": "vp", "slots": 2, "seed": 7},
}
CASES = [(method, name) for method in METHODS for name in SETTINGS if not (name == "lanes" and method in NO_LANES)]


def search(method: str, name: str, life: int = 1 << 30, checkpoint: Path | None = None) -> flowfast.SearchResult:
    asked: dict[str, Any] = {"prompts": PROMPTS, "reward": Corner(), "budget": 40, "steps": 6, "micro_batch": 4}
    asked |= SETTINGS[name]
    flow = Polynomial(asked.pop("preview", False), life)
    return flowfast.search(
        flow, asked.pop("prompts"), method=method, checkpoint=checkpoint, checkpoint_seconds=0, **asked
    )


def digest(result: flowfast.SearchResult) -> str:
    found = hashlib.sha256()
    for sample in result.samples:
        found.update(json.dumps([sample.nfe, sample.nfe_speculative, sample.unspent]).encode())
        for ranked in sample.top:
            found.update(ranked.latent.numpy().tobytes() + ranked.x_t.numpy().tobytes())
            found.update(json.dumps([ranked.winner.key, ranked.winner.path]).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    return dict(json.loads(TABLE.read_text()))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_bits_are_those_of_the_table(method: str, name: str, table: dict[str, str]) -> None:
    assert digest(search(method, name)) == table[f"{method}, {name}"]


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_was_killed_ends_with_the_same_bits(method: str, table: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        search(method, "five prompts", life=17, checkpoint=tmp_path / "search.safetensors")
    found = search(method, "five prompts", checkpoint=tmp_path / "search.safetensors")
    assert digest(found) == table[f"{method}, five prompts"]


def test_settings_that_change_a_search_have_bits_of_their_own(table: dict[str, str]) -> None:
    """A digest of nothing, or of the same search twice, would hold for ever."""
    assert sorted(table) == sorted(f"{method}, {name}" for method, name in CASES)
    own = {"one prompt", "five prompts", "guided", "steered", "vp"}  # lanes, a preview, a host may find the same
    digests = [value for name, value in table.items() if name.split(", ")[1] in own]
    assert len(set(digests)) == len(digests) == len(METHODS) * len(own)


if __name__ == "__main__":
    TABLE.write_text(json.dumps({f"{m}, {name}": digest(search(m, name)) for m, name in CASES}, indent=1) + "\n")
