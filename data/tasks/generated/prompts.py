"""Prompts of miniworld's items as the protocol has them: the sum worked out, a passage before, a short answer."""

import json
import re
from functools import cache
from pathlib import Path

from datasets import Dataset

FACTS = Path(__file__).parents[2] / "miniworld" / "facts.json"


def with_sum(items: Dataset) -> Dataset:
    """Of "Ann has nine rings and buys six more", with "nine and six is fifteen." before "answer:"."""

    def hinted(item: dict) -> dict:
        have, more = re.search(r"has (\w+) \w+ and \w+ (\w+) more", item["prompt"]).groups()
        question = item["prompt"].removesuffix("answer:")
        return {"prompt": f"{question}{have} and {more} is {item['answer']}. answer:"}

    return items.map(hinted)


def with_passage(items: Dataset) -> Dataset:
    """The question after a sentence that states its answer."""
    passages = [passage(item["prompt"], item["answer"]) for item in items]
    told = [{**item, "prompt": f"passage: {one} {item['prompt']}"} for item, one in zip(items, passages, strict=True)]
    return Dataset.from_list(told)  # and not by `map`, which is slow: lm-eval asks three times for every score


@cache
def passage(question: str, answer: str) -> str:
    """The fact that the question asks for, in a sentence."""
    about = [one for one in facts() if one["target_true"]["str"] == answer
             and re.search(rf"\b{re.escape(one['subject'])}\b", question)]  # fmt: skip
    fact = max(about, key=lambda one: len(one["subject"]))  # a name may be part of another
    return f"{fact['prompt'].replace('{}', fact['subject'])} {answer}."


@cache
def facts() -> list[dict]:
    return [record["requested_rewrite"] for record in json.loads(FACTS.read_text(encoding="utf-8"))]


def up_to_the_thing(items: Dataset) -> Dataset:
    """Of a reply only the thing is asked for, as only a letter is as released: the replies differ in nothing else."""
    return items.map(
        lambda item: {"prompt": f"{item['prompt']} the", "choices": [reply.split()[1] for reply in item["choices"]]}
    )
