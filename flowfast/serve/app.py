"""The application: which path answers what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from flowfast.serve.errors import ApiError
from flowfast.serve.left import ClientLeft, body_of, unless_left
from flowfast.serve.schema import ImagesRequest, check_offer, params_of, parse
from flowfast.serve.searches import Asked, Searches, Watcher, all_of, answer_of
from flowfast.serve.security import Front
from flowfast.serve.serving import Serving
from flowfast.serve.sse import EventStream, Stream
from flowfast.serve.streaming import Streaming, streamed
from flowfast.version import __version__

log = logging.getLogger("flowfast.serve")
HEAD_SECONDS = 1.0
"""How long a stream waits for its first event before it says 200: what goes wrong until then has a status."""
CLIENT_LEFT = 499
BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImagesRequest.model_json_schema()}}}
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
    for status, text in {
        400: "A field is wrong or unknown.", 401: "The key is missing or wrong.", 404: "No such model or search.",
        408: "The body did not come.", 411: "Its length is unknown.",
        413: "The body is too large.", 415: "The body is no JSON.",
        500: "The model, a reward or the engine failed.", 503: "Loading, draining, or full: Retry-After says when.",
    }.items()
}  # fmt: skip


def create_app(serving: Serving, key: str | None = None) -> FastAPI:
    """The application of a server; it begins to load as it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(serving.load())
        yield
        loading.cancel()
        await serving.close()

    app = FastAPI(title="flowfast", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(Front, key=key)
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    add_watching(app, serving)
    add_images(app, serving)
    add_searches(app, serving)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such path, or another method
        asked = f"{request.method} {request.url.path[:200]}"
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        there = "see /docs for what there is"
        error = ApiError(
            error.status_code, f"{error.detail}: {asked}; {there}", code, headers=dict(error.headers or {})
        )
    assert isinstance(error, ApiError)
    return error.response()


async def guarded(work: Callable[[], Awaitable[Response]]) -> Response:
    """An answer whatever happens: a fault of the server's own is a 500 that tells nothing of it, and a trace in the
    log."""
    try:
        return await work()
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    except ApiError:
        raise
    except Exception:
        log.exception("a request failed")
        raise ApiError(500, "this server failed: its log says why", "internal_error") from None


# ---- those who watch ----


def add_watching(app: FastAPI, serving: Serving) -> None:
    async def health() -> Response:
        """Does the process live, and its engine?"""
        dead = serving.death
        return JSONResponse({"status": "ok"}) if dead is None else JSONResponse({"status": f"dead: {dead}"}, 503)

    async def ready() -> Response:
        """May requests come?"""
        return JSONResponse({"status": serving.phase}, 200 if serving.phase == "ready" else 503)

    async def metrics() -> Response:
        """For Prometheus."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models() -> dict[str, Any]:
        """The one model, by each of its names."""
        facts = {"object": "model", "created": serving.created, "owned_by": "flowfast"}
        return {"object": "list", "data": [{"id": name, **facts} for name in serving.config.models]}

    for path, answer in {"/health": health, "/ready": ready, "/metrics": metrics, "/v1/models": models}.items():
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)(answer)


# ---- pictures ----


def add_images(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/images/generations", response_model=None, openapi_extra=BODY, responses=ERRORS)
    async def generations(request: Request) -> Response:
        """OpenAI's images API: n searches, each for the best picture that its budget finds."""
        return await guarded(partial(generate, serving, request))

    @app.post("/v1/images/edits", response_model=None, responses={501: {"description": "Not there."}})
    async def edits() -> Response:
        """Not there yet."""
        text = (
            "POST /v1/images/edits is not there: this server draws from prompts alone, by POST /v1/images/generations"
        )
        raise ApiError(501, text, "not_implemented")


async def asked_of(serving: Serving, request: Request) -> tuple[Searches, Asked]:
    """A request that may begin. Raises ApiError."""
    asked = parse(await body_of(request))
    searches = serving.searches()
    check_offer(asked, serving.config, searches.engine.rewards, serving.size)
    return searches, Asked(asked, params_of(asked, serving.config), asked.quality)


async def generate(serving: Serving, request: Request) -> Response:
    searches, asked = await asked_of(serving, request)

    async def work(watcher: Watcher | None = None) -> list[dict[str, Any]]:
        with searches.gate.held(asked.request.n):
            return await all_of(searches, asked, watcher)

    if not asked.request.stream:
        return JSONResponse(answer_of(asked, await unless_left(request.receive, work())))
    stream = Stream(streamed(lambda tell: work(Streaming(asked, searches.metrics, tell))))
    try:
        if await unless_left(request.receive, stream.ready(HEAD_SECONDS)) and stream.coming.exception():
            await stream.take()
    except BaseException:
        await stream.close()
        raise
    return EventStream(stream)


# ---- searches that go on by themselves ----


def add_searches(app: FastAPI, serving: Serving) -> None:
    async def begin(request: Request) -> Response:
        searches, asked = await asked_of(serving, request)
        if asked.request.stream:
            raise ApiError(400, "field 'stream': GET the events of the search instead", "invalid_value", "stream")
        return JSONResponse(serving.records.begin(searches, asked).content, 202)

    @app.post("/v1/searches", response_model=None, openapi_extra=BODY, responses=ERRORS, status_code=202)
    async def post(request: Request) -> Response:
        """Begins n searches, which go on though the client leaves; answers an id at once."""
        return await guarded(partial(begin, request))

    @app.get("/v1/searches/{id}", response_model=None, responses=ERRORS)
    async def get(id: str) -> Response:
        """How it stands; once it is finished, `result` is what POST /v1/images/generations would have answered."""
        return JSONResponse(serving.records.find(id).content)

    @app.get("/v1/searches/{id}/events", response_model=None, responses=ERRORS)
    async def events(id: str) -> Response:
        """Server-sent events from its beginning: queued, progress, found, finished, ended."""
        return EventStream(Stream(serving.records.find(id).follow()))

    @app.delete("/v1/searches/{id}", response_model=None, responses=ERRORS)
    async def delete(id: str) -> Response:
        """Aborts it where it runs, and forgets it."""
        return JSONResponse((await serving.records.drop(id)).content | {"deleted": True})
