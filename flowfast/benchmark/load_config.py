"""What `flowfast bench serve` asks of a server, and how fast."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from flowfast.bounds import MOST_ROWS, Whole, Within
from flowfast.config import MOST_SECONDS, Config
from flowfast.errors import OptionError

MOST_REQUESTS = 1_000_000
OWN_FIELDS = ("prompt", "seed", "stream", "partial_images")
"""Of a body: they have options of their own."""
Goal = Literal["e2e", "queue", "partial"]


class LoadConfig(Config):
    """What is asked of a server, and how fast."""

    url: str = "http://127.0.0.1:8000"
    """Of the server."""
    request_rate: Annotated[float, Within(0, math.inf, above=True)] = math.inf
    """Requests a second, which come at random (Poisson); inf: all of them at once."""
    max_concurrency: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Requests under way at most: one more is sent as one ends."""
    num_prompts: Annotated[int, Within(1, MOST_REQUESTS)] = 64
    """Requests; a shorter list begins again."""
    stream: Annotated[float, Within(0, 1)] = 0.0
    """Share of the requests that stream."""
    partial_images: Annotated[int, Within(0, 3)] = 1
    """Of each request that streams."""
    seed: Annotated[int, Whole()] = 0
    """Of arrivals, of who streams, and of the first request: each has the next one."""
    timeout: Annotated[float, Within(0, MOST_SECONDS, above=True)] = 600.0
    """Seconds that an answer may take."""
    goodput: dict[Goal, Annotated[float, Within(0, 1000 * MOST_SECONDS, above=True)]] = {}
    """Milliseconds within which a good request has its picture (e2e), a slot (queue), and, where it streams, its first
    partial image (partial)."""
    extra_body: dict[str, Any] = {}
    """Other fields of each request."""

    @property
    def server(self) -> str:
        """The address without a path. Raises OptionError."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            got = "one with a login" if "@" in self.url else repr(self.url[:80])
            raise OptionError(
                f"--url: expected http://HOST:PORT, got {got}: a key belongs in FLOWFAST_API_KEY, a path nowhere"
            )
        if parts.path.rstrip("/") not in ("", "/v1") or parts.query:
            raise OptionError(f"--url: expected http://HOST:PORT without a path, got {self.url!r:.80}")
        return f"{parts.scheme}://{parts.netloc}"

    def check(self) -> None:
        """Raises OptionError."""
        named = [name for name in OWN_FIELDS if name in self.extra_body]
        if named:
            raise OptionError(f"--extra-body: {named[0]!r} has an option of its own: leave it out there")
        self.server  # noqa: B018  (raises)

    def requests(self, prompts: Sequence[str]) -> list[tuple[float, dict[str, Any]]]:
        """(second at which it is due, body) of each: the same for the same seed."""
        arrivals, kinds = random.Random(f"arrivals {self.seed}"), random.Random(f"kinds {self.seed}")
        due, found = 0.0, []
        for at, prompt in enumerate(itertools.islice(itertools.cycle(prompts), self.num_prompts)):
            body: dict[str, Any] = {**self.extra_body, "prompt": prompt, "seed": self.seed + at}
            if kinds.random() < self.stream:
                body |= {"stream": True, "partial_images": self.partial_images}
            found.append((due, body))
            due += 0.0 if math.isinf(self.request_rate) else arrivals.expovariate(self.request_rate)
        return found
