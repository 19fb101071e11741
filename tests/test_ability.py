"""What an edited model still does of its tasks: shares of what the unedited one does above guessing."""

import numpy as np
import pandas as pd
import pytest

from nbkit.errors import ResultsError
from nbkit.records.ability import above_chance, retained

TASKS = {"nli": (0.5, 0.9), "qa": (0.0, 0.8), "last_word": (0.5, 0.55)}  # chance, unedited score


def rows(case=None, edited=True, **scores) -> pd.DataFrame:
    frame = pd.DataFrame({"task": list(scores), "score": list(scores.values())})
    chance = frame["task"].map(lambda task: TASKS[task][0])
    return frame.assign(case_id=case, edited=edited, stderr=0.04, chance=chance, perplexity=4.0)


UNEDITED = rows(edited=False, **{task: score for task, (_, score) in TASKS.items()})


def test_a_task_at_guessing_tells_nothing():
    assert above_chance(UNEDITED) == ["nli", "qa"]
    assert above_chance(UNEDITED.assign(stderr=np.nan)) == []  # of a single item


def test_retained_is_the_mean_share_above_chance_and_half_of_any_task_is_the_line():
    scores = pd.concat([
        UNEDITED, rows("a", nli=0.9, qa=0.8, last_word=0.1), rows("b", nli=0.8, qa=0.4, last_word=0.9),
        rows("c", nli=0.3, qa=0.0, last_word=0.5)])  # fmt: skip
    kept = retained(scores).set_index("case_id")
    assert kept["retained"].to_dict() == pytest.approx({"a": 1, "b": (0.75 + 0.5) / 2, "c": (-0.5 + 0) / 2})
    assert kept["least"].to_dict() == pytest.approx({"a": 1, "b": 0.5, "c": -0.5})
    assert kept["least_task"].to_dict() == {"a": "nli", "b": "qa", "c": "nli"}
    assert kept["lost"].to_dict() == {"a": 0, "b": 1, "c": 2}
    assert kept["breaks_tasks"].to_dict() == {"a": False, "b": True, "c": True}
    assert (kept["n_tasks"] == 2).all()


def test_several_columns_may_name_a_model():
    scores = pd.concat([UNEDITED, *(rows("a", **{"nli": 0.9, "qa": qa}).assign(prompt=str(qa)) for qa in (0.8, 0.4))])
    assert retained(scores, ["case_id", "prompt"])["retained"].tolist() == pytest.approx([1, 0.75])


@pytest.mark.parametrize("scores", [UNEDITED.assign(stderr=1.0), rows("a", nli=0.9)])
def test_without_a_task_above_chance_nothing_can_be_retained(scores):
    with pytest.raises(ResultsError, match="no task lies above chance"):
        retained(scores)
