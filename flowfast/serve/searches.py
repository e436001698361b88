"""One request of a client: n searches on the engine, their pictures, and what is told of each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from flowfast.config import Rerun
from flowfast.engine.async_engine import AsyncEngine
from flowfast.engine.request import Failed, Finished, Found, Partial
from flowfast.errors import EngineDeadError, FlowfastError
from flowfast.serve import pictures
from flowfast.serve.errors import ApiError, failed, not_taken_on
from flowfast.serve.gate import Gate
from flowfast.serve.metrics import Metrics
from flowfast.serve.schema import ImagesRequest
from flowfast.types import Ranked

Told = Callable[[dict[str, Any]], None]
"""Takes an event of the stream."""


@dataclass(frozen=True)
class Searches:
    """What all requests of a server have in common."""

    engine: AsyncEngine
    gate: Gate
    metrics: Metrics


@dataclass(frozen=True)
class Asked:
    """A request whose fields are checked. quality, size: as its answer has them; params: for the engine."""

    request: ImagesRequest
    params: dict[str, Any]
    quality: str


async def all_of(searches: Searches, asked: Asked, tell: Told | None = None) -> list[dict[str, Any]]:
    """The pictures of the n searches, in order; each is told as it is done. Raises ApiError for the first one that
    fails, and takes the others back."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one_of(searches, asked, index, tell)) for index in range(asked.request.n)]
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    return [entry for task in tasks for entry in task.result()]


def first_of(errors: BaseExceptionGroup[Any]) -> BaseException:
    first = errors.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


async def one_of(searches: Searches, asked: Asked, index: int, tell: Told | None) -> list[dict[str, Any]]:
    """The entries of one search in the answer, the best first."""
    request, metrics, begun = asked.request, searches.metrics, time.monotonic()
    best, sent = None, 0
    looks = 0 if tell is None else request.partial_images
    options = {**asked.params, "repeat": request.repeat + index, "looks": looks}
    try:
        async with aclosing(searches.engine.generate(request.prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Found):
                    best = event.reward
                if isinstance(event, Partial) and tell is not None:
                    tell(await partial_image(asked, index, sent, event, best))
                    if sent == 0:
                        metrics.first_partial(time.monotonic() - begun)
                    sent += 1
                if isinstance(event, Failed):
                    searches.gate.ended()
                    metrics.failed(event.reason)
                    raise failed(event, searches.gate.seconds())
                if isinstance(event, Finished):
                    searches.gate.ended()
                    return await entries(searches, asked, index, event, tell)
    except FlowfastError as error:
        metrics.failed("closed" if isinstance(error, EngineDeadError) else "refused")
        raise not_taken_on(error) from None
    except asyncio.CancelledError:
        metrics.failed("aborted")
        raise
    raise AssertionError("the last event of a request is Finished or Failed")


async def entries(
    searches: Searches, asked: Asked, index: int, event: Finished, tell: Told | None
) -> list[dict[str, Any]]:
    """Encodes what a search has found, tells and returns it."""
    stopped, found = why_stopped(asked.request.until, event), []
    searches.metrics.finished(event, stopped)
    request = asked.request
    for rank, ranked in enumerate(event.sample.top):
        form = (request.output_format, request.output_compression)
        entry = {"b64_json": await asyncio.to_thread(pictures.as_text, ranked.image, *form)}
        facts = facts_of(event, ranked, stopped) | {"index": index, "rank": rank, "repeat": request.repeat + index}
        found.append(entry | {"flowfast": facts, "size": pictures.size_of(ranked.image)})
        if tell is not None:
            usage = usage_of([event.sample.nfe])
            tell(told("image_generation.completed", asked, found[-1]) | {"usage": usage})
    return found


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


def told(kind: str, asked: Asked, entry: dict[str, Any]) -> dict[str, Any]:
    """An event of the stream."""
    return {
        "type": kind, "created_at": int(time.time()), "quality": asked.quality, "background": "opaque",
        "output_format": asked.request.output_format, **entry,
    }  # fmt: skip


async def partial_image(asked: Asked, index: int, number_of: int, event: Partial, best: float | None) -> dict[str, Any]:
    """The event of a picture on the way."""
    request = asked.request
    form = (request.output_format, request.output_compression)
    text = await asyncio.to_thread(pictures.as_text, event.image, *form)
    facts = {"index": index, "nfe": event.nfe, "budget": asked.params["budget"], "best_reward": number(best)}
    entry = {"b64_json": text, "size": pictures.size_of(event.image), "partial_image_index": number_of}
    return told("image_generation.partial_image", asked, entry | {"flowfast": facts})


async def streamed(work: Callable[[Told], Awaitable[Any]]) -> AsyncGenerator[dict[str, Any], None]:
    """What `work` tells, as it tells it. Raises what it raises; it is cancelled where nobody asks for more."""
    events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def whole() -> None:
        try:
            await work(events.put_nowait)
        finally:
            events.put_nowait(None)

    task = asyncio.ensure_future(whole())
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, ApiError):
            await task
