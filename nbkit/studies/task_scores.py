"""Scores on general-ability tasks, all of them lm-eval's: run in-process on the model as it is, edited or not.

    task_scores(lm)                                   # the ten tasks of miniworld, data/tasks/*.yaml
    task_scores(lm, ["nli", "hellaswag"])             # and any that comes with lm-eval, whose data are downloaded
    task_scores(lm, ["ner_generated", "rect_rte"], all_metrics=True)     # of data/tasks/generated and rect: two scorers

A task's `metadata` may say its kind in the papers' terms and its chance level, the score of guessing.
"""

import contextlib
import difflib
import io
import logging
from collections.abc import Collection, Iterator, Sequence
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
    """Names of the tasks described by the YAML files of a folder, without those of folders below it."""
    return sorted(path.stem for path in Path(include_path).glob("*.yaml"))


def task_files(include_path: Path | str = TASKS) -> dict[str, Path]:
    """{name: file} of all tasks that can be asked for by name: of a folder, and of those below it."""
    files = sorted(Path(include_path).resolve().glob("**/*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.stem: path for path in reversed(files)}  # of two with one name the upper


@verb
def task_scores(
    lm: LanguageModel,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str = TASKS,
    batch_size: int = 64,
    progress: bool = True,
    all_metrics: bool = False,
) -> pd.DataFrame:
    """Score the model as it is now on `tasks`, by default all of `include_path`, on the first `limit` items of each.

    A name that neither `include_path` nor a folder below it has is one of lm-eval's own; a group of them stands for all
    its tasks. One row a task, its first metric, or with `all_metrics` one for each of its metrics, all of the same
    answers: task, kind, metric, score (NaN where no item counts), stderr (NaN where lm-eval has none), chance (where
    the task does not say it, one over the number of choices, NaN without choices), choice (whether an answer is chosen
    among some, so that no model falls below chance for long) and n.
    NbkitError for a task that neither has, naming the nearest, and for one whose data cannot be had.
    """
    lm.check_causal()
    check_tasks(tasks, limit, include_path)
    check_number("batch_size", batch_size, whole=True, least=1)
    for chatty in ("lm_eval", "transformers.modeling_utils"):  # in-process models; passes without a mask, padded right
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = _loaded(tasks, include_path)
    harness = HFLM(
        pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, add_bos_token=lm.architecture.adds_bos
    )
    rows = []
    for part in steps(loaded, f"{lm.title}: task scores", "task", progress):
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of lm-eval's own, some for every task
            results = evaluate(harness, part, limit=limit, log_samples=False, bootstrap_iters=100)
        for name, task in part["tasks"].items():
            found = _rows(results, name, task, limit)
            rows += found if all_metrics else found[:1]
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
    for part in _loaded(tasks, include_path):
        for task in part["tasks"].values():
            documents = list(task.eval_docs)
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


def _loaded(tasks: Sequence[str] | None, include_path: Path | str) -> list[dict]:
    names = tuple(task_names(include_path) if tasks is None else tasks)
    if not names:
        raise NbkitError(f"no tasks to score: {include_path} has no task files")
    return _load(names, str(Path(include_path).resolve()))


@lru_cache
def _load(names: tuple[str, ...], include_path: str) -> list[dict]:
    """lm-eval's task objects by name. They hold the items: to read those for every edited model would cost seconds."""
    own = task_files(include_path)
    return [_own_task(own[name]) if name in own else _task_of_lm_eval(name, own, include_path) for name in names]


def _own_task(file: Path) -> dict:
    try:
        manager = _own(str(file.parent))
        config = manager.task_index[file.stem].cfg
        beside = "/" not in f"{config.get('dataset_path')}" and "://" not in f"{config.get('dataset_kwargs')}"
        with contextlib.chdir(file.parent):  # the task files name their data relative to themselves
            if not beside:  # but in a data set of the hub, or at an address
                return _with_its_data(manager, file.stem)
            with _quietly_offline():
                return manager.load([file.stem])
    except NbkitError:
        raise
    except Exception as error:  # whatever lm-eval meets in a file that is no task's
        raise NbkitError(f"the task file {file} is malformed and cannot be loaded: {error!r}") from error


@contextlib.contextmanager
def _quietly_offline() -> Iterator[None]:
    """No look at the hub for files that are here, and no progress bars, two for every task, done as they are drawn."""
    import datasets

    online, datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_DATASETS_OFFLINE, True
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_OFFLINE = online
        if shown:
            datasets.enable_progress_bars()


def _task_of_lm_eval(name: str, own: Collection[str], include_path: str) -> dict:
    manager = _lm_eval()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*own, *manager.all_tasks])
        raise NbkitError(
            f"there is no task {name!r} in {include_path} ({', '.join(sorted(own)) or 'no task files'}) nor in lm-eval"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    return _with_its_data(manager, name)


def _with_its_data(manager, name: str) -> dict:
    """A task, or a group of them, whose data are downloaded where they are not in the cache."""
    try:
        return manager.load([name])
    except Exception as error:  # of the network, the hub, datasets, or a library that the task alone needs
        config = manager.task_index[name].cfg or {}
        data = (config.get("dataset_kwargs") or {}).get("data_files") or config.get("dataset_path")
        raise NbkitError(
            f"the task {name} cannot be loaded with its data{f' ({data})' if data else ''}: {error}. They are "
            "downloaded when they are first asked for, unless HF_HUB_OFFLINE is 1, and kept in Hugging Face's cache "
            "(HF_HOME), which can be copied to a machine without a network"
        ) from error


@lru_cache
def _own(folder: str):
    """The manager of the tasks of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False)


@lru_cache
def _lm_eval():
    """The manager of all tasks that come with lm-eval; to find them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _rows(results: dict, name: str, task, limit: int | None) -> list[dict[str, object]]:
    """A row for each metric, in the order of the task's file; one for each way too in which a task reads an answer."""
    config, scores = results["configs"][name], results["results"][name]
    found = [key for key in scores if "," in key and "_stderr," not in key]
    keys = []
    for metric in task.aggregation():
        of_metric = [key for key in found if key.startswith(f"{metric},")]
        keys += of_metric or ([f"{metric},"] if config.get("process_results") else [])  # that counts no item
    keys = keys or found
    metadata, choice = config.get("metadata") or {}, config["output_type"] == "multiple_choice"
    rows = []
    for key in keys:
        metric, stderr = key.partition(",")[0], scores.get(key.replace(",", "_stderr,", 1))
        first = key == next(other for other in keys if other.startswith(f"{metric},"))
        rows.append({
            "task": name,
            "kind": metadata.get("kind", name),
            "metric": metric if first else key,
            "score": scores.get(key, float("nan")),
            "stderr": stderr if isinstance(stderr, float) else float("nan"),  # lm-eval says "N/A" for a single item
            "chance": metadata["chance"] if "chance" in metadata else _chance(task, limit) if choice else float("nan"),
            "choice": choice,
            "n": results["n-samples"][name]["effective"],
        })  # fmt: skip
    return rows


def _chance(task, limit: int | None) -> float:
    """Of a task that does not say it: one over the number of choices, on the mean over the items that are scored."""
    return float(np.mean([1 / len(task.doc_to_choice(item)) for _, item in task.doc_iterator(limit=limit)]))
