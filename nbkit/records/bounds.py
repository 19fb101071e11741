"""Values that a user gives, held to their types and bounds; the message names the value and says what it may be.

    check_number("keep", keep, above=0, most=1)

    @dataclass(frozen=True)
    class Parameters(Bounded):
        n_steps: int = bounded(25, least=1)
        key_mode: str = bounded(choices=("mixed", "plain"))
"""

import difflib
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, get_origin

from nbkit.errors import MethodError, NbkitError

BOUNDS = {
    "above": (operator.gt, "above {}"),
    "least": (operator.ge, "from {} on"),
    "below": (operator.lt, "below {}"),
    "most": (operator.le, "up to {}"),
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def check_number(
    name: str, value: Any, whole: bool = False, error: type[NbkitError] = MethodError, **bounds: float
) -> None:
    """The error unless `value` is a number (a whole one) within the bounds, some of `BOUNDS`.

    NaN is within none, an infinite number only within most=math.inf, where it means that there is no limit.
    """
    kind = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if kind and (whole or _fit(value, bounds)):
        if all(BOUNDS[bound][0](value, limit) for bound, limit in bounds.items()):
            return
    words = ["a whole number" if whole else "a number"]
    words += [" and ".join(BOUNDS[bound][1].format(limit) for bound, limit in bounds.items())] if bounds else []
    raise error(f"{name} must be {' '.join(words)}, not {shown(value)}")


def _fit(value: Real, bounds: Mapping[str, float]) -> bool:
    try:
        return math.isfinite(value) or (bounds.get("most") == math.inf and not math.isnan(value))
    except OverflowError:  # a whole number that no float holds
        return False


def check_text(name: str, value: Any, error: type[NbkitError] = MethodError, empty: bool = False) -> None:
    """The error unless `value` is a text, all of which UTF-8 can write, with more than space in it unless `empty`."""
    if not isinstance(value, str):
        raise error(f"{name} must be text, not {type(value).__name__} ({shown(value)})")
    if not empty and not value.strip():
        raise error(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise error(
            f"{name} holds {value[fault.start]!r} at place {fault.start}, half of a surrogate pair and no character"
        ) from fault


def check_texts(name: str, values: Any, error: type[NbkitError] = MethodError) -> None:
    """The error unless `values` is a list or tuple of such texts; a text, a dict or a generator is none."""
    if not isinstance(values, list | tuple):
        raise error(f"{name} must be a list of texts, not {type(values).__name__} ({shown(values)})")
    for index, value in enumerate(values):
        check_text(f"{name}[{index}]", value, error)


def shown(value: Any) -> str:
    """A value as messages show it: not more than a line of it, whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits, which Python does not write out
        return "a number of thousands of digits"


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """MethodError unless `value` is one of the texts."""
    if not isinstance(value, str) or value not in choices:
        raise MethodError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}{nearest(value, choices)}")


def nearest(value: Any, choices: Sequence[str]) -> str:
    """"; did you mean 'mixed'?" for a text that is nearly one of the choices, else nothing: the end of a message."""
    known = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(value.lower(), known, n=1) if isinstance(value, str) else []
    return f"; did you mean {known[found[0]]!r}?" if found else ""


def bounded(default: Any = MISSING, choices: Sequence[str] | None = None, about: str = "", **bounds: float):
    """A field of a `Bounded` class. choices: the texts it can be. about: what it is, for people. bounds: those of
    `check_number`."""
    return field(default=default, metadata={"choices": choices, "about": about, "bounds": bounds})


@dataclass(frozen=True)
class Bounded:
    """A record whose numbers, texts, truth values and tuples of whole numbers are checked when it is made.

    A whole number will do for a float, a list for a tuple; nothing else is converted. MethodError where one is wrong.
    """

    def __post_init__(self):
        for each in fields(self):
            value, kind = getattr(self, each.name), each.type
            if kind in (int, float):
                check_number(each.name, value, whole=kind is int, **each.metadata.get("bounds", {}))
                object.__setattr__(self, each.name, kind(value))
            elif get_origin(kind) is tuple:
                object.__setattr__(self, each.name, _different_numbers(each.name, value))
            elif each.metadata.get("choices"):
                check_choice(each.name, value, each.metadata["choices"])
            elif kind in (str, bool) and not isinstance(value, kind):
                raise MethodError(f"{each.name} must be {'a text' if kind is str else 'True or False'}, not {value!r}")


def _different_numbers(name: str, value: Any) -> tuple[int, ...]:
    whole = isinstance(value, Sequence) and all(type(number) is int for number in value)
    if not whole or not value or len(set(value)) < len(value):
        raise MethodError(f"{name} must be one or more different whole numbers, not {value!r}")
    return tuple(value)
