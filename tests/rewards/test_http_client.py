"""What servers of others do: they refuse for now, send elsewhere, take less at once, ask for a key."""

from __future__ import annotations

import base64
import gzip
import json
import math
import socket
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import flowfast
from flowfast import rewards, secrets
from flowfast.config import make_config
from flowfast.errors import OptionError, RewardError
from flowfast.rewards.http import HttpReward, load, seconds_of, unpack
from flowfast.rewards.server import RewardServer
from tests.rewards.servers import answering

N = 3
IMAGES = torch.randint(0, 256, (N, 3, 5, 4), generator=torch.Generator().manual_seed(1)) / 255
PROMPTS = ["a", "b", "c"]
GOOD = (200, b'{"scores": [1, 2, 3]}')


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.forget()
    for name in (secrets.KEY, secrets.KEY + "_FILE"):
        monkeypatch.delenv(name, raising=False)


# ---- not now ----


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_it_is_asked_again(status: int) -> None:
    with answering(lambda i: (status, b"busy") if i < 2 else GOOD) as (url, got):
        assert HttpReward(url, backoff=0.01)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert len(got) == 3


@pytest.mark.parametrize(("status", "as_date"), [(408, False), (429, True), (503, False)])
def test_it_is_asked_again_when_it_says(status: int, as_date: bool) -> None:
    times: list[float] = []

    def busy(i: int) -> Any:
        times.append(time.time())
        after = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
        return GOOD if i else (status, b"", {"Retry-After": after})

    with answering(busy) as (url, _):
        assert HttpReward(url, backoff=0.01, retries=0)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert 0.95 <= times[1] - times[0] < 4


def test_a_server_that_says_when_is_asked_until_the_deadline() -> None:
    with answering(lambda i: (429, b"", {"Retry-After": "0"}) if i < 30 else GOOD) as (url, got):
        assert HttpReward(url, backoff=0.01, retries=2)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert len(got) == 31
    before = time.perf_counter()
    with answering(lambda i: (429, b"slow down", {"Retry-After": "3600"})) as (url, got):
        with pytest.raises(RewardError, match=f"{url} did not answer within 5 s: status 429: slow down"):
            HttpReward(url, deadline=5)(IMAGES, PROMPTS)
        assert len(got) == 1
    assert time.perf_counter() - before < 4, "it does not wait for what comes too late"


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("0", 0, 0),
        ("120", 120, 120),
        ("-3", 0, 0),
        ("9" * 400, math.inf, math.inf),
        ("9" * 5000, math.inf, math.inf),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_retry_after(text: str, least: float, most: float) -> None:
    found = seconds_of(text)
    assert found is not None
    assert least <= found <= most


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_retry_after_a_date(zone: str) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1)).replace("+0000", zone)
    found = seconds_of(in_an_hour)
    assert found is not None and 3000 <= found <= 3600


@pytest.mark.parametrize("text", [None, "", "soon", "-", "1e3", "nan", "Wed, 99 Oct 2015 07:28:00 GMT"])
def test_retry_after_that_says_nothing(text: str | None) -> None:
    assert seconds_of(text) is None


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_other_refusals_are_final(status: int) -> None:
    refused = pytest.raises(RewardError, match=f"refused the batch: status {status}: no")
    with answering(lambda i: (status, b"no", {"Retry-After": "0"})) as (url, got), refused:
        HttpReward(url, backoff=0.01)(IMAGES, PROMPTS)
    assert len(got) == 1


# ---- elsewhere ----


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("place", ["/v2/score?x=1", "v2/score?x=1", "{url}/v2/score?x=1"])
def test_it_follows_with_the_same_request(status: int, place: str) -> None:
    def answer(i: int) -> Any:
        return GOOD if i else (status, b"", {"Location": place.replace("{url}", url)})

    with answering(answer) as (url, got):
        assert load(url)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert [asked.path for asked in got] == ["/score", "/v2/score?x=1"]
    assert got[0].body == got[1].body
    assert got[0].headers["content-type"] == got[1].headers["content-type"]


