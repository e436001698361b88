"""A client that reads nothing of its answer is let go; one that reads slowly is not."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
import uvicorn

from flowfast.rewards import server as servers
from tests.serve.conftest import in_time

PATIENCE, PIECE, PIECES = 0.4, b"x" * 2**16, 400


@pytest.mark.parametrize("reads", [False, True])
def test_who_reads_nothing_is_let_go(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PATIENCE", PATIENCE)
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """An answer of 25 MiB, more than the kernel keeps for anybody."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.ensure_future(servers.disconnect(receive))
        for _ in range(PIECES):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            if left.done():
                return ended.append("left")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        ended.append("whole")

    async def work() -> None:
        place = servers.listen("127.0.0.1", 0)
        server = uvicorn.Server(servers.config_of(app, lifespan="off"))
        serving = asyncio.ensure_future(server.serve(sockets=[place]))
        with socket.create_connection(place.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            if reads:
                await asyncio.to_thread(read_slowly, client)
            while not ended:
                await asyncio.sleep(0.01)
        server.should_exit = True
        await serving

    in_time(work)
    assert ended == (["whole"] if reads else ["left"])


def read_slowly(client: socket.socket) -> None:
    """All of it, with pauses that add up to much more than PATIENCE."""
    read, until = 0, len(PIECE) * PIECES
    while read < until:
        read += len(client.recv(2**20))
        time.sleep(PATIENCE / 10)
