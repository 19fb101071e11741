"""The ledger as a widget: it shows what `lm.history()` says, undoes bit for bit, and refuses in words."""

import threading

import pytest
import torch

from nbkit import panels
from nbkit.edits.door import in_use
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.panels.fragments import shown
from nbkit.panels.jobs import jobs_of
from nbkit.records.requests import EditRequest


def edit_of(lm, layer, subject):
    generator = torch.Generator().manual_seed(layer)
    update = LowRank(torch.randn(32, 1, generator=generator), torch.randn(1, 48, generator=generator))
    return Edit({lm.weight_name(layer): update}, (EditRequest("{} is in", subject, "Krela"),), "rome")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """A job gives up at once on an open `with applied`, as it else does after some seconds."""
    monkeypatch.setattr("nbkit.edits.editable.OVERLAY_SECONDS", 0)


@pytest.fixture
def edited(tiny):
    for layer, subject in enumerate(["Ann", "<b>Vouda</b>"]):
        tiny.apply(edit_of(tiny, layer, subject))
    return tiny


def press(view, button):
    button.click()
    view.jobs.wait()


def test_it_shows_the_history_and_whose_weights_these_are(edited):
    view = panels.ledger(edited)
    history = edited.history()
    for value in [
        *history["update_norm"].map(shown),
        *history["weights"],
        "Ann is in",
        "&lt;b&gt;Vouda&lt;/b&gt; is in",
    ]:
        assert value in view.state.value
    assert "not those of the unedited model" in view.state.value and edited.hash[:16] in view.state.value


def test_undoing_gives_the_unedited_bits_back_and_tells_who_follows(edited):
    unedited, view, heard = edited.base_hash, panels.ledger(edited), []
    view.on_change(lambda: heard.append(edited.n_applied))
    press(view, view.undo_last)
    assert edited.history()["request"].tolist() == ["Ann is in"] and "Vouda" not in view.state.value
    edited.apply(edit_of(edited, 2, "You"))
    press(view, view.undo_all)
    assert heard == [1, 0] and edited.hash == unedited
    assert "No edit is applied" in view.state.value and "bit for bit" in view.state.value
    assert "2 edits are undone" in view.notice.value


def test_what_cannot_be_undone_is_told_in_words_and_changes_nothing(edited, make_lm):
    view, before = panels.ledger(edited), edited.hash
    with applied(edited, edit_of(edited, 2, "You")):
        press(view, view.undo_last)
        assert 'role="alert"' in view.notice.value and "in use by the thread" in view.notice.value
        view.refresh()
        assert "1 of the edits in them is of an open" in view.state.value
    assert edited.hash == before and edited.n_applied == 2
    view.again.click()
    assert view.notice.value == ""
    empty = panels.ledger(make_lm("gpt2", seed=1))
    for button in (empty.undo_last, empty.undo_all):
        press(empty, button)
        assert "cannot undo 1" in empty.notice.value


def test_an_undo_does_not_run_beside_another_job(edited):
    view, before = panels.ledger(edited), edited.hash
    began, go_on = threading.Event(), threading.Event()

    def work(step):
        with in_use(edited):
            began.set()
            go_on.wait(10)

    jobs_of(edited).start("layers", work, lambda found: None, lambda error: None)
    began.wait(10)
    view.undo_all.click()
    assert "“layers” is at work" in view.notice.value
    view.refresh()
    assert "“layers” is at work on the model" in view.state.value and "Ann is in" in view.state.value
    go_on.set()
    view.jobs.wait()
    assert edited.hash == before
