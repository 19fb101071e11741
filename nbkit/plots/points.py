"""One point an edited model, on a log axis of perplexity: where values off the scale go, and strips of points."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.style import GREY, REFERENCE, log_axis

CEILING = 1e6  # perplexities above it are drawn at the edge, and the legend says so
MEDIAN = {"color": "black", "lw": 1.4}  # the bar in a strip


class Edge:
    """The end of an axis where the values off the scale are drawn: those above a ceiling, infinite or NaN.

    Args:
        values: all that the figure shows.
        ceiling: the edge, if a finite value exceeds it; else the edge lies well above the largest one.
        along: the axis of the values, "x" or "y"; places are on the other one.
    """

    def __init__(self, values, ceiling: float | None = CEILING, along: str = "y"):
        self.values, self.ceiling, self.along = np.asarray(values, float), ceiling, along
        finite = self.values[np.isfinite(self.values)]
        highest = finite.max() if len(finite) else 1.0
        self.position = float(ceiling) if ceiling is not None and highest > ceiling else float(highest) * 3

    def place(self, values) -> tuple[np.ndarray, np.ndarray]:
        """The values with those off the scale moved to the edge, and which those are."""
        values = np.asarray(values, float)
        over = ~(values <= self.position)
        return np.where(over, self.position, values), over

    def points(self, ax: Axes, places, values, style: tuple[str, str], **look) -> None:
        """Points of one (colour, marker), hollow triangles where the value is off the scale."""
        (colour, marker), places = style, np.asarray(places, float)
        drawn, over = self.place(values)
        ax.plot(*self._xy(places[~over], drawn[~over]), ls="none", marker=marker, color=colour, mew=0, **look)
        self.triangles(ax, places[over], colour)

    def triangles(self, ax: Axes, places, colour: str) -> None:
        """Hollow triangles at the edge."""
        if len(places):  # an unclipped line without points would still take room in the layout
            xy = self._xy(places, np.full(len(places), self.position))
            ax.plot(*xy, ls="none", marker=self._marker, mfc="none", mec=colour, ms=4.5, zorder=3, clip_on=False)

    def handles(self) -> list[Line2D]:
        """The legend entry that says how many values are drawn at the edge, and why; empty if none is."""
        n_over = int(self.place(self.values)[1].sum())
        if not n_over:
            return []
        what = f"> {_power(self.position)} or not finite" if self.position == self.ceiling else "infinite or NaN"
        label = f"{what} ({n_over} of {len(self.values)})"
        return [Line2D([], [], ls="none", marker=self._marker, mfc="none", mec=GREY, label=label)]

    def finish(self, ax: Axes) -> list[Line2D]:
        """Makes the axis logarithmic, ending at the edge if values are drawn there; returns their legend entry."""
        ax.set(**{f"{self.along}scale": "log"})
        handles = self.handles()
        if handles:
            ax.set(**{f"{self.along}lim": (None, self.position * 1.15)})
        log_axis(getattr(ax, f"{self.along}axis"))
        return handles

    def _xy(self, places, values) -> tuple:
        return (places, values) if self.along == "y" else (values, places)

    @property
    def _marker(self) -> str:
        return "^" if self.along == "y" else ">"


def _power(value: float) -> str:
    exponent = np.log10(value)
    return f"$10^{{{exponent:.0f}}}$" if exponent == round(exponent) else f"{value:.3g}"


class Strip(NamedTuple):
    """The points of one group, spread around a middle so that they can be told apart."""

    middle: float
    places: np.ndarray
    values: np.ndarray
    style: tuple[str, str]  # colour, marker

    def median(self, ax: Axes, median: float, reach: float, **look) -> None:
        """A bar at the median, from `reach` left of the middle to as much right of it."""
        ax.plot([self.middle - reach, self.middle + reach], [median] * 2, **MEDIAN, **look)


def strips(
    at: float, values: pd.Series, groups: pd.Series, styles: dict, width: float, spread: float, jitter
) -> Iterator[Strip]:
    """The strips of the groups that have values, side by side around the place `at`.

    Args:
        values, groups: of each row at this place.
        styles: {group: (colour, marker)} of all groups of the figure, in order: each has its place, also where empty.
        width: from one strip's middle to the next.
        spread: how far points stand from the middle at most.
        jitter: numpy Generator that places them.
    """
    for i, (name, style) in enumerate(styles.items()):
        of_group = values[groups == name].to_numpy(float)
        if len(of_group):
            middle = at + (i - (len(styles) - 1) / 2) * width
            yield Strip(middle, middle + jitter.uniform(-spread, spread, len(of_group)), of_group, style)


def unedited_line(frame: pd.DataFrame, draw: Callable[..., Line2D], **look) -> list[Line2D]:
    """The unedited model's perplexity, if the frame has it: drawn by `ax.axhline` or `ax.axvline`; a legend entry."""
    if "perplexity_before" not in frame:
        return []
    value = float(frame["perplexity_before"].iloc[0])
    return [draw(value, label=f"unedited ({value:.3g})", **REFERENCE, **look)]
