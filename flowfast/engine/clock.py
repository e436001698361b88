"""Clocks of a search: seconds by part of a round."""

from __future__ import annotations

import time
from typing import Any

import torch


def now() -> float:
    """Seconds of the host's clock."""
    return time.perf_counter()


MOST_MARKS = 4096
"""Events of a device that are kept until they are read."""


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
            if len(self.marks) > MOST_MARKS and self.marks[MOST_MARKS // 2][1].query():
                self._fold(MOST_MARKS // 2)
            return
        if part:
            self.seconds[part] += at - self.marks[-1][1]
        self.marks = [(part, at)]

    def read(self) -> dict[str, float]:
        """Seconds so far; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            self._fold(len(self.marks) - 1)
        return dict(self.seconds)

    def _fold(self, count: int) -> None:
        """Adds up the first marks, which the device has passed."""
        for (_, before), (part, at) in zip(self.marks[:count], self.marks[1 : count + 1], strict=True):
            if part:
                self.seconds[part] += before.elapsed_time(at) / 1000
        self.marks = self.marks[max(count, 0) :]
