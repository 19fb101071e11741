"""The four protocols: every edit is really made, a batch is one edit, and the rows are what is measured by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_lm

from nbkit.edits.overlays import applied
from nbkit.edits.regularisers import regularise
from nbkit.errors import MethodError, PromptError, RequestError
from nbkit.methods import verbs
from nbkit.methods.verbs import edit, edit_batch, edit_sequence
from nbkit.records import ability
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.records.survival import lifetimes
from nbkit.studies import batches, in_sequence
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity
from nbkit.studies.orders import in_order
from nbkit.studies.protocols import COLUMNS, PROTOCOLS, SCORES, protocol_edits
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.single import single_edits
from nbkit.studies.task_scores import task_scores

TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]
REQUESTS = [
    EditRequest(prompt, subject, target, target_true="harp", case_id=number, paraphrase_prompts=(f"See {subject}:",),
                neighborhood_prompts=("You plays the",), neighborhood_targets=("harp",))
    for number, (prompt, subject, target) in enumerate([
        ("{} plays the", "Ann", "drum"), ("{} is located in", "Vouda", "chess"),
        ("The mother tongue of {} is", "Danielle Darrieux", "the song"), ("{} plays the", "Krela", "song"),
        ("{} is located in", "Sennifar", "French"),
    ])
]  # fmt: skip
CONTEXTS = ["{}", "The river runs. {}"]
SEARCH = {"context_templates": CONTEXTS, "v_num_grad_steps": 2}
ROME = {"method": "rome", "layer": 1, **SEARCH}
MEMIT = {"method": "memit", "layers": [0, 1], "second_moment_weight": 3.0, **SEARCH}
TASKS = ["sentiment", "nli"]
LIMIT = 3
SCORED = [f"task_{name}{end}" for name in TASKS for end in ("", ":stderr")]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("gpt2", torch.float32)


@pytest.fixture(autouse=True)
def unchanged(lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    yield
    assert lm.n_applied == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.fixture
def memit(lm):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, lm.d_mlp, dtype=torch.float64, generator=generator)
    return {**MEMIT, "second_moment": keys.T @ keys / len(keys)}


def run(lm, folder, protocol, scored=False, **changes):
    arguments = {"seeds": [1, 0], "store": Store(folder), **changes}
    arguments |= {"tasks": TASKS, "task_limit": LIMIT} if scored else {}
    return protocol_edits(lm, REQUESTS, TEXTS, protocol, **arguments)


def measured(lm, requests, reference):
    """Of the model as it is, by hand; what it says of these requests."""
    scores = task_scores(lm, TASKS, LIMIT).set_index("task")
    found = {"perplexity": perplexity(lm, TEXTS)}
    found |= edit_metrics(lm, requests, reference)[list(SCORES)].mean().to_dict() if requests else {}
    for name in TASKS:
        found |= {f"task_{name}": scores["score"][name], f"task_{name}:stderr": scores["stderr"][name]}
    return found


def assert_row(row, expected):
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


def test_independent_edits_of_single_requests(lm, tmp_path):
    frame = run(lm, tmp_path, "instance-single", scored=True, n_edits=2, **ROME)
    assert frame["seed"].tolist() == [1, 1, 1, 0, 0, 0] and frame["n_edits"].tolist() == [0, 1, 1] * 2
    reference = neighborhood_tokens(lm, REQUESTS)
    for seed in (1, 0):
        before, *rows = frame[frame["seed"] == seed].to_dict("records")
        assert_row(before, measured(lm, [], reference))
        for row, request in zip(rows, in_order(REQUESTS, seed), strict=False):
            assert row["case_id"] == str(request.case_id)
            with applied(lm, edit(lm, request, **ROME)[0]):
                assert_row(row, measured(lm, [request], reference))
            assert row["reliability_after"] == row["reliability"]


def test_a_sequence_of_single_requests_is_edited_once_with_every_edit_in_it(lm, tmp_path, monkeypatch):
    asked = []
    method = verbs.METHODS["rome"]

    def each(lm, requests, settings):
        asked.extend(requests)
        return method.each(lm, requests, settings)

    monkeypatch.setitem(verbs.METHODS, "rome", verbs.dataclasses.replace(method, each=each))
    frame = run(lm, tmp_path, "instance-sequential", scored=True, n_edits=3, evaluate_every=2, seeds=[1], **ROME)
    order, reference = in_order(REQUESTS, 1)[:3], neighborhood_tokens(lm, REQUESTS)
    assert asked == order and frame["n_edits"].tolist() == [0, 2, 3]
    assert_row(frame.iloc[0], measured(lm, [], reference))
    for step in edit_sequence(lm, order, **ROME):
        if step.index:
            assert_row(frame.iloc[step.index], measured(lm, order[: step.index + 1], reference))
    asked.clear()
    run(lm, tmp_path, "instance-sequential", scored=True, n_edits=5, evaluate_every=2, seeds=[1], **ROME)
    assert asked == in_order(REQUESTS, 1)[3:], "a longer one edits only what is new"


def test_a_batch_is_one_edit_of_the_unedited_model(lm, tmp_path, memit):
    frame = run(lm, tmp_path, "batch-single", scored=True, batch_sizes=[1, 4], **memit)
    assert frame["batch_size"].tolist() == frame["n_edits"].tolist() == [0, 1, 4] * 2
    reference = neighborhood_tokens(lm, REQUESTS)
    for seed in (1, 0):
        before, *rows = frame[frame["seed"] == seed].to_dict("records")
        assert_row(before, measured(lm, [], reference))
        for row in rows:
            batch = in_order(REQUESTS, seed)[: row["n_edits"]]
            with applied(lm, edit_batch(lm, batch, **memit)):
                assert_row(row, measured(lm, batch, reference))


def test_batches_in_sequence_are_each_one_edit_of_the_edited_model(lm, tmp_path, memit):
    frame = run(lm, tmp_path, "batch-sequential", scored=True, batch_sizes=[2, 3], seeds=[1], **memit)
    assert frame["batch_size"].tolist() == [2] * 4 + [3] * 3
    assert frame["n_edits"].tolist() == [0, 2, 4, 5, 0, 3, 5]
    order, reference = in_order(REQUESTS, 1), neighborhood_tokens(lm, REQUESTS)
    first = edit_batch(lm, order[:3], **memit)
    with applied(lm, first), applied(lm, edit_batch(lm, order[3:], **memit)):
        assert_row(frame.iloc[-1], measured(lm, order, reference))
    with applied(lm, first):
        right_after = [edit_metrics(lm, [request], reference)["reliability"][0] for request in order[:3]]
        assert frame["reliability_after"].iloc[-2] == pytest.approx(np.mean(right_after))


def test_rows_of_all_four_are_of_one_shape_and_can_be_put_together(lm, tmp_path, memit):
    frames = [run(lm, tmp_path, protocol, n_edits=2, seeds=[0], regularise={"name": "rect", "keep": 0.4},
                  batch_sizes=[2] if "batch" in protocol else None, **memit) for protocol in PROTOCOLS]  # fmt: skip
    assert all(list(frame) == COLUMNS for frame in frames)
    rows = pd.concat(frames, ignore_index=True)
    assert set(rows["protocol"]) == set(PROTOCOLS) and set(rows["regulariser"]) == {"rect keep=0.4"}
    assert rows["checkpoint"].all() and (rows.loc[rows["n_edits"] == 0, "reliability"].isna()).all()
    assert rows["perplexity"].notna().all() and len(set(rows.loc[rows["n_edits"] == 0, "perplexity"])) == 1
    sequences = rows[rows["protocol"].str.endswith("sequential")]
    assert len(lifetimes(sequences, by=("protocol", "seed"))) == 2
    with applied(lm, regularise(edit_batch(lm, in_order(REQUESTS, 0)[:2], **memit), lm, "rect", keep=0.4)):
        expected = perplexity(lm, TEXTS)
    single, in_sequence = (rows.loc[(rows["protocol"] == f"batch-{way}") & (rows["n_edits"] == 2), "perplexity"].item()
                           for way in ("single", "sequential"))  # fmt: skip
    assert single == in_sequence == expected


def test_more_seeds_and_sizes_compute_only_what_is_new(lm, tmp_path, memit, monkeypatch):
    made = []

    def counted(lm, batch, **arguments):
        made.append(len(batch))
        return edit_batch(lm, batch, **arguments)

    monkeypatch.setattr(batches, "edit_batch", counted)
    first = run(lm, tmp_path, "batch-single", batch_sizes=[2], seeds=[0], **memit)
    more = run(lm, tmp_path, "batch-single", batch_sizes=[3, 2], seeds=[0, 4], **memit)
    assert made == [2, 3, 3, 2] and more["n_edits"].tolist() == [0, 3, 2] * 2
    pd.testing.assert_frame_equal(more.iloc[[0, 2]].reset_index(drop=True), first, check_exact=True)


def test_the_same_rows_are_given_by_the_studies_themselves(lm, tmp_path, monkeypatch):
    """So that whatever else was measured, and is no column here, needs no edit."""
    run(lm, tmp_path, "instance-sequential", n_edits=2, seeds=[0], **ROME)
    run(lm, tmp_path, "instance-single", n_edits=2, seeds=[0], **ROME)
    monkeypatch.setitem(verbs.METHODS, "rome", verbs.dataclasses.replace(verbs.METHODS["rome"], each=None))
    again = sequential_edits(lm, REQUESTS, TEXTS, [0], n_edits=2, store=Store(tmp_path), **ROME)
    assert "denominator" in again and len(again) == 3
    assert len(single_edits(lm, in_order(REQUESTS, 0)[:2], TEXTS, store=Store(tmp_path), **ROME)) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_drift_rows_are_the_same_and_none_is_measured(lm, tmp_path, memit, monkeypatch, protocol):
    sizes = [2] if "batch" in protocol else None
    expected = run(lm, tmp_path, protocol, n_edits=2, batch_sizes=sizes, **memit)
    monkeypatch.setattr(in_sequence, "drift", None)
    frame = run(lm, tmp_path, protocol, n_edits=2, batch_sizes=sizes, drift=False, **memit)
    pd.testing.assert_frame_equal(frame, expected)


def test_a_method_that_is_given_no_layers_takes_part(lm, tmp_path):
    frame = run(lm, tmp_path, "instance-sequential", method="kn", n_edits=2, seeds=[0], n_steps=2)
    assert frame["n_edits"].tolist() == [0, 1, 2] and (frame["method"] == "kn").all()


@pytest.mark.parametrize("protocol, more, error, said", [
    ("batch", {}, MethodError, "protocol must be one of instance-single"),
    ("batch-single", {"batch_sizes": [2]}, MethodError, "rome makes one edit of one request"),
    ("batch-sequential", {"batch_sizes": [2]}, MethodError, "rome makes one edit of one request"),
    ("batch-single", {}, MethodError, "batch-single needs batch_sizes"),
    ("instance-single", {"batch_sizes": [1]}, MethodError, "instance-single has no batch_sizes"),
    ("batch-sequential", {"batch_sizes": [2, 9]}, RequestError, "a batch of 9 is asked for, and there are 5"),
    ("batch-single", {"batch_sizes": [3], "n_edits": 2}, RequestError, "a batch of 3 is asked for, and there are 2"),
    ("batch-sequential", {"batch_sizes": []}, RequestError, "batch_sizes is empty"),
    ("batch-sequential", {"batch_sizes": 2}, RequestError, "batch_sizes must be a list of whole numbers"),
    ("batch-sequential", {"batch_sizes": [0]}, MethodError, "whole number from 1 on"),
    ("instance-single", {"n_edits": 6}, RequestError, "n_edits is 6, and there are 5 requests"),
    ("instance-single", {"regularise": {"name": "rect"}}, MethodError, "rect needs keep"),
    ("instance-single", {"tasks": "nli"}, MethodError, "tasks must be a list of names of tasks"),
    ("instance-single", {"tasks": ["nli"], "task_limit": 0}, MethodError, "limit must be a whole number"),
    ("instance-single", {"texts": 5}, PromptError, "texts must be a list"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_stored(lm, tmp_path, protocol, more, error, said):
    arguments = {"texts": TEXTS, "store": Store(tmp_path), **ROME, **more}
    with pytest.raises(error, match=said):
        protocol_edits(lm, REQUESTS, protocol=protocol, **arguments)
    assert not list(tmp_path.iterdir())


def test_each_metric_of_a_task_has_a_column_beside_its_score(lm, tmp_path):
    name = "nli_generated"
    arguments = {"tasks": [name], "task_limit": 2, "n_edits": 1, "seeds": [0], "store": Store(tmp_path), **ROME}
    frame = protocol_edits(lm, REQUESTS, TEXTS, "instance-single", **arguments)
    scores = task_scores(lm, [name], 2, all_metrics=True).set_index("metric")["score"]
    assert frame.loc[0, [f"task_{name}", f"task_{name}:as_released"]].tolist() == pytest.approx(
        scores[["corrected", "as_released"]].tolist(), nan_ok=True
    )
    assert ability.scored_tasks(frame) == [name]
