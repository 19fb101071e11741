"""Task scores beside what else a study measures of a model: as columns of its rows, and in the key of its rows.

    tasks = Tasks(["nli", "sentiment"], limit=100)
    tasks.columns(lm)                                 # {"task_nli": ..., "task_nli:stderr": ..., "task_sentiment" ...}

Of data/tasks/generated, which have two metrics, task_nli_generated is the corrected score and
task_nli_generated:as_released the other. What has no colon is the score of a task (`records.ability.scored_tasks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nbkit.models.language_model import LanguageModel
from nbkit.records.provenance import files_digest
from nbkit.studies.task_scores import TASKS, check_tasks, task_files, task_scores


@dataclass(frozen=True)
class Tasks:
    """Arguments of `task_scores`, checked when this is made; the names themselves when they are first scored.

    names: None for no tasks, which determine nothing and have no columns.
    """

    names: Sequence[str] | None
    limit: int | None = None
    include_path: Path | str = TASKS

    def __post_init__(self):
        if self.names is not None:
            check_tasks(self.names, self.limit, self.include_path)

    @property
    def parameters(self) -> dict[str, Any]:
        return {} if self.names is None else {"tasks": list(self.names), "task_limit": self.limit}

    @property
    def data(self) -> dict[str, str]:
        return {} if self.names is None else tasks_data(self.names, self.include_path)

    def columns(self, lm: LanguageModel, ending: str = "") -> dict[str, float]:
        """Of the model as it is, with an ending behind each: task_<name> and task_<name>:stderr, by the task's first
        metric, and task_<name>:<metric> by each other that it has."""
        columns: dict[str, float] = {}
        if self.names is None:
            return columns
        for row in task_scores(lm, self.names, self.limit, self.include_path, all_metrics=True).itertuples():
            name = f"task_{row.task}"
            if f"{name}{ending}" in columns:
                columns[f"{name}:{row.metric}{ending}"] = row.score
            else:
                columns |= {f"{name}{ending}": row.score, f"{name}:stderr{ending}": row.stderr}
        return columns


def tasks_data(names: Sequence[str] | None, include_path: Path | str) -> dict[str, str]:
    """What scores depend on: the digest of a folder of tasks, and lm-eval's version where some of them are its own."""
    data = {"tasks": files_digest(Path(include_path))}
    if not set(names or ()) <= set(task_files(include_path)):
        data["lm_eval"] = version("lm_eval")  # whose tasks these are
    return data
