"""How many pictures may run and wait, and when one that was turned away may try again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flowfast.serve.errors import MOST_SECONDS, unavailable


class Gate:
    """Refuses at once, without a word to the engine, which answers between two rounds."""

    def __init__(self, most: int, refused: Callable[[int], None] = lambda pictures: None):
        """refused: hears of pictures that had no room."""
        self.most, self.inside, self.refused = most, 0, refused
        self._ends: deque[float] = deque(maxlen=32)

    @contextmanager
    def held(self, pictures: int) -> Iterator[None]:
        """Room for so many. Raises ApiError."""
        if self.inside + pictures > self.most:
            self.refused(pictures)
            seconds = self.seconds(self.inside + pictures - self.most)
            full = f"{self.inside} pictures run or wait, of at most {self.most}: try again in {seconds} s"
            raise unavailable(full, "queue_full", seconds)
        self.inside += pictures
        try:
            yield
        finally:
            self.inside -= pictures

    def ended(self) -> None:
        """One picture is done."""
        self._ends.append(time.monotonic())

    def seconds(self, pictures: int = 1) -> int:
        """After which so many more will be done, at the pace of the last ones."""
        if len(self._ends) < 2:
            return 1
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(1, min(MOST_SECONDS, math.ceil(pace * pictures)))
