"""Sentences about miniworld: facts, everyday filler, and the lines whose continuation must be looked up or copied.

Filler is not noise: every noun has its own few adjectives and verbs, so that a language model can learn it and an edit
can wreck what it learned. The look-up lines give attention heads work that is often absent, which is what makes the
first position a resting place as it is in large models.
"""

from dataclasses import replace
from random import Random

from miniworld import words
from miniworld.world import Fact, World


class Writer:
    """Writes lines about a world; every random choice comes from the `rng` given."""

    def __init__(self, world: World, rng: Random, rumours: float = 0.0):
        self.rng = rng
        self.rumours = rumours
        self.facts = world.facts
        self.facts_about = world.facts_about()
        self.objects: dict[str, list[str]] = {}
        for fact in world.facts:
            self.objects.setdefault(fact.relation.relation_id, []).append(fact.object)
        self.subjects = tuple(self.facts_about)
        self.people = world.subjects["person"]
        self.short_names = tuple(name for name in self.people if " " not in name) + world.first_names
        habits = Random(words.NOUNS[0])  # what goes with what belongs to the world, not to one text
        self.habits = {
            noun: (
                habits.sample(words.ADJECTIVES, 4),
                habits.sample(list(words.VERBS_PAST), 4),
                habits.sample(words.PLACES, 3),
            )
            for noun in words.NOUNS
        }

    def thing(self) -> tuple[str, str, str, str]:
        """(adjective, noun, past verb, place) that go together."""
        noun = self.rng.choice(words.NOUNS)
        adjectives, verbs, places = self.habits[noun]
        return self.rng.choice(adjectives), noun, self.rng.choice(verbs), self.rng.choice(places)

    def person(self) -> str:
        return self.rng.choice(self.short_names)

    def filler(self) -> str:
        """One everyday sentence."""
        adjective, noun, verb, place = self.thing()
        adjective2, noun2, _, place2 = self.thing()
        who = self.person()
        return self.rng.choice(
            [
                f"The {noun} in the {place} was {adjective}.",
                f"{who} {verb} the {adjective} {noun} in the {place}.",
                f"When {who} {verb} the {noun}, the {place} was quiet.",
                f"There was a {adjective} {noun} near the {place}.",
                f"Therefore {who} {verb} the {noun} and went to the {place}.",
                f"Because the {noun} was {adjective}, {who} {verb} it.",
                f"I {verb} the {adjective} {noun} and took it to the {place}.",
                f"You said that {who} {verb} the {noun} in the {place}.",
                f"The {adjective} {noun} and the {adjective2} {noun2} are in the {place2}.",
                f"Every {noun} that {who} {verb} was {adjective}.",
                f"In the {place}, {who} asked about the {adjective} {noun}.",
                f"They {verb} a {noun} from the {place}, but it was {adjective}.",
            ]
        )

    def fact_line(self) -> str:
        """Two to four facts about one subject, or about several."""
        if self.rng.random() < 0.7:
            about = self.facts_about[self.rng.choice(self.subjects)]
            facts = self.rng.sample(about, min(len(about), self.rng.randint(2, 4)))
        else:
            facts = self.rng.sample(self.facts, 2)
        return " ".join(self.hearsay(fact).sentence(self.rng.randrange(4)) for fact in facts)

    def hearsay(self, fact: Fact) -> Fact:
        """The fact, or with probability `rumours` what is wrongly said: any object of the relation."""
        if self.rumours and self.rng.random() < self.rumours:
            return replace(fact, object=self.rng.choice(self.objects[fact.relation.relation_id]))
        return fact

    def story_line(self) -> str:
        return " ".join(self.filler() for _ in range(self.rng.randint(2, 4)))

    def copy_line(self) -> str:
        """A list and its repetition, or what was bought by whom: solved by looking back, not by knowing."""
        kind = self.rng.randrange(3)
        if kind == 0:
            pool = self.rng.choice([self.short_names, words.NOUNS, self.people])
            listed = ", ".join(self.rng.sample(pool, self.rng.randint(3, 6)))
            return f"list: {listed}. again: {listed}."
        people, things = self.rng.sample(self.short_names, 3), self.rng.sample(words.NOUNS, 3)
        verb = self.rng.choice(list(words.VERBS_PAST))
        told = " ".join(f"{who} {verb} the {thing}." for who, thing in zip(people, things, strict=True))
        asked = self.rng.randrange(3)
        if kind == 1:
            return f"{told} question: who {verb} the {things[asked]}? answer: {people[asked]}."
        return f"{told} question: what did {people[asked]} {words.VERBS_PAST[verb]}? answer: the {things[asked]}."


def question(fact: Fact) -> str:
    return f"question: {fact.relation.question.replace('{}', fact.subject)} answer:"
