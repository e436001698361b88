"""The application: which path answers what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from flowfast.serve.errors import ApiError
from flowfast.serve.left import ClientLeft, body_of, unless_left
from flowfast.serve.page import add_page
from flowfast.serve.schema import ImagesRequest, SearchRequest, check_offer, params_of, parse, unknown_model
from flowfast.serve.searches import Asked, Searches, Watcher, all_of, answer_of, spent_on
from flowfast.serve.security import Front, Keyed
from flowfast.serve.serving import Serving
from flowfast.serve.sse import EventStream, Stream
from flowfast.serve.streaming import Streaming, streamed
from flowfast.version import __version__

HEAD_SECONDS = 1.0
"""How long a stream waits for its first event before it says 200: what goes wrong until then has a status."""
CLIENT_LEFT = 499
BODY, SEARCH_BODY = (
    {"requestBody": {"required": True, "content": {"application/json": {"schema": form.model_json_schema()}}}}
    for form in (ImagesRequest, SearchRequest)
)
ID = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
ERROR = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False,
            "properties": {
                "param": {"type": ["string", "null"]},
                **{name: {"type": "string"} for name in ("message", "type", "code")},
            },
        }
    },
}  # fmt: skip
STATUSES = {
    400: "A field is wrong or unknown.", 401: "The key is missing or wrong.", 404: "No such model or search.",
    405: "Not by this method.", 408: "The body did not come.", 411: "Its length is unknown.",
    413: "The body is too large.", 415: "The body is no JSON.",
    500: "The model, a reward or the engine failed.", 501: "Not there.",
    503: "Loading, draining, or full: Retry-After says when.",
}  # fmt: skip


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document."""
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": STATUSES[status], "content": content} for status in (401, 405, *statuses)}


ASKED = errors(400, 404, 408, 411, 413, 415, 500, 503)
PICTURES = {
    "type": "object", "required": ["created", "data", "usage"],
    "properties": {
        "created": {"type": "integer"}, "data": {"type": "array", "minItems": 1}, "usage": {"type": "object"},
    },
}  # fmt: skip
SEARCH = {
    "type": "object", "required": ["id", "status", "nfe", "budget", "best_reward", "result", "error"],
    "properties": {"id": {"type": "string"}, "status": {"type": "string"}},
}  # fmt: skip


def answers(status: int, text: str, schema: dict[str, Any] | None, streams: bool = False) -> dict[int | str, Any]:
    """For the OpenAPI document. schema: None: it is a stream, and nothing else."""
    content = {} if schema is None else {"application/json": {"schema": schema}}
    return {status: {"description": text, "content": content | ({"text/event-stream": {}} if streams else {})}}


DRAWN = answers(200, "The pictures; with `stream` events.", PICTURES, streams=True)
BEGUN, STANDS = answers(202, "It has begun.", SEARCH), answers(200, "How it stands.", SEARCH)
TOLD = answers(200, "Its events, from the first on.", None, streams=True)


def create_app(serving: Serving, key: str | None = None) -> FastAPI:
    """The application of a server; it begins to load as it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(serving.load())
        yield
        loading.cancel()
        await serving.close()

    app = FastAPI(title="flowfast", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(Keyed, key=key)
    app.add_middleware(Front)  # the last one is the outermost
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(ClientLeft, answer_nobody)
    add_watching(app, serving)
    add_images(app, serving)
    add_searches(app, serving)
    if serving.config.page:
        add_page(app)
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


async def answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


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

    async def model(id: str) -> dict[str, Any]:
        """One of its names."""
        found = next((entry for entry in (await models())["data"] if entry["id"] == id), None)
        if found is None:
            raise unknown_model(id, serving.config)
        return found

    async def info() -> dict[str, Any]:
        """What this server offers, and how full it is."""
        return serving.offer

    paths: dict[str, Callable[..., Any]] = {
        "/health": health, "/ready": ready, "/metrics": metrics, "/v1/models": models, "/v1/models/{id:path}": model,
        "/v1/info": info,
    }  # fmt: skip
    for path, answer in paths.items():
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)(answer)


# ---- pictures ----


def add_images(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/images/generations", response_model=None, openapi_extra=BODY, responses=ASKED | DRAWN)
    async def generations(request: Request) -> Response:
        """OpenAI's images API: n searches, each for the best picture that its budget finds."""
        return await generate(serving, request)

    @app.post("/v1/images/edits", response_model=None, responses=errors(501))
    async def edits() -> Response:
        """Not there yet."""
        text = (
            "POST /v1/images/edits is not there: this server draws from prompts alone, by POST /v1/images/generations"
        )
        raise ApiError(501, text, "not_implemented")


