"""Every refusal has OpenAI's form, names the field, and comes before anything is drawn."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from flowfast.serve.left import MOST_BYTES
from flowfast.serve.schema import MOST_LETTERS
from flowfast.serve.security import Lines
from tests.serve.conftest import PATH, SEARCH, Pictures, Server, in_time, served

JSON = {"content-type": "application/json"}


def error_of(answer: Any) -> dict[str, Any]:
    content = answer.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"] and content["error"]["code"]
    assert answer.headers["x-request-id"]
    return content["error"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"colour": "red"}, "colour", ["unknown field 'colour'", "prompt", "top_k"]),
        ({"seconds": 3}, "seconds", ["unknown field"]),
        ({"n": 0}, "n", ["1 .. 10", "got 0"]),
        ({"n": 11}, "n", ["1 .. 10"]),
        ({"n": 10**4000}, "n", ["1 .. 10"]),
        ({"n": "2"}, "n", ["integer"]),
        ({"n": 1.5}, "n", ["integer"]),
        ({"n": True}, "n", ["number"]),
        ({"n": [1]}, "n", ["integer"]),
        ({"prompt": 3}, "prompt", ["string"]),
        ({"prompt": ""}, "prompt", ["at least 1 character"]),
        ({"prompt": "   "}, "prompt", ["prompt"]),
        ({"prompt": "x" * (MOST_LETTERS + 1)}, "prompt", [str(MOST_LETTERS)]),
        ({"prompt": "\ud800"}, "prompt", ["field 'prompt'"]),
        ({"model": 5}, "model", ["string"]),
        ({"size": "512x512"}, "size", ["auto or 6x4", "'512x512'"]),
        ({"quality": "best"}, "quality", ["auto or low or medium"]),
        ({"quality": "hd"}, "quality", ["auto or low or medium"]),
        ({"response_format": "url"}, "response_format", ["b64_json", "no URL"]),
        ({"response_format": "hex"}, "response_format", ["b64_json"]),
        ({"output_format": "gif"}, "output_format", ["png"]),
        ({"output_compression": 101}, "output_compression", ["0 .. 100"]),
        ({"partial_images": 4}, "partial_images", ["0 .. 3"]),
        ({"stream": "yes"}, "stream", ["boolean"]),
        ({"seed": 0.5}, "seed", ["integer"]),
        ({"repeat": -1}, "repeat", ["0 .."]),
        ({"guidance": -1}, "guidance", ["0 .. 1,000"]),
        ({"guidance": "3,dps:1"}, "guidance", ["number"]),
        ({"reward": "http://example.com"}, "reward", ["near or far"]),
        ({"method": "/etc/passwd"}, None, ["/etc/passwd"]),
        ({"budget": 0}, "budget", ["1 .."]),
        ({"budget": 41}, "budget", ["41", "40"]),
        ({"budget": 1}, "budget", ["budget"]),
        ({"until": "high"}, "until", ["number"]),
        ({"top_k": 99}, "top_k", ["1 .. 10"]),
        ({"priority": 10}, "priority", ["0 .. 9"]),
        ({"deadline_ms": 0}, "deadline_ms", ["1 .."]),
        ({"negative_prompt": {}}, "negative_prompt", ["string"]),
        ({"user": "u" * 300}, "user", ["256"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_named(
    shared: TestClient, fields: dict[str, Any], param: str | None, words: list[str], stream: bool
) -> None:
    body = {"prompt": "a", **SEARCH, "stream": stream, **fields}
    answer = shared.post(PATH, content=json.dumps(body), headers=JSON)
    error = error_of(answer)
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param
    for word in words:
        assert word in error["message"], error
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt": "a", "guidance": NaN}', "invalid_json"),
        (b'{"prompt": "a", "until": -Infinity}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'\xff\xfe"', "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', "invalid_json"),
        (b'{"prompt": "a", "user": {"x": 1, "x": 2}}', "invalid_json"),
        (b'{"a":' * 50_000, "invalid_json"),
        (b'{"prompt": "\xc3\x28"}', "invalid_json"),
        (b'{"prompt": "a", "seed": 1e400}', "invalid_value"),
        (b"[]", "invalid_value"),
        (b"3", "invalid_value"),
        (b"null", "invalid_value"),
        (b"{}", "missing_required_parameter"),
        (b'{"prompt": null}', "missing_required_parameter"),
        (b'{"prompt": "a", "\\ud800": 1}', "invalid_value"),
        (b'{"prompt": "a", "\\u20ac": 1}', "unknown_parameter"),
    ],
)
def test_a_body_that_is_none(shared: TestClient, body: bytes, code: str) -> None:
    answer = shared.post(PATH, content=body, headers=JSON)
    assert answer.status_code == 400 and error_of(answer)["code"] == code


def test_an_infinite_number(shared: TestClient) -> None:
    answer = shared.post(PATH, content=b'{"prompt": "a", "until": 1e999}', headers=JSON)
    assert answer.status_code == 400 and error_of(answer)["param"] == "until"


def test_other_statuses(shared: TestClient) -> None:
    answer = shared.post(PATH, json={"prompt": "a", "model": "dall-e-3"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found" and "toy" in error_of(answer)["message"]
    assert error_of(shared.post(PATH, content=b"{}", headers={"content-type": "text/plain"}))["code"].startswith(
        "unsup"
    )
    answer = shared.post(PATH, content=b" " * (MOST_BYTES + 1), headers=JSON)
    assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
    answer = shared.post(PATH, content=iter([b" " * 1000] * (MOST_BYTES // 1000 + 2)), headers=JSON)  # without a length
    assert answer.status_code == 411 and error_of(answer)["code"] == "length_required"
    assert shared.get("/v2").status_code == 404 and error_of(shared.get("/v2"))["code"] == "not_found"
    assert error_of(shared.get(PATH))["code"] == "method_not_allowed"
    assert shared.post(PATH, json={"prompt": "a", **SEARCH}).status_code == 200


def test_the_key_is_asked_for_below_v1_alone() -> None:
    with served("open sesame".replace(" ", "-")) as (client, _):
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        for given in (
            "",
            "Bearer",
            "Bearer open-sesam",
            "Bearer open-sesame2",
            "open-sesame",
            "Basic open-sesame",
            "Bearer é",
        ):
            answer = client.get("/v1/models", headers={"authorization": given.encode()})
            assert answer.status_code == 401 and error_of(answer)["type"] == "authentication_error", given
            assert client.post("/v1/nothing", headers={"authorization": given.encode()}).status_code == 401
        assert client.post(PATH, json={"prompt": "a"}).status_code == 401
        right = {"authorization": "Bearer open-sesame"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post(PATH, json={"prompt": "a", **SEARCH}, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", {}), ("GET", "/nowhere", {}), ("OPTIONS", PATH, {}), ("GET", PATH, {}),
        ("POST", PATH, {}), ("POST", PATH, {"prompt": "a", **SEARCH}), ("POST", "/v1/images/edits", {}),
        ("POST", PATH, {"prompt": "a", **SEARCH, "stream": True}), ("DELETE", "/v1/searches/none", {}),
        ("HEAD", "/v1/models", {}), ("GET", "/docs", {}), ("GET", "/v1/searches/none/events", {}),
    ],
)  # fmt: skip
def test_every_answer_has_a_request_id_the_clients_where_that_is_a_word(
    shared: TestClient, method: str, path: str, body: dict[str, Any]
) -> None:
    def id_with(given: str | bytes) -> str:
        content = None if method in ("GET", "HEAD", "OPTIONS", "DELETE") else json.dumps(body)
        headers = {**JSON, "x-request-id": given}
        return str(shared.request(method, path, content=content, headers=headers).headers["x-request-id"])

    assert id_with("mine-1_2.3") == "mine-1_2.3" and id_with("x" * 64) == "x" * 64
    for wrong in ("a b", "x" * 65, "", "a\tb", "é".encode(), "a/b", '"'):
        assert re.fullmatch("[0-9a-f]{32}", id_with(wrong)), wrong


def test_a_fault_of_the_servers_own_is_a_500_that_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Anywhere: in a search, in its events, in what is watched; its trace is in the log."""

    def broken(*_: Any) -> Any:
        raise KeyError("the password is swordfish")

    with served(warm_up="") as (client, server):
        monkeypatch.setattr("flowfast.serve.searches.facts_of", broken)
        for path, method in ((PATH, "POST"), ("/metrics", "GET"), ("/v1/searches/x", "GET")):
            monkeypatch.setattr(server.serving.metrics, "text", broken)
            monkeypatch.setattr(server.serving.records, "find", broken)
            for stream in (False, True) if method == "POST" else (False,):
                fields = {"prompt": "a", **SEARCH, "stream": stream}
                answer = client.request(method, path, **({"json": fields} if method == "POST" else {}))
                error = error_of(answer)
                assert answer.status_code == 500 and error["code"] == "internal_error", path
                assert "swordfish" not in answer.text and "swordfish" in caplog.text
                caplog.clear()
        assert server.serving.gate.inside == server.serving.streams.open == 0


