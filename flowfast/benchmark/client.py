"""A client of a server with OpenAI's images API, and what it saw of each request."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from flowfast.engine import clock
from flowfast.errors import OptionError

try:
    import aiohttp
except ImportError as error:
    raise OptionError(f"`flowfast bench serve` needs {error.name}: pip install 'flowfast[serve]'") from None

PATH = "/v1/images/generations"
OK, CONNECTION, TIMEOUT, BAD = "ok", "connection", "timeout", "bad_answer"
"""How a request ended; else the code of the server's error: queue_full, deadline, invalid_value, ..."""
LONGEST = 300
ASK_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """How one request ended. Seconds are from when it was sent."""

    kind: str
    seconds: float
    sent: float = 0.0
    """Seconds after the first one."""
    late: float = 0.0
    """Seconds that it was sent after it was due."""
    partial: float | None = None
    """Until the first partial image; None: there was none."""
    queue: float | None = None
    """Until the last of its pictures had a slot, as the server says."""
    images: int = 0
    nfe: int = 0
    status: int = 0
    message: str = ""
    """Of an error."""


class Client:
    """Asks one server, over as many connections as there are requests under way.

    Args:
        url: of the server, without a path. key: sent as Authorization: Bearer. seconds: that an answer may take.
    """

    def __init__(self, url: str, key: str | None = None, seconds: float = 600.0):
        self.url, self.seconds = url, seconds
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        self.session = aiohttp.ClientSession(self.url, headers=self.headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def ask(self, body: dict[str, Any], id: str | None = None) -> Answer:
        """Sends a request and reads its answer to the end; whatever goes wrong is a kind of answer. id: of the request
        in the server's log."""
        begun, kind, why = clock.now(), CONNECTION, ""
        headers = {} if id is None else {"X-Request-Id": id}
        try:
            asking = self.session.post(PATH, json=body, headers=headers)
            async with asyncio.timeout(self.seconds), asking as response:
                if response.status != 200:
                    return refusal(response.status, await response.read(), clock.now() - begun)
                if response.content_type == "text/event-stream":
                    return await streamed(response.content.iter_any(), begun)
                found = json.loads(await response.read())
                return pictures(found["data"], clock.now() - begun)
        except TimeoutError:
            kind, why = TIMEOUT, f"no whole answer in {self.seconds:g} s"
        except (aiohttp.ClientError, OSError) as error:
            why = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            kind, why = BAD, f"{type(error).__name__}: {error}"
        return Answer(kind, clock.now() - begun, message=why[:LONGEST])

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text. Raises OptionError where no server answers."""
        try:
            async with asyncio.timeout(ASK_SECONDS), self.session.get(path) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            why = f"{type(error).__name__}: {error}"[:LONGEST]
            raise OptionError(
                f"no server answers at {self.url} ({why}): start `flowfast serve`, or give --url"
            ) from None

    async def metrics(self) -> dict[str, float]:
        """Numbers of GET /metrics by name and labels; {}: the server has none."""
        status, text = await self.get("/metrics")
        return numbers_of(text) if status == 200 else {}


def pictures(entries: list[dict[str, Any]], seconds: float, partial: float | None = None) -> Answer:
    """The answer that has these pictures. Servers that are not flowfast's say no NFE and no queue."""
    if not entries or not all(entry.get("b64_json") for entry in entries):
        raise ValueError("an answer without a picture")
    facts = [entry.get("flowfast", {}) for entry in entries]
    nfe = sum(each.get("nfe", 0) for each in facts if each.get("rank", 0) == 0)
    waited = [each["queue_s"] for each in facts if "queue_s" in each]
    return Answer(
        OK, seconds, partial=partial, queue=max(waited, default=None), images=len(entries), nfe=nfe, status=200
    )


async def streamed(chunks: AsyncIterator[bytes], begun: float) -> Answer:
    """The answer that came as server-sent events."""
    partial, entries = None, list[dict[str, Any]]()
    async for event in events_of(chunks):
        if event["type"] == "error":
            return refusal(200, json.dumps(event).encode(), clock.now() - begun)
        if event["type"].endswith(".partial_image") and partial is None:
            partial = clock.now() - begun
        if event["type"].endswith(".completed"):
            entries.append(event)
    return pictures(entries, clock.now() - begun, partial)


async def events_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, however the stream is cut into chunks. Raises ValueError for what is no JSON, and
    where the stream ends within an event."""
    held, looked = bytearray(), 0
    async for chunk in chunks:
        held += chunk
        while (end := held.find(b"\n\n", looked)) >= 0:
            lines = bytes(held[:end]).split(b"\n")
            del held[: end + 2]
            looked = 0
            data = b"".join(line[5:] for line in lines if line.startswith(b"data:"))
            if data:
                yield json.loads(data)
        looked = max(0, len(held) - 1)
    if held.strip():
        raise ValueError("the stream ends within an event")


def refusal(status: int, body: bytes, seconds: float) -> Answer:
    """The answer that is an error: its kind is the code in OpenAI's form, else the status."""
    kind, message = f"http_{status}", body[:LONGEST].decode(errors="replace")
    try:
        error = json.loads(body)["error"]
        kind, message = str(error["code"] or kind), str(error["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return Answer(kind, seconds, status=status, message=message[:LONGEST])


def numbers_of(text: str) -> dict[str, float]:
    """Of the lines of Prometheus' format that say a finite number."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                found[name] = number
    return found