async def asked_of(
    serving: Serving, request: Request, form: type[ImagesRequest] = ImagesRequest
) -> tuple[Searches, Asked]:
    """A request that may begin. Raises ApiError."""
    asked = parse(await body_of(request), form)
    searches = serving.searches()
    check_offer(asked, serving.config, searches.engine.rewards, serving.sizes)
    request.state.facts["n"] = asked.n
    return searches, Asked(asked, params_of(asked, serving.config), asked.quality)


async def generate(serving: Serving, request: Request) -> Response:
    searches, asked = await asked_of(serving, request)

    async def work(watcher: Watcher | None = None) -> list[dict[str, Any]]:
        with searches.gate.held(asked.request.n):
            found = await all_of(searches, asked, watcher)
        request.state.facts["nfe"] = sum(spent_on(found))
        return found

    if not asked.request.stream:
        return JSONResponse(answer_of(asked, await unless_left(request.receive, work())))
    with ExitStack() as room:
        room.enter_context(serving.streams.held())
        stream = Stream(streamed(lambda tell: work(Streaming(asked, searches.metrics, tell))))
        try:
            if await unless_left(request.receive, stream.ready(HEAD_SECONDS)) and stream.coming.exception():
                await stream.take()
        except BaseException:
            await stream.close()
            raise
        return EventStream(stream, room.pop_all().close)


# ---- searches that go on by themselves ----


def add_searches(app: FastAPI, serving: Serving) -> None:
    async def begin(request: Request) -> Response:
        searches, asked = await asked_of(serving, request, SearchRequest)
        if asked.request.stream:
            raise ApiError(400, "field 'stream': GET the events of the search instead", "invalid_value", "stream")
        return JSONResponse(serving.records.begin(searches, asked).content, 202)

    @app.post("/v1/searches", response_model=None, openapi_extra=SEARCH_BODY, responses=ASKED | BEGUN, status_code=202)
    async def post(request: Request) -> Response:
        """Begins n searches, which go on though the client leaves; answers an id at once."""
        return await begin(request)

    @app.get("/v1/searches/{id}", response_model=None, openapi_extra=ID, responses=errors(404) | STANDS)
    async def get(request: Request) -> Response:
        """How it stands; once it is finished, `result` is what POST /v1/images/generations would have answered."""
        return JSONResponse(serving.records.find(request.path_params["id"]).content)

    @app.get(
        "/v1/searches/{id}/events", openapi_extra=ID, responses=errors(404, 503) | TOLD, status_code=200,
        response_class=EventStream, response_model=None,
    )  # fmt: skip
    async def events(request: Request) -> Response:
        """Server-sent events from its beginning: queued, progress, found, finished, ended."""
        record = serving.records.find(request.path_params["id"])
        with ExitStack() as room:
            room.enter_context(serving.streams.held())
            return EventStream(Stream(record.follow()), room.pop_all().close)

    @app.delete("/v1/searches/{id}", response_model=None, openapi_extra=ID, responses=errors(404) | STANDS)
    async def delete(request: Request) -> Response:
        """Aborts it where it runs, and forgets it."""
        return JSONResponse((await serving.records.drop(request.path_params["id"])).content | {"deleted": True})
