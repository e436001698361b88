"""Rewards over HTTP: the reference server on a real socket, servers that misbehave, requests that are malformed."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import flowfast
import flowfast.rewards
from flowfast.errors import OptionError, PromptError, RewardError
from flowfast.prompts import Prompt, field_of, read_prompts
from flowfast.rewards import CallableReward, on_host
from flowfast.rewards.counting import asked_counts
from flowfast.rewards.http import CONTENT_TYPE, HttpReward, load, pack, unpack
from flowfast.rewards.server import RewardServer
from flowfast.rewards.sharpness import Sharpness
from tests.rewards.servers import answering, running

N = 4
PIXELS = torch.randint(0, 256, (N, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
IMAGES = PIXELS / 255
PROMPTS = ["a", "zwei Kreise", "三只猫", 'a "quoted"\nline']


@pytest.fixture(scope="module")
def sharpness() -> Iterator[str]:
    with running(RewardServer("sharpness", port=0)) as url:
        yield url


def scores_of(values: list[Any]) -> bytes:
    return json.dumps({"scores": values}).encode()


def lengths(images: Tensor, prompts: list[str]) -> list[float]:
    return [float(image.sum()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


# ---- the reference server ----


def test_the_scores_are_those_of_the_reward_itself() -> None:
    for reward, local in (
        ("sharpness", Sharpness()(IMAGES, torch.zeros(N), {})),
        (lengths, torch.tensor(lengths(IMAGES, PROMPTS))),
    ):
        with running(RewardServer(reward, port=0)) as url:
            remote = load(url)
            assert on_host(remote)
            together = remote(IMAGES, PROMPTS)
            assert torch.equal(together, local.float())
            alone = [float(remote(IMAGES[i : i + 1], PROMPTS[i : i + 1])) for i in range(N)]
            assert alone == together.tolist()


def test_a_search_with_it_is_the_search_without_it() -> None:
    """Images of 8 bits on both sides, as that is what travels."""

    def velocity(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return 0.5 * x_t

    def decode(x0: Tensor) -> Tensor:
        return (x0.mul(0.1).add(0.5).clamp(0, 1) * 255).round() / 255

    flow = flowfast.flow_from(velocity, (3, 8, 8), decode=decode)
    options: dict[str, Any] = dict(method="rbf", budget=24, steps=4)
    with running(RewardServer("sharpness", port=0)) as url:
        remote = flowfast.search(flow, ["a", "b"], reward=load(url), **options)
    local = flowfast.search(flow, ["a", "b"], reward="sharpness", **options)
    for one, two in zip(remote.samples, local.samples, strict=True):
        assert one.winner == two.winner
        assert one.reward == two.reward


def test_fields_of_a_prompt_travel_with_it(tmp_path: Path) -> None:
    """As lists have them: a reward behind a server counts and reads what one on this machine does."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a busy street", "classes": ["bus", "dog"], "counts": [2, 0], "seed": 10**30},
        {"prompt": "three pots", "include": [{"class": "pot", "count": 4, "color": "red"}], "text": ["IN", "OUT"]},
        {"prompt": 'two signs saying "OPEN"', "tag": "position"},
        {"prompt": "one cat", "counts": "many", "text": 7},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, told = read_prompts(path), []

    def asked(images: Tensor, prompts: list[str]) -> list[float]:
        for prompt in prompts:
            told.append([prompt, *({} if prompt == "one cat" else asked_counts(prompt)).items()])
            told[-1].append(field_of(prompt, "text"))
        with pytest.raises(PromptError, match=r"list.jsonl, line 4: field 'counts' must be"):
            asked_counts(prompts[3])
        return [0.0] * len(prompts)

    asked(IMAGES, prompts)
    with running(RewardServer(asked, port=0)) as url:
        load(url)(IMAGES, prompts)
    assert told[4:] == told[:4] and told[0] == ["a busy street", ("bus", 2), ("dog", 0), None]
    assert told[1] == ["three pots", ("red pot", 4), ["IN", "OUT"]]


