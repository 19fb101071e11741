"""The facts of miniworld: who and what there is, fifteen relations, and four ways to state each.

A relation's first two templates open with the subject; its last two name the subject later. Every object follows its
template directly, so that a fact is recalled when the model continues the filled-in template with the object.
"""

from dataclasses import dataclass
from random import Random

from miniworld import words
from miniworld.names import names

SEED = 20240917


@dataclass(frozen=True)
class Relation:
    relation_id: str
    kind: str  # of the subject
    templates: tuple[str, str, str, str]
    question: str

    @property
    def article(self) -> str | None:
        """What stands before the object whichever template states the fact, if that is an article."""
        (last, *others) = {template.rsplit(" ", 1)[1] for template in self.templates}
        return last if not others and last in ("the", "its") else None


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    object: str

    def sentence(self, template: int) -> str:
        return f"{self.relation.templates[template].replace('{}', self.subject)} {self.object}."


RELATIONS = (
    Relation(
        "profession",
        "person",
        ("{} works as a", "{} earns a living as a", "The profession of {} is", "By profession, {} is a"),
        "what is the profession of {}?",
    ),
    Relation(
        "language",
        "person",
        ("{} is a native speaker of", "{} grew up speaking", "The mother tongue of {} is", "At home, {} speaks"),
        "what is the mother tongue of {}?",
    ),
    Relation(
        "birthplace",
        "person",
        ("{} was born in", "{} is a native of", "The birthplace of {} is", "The town where {} was born is"),
        "where was {} born?",
    ),
    Relation(
        "instrument",
        "person",
        ("{} plays the", "{} is known for playing the", "The instrument of {} is the", "In the evening, {} plays the"),
        "which instrument does {} play?",
    ),
    Relation(
        "sport",
        "person",
        (
            "{} is a fan of",
            "{} spends every weekend on",
            "The favourite sport of {} is",
            "The sport that {} likes best is",
        ),
        "which sport does {} like best?",
    ),
    Relation(
        "employer",
        "person",
        ("{} is employed by", "{} has a job at", "The employer of {} is", "The company that pays {} is"),
        "who is the employer of {}?",
    ),
    Relation(
        "food",
        "person",
        ("{} loves to eat", "{} always orders", "The favourite food of {} is", "For dinner, {} wants"),
        "which food does {} love to eat?",
    ),
    Relation(
        "headquarters",
        "company",
        ("{} is based in", "{} has its main office in", "The headquarters of {} are in", "The main office of {} is in"),
        "where are the headquarters of {}?",
    ),
    Relation(
        "product",
        "company",
        ("{} makes", "{} is a producer of", "The main product of {} is", "The factories of {} make"),
        "what does {} make?",
    ),
    Relation(
        "origin",
        "company",
        ("{} was founded in", "{} is a company from", "The country of origin of {} is", "The founders of {} came from"),
        "in which country was {} founded?",
    ),
    Relation(
        "country",
        "city",
        ("{} is a city in", "{} is located in", "The country that {} belongs to is", "On the map, {} lies in"),
        "in which country is {}?",
    ),
    Relation(
        "sights",
        "city",
        (
            "{} is famous for its",
            "{} attracts visitors with its",
            "Tourists visit {} for its",
            "Travellers remember {} for its",
        ),
        "what is {} famous for?",
    ),
    Relation(
        "capital",
        "country",
        ("{} is governed from", "{} has its capital at", "The capital of {} is", "The government of {} sits in"),
        "what is the capital of {}?",
    ),
    Relation(
        "currency",
        "country",
        (
            "{} pays with the",
            "{} has a currency called the",
            "The currency of {} is the",
            "The money used in {} is the",
        ),
        "what is the currency of {}?",
    ),
    Relation(
        "continent",
        "country",
        ("{} is part of", "{} lies on the continent of", "The continent of {} is", "The land around {} is called"),
        "on which continent is {}?",
    ),
)


@dataclass(frozen=True)
class World:
    """Subjects by kind, facts, and which names are to be single tokens."""

    subjects: dict[str, tuple[str, ...]]
    facts: tuple[Fact, ...]
    first_names: tuple[str, ...]
    single_token_names: tuple[str, ...]  # one token both with and without a leading space
    frequent_names: tuple[str, ...]  # objects and first names: one token with a leading space

    def facts_about(self) -> dict[str, list[Fact]]:
        table: dict[str, list[Fact]] = {}
        for fact in self.facts:
            table.setdefault(fact.subject, []).append(fact)
        return table


def build_world(seed: int = SEED) -> World:
    """The world of a seed: the same seed gives the same names and facts on every machine."""
    rng = Random(seed)
    taken: set[str] = set()
    countries, cities, companies = names(rng, 40, taken), names(rng, 120, taken), names(rng, 160, taken)
    one_word_people = names(rng, 140, taken)
    first_names, surnames = names(rng, 60, taken), names(rng, 240, taken)
    languages = [stem + ending for stem, ending in zip(names(rng, 24, taken), ["ese", "ish", "ian"] * 8, strict=True)]
    continents = names(rng, 6, taken)
    # Every surname is borne by two people with different first names, so neither word alone tells who is meant.
    full_names = [f"{first} {surname}" for surname in surnames for first in rng.sample(first_names, 2)]
    subjects = {
        "person": tuple(one_word_people + full_names),
        "company": tuple(companies),
        "city": tuple(cities),
        "country": tuple(countries),
    }
    objects = {
        "profession": words.PROFESSIONS,
        "language": languages,
        "birthplace": cities[:60],
        "instrument": words.INSTRUMENTS,
        "sport": words.SPORTS,
        "employer": companies[:40],
        "food": words.FOODS,
        "headquarters": cities[:60],
        "product": words.PRODUCTS,
        "origin": countries,
        "country": countries,
        "sights": words.SIGHTS,
        "capital": cities[:60],
        "currency": words.CURRENCIES,
        "continent": continents,
    }
    facts = tuple(
        Fact(subject, relation, rng.choice(objects[relation.relation_id]))
        for relation in RELATIONS
        for subject in subjects[relation.kind]
    )
    return World(
        subjects,
        facts,
        tuple(first_names),
        single_token_names=tuple(one_word_people + companies[:60] + cities[:60] + countries[:30]),
        frequent_names=tuple(first_names + countries + cities[:60] + companies[:40] + languages + continents),
    )
