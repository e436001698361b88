"""What the OpenAPI document says of the server is what it does, whatever is sent (schemathesis makes it up)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as of_openapi

from tests.serve.conftest import listening

CHECKS: list[Any] = [
    of_openapi.status_code_conformance, of_openapi.content_type_conformance, of_openapi.response_schema_conformance,
    of_openapi.negative_data_rejection, of_openapi.unsupported_method,
]  # fmt: skip
ERROR = {"message", "type", "param", "code"}
LONGEST = 1000


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, dict[str, Any]]]:
    with listening(key=None, queue=100) as (url, server):
        yield url.removesuffix("/v1"), server.app.openapi()


@pytest.fixture(scope="module")
def document(address: tuple[str, dict[str, Any]]) -> Any:
    found = schemathesis.openapi.from_dict(address[1])
    found.config.update(base_url=address[0])
    return found


OPERATIONS = [
    ("post", "/v1/images/generations"), ("post", "/v1/images/edits"), ("post", "/v1/searches"),
    ("get", "/v1/searches/{id}"), ("delete", "/v1/searches/{id}"), ("get", "/v1/searches/{id}/events"),
]  # fmt: skip
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


def check(case: Any) -> None:
    answer = case.call(timeout=20)
    case.validate_response(answer, checks=CHECKS)
    assert answer.headers["x-request-id"]
    assert answer.status_code != 500, answer.text
    if answer.status_code >= 400 and case.method != "HEAD":
        (error,) = answer.json().values()
        assert set(error) == ERROR and 0 < len(error["message"]) <= LONGEST and error["code"]
        assert answer.status_code != 503 or int(answer.headers["retry-after"][0]) > 0


OPTIONS: Any = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}
OPTIONS["suppress_health_check"] = list(HealthCheck)


def run(document: Any, method: str, path: str, mode: GenerationMode, examples: int) -> None:
    """Requests that the document allows, or (NEGATIVE) does not."""

    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=examples, **OPTIONS)
    def hold(case: Any) -> None:
        check(case)

    try:
        hold()
    except Unsatisfiable:
        assert mode == GenerationMode.NEGATIVE  # nothing of it could be wrong


@pytest.mark.parametrize("mode", MODES, ids=["allowed", "wrong"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_document_holds(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    run(document, method, path, mode, 20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=["allowed", "wrong"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_document_holds_for_more(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    run(document, method, path, mode, 500)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/searches"])
def test_fields_may_be_null_but_for_the_prompt(address: tuple[str, dict[str, Any]], path: str) -> None:
    """Clients send null for what they do not set; the document once said otherwise."""
    body = address[1]["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    nulls = {name for name, field in body["properties"].items() if {"type": "null"} in field.get("anyOf", [])}
    assert body["required"] == ["prompt"] and nulls == set(body["properties"]) - {"prompt"}
    answer = requests.post(address[0] + path, json={"prompt": "a", **dict.fromkeys(nulls)}, timeout=20)
    assert answer.status_code in (200, 202), answer.text
    assert requests.post(address[0] + path, json={"prompt": None}, timeout=20).status_code == 400


def test_it_has_all_that_there_is(address: tuple[str, dict[str, Any]]) -> None:
    paths = address[1]["paths"]
    assert {(method, path) for path in paths for method in paths[path]} == set(OPERATIONS)