def test_fields_are_what_another_server_may_leave_alone() -> None:
    """Tensors and prompts are those of a request without them, and a request without has none."""
    plain, more = pack(PIXELS, PROMPTS), pack(PIXELS, [Prompt("a", counts=[1], classes=["b"]), *PROMPTS[1:]])
    heads = [json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")]) for body in (plain, more)]
    fields = [{"classes": ["b"], "counts": [1]}, {}, {}, {}]
    assert json.loads(heads[1]["__metadata__"].pop("fields")) == fields
    assert json.loads(heads[1]["__metadata__"].pop("faults")) == [{}] * 4
    assert heads[0] == heads[1] and list(heads[0]["__metadata__"]) == ["prompts"]


def test_what_is_not_finite_never_wins() -> None:
    with running(RewardServer(lambda images, prompts: [math.nan, -math.inf, math.inf, 2.5], port=0)) as url:
        scores = load(url)(IMAGES, PROMPTS).tolist()
    assert [math.isnan(score) for score in scores] == [True, True, True, False]
    assert scores[3] == 2.5


def test_many_clients_at_once() -> None:
    inside: list[int] = []

    def alone(images: Tensor, prompts: list[str]) -> list[float]:
        inside.append(1)
        time.sleep(0.01)
        assert len(inside) == 1, "two batches at once"
        inside.pop()
        return lengths(images, prompts)

    with running(RewardServer(alone, port=0)) as url:
        remote, found = load(url), [torch.empty(0)] * 8
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, remote(IMAGES, [str(i) * i] * N)))  # type: ignore[misc]
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        assert torch.equal(found[i], torch.tensor(lengths(IMAGES, [str(i) * i] * N)))


def test_health() -> None:
    with running(RewardServer("sharpness", port=0)) as url:
        assert call(url, "GET", "/health") == (200, {"status": "ok", "reward": "sharpness"})
        assert call(url, "GET", "/")[0] == 404
        assert call(url, "POST", "/elsewhere", b"x" * 30_000_000)[0] == 404  # all of it is taken first


def call(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


GOOD = pack(PIXELS, PROMPTS)
TEXTS = json.dumps(PROMPTS)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "expected a safetensors file, got 0 bytes"),
        (b"\xff" * 64, "expected a safetensors file, got 64 bytes"),
        (GOOD[:-1], "expected a safetensors file"),
        (GOOD + b"x", "expected a safetensors file"),
        (save({"images": PIXELS}), "expected metadata"),
        (save({"images": PIXELS}, {"prompts": "[1"}), "expected metadata"),
        (save({"images": PIXELS}, {"prompts": "[" * 100_000}), "expected metadata"),
        (save({"images": PIXELS}, {"prompts": "[1, 2, 3, 4]"}), "expected prompts to be a JSON list of texts"),
        (save({"images": PIXELS}, {"prompts": '"aaaa"'}), "expected prompts to be a JSON list of texts"),
        (
            save({"images": PIXELS}, {"prompts": TEXTS, "fields": "[{}]"}),
            "expected fields to be a JSON list of 4 objects",
        ),
        (save({"images": PIXELS}, {"prompts": TEXTS, "fields": "[1, 2, 3, 4]"}), "expected fields to be a JSON list"),
        (save({"images": PIXELS}, {"prompts": TEXTS, "faults": "[" * 100_000}), "expected faults to be a JSON list"),
        (
            save({"images": PIXELS}, {"prompts": TEXTS, "fields": '[{"seed": []}, {}, {}, {}]'}),
            "prompt 1: field 'seed'",
        ),
        (save({"images": PIXELS[:3]}, {"prompts": TEXTS}), "got 3 images and 4 prompts"),
        (save({"images": IMAGES}, {"prompts": TEXTS}), "expected images uint8"),
        (save({"images": PIXELS[:, :1].contiguous()}, {"prompts": TEXTS}), "expected images uint8"),
        (save({"images": PIXELS[0]}, {"prompts": TEXTS}), "expected images uint8"),
        (save({"images": PIXELS[:0]}, {"prompts": "[]"}), "expected images uint8"),
        (save({"pictures": PIXELS}, {"prompts": TEXTS}), "expected one tensor, images, got pictures"),
        (save({"images": PIXELS, "x": IMAGES}, {"prompts": TEXTS}), "expected one tensor, images, got images, x"),
        (GOOD.replace(b'"U8"', b'"I8"'), "expected images uint8 (N, 3, H, W), got I8 [4, 3, 9, 7]"),
        (GOOD.replace(b"[4,3,9,7]", b"[4,3,9,8]"), "images do not fill them"),
        (GOOD.replace(b"[4,3,9,7]", b"[9,3,4,7]"), "got 9 images and 4 prompts"),
        (GOOD.replace(b"[4,3,9,7]", b"[4,3,-9,7]"[:9]), "expected"),
        (GOOD.replace(b"[0,756]", b"[1,757]"), "images do not fill them"),
        (GOOD.replace(b"[0,756]", b"[0,7e2]"), "images do not fill them"),
        ((5).to_bytes(8, "little") + b"[1,2]", "expected a safetensors file, got 13 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "expected a safetensors file, got 10 bytes"),
    ],
)
def test_malformed_requests_get_400_and_the_reason(body: bytes, says: str, sharpness: str) -> None:
    status, answer = call(sharpness, "POST", "/score", body)
    assert (status, says in answer["error"]) == (400, True), answer
    assert call(sharpness, "POST", "/score", GOOD)[0] == 200, "it goes on"


