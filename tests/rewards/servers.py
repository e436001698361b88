"""Servers on a real socket that answer as a test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from flowfast.rewards.server import RewardServer


class Asked(NamedTuple):
    """A request."""

    path: str
    body: bytes
    headers: dict[str, str]
    """With names in lower case."""
    client: tuple[str, int]


@contextmanager
def running(server: RewardServer) -> Iterator[str]:
    """Its address, while it answers on a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def answering(
    answer: Callable[[int], tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | None], version: str = "HTTP/1.0"
) -> Iterator[tuple[str, list[Asked]]]:
    """A server that answers request i with answer(i), status, body and headers; None: cuts the line. Its address, and
    what it was asked."""
    got: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = version

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            got.append(Asked(self.path, body, headers, self.client_address))
            reply = answer(len(got) - 1)
            if reply is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(reply[0])
            extra: dict[str, str] = reply[2] if len(reply) == 3 else {}
            if version == "HTTP/1.1" and "Transfer-Encoding" not in extra:
                extra = {"Content-Length": str(len(reply[1])), **extra}
            for name, value in extra.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply[1])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
