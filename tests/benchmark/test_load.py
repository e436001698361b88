"""`flowfast bench serve`: when requests are sent, what it makes of each answer, and its figures."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image
from scipy import stats

from flowfast.benchmark.client import Answer, Client, events_of, numbers_of
from flowfast.benchmark.load import Loaded, load, send
from flowfast.benchmark.load_config import LoadConfig
from flowfast.benchmark.load_results import load_figures, meets, shown
from flowfast.cli import main
from flowfast.config import make
from flowfast.errors import OptionError

PATH = "/v1/images/generations"
PICTURE = {"b64_json": "eA==", "flowfast": {"nfe": 50, "rank": 0, "queue_s": 0.25}}
METRICS = "# HELP x\nflowfast:rows_padded_total {padded}\nflowfast:rows_total {rows}\nflowfast:odd NaN\n"


def silent(*_: object) -> None:
    pass


class Scripted:
    """A server: `answer` says what each body gets; it counts how many are under way."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = lambda body: {"data": [PICTURE]}):
        self.answer, self.bodies, self.keys = answer, list[dict[str, Any]](), set[str | None]()
        self.now = self.most = 0
        self.seconds = 0.0
        self.app = web.Application()
        self.app.router.add_post(PATH, self.draw)
        self.app.router.add_get("/metrics", self.metrics)

    async def metrics(self, _: web.Request) -> web.Response:
        count = len(self.bodies)
        return web.Response(text=METRICS.format(padded=100 + 20 * count, rows=300 + 80 * count))

    async def draw(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        found = self.answer(body)
        if isinstance(found, tuple):
            return web.json_response(found[1], status=found[0])
        if isinstance(found, list):  # chunks of a stream; None: the connection is cut
            stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await stream.prepare(request)
            for chunk in found:
                if chunk is None:
                    assert request.transport is not None
                    request.transport.abort()
                else:
                    await stream.write(chunk)
            return stream
        return web.Response(text=found) if isinstance(found, str) else web.json_response(found)

    @asynccontextmanager
    async def live(self) -> AsyncIterator[str]:
        runner = web.AppRunner(self.app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()


def ask(answer: Any, body: dict[str, Any] | None = None, seconds: float = 20.0, slow: float = 0.0) -> Answer:
    async def work() -> Answer:
        server = Scripted(lambda _: answer)
        server.seconds = slow
        async with server.live() as url, Client(url, "k", seconds) as client:
            found = await client.ask(body or {})
            assert server.keys == {"Bearer k"}
            return found

    return asyncio.run(work())


def event(kind: str, **more: Any) -> bytes:
    data = {"type": kind, **more}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


PARTIAL = event("image_generation.partial_image", b64_json="eA==")
COMPLETED = event("image_generation.completed", **PICTURE)
ERROR = {"error": {"message": "no room", "type": "server_error", "param": None, "code": "queue_full"}}


# ---- what is asked, and when ----


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    config = LoadConfig(request_rate=4.0, num_prompts=4000, stream=0.25, partial_images=3, seed=7)
    found = config.requests(["a", "b", "c"])
    assert found == config.requests(["a", "b", "c"])
    assert [due for due, _ in found] != [due for due, _ in config.model_copy(update={"seed": 8}).requests(["a"])]
    gaps = [later - due for (due, _), (later, _) in zip(found, found[1:], strict=False)]
    assert found[0][0] == 0.0
    assert stats.kstest(gaps, stats.expon(scale=0.25).cdf).pvalue > 0.01
    assert abs(stats.pearsonr(gaps[1:], gaps[:-1]).statistic) < 0.06
    streams = [body for _, body in found if "stream" in body]
    assert 900 < len(streams) < 1100 and all(body["partial_images"] == 3 for body in streams)
    assert [body["prompt"] for _, body in found[:4]] == ["a", "b", "c", "a"]
    assert [body["seed"] for _, body in found[:3]] == [7, 8, 9]


def test_without_a_rate_all_come_at_once() -> None:
    found = LoadConfig(num_prompts=5, extra_body={"budget": 9}).requests(["a"])
    assert [due for due, _ in found] == [0.0] * 5 and all(body["budget"] == 9 for _, body in found)


def test_requests_are_sent_in_their_time_and_so_many_at_once() -> None:
    async def work() -> None:
        server = Scripted()
        server.seconds = 0.02
        async with server.live() as url, Client(url) as client:
            requests = [(0.01 * at, {"seed": at}) for at in range(12)]
            answers = await send(client, requests, 3, silent)
            assert sorted(body["seed"] for body in server.bodies) == list(range(12)) and server.most == 3
            assert all(answer.sent >= due for answer, (due, _) in zip(answers, requests, strict=True))
            assert all(
                answer.late == answer.sent - due >= 0 for answer, (due, _) in zip(answers, requests, strict=True)
            )

    asyncio.run(work())


# ---- what is made of an answer ----


def test_pictures() -> None:
    second = {"b64_json": "eA==", "flowfast": {"nfe": 40, "rank": 0, "queue_s": 0.5}}
    lower = {"b64_json": "eA==", "flowfast": {"nfe": 40, "rank": 1, "queue_s": 0.5}}
    found = ask({"data": [PICTURE, second, lower]})
    assert (found.kind, found.images, found.nfe, found.queue, found.partial) == ("ok", 3, 90, 0.5, None)
    plain = ask({"data": [{"b64_json": "eA=="}]})
    assert (plain.kind, plain.images, plain.nfe, plain.queue) == ("ok", 1, 0, None)


def test_a_stream() -> None:
    found = ask([PARTIAL[:30], PARTIAL[30:] + PARTIAL, COMPLETED], {"stream": True})
    assert (found.kind, found.images, found.nfe, found.queue) == ("ok", 1, 50, 0.25)
    assert found.partial is not None and 0 < found.partial < found.seconds
    assert ask([COMPLETED], {"stream": True}).partial is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((503, ERROR), "queue_full"),
        ((400, {"error": {"message": "m", "code": "invalid_value"}}), "invalid_value"),
        ((502, {"detail": "a proxy's"}), "http_502"),
        ((500, {"error": {"message": "m", "code": None}}), "http_500"),
        ([PARTIAL, event("error", **ERROR)], "queue_full"),
        ("no JSON", "bad_answer"),
        ({"data": []}, "bad_answer"),
        ({"data": [{"url": "http://x"}]}, "bad_answer"),
        ({"created": 1}, "bad_answer"),
        ([PARTIAL], "bad_answer"),  # no picture in the end
        ([COMPLETED, PARTIAL[:20]], "bad_answer"),
        ([PARTIAL, None], "connection"),
    ],
)
def test_every_other_end_has_a_kind(answer: Any, kind: str) -> None:
    found = ask(answer)
    assert (found.kind, found.images, found.nfe) == (kind, 0, 0)
    assert found.message and found.seconds > 0


