"""The state of a long-lived engine on disk: a sealed file with what runs, and beside it a journal of its requests, in
which also those stand that wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowfast.config import SearchParams, make
from flowfast.engine import clock
from flowfast.engine.checkpoint import packed, unpacked
from flowfast.engine.core import EngineCore
from flowfast.engine.held import held, restore
from flowfast.engine.journal import Journal, read_journal
from flowfast.engine.request import Job, Request
from flowfast.errors import OptionError
from flowfast.files import locked_file, plain, write_bytes
from flowfast.prompts import Prompt, prompt_of

NAME = "flowfast-engine"
FORMAT = 1


class Kept:
    """The two files of an engine, which are its own until it is closed."""

    def __init__(self, path: Path, requests: list[Request]):
        """requests: those that have not ended. Raises OutputError: the place cannot be written, or is another's."""
        self.path, self.saved = path, clock.now()
        self._lock = locked_file(path)
        self._lock.__enter__()
        self._journal = Journal(journal_path(path), {request.id: entry_of(request) for request in requests})

    def add(self, request: Request) -> None:
        self._journal.add(entry_of(request))

    def end(self, ids: list[str]) -> None:
        """These have ended, and their caller knows."""
        self._journal.end(*ids)

    def save(self, core: EngineCore) -> None:
        tensors, facts = held(core)
        running = {
            str(job.number): {"id": job.request.id, "cuts": job.cuts, "splits": job.splits}
            for *_, job in core.scheduler.running()
        }
        facts |= {"format": FORMAT, "kind": NAME, "running": running, "threads": torch.get_num_threads()}
        write_bytes(self.path, packed(facts, tensors))
        self.saved = clock.now()

    def close(self) -> None:
        self._lock.__exit__(None, None, None)


@dataclass(frozen=True)
class Found:
    """What the two files say."""

    path: Path
    requests: list[Request]
    """That had not ended, in their order."""
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """Empty where there is a journal only."""

    def put_back(self, core: EngineCore, jobs: dict[str, Job]) -> set[str]:
        """Puts what ran back into its slots; the ids. Raises OptionError where it is of another engine."""
        if not self.facts or not jobs:
            return set()
        try:
            same = {"micro_batch": core.last_micro_batch, "threads": torch.get_num_threads()}
            other = {name: self.facts[name] for name in same if self.facts[name] != same[name]}
            if other:
                raise ValueError(f"it is of an engine with {other}, this one has {same}")
            running: dict[int, Job] = {}
            for number, known in self.facts["running"].items():
                job = jobs.get(known["id"])
                if job is not None:
                    job.cuts = [(cut[0], cut[1]) for cut in known["cuts"]]
                    job.splits = [(split[0], split[1]) for split in known["splits"]]
                    running[int(number)] = job
            restore(core, self.tensors, self.facts, running)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise refused(self.path, str(error), len(self.requests)) from None
        return {job.request.id for job in running.values()}


def read(path: Path) -> Found:
    """Both files. Raises OptionError: one of them is damaged, or none."""
    entries = read_journal(journal_path(path))
    try:
        requests = [request_of(entry) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise OptionError(f"cannot restore from {journal_path(path)}: {error}") from None
    if not path.exists():
        return Found(path, requests, {}, {})
    try:
        with path.open("rb") as file:
            facts, tensors = unpacked(file, FORMAT)
        if facts.get("kind") != NAME:
            raise ValueError("it is no snapshot of an engine")
    except OSError as error:
        raise refused(path, error.strerror or str(error), len(requests)) from None
    except (ValueError, SafetensorError) as error:
        raise refused(path, str(error), len(requests)) from None
    return Found(path, requests, tensors, facts)


def refused(path: Path, why: str, requests: int) -> OptionError:
    return OptionError(
        f"cannot restore from {path}: {why}; the journal beside it is intact and knows {requests} requests that had "
        "not ended: remove the snapshot, and they start anew"
    )


def journal_path(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def entry_of(request: Request) -> dict[str, Any]:
    """A request for the journal: rewards are known by name, latents are numbers."""
    prompt = request.prompt.as_entry() if isinstance(request.prompt, Prompt) else request.prompt
    latents = None if request.latents is None else request.latents.float().cpu()
    return {
        "id": request.id,
        "prompt": prompt,
        "params": plain(request.params.model_dump(exclude_defaults=True)),
        "reward": request.reward,
        "latents": None if latents is None else [list(latents.shape), latents.flatten().tolist()],
        "priority": request.priority,
        "deadline": request.deadline,
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
        latents=latents,
        priority=int(entry["priority"]),
        deadline=entry["deadline"],
    )
