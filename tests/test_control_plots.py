"""Figures of edits under regularisers: means and intervals are those of the rows, panels and cells are named."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import check_frame_of_a_plot
from scipy import stats

from nbkit import plots
from nbkit.errors import ResultsError
from nbkit.records.ability import retained, with_ability, with_ability_by_model
from nbkit.records.intervals import student
from nbkit.records.pareto import front

mpl.use("Agg")
CHANCE = {"nli": 0.5, "open_qa": 0.0, "sentiment": 0.5}
REGULARISERS = {"none": 0.04, "rect 40 %": 0.02, "scale": 0.02, "random 40 %": 0.01}


def sequence_frame():
    """Two methods, four regularisers, three orders; rows of 0 edits are alike, as of one unedited model."""
    rows = []
    for method, (name, rate), seed, n in itertools.product(
        ["rome", "memit"], REGULARISERS.items(), range(3), range(0, 21, 5)
    ):
        wear = np.exp(-rate * n * (1 + seed / 10) * (0.5 if method == "memit" else 1))
        row = {"method": method, "regulariser": name, "seed": seed, "n_edits": n, "batch_size": 1}
        row |= {"reliability": np.nan if n == 0 else 0.5 + 10 * rate + seed / 100, "task_nli": 0.3 + 0.4 * wear}
        rows.append(row | {"task_open_qa": 0.6 * wear, "task_sentiment": 0.45})
    return pd.DataFrame(rows)


def batch_frame(sizes=(1, 10, 100, 1000)):
    rows = [
        {"method": method, "seed": seed, "n_edits": n, "batch_size": n, "task_nli": 0.9 - np.log10(n) / 5 - seed / 50}
        for method in ("memit", "mend") for seed in range(2) for n in sizes
    ]  # fmt: skip
    before = {"method": "none", "seed": 0, "n_edits": 0, "batch_size": 0, "task_nli": 0.95}
    return pd.DataFrame([before, *rows])


def labels_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    (found,) = [one for one in ax.lines if one.get_label() == label]
    return found


# statistics


def test_students_interval_is_scipys():
    values = [0.2, 0.4, np.nan, 0.9]
    found = student(values)
    low, high = stats.ttest_1samp([0.2, 0.4, 0.9], 0).confidence_interval()
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.5, low, high, 3))
    assert np.isnan(student([0.3])[1:3]).all() and student([0.3, 0.3])[:3] == (0.3, 0.3, 0.3) and student([]).n == 0


def test_the_front_is_what_no_other_point_beats():
    random = np.random.default_rng(0)
    points = np.round(random.random((40, 2)), 1)  # many alike
    points[5, 0] = np.nan
    expected = [not np.isnan(one).any() and not any((other >= one).all() and (other > one).any() for other in points)
                for one in points]  # fmt: skip
    assert front(*points.T).tolist() == expected and 0 < sum(expected) < 20
    assert front([1, 1, 0], [2, 2, 5]).tolist() == [True] * 3 and front([], []).tolist() == []


def test_ability_is_the_share_of_what_lies_above_chance():
    rows = pd.DataFrame({"n_edits": [0, 0, 5, 9], "task_nli": [0.7, 0.7, 0.6, 0.4],
                         "task_open_qa": [0.6, 0.6, 0.3, np.nan], "task_sentiment": [0.45, 0.45, 0.9, 0]})  # fmt: skip
    found = with_ability(rows, CHANCE)
    for column in ("ability", "worst"):
        assert found[column][:3].tolist() == pytest.approx([1, 1, 0.5])
    assert found[["ability", "worst"]].loc[3].isna().all(), "a score that is missing is no score"
    for wrong, chance, message in (
        (rows, {"nli": 0.5}, "not given for open_qa, sentiment"),
        (rows[["n_edits"]], CHANCE, "no column is a task_"),
        (rows[rows["n_edits"] > 0], CHANCE, "there are 0 sets of scores"),
        (rows.assign(n_edits=[0, 0, 0, 9]), CHANCE, "there are 2 sets of scores"),
        (rows, {"nli": 0.7, "open_qa": 0.9, "sentiment": 0.5}, "no task that the unedited model does better"),
    ):
        with pytest.raises(ResultsError, match=message):
            with_ability(wrong, chance)


def test_ability_of_several_models_is_each_one_s_by_the_tasks_that_it_does():
    rows = pd.DataFrame({"model": ["a", "b", "a", "b"], "n_edits": [0, 0, 5, 5],
                         "task_nli": [0.9, 0.51, 0.7, 0.9], "task_open_qa": [0.6, 0.8, 0.3, 0.2]})  # fmt: skip
    of_tasks = {"task": ["nli", "open_qa"], "chance": [0.5, np.nan], "choice": [True, False], "edited": False}
    unedited = {model: retained(pd.DataFrame(of_tasks | {"score": score, "stderr": 0.02})).set_index("task")
                for model, score in {"a": [0.9, 0.6], "b": [0.51, 0.8]}.items()}  # fmt: skip
    found = with_ability_by_model(rows, unedited)
    assert found["model"].tolist() == ["a", "a", "b", "b"] and found.index.tolist() == [0, 1, 2, 3]
    assert found["ability"].tolist() == pytest.approx([1, 0.5, 1, 0.25]), "b does not better than chance at nli"
    assert found["task_nli"].isna().tolist() == [False, False, True, True]


# curves by task


def test_a_task_s_curve_is_the_mean_over_orders_with_its_interval(ax):
    frame = sequence_frame().query("method == 'rome'")
    plots.task_curve(frame, ax, "nli", chance=0.5)
    of_rect = frame[frame["regulariser"] == "rect 40 %"].groupby("n_edits")["task_nli"]
    assert line(ax, "rect 40 %").get_ydata() == pytest.approx(of_rect.mean().to_numpy())
    assert line(ax, "guessing").get_ydata()[0] == 0.5
    bars = ax.collections[list(REGULARISERS).index("rect 40 %")].get_segments()
    low, high = stats.ttest_1samp(of_rect.get_group(20), 0).confidence_interval()
    assert bars[-1][:, 1] == pytest.approx([low, high])
    assert labels_of(ax) == ["guessing", *REGULARISERS, "95 %, 3 orders"] and ax.get_title("right") == "nli"
    with pytest.raises(ValueError, match="no column task_ner"):
        plots.task_curve(frame, ax, "ner")
    with pytest.raises(ValueError, match="duplicate"):  # two methods as if they were one
        plots.task_curve(sequence_frame(), ax, "nli")


def test_more_groups_than_colours_are_told_apart_by_their_dashes(ax):
    frame = sequence_frame().query("method == 'rome' and regulariser == 'none'")
    plots.task_curve(pd.concat([frame.assign(regulariser=str(n)) for n in range(15)]), ax, "nli")
    looks = {
        tuple(getattr(line(ax, str(n)), f"get_{what}")() for what in ("color", "marker", "linestyle"))
        for n in range(15)
    }
    assert len(looks) == 15


def test_one_order_has_no_interval_and_written_answers_no_line_of_guessing(ax):
    frame = sequence_frame().query("method == 'rome' and seed == 0")
    plots.task_curve(frame, ax, "open_qa", chance=0.0)
    assert labels_of(ax) == list(REGULARISERS)


def test_each_task_has_a_panel_and_spare_axes_go():
    with plots.paper_style():
        fig, axes = plt.subplots(2, 2, figsize=(plots.TWO_COLUMNS, 4))
        shown = plots.task_curves(sequence_frame().query("method == 'rome'"), axes, CHANCE)
        assert [ax.get_title("right") for ax in shown] == ["nli", "open qa", "sentiment"] and len(fig.axes) == 3
        assert [ax.get_xlabel() for ax in shown] == ["", "Number of edits", "Number of edits"]
        assert [ax.get_ylabel() for ax in shown] == ["Score", "", "Score"]
        with pytest.raises(ValueError, match="3 columns task_<name> need as many axes, one at least, not 1"):
            plots.task_curves(sequence_frame(), [shown[0]], CHANCE)
        plt.close(fig)


def test_over_batches_the_unedited_model_is_a_line(ax):
    plots.task_curve(batch_frame(), ax, "nli", 0.5, x="batch_size", by="method")
    assert line(ax, "unedited").get_ydata()[0] == 0.95 and ax.get_xscale() == "log"
    assert line(ax, "mend").get_xdata().tolist() == [1, 10, 100, 1000]
    assert labels_of(ax) == ["unedited", "guessing", "memit", "mend", "95 %, 2 orders"]
    ax.clear()
    plots.task_curve(batch_frame((2, 3, 4)), ax, "nli", x="batch_size", by="method")
    assert ax.get_xscale() == "linear"


def test_a_grid_of_batches_has_the_mean_in_each_cell_that_was_measured(ax):
    frame = pd.DataFrame({"batch_size": [10, 10, 10, 30], "n_edits": [10, 10, 30, 30], "seed": [0, 1, 0, 0],
                          "ability": [1.0, 0.5, 0.25, 0.0]})  # fmt: skip
    plots.batch_grid(frame, ax, "ability")
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "0.75"),
        ((1, 0), "0.25"),
        ((1, 1), "0.00"),
    }
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["10", "30"]
    with pytest.raises(ValueError, match="occurs twice"):
        plots.batch_grid(pd.concat([frame, frame]), ax, "ability")


def test_a_point_has_both_scores_of_an_edited_model_and_a_cross_the_models_without_the_other(ax):
    frame = sequence_frame().query("regulariser == 'none'").reset_index(drop=True)
    frame["task_nli:as_released"] = np.where(frame["n_edits"] == 20, np.nan, frame["task_nli"] + 0.1)
    plots.two_scorers(frame, ax, "nli", by="method")
    for name, rows in frame.query("n_edits > 0").groupby("method"):
        assert line(ax, name).get_xdata() == pytest.approx(rows["task_nli"])
        np.testing.assert_allclose(line(ax, name).get_ydata(), rows["task_nli:as_released"])
    crosses = [one for one in ax.lines if one.get_marker() == "x"]
    assert [len(one.get_xdata()) for one in crosses] == [3, 3] and (crosses[0].get_ydata() < 0).all()
    np.testing.assert_allclose(line(ax, "unedited").get_xydata(), [[0.7, 0.8]])
    assert labels_of(ax) == ["rome", "memit", "unedited", "no answer to score"]
    ax.clear()
    plots.two_scorers(frame.query("n_edits == 5"), ax, "nli")
    assert labels_of(ax) == ["rome", "memit"]


# edit performance


def test_the_front_joins_the_points_that_nothing_beats(ax):
    frame = with_ability(sequence_frame(), CHANCE).query("n_edits == 20")
    plots.pareto_front(frame, ax)
    means = frame.groupby(["method", "regulariser"])[["ability", "reliability"]].mean()
    best = means[front(means["ability"], means["reliability"])].sort_values("ability")
    (steps,) = [one for one in ax.lines if one.get_drawstyle() == "steps-pre"]
    assert np.transpose(steps.get_data()) == pytest.approx(best.to_numpy()) and 0 < len(best) < len(means)
    points = [one for one in ax.lines if one.get_marker() in "osD^" and len(one.get_xdata()) == 1]
    assert len(points) == len(means) and sum(one.get_markerfacecolor() != "white" for one in points) == len(best)
    assert labels_of(ax) == ["rome", "memit", *REGULARISERS, "Pareto front (filled)"]
    with pytest.raises(ValueError, match="13 regularisers cannot be told apart"):
        many = pd.concat([frame.assign(regulariser=str(n)) for n in range(13)])
        plots.pareto_front(many, ax)


def test_scores_of_zsre_by_regulariser(ax):
    frame = sequence_frame().query("n_edits == 20").assign(generalization=0.5, locality=np.nan)
    plots.method_scores(frame, ax, by="regulariser", scores=plots.ZSRE_SCORES)
    assert labels_of(ax) == ["reliability", "generalization", "locality"]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(REGULARISERS)
    points = [one.get_xdata()[0] for one in ax.lines if one.get_marker() == "o"]
    assert points == pytest.approx(frame.groupby("regulariser", sort=False)["reliability"].mean().to_numpy())


# maps


@pytest.mark.parametrize("by", ["max", "mean"])
def test_cells_of_a_map_hold_the_largest_or_the_mean_of_their_numbers(ax, by):
    change = np.random.default_rng(0).normal(size=(7, 10))
    image = plots.weight_map(change, ax, 1e-9, 10, cells=3, by=by)
    rows, columns = [0, 2, 4, 7], [0, 3, 6, 10]
    size = np.abs(change)
    expected = [[getattr(size[top:bottom, left:right], by)() for left, right in itertools.pairwise(columns)]
                for top, bottom in itertools.pairwise(rows)]  # fmt: skip
    np.testing.assert_allclose(image.get_array(), expected)
    assert tuple(image.get_extent()) == (-0.5, 9.5, 6.5, -0.5), "places are those in the weight"
    whole = plots.weight_map(change, ax, 1e-9, 10, cells=20, by=by)
    np.testing.assert_allclose(whole.get_array(), size)
    with pytest.raises(ValueError, match="by 'median' is unknown"):
        plots.weight_map(change, ax, 1e-9, 10, by="median")


def test_maps_side_by_side_share_a_scale_that_says_what_a_cell_is():
    changes = {f"{n} edits": np.random.default_rng(n).normal(size=(30, 40)) * n for n in (1, 5, 10, 15)}
    fig, axes = plt.subplots(1, 4)
    bar = plots.weight_maps(changes, axes, cells=10)
    assert bar.ax.get_ylabel() == "|ΔW|, largest of each cell" and [ax.get_title() for ax in axes] == list(changes)
    largest = max(np.abs(change).max() for change in changes.values())
    assert {image.get_clim() for ax in axes for image in ax.images} == {(largest * 1e-3, largest)}
    nothing = dict.fromkeys("abcd", np.zeros((2, 2)))
    for wrong, message in (({"one": np.ones((2, 2))}, "1 changes need as many"), (nothing, "largest change .* is 0")):
        with pytest.raises(ValueError, match=message):
            plots.weight_maps(wrong, axes)
    plt.close(fig)


@pytest.mark.parametrize(
    ("function", "frame"),
    [(lambda frame, ax: plots.task_curve(frame, ax, "nli", by="method", x="batch_size"), batch_frame()),
     (lambda frame, ax: plots.batch_grid(frame, ax, "task_nli"), batch_frame().query("method == 'memit'")),
     (lambda frame, ax: plots.two_scorers(frame, ax, "nli"),
      sequence_frame().query("regulariser == 'none'").assign(**{"task_nli:as_released": 0.5})),
     (plots.pareto_front, with_ability(sequence_frame(), CHANCE))],
)  # fmt: skip
def test_missing_columns_and_empty_frames_are_named(ax, function, frame):
    check_frame_of_a_plot(function, frame, ax)
