"""The documents: every link leads somewhere, on GitHub and on the site that `make docs` builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import flowfast

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading, there are {', '.join(sorted(anchors(target)))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_on_github(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One: two, three\n```\n# no heading\n```\n")
    (tmp_path / "a.md").write_text("[x](b.md#one-two-three) [y](c.md) [z](b.md#no-heading)\n```\n[w](d.md)\n```\n")
    assert [each.split(":")[0] for each in broken(tmp_path / "a.md")] == ["c.md", "b.md#no-heading"]


class Loader(yaml.SafeLoader):
    """Takes tags as they are."""


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(each)


def test_pages_of_the_navigation_exist() -> None:
    nav = list(pages_of(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    assert [page for page in nav if not ((ROOT / "docs" / page).exists() or (ROOT / page).exists())] == []
    assert len(nav) == len(set(nav))


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    told = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    events = {"Event", "Failed", "Finished", "Found", "Partial", "Progress"}  # members of one module
    config = {"SearchConfig"}  # the fields of three others
    assert set(flowfast.__all__) - {"__version__", "rewards"} - events - config <= told
    assert all(name in page for name in events - {"Event"})


class Outside(HTMLParser):
    """What a page fetches from elsewhere as it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        link = given.get("src") or (given.get("href") if tag == "link" else None) or ""
        if link.startswith(("http", "//")) and given.get("rel") != "canonical":
            self.found.append(link)


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs flowfast[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "api.html", "CHANGELOG.html", "flux.py.html"} <= {page.name for page in pages}
    for page in pages:
        outside = Outside()
        outside.feed(page.read_text(encoding="utf-8"))
        assert outside.found == [], page.name
    api = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    assert all(f'id="flowfast.{name}"' in api for name in ("api.search", "engine.engine.Engine", "types.Sample.image"))


def test_the_build_refuses_a_broken_link_and_shows_pages_that_the_navigation_forgot(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs flowfast[docs]")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/hooks.py", tmp_path / "docs")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# Title\n")
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    small = {key: settings[key] for key in ("hooks", "exclude_docs", "strict", "validation")}
    small |= {"site_name": "x", "nav": ["index.md"], "theme": "mkdocs"}
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")]
    for text, code in (("[x](../CHANGELOG.md)", 0), ("[x](../CHANGES.md)", 1), ("[x](index.md#none)", 1)):
        (tmp_path / "docs/index.md").write_text(f"# Title\n\n{text}\n")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert code or ">Forgotten<" in re.sub(r"\s", "", (tmp_path / "site/index.html").read_text())
