"""The page at /: what is served of it, and what it may not contain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import flowfast.serve.page
from flowfast.serve.page import FILES
from tests.serve.conftest import served

FOLDER = Path(flowfast.serve.page.__file__).parent
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js"))
MOST_LINES = 399
POLICY = "default-src 'self'; img-src 'self' data: blob:;"
# What runs text as code or markup, or asks another server; the name of SVG is no address.
FORBIDDEN = (
    r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|\son\w+=\"|\sstyle=|localStorage|"
    r"[?&]key=|https?://(?!www\.w3\.org/2000/svg)|@import|@font-face"
)


@pytest.mark.parametrize("path", sorted(FILES))
def test_each_file_comes_with_its_type_and_the_policy(shared: TestClient, path: str) -> None:
    name, kind = FILES[path]
    answer = shared.get(path)
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-security-policy"].startswith(POLICY)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = shared.head(path)
    assert head.status_code == 200 and not head.content
    assert shared.post(path).status_code == 405


def test_all_of_it_is_served_and_short() -> None:
    assert {name for name, _ in FILES.values()} == {path.name for path in SOURCES}
    lines = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert sum(lines.values()) <= MOST_LINES, f"the page has {lines}, at most {MOST_LINES} together: cut it"
    assert max(len(line) for path in SOURCES for line in path.read_text().splitlines()) <= 160


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_it_runs_text_or_asks_another_server(path: Path) -> None:
    assert re.findall(FORBIDDEN, path.read_text()) == []


@pytest.mark.parametrize("slip", ["a.innerHTML = x", '<p style="x">', 'fetch("https://a.b")', '<a onclick="x">'])
def test_what_would_slip_in_is_found(slip: str) -> None:
    assert re.search(FORBIDDEN, slip)


def test_with_a_key_the_page_comes_without_and_what_it_asks_for_does_not() -> None:
    with served(key="k") as (client, _):
        assert {client.get(path).status_code for path in FILES} == {200}
        assert client.get("/v1/info").status_code == 401


def test_a_server_may_have_none() -> None:
    with served(page=False) as (client, _):
        assert {client.get(path).status_code for path in FILES} == {404}
        assert client.get("/v1/info").status_code == 200
