"""Searches that outlive the request that began them: POST /v1/searches, and who asks for them later."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from flowfast.engine.request import Event, Found, Partial, Progress
from flowfast.serve import pictures
from flowfast.serve.engines import Restarted
from flowfast.serve.errors import ApiError, fault
from flowfast.serve.points import LETTERS, Points
from flowfast.serve.searches import Asked, Searches, all_of, answer_of, number

log = logging.getLogger("flowfast.serve")
KEEP_SECONDS = 600.0
"""How long a result can be asked for."""
MOST_RECORDS = 1024
MOST_KEPT = 2**29
"""Bytes of pictures of all results; the oldest go first."""
LOOKS = 8
"""Small pictures on the way of a search."""
LARGEST_SIDE = 256
STEPS = 50
"""Progress is told so many times a search at most."""


class Record:
    """One POST /v1/searches; a `Watcher` of its n searches."""

    looks = LOOKS

    def __init__(self, asked: Asked):
        self.id, self.asked, self.created = uuid.uuid4().hex, asked, time.time()
        self.status = "queued"
        """queued, running, finished, failed or aborted."""
        self.ended: float | None = None
        self.answer: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.spent: Counter[int] = Counter()
        self.told: Counter[int] = Counter()
        self.best: dict[int, float] = {}
        self.points = Points() if asked.params.get("candidates") else None
        self.task: asyncio.Task[None] | None = None
        self.size = 0
        """Letters of its pictures and candidates."""
        self.tell("queued")

    @property
    def content(self) -> dict[str, Any]:
        """What GET answers."""
        best = max(self.best.values(), default=None)
        return {
            "id": self.id, "object": "search", "status": self.status, "created_at": int(self.created),
            "expires_at": None if self.ended is None else int(self.ended + KEEP_SECONDS),
            "budget": self.asked.params["budget"] * self.asked.request.n, "nfe": self.spent.total(),
            "best_reward": number(best), "result": self.answer, "error": self.error,
        }  # fmt: skip

    def tell(self, kind: str, **facts: Any) -> None:
        self.events.append({"type": f"search.{kind}", "id": self.id, **facts})
        self.size += len(facts.get("b64_json", "")) + LETTERS * len(facts.get("candidates", ()))
        self.news.set()
        self.news = asyncio.Event()

    async def hear(self, index: int, event: Event) -> None:
        self.status = "running"
        budget = self.asked.params["budget"]
        if isinstance(event, Restarted):
            self.spent.pop(index, None)
            self.told.pop(index, None)
            self.best.pop(index, None)
            if self.points is not None:
                self.points.restart(index)
            self.tell("restarted", index=index, times=event.times)
        elif isinstance(event, Found):
            self.best[index] = event.reward
            self.tell("found", index=index, nfe=event.nfe, budget=budget, reward=number(event.reward))
        elif isinstance(event, Partial):
            text = await asyncio.to_thread(pictures.small, event.image, LARGEST_SIDE)
            self._progress(index, event.nfe, b64_json=text)
        elif isinstance(event, Progress):
            self.spent[index] = event.nfe
            if self.points is not None:
                self.points.add(index, event.nfe, event.candidates)
            if event.nfe * STEPS // budget > self.told[index]:
                self.told[index] = event.nfe * STEPS // budget
                self._progress(index, event.nfe)

    def _progress(self, index: int, nfe: int, **more: Any) -> None:
        if self.points is not None:
            more["candidates"] = self.points.take(index)
        best = number(self.best.get(index))
        self.tell("progress", index=index, nfe=nfe, budget=self.asked.params["budget"], best_reward=best, **more)

    def done(self, index: int, entries: list[dict[str, Any]]) -> None:
        best = entries[0]["flowfast"]
        self.spent[index] = best["nfe"]
        if best["reward"] is not None:
            self.best[index] = best["reward"]
        self.size += sum(len(entry["b64_json"]) for entry in entries)
        if self.points is not None and self.points.waiting(index):
            self._progress(index, best["nfe"])
        self.tell("finished", index=index, data=[entry["flowfast"] for entry in entries])

    async def run(self, searches: Searches) -> None:
        """To its end, whatever that is."""
        try:
            self.answer = answer_of(self.asked, await all_of(searches, self.asked, self))
            self.end("finished")
        except asyncio.CancelledError:
            self.end("aborted")
        except ApiError as error:
            self.error = error.content["error"]
            self.end("failed")
        except Exception:
            log.exception("a search failed")
            self.error = fault().content["error"]
            self.end("failed")

    def end(self, status: str) -> None:
        if self.ended is not None:
            return
        self.status, self.ended = status, time.time()
        self.tell("ended", status=status, error=self.error)
        seconds, n = round(self.ended - self.created, 4), self.asked.request.n
        facts = {"search": self.id, "status": status, "n": n, "nfe": self.spent.total(), "seconds": seconds}
        log.info(json.dumps(facts))

    async def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """All of its events, from the first one on, until it has ended."""
        at = 0
        while True:
            news = self.news
            while at < len(self.events):
                at += 1
                yield self.events[at - 1]
            if self.ended is not None and at == len(self.events):
                return
            if news is self.news:
                await news.wait()


class Records:
    """Those that run, and those that have ended and are kept for a while."""

    def __init__(self) -> None:
        self._by_id: dict[str, Record] = {}

    def begin(self, searches: Searches, asked: Asked) -> Record:
        """Raises ApiError where there is no room for it."""
        self.sweep(coming=1)
        record = Record(asked)
        held = searches.gate.held(asked.request.n)
        held.__enter__()
        record.task = asyncio.ensure_future(record.run(searches))
        record.task.add_done_callback(lambda _: held.__exit__(None, None, None))
        self._by_id[record.id] = record
        return record

    def find(self, id: str) -> Record:
        """Raises ApiError."""
        self.sweep()
        if id not in self._by_id:
            kept = f"results are kept for {KEEP_SECONDS:g} s"
            raise ApiError(404, f"there is no search {id[:40]!r}: {kept}", "search_not_found", "id")
        return self._by_id[id]

    async def drop(self, id: str) -> Record:
        """Aborts it where it runs, and forgets it. Raises ApiError."""
        record = self.find(id)
        assert record.task is not None
        record.task.cancel()
        await asyncio.wait([record.task])
        record.end("aborted")  # where it had not begun
        self._by_id.pop(id, None)
        return record

    def sweep(self, coming: int = 0) -> None:
        """Forgets what is too old, and the oldest results where there are too many beside those that come."""
        over = [record for record in self._by_id.values() if record.ended is not None]
        over.sort(key=lambda record: record.ended or 0.0)
        kept = sum(record.size for record in over)
        for record in over:
            late = time.time() - (record.ended or 0.0) > KEEP_SECONDS
            if late or kept > MOST_KEPT or len(self._by_id) + coming > MOST_RECORDS:
                del self._by_id[record.id]
                kept -= record.size

    async def end(self) -> None:
        """Those that still run are taken back."""
        tasks = [record.task for record in self._by_id.values() if record.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
