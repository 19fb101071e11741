"""Every notebook, opened in JupyterLab and run there, shows its figures and no error, and nothing is cut off."""

import json
import re

import pytest
from lab_page import settled_screenshot

from nbkit import paths

NAMES = sorted(path.stem for path in (paths.ROOT / "notebooks").glob("*.ipynb"))
SLACK = 2  # pixels that rounding may cost
SMALLER = {  # what is timed is not stored, and would take minutes
    "09_methods_compared": {"n_timed": 2},
    "10_throughput": {
        "models": ["miniworld-gpt2@6"], "n_texts": 5, "batch_sizes": [1, 4], "repeats": 1, "n_screened": 8,
        "n_growth": 8, "growth_batch": 4, "moment_tokens": 1000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_everything(name, open_notebook, server):
    shown = open_notebook(name, parameters=SMALLER.get(name))
    shown.run_all()
    cells = shown.cells()
    assert [text for cell in cells for text in cell["tracebacks"]] == []
    assert [cell["prompt"] for cell in cells if cell["is_code"] and not re.search(r"\d", cell["prompt"])] == []

    notebook = json.loads((server.notebooks / f"{name}.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) if cell["cell_type"] == "code" else "" for cell in notebook["cells"]]
    drawing = [n for n, source in enumerate(sources) if re.search(r"\bplt\.(subplots|figure)\(", source)]
    assert drawing, "no cell draws"
    for n in drawing:
        assert cells[n]["images"] and all(min(size) > 0 for size in cells[n]["images"]), f"cell {n} shows no image"
    for figure in re.findall(r'save_figure\(\w+, "(\w+)"', "\n".join(sources)):
        assert (server.figures / f"{figure}.png").is_file()

    settled_screenshot(shown.page, name)
    lacking = [(n, *found) for n, cell in enumerate(cells) for found in cell["lacking"]]
    lacking += [("page", *found) for found in shown.lacking()]
    assert [found for found in lacking if found[-1] > SLACK] == [], "too wide for a window of 1280 pixels"
