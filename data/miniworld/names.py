"""Made-up names, built from a small stock of syllables, so that an unfamiliar name is a few familiar pieces."""

from itertools import product
from random import Random

ONSETS = "b d f g h j k l m n p r s t v w z br dr fl gr kr pl tr sh ch".split()
VOWELS = "a e i o u ai ou ea io".split()
CODAS = ["", "", "l", "n", "r", "s", "t", "m", "k", "rk", "sh"]
SYLLABLES = ["".join(parts) for parts in Random("syllables").sample(list(product(ONSETS, VOWELS, CODAS)), 160)]


def name(rng: Random) -> str:
    return (rng.choice(SYLLABLES) + rng.choice(SYLLABLES)).capitalize()


def names(rng: Random, count: int, taken: set[str]) -> list[str]:
    """`count` new names, none of them in `taken`, which they are added to."""
    fresh: list[str] = []
    while len(fresh) < count:
        candidate = name(rng)
        if candidate not in taken and 4 <= len(candidate) <= 9:
            taken.add(candidate)
            fresh.append(candidate)
    return fresh
