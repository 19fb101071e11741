"""Numbers that a user gives: what is within the bounds passes, all else is named with what it may be."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from nbkit.errors import MethodError
from nbkit.records.bounds import Bounded, bounded, check_number


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "words"),
    [
        ({"above": 0}, [1e-9, 3, np.float32(0.5)], [0, -1, math.nan, "1", None, True], "a number above 0"),
        ({"least": 0}, [0, 0.0, 7], [-1e-9, math.nan], "a number from 0 on"),
        ({"above": 0, "most": 1}, [0.1, 1], [0, 1.01], "a number above 0 and up to 1"),
        ({"least": 0, "below": 1}, [0, 0.99], [1, -0.1], "a number from 0 on and below 1"),
        ({"least": 1, "whole": True}, [1, np.int64(5)], [0, 1.0, 2.5, True], "a whole number from 1 on"),
        ({"above": 1, "below": math.inf}, [2.0], [1, math.inf], "a number above 1 and below inf"),
    ],
)
def test_check_number(bounds, good, bad, words):
    for value in good:
        check_number("x", value, **bounds)
    for value in bad:
        with pytest.raises(MethodError) as error:
            check_number("x", value, **bounds)
        assert str(error.value).startswith(f"x must be {words}, not ")


@dataclass(frozen=True)
class Parameters(Bounded):
    layers: tuple[int, ...]
    mode: str = bounded(choices=("mixed", "plain"))
    n_steps: int = bounded(20, least=1)
    lr: float = bounded(0.5, above=0)
    refine: bool = False
    about: object = None


def test_a_record_converts_only_what_is_said():
    made = Parameters([3, 1], "plain", lr=1, about={"any": "thing"})
    assert made == Parameters((3, 1), "plain", 20, 1.0, False, {"any": "thing"})
    assert type(made.lr) is float and made.layers == (3, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 3}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"layers": [1, 1]}, "layers must be"),
        ({"layers": [1, 2.0]}, "layers must be"),
        ({"layers": "12"}, "layers must be"),
        ({"mode": "both"}, "mode must be one of mixed, plain, not 'both'"),
        ({"mode": 3}, "mode must be one of mixed, plain, not 3"),
        ({"n_steps": 0}, "n_steps must be a whole number from 1 on, not 0"),
        ({"n_steps": 2.0}, "n_steps must be a whole number from 1 on, not 2.0"),
        ({"n_steps": True}, "n_steps must be a whole number from 1 on, not True"),
        ({"lr": 0}, "lr must be a number above 0"),
        ({"lr": math.nan}, "lr must be a number above 0, not nan"),
        ({"lr": "fast"}, "lr must be a number above 0, not 'fast'"),
        ({"refine": 1}, "refine must be True or False, not 1"),
    ],
)
def test_a_wrong_value_is_named(wrong, message):
    with pytest.raises(MethodError, match=message):
        Parameters(**{"layers": (0,), "mode": "mixed", **wrong})
