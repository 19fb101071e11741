"""The explorer without a browser: its buttons do what the functions do, and it says what they return."""

import re
import threading
import time

import pytest
import torch

import nbkit
from nbkit.edits.door import verb
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError
from nbkit.panels import fragments
from nbkit.panels.jobs import Cancelled, Job, Jobs, jobs_of
from nbkit.panels.settings import SettingsForm
from nbkit.records import bars
from nbkit.records.requests import EditRequest

REQUESTS = [
    EditRequest("{} plays the", subject, target, "harp", case_id, ("In Krela " + subject + " plays the",))
    for case_id, (subject, target) in enumerate([("Ann", "drum"), ("Danielle Darrieux", "song"), ("You", "chess")])
]


@pytest.fixture
def explorer(tiny, texts, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    return nbkit.panels.explore(tiny, REQUESTS, str(file), choose=0, layer=1, v_num_grad_steps=3)


def done(explorer):
    waited = None
    while waited is not explorer.jobs:  # those of another model, once that is loaded
        waited = explorer.jobs
        waited.wait(60)
    assert waited.current is None


def test_an_edit_on_the_page_is_that_of_the_verb(explorer, texts):
    lm, before = explorer.lm, explorer.lm.hash
    explorer.edit_button.click()
    done(explorer)
    [edit] = nbkit.edit(lm, [REQUESTS[0]], layer=1, v_num_grad_steps=3)
    after = nbkit.perplexity(lm, texts, edits=[edit])[0]
    assert explorer.outcome.edit.norm() == edit.norm() and lm.hash == before
    page = explorer.views.outcome.value
    assert f"→ {fragments.shown(float(after))}</td>" in page
    for value in (edit.info["signed_denominator"], edit.info["numerator"], edit.norm()):
        assert f">{fragments.shown(float(value))}</td>" in page
    assert "<img" in page and "differ are struck out" in page


def test_pinned_edits_stand_side_by_side(explorer):
    explorer.edit()
    done(explorer)
    explorer.pin()
    explorer.settings.key_mode.value = "prefixed"
    explorer.edit()
    done(explorer)
    explorer.pin()
    explorer.pin()
    assert [name.split(",")[0] for name in explorer.pinned] == ["1. ROME", "2. C-ROME"]
    assert explorer.views.chosen.value == "Compare"
    page = explorer.views.compared.value
    norms = [one.edit.norm() for one in explorer.pinned.values()]
    assert norms[0] != norms[1] and all(f">{fragments.shown(norm)}</td>" in page for norm in norms)
    explorer.unpin_button.click()
    assert "Nothing is pinned" in explorer.views.compared.value


def test_kept_edits_stack_and_are_undone(explorer):
    lm, before = explorer.lm, explorer.lm.hash
    for number in range(2):
        explorer.browser.choose(number)
        explorer.edit()
        done(explorer)
        explorer.keep()
        done(explorer)
        assert lm.n_applied == number + 1 and f"carries {number + 1} edit" in explorer.state.value
    explorer.keep()
    assert "in the model already" in explorer.words.value and lm.n_applied == 2
    explorer.ledger.undo_all.click()
    done(explorer)
    assert lm.hash == before and "unedited" in explorer.state.value
    assert str(explorer.code).endswith("lm.undo(2)\n")


def test_other_requests_and_another_model_are_loaded(explorer, tmp_path, monkeypatch):
    lm, file = explorer.lm, tmp_path / "own.json"
    file.write_text('[{"prompt": "{} was born in", "subject": "Ann", "target_new": "Vouda", "case_id": "x"}]')
    explorer.edit()
    done(explorer)
    explorer.data_name.value = str(file)
    explorer.load_button.click()
    done(explorer)
    assert explorer.browser.frame["case_id"].tolist() == ["x"] and explorer.outcome is None and explorer.lm is lm
    assert explorer.browser.frame["risk"].notna().all()
    for name, words in (("miniworld-gpt3", "there is no model"), (lm.name, "")):
        explorer.model_name.value = name
        explorer.load()
        done(explorer)
        assert words in explorer.words.value and explorer.lm is lm
    other = object.__new__(type(lm))
    other.__dict__ |= lm.__dict__ | {"name": "other"}
    monkeypatch.setattr("nbkit.panels.explorer.load", lambda name: other)
    explorer.model_name.value = "other"
    explorer.load()
    done(explorer)
    assert explorer.lm is other and "other" in explorer.state.value


def test_an_edit_made_for_another_state_is_not_kept(explorer):
    explorer.edit()
    done(explorer)
    explorer.keep()
    done(explorer)
    explorer.edit()
    done(explorer)
    explorer.lm.undo()
    explorer.keep()
    assert "not the one that this edit was made for" in explorer.words.value and explorer.lm.n_applied == 0


def test_a_sweep_that_is_cancelled_keeps_its_rows_and_the_model(explorer):
    before = explorer.lm.hash
    explorer.jobs.watch(lambda job: job and job.n_done == 1 and explorer.cancel_button.click())
    explorer.sweep()
    done(explorer)
    assert len(explorer.rows) == 1 and "cancelled at 1 of 3" in explorer.words.value
    assert "layer 0" in explorer.views.layers.value and explorer.lm.hash == before


def test_layers_of_a_sweep_are_those_written(explorer):
    explorer.sweep_layers.value = "1-2, 0"
    explorer.sweep()
    done(explorer)
    assert [row["layer"] for row in explorer.rows] == [1, 2, 0]
    for wrong, words in (("one", "layers are written"), ("7", "layer 7")):
        explorer.sweep_layers.value = wrong
        explorer.sweep()
        assert words in explorer.words.value


def test_errors_are_said_in_words_and_leave_the_model(explorer):
    before = explorer.lm.hash
    for name, text, words in (
        ("v_lr", "fast", "v_lr must be a number"),
        ("v_lr", "-1", "v_lr must be a number above 0"),
        ("v_num_grad_steps", "2.5", "must be a whole number"),
    ):
        widget = explorer.settings.fields[name]
        right, widget.value = widget.value, text
        explorer.edit()
        assert words in explorer.words.value and 'role="alert"' in explorer.words.value
        widget.value = right
    explorer.settings.layer.value = "9"
    explorer.edit()
    assert "layer 9" in explorer.words.value
    explorer.settings.layer.value = "1"
    explorer.edit()
    done(explorer)
    assert explorer.words.value == "" and explorer.lm.hash == before


def test_a_second_click_does_no_harm(explorer):
    goes_on = threading.Event()
    explorer.jobs.start("waiting", lambda step: goes_on.wait(10), lambda _: None, pytest.fail)
    assert explorer.edit_button.disabled and not explorer.cancel_button.disabled
    explorer.edit()
    assert "One thing at a time: “waiting” is running" in explorer.words.value and explorer.outcome is None
    goes_on.set()
    done(explorer)
    assert not explorer.edit_button.disabled


def test_the_arguments_of_a_regulariser_are_fields(explorer):
    settings = explorer.settings
    settings.regulariser.value = "random"
    settings.arguments["rescaled"][1].value = "True"
    assert settings.read().regulariser_arguments == {"keep": 0.4, "seed": 0, "rescaled": True}
    settings.arguments["rescaled"][1].value = "yes"
    with pytest.raises(MethodError, match="rescaled must be one of True, False, not 'yes'"):
        settings.read()
    settings.regulariser.value = "imitate"
    assert settings.read().regulariser_arguments == {"kind": "gaussian", "seed": 0, "same_norm": False}
    settings.regulariser.value = "scale"
    assert list(settings.arguments) == ["factor", "norm", "measure"], "an edit and matrices are not typed in"


def test_the_code_does_the_same_again(explorer, monkeypatch, capsys):
    """All that was done, as a script, on the same model under its name."""
    explorer.settings.regulariser.value = "rect"
    explorer.edit()
    done(explorer)
    explorer.keep()
    done(explorer)
    explorer.settings.regulariser.value = "none"
    explorer.settings.method.value = "ft"
    explorer.settings.fields["n_steps"].value = "2"
    explorer.settings.layer.value = "0, 1"
    explorer.edit()
    done(explorer)
    script, lm = str(explorer.code), explorer.lm
    norm = explorer.outcome.edit.norm()
    lm.undo(lm.n_applied)
    monkeypatch.setattr("nbkit.models.loading.load", lambda name: lm)
    monkeypatch.setitem(nbkit.__dict__, "load", lambda name: lm)
    names = {}
    exec(compile(script, "the script", "exec"), names)
    assert names["edit"].norm() == norm and lm.n_applied == 1
    lm.undo()
    assert f"{norm}" in capsys.readouterr().out


def test_a_form_has_each_methods_fields_with_their_help(tiny):
    form = SettingsForm(tiny, layer=1)
    for method in nbkit.METHODS:
        form.method.value = method
        for name in form.fields:
            about = {each.name: each.metadata["about"] for each in _fields(method)}[name]
            assert about, f"{method}: {name} says nothing about itself"
    form.method.value = "rome"
    assert form.read().hparams["layer"] == 1


def _fields(method):
    import dataclasses

    return dataclasses.fields(nbkit.METHODS[method].parameters)


def test_what_a_job_raises_is_told_and_the_next_one_runs():
    jobs, told = Jobs(), []

    def fails(step):
        raise MethodError("no")

    assert jobs.start("fails", fails, told.append, told.append)
    jobs.wait(10)
    assert isinstance(told.pop(), MethodError) and jobs.current is None
    jobs.start("shows", lambda step: 1, lambda found: 1 / 0, told.append)
    jobs.wait(10)
    assert isinstance(told.pop(), ZeroDivisionError)
    jobs.start("is left", lambda step: [jobs.cancel(), step(1, 2)], told.append, told.append)
    jobs.wait(10)
    assert isinstance(told.pop(), Cancelled)


def test_a_job_says_how_long_it_will_take(monkeypatch):
    job = Job("works", n_total=4, began=100.0)
    monkeypatch.setattr("nbkit.panels.jobs.time.monotonic", lambda: 102.0)
    assert job.seconds == 2 and job.seconds_left is None
    job.n_done = 1
    assert job.seconds_left == 6
    job.n_done = 4
    assert job.seconds_left == 0


def test_a_job_is_cancelled_inside_a_step_too(monkeypatch, capfd):
    monkeypatch.setattr(bars, "REDRAWN", 0)
    jobs, said, told = Jobs(), [], []
    jobs.watch(lambda job: said.append(job and job.within))

    def work(step):
        step(0, 2)
        for n in bars.steps(range(5), "tiny: keys", "layer"):
            if n == 2:
                jobs.cancel()

    jobs.start("works", work, told.append, told.append)
    jobs.wait(10)
    assert str(told.pop()) == "works was cancelled at 0 of 2"
    assert said[-2] == "keys 3 of 5" and capfd.readouterr().err == ""


def test_a_cell_and_a_job_wait_for_each_other(tiny, texts):
    """As when Edit is pressed while cells further down still run."""
    jobs, order, failed = jobs_of(tiny), [], []
    weight = {tiny.weight_name(1): Dense(torch.ones(32, 48, dtype=torch.float64))}
    expected = nbkit.perplexity(tiny, texts)

    @verb
    def slowly(lm, who):
        order.append(f"{who} begins")
        time.sleep(0.2)
        order.append(f"{who} ends")

    for first in ("job", "cell"):
        order.clear()
        jobs.start("slow", lambda step: slowly(tiny, "job"), lambda _: None, failed.append)
        if first == "job":
            while not order:
                time.sleep(0.001)
        slowly(tiny, "cell")
        with nbkit.applied(tiny, nbkit.Edit(weight)):
            time.sleep(0.05)
        assert nbkit.perplexity(tiny, texts) == expected
        jobs.wait(10)
        assert [each.split()[0] for each in order] in (["job", "job", "cell", "cell"], ["cell", "cell", "job", "job"])
    assert not failed


def test_a_model_has_one_row_of_jobs(tiny):
    assert jobs_of(tiny) is jobs_of(tiny) is not jobs_of(object.__new__(type(tiny)))


def test_words_that_differ_are_marked():
    assert fragments.differing("he is a painter.", "he is a judge.") == (
        "he is a <del>painter</del>.",
        "he is a <ins>judge</ins>.",
    )
    assert fragments.differing("a <b>", "a <b>") == ("a &lt;b&gt;",) * 2
    marked = fragments.tokens(["Ann", " Lee", " is"], of_subject=[0, 1], last=1)
    assert re.findall(r'class="([^"]*)"', marked) == [
        "nbkit-token of-subject",
        "nbkit-token of-subject last",
        "nbkit-token",
    ]
