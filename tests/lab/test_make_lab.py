"""`make lab` opens the explorer, whoever is at the keyboard and whatever they have set."""

from playwright.sync_api import expect

from nbkit import paths


def test_it_opens_the_explorer(new_page, server):
    page = new_page()
    page.goto(f"{server.url}/?token={server.token}")
    tab = page.locator(".lm-TabBar-tab.lm-mod-current").get_by_text("00_explore_one_edit.ipynb")
    expect(tab).to_be_visible(timeout=120_000)
    assert (paths.ROOT / "notebooks" / "00_explore_one_edit.ipynb").is_file()
