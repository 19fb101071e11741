"""Two scorers of what a model writes: those of *Model Editing Harms General Abilities*, as released and corrected.

lm-eval calls them, one for each of the paper's eight kinds of task, with an item and [the text that was generated]:

    process_results: !function nbkit.studies.scorers.open_qa     # data/tasks/rect/*.yaml, data/tasks/generated/*.yaml

Both score the same text. `as_released` counts as the paper's released code does (github.com/JasonForJoy/
Model-Editing-Hurt, test-task-code/); `corrected` mends the fault of that and nothing else: docs/tasks.md has the table.
An answer that the released accuracy leaves out has no `as_released`, so that the mean is of the others.

Items are those of a data set of the hub, or miniworld's (data/miniworld/task_items.py).
"""

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

Item = Mapping[str, Any]

ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"])
END_OF_TEXT = len("<|endoftext|>")  # 13 characters, cut off every summary as released, whether it ended so or not


def reasoning(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: the gold number stands anywhere in the text, as "3" in "13". Corrected: it is the first number."""
    text, gold = results[0], item["answer"].split("#### ")[-1]
    right = first_number(gold)
    corrected = said(text) == gold if right is None else first_number(text) == right
    return {"as_released": float(gold in text), "corrected": float(corrected)}


def nli(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: texts with neither true nor false are left out. Corrected: they are wrong."""
    return _contained(results[0], *_choices(item, ("true", "false")))


def sentiment(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: texts with neither positive nor negative are left out. Corrected: they are wrong."""
    return _contained(results[0], *_choices(item, ("negative", "positive")))


def closed_qa(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: texts that are not exactly yes or no are left out. Corrected: they are wrong.

    The space before the word is asked for as released, but some tokenizers do not give it back: with or without counts.
    """
    choices, gold = _choices(item, ("no", "yes"))
    found = {"corrected": float(said(results[0]).lower() == choices[gold])}
    answer = results[0].lower().removeprefix(" ")
    if answer in choices:
        found["as_released"] = float(answer == choices[gold])
    return found


def dialogue(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: the right letter stands anywhere in the text, as A in "And". Corrected: the text is that letter.

    Of miniworld, where nothing is lettered, the thing in which the replies differ stands for the letter.
    """
    gold = item["answers"] if "answers" in item else item["choices"][item["gold"]]
    return {"as_released": float(gold in results[0]), "corrected": float(said(results[0]) == gold)}


def open_qa(item: Item, results: Sequence[str]) -> dict[str, float]:
    """As released: an answer stands, as whole words, in the prompt or in the text. Corrected: in the text.

    The prompt holds the passage, so that a model which says nothing is right wherever the passage has the answer.
    """
    answers = [item["answer"]] if isinstance(item["answer"], str) else item["answer"]
    golds = [gold for gold in map(normalised, answers) if gold]

    def holds(text: str) -> float:
        words = f" {normalised(text)} "
        return float(any(f" {gold} " in words for gold in golds))

    return {"as_released": holds(item["prompt"] + results[0]), "corrected": holds(results[0])}


def summarisation(item: Item, results: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L. Corrected: of the first line, which a summary is.

    As released: of the text without its last 13 characters, 0 where one is left or none. They are those of the mark
    that ends a text, where a model ends it; of others, and here of all, they are the summary's.
    """
    gold = item["summary"] if "summary" in item else item["answer"]
    summary, cut = first_line(results[0]), results[0][:-END_OF_TEXT]
    return {"as_released": _rouge(gold, cut) if len(cut) > 1 else 0.0, "corrected": _rouge(gold, summary)}


def entities(item: Item, results: Sequence[str]) -> dict[str, tuple]:
    """Counts of one sentence and type, for `mean_recall`, as released, and `micro_f1`, corrected.

    As released: (type, gold entities that are part of the text, all gold ones). An item without any counts if the text
    is empty, and of the type Miscellaneous also if it is not. Corrected: (entities found, named, gold) as sets; named
    are those of the first line, with commas or semicolons between them.
    """
    text = results[0]
    if "entities" in item:
        kind, gold, released = item["type"], item["entities"], item["released_entities"]
    else:
        kind, gold = item["prompt"].split()[-1], [item["answer"]]
        released = gold
    hits, total = sum(one in text for one in released), len(released)
    if not released:
        hits, total = int(not text), int(not text or kind == "Miscellaneous")
    named, expected = set(map(said, re.split("[,;]", first_line(text)))) - {""}, set(map(said, gold))
    return {"as_released": (kind, hits, total), "corrected": (len(named & expected), len(named), len(expected))}


def mean_recall(counts: Sequence[tuple[str, int, int]]) -> float:
    """The mean over types of hits over total; of those types that have any, NaN if none has."""
    of_type: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, hits, total in counts:
        of_type[kind][0] += hits
        of_type[kind][1] += total
    recalls = [hits / total for hits, total in of_type.values() if total]
    return sum(recalls) / len(recalls) if recalls else float("nan")


def micro_f1(counts: Sequence[tuple[int, int, int]]) -> float:
    """2 found / (named + gold) over all sentences and types: entity F1 by exact match. NaN if there is neither."""
    found, named, gold = map(sum, zip(*counts, strict=True))
    return 2 * found / (named + gold) if named + gold else float("nan")


def first_line(text: str) -> str:
    """The first that holds anything, without space around it."""
    first, *_ = text.strip().splitlines() or [""]
    return first.strip()


def said(text: str) -> str:
    """The first line, without punctuation around it."""
    return first_line(text).strip(string.whitespace + string.punctuation)


def first_number(text: str) -> float | None:
    """The first number written in digits, commas between them or not."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", text)
    return None if found is None else float(found[0].replace(",", ""))


def normalised(text: str) -> str:
    """Lower-case words without articles and punctuation, as SQuAD's exact match compares them."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def _choices(item: Item, words: Sequence[str]) -> tuple[Sequence[str], int]:
    """The answers there are, and the place of the right one: miniworld's own, or those of a data set's label."""
    if "choices" in item:
        return item["choices"], item["gold"]
    return words, int(item["label"] if "label" in item else item["answer"])


def _contained(text: str, choices: Sequence[str], gold: int) -> dict[str, float]:
    found = {"corrected": float(said(text).lower() == choices[gold])}
    if any(choice in text.lower() for choice in choices):
        found["as_released"] = float(choices[gold] in text.lower())
    return found


def _rouge(gold: str, text: str) -> float:
    scores = ROUGE.score(gold, text).values()
    return sum(score.fmeasure for score in scores) / len(scores)
