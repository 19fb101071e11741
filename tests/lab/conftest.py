"""A JupyterLab server and a browser for these tests; `open_notebook` opens a notebook there.

They run with `make test-lab`, not with `make test`: they need a Chromium, and are quick where `make figures` has run.
"""

import itertools
import json
import os
import shutil

import papermill.parameterize
import pytest
from lab_page import LOOK, SMALL, THEMES, LabPage
from lab_server import LabServer
from playwright.sync_api import sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = "no browser{}: install chromium (Debian/Ubuntu: apt-get install chromium; or set NBKIT_BROWSER to one)"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",  # which is small in a container
)  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    named = os.environ.get("NBKIT_BROWSER")
    program = next(filter(None, map(shutil.which, [named] if named else PROGRAMS)), None)
    if program is None:
        pytest.exit(NO_BROWSER.format(f" at NBKIT_BROWSER={named}" if named else ""), returncode=1)
    with sync_playwright() as playwright:
        # scroll bars take their room, as on a screen
        options = {"args": ARGUMENTS, "ignore_default_args": ["--hide-scrollbars"]}
        browser = playwright.chromium.launch(executable_path=program, **options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(browser, tmp_path_factory):
    with LabServer(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture
def new_page(browser, server):
    """Opens a browser that has seen nothing yet: new_page(size=SMALL, theme="light"); closed after the test."""
    contexts = []

    def new(size=SMALL, theme="light"):
        server.set("@jupyterlab/apputils-extension:themes", {"theme": THEMES[theme]})
        contexts.append(browser.new_context(viewport=size))
        contexts[-1].add_init_script(path=LOOK)
        return contexts[-1].new_page()

    yield new
    for context in contexts:
        context.close()
    server.end_kernels()


_workspaces = itertools.count()


@pytest.fixture
def open_notebook(new_page, server):
    """Opens a notebook by its file's name without .ipynb, waits for its kernel, and returns its LabPage.

    open_notebook(name, size=SMALL | LARGE, theme="light" | "dark", parameters={...}). The copy of the notebook gets the
    parameters. Each has a workspace of its own, or Lab would open those of earlier tests beside it.
    """

    def opened(name, size=SMALL, theme="light", parameters=None):
        path = server.notebooks / f"{name}.ipynb"
        if parameters:
            notebook = papermill.iorw.load_notebook_node(str(path))
            papermill.iorw.write_ipynb(papermill.parameterize.parameterize_notebook(notebook, parameters), str(path))
        n_cells = len(json.loads(path.read_text(encoding="utf-8"))["cells"])
        place = f"lab/workspaces/test-{next(_workspaces)}/tree/notebooks/{path.name}"
        return LabPage(new_page(size, theme), f"{server.url}/{place}?token={server.token}", n_cells)

    return opened
