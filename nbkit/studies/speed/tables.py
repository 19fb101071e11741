"""What rows of measurements say: how many times faster, whether the cost grows, and what a large model would take."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

COUNTERFACT = 21_919  # requests in CounterFact, which results are extrapolated to
SETTING = ["model", "device", "dtype", "threads"]  # what two rows must share to be compared
AGAINST = {"screen": "edit"}  # what of the other path a row is compared to, if not the same


def ratios(frame: pd.DataFrame, over: str = "plain") -> pd.DataFrame:
    """How many times faster than a path: one row per setting, what, path and n, of rows measured in one run.

    over: that path: "whole passes", which is what a user of published code has, or the "plain" loop.

    Compared are the measurements of the same repeat. Columns: repeats, seconds_per_item (median), ratio (median), low
    and high (least and largest).
    """
    same = [*SETTING, "against", "repeat"]
    frame = frame.assign(against=frame["what"].replace(AGAINST))
    slow = frame[frame["path"] == over].set_index([*SETTING, "what", "repeat"])["seconds_per_item"]
    others = frame[~frame["path"].isin(["plain", over])]
    others = others.join(slow.rename_axis(same).rename("slow_seconds"), on=same, how="inner")
    others["ratio"] = others["slow_seconds"] / others["seconds_per_item"]
    by = others.groupby([*SETTING, "what", "path", "n"], sort=False)
    return by.agg(
        repeats=("ratio", "size"), seconds_per_item=("seconds_per_item", "median"), ratio=("ratio", "median"),
        low=("ratio", "min"), high=("ratio", "max"),
    ).reset_index()  # fmt: skip


def growing(frame: pd.DataFrame, at: Sequence[int] = (100, 200, 500, 1000, 2000, 5000)) -> pd.DataFrame:
    """Rows of `growth` summed up at the first batches that reach so many requests, and at the last.

    Columns: n, seconds_per_item (mean over the requests so far), relative (that, over the first row's), batch_seconds
    (the same of the batches since the row before), peak_memory (so far, bytes).
    """
    frame = frame.sort_values("n")
    seconds, items = (frame["seconds_per_item"] * frame["items"]).cumsum(), frame["items"].cumsum()
    n, last = frame["n"].to_numpy(), int(frame["n"].max())
    places = sorted({int(np.searchsorted(n, goal)) for goal in [*(goal for goal in at if goal <= last), last]})
    seconds, items = seconds.to_numpy()[places], items.to_numpy()[places]
    table = pd.DataFrame({"n": n[places], "seconds_per_item": seconds / items})
    table["relative"] = table["seconds_per_item"] / table["seconds_per_item"].iloc[0]
    table["batch_seconds"] = np.diff(seconds, prepend=0) / np.diff(items, prepend=0)
    table["peak_memory"] = frame["peak_memory"].cummax().to_numpy()[places]
    return table


def by_shape(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per model and precision from the rows of `of_shape`; medians over the repeats.

    Columns: edits_per_second_plain, _whole (whole passes), _replay (at the best n), n, ratio (replay to plain),
    tflops_per_edit, matmul_tflops (per second, measured), matmul_fraction (of that rate, which replay reaches),
    peak_gib (of all but second moments), tokens_per_second (second moments, of moment_layers at once),
    screened_per_second, and for the 21,919 requests of CounterFact, extrapolated: screen_minutes, edit_minutes (with
    evaluation).
    """
    rows = []
    for (model, dtype), group in frame.groupby(["model", "dtype"], sort=False):
        seconds = group.groupby(["what", "path", "n"])["seconds_per_item"].median()
        best = fastest(group)
        alone, whole, together = (seconds["edit", *at] for at in (("plain", 1), ("whole passes", 1), ("replay", best)))
        flops, rate = group["flops_per_edit"].iloc[0], group["matmul_rate"].iloc[0]
        study = growing(group[group["what"] == "growth"])["seconds_per_item"].iloc[-1]
        screen, moments = float(seconds["screen"].iloc[0]), seconds["second moment", "all layers"]
        peak = group.loc[group["what"] != "second moment", "peak_memory"].max()
        rows.append({
            "model": model, "dtype": dtype, "edits_per_second_plain": 1 / alone, "edits_per_second_whole": 1 / whole,
            "edits_per_second_replay": 1 / together, "n": best, "ratio": alone / together,
            "tflops_per_edit": flops / 1e12, "matmul_tflops": rate / 1e12,
            "matmul_fraction": flops / together / rate, "peak_gib": peak / 2**30,
            "tokens_per_second": 1 / float(moments.iloc[0]), "moment_layers": int(moments.index[0]),
            "screened_per_second": 1 / screen, "screen_minutes": COUNTERFACT * screen / 60,
            "edit_minutes": COUNTERFACT * study / 60,
        })  # fmt: skip
    return pd.DataFrame(rows)


def fastest(frame: pd.DataFrame) -> int:
    """The number of edits asked for together at which replay needs the least time for each."""
    edits = frame[(frame["what"] == "edit") & (frame["path"] == "replay")]
    return int(edits.groupby("n")["seconds_per_item"].median().idxmin())
