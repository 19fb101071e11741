"""`make lab` opens the explorer, whoever is at the keyboard and whatever they have set."""

import nbformat
from lab_page import LabPage


def test_it_opens_the_explorer(new_page, server):
    name = "00_explore_one_edit.ipynb"
    cells = nbformat.read(server.notebooks / name, nbformat.NO_CONVERT)["cells"]
    shown = LabPage(new_page(), f"{server.url}/?token={server.token}", len(cells))
    assert shown.page.locator(".lm-TabBar-tab.lm-mod-current").get_by_text(name).is_visible()