def test_lengths_that_lie() -> None:
    with running(RewardServer("sharpness", port=0, max_body=len(GOOD))) as url:
        assert call(url, "POST", "/score", GOOD)[0] == 200
        status, answer = call(url, "POST", "/score", GOOD + b"x")
        assert (status, f"at most {len(GOOD)} bytes" in answer["error"]) == (413, True)
        big = HttpReward(url, retries=0)
        with pytest.raises(RewardError, match="status 413: expected at most .*send fewer images at once"):
            big(torch.zeros(400, 3, 30, 30), ["a"] * 400)
        for length, status in (("-1", 400), ("many", 400), ("9" * 30, 400), ("9" * 18, 413), ("", 400)):
            headers = f"Content-Length: {length}\r\n" if length else ""
            raw = f"POST /score HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as line:
                line.sendall(raw)
                assert line.makefile("rb").readline().split()[1] == str(status).encode()


def test_a_reward_that_fails_is_told_apart_from_a_bad_prompt() -> None:
    def refuses(images: Tensor, prompts: list[str]) -> list[float]:
        if prompts[0] == "nonsense":
            raise PromptError("cannot read 'nonsense'")
        raise KeyError("no such weight")

    with running(RewardServer(CallableReward(refuses), port=0)) as url:
        remote = HttpReward(url, retries=1, backoff=0.01)
        with pytest.raises(RewardError, match="refused the batch: status 400: cannot read 'nonsense'"):
            remote(IMAGES[:1], ["nonsense"])
        with pytest.raises(RewardError, match=r"failed 2 times.*status 500: reward 'refuses' raised KeyError"):
            remote(IMAGES[:1], ["a"])


def test_an_address_that_is_taken() -> None:
    with running(RewardServer("sharpness", port=0)) as url, pytest.raises(OptionError, match="cannot listen on"):
        RewardServer("sharpness", port=int(url.rpartition(":")[2]))
    with pytest.raises(OptionError, match="cannot listen on 127.0.0.1:70000"):
        RewardServer("sharpness", port=70000)


# ---- servers that misbehave ----


@pytest.mark.parametrize("fault", [(503, b"busy"), (500, b""), None], ids=["503", "500", "cut line"])
def test_it_tries_again(fault: tuple[int, bytes] | None) -> None:
    good = (200, scores_of([1, 2.5, None, -3]))
    with answering(lambda i: fault if i < 2 else good) as (url, got):
        scores = HttpReward(url, backoff=0.01)(IMAGES, PROMPTS).tolist()
    assert [scores[0], scores[1], scores[3]] == [1, 2.5, -3]
    assert math.isnan(scores[2])
    assert [asked.path for asked in got] == ["/score"] * 3
    pixels, prompts = unpack(got[2].body)
    assert torch.equal(pixels, PIXELS)
    assert prompts == PROMPTS


