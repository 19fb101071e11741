"""Numbers that a user gives, held to their types and bounds; the message names the number and says what it may be.

    check_number("keep", keep, above=0, most=1)

    @dataclass(frozen=True)
    class Parameters(Bounded):
        n_steps: int = bounded(25, least=1)
        key_mode: str = bounded(choices=("mixed", "plain"))
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, get_origin

from nbkit.errors import MethodError


def check_number(
    name: str,
    value: Any,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
) -> None:
    """MethodError unless `value` is a number (a whole one) within the bounds; NaN is within none."""
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    low = least if above is None else above
    high = most if below is None else below
    if (
        number
        and (low is None or value > low or (value == low and above is None))
        and (high is None or value < high or (value == high and below is None))
    ):
        return
    words = [] if low is None else [f"above {above}" if above is not None else f"from {least} on"]
    words += [] if high is None else [f"below {below}" if below is not None else f"up to {most}"]
    kind = "a whole number" if whole else "a number"
    raise MethodError(f"{name} must be {kind} {' and '.join(words)}, not {value!r}")


def bounded(default: Any = MISSING, choices: Sequence[str] | None = None, **bounds: float):
    """A field of a `Bounded` class. choices: the texts it can be. bounds: those of `check_number`."""
    return field(default=default, metadata={"choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class Bounded:
    """A record whose numbers, texts, truth values and tuples of whole numbers are checked when it is made.

    A whole number will do for a float, a list for a tuple; nothing else is converted. MethodError where one is wrong.
    """

    def __post_init__(self):
        for each in fields(self):
            value = typed(each.name, getattr(self, each.name), each.type)
            object.__setattr__(self, each.name, value)
            choices, bounds = each.metadata.get("choices"), each.metadata.get("bounds")
            if choices and value not in choices:
                raise MethodError(f"{each.name} {value!r} is unknown; it is one of {', '.join(choices)}")
            if bounds:
                check_number(each.name, value, **bounds, whole=each.type is int)


def typed(name: str, value: Any, kind: type) -> Any:
    """`value` as one of int, float, str, bool, tuple[int, ...]; values of other types are passed on as they are."""
    if get_origin(kind) is tuple:
        whole = isinstance(value, Sequence) and all(type(item) is int for item in value)
        if not whole or not value or len(set(value)) < len(value):
            raise MethodError(f"{name} must be one or more different whole numbers, not {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    scalar = kind in (int, float, str, bool)
    if scalar and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
        raise MethodError(f"{name} must be {kind.__name__}, not {value!r}")
    return value
