"""What all figures share: sizes, fonts, colours of the groups, legends, ticks, and how to save."""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import interactive, is_interactive, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.style import available, context
from matplotlib.transforms import ScaledTranslation

from nbkit import paths
from nbkit.errors import ResultsError
from nbkit.records.files import write_atomically
from nbkit.records.verdicts import Verdict, as_markdown

NO_DATES = {"pdf": ["CreationDate", "ModDate", "Creator", "Producer"], "png": ["Software"], "svg": ["Date", "Creator"]}
COLUMN = 3.4  # inches: the width of one column of a two-column paper
TWO_COLUMNS = 7.0  # inches: the full text width

BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito: told apart by all eyes
ORANGE, SKY, PURPLE, GREY = "#E69F00", "#56B4E9", "#CC79A7", "#666666"
REFERENCE = {"color": GREY, "ls": "--", "lw": 0.8}  # a line to compare with: the unedited model, chance, a threshold

# The same group has the same colour and marker in every figure; other names take the spare ones in turn.
GROUP_STYLES = {
    "normal": (BLUE, "o"),
    "later": (BLUE, "o"),
    "several-token first": (GREEN, "s"),
    "one-token first": (VERMILION, "D"),
    "collapse": (VERMILION, "D"),
    "hard": (VERMILION, "D"),
    "mixed": (PURPLE, "v"),
    "ROME": (PURPLE, "v"),
    "prefixed": (SKY, "P"),
    "C-ROME": (SKY, "P"),
    "plain": (ORANGE, "X"),
    "p-ROME": (ORANGE, "X"),
}
SPARE_STYLES = [(BLUE, "o"), (VERMILION, "D"), (GREEN, "s"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "X"), (BLACK, "*")]


@contextmanager
def paper_style() -> Iterator[None]:
    """The settings of the paper's figures (paper.mplstyle), for a `with`; on top of them those of NBKIT_STYLE.

    NBKIT_STYLE is an .mplstyle file, or the name of a style that matplotlib knows. ResultsError if it is neither.

    A notebook's backend is switched on by its first figure, within such a `with`, and then says that figures are to be
    shown: that outlives it, unlike what a style sets.
    """
    own = os.environ.get("NBKIT_STYLE")
    if own and own not in available and not Path(own).is_file():
        raise ResultsError(f"NBKIT_STYLE is {own!r}, which is no file and no style that matplotlib knows")
    with context([Path(__file__).with_name("paper.mplstyle"), *([own] if own else [])]):
        yield
        shown = is_interactive()
    interactive(shown)


