"""What mkdocs needs to know of this repository: pages link to files outside of docs/, as they must on GitHub. Texts and
sources among these become pages of the site, pictures files of it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
"""Of the root, which the navigation has."""
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".json": "json", ".jsonl": "json", ".sh": "sh"}
MOST = 200_000
"""Bytes of a file that is shown; of a larger one the first of them."""


def place_of(page: str) -> str:
    """Where a page of the site stands in the repository."""
    return page if page in PAGES else page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"


def page_of(path: str) -> str:
    """The page or file of the site for a file of the repository."""
    if path in PAGES:
        return path
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if path.endswith((".md", ".png")) else f"files/{path}.md"


def target_of(page: str, link: str) -> str:
    """The file of the repository that a link of a page leads to, of a folder its README; "" where there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place_of(page)), link))
    if (ROOT / path).is_dir():
        path += "/README.md"
    return path if (ROOT / path).is_file() else ""


def links_of(page: str, text: str) -> set[str]:
    """Files of the repository, outside of docs/, that a page links to."""
    found = {target_of(page, link) for _, link, _ in LINK.findall(FENCE.sub("", text))}
    return {path for path in found if path and not path.startswith("docs/")}


def shown(path: str) -> str:
    """The Markdown of a file's page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    head, fence = f"---\nhide: [navigation, toc]\n---\n# {path}\n\n", "`" * 4
    return f"{head}{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text[:MOST]}\n{fence}\n"


def named(nav: Any) -> set[str]:
    """Pages that a navigation has."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*(named(each) for each in (nav.values() if isinstance(nav, dict) else nav)))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation leaves out come last."""
    known = named(config.nav)
    if left := sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in known):
        config.nav = [*(config.nav or []), {"More": left}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in PAGES:
        files.append(File.generated(config, page, content=(ROOT / page).read_text(encoding="utf-8")))
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        for path in sorted(links_of(*waiting.pop())):
            page = page_of(path)
            if files.get_file_from_path(page):
                continue
            content = (ROOT / path).read_bytes() if path.endswith(".png") else shown(path)
            files.append(File.generated(config, page, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            if isinstance(content, str):
                waiting.append((page, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        path = target_of(here, link)
        if not path:
            return found[0]  # the strict build says so
        return before + posixpath.relpath(page_of(path), posixpath.dirname(here) or ".") + after

    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[at:])])