def test_the_log_has_a_line_a_request_and_none_of_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowfast.serve")
    with served("the-key", warm_up="") as (client, _):
        own = {"authorization": "Bearer the-key", "x-request-id": "mine"}
        body = {"prompt": "swordfish", **SEARCH, "n": 2, "user": "jane", "negative_prompt": "http://me:pw@host"}
        client.post(PATH, json=body, headers=own)
        client.post(PATH, json=body | {"stream": True}, headers=own)
        client.post(PATH, json=body | {"method": "swordfish"}, headers=own)
        client.post(PATH, json=body | {"jane": 1}, headers=own)
        client.get("/swordfish?jane=http://me:pw@host", headers=own)
        client.get("/v1/searches/swordfish", headers=own)
        client.get("/v1/models/jane", headers=own)
        client.get("/v1/models", headers={"authorization": "Bearer swordfish"})
        id = client.post("/v1/searches", json=body, headers=own).json()["id"]
        client.get(f"/v1/searches/{id}/events", headers=own)
    texts = [record.getMessage() for record in caplog.records if record.name == "flowfast.serve"]
    for text in ("swordfish", "jane", "pw", "the-key", "Bearer"):
        assert not any(text in line for line in texts), text
    lines = [json.loads(text) for text in texts]
    (search,) = [line for line in lines if "search" in line]
    assert search["search"] == id and (search["n"], search["nfe"], search["status"]) == (2, 80, "finished")
    found = [[line.get(name) for name in ("route", "status", "n", "nfe")] for line in lines if "request" in line]
    assert found == [
        [PATH, 200, 2, 80], [PATH, 200, 2, 80], [PATH, 400, 2, None], [PATH, 400, None, None], [None, 404, None, None],
        ["/v1/searches/{id}", 404, None, None], ["/v1/models/{id:path}", 404, None, None], [None, 401, None, None],
        ["/v1/searches", 202, 2, None], ["/v1/searches/{id}/events", 200, None, None],
    ]  # fmt: skip
    assert all(line["seconds"] >= 0 for line in lines)


