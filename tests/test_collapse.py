"""The verdict on an edit, and its shares with Wilson's interval."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from nbkit import paths
from nbkit.records.collapse import counted, detection, outcomes, ratios, shares

FRAME = pd.DataFrame(
    {
        "perplexity": [3.0, 29.9, 30.0, np.inf, np.nan, 3.1],
        "perplexity_before": 3.0,
        "subject_kind": ["later", "later", "first", "first", "first", "first"],
    },
    index=[5, 3, 8, 1, 0, 2],
)


def test_at_the_ratio_and_without_a_number_the_model_has_collapsed():
    verdict = outcomes(FRAME, ratio=10)
    assert verdict.tolist() == ["normal", "normal", "collapse", "collapse", "collapse", "normal"]
    assert verdict.index.equals(FRAME.index)
    assert (outcomes(FRAME, ratio=9.9) == "collapse").sum() == 4


def test_a_perplexity_that_is_none_is_the_worst_in_tables_and_orders():
    assert ratios(FRAME).tolist() == [1.0, 29.9 / 3, 10.0, np.inf, np.inf, 3.1 / 3] and ratios(FRAME).name == "ratio"
    assert counted(FRAME["perplexity"]).median() == np.median([3.0, 29.9, 30.0, np.inf, np.inf, 3.1])
    assert ratios(FRAME).groupby(FRAME["subject_kind"]).max().to_dict() == {"later": 29.9 / 3, "first": np.inf}
    assert ratios(FRAME).index.equals(FRAME.index) and FRAME["perplexity"].isna().sum() == 1


@pytest.mark.parametrize("notebook", sorted((paths.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_summarises_perplexities_that_leave_nan_out(notebook):
    """Medians, maxima, orders and quotients are of `counted` or `ratios`, and never of the stored column itself."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    raw = r"""(?<!counted\()\w+\["perplexity"\](?:\.(?:median|max|min|mean|describe|quantile|sort_values)\b| /)"""
    assert not re.search(raw, code)


def test_shares_count_each_group_with_wilsons_interval():
    table = shares(FRAME, ratio=10).set_index("subject_kind")
    assert table.index.tolist() == ["later", "first"]
    assert table["collapsed"].tolist() == [0, 3] and table["n"].tolist() == [2, 4]
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) for 3 of 4
    z, n, p = 1.959964, 4, 0.75
    middle, half = p + z * z / 2 / n, z * np.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert table.loc["first", ["low", "high"]].tolist() == pytest.approx(expected, abs=1e-6)
    assert table.loc["later", "low"] == 0


def test_shares_of_groups_that_several_columns_name():
    frame = FRAME.assign(seed=[0, 0, 1, 1, 1, 1])
    table = shares(frame, ratio=10, by=["seed", "subject_kind"])
    expected = frame.groupby(["seed", "subject_kind"], sort=False).size()
    assert table.set_index(["seed", "subject_kind"])["n"].to_dict() == expected.to_dict()
    assert table["collapsed"].sum() == 3


def risky(scores, perplexities):
    return pd.DataFrame({"risk": scores, "perplexity": perplexities, "perplexity_before": 1.0})


def test_auc_is_the_share_of_pairs_in_the_right_order():
    frame = risky([1.0, 2.0, 3.0, 4.0, np.inf], [1.0, 50.0, 2.0, np.nan, 100.0])
    found = detection(frame, "risk")
    assert found.auc == pytest.approx(5 / 6) and (found.collapsed, found.n) == (3, 5)
    assert 0 <= found.low <= found.auc <= found.high <= 1
    assert found.curve[["false_alarms", "found"]].iloc[[0, -1]].to_numpy().tolist() == [[0, 0], [1, 1]]
    at_two = found.curve[found.curve["threshold"] == 2.0]  # a score of 2 or more: all collapses and half of the others
    assert at_two[["false_alarms", "found"]].to_numpy().tolist() == [[0.5, 1.0]]
    assert found.auc == detection(frame, "risk", seed=1).auc


def test_auc_of_one_outcome_only_is_nan():
    found = detection(risky([1.0, 2.0], [1.0, 1.0]), "risk")
    assert np.isnan(found.auc) and found.collapsed == 0 and not len(found.curve)


def test_area_and_interval_are_those_of_a_plain_loop():
    random = np.random.default_rng(0)
    score = random.normal(size=80).round(1)  # with ties
    broken = score + random.normal(size=80) > 0.8
    found = detection(risky(score, np.where(broken, 100.0, 1.0)), "risk")
    assert found.auc == pytest.approx(roc_auc_score(broken, score))
    bad, good = score[broken], score[~broken]
    labels = np.repeat([True, False], [len(bad), len(good)])
    areas = [
        roc_auc_score(labels, np.concatenate([random.choice(bad, len(bad)), random.choice(good, len(good))]))
        for _ in range(500)
    ]
    assert [found.low, found.high] == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize("perplexities", [[100.0, 1, 1, 1, 1], [1.0, 100, 100, 100, 100]])
def test_one_edit_of_an_outcome_is_enough_for_an_interval(perplexities):
    found = detection(risky([3.0, 1.0, 2.0, 4.0, 5.0], perplexities), "risk")
    assert found.auc == 0.5 and 0 <= found.low < 0.5 < found.high <= 1
