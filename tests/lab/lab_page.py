"""A notebook in JupyterLab in a browser: run it, wait for it, look at it.

    shown = open_notebook("05_key_distributions")       # the fixture; size=LARGE, theme="dark"
    shown.run_all()
    shown.page.get_by_role("button", name="Edit").click()
    shown.wait_idle()
    settled_screenshot(shown.page, "05-after")          # runs/lab/05-after.png

What it reads from the page is in look.js.
"""

import time
from pathlib import Path

from playwright.sync_api import Locator, Page, TimeoutError, expect

from nbkit import paths

SMALL, LARGE = {"width": 1280, "height": 800}, {"width": 1920, "height": 1080}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
LOOK = Path(__file__).with_name("look.js")
START_SECONDS = 120  # for Lab to show a notebook, and its kernel to answer
RUN_SECONDS = 600  # for all cells of a notebook, on a busy machine
SETTLE_SECONDS = 30


class LabPage:
    """One notebook, opened in a page of playwright's that has LOOK."""

    def __init__(self, page: Page, url: str, n_cells: int):
        self.page = page
        page.goto(url, timeout=START_SECONDS * 1000)
        expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(n_cells, timeout=START_SECONDS * 1000)
        self.wait_idle(START_SECONDS)

    def wait_idle(self, seconds: float = RUN_SECONDS) -> None:
        """Waits until the kernel has nothing to do.

        A click reaches it a moment later: wait for what the click shows first.
        """
        status = self.page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
        status.wait_for(state="attached", timeout=seconds * 1000)

    def run_all(self, seconds: float = RUN_SECONDS) -> None:
        """Runs all cells by the menu, and waits until they have run or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            self.page.wait_for_function("() => look.ran()", timeout=seconds * 1000)
        except TimeoutError:
            raise AssertionError(
                f"not all cells ran within {seconds:g} s; with the rows that `make figures` stores it is quick. "
                f"The page: {self.page.evaluate('() => look.progress()')}"
            ) from None

    def cells(self) -> list[dict]:
        """All cells in order: is_code, prompt; tracebacks as texts; images as [width, height] of themselves;
        lacking as [what, pixels that it is wider than its place], of outputs and whatever scrolls in them.
        """
        self.page.wait_for_function("() => [...document.images].every(image => image.complete)")
        return self.page.evaluate("() => look.cells()")

    def lacking(self) -> list[list]:
        """[what, pixels that it is wider than its place] of the page and the notebook in it."""
        return self.page.evaluate("() => look.page_lacking()")


def settled_screenshot(shown: Page | Locator, name: str) -> Path:
    """Stores what is shown as runs/lab/NAME.png once two pictures in a row are the same; returns the path.

    Raises AssertionError when that does not happen in half a minute.
    """
    path = paths.RUNS / "lab" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page = shown.page if isinstance(shown, Locator) else shown
    before, until = None, time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < until:
        page.evaluate("() => look.drawn()")
        now = shown.screenshot(animations="disabled")
        if now == before:
            path.write_bytes(now)
            return path
        before = now
    raise AssertionError(f"{name}: the picture still changes after {SETTLE_SECONDS} s")
