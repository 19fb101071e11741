"""What a guard would have done is told from rows without one, and is what the guard then does."""

import math

import numpy as np
import pandas as pd
import pytest

import nbkit
from nbkit.errors import ResultsError
from nbkit.keys.moments import second_moments
from nbkit.records.guarding import guarded, policies
from nbkit.records.results import Store
from nbkit.studies.single import single_edits

METRICS = ["efficacy", "efficacy_argmax", "target_probability"]


@pytest.fixture
def run(tiny, requests, contexts, texts, tmp_path):
    C = second_moments(tiny, [1], texts, progress=False)
    shared = {"context_templates": contexts, "layer": 1, "v_num_grad_steps": 3, "store": Store(tmp_path)}

    def run(most: float, instead: str = "refuse", **more) -> pd.DataFrame:
        return single_edits(tiny, requests, texts, guard=nbkit.Guard(most, instead, C), **shared, **more)

    return run


def test_it_is_what_the_guard_does(run, tiny, requests):
    mixed, prefixed = run(math.inf), run(math.inf, key_mode="prefixed")
    unedited = nbkit.edit_metrics(tiny, requests)[METRICS]
    cuts = sorted([*mixed["felt_relative"], *prefixed["felt_relative"]])
    for most in [0.9 * cuts[0], *np.nextafter(cuts, np.inf)]:
        for instead, rows in (("refuse", None), ("C-ROME", prefixed)):
            really, told = run(float(most), instead), guarded(mixed, unedited, float(most), rows)
            assert told["guard"].tolist() == really["guard"].tolist()
            names = ["perplexity", *METRICS]
            np.testing.assert_allclose(told[names].astype(float), really[names].astype(float), rtol=1e-9)


def test_policies_count_what_is_no_number_as_the_worst():
    rows = pd.DataFrame({"felt_relative": [1.0, 9, math.nan, 2], "perplexity": [4, math.nan, 400, 5.0], "m": [1.0] * 4})
    rows["perplexity_before"], unedited = 4.0, pd.DataFrame({"m": [0.0, 0, 0, 0]})
    instead = rows.loc[[1, 2]].assign(perplexity=6.0, felt_relative=[1, 5], m=0.5)
    judged = {"none": guarded(rows, unedited, math.inf), "refuse": guarded(rows, unedited, 3.0),
              "C-ROME": guarded(rows, unedited, 3.0, instead)}  # fmt: skip
    table = policies(judged, ["m"]).set_index("policy")
    assert table.loc["refuse", ["passed", "fell back", "refused", "worst_ratio", "m"]].tolist() == [2, 0, 2, 1.25, 0.5]
    assert table.loc["C-ROME", ["passed", "fell back", "refused", "worst_ratio", "m"]].tolist() == [2, 1, 1, 1.5, 0.625]
    assert judged["none"]["guard"].tolist() == ["passed", "passed", "refused", "passed"]  # NaN is above any
    assert math.isinf(table.loc["none", "worst_ratio"])


def test_rows_that_lack_something_are_refused():
    rows = pd.DataFrame({"felt_relative": [9.0], "perplexity": 4.0, "perplexity_before": 4.0, "m": 1.0})
    with pytest.raises(ResultsError, match="no column felt_relative"):
        guarded(rows.drop(columns="felt_relative"), rows[["m"]], 3.0)
    with pytest.raises(ResultsError, match="1 edits that are felt more than 3 have no row by C-ROME"):
        guarded(rows, rows[["m"]], 3.0, rows[:0])
    with pytest.raises(ResultsError, match="0 rows of the unedited model for 1 edits"):
        guarded(rows, rows.loc[:-1, ["m"]], 3.0)
