"""The page in a real browser: a person types a prompt, watches, sees what came of it, and takes it along.

Needs a Chromium on PATH (Debian: `apt-get install chromium`) and `playwright`, which is in the extra `test`; without
them these tests are skipped, as on machines of CI that have no browser.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from PIL import Image
from torch import Tensor

from flowfast.errors import PromptError
from flowfast.rewards.server import config_of, listen, url_of
from tests.serve.conftest import PATIENCE, Pictures, Server

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'flowfast[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium")
expect = sync_api.expect
EXPECTED = "Failed to load resource"
"""What a browser's console says of an answer that is an error; the page shows it."""


class Picky(Pictures):
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if "bad" in prompts:
            raise PromptError("this model cannot draw 'bad'")
        return super().encode(prompts)


@contextmanager
def live(key: str | None = None, **options: Any) -> Iterator[tuple[Server, str]]:
    """A server on a socket, in a thread."""
    server, place = Server(key, flow=Picky(), **options), listen("127.0.0.1", 0)
    running = uvicorn.Server(config_of(server.app, lifespan="on"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while server.serving.phase == "loading" and time.monotonic() < end:
            time.sleep(0.005)
        assert server.serving.phase == "ready"
        yield server, url_of(place)
    finally:
        server.flow.free.set()
        running.should_exit = running.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def page_at(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page that asks nobody else, and on which nothing goes wrong."""
    wrong: list[str] = []
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if EXPECTED not in told.text else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else wrong.append(asked.url))
    page.goto(url)
    yield page
    assert wrong == []
    context.close()


def card(page: Any, prompt: str) -> Any:
    return page.locator("article", has=page.get_by_role("heading", name=prompt, exact=True))


def is_(found: Any, status: str) -> None:
    expect(found.locator(".status")).to_have_text(status, timeout=1000 * PATIENCE)


def counts(found: Any) -> dict[str, int]:
    """Points of the chart by kind."""
    points = found.locator(".chart path")
    return {each.get_attribute("class"): int(each.get_attribute("data-count")) for each in points.all()}


def taken(page: Any, found: Any, link: str) -> tuple[str, bytes]:
    with page.expect_download() as download:
        found.get_by_role("link", name=link).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_a_person_types_watches_and_takes_the_picture_along(browser: Any) -> None:
    with live() as (server, url), page_at(browser, url) as page:
        expect(page.get_by_label("Prompt")).to_be_focused()
        page.get_by_label("Method").select_option("svdd")
        page.get_by_label("Prompt").focus()
        server.flow.hold_at = server.flow.calls + 12  # in the middle of the search
        page.keyboard.type("<b>two</b> circles")
        page.keyboard.press("Enter")
        found = card(page, "<b>two</b> circles")
        is_(found, "running")
        expect(found.locator(".strip img").first).to_be_visible()
        expect(found.locator(".best img")).to_be_visible()
        seen, now = sum(counts(found).values()), float(found.locator("progress").get_attribute("value"))
        assert 0 < seen < 40 and 0 < now < 1
        expect(page.locator("#state")).to_have_text(re.compile("toy: [12] running, 0 waiting"))
        server.flow.free.set()
        is_(found, "finished")
        expect(found.locator(".plain figcaption")).to_have_text(re.compile("plain sample: reward -[0-9.]+, [0-9]+ NFE"))
        expect(found.locator(".best figcaption")).to_have_text(re.compile("best: reward -[0-9.]+, 40 NFE"))
        expect(found.locator(".strip img")).to_have_count(8)
        told = counts(found)
        assert sum(told.values()) == 40 and told["kept"] and told["dropped"] and told["best"] and not told["accepted"]
        assert "40 candidates" in found.locator(".chart").get_attribute("aria-label")
        assert len(found.locator("polyline.path").get_attribute("points").split()) > 3
        name, data = taken(page, found, "JSON")
        facts = json.loads(data)["flowfast"]
        assert name == "b-two-b-circles-seed-0.json" and facts["winner"]["key"] in found.locator(".facts").inner_text()
        name, data = taken(page, found, "Picture")
        (record,) = [each for each in server.serving.records._by_id.values() if each.points is not None]
        assert name == "b-two-b-circles-seed-0.png" and record.answer is not None
        assert data == base64.b64decode(record.answer["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(data)).size == (6, 4)
        found.get_by_role("button", name="Remove").click()
        expect(page.locator("article")).to_have_count(0)
        expect(page.locator("#empty")).to_be_visible()
        page.wait_for_timeout(100)
        assert not server.serving.records._by_id


def test_more_prompts_than_a_browser_has_connections_and_one_is_cancelled(browser: Any) -> None:
    prompts = [f"number {n}" for n in range(7)]
    with live() as (server, url), page_at(browser, url) as page:
        page.get_by_label("Plain sample").uncheck()
        page.get_by_label("Prompt").fill("\n\n".join(prompts))
        server.flow.hold_at = server.flow.calls + 2
        page.get_by_role("button", name="Search").click()
        expect(page.locator("article")).to_have_count(7)
        assert page.locator("article h2").all_inner_texts() == prompts
        for prompt in (prompts[0], prompts[6]):  # one that runs, one that waits
            card(page, prompt).get_by_role("button", name="Cancel").click()
            is_(card(page, prompt), "cancelled")
        server.flow.free.set()
        for prompt in prompts[1:6]:
            is_(card(page, prompt), "finished")
        assert server.serving.gate.inside == 0
        for prompt in (prompts[0], prompts[6]):
            is_(card(page, prompt), "cancelled")
            expect(card(page, prompt).get_by_role("button", name="Remove")).to_be_visible()


def test_what_is_refused_shows_why(browser: Any) -> None:
    with live(max_budget=50) as (_, url), page_at(browser, url) as page:
        for prompt, words in (("bad", "this model cannot draw 'bad'"), ("x" * 4001, "at most 4000")):
            page.get_by_label("Prompt").fill(prompt)
            page.keyboard.press("Enter")
            is_(card(page, prompt), "failed")
            expect(card(page, prompt).get_by_role("alert")).to_contain_text(words)
        page.get_by_label("Budget (NFE)").fill("51")
        page.get_by_role("button", name="Search").click()
        assert page.locator("article").count() == 2 and page.locator("#budget:invalid").count() == 1


def test_a_key_is_asked_for_kept_for_the_tab_and_stands_in_no_address(browser: Any) -> None:
    with live(key="right") as (_, url), page_at(browser, url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        expect(page.get_by_label("Prompt")).to_be_hidden()
        for key, words in (("wrong", "not the key of this server"), ("right", "")):
            page.get_by_label("API key of this server").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#key-error")).to_contain_text(words)
        page.get_by_label("Prompt").fill("a")
        page.keyboard.press("Enter")
        is_(card(page, "a"), "finished")
        page.reload()
        expect(page.get_by_label("Prompt")).to_be_visible()
        assert not any("right" in url or "wrong" in url for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_has_the_colours_that_are_asked_for(browser: Any, scheme: str) -> None:
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    with live() as (_, url), page_at(browser, url, **options) as page:
        prompt = "a word and" + "n" * 200
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_role("button", name="Search").click()
        is_(card(page, prompt), "finished")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (scheme == "light")
        heights = [each.bounding_box()["height"] for each in page.locator("button:visible").all()]
        assert min(heights) >= 40, "what a finger needs"


def test_the_keyboard_reaches_all_of_it_and_shows_where_it_is(browser: Any) -> None:
    with live() as (_, url), page_at(browser, url) as page:
        page.get_by_label("Prompt").fill("a")
        page.keyboard.press("Enter")
        is_(card(page, "a"), "finished")
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or page.evaluate("document.activeElement === document.body")
        there = {"method", "reward", "budget", "seed", "dice", "plain", "primary", "end", "strip", "picture", "json"}
        assert there <= reached
