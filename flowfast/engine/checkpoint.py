"""A search on disk while it runs, so that one that was killed goes on to the identical result.

Two files. At the path itself lies what runs: one safetensors file with the tensors of every batch's state and of the
method, and as its metadata a digest of all its bytes and one JSON text with what the host knows. It is written whole,
between rounds; a round that was under way then is run again, from the same state, with the same noise. It is also
written before a finished prompt is decoded, so that a decoder that fails takes nothing with it.

Beside it, at the path with ".done" behind it, grow the samples that are done, each written once. The first file says
how many bytes of the second belong to it and what their digest is; what a kill left behind these is cut off. So all
that is written grows with the work. The digests tell damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.files import output_errors, plain, write_bytes
from flowfast.prompts import Prompt
from flowfast.rounds.batch import SlotBatch
from flowfast.rounds.state import State
from flowfast.rounds.steered import Steered
from flowfast.types import Ranked, Sample, Winner

FORMAT = 6
BLANK = "0" * 64  # where the digest will stand, while it is computed
SEAL = b'"blake2b":"'
LONGEST_HEADER = 100_000_000  # of a safetensors file


@dataclass(frozen=True)
class Held:
    """A search between two rounds: the tensors of its state, on the CPU, what the host knows, the samples of the
    prompts that are done, and what a budget in seconds has cut (`SearchConfig.cuts`)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    samples: dict[int, Sample]
    cuts: list[tuple[int, int, int]]


@dataclass
class Checkpoint:
    """The two files of one search, which must be locked (`flowfast.files.locked_file`)."""

    path: Path
    size: int = 0
    """Bytes of the samples that are on disk."""
    kept: set[int] = field(default_factory=set)
    """Which ones these are."""

    def __post_init__(self) -> None:
        self.done = self.path.with_name(self.path.name + ".done")
        self.hashed = hashlib.blake2b(digest_size=32)

    def write(self, held: Held) -> None:
        """Raises OutputError."""
        records = b""
        for index in sorted(held.samples.keys() - self.kept):
            cuts = [cut for cut in held.cuts if cut[0] == index]
            record = _packed({"index": index, "cuts": cuts}, held.samples[index])
            records += len(record).to_bytes(8, "little") + record
        if records:
            with output_errors(self.done), self.done.open("r+b" if self.size else "wb") as file:
                file.seek(self.size)
                file.write(records)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            self.size += len(records)
            self.hashed.update(records)
            self.kept |= held.samples.keys()
        running = [cut for cut in held.cuts if cut[0] not in self.kept]
        facts = {"format": FORMAT, "done": [self.size, self.hashed.hexdigest()], **held.facts, "cuts": running}
        write_bytes(self.path, packed(facts, held.tensors))

    def read(self, prompts: list[str]) -> Held | None:
        """What was written, with these prompts for its samples, from the first one again where there are more; None:
        nothing. Raises OptionError: it is damaged, of another version, or no checkpoint."""
        if not os.path.lexists(self.path):
            return None
        try:
            with self.path.open("rb") as file:
                facts, tensors = unpacked(file)
            self.check_same(facts, {"prompts": digest_of_prompts(prompts)})
            samples: dict[int, Sample] = {}
            cuts = [(cut[0], cut[1], cut[2]) for cut in facts["cuts"]]
            for record in self._records(*facts["done"]):
                found, of_sample = _parts(record)
                samples[found["index"]] = _sample(prompts[found["index"] % len(prompts)], found, of_sample)
                cuts += [(cut[0], cut[1], cut[2]) for cut in found["cuts"]]
        except OptionError:
            raise
        except OSError as error:
            raise self.refused(error.strerror or str(error)) from None
        except ValueError as error:
            raise self.refused(str(error)) from None
        except (SafetensorError, KeyError, IndexError, TypeError) as error:
            raise self.refused(f"it does not say what it should ({type(error).__name__}: {error})") from None
        self.kept = set(samples)
        return Held(tensors, facts, samples, cuts)

    def _records(self, size: int, digest: str) -> list[bytes]:
        """The samples that are done; raises ValueError."""
        data = b""
        if size:
            if not self.done.is_file():
                raise ValueError(f"{self.done.name} with its finished samples is not beside it")
            with self.done.open("rb") as file:
                data = file.read(size)
        self.size = size
        self.hashed.update(data)
        if len(data) != size or self.hashed.hexdigest() != digest:
            raise ValueError(f"{self.done.name} beside it is damaged or of another search")
        records, start = [], 0
        while start < size:
            end = start + 8 + int.from_bytes(data[start : start + 8], "little")
            records.append(data[start + 8 : end])
            start = end
        return records

    def refused(self, why: str) -> OptionError:
        return OptionError(f"cannot resume from {self.path}: {why}; remove it to start anew")

    def remove(self) -> None:
        """Raises OptionError rather than remove another's file."""
        if os.path.lexists(self.path):
            try:
                with self.path.open("rb") as file:
                    _header(file, any_format=True)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                raise OptionError(f"{self.path} is in the way: {why}; move it, or choose another --out") from None
            self.path.unlink()
        self.done.unlink(missing_ok=True)

    def check_same(self, facts: dict[str, Any], now: dict[str, Any]) -> None:
        """Raises OptionError where the search that was killed is not the one that is asked for."""
        for name, value in now.items():
            before = facts.get(name)
            if before == value:
                continue
            if isinstance(before, dict) and isinstance(value, dict):
                differ = [key for key in {**before, **value} if before.get(key) != value.get(key)]
                before, value = ({key: each.get(key) for key in differ} for each in (before, value))
            other = f"other {name}" if name in DIGESTS else f"{name} {before!r}, this one has {value!r}"
            raise OptionError(
                f"cannot resume from {self.path}: it is of a search with {other}; ask for the same search, or remove "
                "it to start anew"
            )


