"""The file of a calibration: what it says, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from flowfast.calibration.bank import Bank, read, statistics, weights_of, write
from flowfast.errors import OptionError
from tests.calibration.banks import bank_of, path_of, walk
from tests.toys import GaussianFlow, NearTarget


@pytest.fixture
def bank() -> Bank:
    return bank_of(path_of(walk(3, 6, [0.2, 0.8, 1.0])))


def test_it_is_read_as_it_was_written(bank: Bank, tmp_path: Path) -> None:
    write(tmp_path / "a.json", bank)
    found = read(tmp_path / "a.json")
    assert np.allclose(found.paths[0].rewards, bank.paths[0].rewards, rtol=1e-5)
    assert found.paths[0].options == bank.paths[0].options and found.paths[0].rho == bank.paths[0].rho
    write(tmp_path / "b.json", found)
    write(tmp_path / "c.json", read(tmp_path / "b.json"))
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert found.digest == read(tmp_path / "b.json").digest


def test_statistics_are_those_of_a_prompt() -> None:
    rewards = np.round(walk(5, 12, [0.3, 0.9, 1.0]), 1)  # ties among them
    rewards[4, :, 0] = 7.0  # tells nothing
    found = statistics(rewards)
    rho = [[spearmanr(p[:, k], p[:, -1]).statistic if np.ptp(p[:, k]) else 0.0 for k in range(3)] for p in rewards]
    assert np.allclose(found["rho"], np.mean(rho, 0), atol=1e-5)
    assert np.allclose(found["mean"], rewards.mean((0, 1)), atol=1e-4)
    assert np.allclose(found["sd"], rewards.std(1, ddof=1).mean(0), atol=1e-4)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        facts = json.loads(text)
        change(facts)
        return json.dumps(facts)

    return edit


REFUSED: dict[str, tuple[Callable[[str], str], str]] = {
    "no JSON": (lambda text: text[:-20], "cannot read the calibration"),
    "empty": (lambda _: "", "cannot read the calibration"),
    "a list": (lambda _: "[]", "it is no calibration"),
    "another file": (edited(lambda f: f.update(name="other")), "it is no calibration"),
    "another format": (edited(lambda f: f.update(format=2)), "has format 2, this flowfast reads format 1"),
    "NaN": (lambda text: text.replace('"seed":0', '"seed":NaN'), "expected finite numbers, got NaN"),
    "an infinite reward": (edited(lambda f: f["paths"][0]["rewards"][0][0].__setitem__(0, 1e999)), "finite"),
    "a reward missing": (edited(lambda f: f["paths"][0]["rewards"][0][0].pop()), "expected rewards"),
    "a prompt missing": (edited(lambda f: f["prompts"].pop()), "expected rewards of 2 prompts, got those of 3"),
    "a text": (edited(lambda f: f["paths"][0]["rewards"][0].__setitem__(0, ["x"] * 3)), "expected rewards"),
    "times that rise": (edited(lambda f: f["paths"][0].update(linear_times=[0.1, 0.5, 1.0])), "fall"),
    "a time beyond": (edited(lambda f: f["paths"][0]["linear_times"].__setitem__(0, 1.5)), "above 0 and at most 1"),
    "passes": (edited(lambda f: f["paths"][0].update(passes=[1, 2, 3])), "must be in 1 .. 2"),
    "other rho": (edited(lambda f: f["paths"][0].update(rho=[1.0, 1.0, 1.0])), "rho as it follows from the rewards"),
    "no paths": (edited(lambda f: f.update(paths=[])), "at least one path"),
    "unknown field": (edited(lambda f: f.update(colour="red")), "colour"),
    "field missing": (edited(lambda f: f.pop("reward")), "reward"),
    "negative time": (edited(lambda f: f.update(seconds_row=-1)), "must be in 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_refused(name: str, bank: Bank, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, bank)
    edit, message = REFUSED[name]
    path.write_text(edit(path.read_text()))
    with pytest.raises(OptionError) as error:
        read(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read(tmp_path / "none.json")


def test_weights_are_told_apart() -> None:
    one, other, third = GaussianFlow(), GaussianFlow(), NearTarget()
    assert weights_of(one) == weights_of(other) != weights_of(third)
    import flowfast

    scenes, changed = flowfast.load("scenes"), flowfast.load("scenes")
    assert weights_of(scenes) == weights_of(changed)
    changed.modulate.bias.data[0] += 1e-3
    assert weights_of(scenes) != weights_of(changed)
