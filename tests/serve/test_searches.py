"""POST /v1/searches and what follows: a search that goes on by itself, watched, fetched, taken back, forgotten."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from flowfast.serve import points, records
from flowfast.types import Candidate
from tests.serve.conftest import PATH, PATIENCE, SEARCH, Server, events_of, in_time, pixels, served

SEARCHES = "/v1/searches"


def begun(client: TestClient, **fields: Any) -> str:
    answer = client.post(SEARCHES, json={"prompt": "a", **SEARCH, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] == "queued" and answer.json()["result"] is None
    return str(answer.json()["id"])


def ended(client: TestClient, id: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found: dict[str, Any] = client.get(f"{SEARCHES}/{id}").json()
        if found["status"] not in ("queued", "running"):
            return found
    raise AssertionError("it never ended")


def test_its_result_is_the_answer_that_images_gives(shared: TestClient) -> None:
    found = ended(shared, begun(shared, seed=4, n=2))
    whole = shared.post(PATH, json={"prompt": "a", **SEARCH, "seed": 4, "n": 2}).json()
    assert found["status"] == "finished" and found["error"] is None
    assert [entry["b64_json"] for entry in found["result"]["data"]] == [entry["b64_json"] for entry in whole["data"]]
    assert found["nfe"] == whole["usage"]["total_tokens"] and found["budget"] == 80
    assert found["best_reward"] == max(entry["flowfast"]["reward"] for entry in whole["data"])
    assert 0 < found["expires_at"] - time.time() <= records.KEEP_SECONDS


def test_its_events_tell_all_of_it_also_afterwards(shared: TestClient) -> None:
    id = begun(shared, n=2)
    events = events_of(shared.get(f"{SEARCHES}/{id}/events").text)
    assert events_of(shared.get(f"{SEARCHES}/{id}/events").text) == events
    kinds = [event["type"].removeprefix("search.") for event in events]
    assert kinds[0] == "queued" and kinds[-1] == "ended" and events[-1]["status"] == "finished"
    assert kinds.count("finished") == 2 and {event["id"] for event in events} == {id}
    result = ended(shared, id)["result"]
    for index in range(2):
        own = [event for event in events if event.get("index") == index]
        spent = [event["nfe"] for event in own if event["type"] == "search.progress" and "b64_json" not in event]
        assert spent == sorted(set(spent)) and spent[-1] == 40 and len(spent) <= records.STEPS
        found = [event["reward"] for event in own if event["type"] == "search.found"]
        assert found == sorted(set(found)) and found[-1] == result["data"][index]["flowfast"]["reward"]
        seen = [event for event in own if "b64_json" in event]
        assert 4 <= len(seen) <= records.LOOKS and all(pixels(event["b64_json"]).shape == (4, 6, 3) for event in seen)
        assert own[-1]["data"] == [result["data"][index]["flowfast"]]


def test_what_fails_is_told_in_all_three(shared: TestClient) -> None:
    id = begun(shared, method="none")
    found = ended(shared, id)
    assert found["status"] == "failed" and "none" in found["error"]["message"] and found["result"] is None
    last = events_of(shared.get(f"{SEARCHES}/{id}/events").text)[-1]
    assert last["status"] == "failed" and last["error"] == found["error"]


def test_what_is_refused_at_once(shared: TestClient) -> None:
    for fields, status in (({"n": 11}, 400), ({"stream": True}, 400), ({"model": "x"}, 404), ({"colour": 1}, 400)):
        answer = shared.post(SEARCHES, json={"prompt": "a", **SEARCH, **fields})
        assert answer.status_code == status and answer.json()["error"]["message"]
    for call in (shared.get, shared.delete):
        answer = call(f"{SEARCHES}/none")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "search_not_found"
    assert shared.get(f"{SEARCHES}/none/events").status_code == 404


def test_delete_frees_the_slots_of_one_that_runs_and_forgets_it() -> None:
    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.free.clear()
            answer = await server.ask({"prompt": "a", **SEARCH, "n": 2}, SEARCHES)
            assert answer.status == 202
            id = answer.json["id"]
            await asyncio.to_thread(server.flow.reached.wait, 10)
            assert server.serving.gate.inside == 2
            record = server.serving.records.find(id)
            followed = asyncio.create_task(collect(record))
            await asyncio.sleep(0)
            await server.serving.records.drop(id)
            await asyncio.sleep(0)
            assert server.serving.gate.inside == 0
            assert (await followed)[-1]["status"] == "aborted"
            with pytest.raises(Exception, match="there is no search"):
                server.serving.records.find(id)
            calls = server.flow.calls
            server.flow.free.set()
            await server.idle()
            assert server.flow.calls - calls <= 2  # the round that was held

    async def collect(record: records.Record) -> list[dict[str, Any]]:
        return [event async for event in record.follow()]

    in_time(work)


def test_delete_of_one_that_has_ended() -> None:
    with served() as (client, server):
        id = begun(client)
        ended(client, id)
        gone = client.delete(f"{SEARCHES}/{id}").json()
        assert gone["deleted"] and gone["status"] == "finished"
        assert client.get(f"{SEARCHES}/{id}").status_code == 404
        assert server.serving.gate.inside == 0


def test_a_full_queue_takes_none() -> None:
    async def work() -> None:
        async with Server(queue=0, warm_up="").live() as server:
            server.flow.free.clear()
            assert (await server.ask({"prompt": "a", **SEARCH, "n": 2}, SEARCHES)).status == 202
            assert (await server.ask({"prompt": "a", **SEARCH}, SEARCHES)).status == 503
            server.flow.free.set()

    in_time(work)


@pytest.mark.parametrize(("name", "value"), [("KEEP_SECONDS", 0.0), ("MOST_KEPT", 0), ("MOST_RECORDS", 1)])
def test_results_are_forgotten_by_age_bytes_and_number(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    with served() as (client, server):
        first = begun(client)
        ended(client, first)
        monkeypatch.setattr(records, name, value)
        second = begun(client)
        assert client.get(f"{SEARCHES}/{first}").status_code == 404
        if name == "MOST_RECORDS":
            ended(client, second)


def test_the_servers_end_takes_them_back() -> None:
    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.free.clear()
            answer = await server.ask({"prompt": "a", **SEARCH}, SEARCHES)
            record = server.serving.records.find(answer.json["id"])
            await asyncio.to_thread(server.flow.reached.wait, 10)
            ending = asyncio.create_task(server.serving.close())
            await asyncio.sleep(0.05)
            server.flow.free.set()
            await ending
            assert record.status == "aborted"

    in_time(work)


# ---- what was tried ----


def points_of(events: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    told = [event for event in events if event["type"] == "search.progress" and event["index"] == index]
    return [point for event in told for point in event["candidates"]]


@pytest.mark.parametrize("method", ["svdd", "rbf", "prune", "smc", "bon", "ode"])
def test_every_candidate_is_told_to_who_asks(shared: TestClient, method: str) -> None:
    id = begun(shared, method=method, n=2, candidates=True)
    events = events_of(shared.get(f"{SEARCHES}/{id}/events").text)
    for index, entry in enumerate(ended(shared, id)["result"]["data"]):
        facts, points = entry["flowfast"], points_of(events, index)
        assert len(points) == facts["nfe"], "an evaluation is one NFE here"
        assert [point["nfe"] for point in points] == list(range(1, facts["nfe"] + 1))
        assert sum(point["reward"] is not None for point in points) == facts["reward_calls"]
        by_address = {(point["chain"], point["transition"], point["candidate"]): point for point in points}
        path = [by_address[tuple(step)] for step in facts["winner"]["path"]]
        assert {point["status"] for point in path} <= {"kept", "accepted", "best"}
        assert path[-1]["finished"] and path[-1]["status"] == "best" and path[-1]["reward"] == facts["reward"]
        best = [point["reward"] for point in points if point["status"] == "best"]
        found = [event["reward"] for event in events if event["type"] == "search.found" and event["index"] == index]
        assert best == sorted(set(best)) and best[-1] == found[-1]
        assert any(point["status"] == "dropped" for point in points) == (method not in ("bon", "ode"))


def test_who_does_not_ask_is_told_none_and_costs_none(shared: TestClient) -> None:
    events = events_of(shared.get(f"{SEARCHES}/{begun(shared)}/events").text)
    assert not any("candidates" in event for event in events)
    answer = shared.post(PATH, json={"prompt": "a", **SEARCH, "candidates": True})
    assert answer.status_code == 400 and "unknown field 'candidates'" in answer.json()["error"]["message"]


def test_only_so_many_candidates_are_kept(monkeypatch: pytest.MonkeyPatch, shared: TestClient) -> None:
    monkeypatch.setattr(points, "MOST_POINTS", 50)
    id = begun(shared, n=2, candidates=True)
    events = events_of(shared.get(f"{SEARCHES}/{id}/events").text)
    assert sum(len(points_of(events, index)) for index in range(2)) == 50
    assert events[-1]["status"] == "finished"


def test_a_search_that_begins_anew_tells_its_candidates_anew(shared: TestClient) -> None:
    def told() -> list[dict[str, Any]]:
        each = Candidate(0, 0, 0, 3, 0, 0.5, -1.0, True, "best", 4)
        collected.add(1, 2, [each])
        collected.add(1, 4, [each._replace(candidate=1), each._replace(candidate=2, reward=2.0)])
        return collected.take(1)

    collected = points.Points()
    first = told()
    assert [(each["nfe"], each["status"]) for each in first] == [(2, "best"), (3, "kept"), (4, "best")]
    assert told() != first
    collected.restart(1)
    assert told() == first


def test_info_tells_what_there_is() -> None:
    with served(key="k", alias=("other",), max_budget=90) as (client, server):
        assert client.get("/v1/info").status_code == 401
        info = client.get("/v1/info", headers={"authorization": "Bearer k"}).json()
        assert info["status"] == "ready" and info["models"] == ["toy", "other"] and info["rewards"] == ["near", "far"]
        assert info["qualities"] == {"low": 20, "medium": 40} and info["budget"] == 40 and info["max_budget"] == 90
        assert {"auto", "prune", "rbf", "ode"} <= set(info["methods"]) and all(info["methods"].values())
        assert (info["running"], info["waiting"], info["slots"], info["room"]) == (0, 0, 2, 66)
        assert info["size"] == "6x4" and info["prompt"]
        with server.serving.gate.held(3):
            assert client.get("/v1/info", headers={"authorization": "Bearer k"}).json()["room"] == 63
