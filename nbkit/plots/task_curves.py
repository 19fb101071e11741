"""Task scores of models that were edited with one setting after another: curves by task, a grid of two sizes, and one
score against another of the same answers.

    fig, axes = plt.subplots(2, 4)
    task_curves(frame, axes, {"nli": 0.5, "open_qa": 0.0}, by="regulariser")            # over the number of edits
    task_curves(frame, axes, chance, x="batch_size", by="method")
    plots.shared_legend(fig, axes.ravel())
    batch_grid(frame, ax, "task_nli")
    two_scorers(frame, ax, "nli_generated", by="method")                                # each edited model scored twice

Every frame has one row a model: n_edits (0: unedited), seed (the order of the edits) and a column task_<name> a task.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.style import BLACK, GREY, REFERENCE, columns, group_styles, integer_axis, legend_above, log_axis
from nbkit.records.ability import scored_tasks
from nbkit.records.intervals import student

AXES = {"n_edits": "Number of edits", "batch_size": "Edits in one batch"}
DASHES = ("-", "--", ":")  # of the first, second and third group of the same colour
UNEDITED = {"color": GREY, "ls": ":", "lw": 1.0}


def task_curves(
    frame: pd.DataFrame,
    axes: Iterable[Axes],
    chance: Mapping[str, float],
    x: str = "n_edits",
    by: str = "regulariser",
) -> list[Axes]:
    """One `task_curve` panel a task, in the order of the columns; spare axes are taken away.

    Each panel has its legend; `shared_legend` puts a single one above the figure. Below the others no panel has the
    name of the numbers.
    """
    columns(frame, x, by, "seed")
    axes = list(np.ravel(np.asarray(axes, object)))
    tasks = scored_tasks(frame)
    if not tasks or len(axes) < len(tasks):
        raise ValueError(f"{len(tasks)} columns task_<name> need as many axes, one at least, not {len(axes)}")
    shown, spare = axes[: len(tasks)], axes[len(tasks) :]
    for ax in spare:
        ax.remove()
    for ax, task in zip(shown, tasks, strict=True):
        task_curve(frame, ax, task, chance.get(task), x, by)
        place, below = ax.get_subplotspec(), [each.get_subplotspec() for each in shown if each is not ax]
        if not place.is_first_col():
            ax.set_ylabel("")
        if any(each.colspan == place.colspan and each.rowspan.start > place.rowspan.start for each in below):
            ax.set_xlabel("")
    return shown


def task_curve(
    frame: pd.DataFrame,
    ax: Axes,
    task: str,
    chance: float | None = None,
    x: str = "n_edits",
    by: str = "regulariser",
) -> Axes:
    """One task's score against the number of edits or the size of a batch, a line for each group.

    A point is the mean over seeds, its bar the 95 % interval (Student's t) over them, which one seed has not.

    Args:
        frame: rows of one model: `x`, `by`, seed and task_<task>; each seed once at each `x` of a group.
        chance: what guessing scores, a dashed line; 0 or None: none.
        x: "n_edits" (0 is the unedited model), or "batch_size" (log axis where it spans a decade), beside which rows
            with n_edits 0 are a dotted line and no part of a curve.
    """
    column = f"task_{task}"
    columns(frame, x, by, "seed", column)
    handles = []
    if x != "n_edits" and "n_edits" in frame:
        before, frame = frame[frame["n_edits"] == 0], frame[frame["n_edits"] > 0]
        if len(before):
            handles.append(ax.axhline(before[column].mean(), zorder=1, label="unedited", **UNEDITED))
    if chance:
        handles.append(ax.axhline(chance, zorder=1, label="guessing", **REFERENCE))
    seen: list[str] = []
    for name, (colour, marker) in group_styles(frame[by]).items():
        dashes = DASHES[seen.count(colour) % len(DASHES)]
        seen.append(colour)
        table = frame[frame[by] == name].pivot(index=x, columns="seed", values=column)
        means = [student(row) for row in table.to_numpy()]
        low, high = ([getattr(each, end) for each in means] for end in ("low", "high"))
        ax.vlines(table.index, low, high, color=colour, lw=0.8, alpha=0.7)
        look = {"color": colour, "marker": marker, "ms": 3, "mew": 0, "lw": 1.0, "ls": dashes}
        handles += ax.plot(table.index, [each.mean for each in means], label=str(name), **look)
    n_seeds = frame["seed"].nunique()
    if n_seeds > 1:
        handles.append(Line2D([], [], color=GREY, lw=0.8, marker="|", ls="none", ms=7, label=f"95 %, {n_seeds} orders"))
    if x != "n_edits" and frame[x].max() >= 10 * frame[x].min():
        log_axis(ax.xaxis)
    else:
        integer_axis(ax.xaxis, "auto", (1, 2, 5, 10))
    ax.set_title(task.replace("_", " "), loc="right")
    ax.set(xlabel=AXES.get(x, x), ylabel="Score", ylim=(-0.03, 1.03))
    return legend_above(ax, handles, title_lines=1)


def batch_grid(frame: pd.DataFrame, ax: Axes, value: str) -> Axes:
    """A value between 0 and 1 by the size of the batches (rows) and the number of edits in all (columns).

    Args:
        frame: rows of one method and regulariser: batch_size, n_edits, seed and `value`. A cell is the mean over seeds,
            written into it; it stays empty where there is none.
    """
    columns(frame, "batch_size", "n_edits", "seed", value)
    if frame.duplicated(["batch_size", "n_edits", "seed"]).any():
        raise ValueError("a batch size, number of edits and seed occurs twice: give the rows of one method only")
    table = frame.pivot_table(index="batch_size", columns="n_edits", values=value, aggfunc="mean", dropna=False)
    ax.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    look = {"ha": "center", "va": "center", "size": "x-small" if table.shape[1] > 5 else "medium"}
    for row, column in np.argwhere(table.notna().to_numpy()):
        number = table.iat[row, column]
        ax.text(column, row, f"{number:.2f}", color="white" if number < 0.6 else "black", **look)
    ax.set_xticks(range(table.shape[1]), [f"{n:g}" for n in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{n:g}" for n in table.index])
    ax.tick_params(length=0)
    ax.set(xlabel="Number of edits", ylabel="Edits in one batch")
    return ax


def two_scorers(frame: pd.DataFrame, ax: Axes, task: str, by: str = "method", other: str = "as_released") -> Axes:
    """A task's score by another of its metrics against the first, of the same answers: a point an edited model.

    Args:
        frame: rows of one model: n_edits (0: unedited, a star), `by`, task_<task> and task_<task>:<other>. A model for
            which that one is NaN, as no answer could be read, is a cross below the axis.
    """
    first, second = f"task_{task}", f"task_{task}:{other}"
    columns(frame, "n_edits", by, first, second)
    before, after = frame[frame["n_edits"] == 0], frame[frame["n_edits"] > 0]
    ax.plot([0, 1], [0, 1], zorder=1, **REFERENCE)
    for name, (colour, marker) in group_styles(after[by]).items():
        rows = after[after[by] == name]
        look = {"color": colour, "ls": "none", "alpha": 0.7, "ms": 3.5}
        ax.plot(rows[first], rows[second], marker=marker, mew=0, label=str(name), **look)
        unscored = rows.loc[rows[second].isna(), first]
        ax.plot(unscored, np.full(len(unscored), -0.08), marker="x", mew=0.8, **look)
    handles = ax.get_legend_handles_labels()[0]
    if len(before):
        star = {"color": BLACK, "marker": "*", "ls": "none", "ms": 8, "mew": 0, "zorder": 3}
        handles += ax.plot(before[first].iloc[:1], before[second].iloc[:1], label="unedited", **star)
    if after[second].isna().any():
        handles.append(Line2D([], [], color=GREY, marker="x", ls="none", ms=3.5, label="no answer to score"))
    ax.set_title(task.replace("_", " "), loc="right")
    ax.set(xlabel="Score", ylabel=f"Score {other.replace('_', ' ')}", xlim=(-0.04, 1.04), ylim=(-0.12, 1.04))
    return legend_above(ax, handles, title_lines=1)