def group_styles(names: Iterable) -> dict:
    """{group: (colour, marker)} of the groups that occur, known ones always alike; no two are the same, up to 49."""
    names = list(dict.fromkeys(names))
    taken = {GROUP_STYLES[name][0] for name in names if name in GROUP_STYLES}
    colours, markers = zip(*([style for style in SPARE_STYLES if style[0] not in taken] or SPARE_STYLES), strict=True)
    n = len(colours)
    spare = ((colours[i % n], markers[(i + i // n) % n]) for i in itertools.count())
    return {name: GROUP_STYLES.get(name) or next(spare) for name in names}


def columns(frame, *names: str) -> None:
    """Raises ValueError for an empty frame or a missing column, saying which one and what is there."""
    missing = [name for name in names if name not in frame]
    if missing:
        raise ValueError(f"the frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ValueError("the frame has no rows to draw")


def group_handles(styles: dict, groups: pd.Series | None = None, alpha: float | None = None) -> list:
    """Legend entries of groups: their markers, or patches whose filling has that `alpha`.

    Args:
        styles: {group: (colour, marker)}.
        groups: the group of each row, where the entries are to say how many rows a group has.
    """
    handles = []
    for name, (colour, marker) in styles.items():
        label = str(name) if groups is None else f"{name} (n = {(groups == name).sum()})"
        if alpha is None:
            handles.append(Line2D([], [], ls="none", marker=marker, color=colour, mew=0, label=label))
        else:
            handles.append(Patch(fc=(colour, alpha), ec=colour, label=label))
    return handles


def log_axis(axis: Axis) -> None:
    """Makes an axis logarithmic, with numbers where its range is below two decades and powers of ten elsewhere.

    Call it when all is drawn: matplotlib alone labels a short range with nothing, or with labels over each other.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = np.log10(axis.get_view_interval())
    if high - low >= 2:
        axis.set_major_locator(ticker.LogLocator(numticks=7))
        axis.set_major_formatter(ticker.LogFormatterMathtext())
        axis.set_minor_formatter(ticker.NullFormatter())
        return
    narrow = axis.axis_name == "x" and axis.axes.bbox.width < 1.6 * axis.axes.figure.dpi  # no room for many numbers
    subs, n_ticks = ((1, 3), 3) if narrow else ((1, 2, 5), 5)
    axis.set_major_locator(ticker.LogLocator(subs=subs) if high - low >= 0.6 else ticker.MaxNLocator(n_ticks))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def integer_axis(axis: Axis, n: int | str = 10, multiples: Iterable[int] | None = None) -> None:
    """Numbers at whole values only: steps, edits, layers.

    Args:
        n: at most so many intervals, or "auto" for as many as there is room for.
        multiples: what the distance of two numbers may be, times a power of ten.
    """
    axis.set_major_locator(ticker.MaxNLocator(n, integer=True, steps=multiples))


def percent_axis(axis: Axis) -> None:
    """Shares between 0 and 1 as percentages."""
    axis.set_major_formatter(ticker.PercentFormatter(xmax=1))


def legend_above(ax: Axes, handles: list | None = None, ncols: int = 2, title_lines: int = 0) -> Axes:
    """A legend over the axes (and over its title of so many lines), where it hides no data."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    above = ax.transAxes + _lift(ax, title_lines)
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "bbox_transform": above, "borderaxespad": 0.3}
    ax.legend(handles=handles, ncols=ncols, **place)
    return ax


def _lift(ax: Axes, lines: int) -> ScaledTranslation:
    """Upwards by so many lines of a title."""
    return ScaledTranslation(0, lines * 11 / 72, ax.figure.dpi_scale_trans)


def shared_legend(fig: Figure, axes: Iterable[Axes], ncols: int = 4) -> None:
    """One legend above the figure in place of those of its panels; entries of the same name are shown once."""
    handles = {}
    for ax in axes:
        legend = ax.get_legend()
        if legend is not None:
            named = zip((text.get_text() for text in legend.get_texts()), legend.legend_handles, strict=True)
            handles |= {name: handle for name, handle in named if name not in handles}
            legend.remove()
    fig.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=ncols)


def label_panels(axes: Iterable[Axes]) -> None:
    """(a), (b), (c) ... at the top left corner of the panels, below the legend of a panel that has one."""
    for number, ax in enumerate(axes):
        ax.set_title(f"({chr(ord('a') + number)})", loc="left", fontweight="bold")
        legend = ax.get_legend()
        if legend is not None and not ax.get_title("right"):  # with a title the legend stands above that already
            legend.set_bbox_to_anchor((0.5, 1.0), ax.transAxes + _lift(ax, lines=1))


def formats(fig: Figure) -> list[str]:
    """The kinds of file that figures are written as: those of NBKIT_FIGURE_FORMATS (such as "svg,png"), or pdf and png.

    ResultsError for one that matplotlib does not write.
    """
    asked = os.environ.get("NBKIT_FIGURE_FORMATS", "pdf,png").split(",")
    kinds, known = [kind.strip().lower() for kind in asked if kind.strip()], fig.canvas.get_supported_filetypes()
    if not kinds or not set(kinds) <= set(known):
        raise ResultsError(f"NBKIT_FIGURE_FORMATS is {','.join(asked)!r}; name some of {', '.join(sorted(known))}")
    return kinds


def save_figure(fig: Figure, name: str, caption: str, folder: str | Path | None = None) -> list[Path]:
    """Writes the figure in the kinds of file that `formats` names (png: 300 dots an inch) and the caption as name.md.

    Returns their paths, that of name.png, if there is one, last. The same figure gives the same bytes again: no dates
    or versions are written into pdf, png and svg.

    Args:
        caption: one or more sentences; say n and the seeds.
        folder: where `paths.figures` says unless told otherwise; made if missing.

    Raises ResultsError if the folder is full or cannot be written; a file of an earlier run then stays whole.
    """
    folder = paths.figures() if folder is None else Path(folder)
    files = {folder / f"{name}.md": caption.strip().encode() + b"\n"}
    with paper_style():
        for kind in sorted(formats(fig), key=lambda kind: (kind == "png", kind)):
            drawn = io.BytesIO()
            fig.savefig(drawn, format=kind, metadata=dict.fromkeys(NO_DATES.get(kind, [])) or None)
            files[folder / f"{name}.{kind}"] = drawn.getvalue()
    _write(name, folder, files)
    return list(files)


def save_verdicts(verdicts: Sequence[Verdict], name: str, caption: str, folder: str | Path | None = None) -> Path:
    """Writes claims and what was measured of them as a table in Markdown, the caption below it; returns its path.

    Args:
        name: of the file, without .md: "01_verdicts". `python -m nbkit figures` collects the files that end in
            _verdicts.md into verdicts.md.
        caption: what all of them were measured on, as of a figure: n, seeds, and what intervals are over.

    Raises ResultsError as `save_figure` does.
    """
    folder = paths.figures() if folder is None else Path(folder)
    path = folder / f"{name}.md"
    _write(name, folder, {path: f"{as_markdown(verdicts)}\n{caption.strip()}\n".encode()})
    return path


def _write(name: str, folder: Path, files: Mapping[Path, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_atomically(path, lambda file, content=content: file.write(content))
    except OSError as error:
        raise ResultsError(
            f"cannot write {name} to {folder}: {error.strerror or error}. Free or unlock the folder, or set "
            "NBKIT_FIGURES to another one"
        ) from error
