"""POST /v1/searches and what follows: a search that goes on by itself, watched, fetched, taken back, forgotten."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from flowfast.serve import records
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
