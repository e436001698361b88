"""One request of a client: n searches on the engine, their pictures, and what is told of each."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from flowfast.config import Rerun
from flowfast.engine.request import Event, Failed, Finished
from flowfast.errors import EngineDeadError, FlowfastError
from flowfast.serve import pictures
from flowfast.serve.engines import Engines, Restarted
from flowfast.serve.errors import failed, not_taken_on
from flowfast.serve.gate import Gate
from flowfast.serve.metrics import Metrics
from flowfast.serve.schema import ImagesRequest
from flowfast.types import Ranked


class Watcher(Protocol):
    """Hears of the n searches of a request as they go on."""

    looks: int
    """Pictures that it wants on the way of each."""

    async def hear(self, index: int, event: Event) -> None:
        """An event of search number index that is not its last one."""

    def done(self, index: int, entries: list[dict[str, Any]]) -> None:
        """It has ended with these entries of the answer."""


@dataclass(frozen=True)
class Searches:
    """What all requests of a server have in common."""

    engine: Engines
    gate: Gate
    metrics: Metrics


@dataclass(frozen=True)
class Asked:
    """A request whose fields are checked. params: for the engine; quality: as its answer has it."""

    request: ImagesRequest
    params: dict[str, Any]
    quality: str


async def all_of(searches: Searches, asked: Asked, watcher: Watcher | None = None) -> list[dict[str, Any]]:
    """The pictures of the n searches, in order. Raises ApiError for the first one that fails, and takes the others
    back."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one_of(searches, asked, index, watcher)) for index in range(asked.request.n)]
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    return [entry for task in tasks for entry in task.result()]


def first_of(errors: BaseExceptionGroup[Any]) -> BaseException:
    first = errors.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


async def one_of(searches: Searches, asked: Asked, index: int, watcher: Watcher | None) -> list[dict[str, Any]]:
    """The entries of one search in the answer, the best first."""
    request, metrics = asked.request, searches.metrics
    options = {**asked.params, "repeat": request.repeat + index, "looks": 0 if watcher is None else watcher.looks}
    restarted = 0
    try:
        async with aclosing(searches.engine.generate(request.prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    metrics.failed(event.reason)
                    raise failed(event, searches.gate.seconds(), asked.params.get("deadline"))
                if isinstance(event, Finished):
                    searches.gate.ended()
                    found = await entries(searches, asked, index, event, restarted)
                    if watcher is not None:
                        watcher.done(index, found)
                    return found
                if isinstance(event, Restarted):
                    restarted = event.times
                if watcher is not None:
                    await watcher.hear(index, event)
    except FlowfastError as error:
        metrics.failed("closed" if isinstance(error, EngineDeadError) else "refused")
        raise not_taken_on(error) from None
    except asyncio.CancelledError:
        metrics.failed("aborted")
        raise
    raise AssertionError("the last event of a request is Finished or Failed")


async def entries(
    searches: Searches, asked: Asked, index: int, event: Finished, restarted: int
) -> list[dict[str, Any]]:
    """What a search has found, as the answer has it. restarted: so many engines died under it."""
    stopped, found, request = why_stopped(asked.request.until, event), [], asked.request
    searches.metrics.finished(event, stopped)
    for rank, ranked in enumerate(event.sample.top):
        form = (request.output_format, request.output_compression)
        entry = {"b64_json": await pictures.told(ranked.image, *form)}
        facts = facts_of(event, ranked, stopped) | {"index": index, "rank": rank, "repeat": request.repeat + index}
        facts |= {"restarted": restarted} if restarted else {}
        found.append(entry | {"flowfast": facts, "size": pictures.size_of(ranked.image)})
    return found


def answer_of(asked: Asked, found: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's answer of all entries."""
    data = [{name: entry[name] for name in ("b64_json", "flowfast")} for entry in found]
    return {
        "created": int(time.time()), "background": "opaque", "output_format": asked.request.output_format,
        "quality": asked.quality, "size": found[0]["size"], "data": data, "usage": usage_of(spent_on(found)),
    }  # fmt: skip


def spent_on(found: list[dict[str, Any]]) -> list[int]:
    """NFE of each of the n searches."""
    return [entry["flowfast"]["nfe"] for entry in found if entry["flowfast"]["rank"] == 0]


def facts_of(event: Finished, ranked: Ranked, stopped: str) -> dict[str, Any]:
    """The object `flowfast` of a picture: what it cost, and how to draw it again."""
    sample, winner = event.sample, ranked.winner
    return {
        "reward": number(ranked.reward),
        "nfe": sample.nfe,
        "budget": sample.budget_nfe,
        "reward_calls": sample.reward_calls,
        "method": sample.method,
        "seed": sample.seed,
        "winner": {
            "key": str(winner.key), "chain": winner.chain, "transition": winner.transition,
            "candidate": winner.candidate, "path": [list(step) for step in winner.path],
        },
        "micro_batch": event.micro_batch,
        "rerun": {} if event.rerun == Rerun() else event.rerun.model_dump(mode="json"),
        "stopped": stopped,
        "queue_s": round(event.waited, 6),
        "total_s": round(event.seconds, 6),
    }  # fmt: skip


def why_stopped(until: float | None, event: Finished) -> str:
    """until: its reward was reached; deadline: its budget was cut; budget: all of it was spent."""
    if until is not None and event.sample.reward >= until:
        return "until"
    return "deadline" if event.rerun.cuts else "budget"


def number(value: float | None) -> float | None:
    """As JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def usage_of(spent: list[int]) -> dict[str, Any]:
    """OpenAI's usage: an NFE is an output token."""
    nfe, none = sum(spent), {"image_tokens": 0, "text_tokens": 0}
    details = {"image_tokens": nfe, "text_tokens": 0}
    return {
        "input_tokens": 0, "input_tokens_details": none, "output_tokens": nfe, "output_tokens_details": details,
        "total_tokens": nfe,
    }  # fmt: skip