def test_a_trace_is_a_line_of_json_too() -> None:
    try:
        raise KeyError("reason")
    except KeyError:
        record = logging.LogRecord("flowfast.serve", logging.ERROR, "", 0, "request %s failed", ("x",), sys.exc_info())
    text = Lines().format(record)
    assert "\n" not in text
    assert json.loads(text)["message"] == "request x failed" and "KeyError: 'reason'" in json.loads(text)["trace"]


def test_open_streams_are_bounded() -> None:
    """As many as may; the next hears so at once, and has room when one has ended. Answers that are none have theirs."""

    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.serving.streams.most = 2
            server.flow.free.clear()
            body = {"prompt": "a", **SEARCH, "stream": True}
            left = asyncio.Event()
            tasks = [asyncio.create_task(server.ask(body, left=left)) for _ in range(2)]
            await asyncio.sleep(1.3)  # longer than a head is waited for
            assert server.serving.streams.open == 2
            refused = await server.ask(body)
            assert refused.status == 503 and refused.json["error"]["code"] == "too_many_streams"
            assert int(refused.headers["retry-after"]) > 0 and server.serving.gate.inside == 2
            plain = asyncio.create_task(server.ask({"prompt": "a", **SEARCH}))
            left.set()
            await asyncio.gather(*tasks)
            assert server.serving.streams.open == 0
            server.flow.free.set()
            assert (await plain).status == (await server.ask(body)).status == 200
            assert server.serving.streams.open == 0 == server.serving.gate.inside

    in_time(work)


