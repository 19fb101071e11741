"""The four protocols of editing, by which general abilities are compared: one request or a batch, once or in sequence.

    for protocol, method in [("instance-sequential", "rome"), ("batch-single", "memit")]:
        frame = protocol_edits(lm, requests, texts, protocol, method, tasks=["nli", "sentiment"], batch_sizes=...)

| protocol            | an edit carries     | of the model               | made by            |
|---------------------|---------------------|----------------------------|--------------------|
| instance-single     | one request         | unedited                   | `single_edits`     |
| instance-sequential | one request         | with all edits before it   | `sequential_edits` |
| batch-single        | `batch_sizes` each  | unedited                   | `batch_edits`      |
| batch-sequential    | `batch_sizes` each  | with all edits before it   | `sequential_edits` |

Every edit is made and applied, a batch is one edit, and a sequence is edited once, however often it is measured.
Gu et al., Model Editing Harms General Abilities of Large Language Models, arXiv 2401.04700, name the last three.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.errors import MethodError
from nbkit.keys.solving import SecondMomentLike
from nbkit.methods.guard import Guard
from nbkit.methods.regularising import regulariser_words
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_choice
from nbkit.records.lists import as_requests, check_seeds
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies.batches import batch_edits, check_sizes
from nbkit.studies.orders import checked_n_edits, in_order
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.single import single_edits
from nbkit.studies.task_scores import TASKS

PROTOCOLS = ("instance-single", "instance-sequential", "batch-single", "batch-sequential")
SCORES = ("reliability", "generalization", "locality")
COLUMNS = ["protocol", "method", "regulariser", "seed", "batch_size", "n_edits", "checkpoint", "case_id", "perplexity",
           *SCORES, *(f"{name}_after" for name in SCORES)]  # fmt: skip


@verb
def protocol_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    protocol: str,
    method: str,
    seeds: Sequence[int] = (0, 1, 2),
    n_edits: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    evaluate_every: int = 1,
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    guard: Guard | None = None,
    regularise: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    task_limit: int | None = None,
    include_path: Path | str = TASKS,
    drift: bool = True,
    **hparams,
) -> pd.DataFrame:
    """Edits by one of `PROTOCOLS`, and what became of the model: rows of one shape, one for every model measured.

    Args:
        n_edits: the first so many requests of an order shuffled by each seed are edited; None: all.
        batch_sizes: requests an edit carries, a whole protocol for each size; of batch-* only, which cannot do without.
        evaluate_every: of *-sequential: the model is measured after so many requests, and after the last.
        regularise, tasks, task_limit, include_path: as in `sequential_edits`.
        drift: as there: whether drift, which is no column here, is measured and stored too (never of instance-single).

    Columns: protocol, method, regulariser (its name and arguments in words, "none" without), seed, batch_size, n_edits
    (how many requests are in the model: 1 in each row of instance-single, 0 the unedited model), checkpoint (True),
    case_id (of instance-single, else missing), perplexity; reliability, generalization and locality, teacher-forced as
    EasyEdit's (`metrics.edit_metrics`), as means over all requests that are in the model, and with _after as they were
    right after each edit, which is the same but in a sequence; task_<name> and task_<name>:stderr of each task. The
    unedited model is the first row of each seed and size; batch-single has it once a seed, with batch_size 0.

    Rows are stored edit by edit with all else that was measured, as those of the studies named above, which give it
    under the same arguments: more seeds, sizes or edits compute only what is new, and what was interrupted goes on.
    MethodError for an unknown protocol, and for a batch by a method that makes one edit of one request.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    requests, seeds = as_requests(requests), check_seeds(seeds)
    n_edits = checked_n_edits(n_edits, requests)
    in_batches = protocol.startswith("batch")
    if in_batches != (batch_sizes is not None):
        raise MethodError(f"{protocol} {'needs' if in_batches else 'has no'} batch_sizes")
    sizes = check_sizes(batch_sizes, n_edits) if in_batches else [1]
    setting = {
        "method": method,
        "store": store,
        "context_templates": context_templates,
        "second_moment": second_moment,
        "guard": guard,
        "regularise": regularise,
        "tasks": tasks,
        "task_limit": task_limit,
        "include_path": include_path,
        **hparams,
    }
    if protocol == "instance-single":
        chosen = [request for seed in seeds for request in in_order(requests, seed)[:n_edits]]
        singles = single_edits(lm, chosen, texts, **setting)
        frame = _with_unedited(singles.assign(seed=[seed for seed in seeds for _ in range(n_edits)], batch_size=1))
    elif protocol == "batch-single":
        batches = batch_edits(lm, requests, texts, sizes, seeds, drift=drift, **setting)
        frame = batches.assign(batch_size=batches["n_edits"], checkpoint=True, **_right_after(batches))
    else:
        setting |= {"seeds": seeds, "n_edits": n_edits, "evaluate_every": evaluate_every, "drift": drift}
        sequences = [sequential_edits(lm, requests, texts, per_step=n, **setting).assign(batch_size=n) for n in sizes]
        frame = pd.concat(sequences, ignore_index=True).assign(case_id=None)
        frame = frame[frame["checkpoint"]]
    frame = frame.assign(protocol=protocol, method=method, regulariser=regulariser_words(regularise))
    scored = [name for name in frame if name.startswith("task_") and not name.endswith("_before")]
    return frame.reindex(columns=[*COLUMNS, *scored]).reset_index(drop=True)


def _with_unedited(singles: pd.DataFrame) -> pd.DataFrame:
    """Rows of `single_edits`, those of each seed behind one of the unedited model."""
    before = {name: name.removesuffix("_before") for name in singles if name.endswith("_before")}
    singles = singles.assign(n_edits=1, checkpoint=True, **_right_after(singles))
    parts = []
    for _, of_seed in singles.groupby("seed", sort=False):
        unedited = of_seed.iloc[:1][["seed", "batch_size", "checkpoint", *before]].rename(columns=before)
        parts += [unedited.assign(n_edits=0), of_seed]
    return pd.concat(parts, ignore_index=True)


def _right_after(frame: pd.DataFrame) -> dict[str, pd.Series]:
    return {f"{name}_after": frame[name] for name in SCORES}
