"""The files of a checkpoint: damage is refused, what is written grows with the work, and nobody else writes there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

import flowfast
from flowfast.engine.checkpoint import BLANK, Checkpoint, _header, _sealed
from flowfast.errors import OptionError, OutputError
from tests.engine.test_call import assert_same
from tests.engine.test_checkpoint import PROMPTS, Counted, Killed, killed, search
from tests.toys import GaussianFlow, NearTarget

OPTIONS: dict[str, Any] = {"method": "svdd", "top_k": 2}


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A search of which some prompts are done and others run."""
    path = tmp_path / "search.safetensors"
    killed(path, 32, **OPTIONS)
    held = Checkpoint(path).read(PROMPTS)
    assert held and 0 < len(held.samples) < len(PROMPTS)
    return path


def mutants(data: bytes, count: int, rng: random.Random) -> Any:
    """Bit flips, other bytes, zeroed blocks, cuts and insertions."""
    for number in range(count):
        at = rng.randrange(len(data))
        if number % 5 < 2:
            yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif number % 5 == 2:
            yield data[:at] + bytes(rng.randrange(256) for _ in range(4)) + data[at + 4 :]
        elif number % 5 == 3:
            yield data[:at] + bytes(512)[: len(data) - at] + data[at + 512 :]
        else:
            yield data[:at] if number % 2 else data[:at] + rng.randbytes(3) + data[at:]


@pytest.mark.parametrize(("ending", "count"), [("", 500), (".done", 200)])
def test_a_damaged_file_is_refused_or_gives_the_same(stopped: Path, ending: str, count: int) -> None:
    """Nearly all are refused; what lies behind the samples that count may be anything."""
    right, file = Checkpoint(stopped).read(PROMPTS), stopped.with_name(stopped.name + ending)
    whole, refused = file.read_bytes(), 0
    assert right is not None
    for mutant in mutants(whole, count, random.Random(13)):
        file.write_bytes(mutant)
        try:
            found = Checkpoint(stopped).read(PROMPTS)
        except OptionError as error:
            refused += 1
            assert str(error).startswith(f"cannot resume from {stopped}: ") and "\n" not in str(error)
            assert str(error).endswith("; remove it to start anew") and len(str(error)) < 400
        else:
            assert found is not None and mutant.startswith(whole)
            assert found.facts == right.facts and found.samples.keys() == right.samples.keys()
    assert refused > 0.95 * count
    file.write_bytes(whole)
    assert_same(search(Counted(), stopped, **OPTIONS), search(Counted(), None, **OPTIONS))


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    weights, old, empty, folder = (tmp_path / name for name in ("weights", "old", "empty", "folder"))
    save_file({"a": torch.zeros(3)}, weights)
    save_file({"a": torch.zeros(3)}, old, metadata={"flowfast": '{"format": 2, "prompts": ["a"]}'})
    empty.touch()
    folder.mkdir()
    for path, says in [
        (weights, "it is not a checkpoint"),
        (old, "a checkpoint of format 2, and this flowfast reads format 6"),
        (empty, "it is empty"),
        (folder, "it is not a file"),
        (tmp_path / "old" / "deeper", "cannot write"),
    ]:
        with pytest.raises((OptionError, OutputError), match=says):
            search(Counted(0), path)
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "old", "empty", "folder"}
    Checkpoint(old).remove()  # it is ours
    assert not old.exists()
    for path in (weights, empty):
        with pytest.raises(OptionError, match="is in the way"):
            Checkpoint(path).remove()
        assert path.exists()


@pytest.mark.parametrize("change", ["shape", "dtype", "missing"])
def test_fields_are_not_believed_where_a_digest_is_right(stopped: Path, change: str) -> None:
    """A state of another shape would be stretched to this one's."""
    with stopped.open("rb") as file:
        _, facts = _header(file)
    tensors = load(stopped.read_bytes())
    name, x = "group0.state.x", tensors["group0.state.x"]
    tensors |= {name: {"shape": x[:1].clone(), "dtype": x.double(), "missing": x}[change]}
    if change == "missing":
        del tensors[name]
    stopped.write_bytes(_sealed(save(tensors, metadata={"blake2b": BLANK, "flowfast": json.dumps(facts)})))
    with pytest.raises(OptionError, match="cannot resume from .*: it has no state.x"):
        search(Counted(), stopped, **OPTIONS)


