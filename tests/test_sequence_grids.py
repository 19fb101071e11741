"""Sequences by model and method: medians and ranges over orders, every panel named, nothing off the scale unsaid."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nbkit import plots
from nbkit.records.survival import surviving

PAIRS = [("one", "rome"), ("one", "memit"), ("two", "rome")]  # two was not edited by memit


@pytest.fixture
def frame():
    rows = [
        {"model": model, "method": method, "group": group, "seed": seed, "n_edits": n, "checkpoint": n != 1,
         "perplexity": np.inf if group == "hard" and n == 3 else 4.0 + seed + n, "said": 0.1 * seed, "then": 0.5,
         "drift": 0.0 if n == 0 else np.nan if n == 2 and seed == 2 else 10.0 * n}
        for model, method in PAIRS for group in ("hard", "normal") for seed in range(3) for n in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def axes_of(rows, columns=2):
    return Figure(layout="constrained").subplots(rows, columns, squeeze=False, sharex=True, sharey="row")


def names(handles):
    return [handle.get_label() for handle in handles]


def test_perplexity_is_a_median_over_orders_with_what_is_off_the_scale_at_the_edge(frame):
    axes = axes_of(2)
    handles = plots.perplexity_grid(frame, axes)
    hard, normal = (line for line in axes[0, 0].lines if line.get_marker() == "None")
    assert normal.get_xdata().tolist() == [0, 2, 3] and normal.get_ydata().tolist() == [5, 7, 8]
    (triangles,) = [line for line in axes[0, 0].lines if line.get_marker() == "^"]
    assert triangles.get_xdata().tolist() == [3] and hard.get_ydata()[-1] == triangles.get_ydata()[0]
    assert names(handles)[:2] == ["hard", "normal"] and "infinite or NaN (9 of 54)" in names(handles)
    assert [ax.get_title() for ax in axes[0]] == ["rome", "memit"] and axes[1, 0].get_ylabel() == "two\nPerplexity"
    assert not axes[1, 1].get_visible() and axes[0, 1].get_xlabel() == axes[1, 0].get_xlabel() == "Edits"
    assert axes[0, 0].get_xlabel() == ""


def test_shares_and_sizes_begin_at_the_first_edit_and_what_is_left_out_is_counted(frame):
    axes = axes_of(2)
    handles = plots.share_grid(frame, axes, {"said": "said now", "then": "said then"}, "Edits said")
    now, then, *_ = axes[0, 0].lines
    assert now.get_xdata().tolist() == [2, 3] and now.get_ydata() == pytest.approx([0.1, 0.1])
    assert then.get_linestyle() == "--" and {"said now", "said then"} < set(names(handles))
    axes = axes_of(4)
    handles = plots.size_grid(frame.assign(felt=frame["drift"] / 5), axes, {"drift": "norm", "felt": "felt"})
    assert names(handles)[-1] == "12 of 72 not finite or 0"
    assert [axes[row, 0].lines[0].get_ydata()[-1] for row in range(4)] == [30, 6, 30, 6]
    assert [axes[row, 0].get_ylabel() for row in range(4)] == ["one\nnorm", "one\nfelt", "two\nnorm", "two\nfelt"]
    with pytest.raises(ValueError, match="no column drift"):
        plots.size_grid(frame.drop(columns="drift"), axes, {"drift": "norm"})


def test_the_share_that_stands_goes_down_in_steps_to_the_end():
    lives = {"hard": pd.DataFrame({"n_edits": [3, 6, 6], "collapsed": True}),
             "normal": pd.DataFrame({"n_edits": [3, 9, 9], "collapsed": [True, False, False]})}  # fmt: skip
    parts = [surviving(of_group).assign(model="one", method="rome", group=name) for name, of_group in lives.items()]
    standing = pd.concat(parts)
    axes = axes_of(1, 1)
    plots.survival_grid(standing, axes, {("one", "rome"): "p = 0.5"})
    hard, normal = axes[0, 0].lines
    assert hard.get_xdata().tolist() == [0, 3, 3, 6, 6, 9]
    assert hard.get_ydata() == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])
    assert normal.get_ydata()[-1] == pytest.approx(2 / 3)
    assert [text.get_text() for text in axes[0, 0].texts] == ["p = 0.5"]
