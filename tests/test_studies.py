"""Studies on a tiny random model: right numbers, stored, resumed, and the model left as it was."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from nbkit import studies
from nbkit.edits.overlays import applied
from nbkit.errors import MethodError, ResultsError
from nbkit.methods.verbs import edit
from nbkit.models import prompts
from nbkit.models.prompts import context_templates
from nbkit.records import results
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import method_study, metrics, orders, single
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity

PROMPTS = [("{} is located in", "Vouda"), ("{} plays the", "Ann"), ("The mother tongue of {} is", "Danielle Darrieux")]
REQUESTS = [
    EditRequest(
        prompt,
        subject,
        target_new,
        target_true=target_true,
        case_id=number,
        paraphrase_prompts=(f"I know that {prompt.format(subject)}",),
        neighborhood_prompts=("Sennifar is located in",),
        neighborhood_targets=(target_true,),
    )
    for number, ((prompt, subject), target_new, target_true) in enumerate(
        [(PROMPTS[0], "Sennifar", "Krela"), (PROMPTS[1], "drum", "harp"), (PROMPTS[2], "the song", "French"),
         (PROMPTS[1], "chess", "boats"), (PROMPTS[0], "French", "Krela")]
    )
]  # fmt: skip
TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]
TEMPLATES = ["{}", "The river runs. {}", "I. {}"]
FAST = {"layer": 1, "v_num_grad_steps": 3, "context_templates": TEMPLATES}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_kept", {})
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.0)
    return Store(tmp_path / "results")


@pytest.fixture
def lm(make_lm):
    """A tiny model, checked afterwards to have the weights it had."""
    lm = make_lm("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    yield lm
    assert lm.n_applied == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


class Counted:
    """A function of a module of studies replaced by itself, counting its calls; raises `error` at call `at`, once."""

    def __init__(self, monkeypatch, name, module=method_study):
        self.function, self.calls, self.error, self.at = getattr(module, name), 0, None, None
        self.requests, self.named = [], []
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments, **named):
        self.calls += 1
        self.named.append(named)
        if self.calls == self.at:
            raise self.error
        if self.function is edit:
            self.requests += arguments[1]
        return self.function(*arguments, **named)

    def fail(self, error, at):
        self.error, self.at = error, self.calls + at


def same(left, right):
    pd.testing.assert_frame_equal(left.drop(columns="created"), right.drop(columns="created"), check_exact=True)


def test_single_edits_measures_each_edit_on_its_own(lm, store):
    frame = studies.single_edits(lm, REQUESTS, TEXTS, store=store, **FAST)
    made = edit(lm, REQUESTS, progress=False, **FAST)
    assert frame["case_id"].tolist() == ["0", "1", "2", "3", "4"]
    assert frame["subject_kind"][2] == "later"
    assert frame["perplexity_before"].unique().tolist() == [perplexity(lm, TEXTS)]
    np.testing.assert_array_equal(frame["perplexity"], perplexity(lm, TEXTS, edits=made))
    for name in ("numerator", "denominator", "signed_denominator", "update_norm"):
        np.testing.assert_array_equal(frame[name], [one.info[name] for one in made])
    np.testing.assert_array_equal(frame["optimised_probability"], [one.info["target_probability"] for one in made])
    assert set(frame["n_steps"]) <= {1, 2, 3} and set(frame["key_mode"]) == {"mixed"}
    reference = neighborhood_tokens(lm, REQUESTS)
    with applied(lm, made[1]):
        expected = edit_metrics(lm, [REQUESTS[1]], reference).drop(columns="case_id")
    pd.testing.assert_series_equal(
        frame.loc[1, expected.columns], expected.loc[0], check_dtype=False, check_names=False
    )
    assert frame["target_probability_prefixed"].between(0, 1).all()
    assert (frame["target_probability_prefixed"] != frame["target_probability"]).all()
    assert {"model_hash", "code_version", "parameters", "data_hash", "libraries", "device"} <= set(frame)


@pytest.mark.parametrize("given", [TEMPLATES, None])
def test_requests_are_asked_behind_prefixes_that_no_edit_was_computed_with(lm, store, monkeypatch, given):
    asked = Counted(monkeypatch, "edit_metrics", metrics)
    frame = studies.single_edits(lm, REQUESTS, TEXTS, store=store, **FAST | {"context_templates": given})
    plain, *behind = [named.get("prefix") for named in asked.named]
    unseen = json.loads(frame["parameters"][0])["asked_behind"]
    assert plain is None and len(behind) == method_study.N_PREFIXES and set(sum(behind, ())) <= set(unseen)
    assert set(unseen).isdisjoint([*context_templates(lm), *TEMPLATES])

    (made,) = edit(lm, REQUESTS[:1], progress=False, **FAST | {"context_templates": given})
    with applied(lm, made):
        of_first = [edit_metrics(lm, REQUESTS[:1], prefix=each[0], prefix_paraphrases=True) for each in behind]
    assert len({prefixes[0] for prefixes in behind}) == len(behind)
    for name in method_study.BEHIND_PREFIXES:
        expected = np.mean([one[name][0] for one in of_first])
        assert frame[f"{name}_prefixed"][0] == pytest.approx(expected, rel=1e-9)


def test_the_prefixes_of_a_request_are_drawn_by_its_content(lm, store, monkeypatch):
    """So that it is asked the same whatever is asked beside it, and different requests mostly differently."""
    asked = Counted(monkeypatch, "edit_metrics", metrics)
    frame = studies.single_edits(lm, REQUESTS[::-1], TEXTS, store=store, **FAST)
    unseen = json.loads(frame["parameters"][0])["asked_behind"]
    _, *behind = [named.get("prefix") for named in asked.named]
    drawn = [list(prefixes) for prefixes in zip(*behind, strict=True)]
    for request, prefixes in zip(REQUESTS[::-1], drawn, strict=True):
        asked_of = {name: value for name, value in vars(request).items() if name != "generation_prompts"}
        first = int(digest(asked_of), 16)
        assert prefixes == [unseen[(first + i) % len(unseen)] for i in range(3)]
    assert len({tuple(prefixes) for prefixes in drawn}) > 1


def test_other_prefixes_to_ask_behind_make_another_study(lm, store, monkeypatch):
    edits = Counted(monkeypatch, "edit")
    for _ in range(2):
        studies.single_edits(lm, REQUESTS[:1], TEXTS, store=store, **FAST)
    monkeypatch.setattr(prompts, "unseen_templates", lambda lm, seen: ["Krela. {}"])
    studies.single_edits(lm, REQUESTS[:1], TEXTS, store=store, **FAST)
    assert edits.calls == 2


def test_stored_rows_are_not_computed_again_and_more_requests_compute_only_those(lm, store, monkeypatch):
    edits = Counted(monkeypatch, "edit")
    first = studies.single_edits(lm, REQUESTS[:3], TEXTS, store=store, **FAST)
    again = studies.single_edits(lm, REQUESTS[:3], TEXTS, store=store, **FAST)
    assert edits.requests == REQUESTS[:3]
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    more = studies.single_edits(lm, REQUESTS[::-1], TEXTS, store=store, **FAST)
    assert edits.requests == [*REQUESTS[:3], REQUESTS[4], REQUESTS[3]]
    assert more["case_id"].tolist() == ["4", "3", "2", "1", "0"]


def test_whatever_determines_the_rows_makes_another_study(lm, store, make_lm, monkeypatch):
    edits = Counted(monkeypatch, "edit")

    def calls(lm=lm, requests=REQUESTS[:1], texts=TEXTS, **changes):
        before = edits.calls
        studies.single_edits(lm, requests, texts, store=store, metrics=False, **{**FAST, **changes})
        return edits.calls - before

    assert calls() == 1 and calls() == 0
    assert calls(v_num_grad_steps=2) == 1
    assert calls(key_mode="prefixed") == 1
    assert calls(context_templates=TEMPLATES[:2]) == 1
    assert calls(texts=TEXTS[:1]) == 1
    assert calls(second_moment=torch.eye(lm.d_mlp, dtype=torch.float64)) == 1
    assert calls(second_moment=2 * torch.eye(lm.d_mlp, dtype=torch.float64)) == 1
    assert calls(requests=REQUESTS[1:2]) == 1
    assert calls(lm=make_lm("gpt2", seed=1)) == 1
    monkeypatch.setattr(method_study, "code_version", lambda: "other code")
    assert calls() == 1 and calls() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bad request")])
def test_interrupted_single_edits_resume_and_equal_an_uninterrupted_run(lm, store, tmp_path, monkeypatch, error):
    monkeypatch.setattr(single, "EDITS_AT_ONCE", 2)
    edits = Counted(monkeypatch, "edit")
    edits.fail(error, at=2)
    with pytest.raises(type(error)):
        studies.single_edits(lm, REQUESTS, TEXTS, store=store, **FAST)
    resumed = studies.single_edits(lm, REQUESTS, TEXTS, store=store, **FAST)
    assert edits.requests == REQUESTS
    same(resumed, studies.single_edits(lm, REQUESTS, TEXTS, store=Store(tmp_path / "other"), **FAST))


def test_infinite_and_nan_perplexities_are_results(lm, store, monkeypatch):
    values = [math.inf, math.nan, 3e300]
    monkeypatch.setattr(metrics, "perplexity", lambda *_, edits=None: 10.0 if edits is None else values)
    frame = studies.single_edits(lm, REQUESTS[:3], TEXTS, store=store, metrics=False, **FAST)
    again = studies.single_edits(lm, REQUESTS[:3], TEXTS, store=store, metrics=False, **FAST)
    assert frame["perplexity"][0] == math.inf and math.isnan(again["perplexity"][1]) and again["perplexity"][2] == 3e300


def test_mistakes_are_found_before_anything_runs(lm, store, tmp_path):
    with pytest.raises(MethodError, match="v_learning"):
        studies.single_edits(lm, REQUESTS, TEXTS, store=store, v_learning=1.0, **FAST)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="nothing was computed"):
        studies.single_edits(lm, REQUESTS, TEXTS, store=Store(tmp_path / "file"), **FAST)


# sequences


def sequences(lm, store, **changes):
    arguments = {"seeds": (0, 1), "evaluate_every": 2, "group": "hard", "store": store, **FAST, **changes}
    return studies.sequential_edits(lm, REQUESTS, TEXTS, **arguments)


def test_sequential_edits_measures_right_after_and_at_checkpoints(lm, store):
    frame = sequences(lm, store)
    assert frame["n_edits"].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert frame["checkpoint"].tolist() == [True, False, True, False, True, True] * 2
    assert frame["perplexity"].notna().tolist() == frame["checkpoint"].tolist()
    found = [frame.loc[(frame["seed"] == seed) & (frame["n_edits"] > 0), "case_id"].tolist() for seed in (0, 1)]
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1]) == ["0", "1", "2", "3", "4"]
    assert frame["perplexity"][0] == perplexity(lm, TEXTS)

    # The same sequence by hand: each edit computed on the already edited model.
    order = [REQUESTS[int(case)] for case in found[0][:2]]
    reference = neighborhood_tokens(lm, REQUESTS)
    (first,) = edit(lm, order[:1], **FAST)
    with applied(lm, first):
        last = edit_metrics(lm, order[:1], reference)
        (second,) = edit(lm, order[1:], **FAST)
        with applied(lm, second):
            assert frame["perplexity"][2] == perplexity(lm, TEXTS)
            so_far = edit_metrics(lm, order, reference)
    assert frame["denominator"][2] == second.info["denominator"]
    for name in ("target_probability", "efficacy", "locality"):
        assert frame[f"{name}_last"][1] == frame[f"{name}_after"][1] == last[name][0]
        assert frame[name][2] == pytest.approx(so_far[name].mean(), rel=1e-12)
        assert frame[f"{name}_after"][2] == pytest.approx((last[name][0] + so_far[name][1]) / 2, rel=1e-12)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_sequence_keeps_the_finished_ones(lm, store, tmp_path, monkeypatch, error):
    counted = Counted(monkeypatch, "perplexity", metrics)
    counted.fail(error, at=6)  # 4 checkpoints of seed 0, then the unedited model and the second edit of seed 1
    with pytest.raises(type(error)) as caught:
        sequences(lm, store)
    assert lm.n_applied == 0, "the weights must be restored even while the traceback is kept"
    del caught
    started = Counted(monkeypatch, "edit_sequence", orders)
    resumed = sequences(lm, store)
    assert started.calls == 1
    same(resumed, sequences(lm, Store(tmp_path / "other")))


def test_more_seeds_compute_only_the_new_ones_and_the_group_is_only_a_name(lm, store, monkeypatch):
    started = Counted(monkeypatch, "edit_sequence", orders)
    sequences(lm, store)
    frame = sequences(lm, store, seeds=(2, 1, 0), group="normal")
    assert started.calls == 3
    assert frame["seed"].tolist() == [2] * 6 + [1] * 6 + [0] * 6 and set(frame["group"]) == {"normal"}


def test_a_sequence_goes_on_after_it_broke_the_model(lm, store):
    frame = sequences(lm, store, seeds=(0,), v_lr=1e308, clamp_norm_factor=math.inf)  # values beyond all numbers
    broken = frame[frame["checkpoint"] & (frame["n_edits"] > 0)]
    assert len(broken) == 3 and not np.isfinite(broken["perplexity"]).any()
    assert broken["efficacy"].between(0, 1).all()


def test_evaluate_every_must_be_positive(lm, store):
    with pytest.raises(ValueError, match="evaluate_every"):
        sequences(lm, store, evaluate_every=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("study", [studies.single_edits, studies.sequential_edits])
def test_texts_that_the_model_cannot_read_are_said_at_the_door(lm, store, study, monkeypatch):
    arguments = {"store": store, **FAST} | ({"seeds": [0]} if study is studies.sequential_edits else {"metrics": False})
    monkeypatch.setattr(metrics, "perplexity", lambda *_, edits=None, **__: 8e6 if edits is None else [8e6])
    with pytest.raises(UserWarning, match="tiny-gpt2 cannot read these texts: its perplexity .* is 8e.06, and"):
        study(lm, REQUESTS[:1], TEXTS, **arguments)


# tasks
