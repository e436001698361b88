"""No text of a request is opened as a file or a URL, whatever field it stands in."""

from __future__ import annotations

import sys
from typing import Any

from flowfast.serve.schema import SearchRequest
from tests.serve.conftest import PATH, SEARCH, served

BAIT = ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/bait", "../../bait", "bait.safetensors", "@bait.txt")
WATCHED = ("open", "os.listdir", "os.scandir", "os.stat", "socket.connect", "socket.getaddrinfo", "subprocess.Popen")
SEEN: list[str] = []
WATCHING = [False]


def hook(event: str, args: tuple[Any, ...]) -> None:
    if WATCHING[0] and event in WATCHED and any(word in repr(args) for word in ("passwd", "bait", "127.0.0.1")):
        SEEN.append(f"{event} {args!r:.200}")


sys.addaudithook(hook)  # there is no way to take one off


def test_nothing_of_a_request_is_opened() -> None:
    with served(key="key") as (client, _):
        head = {"authorization": "Bearer key"}
        WATCHING[0] = True
        try:
            for bait in BAIT:
                for name in SearchRequest.model_fields:
                    for path in (PATH, "/v1/searches"):
                        answer = client.post(path, json={"prompt": "a", **SEARCH, name: bait}, headers=head)
                        assert answer.status_code < 500
                for call in (client.get, client.delete):
                    call(f"/v1/searches/{bait}", headers=head)
                client.get(f"/{bait}", headers={**head, "x-request-id": bait})
                client.post("/v1/images/edits", content=bait, headers=head)
        finally:
            WATCHING[0] = False
    assert SEEN == []


def test_the_hook_sees() -> None:
    WATCHING[0] = True
    try:
        open("/etc/passwd").close()
    finally:
        WATCHING[0] = False
    assert SEEN and SEEN.pop().startswith("open")
    SEEN.clear()
