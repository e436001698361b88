"""The state of a long-lived engine on disk: a sealed file with what runs, and beside it a journal of its requests, in
which also those stand that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowfast.config import Picked, SearchParams, make
from flowfast.engine import clock
from flowfast.engine.checkpoint import packed, unpacked
from flowfast.engine.core import EngineCore
from flowfast.engine.held import held, restore
from flowfast.engine.journal import Journal, Known, read_journal
from flowfast.engine.request import Job, Request
from flowfast.errors import FlowfastError, OptionError
from flowfast.files import locked_file, output_errors, plain, write_bytes
from flowfast.prompts import Prompt, prompt_of
from flowfast.version import versions

NAME = "flowfast-engine"
FORMAT = 2


class Kept:
    """The two files of an engine, which are its own until it is closed."""

    def __init__(self, path: Path, known: Known, anew: bool = False):
        """known: what the journal says; anew: it is of another engine than the one whose files may lie there. Raises
        OutputError: the place cannot be written, or is another's."""
        self.path, self.saved = path, clock.now()
        self._lock = locked_file(path)
        self._lock.__enter__()
        try:
            with output_errors(path):
                if anew:
                    path.unlink(missing_ok=True)
            self._journal = Journal(journal_path(path), known)
        except BaseException:
            self.close()
            raise

    def add(self, request: Request, number: int) -> None:
        self._journal.add(entry_of(request, number))

    def end(self, numbers: list[int]) -> None:
        """These have ended, and their caller knows."""
        self._journal.end(numbers)

    def save(self, core: EngineCore, asked: dict[str, Any]) -> None:
        """asked: options that must be equal where the state is put back."""
        tensors, facts = held(core)
        running = {
            str(job.number): {"kind": repr(job.kind), "cuts": job.cuts, "splits": job.splits}
            for *_, job in core.scheduler.running()
        }
        known = self._journal.known
        facts |= {"format": FORMAT, "name": NAME, "engine": known.engine, "entries": known.entries}
        write_bytes(self.path, packed({**facts, "running": running, "same": facts_of(asked)}, tensors))
        self.saved = clock.now()

    def close(self) -> None:
        self._lock.__exit__(None, None, None)


def write_aside(path: Path, core: EngineCore, jobs: Iterable[Job], asked: dict[str, Any]) -> None:
    """The two files of an engine that does not go on saving there; jobs: those that have not ended."""
    known = Known()
    for job in jobs:
        if not job.aborted:
            known.note({"add": entry_of(job.request, job.number)})
    kept = Kept(path, known, anew=True)
    try:
        kept.save(core, asked)
    finally:
        kept.close()


def facts_of(asked: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for an engine to go on where another one stopped."""
    return {**asked, "threads": torch.get_num_threads(), "noise_stream": versions()["noise_stream"]}


@dataclass(frozen=True)
class Found:
    """What the two files say."""

    path: Path
    known: Known
    requests: dict[int, Request]
    """That had not ended, by number, in their order."""
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """Empty where there is a journal only."""

    def jobs(self, make: Callable[[Request, int], Job]) -> dict[int, Job]:
        """Of the requests, by number. Raises OptionError for one that this engine cannot run."""
        jobs: dict[int, Job] = {}
        for number, request in self.requests.items():
            try:
                jobs[number] = make(request, number)
            except FlowfastError as error:
                raise OptionError(f"cannot restore from {self.path}: request {request.id!r}: {error}") from None
        return jobs

    def put_back(self, core: EngineCore, jobs: dict[int, Job], asked: dict[str, Any]) -> set[int]:
        """Puts what ran and has not ended back into its slots; the numbers. Raises OptionError where it is of another
        engine."""
        if not self.facts or not jobs:
            return set()
        try:
            same, before = facts_of(asked), self.facts["same"]
            other = [name for name in same if before[name] != same[name]]
            if other:
                had, has = ({name: of[name] for name in other} for of in (before, same))
                raise ValueError(f"it is of an engine with {had}, this one has {has}")
            running: dict[int, Job] = {}
            for number, held_job in self.facts["running"].items():
                job = jobs.get(int(number))
                if job is None:
                    continue
                if held_job["kind"] != repr(job.kind):
                    raise ValueError(f"request {job.request.id!r} means something else to this model and these rewards")
                job.cuts = [(cut[0], cut[1]) for cut in held_job["cuts"]]
                job.splits = [(split[0], split[1]) for split in held_job["splits"]]
                running[job.number] = job
            core.last_micro_batch = self.facts["micro_batch"]
            restore(core, self.tensors, self.facts, running)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise refused(self.path, str(error), len(self.requests)) from None
        return set(running)


def read(path: Path) -> Found:
    """Both files. Raises OptionError: one of them is damaged, or they are not of one engine."""
    known = read_journal(journal_path(path))
    try:
        requests = {number: request_of(entry) for number, entry in known.live.items()}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise OptionError(f"cannot restore from {journal_path(path)}: {error}") from None
    if not path.exists():
        return Found(path, known, requests, {}, {})
    try:
        with path.open("rb") as file:
            facts, tensors = unpacked(file, FORMAT)
        if facts.get("name") != NAME:
            raise ValueError("it is no snapshot of an engine")
        if facts["engine"] != known.engine:
            raise ValueError("it is of another engine than the journal beside it")
    except OSError as error:
        raise refused(path, error.strerror or str(error), len(requests)) from None
    except (ValueError, SafetensorError) as error:
        raise refused(path, str(error), len(requests)) from None
    if facts["entries"] > known.entries:
        raise OptionError(
            f"cannot restore from {journal_path(path)}: it is cut off or of an earlier time, for it has "
            f"{known.entries} entries and the snapshot beside it was made after {facts['entries']}; the journal knows "
            f"{len(requests)} requests that had not ended: remove the snapshot, and they start anew"
        )
    return Found(path, known, requests, tensors, facts)


def refused(path: Path, why: str, requests: int) -> OptionError:
    return OptionError(
        f"cannot restore from {path}: {why}; the journal beside it is intact and knows {requests} requests that had "
        "not ended: remove the snapshot, and they start anew"
    )


def journal_path(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def entry_of(request: Request, number: int) -> dict[str, Any]:
    """A request for the journal: rewards are known by name, latents are numbers."""
    prompt = request.prompt.as_entry() if isinstance(request.prompt, Prompt) else request.prompt
    latents = None if request.latents is None else request.latents.float().cpu()
    return {
        "number": number,
        "id": request.id,
        "prompt": prompt,
        "params": plain(request.params.model_dump(exclude_defaults=True)),
        "reward": request.reward,
        "picked": None if request.picked is None else request.picked.model_dump(),
        "latents": None if latents is None else [list(latents.shape), latents.flatten().tolist()],
        "priority": request.priority,
        "deadline": request.deadline,
        "candidates": request.candidates,
    }


def request_of(entry: dict[str, Any]) -> Request:
    latents = entry["latents"]
    if latents is not None:
        latents = torch.tensor(latents[1], dtype=torch.float32, device="cpu").view(latents[0])
    return Request(
        id=str(entry["id"]),
        prompt=prompt_of(entry["prompt"], "the journal"),
        params=make(SearchParams, entry["params"]),
        reward=str(entry["reward"]),
        picked=None if entry.get("picked") is None else make(Picked, entry["picked"]),
        latents=latents,
        priority=int(entry["priority"]),
        deadline=entry["deadline"],
        candidates=bool(entry.get("candidates", False)),
    )
