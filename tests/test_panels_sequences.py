"""Stored sequences step by step: what is shown at a step is what was stored of it, and what is missing is said."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nbkit import panels, paths, plots
from nbkit.errors import ResultsError
from nbkit.panels.fragments import shown
from nbkit.records.sequences import sequence_rows, step_scores, step_values, stored_sequences
from nbkit.studies.sequential import sequential_edits


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    return tmp_path


@pytest.fixture
def computed(tiny, requests, texts, contexts, runs):
    """Two orders of three edits, as the study gives them."""
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts}
    return sequential_edits(tiny, requests, texts, seeds=[3, 1], evaluate_every=2, **options)


def test_what_is_stored_in_words_and_rows_as_the_study_gave_them(computed):
    found = stored_sequences()
    assert found["seed"].tolist() == [1, 3] and set(found["n_edits"]) == {3} and set(found["every"]) == {2}
    first = found.iloc[0]
    assert (first["model"], first["method"], first["key_mode"], first["layer"]) == ("tiny-gpt2", "rome", "mixed", "1")
    assert "1 later" in first["subjects"]
    rows = sequence_rows(first["key"], 3)
    expected = computed[computed["seed"] == 3].reset_index(drop=True)
    for name in ("n_edits", "perplexity", "subject", "update_norm", "efficacy", "efficacy_after"):
        pd.testing.assert_series_equal(rows[name], expected[name])
    assert len(sequence_rows(first["key"])) == len(computed) == 8


def test_what_is_not_there_is_refused_by_name(computed):
    key = stored_sequences()["key"][0]
    with pytest.raises(ResultsError, match=r"no order 7; it has \[1, 3\]"):
        sequence_rows(key, 7)
    with pytest.raises(ResultsError, match="no key 'abc'"):
        sequence_rows("abc")
    with pytest.raises(ResultsError, match="there are sequential_edits"):
        stored_sequences("sequential")
    with pytest.raises(ResultsError, match="step 9 is 0 times"):
        step_values(sequence_rows(key, 1), 9)


def test_a_step_says_what_was_measured_there_and_no_more(computed):
    rows = sequence_rows(stored_sequences()["key"][0], 1)
    still = dict.fromkeys(("drift", "drift_felt", "drift_felt_relative"), 0.0)
    assert step_values(rows, 0) == {"perplexity": rows["perplexity"][0], "times the unedited": 1.0} | still
    assert step_scores(rows, 0).empty
    assert "perplexity" not in step_values(rows, 1) and step_scores(rows, 1)["all edits so far"].isna().all()
    values, scores = step_values(rows, 2), step_scores(rows, 2)
    for name in ("perplexity", "update_norm", "forgotten", "drift"):
        assert values[name] == rows[name][2]
    assert "drift_felt" not in values, "without second moments"
    assert scores.loc["reliability"].tolist() == [rows[f"reliability{end}"][2] for end in ("_last", "", "_after")]
    broken = rows.assign(perplexity=rows["perplexity"].where(rows["n_edits"] != 2))
    assert step_values(broken, 2)["perplexity"] == np.inf, "a broken model, not an unmeasured one"


def test_the_widget_follows_order_and_step(computed):
    view = panels.sequences()
    assert view.seed == 1 and view.slider.max == 3 and "The unedited model" in view.said.value
    view.slider.value = 2
    rows = sequence_rows(view.key, 1)
    assert rows["subject"][2] in view.said.value and shown(rows["perplexity"][2]) in view.said.value
    assert "step 2 is marked" in view.drawing.value
    view.order.value = 3
    rows = sequence_rows(view.key, 3)
    assert view.step == 2 and rows["subject"][2] in view.said.value and shown(rows["update_norm"][2]) in view.said.value
    view.slider.value = 1
    assert "not measured here" in view.said.value
    view.again.click()
    assert (view.seed, view.step) == (3, 1)


def test_batches_are_shown_edit_by_edit(runs, tiny, requests, texts):
    sequential_edits(tiny, requests, texts, [0], "ft", per_step=2, layers=[1], n_steps=1)
    view = panels.sequences()
    rows = sequence_rows(view.key, 0)
    assert rows["n_edits"].tolist() == [0, 2, 3] and view.slider.max == 3
    for at, step in ((1, 0), (2, 2), (3, 3)):
        view.slider.value = at
        assert view.step == step and f"step {step} is marked" in view.drawing.value
        assert shown(rows["perplexity"][rows["n_edits"] == step].item()) in view.said.value
    assert "Edits 3 to 3" in view.said.value and rows["case_id"][2] in view.said.value


def test_where_nothing_is_stored_it_says_how_to_make_rows(runs, tiny, requests, texts, contexts):
    view = panels.sequences()
    assert "python -m nbkit run 03_sequential_edits" in view.notice.value and 'role="alert"' in view.notice.value
    assert view.controls.layout.display == "none"
    sequential_edits(tiny, requests[:1], texts, seeds=[0], layer=1, v_num_grad_steps=1, context_templates=contexts)
    view.again.click()
    assert view.notice.value == "" and view.controls.layout.display is None and view.slider.max == 1


def test_the_step_is_marked_where_perplexity_was_measured():
    steps = [0, 1, 2, 3]
    frame = pd.concat(
        pd.DataFrame({"seed": seed, "n_edits": steps, "checkpoint": [True, False, True, True], "perplexity": values})
        for seed, values in {0: [5.0, np.nan, 50.0, np.nan], 1: [5.0, np.nan, 20.0, 30.0]}.items()
    )
    for step, marked in ((2, [50.0]), (1, []), (3, [150.0])):  # NaN lies at the edge, above all
        ax = plots.sequence_step(frame, Figure().add_subplot(), 0, step)
        (point,) = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() == 6]
        assert list(point.get_ydata()) == pytest.approx(marked)
        assert f"step {step}" in [text.get_text() for text in ax.get_legend().get_texts()]