def test_an_answer_that_does_not_come_in_time() -> None:
    found = ask({"data": [PICTURE]}, seconds=0.05, slow=5.0)
    assert found.kind == "timeout" and 0.05 <= found.seconds < 5


def test_events_are_read_however_the_stream_is_cut() -> None:
    whole = b": wait\n\n" + PARTIAL + event("a", text="x" * 90_000) + COMPLETED

    async def read(size: int) -> list[str]:
        async def chunks() -> AsyncIterator[bytes]:
            for at in range(0, len(whole), size):
                yield whole[at : at + size]

        return [found["type"] async for found in events_of(chunks())]

    for size in (1, 2, 3, 61, 4096, len(whole)):
        assert asyncio.run(read(size)) == ["image_generation.partial_image", "a", "image_generation.completed"]


def test_numbers_of_prometheus() -> None:
    text = '# TYPE a counter\na{b="c d"} 2.0\nflowfast:rows_total 3e2\nx NaN\ny +Inf\nnothing\n'
    assert numbers_of(text) == {'a{b="c d"}': 2.0, "flowfast:rows_total": 300.0}


# ---- figures ----


def test_figures_of_known_answers() -> None:
    good = [
        Answer("ok", 1.0, partial=0.5, queue=0.1, images=2, nfe=100),
        Answer("ok", 3.0, queue=0.3, images=1, nfe=50),
    ]
    bad = [Answer("queue_full", 0.01, message="first"), Answer("queue_full", 0.02, message="second")]
    config = LoadConfig(goodput={"e2e": 2000, "queue": 200, "partial": 500})
    before, after = (
        {"flowfast:rows_padded_total": 10.0, "flowfast:rows_total": 20.0},
        {"flowfast:rows_padded_total": 60.0, "flowfast:rows_total": 220.0},
    )
    row = load_figures(config, Loaded([good[0], bad[0], good[1], bad[1]], 4.0, before, after))
    assert (row["requests"], row["answered"], row["images"], row["nfe"]) == (4, 2, 3, 150)
    assert (row["requests_per_s"], row["images_per_s"], row["nfe_per_s"]) == (0.5, 0.75, 37.5)
    assert (row["fill"], row["errors"], row["error_share"]) == (0.75, {"queue_full": 2}, {"queue_full": 0.5})
    assert row["error_texts"] == {"queue_full": "first"}
    assert (row["latency_s"]["mean"], row["queue_s"]["p50"], row["first_partial_s"]["p99"]) == (2.0, 0.2, 0.5)
    assert (row["goodput_per_s"], row["good_share"]) == (0.25, 0.25)
    text = shown(row)
    assert "| latency       | 2000.0 " in text and "2 of 4 requests" in text and "queue_full: 2 (50.0 %)" in text
    nothing = load_figures(LoadConfig(), Loaded(bad, 1.0, {}, {}))
    assert (nothing["latency_s"], nothing["fill"], nothing["good_share"]) == (None, None, None)
    assert "0 of 2 requests" in shown(nothing)


