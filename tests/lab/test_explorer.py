"""The explorer as a person uses it: what the page says is what the functions return, and nothing does harm."""

import re

import nbformat
import pytest
from lab_page import LARGE, SMALL, settled_screenshot
from playwright.sync_api import expect

import nbkit
from nbkit.models.prompts import subject_kind
from nbkit.panels.outcome import numbers

WAIT = 120_000  # milliseconds, for one thing that was asked for on the page
SHORT = """import nbkit

nbkit.panels.explore("miniworld-gpt2", n_requests=100)"""


@pytest.fixture(scope="module")
def lm():
    return nbkit.load("miniworld-gpt2")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def cell_of(page, row, table="The edit in numbers"):
    """The last cell of a row of one of the explorer's tables."""
    return page.locator("table", has_text=table).locator("tr", has=page.get_by_role("rowheader", name=row, exact=True))


def numbers_in(text):
    return [
        float(number.replace(",", "").replace("−", "-")) for number in re.findall(r"−?[\d,]+\.?\d*(?:e[+-]\d+)?", text)
    ]


def check_page(page, outcome):
    """Each number that the page shows is that of an outcome computed here."""
    for name, value in numbers(outcome).items():
        if name in ("outcome", "seconds of the edit"):
            continue
        shown = numbers_in(cell_of(page, name).locator("td").inner_text())
        assert shown == pytest.approx(value if isinstance(value, tuple) else [value], rel=2e-3, abs=1e-6), name


def at_top(locator):
    """Scrolls the page so that this is its first line."""
    locator.evaluate("one => one.scrollIntoView({block: 'start'})")


def edited(page, settings):
    """Presses Edit, and waits for the outcome with these settings' title."""
    button(page, "Edit").click()
    expect(page.get_by_text(f"{settings}: “")).to_be_visible(timeout=WAIT)


def test_a_person_edits_a_fact(open_notebook, lm):
    texts = nbkit.read_texts("miniworld", limit=50)
    request = [one for one in nbkit.read_requests("miniworld") if subject_kind(lm, one) == "one-token first"][3]
    shown = open_notebook("00_explore_one_edit")
    page = shown.page
    shown.run_all()

    page.get_by_role("searchbox").fill(f"{request.subject} {request.case_id}")
    page.get_by_role("cell", name=str(request.case_id), exact=True).click()
    expect(page.get_by_text(f"{request.text} → {request.target_new}").first).to_be_visible(timeout=WAIT)

    state = page.locator(".nbkit-state")
    unedited = state.inner_text()
    assert "unedited" in unedited and lm.hash[:12] in unedited
    edited(page, "ROME")
    rome = nbkit.one_edit(lm, request, texts, end="\n")
    assert rome.collapsed()
    expect(page.get_by_text("The edit breaks the model")).to_be_visible()
    check_page(page, rome)
    button(page, "Pin").click()

    page.get_by_label("Keys", exact=True).select_option("C-ROME (prefixed)")
    edited(page, "C-ROME")
    consistent = nbkit.one_edit(lm, request, texts, key_mode="prefixed", end="\n")
    assert not consistent.collapsed()
    expect(page.get_by_text("The model survives the edit")).to_be_visible()
    check_page(page, consistent)
    at_top(button(page, "Edit"))
    settled_screenshot(page, "explorer")
    button(page, "Pin").click()
    compared = page.locator("table", has_text="Pinned edits")
    expect(compared.get_by_role("columnheader", name="2. C-ROME")).to_be_visible(timeout=WAIT)
    at_top(button(page, "Outcome"))
    settled_screenshot(page, "explorer-compared")

    button(page, "Keep in the model").click()
    expect(state).to_contain_text("carries 1 edit", timeout=WAIT)
    with nbkit.applied(lm, consistent.edit):
        assert lm.hash != lm.base_hash
    button(page, "Undo all").click()
    expect(state).to_have_text(unedited, timeout=WAIT)

    page.get_by_label("prompt with {}", exact=True).fill("Ann plays the")
    page.get_by_label("subject", exact=True).fill("Ann")
    page.get_by_label("new target", exact=True).fill("drum")
    button(page, "Take this request").click()
    expect(page.get_by_role("alert").filter(has_text="{}").first).to_be_visible(timeout=WAIT)
    page.get_by_label("prompt with {}", exact=True).fill("{} plays the")
    button(page, "Take this request").click()
    expect(page.get_by_text("Ann plays the → drum").first).to_be_visible(timeout=WAIT)

    button(page, "Sweep over layers").click()
    expect(page.get_by_role("rowheader", name="layer 1", exact=True)).to_be_visible(timeout=WAIT)
    button(page, "Cancel").click()
    expect(page.get_by_text("was cancelled at")).to_be_visible(timeout=WAIT)
    assert 2 <= page.get_by_role("rowheader", name=re.compile("layer [0-9]+")).count() < lm.n_layers
    expect(state).to_have_text(unedited)

    button(page, "Code").click()
    expect(page.locator("pre", has_text="nbkit.layer_sweep(lm, request")).to_be_visible()
    assert not [text for cell in shown.cells() for text in cell["tracebacks"]]


def test_a_click_while_cells_run_does_no_harm(open_notebook):
    shown = open_notebook("00_explore_one_edit")
    page = shown.page
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    button(page, "Edit").click(timeout=WAIT)
    expect(page.get_by_text("The edit in numbers")).to_be_visible(timeout=WAIT)
    page.wait_for_function("() => look.ran()", timeout=WAIT)
    assert not [text for cell in shown.cells() for text in cell["tracebacks"]]


@pytest.mark.parametrize(("size", "theme"), [(SMALL, "dark"), (LARGE, "light")])
def test_it_works_by_keyboard_and_fits(size, theme, open_notebook, server):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHORT)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(notebook, server.notebooks / "short.ipynb")
    shown = open_notebook("short", size=size, theme=theme)
    page = shown.page
    shown.run_all()
    request = nbkit.read_requests("miniworld", limit=10)[7]
    page.get_by_label("Go to case", exact=True).focus()
    page.keyboard.type(str(request.case_id))
    page.keyboard.press("Enter")
    expect(page.get_by_text(f"{request.text} → {request.target_new}").first).to_be_visible(timeout=WAIT)
    button(page, "Edit").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # a second one while it runs
    expect(page.get_by_text("The edit in numbers")).to_be_visible(timeout=WAIT)
    button(page, "Compare").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing is pinned")).to_be_visible(timeout=WAIT)
    button(page, "Outcome").press("Enter")
    expect(page.get_by_text("The edit in numbers")).to_be_visible(timeout=WAIT)
    settled_screenshot(page, f"explorer-{theme}-{size['width']}")
    assert [found for cell in shown.cells() for found in cell["lacking"] if found[-1] > 2] == []
