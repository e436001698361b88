"""The pictures of the page of `flowfast serve` in docs/serving.md, from a real server and a real browser:

python -m bench.page [FOLDER]     (default: docs/images; needs Chromium on PATH and playwright)
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

WIDE = {"viewport": {"width": 1160, "height": 800}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
PROMPT, OTHER = "three red circles and one blue square", "two yellow crosses and a green triangle"
MOST_MS = 300_000


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of `scenes`."""
    command = [sys.executable, "-m", "flowfast.cli", "serve", "--model", "scenes", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[2].rstrip(";").removesuffix("v1")
            assert server.stdout.readline() == "ready\n"
            yield url
        finally:
            server.terminate()


def finished(page: Any) -> None:
    """Two searches, one of them by default, each with its plain sample."""
    for method, prompt in (("auto", OTHER), ("svdd", PROMPT)):
        page.get_by_label("Method").select_option(method)
        page.get_by_label("Prompt").fill(prompt)
        page.keyboard.press("Enter")
        card = page.locator("article").first
        card.locator("xpath=self::*[@data-status='finished']").wait_for()
        card.locator(".plain img").wait_for()
    page.get_by_label("Prompt").blur()


def running(page: Any) -> None:
    page.get_by_label("Method").select_option("svdd")
    page.get_by_label("Budget (NFE)").fill("200")
    page.get_by_label("Prompt").fill(PROMPT)
    page.keyboard.press("Enter")
    page.locator(".strip li").nth(3).wait_for()
    page.locator("article").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('article').scrollIntoView()")


def main(folder: Path) -> None:
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, options, do in (("page_phone", PHONE, running), ("page", WIDE, finished)):
            page = browser.new_context(**options).new_page()
            page.set_default_timeout(MOST_MS)
            page.goto(url)
            page.locator("#ask").wait_for()
            do(page)
            picture = Image.open(io.BytesIO(page.screenshot(full_page=do is finished)))
            picture.save(folder / f"{name}.webp", quality=82, method=6)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
