"""Shares and means of settings with their intervals, held to scipy and to rows made by hand."""

import math

import pandas as pd
import pytest
from scipy import stats

from nbkit.records.effects import effects, in_words


def test_effects_count_collapses_and_leave_out_what_was_not_measured():
    frame = pd.DataFrame({
        "setting": ["ROME"] * 4 + ["C-ROME"] * 2, "group": ["hard", "hard", "hard", "others", "hard", "hard"],
        "perplexity": [99.0, math.nan, 5, 4, 4, 4], "perplexity_before": 4.0,
        "said": [1.0, 0, 1, math.nan, 1 / 3, 1]})  # fmt: skip
    table = effects(frame, ["setting", "group"], {"said": "said plain"})
    assert table["measure"].tolist() == ["collapsed", "said plain"] * 3
    values = table.set_index(["setting", "group", "measure"])
    assert values.loc[("ROME", "hard", "collapsed"), "value"] == pytest.approx(2 / 3)
    assert values.loc[("ROME", "hard", "said plain"), ["n", "value"]].tolist() == [3, pytest.approx(2 / 3)]
    assert values.loc[("ROME", "others", "said plain"), "n"] == 0
    assert values.loc[("C-ROME", "hard", "said plain"), "value"] == pytest.approx(2 / 3)
    low, high = values.loc[("C-ROME", "hard", "collapsed"), ["low", "high"]]
    assert low == 0 and high == pytest.approx(stats.binomtest(0, 2).proportion_ci(method="wilson").high)
    assert "collapsed" not in effects(frame, ["setting"], {"said": "said"}, ratio=None)["measure"].tolist()
    assert in_words(table.iloc[0]) == "67 % [21, 94] of 3" and in_words(table.iloc[3]) == "none"
