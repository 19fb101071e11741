"""How ROME's default on an embedded model is chosen: by efficacy alone, on facts that no notebook reports."""

import pandas as pd
import pytest

import nbkit
from miniworld.efficacy import KINDS, PUBLISHED, SETTINGS, TOLERANCE, chosen, efficacy_sweep, unreported_requests
from nbkit.methods.hparams import hyper_parameters
from nbkit.models.prompts import subject_kind
from nbkit.studies.metrics import score_targets


@pytest.fixture(scope="module")
def shipped():
    return nbkit.load("miniworld-gpt2", device="cpu")


def sweep_of(said: dict[tuple[int, int], float]) -> pd.DataFrame:
    rows = [{"layer": layer, "setting": setting, "said": value} for (layer, setting), value in said.items()]
    return pd.DataFrame(rows)


def test_of_what_is_close_to_the_best_the_first_setting_then_the_earliest_layer_is_taken():
    far, close = 1 - 2 * TOLERANCE, 1 - TOLERANCE / 2
    taken = chosen(sweep_of({(1, 0): far, (4, 1): close, (3, 1): close, (2, 2): 1.0}))
    assert (taken["layer"], taken["setting"]) == (3, 1)
    assert chosen(sweep_of({(2, 0): far, (5, 3): 1.0}))["layer"] == 5


def test_the_choice_is_made_on_known_facts_that_are_no_requests_and_not_on_what_collapses(shipped):
    requests = unreported_requests(shipped, 20)
    reported = {(request.subject, request.prompt) for request in nbkit.read_requests("miniworld")}
    assert len(requests) == 40 and not {(request.subject, request.prompt) for request in requests} & reported
    assert [subject_kind(shipped, request) for request in requests] == [kind for kind in KINDS for _ in range(20)]
    assert score_targets(shipped, [r.text for r in requests], [r.target_true for r in requests])["correct"].all()


def test_the_sweep_has_a_row_a_layer_and_setting_and_more_room_makes_more_edits_take(shipped):
    sweep = efficacy_sweep(shipped, unreported_requests(shipped, 4), [3])
    assert len(sweep) == len(SETTINGS) and (sweep["n"] == 8).all() and sweep["said"].between(0, 1).all()
    assert sweep.iloc[0][list(PUBLISHED)].to_dict() == PUBLISHED
    assert sweep["said"].iloc[-1] >= sweep["said"].iloc[0]


def test_the_shipped_default_is_one_of_the_settings(shipped):
    default = hyper_parameters(shipped, "rome")
    assert {name: getattr(default, name) for name in PUBLISHED} in SETTINGS
