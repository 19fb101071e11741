"""All about what a parameter may be: the brackets that end its comment.

    n_requests: int = 120     # how many of them [1..]
    keep: float = 0.4         # the share that is kept [>0..1]
    key_mode: str = "mixed"   # which key is edited [mixed | prefixed | plain]
    seeds: list[int] = [0]    # one order each [one or more: 0..]

`1..` is 1 and more, `0..1` from 0 to 1 with both, `>0..` above 0, `0..<1` below 1; texts stand between bars, and a text
may stand beside a range (`[0.. | auto]`). In a list the brackets say what each item may be, and none may come twice.
Brackets that hold no `..`, no bar and no "one or more" are a comment like any other.
"""

import re
from dataclasses import dataclass

from nbkit.errors import ParameterError
from nbkit.records.bounds import nearest

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
RANGE = re.compile(rf"(>?)({NUMBER})?\.\.(<?)({NUMBER})?")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; None is no bound, and a bound may itself be left out."""

    low: float | None
    high: float | None
    above: bool = False
    below: bool = False

    def __contains__(self, value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        over = self.low is None or (value > self.low if self.above else value >= self.low)
        under = self.high is None or (value < self.high if self.below else value <= self.high)
        return over and under

    def __str__(self):
        low = "" if self.low is None else f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = "" if self.high is None else f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return " and ".join(filter(None, [low, high]))


@dataclass(frozen=True)
class Allowed:
    """What the brackets of one parameter say."""

    ranges: tuple[Range, ...]
    words: tuple[str, ...]
    some: bool  # an empty list is refused

    def check(self, name, value) -> None:
        """ParameterError, naming the parameter, the value and what is allowed, with the nearest word for a text."""
        if not isinstance(value, list):
            return self._check_one(name, value)
        if self.some and not value:
            raise ParameterError(f"parameter {name} is an empty list: give one or more{self._each()}")
        for place, item in enumerate(value):
            self._check_one(name, item)
            if item in value[:place]:
                raise ParameterError(f"parameter {name} has {item!r} twice")

    def _check_one(self, name, value) -> None:
        anything = not self.ranges and not self.words
        if anything or value in self.words or any(value in numbers for numbers in self.ranges):
            return
        meant = nearest(value, self.words)
        raise ParameterError(f"parameter {name}: {value!r} is not allowed; it must be {self}{meant}")

    def _each(self) -> str:
        return f", each {self}" if self.ranges or self.words else ""

    def __str__(self):
        said = [*map(str, self.ranges), *self.words]
        return f"one of {', '.join(said)}" if len(said) > 1 else "".join(said)


def allowed_by(comment) -> Allowed | None:
    """What the brackets at the end of a comment allow, None if there are none; ParameterError if they make no sense."""
    held = re.search(r"\[([^\[\]]+)\]$", comment.strip())
    said = held.group(1) if held else ""
    some, colon, rest = said.partition("one or more")
    if not colon and ".." not in said and "|" not in said:
        return None
    items = rest.removeprefix(":") if colon and not some.strip() else said
    ranges, words = [], []
    for item in filter(None, (item.strip() for item in items.split("|"))):
        found = RANGE.fullmatch(item.replace(" ", ""))
        if not found:
            words.append(item)
            continue
        above, low, below, high = found.groups()
        ranges.append(Range(_number(low), _number(high), bool(above), bool(below)))
    if any(".." in word for word in words) or any(numbers.low is numbers.high is None for numbers in ranges):
        raise ParameterError(f"[{said}] is no range; write [1..], [0..1], [>0..], or texts with bars between them")
    return Allowed(tuple(ranges), tuple(words), bool(colon))


def _number(text):
    return None if text is None else float(text)
