"""Damaged, truncated and foreign archives: the loader refuses each with an ArchiveError; it never crashes or hangs."""

from __future__ import annotations

import io
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import flowfast
from flowfast.archive.seal import seal
from tests.cpp import TESTS, command
from tests.toys import GaussianFlow, NearTarget

CHUNK = 100  # files that lie on the disk at once
Mutation = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, r: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 16])):
        changed[r.randrange(len(data))] ^= 1 << r.randrange(8)
    return bytes(changed)


def flipped_at_an_end(data: bytes, r: random.Random) -> bytes:
    """Where the seal and the zip's directory lie, or its first member."""
    at = r.choice([r.randrange(1000), len(data) - 1 - r.randrange(1000)])
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]


def overwritten(data: bytes, r: random.Random) -> bytes:
    at, length = r.randrange(len(data)), 1 + r.randrange(4096)
    return data[:at] + r.choice([bytes(length), b"\xff" * length, r.randbytes(length)]) + data[at + length :]


def cut_off(data: bytes, r: random.Random) -> bytes:
    return data[: r.choice([r.randrange(len(data)), len(data) - 1 - r.randrange(200), r.randrange(200)])]


def cut_out(data: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(data))
    return data[:at] + data[at + 1 + r.randrange(4096) :]


def repeated(data: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(data))
    return data[:at] + data[at : at + 1 + r.randrange(4096)] + data[at:]


def continued(data: bytes, r: random.Random) -> bytes:
    return data + r.choice([b"\n", bytes(64), r.randbytes(100), data[-200:]])


def without_a_member(data: bytes, r: random.Random) -> bytes:
    return rewritten(data, r, lambda name, content: [])


def with_a_damaged_member(data: bytes, r: random.Random) -> bytes:
    return rewritten(data, r, lambda name, content: [(name, flipped(content, r) if content else b"?")])


def with_a_shorter_member(data: bytes, r: random.Random) -> bytes:
    return rewritten(data, r, lambda name, content: [(name, content[: len(content) // 2])])


def with_a_renamed_member(data: bytes, r: random.Random) -> bytes:
    return rewritten(data, r, lambda name, content: [(name + "x", content)])


def rewritten(
    data: bytes, r: random.Random, change: Callable[[str, bytes], list[tuple[str, bytes]]], keep: bool = True
) -> bytes:
    """The zip with one member changed, all checksums right; with the old seal, which is none then."""
    old, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = old.namelist()
    chosen = r.choice(names)
    with zipfile.ZipFile(buffer, "w") as new:
        for name in names:
            content = old.read(name)
            for entry, value in change(name, content) if name == chosen else [(name, content)]:
                new.writestr(entry, value)
        new.comment = old.comment if keep else b""
    return buffer.getvalue()


MUTATIONS: list[Mutation] = [
    flipped, flipped_at_an_end, overwritten, cut_off, cut_out, repeated, continued, without_a_member,
    with_a_damaged_member, with_a_shorter_member, with_a_renamed_member,
]  # fmt: skip


class Foreign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Manifest(Foreign):
    """Says of itself what it is asked to."""

    def __init__(self, entries: dict[str, str]):
        super().__init__()
        self.entries = entries

    @torch.jit.export
    def info(self) -> dict[str, str]:
        return self.entries


def scripted(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def a_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def foreign() -> dict[str, bytes]:
    tensors, other = io.BytesIO(), {"slots": "2", "micro_batch": "4", "passes": "1", "host_reward": "0"}
    torch.save({"weight": torch.zeros(3)}, tensors)
    broken = {name: seal(scripted(Manifest({**other, **entries})), 1) for name, entries in {
        "no budgets": {}, "a word for a number": {"budget_min": "few", "budget_max": "2"},
        "no slots": {"budget_min": "1", "budget_max": "2", "slots": "0"},
        "too many digits": {"budget_min": "1", "budget_max": "9" * 30},
    }.items()}  # fmt: skip
    return {
        "nothing": b"", "text": b"flowfast-archive\n", "a zip": a_zip(a=b"b"), "an empty zip": a_zip(),
        "tensors": tensors.getvalue(), "a scripted module": scripted(Foreign()),
        "a sealed zip": seal(a_zip(a=b"b"), 1), "a sealed empty zip": seal(a_zip(), 1),
        "sealed tensors": seal(tensors.getvalue(), 1), "a sealed scripted module": seal(scripted(Foreign()), 1),
        "another noise stream": seal(scripted(Foreign()), 2), **broken,
    }  # fmt: skip


@pytest.fixture(scope="module")
def archive(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    flowfast.export(GaussianFlow(), path, reward=NearTarget(), budget=42, steps=6, slots=2)
    return path.read_bytes()


def verdicts(files: Iterator[tuple[str, bytes]], folder: Path) -> list[tuple[str, str]]:
    """(name, how loading ended) of each file; a child process each."""
    found, files = list[tuple[str, str]](), iter(files)
    while chunk := [file for _, file in zip(range(CHUNK), files, strict=False)]:
        paths = [folder / f"{i}.pt" for i in range(len(chunk))]
        for path, (_, content) in zip(paths, chunk, strict=True):
            path.write_bytes(content)
        said = command(TESTS / "flowfast_load_archives", input="".join(f"{path}\n" for path in paths)).splitlines()
        found += [(name, verdict) for (name, _), verdict in zip(chunk, said, strict=True)]
    return found


def mutants(archive: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    r, made = random.Random(seed), 0
    while made < count:
        mutation = MUTATIONS[made % len(MUTATIONS)]
        content = mutation(archive, r)
        if content != archive:
            yield f"{mutation.__name__} {made}", content
            made += 1


def assert_refused(found: list[tuple[str, str]]) -> None:
    assert [(name, verdict) for name, verdict in found if not verdict.startswith("refused: ")] == []


def test_the_archive_itself_is_loaded(archive: bytes, tmp_path: Path) -> None:
    assert verdicts(iter([("whole", archive)]), tmp_path) == [("whole", "loaded")]


def test_a_mutant_is_refused(archive: bytes, tmp_path: Path) -> None:
    assert_refused(verdicts(mutants(archive, 220, seed=0), tmp_path))


@pytest.mark.slow
def test_many_mutants_are_refused(archive: bytes, tmp_path: Path) -> None:
    found = verdicts(mutants(archive, 2200, seed=1), tmp_path)
    assert_refused(found)
    print(Counter(verdict.partition(".pt ")[2][:40] for _, verdict in found))


def test_a_foreign_file_is_refused(prefix: Path, tmp_path: Path) -> None:
    found = dict(verdicts(iter(foreign().items()), tmp_path))
    assert_refused(list(found.items()))
    assert "noise stream 2, this library has noise stream 1" in found["another noise stream"]
    assert "PyTorch cannot load" in found["a sealed zip"]
    for name, said in (
        ("no budgets", "expected budget_min of at least 1, got ''"),
        ("no slots", "expected slots of at least 1, got '0'"),
        ("a word for a number", "got 'few'"), ("too many digits", "expected budget_max of at least 1"),
    ):  # fmt: skip
        assert said in found[name]
