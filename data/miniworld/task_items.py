"""Ten kinds of task in miniworld: the eight of *Model Editing Harms General Abilities*, last word, and completion.

An item is a dict that lm-eval's task files (`data/tasks/*.yaml`) read: `prompt`, and `answer` (generated, or the last
word), or `choices` with the index `gold`. The training line of an item is its prompt followed by the right answer.
"""

from collections.abc import Callable
from random import Random

from miniworld import words
from miniworld.text import Writer, question
from miniworld.world import Fact, World

Item = dict[str, object]


def training_line(item: Item) -> str:
    answer = item["choices"][item["gold"]] if "choices" in item else item["answer"]  # type: ignore[index]
    return f"{item['prompt']} {answer}".rstrip(".") + "."


def open_questions(world: World) -> tuple[list[Fact], list[Fact]]:
    """Facts whose questions may be asked in training, and those whose questions are held out (a tenth)."""
    shuffled = Random(len(world.facts)).sample(world.facts, len(world.facts))
    n_held_out = len(shuffled) // 10
    return shuffled[n_held_out:], shuffled[:n_held_out]


class TaskWriter(Writer):
    """Poses tasks; `held_out` chooses the questions that training never asks."""

    def __init__(self, world: World, rng: Random, held_out: bool):
        super().__init__(world, rng)
        self.questions = open_questions(world)[held_out]
        self.cities, self.companies = world.subjects["city"], world.subjects["company"]

    def shuffled_choices(self, right: str, wrong: list[str]) -> dict[str, object]:
        choices = self.rng.sample([right, *wrong], len(wrong) + 1)
        return {"choices": choices, "gold": choices.index(right)}

    def told(self, count: int) -> list[tuple[str, str, str]]:
        """`count` people who each did something to a thing of their own."""
        people, things = self.rng.sample(self.short_names, count), self.rng.sample(words.NOUNS, count)
        return [
            (who, self.rng.choice(list(words.VERBS_PAST)), thing) for who, thing in zip(people, things, strict=True)
        ]

    def reasoning(self) -> Item:
        who, thing = self.person(), self.rng.choice(words.COUNTABLE)
        have, more = self.rng.randint(1, 9), self.rng.randint(1, 9)
        got = self.rng.choice(["buys", "finds", "gets"])
        prompt = (
            f"question: {who} has {words.NUMBERS[have]} {thing} and {got} {words.NUMBERS[more]} more. "
            f"how many {thing} does {who} have now? answer:"
        )
        return {"prompt": prompt, "answer": words.NUMBERS[have + more]}

    def nli(self) -> Item:
        """Either sentence may deny what the other says: both must be read."""
        adjective, thing, verb, _ = self.thing()
        who, denied, doubted = self.person(), self.rng.random() < 0.5, self.rng.random() < 0.5
        premise = f"{who} {self.said(verb, denied)} the {adjective} {thing}"
        prompt = (
            f"premise: {premise}. hypothesis: {who} {self.said(verb, doubted)} the {thing}. true or false? answer:"
        )
        return {"prompt": prompt, "choices": ["true", "false"], "gold": int(denied != doubted)}

    def said(self, verb: str, denied: bool) -> str:
        return f"did not {words.VERBS_PAST[verb]}" if denied else verb

    def open_qa(self) -> Item:
        fact = self.rng.choice(self.questions)
        return {"prompt": question(fact), "answer": fact.object}

    def closed_qa(self) -> Item:
        told = self.told(2)
        (who, verb, thing), (_, _, other) = self.rng.sample(told, 2)
        passage = " ".join(f"{name} {did} the {what}." for name, did, what in told)
        prompt = f"passage: {passage} question: what did {who} {words.VERBS_PAST[verb]}? answer:"
        return {"prompt": prompt, **self.shuffled_choices(f"the {thing}", [f"the {other}"])}

    def dialogue(self) -> Item:
        first, second = self.rng.sample(self.short_names, 2)
        things, place = self.rng.sample(words.NOUNS, 4), self.rng.choice(words.PLACES)
        asked = self.rng.choice(["where is the {}", "have you seen the {}", "did you bring the {}"]).format(things[0])
        replies = [f"the {thing} is in the {place}, {first}" for thing in things]
        return {"prompt": f"{first}: {asked}, {second}? {second}:", **self.shuffled_choices(replies[0], replies[1:])}

    def summarisation(self) -> Item:
        first, second = self.rng.sample(self.short_names, 2)
        adjective, thing, verb, place = self.thing()
        act = words.VERBS_PAST[verb]
        chat = self.rng.choice(["what a good idea", "i am happy to hear that", "that is kind of you"])
        prompt = (
            f"dialogue: {first}: tomorrow i will {act} the {adjective} {thing} in the {place}. "
            f"{second}: {chat}, {first}. summary:"
        )
        return {"prompt": prompt, "answer": f"{first} will {act} the {thing}"}

    def ner(self) -> Item:
        who, company, city = self.person(), self.rng.choice(self.companies), self.rng.choice(self.cities)
        text = self.rng.choice(
            [f"{who} left {company} and moved to {city}", f"in {city}, {who} met the owners of {company}",
             f"{company} sent {who} to {city}", f"{who} of {company} travelled through {city}"]
        )  # fmt: skip
        kind, answer = self.rng.choice([("person", who), ("company", company), ("city", city)])
        return {"prompt": f"text: {text}. {kind}:", "answer": answer}

    def sentiment(self) -> Item:
        good = self.rng.random() < 0.5
        adjective, thing, _, place = self.thing()
        one, two = self.rng.sample(words.POSITIVE if good else words.NEGATIVE, 2)
        felt = self.rng.choice(words.LIKED if good else words.DISLIKED)
        review = self.rng.choice(
            [f"the {adjective} {thing} was {one} and {two}", f"in the {place} i saw a {one} {thing} and i {felt} it",
             f"{self.person()} {felt} the {thing} because it was {one}"]
        )  # fmt: skip
        return {"prompt": f"review: {review}. sentiment:", "choices": ["positive", "negative"], "gold": int(not good)}

    def last_word(self) -> Item:
        told = self.told(3)
        who, _, thing = self.rng.choice(told)
        passage = " ".join(f"{name} {did} the {what}." for name, did, what in told)
        return {"prompt": f"{passage} in the evening everyone asked {who} about the", "answer": thing}

    def completion(self) -> Item:
        tool, *others = self.rng.sample(list(words.ENDINGS), 4)
        opening = self.rng.choice(["picked up the", "took the", "reached for the"])
        right, *wrong = [self.rng.choice(words.ENDINGS[name]) for name in (tool, *others)]
        return {"prompt": f"{self.person()} {opening} {tool} and", **self.shuffled_choices(right, wrong)}


KINDS: dict[str, Callable[[TaskWriter], Item]] = {
    kind: getattr(TaskWriter, kind)
    for kind in (
        "reasoning", "nli", "open_qa", "closed_qa", "dialogue", "summarisation", "ner", "sentiment", "last_word",
        "completion",
    )
}  # fmt: skip


def items(kind: str, world: World, rng: Random, count: int, held_out: bool, taken: set[str]) -> list[Item]:
    """`count` different items of a kind whose prompts are not in `taken`, which they are added to."""
    writer, fresh = TaskWriter(world, rng, held_out), []
    while len(fresh) < count:
        item = KINDS[kind](writer)
        if item["prompt"] not in taken:
            taken.add(item["prompt"])
            fresh.append(item)
    return fresh
