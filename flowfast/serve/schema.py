"""The body of POST /v1/images/generations, and what it means for the engine."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from flowfast.bounds import Whole, Within
from flowfast.config import LARGEST, MOST_NFE
from flowfast.serve.config import ServeConfig
from flowfast.serve.errors import ApiError, wrong_fields

MOST_LETTERS = 4000
"""Of a prompt."""
Word = Annotated[str, StringConstraints(max_length=256)]
Text = Annotated[str, StringConstraints(max_length=MOST_LETTERS)]


def or_null(schema: dict[str, Any]) -> None:
    """The document says of each field that need not be there that it may be null."""
    fields, null = schema["properties"], {"type": "null"}
    for name in set(fields) - set(schema["required"]):
        if null not in fields[name].get("anyOf", []):
            fields[name] = {"anyOf": [fields[name], null]}


class ImagesRequest(BaseModel):
    """OpenAI's fields, and flowfast's own. null is as good as nothing."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, json_schema_extra=or_null
    )

    prompt: Annotated[Text, Field(min_length=1)]
    model: Word | None = None
    """One of GET /v1/models; default: the one that is served."""
    n: Annotated[int, Within(1, 10)] = 1
    """Independent samples, each a search of its own."""
    size: Word = "auto"
    quality: Word = "auto"
    """auto, low, medium, high, standard or hd: budgets that the server was started with."""
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Within(0, 100)] = 100
    """Of jpeg and webp: 100 is the largest file with the best picture."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Within(0, 3)] = 0
    """With stream: pictures on the way, spread over the budget."""
    background: Word = "auto"
    """Without effect, like moderation, style, user and safety_identifier."""
    moderation: Word = "auto"
    style: Word = "vivid"
    user: Word = ""
    safety_identifier: Word = ""
    seed: Annotated[int, Whole()] = 0
    repeat: Annotated[int, Within(0, 2**62)] = 0
    """Of the first sample; the others have the numbers that follow."""
    negative_prompt: Text = ""
    guidance: Annotated[float | None, Within(0, 1000)] = None
    method: Word | None = None
    reward: Word | None = None
    """One of those that the server offers."""
    budget: Annotated[int | None, Within(1, MOST_NFE)] = None
    """NFE a sample, instead of a quality."""
    until: Annotated[float | None, Within(-LARGEST, LARGEST)] = None
    """Stop at this reward."""
    top_k: Annotated[int, Within(1, 10)] = 1
    """Best samples of each search, all in the answer."""
    priority: Annotated[int, Within(0, 9)] = 0
    """0 is served first."""
    deadline_ms: Annotated[int | None, Within(1, 86_400_000)] = None
    """From the request's arrival at the engine to its end; its budget shrinks where time is short."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields


class SearchRequest(ImagesRequest):
    """The body of POST /v1/searches."""

    candidates: bool = False
    """Tell what was tried with the events of its progress."""


def parse(body: bytes, form: type[ImagesRequest] = ImagesRequest) -> ImagesRequest:
    """Raises ApiError for anything else."""

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice[:100]!r} stands in it more than once")
        return fields

    try:
        fields = json.loads(body, parse_constant=no_number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"expected a body in JSON: {why}", "invalid_json") from None
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise wrong_fields(error, list(form.model_fields)) from None


def check_offer(asked: ImagesRequest, config: ServeConfig, rewards: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Raises ApiError for what this server does not have. sizes: of its pictures, as far as they are known."""
    if asked.model is not None and asked.model not in config.models:
        raise unknown_model(asked.model, config)
    if asked.response_format == "url":
        raise unserved("response_format", "url", ["b64_json"], " (a picture lies at no URL of this server)")
    if asked.size not in ("auto", *sizes):
        raise unserved("size", asked.size, ["auto", *sizes])
    if config.budget_of(asked.quality) is None:
        raise unserved("quality", asked.quality, ["auto", *config.quality])
    if asked.reward is not None and asked.reward not in rewards:
        raise unserved("reward", asked.reward, list(rewards))


def unknown_model(name: str, config: ServeConfig) -> ApiError:
    there = f"expected one of {', '.join(config.models)}; flowfast serve --alias gives it other names"
    return ApiError(404, f"unknown model {name[:100]!r}: {there}", "model_not_found", "model")


def unserved(field: str, got: str, there: list[str], why: str = "") -> ApiError:
    message = f"field {field!r}: expected {' or '.join(there)}, got {got!r}{why}"
    return ApiError(400, message, "invalid_value", field)


def params_of(asked: ImagesRequest, config: ServeConfig) -> dict[str, Any]:
    """For `AsyncEngine.generate`, beside the prompt and `repeat`. What was not asked for is the engine's default."""
    names = ("seed", "negative_prompt", "top_k", "priority")
    optional = {name: getattr(asked, name) for name in ("guidance", "method", "reward", "until")}
    if asked.deadline_ms is not None:
        optional["deadline"] = asked.deadline_ms / 1000
    if isinstance(asked, SearchRequest):
        optional["candidates"] = asked.candidates
    if config.size:
        optional["size"] = config.size[0] if asked.size == "auto" else asked.size
    return {
        **{name: getattr(asked, name) for name in names},
        **{name: value for name, value in optional.items() if value is not None},
        "budget": asked.budget or config.budget_of(asked.quality),
    }