def test_samples_of_another_search_are_refused(stopped: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    search(Counted(), other, **OPTIONS, seed=5)
    stopped.with_name(stopped.name + ".done").write_bytes(other.with_name(other.name + ".done").read_bytes())
    with pytest.raises(OptionError, match=r"search.safetensors.done beside it is damaged or of another search"):
        search(Counted(), stopped, **OPTIONS)


def test_samples_that_are_gone_are_named(stopped: Path) -> None:
    stopped.with_name(stopped.name + ".done").unlink()
    with pytest.raises(OptionError, match=r"search.safetensors.done with its finished samples is not beside it"):
        search(Counted(), stopped, **OPTIONS)


def test_samples_that_a_kill_left_behind_are_cut_off(stopped: Path) -> None:
    """They were appended, and the state that counts them never came."""
    done = stopped.with_name(stopped.name + ".done")
    with done.open("ab") as file:
        file.write(b"half of a sample" * 1000)
    assert_same(search(Counted(), stopped, **OPTIONS), search(Counted(), None, **OPTIONS))
    assert b"half of a sample" not in done.read_bytes()
    assert_same(search(Counted(0), stopped, **OPTIONS), search(Counted(), None, **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_latents_of_any_dtype_go_on(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = (2 * torch.randn(len(PROMPTS), 3, generator=torch.Generator().manual_seed(1))).to(dtype)
    path, options = tmp_path / "search.safetensors", {"method": "svdd", "chains": 2}
    expected = search(Counted(), None, latents=latents.float(), **options)
    killed(path, 20, latents=latents, **options)
    assert_same(search(Counted(), path, latents=latents.requires_grad_(dtype.is_floating_point), **options), expected)


def test_options_that_json_does_not_know(tmp_path: Path) -> None:
    """They are found out before anything runs, and take part in what must be equal."""
    path, options = tmp_path / "search.safetensors", {"method": "svdd", "model_options": {"dtype": torch.bfloat16}}
    killed(path, 20, **options, until=float("inf"))
    with pytest.raises(OptionError, match="with config {'model_options': {'dtype': 'torch.bfloat16'}}, this one has"):
        search(Counted(), path, method="svdd", model_options={"dtype": torch.float16}, until=float("inf"))
    found = search(Counted(), path, **options, until=float("inf"))
    assert_same(found, search(Counted(), None, **options))


def test_infinite_rewards_are_kept(tmp_path: Path) -> None:
    def endless(images: Any, prompts: Any) -> list[float]:
        return [float("inf")] * len(prompts)

    path = tmp_path / "search.safetensors"
    first = search(Counted(), path, reward=endless, method="bon")
    again = search(Counted(0), path, reward=endless, method="bon")
    assert [sample.reward for sample in again.samples] == [float("inf")] * len(PROMPTS)
    assert_same(first, again)


def bytes_written() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("wchar: ")[1].split()[0])


def test_what_is_written_grows_with_the_work(tmp_path: Path) -> None:
    """Four times the prompts, four times the bytes; finished samples written with every save made it ten times."""
    written = []
    for count in (24, 96):
        before, path = bytes_written(), tmp_path / f"{count}.safetensors"
        flowfast.search(
            GaussianFlow(), [f"prompt {i} of a list" for i in range(count)], reward=NearTarget(), method="bon",
            budget=8, steps=4, slots=2, micro_batch=4, checkpoint=path, checkpoint_seconds=0,
        )  # fmt: skip
        written.append(bytes_written() - before)
    assert written[0] > 24 * 100
    assert written[1] < 4.4 * written[0]


HOLD = """
import sys, time
import flowfast
from tests.toys import GaussianFlow
def reward(images, prompts):
    print("runs", flush=True)
    time.sleep(60)
flowfast.search(GaussianFlow(), ["a"], reward=reward, method="bon", budget=8, steps=4, checkpoint=sys.argv[1])
"""


def test_a_second_search_with_a_checkpoint_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "search.safetensors"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "runs\n"
        said = rf"search.safetensors is in use by another flowfast \(process {first.pid} on .*, since 20.*\): wait"
        with pytest.raises(OutputError, match=said):
            search(Counted(), path)
        search(Counted(), path.with_name("another.safetensors"))  # beside it is free
        first.kill()
    left = path.parent / ".search.safetensors.1234abcd.flowfast-part.safetensors"
    left.write_bytes(b"of a process that is dead")
    search(Counted(), path)
    assert {found.name for found in path.parent.iterdir()} == {
        *("search.safetensors", "search.safetensors.done", "another.safetensors", "another.safetensors.done")
    }


def test_a_search_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        search(Counted(0), tmp_path / "new" / "search.safetensors", method="bon")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["shape", "schedule", "reward"])
def test_another_model_or_reward_of_ones_own_is_refused(tmp_path: Path, change: str) -> None:
    """No option says what these are; a search once went on with the state of one and the rows of another."""

    def first(images: Tensor, prompts: list[str]) -> Tensor:
        return images.flatten(1).sum(1)

    def second(images: Tensor, prompts: list[str]) -> Tensor:
        return -images.flatten(1).sum(1)

    def run(reward: Any = first, shape: tuple[int, ...] = (2, 3), interpolant: str = "linear", calls: int = 99) -> Any:
        left = iter(range(calls))

        def velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if next(left, None) is None:
                raise Killed
            return x * 0.5

        flow = flowfast.flow_from(velocity, shape, interpolant=interpolant)
        options: dict[str, Any] = {"method": "ode", "budget": 7, "steps": 6, "checkpoint_seconds": 0, "slots": 1}
        return flowfast.search(flow, ["a", "b"], reward=reward, checkpoint=tmp_path / "held", **options)

    with pytest.raises(Killed):
        run(calls=8)
    other: dict[str, Any] = {
        "shape": {"shape": (3, 2)},
        "schedule": {"interpolant": "vp"},
        "reward": {"reward": second},
    }
    with pytest.raises(OptionError, match=f"cannot resume from .*held: it is of a search with (other )?{change}"):
        run(**other[change])
    assert len(run().samples) == 2


def test_a_checkpoint_behind_a_link_is_one_file(tmp_path: Path) -> None:
    """It stays where the link points, is found under either name, and has one lock."""
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "link", tmp_path / "disk" / "held"
    link.symlink_to(place)
    killed(link, 32, **OPTIONS)
    assert link.is_symlink() and place.is_file() and Checkpoint(place).read(PROMPTS)
    assert_same(search(GaussianFlow(), place, **OPTIONS), search(GaussianFlow(), None, **OPTIONS))

    def again(*_: Any) -> None:
        with pytest.raises(OutputError, match="in use by another flowfast"):
            search(GaussianFlow(), link, **OPTIONS)

    place.unlink()
    search(GaussianFlow(), place, on_sample=again, **OPTIONS)
