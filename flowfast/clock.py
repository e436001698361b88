"""Clocks of a search: seconds by part of a round, and how much of a budget in seconds is left."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


def now() -> float:
    """Seconds of the host's clock."""
    return time.perf_counter()


class Clock:
    """Seconds by part of a round. On CUDA by events, read once at the end, so that no round waits for its clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.seconds = dict.fromkeys(("model", "decode", "reward", "search"), 0.0)

    def mark(self, part: str = "") -> None:
        """What ran since the last mark was `part`; "" starts anew."""
        at: Any = torch.cuda.Event(enable_timing=True) if self.cuda else now()
        if self.cuda:
            at.record()
            self.marks.append((part, at))
            return
        if part:
            self.seconds[part] += at - self.marks[-1][1]
        self.marks = [(part, at)]

    def read(self) -> dict[str, float]:
        """Seconds so far; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            for (_, before), (part, at) in zip(self.marks[:-1], self.marks[1:], strict=True):
                if part:
                    self.seconds[part] += before.elapsed_time(at) / 1000
            self.marks = self.marks[-1:]
        return dict(self.seconds)


class Deadline:
    """How much time of a budget in seconds is left, and what a micro-batch takes at the pace of the last rounds."""

    def __init__(self, seconds: float, pace: float):
        self.seconds, self.pace, self.round_seconds = seconds, pace, 0.0
        self.recent: deque[tuple[float, int]] = deque(maxlen=8)

    def start(self, begun: float, device: torch.device) -> None:
        self.begun = self.last = begun
        self.events: deque[Any] | None = deque() if device.type == "cuda" else None

    def tick(self, batches: int) -> None:
        """A round of so many micro-batches was sent off. On CUDA at most two rounds are under way, so that the host's
        clock tells what the device has done."""
        if self.events is not None:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.popleft().synchronize()
        at = now()
        self.recent.append((at - self.last, batches))
        self.last = at
        self.pace = sum(seconds for seconds, _ in self.recent) / sum(count for _, count in self.recent)
        self.round_seconds = self.pace * batches

    def restart(self) -> None:
        """Micro-batches have another size from here on: the pace is that of the rounds to come."""
        self.recent.clear()
        self.last = now()

    def left(self) -> float:
        return self.begun + self.seconds - self.last