def test_it_waits_longer_each_time_and_gives_up() -> None:
    times: list[float] = []

    def busy(i: int) -> tuple[int, bytes]:
        times.append(time.monotonic())
        return 503, b'{"error": "warming up"}'

    with answering(busy) as (url, got), pytest.raises(RewardError) as caught:
        HttpReward(url, retries=3, backoff=0.05)(IMAGES, PROMPTS)
    assert f"reward server {url} failed 4 times, at last with status 503: warming up" in str(caught.value)
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(waits) == 3
    for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True):
        assert least <= wait < least + 2


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match=rf"http://127.0.0.1:{port} failed 2 times.*ConnectionRefusedError.*running"):
        HttpReward(f"http://127.0.0.1:{port}", retries=1, backoff=0.01)(IMAGES, PROMPTS)


def test_one_that_never_answers_meets_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        before = time.perf_counter()
        with pytest.raises(RewardError, match=rf"{url}.* did not answer within 0.2 s"):
            HttpReward(url, deadline=0.2)(IMAGES, PROMPTS)
        assert time.perf_counter() - before < 5


def test_one_that_drips_meets_the_deadline() -> None:
    """Each byte comes in time, the answer does not."""
    done = threading.Event()

    def drip(server: socket.socket) -> None:
        line, _ = server.accept()
        with line:
            while not done.wait(0.05):
                line.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RewardError, match=rf"{url}.* did not answer within 0.2 s"):
            HttpReward(url, deadline=0.2)(IMAGES, PROMPTS)
        done.set()
        thread.join()


def test_the_deadline_of_a_search_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RewardError, match="did not answer within 0.1 s"):
            flowfast.rewards.load(url, deadline=0.1)(IMAGES, PROMPTS)
        monkeypatch.setattr("flowfast.rewards.http.DEADLINE", 0.15)  # without one
        with pytest.raises(RewardError, match="did not answer within 0.15 s"):
            flowfast.rewards.load(url)(IMAGES, PROMPTS)


def test_retries_end_at_the_deadline() -> None:
    before = time.perf_counter()
    with answering(lambda i: (503, b"busy")) as (url, got), pytest.raises(RewardError, match=url):
        HttpReward(url, deadline=0.3, retries=50, backoff=0.02)(IMAGES, PROMPTS)
    assert time.perf_counter() - before < 5
    assert 2 <= len(got) <= 5


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>hello</html>", r"expected \{\"scores\": \[4 numbers\]\}, got <html>hello</html>"),
        (b"", "got nothing"),
        (b"\xff\xfe", "expected"),
        (b"[1, 2, 3, 4]", "got .1, 2, 3, 4"),
        (b'{"scores": 3}', "expected"),
        (b'{"score": [1, 2, 3, 4]}', "expected"),
        (scores_of([1, 2, "3", 4]), "expected"),
        (scores_of([1, 2, True, 4]), "expected"),
        (scores_of([1, 2, 3]), "expected 4 scores, one an image, got 3"),
        (b"[" * 50_000, "expected"),
        (b"x" * 200_000, "got x{200}[.]{3};"),
    ],
)
def test_malformed_answers_are_named(body: bytes, says: str) -> None:
    with answering(lambda i: (200, body)) as (url, got), pytest.raises(RewardError, match=says) as caught:
        HttpReward(url, backoff=0.01)(IMAGES, PROMPTS)
    assert url in str(caught.value)
    assert len(got) == 1, "what is wrong stays wrong"


def test_a_refusal_is_final() -> None:
    refused = pytest.raises(RewardError, match="refused the batch: status 404: no such page")
    with answering(lambda i: (404, b"no such page")) as (url, got), refused:
        HttpReward(url + "/my/scorer?size=large")(IMAGES, PROMPTS)
    assert [asked.path for asked in got] == ["/my/scorer?size=large"]


# ---- addresses ----


def test_addresses() -> None:
    assert load("//host:8000").url == "http://host:8000"
    secure = load("https://host/a")
    assert secure.target == (True, "host", 443, "/a", None)
    assert (load("http://host").target.path, load("http://host/").target.path) == ("/score", "/score")
    assert load("http://host").name == "http://host"
    assert CONTENT_TYPE == "application/x-safetensors"


@pytest.mark.parametrize(
    "url", [None, "", "host:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"]
)
def test_addresses_that_cannot_be(url: str | None) -> None:
    with pytest.raises(OptionError, match="reward http: expected a URL"):
        load(url)
