"""Stored sequences of edits: which there are, the rows of one, and what one of its steps says.

    found = stored_sequences()                                    # one row a sequence
    rows = sequence_rows(found["key"][0], found["seed"][0])       # one row an edit, as `studies.sequential_edits` gives
    step_values(rows, 5)                                          # {"perplexity": ..., "times the unedited": ..., ...}
    step_scores(rows, 5)                                          # metric x (this edit, all so far, right after each)

Needs no model and no torch.
"""

from typing import Any

import pandas as pd

from nbkit.errors import ResultsError
from nbkit.records.bounds import nearest
from nbkit.records.collapse import counted
from nbkit.records.results import Store
from nbkit.records.tables import results

SEQUENTIAL = "sequential_edits"
FOUND = [
    "key",
    "seed",
    "model",
    "method",
    "key_mode",
    "layer",
    "n_edits",
    "every",
    "subjects",
    "before",
    "after",
    "stored",
]
SCORES = {"this edit": "_last", "all edits so far": "", "each right after it": "_after"}
METRICS = ("efficacy", "efficacy_argmax", "efficacy_generated", "paraphrase", "neighborhood", "reliability",
           "generalization", "locality")  # fmt: skip
OF_MODEL = ("forgotten", "forgotten_generated", "drift", "drift_felt", "drift_felt_relative")  # at a checkpoint
VALUES = ("update_norm", "numerator", "denominator", "optimised_probability", "final_loss", "n_steps", "stop_reason")


def stored_sequences(study: str = SEQUENTIAL, store: Store | None = None) -> pd.DataFrame:
    """The stored sequences of edits, the last stored first: one row for each order (seed) of each study of that name.

    Columns: key (the folder of the rows: all but the order is the same in it), seed, model, method, key_mode, layer
    (text), n_edits, every (perplexity was measured after so many edits), subjects (how many of each kind are edited, in
    words), before and after (perplexity of the unedited model and after the last edit), stored (when).

    ResultsError if no study of that name is stored, if its rows are no sequences, and for a damaged file.
    """
    rows = _rows(study, store)
    found = []
    for (key, seed), sequence in rows.groupby(["key", "seed"], sort=False):
        kinds = sequence["subject_kind"].dropna().astype(str).str.split(", ").explode().value_counts()
        last = sequence.iloc[-1]
        about = {name: sequence[f"parameters.{name}"].iloc[0] for name in ("method", "evaluate_every")}
        found.append(
            {
                "key": key,
                "seed": int(seed),
                "model": last["model"],
                "method": about["method"],
                "key_mode": _parameter(sequence, "key_mode"),
                "layer": _parameter(sequence, "layers") or _parameter(sequence, "layer"),
                "n_edits": int(last["n_edits"]),
                "every": int(about["evaluate_every"]),
                "subjects": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
                "before": sequence["perplexity"].iloc[0],
                "after": counted(sequence["perplexity"]).iloc[-1],
                "stored": sequence["created"].max(),
            }
        )
    table = pd.DataFrame(found, columns=FOUND)
    latest = table.groupby("key")["stored"].transform("max")
    order = table.assign(latest=latest).sort_values(["latest", "key", "seed"], ascending=[False, True, True])
    return order[FOUND].reset_index(drop=True)


def sequence_rows(
    key: str, seed: int | None = None, study: str = SEQUENTIAL, store: Store | None = None
) -> pd.DataFrame:
    """The rows of one sequence in order, the unedited model first; seed None: of every order stored with that key.

    ResultsError, besides those of `stored_sequences`, for a key or an order that is not there.
    """
    rows = _rows(study, store)
    of_key = rows[rows["key"] == key]
    if of_key.empty:
        raise ResultsError(f"{study} has no key {key!r}{nearest(key, sorted(set(rows['key'])))}")
    if seed is not None and seed not in set(of_key["seed"]):
        raise ResultsError(f"{study} of key {key} has no order {seed}; it has {sorted(set(of_key['seed']))}")
    chosen = of_key if seed is None else of_key[of_key["seed"] == seed]
    return chosen.sort_values(["seed", "n_edits"], ignore_index=True)


def step_values(rows: pd.DataFrame, step: int) -> dict[str, Any]:
    """What was measured at one step of one sequence besides its scores: perplexity, its rise, and the edit's numbers.

    perplexity and "times the unedited" are missing where perplexity was not measured, between two checkpoints, and
    infinite where the model is broken. So are what is forgotten and the drift (`studies.sequential_edits`).
    """
    row, values = _at(rows, step), {}
    if row["checkpoint"]:
        perplexity = float(counted(rows["perplexity"])[row.name])
        values |= {"perplexity": perplexity, "times the unedited": perplexity / float(rows["perplexity"].iloc[0])}
    return values | {name: row[name] for name in (*OF_MODEL, *VALUES) if name in row and pd.notna(row[name])}


def step_scores(rows: pd.DataFrame, step: int) -> pd.DataFrame:
    """The metrics of edits at one step: one row each that was measured, none at step 0; NaN where there is no value.

    Columns: this edit (right after it), all edits so far (mean, on the model now; at a checkpoint only), and each right
    after it (mean over the edits so far): where all so far are below that, earlier ones are forgotten.
    """
    row = _at(rows, step)
    scores = {
        what: {metric: row.get(f"{metric}{ending}", float("nan")) for metric in METRICS}
        for what, ending in SCORES.items()
    }
    return pd.DataFrame(scores, dtype=float).dropna(how="all")


def _at(rows: pd.DataFrame, step: int) -> pd.Series:
    of_step = rows[rows["n_edits"] == step]
    if len(of_step) != 1:
        raise ResultsError(f"step {step} is {len(of_step)} times among these rows, of 0 to {rows['n_edits'].max()}")
    return of_step.iloc[0]


def _rows(study: str, store: Store | None) -> pd.DataFrame:
    """Each row once, whichever runs asked for it; without the last edit of a shorter sequence whose requests a longer
    one edits together with others."""
    rows = results(study, store=store)
    missing = [name for name in ("seed", "n_edits", "perplexity", "checkpoint") if name not in rows]
    if missing:
        raise ResultsError(f"the rows of {study} are no sequences of edits: they have no {', '.join(missing)}")
    rows = rows.sort_values(["key", "seed", "n_edits", "checkpoint"], kind="stable")  # measured at the end of one: last
    rows = rows.drop_duplicates(["key", "seed", "n_edits"], keep="last", ignore_index=True)
    if "parameters.per_step" not in rows:
        return rows
    whole = rows["n_edits"] % rows["parameters.per_step"].fillna(1) == 0
    longest = rows.groupby(["key", "seed"])["n_edits"].transform("max")
    return rows[whole | (rows["n_edits"] == longest)].reset_index(drop=True)


def _parameter(rows: pd.DataFrame, name: str) -> str | None:
    column = f"parameters.{name}"
    value = rows[column].iloc[0] if column in rows else None
    if value is None or pd.isna(value):
        return None
    return f"{value:g}" if isinstance(value, float) else str(value).strip("[]")
