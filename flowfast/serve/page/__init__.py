"""The page at /: four files as they stand here, which ask nothing of any other server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
}
"""By path: file and media type."""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """It needs no key, for it tells nothing; what it asks for does."""
    for path, (name, kind) in FILES.items():
        app.router.add_route(path, answer_with(Path(__file__).with_name(name), kind), include_in_schema=False)


def answer_with(file: Path, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, headers=HEADERS | {"content-type": kind})

    return answer