@pytest.mark.parametrize(("goals", "good"), [({"e2e": 1000}, True), ({"e2e": 999}, False), ({"queue": 99}, False)])
def test_goals(goals: dict[str, float], good: bool) -> None:
    answer = Answer("ok", 1.0, queue=0.1)
    assert meets(answer, goals) is good and meets(answer, {**goals, "partial": 1}) is good  # it does not stream


# ---- the command ----


@contextmanager
def in_a_thread(server: Scripted) -> Iterator[str]:
    ready, stop, found = threading.Event(), threading.Event(), list[str]()

    async def work() -> None:
        async with server.live() as url:
            found.append(url)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(20)
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join(20)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWFAST_API_KEY", "s3same0pen55")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    server = Scripted(lambda body: (503, ERROR) if body["seed"] == 5 else {"data": [PICTURE]})
    with in_a_thread(server) as url:
        argv = ["bench", "serve", "--url", f"{url}/v1/", "--num-prompts", "8", "--prompts", str(prompts), "--seed", "3"]
        argv += ["--goodput", "e2e:60000,queue:1", "--extra-body", '{"quality": "low"}', "--max-concurrency", "2"]
        assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "o/bench.json").read_text())
    assert "7 of 8 requests have their pictures" in text and "queue_full: 1 (12.5 %), the first: no room" in text
    assert {"Bearer s3same0pen55"} == server.keys and "s3same0pen55" not in (tmp_path / "o/bench.json").read_text()
    asked = sorted((body["seed"], body["prompt"]) for body in server.bodies)
    assert asked == list(zip(range(3, 11), ["one", "two"] * 4, strict=True)) and server.most <= 2
    assert {body["quality"] for body in server.bodies} == {"low"}
    assert (found["fill"], found["good_share"], found["config"]["request_rate"]) == (0.75, 0.0, "inf")
    assert len(found["each"]) == 8 and found["late_s"] is None
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["bench.json", "bench.png"]
    assert Image.open(tmp_path / "o/bench.png").size[0] > 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "start `flowfast serve`"),
        (["--url", "ftp://host"], "http://HOST:PORT"),
        (["--url", "http://me:s3same0pen55@host"], "FLOWFAST_API_KEY"),
        (["--url", "http://host/other"], "without a path"),
        (["--request-rate", "0"], "above 0"),
        (["--request-rate", "nan"], "request_rate"),
        (["--stream", "1.5"], "stream"),
        (["--goodput", "e2e"], "e2e:2000"),
        (["--goodput", "tpot:5"], "goodput"),
        (["--extra-body", "{"], "expected JSON"),
        (["--extra-body", "[]"], "JSON object"),
        (["--extra-body", '{"stream": true}'], "'stream' has an option of its own"),
    ],
)
def test_what_it_refuses(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *options, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert words in said and "s3same0pen55" not in said
    assert not (tmp_path / "o").exists()


def test_a_server_that_loads_is_not_measured() -> None:
    async def work() -> None:
        server = Scripted()

        async def loading(_: web.Request) -> web.Response:
            return web.json_response({"status": "loading"}, status=503)

        server.app.router.add_get("/ready", loading)
        async with server.live() as url:
            with pytest.raises(OptionError, match="loads or drains"):
                await load(make(LoadConfig, {"url": url}), ["a"], None, silent)
        assert not server.bodies

    asyncio.run(work())


def test_no_rate_is_infinite() -> None:
    assert math.isinf(LoadConfig().request_rate)
