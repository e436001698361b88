"""GET /metrics as Prometheus reads it: its names, what they count, and the dashboard that shows them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from torch import Tensor

from tests.serve.conftest import PATH, SEARCH, Pictures, Server, in_time, served

PREFIX = "flowfast:"
KINDS = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "request_success": "counter",
    "request_failure": "counter", "request_queue_time_seconds": "histogram",
    "time_to_first_partial_seconds": "histogram", "e2e_request_latency_seconds": "histogram", "nfe": "counter",
    "rows": "counter", "rows_padded": "counter", "batch_fill": "gauge", "reward_seconds": "counter",
    "reward_errors": "counter", "nan_rewards": "counter", "out_of_memory_splits": "counter",
    "deadline_cuts": "counter", "best_reward": "histogram",
}  # fmt: skip
LABELS = {
    "request_success": ("finished_reason", {"budget", "until", "deadline"}),
    "request_failure": (
        "reason", {"aborted", "full", "deadline", "prompt", "reward", "model", "engine", "closed", "refused"}
    ),
}  # fmt: skip


def read(text: str) -> dict[str, float]:
    """Samples by name, with the value of their one label, if any: "request_success_total budget"."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                found[" ".join([sample.name.removeprefix(PREFIX), *sample.labels.values()])] = sample.value
    return found


def ask(client: TestClient, status: int = 200, **fields: Any) -> Any:
    answer = client.post(PATH, json={"prompt": "a", **SEARCH, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_they_are_those_of_the_contract_from_the_start(shared: TestClient) -> None:
    text = shared.get("/metrics").text
    families = {found.name: found for found in text_string_to_metric_families(text) if "_created" not in found.name}
    found = {name.removeprefix(PREFIX): family.type for name, family in families.items()}
    assert all(name.startswith(PREFIX) for name in families) and found == KINDS
    for name, (label, values) in LABELS.items():
        samples = [sample for sample in families[PREFIX + name].samples if sample.name.endswith("_total")]
        assert {sample.labels[label] for sample in samples} == values
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        assert (name.removeprefix(PREFIX) in LABELS) == any(set(sample.labels) - {"le"} for sample in family.samples), (
            name
        )


def test_they_count_what_happened() -> None:
    with served(warm_up="") as (client, _):
        found = ask(client, n=2)["data"]
        ask(client, 400, method="none")
        now = read(client.get("/metrics").text)
        nfe = sum(entry["flowfast"]["nfe"] for entry in found)
        assert now["nfe_total"] == nfe and now["rows_total"] == nfe + now["rows_padded_total"]
        assert now["batch_fill"] == nfe / now["rows_total"] and now["out_of_memory_splits_total"] == 0
        assert now["request_success_total budget"] == now["request_queue_time_seconds_count"] == 2
        assert now["e2e_request_latency_seconds_count"] == now["best_reward_count"] == 2
        assert now["e2e_request_latency_seconds_sum"] >= sum(entry["flowfast"]["total_s"] for entry in found) - 1e-5
        assert now["request_failure_total refused"] == 1 and now["time_to_first_partial_seconds_count"] == 0
        assert now["num_requests_running"] == now["num_requests_waiting"] == now["deadline_cuts_total"] == 0
        client.post(PATH, json={"prompt": "a", **SEARCH, "stream": True, "partial_images": 2})
        ask(client, until=-1e9)
        now = read(client.get("/metrics").text)
        assert now["time_to_first_partial_seconds_count"] == 1 and now["request_success_total until"] == 1


def test_pictures_that_had_no_room_are_counted() -> None:
    with served(queue=0, warm_up="") as (client, _):
        ask(client, 503, n=5)
        now = read(client.get("/metrics").text)
        assert now["request_failure_total full"] == 5 and now["request_failure_total refused"] == 0


def test_running_and_waiting() -> None:
    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.free.clear()
            tasks = [asyncio.create_task(server.ask({"prompt": "a", **SEARCH, "n": n})) for n in (2, 3)]
            await asyncio.to_thread(server.flow.reached.wait, 10)
            await asyncio.sleep(0.05)
            held = server.flow
            held.free.set()
            held.reached.clear()
            held.hold_at = held.calls + 3  # the next rounds know of all
            await asyncio.to_thread(held.reached.wait, 10)
            now = read(server.serving.metrics.text().decode())
            assert (now["num_requests_running"], now["num_requests_waiting"]) == (2, 3)
            held.free.set()
            await asyncio.gather(*tasks)

    in_time(work)


class Hungry(Pictures):
    """Has no room for more than two rows."""

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("no room")
        return super().velocity(x_t, t, cond)


def test_memory_that_runs_out_is_counted() -> None:
    with served(flow=Hungry(), warm_up="") as (client, _):
        assert ask(client)["data"][0]["flowfast"]["micro_batch"] == 2
        assert read(client.get("/metrics").text)["out_of_memory_splits_total"] == 1


DASHBOARD = Path(__file__).resolve().parents[2] / "examples/grafana/flowfast.json"
WORDS = {"sum", "by", "le", "rate", "avg", "histogram_quantile", "job", "finished_reason", "reason"}
"""What its queries are made of beside metrics and labels' values."""


def expressions(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_names_metrics_that_there_are_and_shows_each(shared: TestClient) -> None:
    families = text_string_to_metric_families(shared.get("/metrics").text)
    there = {sample.name for family in families for sample in family.samples}
    shown = set()
    for text in expressions(json.loads(DASHBOARD.read_text())):
        used = set(re.findall(r"flowfast:\w+", text))
        assert used and used <= there, text
        shown |= used
        rest = re.sub(r'flowfast:\w+|\{job=~"\$job"\}|\[\$__rate_interval\]', " ", text)
        assert set(re.findall(r"[a-z_]+", rest)) <= WORDS, text
        for left, right in ("()", "{}", "[]"):
            assert text.count(left) == text.count(right), text
        assert not re.search(r"rate\(flowfast:(?!\w+_(total|bucket)\b)", text), f"{text}: a rate of a gauge"
    families_shown = {name.removesuffix("_total").removesuffix("_bucket").removeprefix(PREFIX) for name in shown}
    assert families_shown == set(KINDS)


def test_the_dashboard_has_no_panel_upon_another_and_each_says_what_it_is() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels) == 12
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    for panel in panels:
        assert panel["description"].endswith(".") and panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource", "job"]
