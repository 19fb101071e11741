"""Scores on general-ability tasks, all of them lm-eval's: run in-process on the model as it is, edited or not.

    task_scores(lm)                                   # the ten tasks of miniworld, data/tasks/*.yaml
    task_scores(lm, ["nli", "hellaswag"])             # and any that comes with lm-eval, whose data are downloaded

A miniworld task's `metadata` says its kind in the papers' terms and its chance level, the score of guessing.
"""

import contextlib
import difflib
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit import paths
from nbkit.edits.door import verb
from nbkit.errors import MethodError, NbkitError
from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import steps
from nbkit.records.bounds import check_number, check_text
from nbkit.records.lists import as_list

TASKS = paths.DATA / "tasks"


def task_names(include_path: Path | str = TASKS) -> list[str]:
    """Names of the tasks described by the YAML files of a folder."""
    return sorted(path.stem for path in Path(include_path).glob("*.yaml"))


@verb
def task_scores(
    lm: LanguageModel,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str = TASKS,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the model as it is now on `tasks`, by default all of `include_path`, on the first `limit` items of each.

    A name that `include_path` does not have is one of lm-eval's own; a group of them stands for all its tasks. One row
    a task, its first metric: task, kind, metric, score, stderr, chance (NaN where the task does not say), choice
    (whether an answer is chosen among some, so that no model falls below chance for long) and n.
    NbkitError for a task that neither has, naming the nearest.
    """
    lm.check_causal()
    check_tasks(tasks, limit, include_path)
    check_number("batch_size", batch_size, whole=True, least=1)
    for chatty in ("lm_eval", "transformers.modeling_utils"):  # in-process models; passes without a mask, padded right
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    names = tuple(task_names(include_path) if tasks is None else tasks)
    if not names:
        raise NbkitError(f"no tasks to score: {include_path} has no task files")
    try:
        loaded = _load(names, str(include_path))
    except NbkitError:
        raise
    except Exception as error:  # whatever lm-eval meets in a file that is no task's
        files = ", ".join(f"{name}.yaml" for name in names)
        raise NbkitError(
            f"the tasks of {include_path} cannot be loaded, a file of them ({files}) is malformed: {error!r}"
        ) from error
    harness = HFLM(
        pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, add_bos_token=lm.architecture.adds_bos
    )
    rows = []
    for part in steps(loaded, f"{lm.title}: task scores", "task", progress):
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of lm-eval's own, some for every task
            results = evaluate(harness, part, limit=limit, log_samples=False, bootstrap_iters=100)
        rows += [_row(results, name) for name in part["tasks"]]
    return pd.DataFrame(rows)


def task_texts(
    n: int, tasks: Sequence[str] | None = None, include_path: Path | str = TASKS, seed: int = 0
) -> list[str]:
    """`n` of the prompts of `tasks`' items, as perplexity can be measured on: as evenly from all tasks as can be, drawn
    by `seed`. Fewer where there are no more. Arguments and errors as in `task_scores`.
    """
    check_tasks(tasks, None, include_path)
    check_number("n", n, whole=True, least=1)
    random, prompts = np.random.default_rng(seed), []
    for part in _load(tuple(task_names(include_path) if tasks is None else tasks), str(include_path)):
        for task in part["tasks"].values():
            documents = list(task.test_docs() if task.has_test_docs() else task.validation_docs())
            prompts.append([task.doc_to_text(documents[place]) for place in random.permutation(len(documents))])
    in_turn = [text for texts in zip_longest(*prompts) for text in texts if text is not None]
    return in_turn[:n]


def check_tasks(tasks: Sequence[str] | None, limit: int | None, include_path: Path | str) -> None:
    """An error of nbkit for names that are no list of texts, a limit below 1, and a folder that is not there."""
    for index, name in enumerate(() if tasks is None else as_list("tasks", tasks, "names of tasks", MethodError)):
        check_text(f"tasks[{index}]", name)
    if limit is not None:
        check_number("limit", limit, whole=True, least=1)
    if not isinstance(include_path, str | Path) or not Path(include_path).is_dir():
        raise NbkitError(f"there is no folder of tasks at {include_path}")


@lru_cache
def _load(names: tuple[str, ...], include_path: str) -> list[dict]:
    """lm-eval's task objects by name. They hold the items: to read those for every edited model would cost seconds."""
    own = task_names(include_path)
    return [_own_task(name, include_path) if name in own else _task_of_lm_eval(name, own, include_path)
            for name in names]  # fmt: skip


def _own_task(name: str, include_path: str) -> dict:
    import datasets

    manager = _own(include_path)
    online, datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_DATASETS_OFFLINE, True  # files beside the task
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # two for every task, done as soon as they are drawn
    try:
        with contextlib.chdir(include_path):  # the task files name their data relative to themselves
            return manager.load([name])
    finally:
        datasets.config.HF_DATASETS_OFFLINE = online
        if shown:
            datasets.enable_progress_bars()


def _task_of_lm_eval(name: str, own: Sequence[str], include_path: str) -> dict:
    manager = _lm_eval()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*own, *manager.all_tasks])
        raise NbkitError(
            f"there is no task {name!r} in {include_path} ({', '.join(own) or 'no task files'}) nor in lm-eval"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    return manager.load([name])


@lru_cache
def _own(include_path: str):
    """The manager of the tasks of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


@lru_cache
def _lm_eval():
    """The manager of all tasks that come with lm-eval; to find them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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
        "choice": config["output_type"] == "multiple_choice",
        "n": results["n-samples"][name]["effective"],
    }