def test_it_does_not_follow_for_ever() -> None:
    with answering(lambda i: (307, b"", {"Location": "/score"})) as (url, got):
        with pytest.raises(RewardError, match=f"{url} sent the request on 6 times"):
            load(url)(IMAGES, PROMPTS)
        assert len(got) == 6
    for place in ("ftp://host/score", "http://[::1/", "http://host:x/"):
        refused = pytest.raises(RewardError, match="sent the request to an address that cannot be")
        with answering(lambda i, place=place: (307, b"", {"Location": place})) as (url, _), refused:  # type: ignore[misc]
            load(url)(IMAGES, PROMPTS)
    for status in (303, 307):
        refused = pytest.raises(RewardError, match=f"refused the batch: status {status}")
        with answering(lambda i, status=status: (status, b"")) as (url, _), refused:  # type: ignore[misc]
            load(url)(IMAGES, PROMPTS)


def test_a_login_stays_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends elsewhere gets neither the login there nor what the place asks of the environment."""
    monkeypatch.setenv("FLOWFAST_MODEL_TOKEN", "hf_of_the_model")
    with answering(lambda i: GOOD) as (other, stolen):
        place = other.replace("http://", "http://${FLOWFAST_MODEL_TOKEN}@") + "/x?t=${FLOWFAST_MODEL_TOKEN}"
        with answering(lambda i: (307, b"", {"Location": place if i else "/there"})) as (url, got):
            load(url.replace("http://", "http://ann:pa55word@"))(IMAGES, PROMPTS)
    assert [("authorization" in asked.headers, asked.path) for asked in got] == [(True, "/score"), (True, "/there")]
    assert [("authorization" in asked.headers, "hf_of" in asked.path) for asked in stolen] == [(False, False)]


# ---- fewer at once ----


@pytest.mark.parametrize("most", [1, 3, 5])
def test_a_server_that_takes_fewer_gets_fewer(most: int) -> None:
    images = torch.arange(11.0).div(255).view(-1, 1, 1, 1).expand(11, 3, 2, 2)
    prompts = [str(i) for i in range(11)]

    def answer(i: int) -> Any:
        pixels, texts = unpack(got[i].body)
        if len(texts) > most:
            return 413, b"too large"
        values = [int(text) * 1000 + int(image.max()) for image, text in zip(pixels, texts, strict=True)]
        return 200, json.dumps({"scores": values}).encode()

    with answering(answer) as (url, got):
        remote = load(url)
        assert remote(images, prompts).tolist() == [1001 * i for i in range(11)]
        before = len(got)
        assert remote(images, prompts).tolist() == [1001 * i for i in range(11)]
        assert not any(len(unpack(asked.body)[1]) > most for asked in got[before:]), "it was learnt"


def test_one_image_that_is_too_large_is_refused() -> None:
    refused = pytest.raises(RewardError, match="refused 1 images at once: status 413: too large")
    with answering(lambda i: (413, b"too large")) as (url, got), refused:
        load(url)(IMAGES, PROMPTS)
    assert len(got) == 2


def test_a_refusal_before_the_body_has_come_is_read() -> None:
    """As proxies do: 413 for the head, and the line is closed to what comes after."""

    def refuse(server: socket.socket) -> None:
        for _ in range(2):
            line, _ = server.accept()
            with line:
                line.recv(1000)
                line.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                line.shutdown(socket.SHUT_WR)
                while line.recv(1 << 16):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=refuse, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(RewardError, match="refused 1 images at once: status 413"):
            load(f"http://127.0.0.1:{server.getsockname()[1]}")(torch.rand(2, 3, 300, 300), ["a", "b"])
        thread.join(10)


def test_a_request_has_a_bounded_size() -> None:
    """A round of 448 images of 1024 x 1024 is more than a server takes; these are of the same kind."""
    sizes = []

    def answer(i: int) -> Any:
        sizes.append(len(got[i].body))
        return 200, json.dumps({"scores": [0.0] * len(unpack(got[i].body)[1])}).encode()

    with answering(answer) as (url, got):
        assert load(url)(torch.zeros(1).expand(30, 3, 1024, 1024), ["a"] * 30).tolist() == [0.0] * 30
    assert len(sizes) == 3
    assert max(sizes) < 33 * 2**20


# ---- answers ----


def test_numbers_that_json_has_not() -> None:
    body = b'{"scores": [NaN, Infinity, -Infinity, null, 1' + b"0" * 400 + b", -1" + b"0" * 400 + b", 1e999, 2]}"
    with answering(lambda i: (200, body)) as (url, _):
        found = load(url)(torch.zeros(8, 3, 2, 2), ["a"] * 8).tolist()
    assert [math.isnan(x) for x in found] == [True, False, False, True] + [False] * 4
    assert found[1:3] + found[4:] == [math.inf, -math.inf, math.inf, -math.inf, math.inf, 2]


@pytest.mark.parametrize("how", ["chunked", "gzip", "deflate", "close"])
def test_ways_to_send_an_answer(how: str) -> None:
    body, headers = GOOD[1], {}
    if how == "chunked":
        body, headers = b"5\r\n" + body[:5] + b"\r\n10\r\n" + body[5:] + b"\r\n0\r\n\r\n", {"Transfer-Encoding": how}
        assert len(GOOD[1]) == 5 + 0x10
    elif how in ("gzip", "deflate"):
        body, headers = (gzip if how == "gzip" else zlib).compress(body), {"Content-Encoding": how}
    with answering(lambda i: (200, body, headers), "HTTP/1.0" if how == "close" else "HTTP/1.1") as (url, _):
        assert load(url)(IMAGES, PROMPTS).tolist() == [1, 2, 3]


def test_an_answer_that_was_cut_is_asked_for_again() -> None:
    with answering(lambda i: GOOD if i == 2 else (200, GOOD[1][:9], {"Content-Length": "21"})) as (url, got):
        assert HttpReward(url, backoff=0.01)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert len(got) == 3


def test_a_bomb_does_not_go_off() -> None:
    body = gzip.compress(b" " * 50_000_000)
    refused = pytest.raises(RewardError, match="expected .*scores")
    with answering(lambda i: (200, body, {"Content-Encoding": "gzip"})) as (url, _), refused:
        load(url)(IMAGES, PROMPTS)


# ---- connections ----


def test_a_connection_is_kept_and_one_that_was_closed_is_made_anew() -> None:
    def answer(i: int) -> Any:
        return None if i == 3 else GOOD

    with answering(answer, "HTTP/1.1") as (url, got):
        remote = HttpReward(url, retries=0)
        for _ in range(4):
            assert remote(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert len({asked.client for asked in got[:4]}) == 1
    assert len({asked.client for asked in got}) == 2


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with answering(lambda i: GOOD) as (url, _):
        assert load(url)(IMAGES, PROMPTS).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://[::1",
            "http://]",
            "http://[zz]/",
            "http://a..b/",
            "http://host:-1",
            "http://host:1e3",
            "http://host:0",
        ),
        *("http://ann:pa55word@", "http://ann:pa55word@host:port", "ann:pa55word@host", "https://ann:pa55word@[::1"),
    ],
)
def test_addresses_that_cannot_be(url: str) -> None:
    for text in (url, f"http:{url}", f"{url}*0.5+sharpness"):
        with pytest.raises(OptionError) as caught:
            rewards.load(text) if "://" in url else load(text)
        assert "pa55word" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="reward http: expected a URL such as"):
        load(url)


def test_addresses_of_every_kind() -> None:
    for url, target in (
        ("http://[::1]:8000/a", (False, "::1", 8000, "/a")),
        ("HTTPS://Host", (True, "host", 443, "/score")),
        ("Http://Host:81", (False, "host", 81, "/score")),
        ("http://host/a b/ü?q=ä b", (False, "host", 80, "/a%20b/%C3%BC?q=%C3%A4%20b")),
        ("http://host?q=a%20b", (False, "host", 80, "/score?q=a%20b")),
    ):
        assert load(url).target[:4] == target
        assert rewards.load(url).target[:4] == target


def test_numbers_that_cannot_be() -> None:
    for options in ({"retries": -1}, {"backoff": -0.1}, {"backoff": math.inf}, {"backoff": math.nan}):
        with pytest.raises(OptionError, match="expected retries and backoff of 0 or more"):
            HttpReward("http://host", **options)  # type: ignore[arg-type]


# ---- secrets ----


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


@pytest.mark.parametrize(
    ("login", "header"),
    [
        ("ann:pa55word", basic("ann:pa55word")),
        ("ann:p%40ss%2Fw:o%2Brd", basic("ann:p@ss/w:o+rd")),
        ("ann:pa+55*word", basic("ann:pa+55*word")),
        ("ann:pa@55word", basic("ann:pa@55word")),
        ("ann:pa 55 word", basic("ann:pa 55 word")),
        ("ann:wörter", basic("ann:wörter")),
        ("gh_token55", basic("gh_token55:")),
        ("ann:${FLOWFAST_MINE}", basic("ann:of the:variable")),
        ("${FLOWFAST_MINE}", basic("of the:variable")),
    ],
)
def test_a_login_is_sent_and_stands_nowhere(login: str, header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWFAST_MINE", "of the:variable")
    with answering(lambda i: GOOD) as (url, got):
        asked = url.replace("http://", f"http://{login}@")
        for text in (asked, f"http:{asked}", f"{asked}*0.5+{asked}/score*0.5"):
            remote = rewards.load(text)
            assert remote(IMAGES, PROMPTS).tolist() == [1, 2, 3]
            assert login not in remote.name + str(vars(remote).get("url", ""))
            assert remote.name.count(url) == text.count("127")
    assert {one.headers["authorization"] for one in got} == {header}


@pytest.mark.parametrize("how", ["variable", "variable with its line end", "file", "file of Windows"])
def test_a_key_is_sent(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if how.startswith("variable"):
        monkeypatch.setenv("FLOWFAST_REWARD_KEY", "k3y-of-mine" + "\n" * ("end" in how))
    else:
        mark, end = ("\ufeff", "\r\n") if "Windows" in how else ("", "\n")
        (tmp_path / "key").write_bytes(f"{mark}k3y-of-mine{end}".encode())
        monkeypatch.setenv("FLOWFAST_REWARD_KEY_FILE", str(tmp_path / "key"))
    with answering(lambda i: GOOD) as (url, got):
        assert load(url)(IMAGES, PROMPTS).tolist() == [1, 2, 3]
        assert load(url.replace("//", "//ann:pw55@"))(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert [asked.headers["authorization"] for asked in got] == ["Bearer k3y-of-mine", basic("ann:pw55")]


def test_keys_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("two words", "two\nlines", "schlüssel"):
        monkeypatch.setenv("FLOWFAST_REWARD_KEY", key)
        with pytest.raises(OptionError, match="FLOWFAST_REWARD_KEY: expected printable ASCII") as caught:
            load("http://host")
        assert key not in str(caught.value)
        with pytest.raises(OptionError, match="FLOWFAST_REWARD_KEY: expected printable ASCII"):
            RewardServer("sharpness", port=0)  # nobody could send it
    monkeypatch.delenv("FLOWFAST_REWARD_KEY")
    monkeypatch.setenv("FLOWFAST_REWARD_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(OptionError, match="cannot read .*none, which FLOWFAST_REWARD_KEY_FILE names: No such file"):
        load("http://host")
    (tmp_path / "none").write_text(" \n")
    for use in (lambda: load("http://host"), lambda: RewardServer("sharpness", port=0)):
        with pytest.raises(OptionError, match="none, which FLOWFAST_REWARD_KEY_FILE names, is empty"):
            use()


@pytest.mark.parametrize("place", ["?code=k3y55", "?CODE=k3y55&x=1", "#token=k3y55", "?x=1#access_token=k3y55"])
def test_other_places_of_a_key(place: str) -> None:
    remote = load("http://host/score" + place)
    assert "k3y55" not in remote.name + make_config({"reward": "http://host/score" + place}).reward
    assert ("k3y55" in remote.target.path) == ("#" not in place)


@pytest.mark.parametrize("password", ["pa55/word", "pa55?word", "pa55#word"])
def test_a_password_that_ends_the_host_is_refused_and_not_shown(password: str) -> None:
    with pytest.raises(OptionError, match="got 'host:80'; in a login write / [?] # as %2F %3F %23") as caught:
        load(f"http://ann:{password}@host:80")
    assert "pa55" not in str(caught.value)


def test_a_key_in_a_query_is_sent_as_it_was() -> None:
    with answering(lambda i: GOOD) as (url, got):
        remote = load(url + "/score?size=large&api_key=a%2Bb%26c&n=1")
        assert remote(IMAGES, PROMPTS).tolist() == [1, 2, 3]
        assert remote.name == url + "/score?size=large&api_key=***&n=1"
    assert got[0].path == "/score?size=large&api_key=a%2Bb%26c&n=1"


@pytest.mark.parametrize("status", [200, 401, 403, 404, 429, 500])
def test_an_answer_that_repeats_the_secret_does_not_show_it(status: int) -> None:
    """Some servers say what they were sent."""

    def answer(i: int) -> Any:
        return status, f"no: {got[i].headers['authorization']} {got[i].path} pa55word p%40ss5".encode()

    with answering(answer) as (url, got):
        remote = HttpReward(url.replace("//", "//ann:pa55word@") + "/s?token=p%40ss5", retries=0)
        with pytest.raises(RewardError) as caught:
            remote(IMAGES, PROMPTS)
    said = str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    for secret in ("pa55word", basic("ann:pa55word")[6:], "p@ss5", "p%40ss5"):
        assert secret not in said
    assert caught.value.__cause__ is None


def test_a_cut_leaves_no_half_of_a_secret() -> None:
    for before in range(185, 201):
        said = b"x" * before + b"pa55 word"
        with answering(lambda i, said=said: (400, said)) as (url, _), pytest.raises(RewardError) as caught:  # type: ignore[misc]
            load(url.replace("//", "//ann:pa55 word@"))(IMAGES, PROMPTS)
        assert "pa5" not in str(caught.value)


def test_an_error_is_one_line_of_text() -> None:
    """Whatever a server says, a terminal shows it as it stands."""

    def says(server: socket.socket) -> None:
        with server.accept()[0] as line:
            line.recv(100_000)
            line.sendall(b"220 mail\x1b[2J\x07 ready\r\n")

    with answering(lambda i: (400, b"\x1b[31mred\nand\0more\xff")) as (url, _), pytest.raises(RewardError) as caught:
        load(url)(IMAGES, PROMPTS)
    assert str(caught.value).endswith("status 400: \ufffd[31mred and\ufffdmore\ufffd")
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=says, args=(server,))
        thread.start()
        with pytest.raises(RewardError, match="BadStatusLine: 220 mail") as caught:
            HttpReward(f"http://127.0.0.1:{server.getsockname()[1]}", retries=0)(IMAGES, PROMPTS)
        thread.join()
    assert str(caught.value).isprintable()


def test_a_search_shows_no_secret() -> None:
    flow = flowfast.flow_from(lambda x, t, cond: x, (3, 4, 4), decode=lambda x: x.sigmoid())

    def answer(i: int) -> Any:
        return 200, json.dumps({"scores": [0.0] * len(unpack(got[i].body)[1])}).encode()

    with answering(answer) as (url, got):
        reward = url.replace("//", "//ann:pa55word@") + "*0.5+sharpness"
        result = flowfast.search(flow, ["a"], reward=reward, method="bon", budget=40)
    assert {one.headers["authorization"] for one in got} == {basic("ann:pa55word")}
    assert "pa55word" not in repr(result.config)
    assert result.config.reward == url.replace("//", "//${FLOWFAST_REWARD_LOGIN}@") + "*0.5+sharpness"