DIGESTS = {"prompts", "latents", "schedule"}


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def digest_of_prompts(prompts: list[str]) -> str:
    """Of texts and fields."""
    entries = [prompt.as_entry() if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    return digest_of(json.dumps(plain(entries), sort_keys=True, default=repr).encode())


def state_of(engine: SlotBatch) -> dict[str, Tensor]:
    """All tensors that a round leaves to the next one, by name; they are the engine's own."""
    state = {f"state.{name}": getattr(engine.state, name) for name in State.__annotations__}
    if isinstance(engine, Steered):
        state["grad"] = engine.grad
    return state | {f"method.{name}": buffer for name, buffer in engine.method.named_buffers()}


def load_into(engine: SlotBatch, tensors: dict[str, Tensor]) -> None:
    """Fills an engine whose slots have been admitted. Raises ValueError where tensors are not its own."""
    for name, tensor in state_of(engine).items():
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"it has no {name} of {tuple(tensor.shape)} {tensor.dtype}")
        tensor.copy_(found)


# ---- bytes ----


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, allow_nan=False)


def packed(facts: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with a digest of all its bytes; facts say their format."""
    host = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return _sealed(save(host, metadata={"blake2b": BLANK, "flowfast": _text(facts)}))


def _sealed(data: bytes) -> bytes:
    """A safetensors file whose digest is BLANK, with its digest."""
    at = data.index(SEAL + BLANK.encode()) + len(SEAL)
    return data[:at] + digest_of(data).encode() + data[at + len(BLANK) :]


def _header(file: BinaryIO, any_format: bool = False, expected: int = FORMAT) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a checkpoint, up to its tensors, and its facts. Raises ValueError for any other file."""
    start = file.read(8)
    count = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= count <= LONGEST_HEADER:
        raise ValueError("it is not a checkpoint" if start else "it is empty")
    header = file.read(count)
    try:
        facts = json.loads(json.loads(header)["__metadata__"]["flowfast"])
        written = facts["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is not a checkpoint, or damaged") from None
    if written != expected and not any_format:
        raise ValueError(f"it is a checkpoint of format {written!r}, and this flowfast reads format {expected}")
    return start + header, facts


def unpacked(file: BinaryIO, expected: int = FORMAT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a sealed file of this format. Raises ValueError."""
    header, facts = _header(file, expected=expected)
    data = header + file.read()
    at = header.find(SEAL) + len(SEAL)
    found = data[at : at + len(BLANK)]
    if digest_of(data[:at] + BLANK.encode() + data[at + len(BLANK) :]).encode() != found:
        raise ValueError("it is damaged")
    return facts, load(data)


def _packed(facts: dict[str, Any], sample: Sample) -> bytes:
    tensors = {
        f"{k}.{name}": getattr(ranked, name).contiguous()
        for k, ranked in enumerate(sample.top)
        for name in ("image", "latent", "x_t")
    }
    top = [  # rewards as texts, for JSON knows no infinity
        {
            "reward": repr(ranked.reward),
            "preview_reward": None if ranked.preview_reward is None else repr(ranked.preview_reward),
            "winner": list(ranked.winner.__dict__.values()),
        }
        for ranked in sample.top
    ]
    rest = {name: value for name, value in sample.__dict__.items() if name not in ("top", "prompt")}
    return save(tensors, metadata={"flowfast": _text({**facts, "top": top, "rest": rest})})


def packed_sample(sample: Sample) -> bytes:
    """A sample without its prompt, for another process: a safetensors file."""
    return _packed({}, sample)


def unpacked_sample(prompt: str, record: bytes) -> Sample:
    """What `packed_sample` packed, with its prompt."""
    return _sample(prompt, *_parts(record))


def _parts(record: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    return json.loads(header["__metadata__"]["flowfast"]), load(record)


def _sample(prompt: str, found: dict[str, Any], tensors: dict[str, Tensor]) -> Sample:
    top = []
    for k, entry in enumerate(found["top"]):
        key, chain, transition, candidate, path = entry["winner"]
        image, latent, x_t = (tensors[f"{k}.{name}"] for name in ("image", "latent", "x_t"))
        winner = Winner(key, chain, transition, candidate, tuple((step[0], step[1], step[2]) for step in path))
        preview = entry["preview_reward"]
        shown = None if preview is None else float(preview)
        top.append(Ranked(float(entry["reward"]), image, latent, x_t, winner, shown))
    return Sample(prompt=prompt, top=tuple(top), **found["rest"])