def test_models_have_a_path_of_their_own(shared: TestClient) -> None:
    assert shared.get("/v1/models/toy").json() == shared.get("/v1/models").json()["data"][0]
    for name in ("dall-e-3", "a/b", "toy/", "t" * 2000):
        answer = shared.get(f"/v1/models/{name}")
        assert answer.status_code == 404 and error_of(answer)["code"] == "model_not_found"
        assert "toy" in error_of(answer)["message"] and len(error_of(answer)["message"]) < 400


def test_a_full_queue_says_when_to_come_again() -> None:
    """Four pictures have room: two slots and two that wait. The fifth hears at once, though a model call is held."""

    async def work() -> None:
        async with Server(queue=2, warm_up="").live() as server:
            server.flow.free.clear()
            first = [asyncio.create_task(server.ask({"prompt": "a", **SEARCH, "seed": seed})) for seed in range(3)]
            await asyncio.to_thread(server.flow.reached.wait, 10)
            refused = await server.ask({"prompt": "a", **SEARCH, "n": 2})
            streamed = await server.ask({"prompt": "a", **SEARCH, "n": 10, "stream": True})
            for answer in (refused, streamed):
                assert answer.status == 503 and answer.json["error"]["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) >= 1
            server.flow.free.set()
            assert [answer.status for answer in await asyncio.gather(*first)] == [200] * 3
            assert server.serving.gate.inside == 0
            assert (await server.ask({"prompt": "a", **SEARCH, "n": 4})).status == 200

    in_time(work)


def test_a_deadline_that_cannot_be_met_names_the_time_that_it_would_take() -> None:
    """Three rounds a second, behind a search that is held: with the time that the refusal names, it comes in."""

    async def work() -> None:
        async with Server(slots=1, flow=Slow(), warm_up="two red circles").live() as server:
            running = asyncio.create_task(server.ask({"prompt": "a", **SEARCH}))
            await asyncio.sleep(0.05)
            refused = await server.ask({"prompt": "a", **SEARCH, "deadline_ms": 20})
            error = refused.json["error"]
            assert refused.status == 503 and error["code"] == "deadline" and error["param"] == "deadline_ms"
            found = re.search(r"within its 0.02 s .* it takes ([\d.]+) s at least; give it as much", error["message"])
            assert found is not None, error
            needed = float(found[1])
            assert int(refused.headers["retry-after"]) == max(1, math.ceil(needed - 0.02))
            body = {"prompt": "a", **SEARCH, "deadline_ms": int(3000 * needed)}
            streamed = await server.ask(body | {"deadline_ms": 20, "stream": True})
            assert streamed.status == 503 and "it takes" in streamed.json["error"]["message"]
            assert (await server.ask(body)).status == (await running).status == 200

    in_time(work)


class Slow(Pictures):
    def velocity(self, x_t: Any, t: Any, cond: Any) -> Any:
        time.sleep(0.01)
        return super().velocity(x_t, t, cond)


class Failing:
    """A reward that fails for the prompt "bad" alone."""

    name, range, differentiable = "failing", (0.0, 1.0), False

    def __call__(self, images: Any, prompts: Any) -> Any:
        if "bad" in prompts:
            raise RuntimeError("no score today")
        return images.flatten(1).mean(1)


def test_a_reward_that_fails_is_a_500_of_its_request_alone() -> None:
    with served(reward=Failing(), warm_up="") as (client, _):
        answer = client.post(PATH, json={"prompt": "bad", **SEARCH})
        assert answer.status_code == 500 and error_of(answer)["code"] == "reward_failed"
        assert "no score today" in error_of(answer)["message"]
        assert client.post(PATH, json={"prompt": "good", **SEARCH}).status_code == 200
        assert "flowfast:reward_errors_total 1.0" in client.get("/metrics").text
