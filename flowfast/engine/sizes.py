"""Engines for several sizes of pictures on one model, which take turns on its device."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from flowfast.engine.async_engine import AsyncEngine
from flowfast.engine.engine import Engine
from flowfast.models.named import load_sizes


class Turns:
    """A lock that whoever waits longest gets next."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._news = threading.Condition()

    def __enter__(self) -> None:
        mine = object()
        with self._news:
            self._waiting.append(mine)
            self._news.wait_for(lambda: self._waiting[0] is mine)

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._waiting.popleft()
            self._news.notify_all()


def engines_of_sizes(model: Any, reward: Any, sizes: tuple[str, ...], **options: Any) -> dict[str, AsyncEngine]:
    """An engine for each size, "512x768", of a model by name, or of flows by size. They share weights, rewards and the
    memory for batches; rounds of those that have work take turns. A reward on the host is called within a turn, never
    twice at once. Raises what `Engine` raises."""
    if isinstance(model, str):
        flows = dict(zip(sizes, load_sizes(model, sizes, **options.pop("model_options", {})), strict=True))
    else:
        flows = model
    options |= {"overlap": False, "memory_share": options.get("memory_share", 0.5) / len(sizes)}
    turns, engines = Turns(), dict[str, Engine]()
    for size in sizes:
        engines[size] = Engine(flows[size], reward, **options)
        reward = engines[size].loaded.scorers
    return {size: AsyncEngine(engine=engine, turn=turns) for size, engine in engines.items()}
