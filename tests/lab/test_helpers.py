"""What the other tests of this folder rely on: a page that is wrong is seen to be wrong, in either theme and size."""

import nbformat
import pytest
from lab_page import LARGE, SMALL, settled_screenshot

CELLS = [
    "1 + 1",
    "from IPython.display import HTML\nHTML('<div style=\"width: 3000px\">wide</div>')",
    "import matplotlib.pyplot as plt\nplt.subplots();",
    "1 / 0",
    "2",
]


@pytest.mark.parametrize(("size", "theme"), [(SMALL, "light"), (LARGE, "dark")], ids=["light", "dark"])
def test_what_is_wrong_is_seen(size, theme, open_notebook, server):
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), server.notebooks / "w.ipynb")
    shown = open_notebook("w", size=size, theme=theme)
    shown.run_all()
    number, wide, drawn, failed, behind = shown.cells()
    assert "ZeroDivisionError" in failed["tracebacks"][0] and "]" in failed["prompt"]
    assert behind["prompt"] == "[ ]:"
    assert max(pixels for _, pixels in wide["lacking"]) > 500 and max(pixels for _, pixels in number["lacking"]) == 0
    assert number["tracebacks"] == number["images"] == [] and min(drawn["images"][0]) > 0
    assert shown.page.locator(f"body[data-jp-theme-light={'true' if theme == 'light' else 'false'}]").count() == 1
    path = settled_screenshot(shown.page, f"w-{theme}")
    assert path.read_bytes()[16:24] == b"".join(size[side].to_bytes(4) for side in ("width", "height"))
