"""How ROME's default on an embedded model is chosen: by efficacy alone, on facts that no notebook reports."""

import pandas as pd
import pytest

import nbkit
from miniworld.damage import damages, settings_of, summary
from miniworld.efficacy import (
    CANDIDATES,
    KINDS,
    PUBLISHED,
    SETTINGS,
    TAKEN,
    TOLERANCE,
    WITH_C,
    candidate_sweep,
    chosen,
    efficacy_sweep,
    gentlest,
    unreported_requests,
)
from nbkit.methods.hparams import hyper_parameters
from nbkit.models.prompts import subject_kind
from nbkit.studies.metrics import score_targets


@pytest.fixture(scope="module")
def shipped():
    return nbkit.load("miniworld-gpt2", device="cpu")


def sweep_of(said: dict[tuple[int, int], float]) -> pd.DataFrame:
    rows = [{"layer": layer, "setting": setting, "said": value} for (layer, setting), value in said.items()]
    return pd.DataFrame(rows)


def test_of_the_setting_that_takes_the_earliest_layer_close_to_its_best_is_chosen():
    best = TAKEN + 0.05
    far, close = best - 2 * TOLERANCE, best - TOLERANCE / 2
    taken = chosen(sweep_of({(1, 0): 0.5, (2, 0): TAKEN, (1, 1): far, (2, 1): close, (3, 1): best}))
    assert (taken["layer"], taken["setting"]) == (2, 1)
    assert chosen(sweep_of({(2, 0): 0.2, (5, 1): 0.6, (6, 1): 0.5, (1, 2): 0.3}))["layer"] == 5, "none takes"


def test_the_choice_is_made_on_known_facts_that_are_no_requests_and_not_on_what_collapses(shipped):
    requests = unreported_requests(shipped, 20)
    reported = {(request.subject, request.relation_id) for request in nbkit.read_requests("miniworld")}
    assert len(requests) == 40 and not {(one.subject, one.relation_id) for one in requests} & reported
    assert [subject_kind(shipped, request) for request in requests] == [kind for kind in KINDS for _ in range(20)]
    assert score_targets(shipped, [r.text for r in requests], [r.target_true for r in requests])["correct"].all()


def test_damage_is_measured_on_such_facts_of_all_kinds_of_subject(shipped):
    requests = unreported_requests(shipped, 2, kinds=("one-token first", *KINDS))
    assert [subject_kind(shipped, one) for one in requests[:2]] == ["one-token first"] * 2 and len(requests) == 6
    assert "mend" in settings_of(shipped), "which was trained for this model"
    frame = damages(shipped, requests, nbkit.read_texts("miniworld", limit=4), ["ft", "mend"])
    assert frame["felt_relative"].between(0, 1, inclusive="neither").all() and frame["perplexity"].gt(1).all()
    table = summary(frame.assign(perplexity=[40.0, 4, 4, 4, 4, 4] * 2, perplexity_before=4.0))
    assert table["setting"].tolist() == ["ft", "mend", "all"] and table["n"].tolist() == [6, 6, 12]
    assert table["n_10"].tolist() == [1, 1, 2]


def test_settings_are_swept_until_one_takes(shipped, monkeypatch):
    requests = unreported_requests(shipped, 4)
    sweep = efficacy_sweep(shipped, requests, [1])
    assert (sweep["n"] == 8).all() and sweep["said"].between(0, 1).all()
    assert sweep.iloc[0][list(PUBLISHED)].to_dict() == PUBLISHED
    assert (sweep["said"].iloc[:-1] <= TAKEN).all() and sweep["said"].iloc[-1] > TAKEN
    monkeypatch.setattr("miniworld.efficacy.TAKEN", -1.0)
    assert efficacy_sweep(shipped, requests, [1, 2])["setting"].tolist() == [0, 0]


def test_the_shipped_default_is_one_of_the_settings(shipped):
    default = hyper_parameters(shipped, "rome")
    assert {name: getattr(default, name) for name in PUBLISHED} in SETTINGS


def test_of_the_candidates_the_gentlest_that_takes_is_chosen_or_else_the_best():
    sweep = pd.DataFrame({"norm_weight": [10.0, 1.0, 0.1], "efficacy": [0.2, TAKEN + 0.02, 0.99]})
    assert gentlest(sweep, "alphaedit")["norm_weight"] == 1.0
    assert gentlest(sweep.assign(efficacy=[0.2, 0.8, 0.5]), "alphaedit")["norm_weight"] == 1.0
    sweep = sweep.assign(said=[0.3, 0.4, TAKEN + 0.01])
    assert gentlest(sweep, WITH_C)["norm_weight"] == 0.1, "of ROME with C what is said counts"


def test_candidates_are_swept_gentlest_first_and_the_shipped_default_is_one(shipped):
    sweep = candidate_sweep(shipped, unreported_requests(shipped, 2), "ft")
    assert sweep["norm_constraint"].is_monotonic_increasing and sweep["efficacy"].between(0, 1).all()
    assert sweep["efficacy"].iloc[-1] >= sweep["efficacy"].iloc[0]
    for method, candidates in CANDIDATES.items():
        default = hyper_parameters(shipped, "rome" if method == WITH_C else method)
        assert all(getattr(default, number) in values for number, values in candidates.items()), method
