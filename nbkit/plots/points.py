"""One point an edited model, on a log axis of perplexity: where values off the scale go, and strips of points."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.style import GREY, REFERENCE, log_axis

CEILING = 1e6  # perplexities above it are drawn at the edge, and the legend says so
HEADROOM = 1e3  # how many times the unedited perplexity is still on the scale, at least
MEDIAN = {"color": "black", "lw": 1.4}  # the bar in a strip


class Edge:
    """The end of an axis where the values off the scale are drawn: those above a ceiling, infinite or NaN.

    Args:
        values: all that the figure shows.
        ceiling: the edge, if a finite value exceeds it; else, or without one, it lies well above the largest value.
        along: the axis of the values, "x" or "y"; their places are on the other one.
        unedited: the unedited model's value, if known: where a thousand times it is more than the ceiling, a power of
            ten above that is the ceiling, since of texts that a model cannot read every value is large.
    """

    def __init__(
        self,
        values: pd.Series,
        ceiling: float | None = CEILING,
        along: str = "y",
        unedited: float | None = None,
    ):
        if ceiling is not None and unedited is not None and ceiling < HEADROOM * unedited < np.inf:
            ceiling = 10.0 ** np.ceil(np.log10(HEADROOM * unedited))
        finite = values[np.isfinite(values)]
        highest = float(finite.max()) if len(finite) else 1.0
        self.position = float(ceiling) if ceiling is not None and highest > ceiling else highest * 3
        self.values, self.ceiling, self.along = values, ceiling, along
        self.marker = "^" if along == "y" else ">"

    def place(self, values) -> tuple[np.ndarray, np.ndarray]:
        """The values with those off the scale moved to the edge, and which those are."""
        values = np.asarray(values, float)
        over = ~(values <= self.position)
        return np.where(over, self.position, values), over

    def points(self, ax: Axes, places: np.ndarray, values, style: tuple[str, str], **look) -> None:
        """Points of a (colour, marker), hollow triangles where the value is off the scale."""
        colour, marker = style
        drawn, over = self.place(values)
        self._plot(ax, places[~over], drawn[~over], marker=marker, color=colour, mew=0, **look)
        self.triangles(ax, places[over], colour)

    def triangles(self, ax: Axes, places, colour: str) -> None:
        """Hollow triangles at the edge."""
        if len(places):  # an unclipped line without points would still take room in the layout
            look = {"marker": self.marker, "mfc": "none", "mec": colour, "ms": 4.5, "zorder": 3, "clip_on": False}
            self._plot(ax, places, np.full(len(places), self.position), **look)

    def _plot(self, ax: Axes, places, values, **look) -> None:
        x, y = (places, values) if self.along == "y" else (values, places)
        ax.plot(x, y, ls="none", **look)

    def handles(self) -> list[Line2D]:
        """The legend entry that says how many values are drawn at the edge, and why; none if there are none."""
        n_over = int(self.place(self.values)[1].sum())
        what = f"> {_power(self.position)} or not finite" if self.position == self.ceiling else "infinite or NaN"
        label = f"{what} ({n_over} of {len(self.values)})"
        return [Line2D([], [], ls="none", marker=self.marker, mfc="none", mec=GREY, label=label)] if n_over else []

    def finish(self, ax: Axes) -> list[Line2D]:
        """Makes the axis logarithmic, ending at the edge if values are drawn there; returns their legend entry."""
        handles = self.handles()
        ax.set(**{f"{self.along}scale": "log"})
        if handles:
            ax.set(**{f"{self.along}lim": (None, self.position * 1.15)})
        log_axis(getattr(ax, f"{self.along}axis"))
        return handles


def _power(value: float) -> str:
    exponent = np.log10(value)
    return f"$10^{{{exponent:.0f}}}$" if exponent == round(exponent) else f"{value:.3g}"


class Strip(NamedTuple):
    """The points of one group at one place, moved apart so that each can be seen."""

    middle: float
    places: np.ndarray
    values: np.ndarray
    style: tuple[str, str]  # colour, marker

    def median(self, ax: Axes, median: float, reach: float, **look) -> None:
        """A bar at the median, reaching as far to both sides of the middle."""
        ax.plot([self.middle - reach, self.middle + reach], [median] * 2, **MEDIAN, **look)


def strips(
    at_places: Iterable[tuple[pd.Series, pd.Series]], styles: dict, width: float, spread: float
) -> Iterator[Strip]:
    """At each place 0, 1, ... a strip for every group that has values there, side by side.

    Args:
        at_places: the values and their groups, place by place.
        styles: {group: (colour, marker)} of all groups, in order: each keeps its side of a place.
        width: from one strip's middle to the next.
        spread: how far a point stands from the middle at most, always alike.
    """
    jitter = np.random.default_rng(0)
    for at, (values, groups) in enumerate(at_places):
        for i, (name, style) in enumerate(styles.items()):
            of_group = values[groups == name].to_numpy(float)
            if len(of_group):
                middle = at + (i - (len(styles) - 1) / 2) * width
                yield Strip(middle, middle + jitter.uniform(-spread, spread, len(of_group)), of_group, style)


def unedited_of(frame: pd.DataFrame) -> float | None:
    """The unedited model's perplexity, where the frame has it."""
    return float(frame["perplexity_before"].iloc[0]) if "perplexity_before" in frame else None


def unedited_line(frame: pd.DataFrame, draw: Callable[..., Line2D], **look) -> list[Line2D]:
    """The unedited model's perplexity, where the frame has it, by `ax.axhline` or `ax.axvline`; its legend entry."""
    value = unedited_of(frame)
    if value is None:
        return []
    return [draw(value, label=f"unedited ({value:.3g})", **REFERENCE, **look)]
