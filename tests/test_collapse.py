"""The verdict on an edit, and its shares with Wilson's interval."""

import numpy as np
import pandas as pd
import pytest

from nbkit.collapse import outcomes, shares

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
