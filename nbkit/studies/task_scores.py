"""Scores on general-ability tasks, all of them lm-eval's: run in-process on the model as it is, edited or not.

    task_scores(lm)                                   # the ten tasks of miniworld, data/tasks/*.yaml
    task_scores(lm, ["hellaswag"], include_path=None)      # tasks that come with lm-eval (their data are downloaded)

A miniworld task's `metadata` says its kind in the papers' terms and its chance level, the score of guessing.
"""

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from nbkit import paths
from nbkit.errors import NbkitError
from nbkit.models.language_model import LanguageModel

TASKS = paths.DATA / "tasks"


def task_names(include_path: Path = TASKS) -> list[str]:
    """Names of the tasks described by the YAML files of a folder."""
    return sorted(path.stem for path in Path(include_path).glob("*.yaml"))


def task_scores(
    lm: LanguageModel,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str | None = TASKS,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Score the model as it is now on `tasks`, by default all of `include_path`, on the first `limit` items of each.

    One row a task, its first metric: task, kind, metric, score, stderr, chance (NaN where the task does not say) and
    n. With `include_path=None` the tasks are those that come with lm-eval. NbkitError for an unknown task, listing the
    known ones.
    """
    lm.check_causal()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings about in-process models come with every call
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if include_path is not None:
        known = task_names(Path(include_path))
        unknown = sorted(set(tasks or ()) - set(known))
        if unknown or not known:
            raise NbkitError(f"unknown tasks {unknown}; {include_path} has {', '.join(known) or 'no task files'}")
    names = tuple(tasks) if tasks is not None else tuple(known)
    harness = HFLM(
        pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, add_bos_token=lm.architecture.adds_bos
    )
    loaded = _load(names, str(include_path) if include_path is not None else None)
    with contextlib.redirect_stderr(io.StringIO()):  # a dozen progress bars per model; studies show one of their own
        results = evaluate(harness, loaded, limit=limit, log_samples=False, bootstrap_iters=100)
    return pd.DataFrame([_row(results, name) for name in names])


@lru_cache
def _load(names: tuple[str, ...], include_path: str | None) -> dict:
    """lm-eval's task objects. They hold the items: to read those for every edited model would cost seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager().load(list(names))
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    with contextlib.chdir(include_path):  # the task files name their data relative to themselves
        return manager.load(list(names))


def _row(results: dict, name: str) -> dict[str, object]:
    config = results["configs"][name]
    metric = config["metric_list"][0]["metric"]
    scores = results["results"][name]
    key = next(key for key in scores if key.startswith(metric + ","))
    stderr = scores[key.replace(",", "_stderr,", 1)]
    return {
        "task": name,
        "kind": config["metadata"].get("kind", name),
        "metric": metric,
        "score": scores[key],
        "stderr": stderr if isinstance(stderr, float) else float("nan"),  # lm-eval says "N/A" for a single item
        "chance": config["metadata"].get("chance", float("nan")),
        "n": results["n-samples"][name]["effective"],
    }
