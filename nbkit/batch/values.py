"""What the value of a parameter may be: a JSON value, and nothing else.

    strict({"layers": [4]})          # a copy of it, or NotJson, which says what cannot be and what to write instead
    convert("0,1,2", "list[int]")    # [0, 1, 2]: the text of a command line, read as a type named by an annotation

papermill writes a value into the source of a cell, and what it does not know it writes as it prints. So only texts,
numbers, true, false, null, lists, and dicts whose names are texts get there, of exactly these types (a class of one's
own may print as anything), and only numbers that arrive as the same number: none that is infinite or NaN, no whole
number beyond 2**53, which not every reader of JSON keeps, no decimals that a float cannot hold, no -0.
"""

import ast
import json
import math
import re
import warnings
from decimal import Decimal

from nbkit.records.bounds import shown

LARGEST = 2**53  # whole numbers up to here are the same as floats
DEEPEST = 50  # lists and dicts within one another; Python reads no more than some 200 brackets
LONGEST = 100_000  # characters; Linux takes 131,072 in an environment variable, where a kernel finds its parameters
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
SPACE = " \t\r\n"  # what JSON calls space
LIST = re.compile(r"[lL]ist(?:\[(.+)\])?")
OPTIONAL = re.compile(r"Optional\[(.+)\]")
INSTEAD = {tuple: "write a list", set: "write a list", frozenset: "write a list", range: "write a list"}
INSTEAD |= {bytes: "write a text", bytearray: "write a text", complex: "write two numbers"}


class NotJson(ValueError):
    """A value, or a part of one, that JSON does not have; the message says which, and what to write instead."""


def strict(value):
    """A copy of the value, of plain Python types throughout; NotJson if it is, or holds, anything but JSON."""
    return _strict(value, 0, [LONGEST])


def _strict(value, depth, left):
    """left: [the characters that may still come], at least one a value, so that no list in lists grows endless."""
    kind = type(value)
    left[0] -= len(value) if kind is str else 1
    if left[0] < 0:
        raise NotJson(f"it is longer than {LONGEST} characters: write it to a file")
    if depth > DEEPEST:
        raise NotJson(f"lists and dicts lie more than {DEEPEST} deep in one another")
    if value is None or kind is bool:
        return value
    if kind is str:
        return _text(value)
    if kind is int or kind is float:
        return _same_number(value)
    if kind is list:
        return [_strict(item, depth + 1, left) for item in value]
    if kind is dict:
        if odd := [name for name in value if type(name) is not str]:
            raise NotJson(f"a dict's names must be texts, and {shown(odd[0])} is {_a(type(odd[0]))}")
        return {_strict(name, depth, left): _strict(item, depth + 1, left) for name, item in value.items()}
    plain = next((base for base in (str, int, float, list, dict) if issubclass(kind, base)), None)
    instead = INSTEAD.get(kind) or (f"write {plain.__name__}(...) of it" if plain else "write text, numbers or lists")
    raise NotJson(f"{_a(kind)} is no JSON value: {instead}")


def _text(value):
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotJson(f"{shown(value)} is no Unicode text (a half of a surrogate pair, at {error.start})") from None
    return value


def _same_number(value):
    if type(value) is float and not math.isfinite(value):
        raise NotJson(f"JSON has no number {value}")
    if value == 0 and math.copysign(1, value) < 0:
        raise NotJson("-0 is no number of its own: write 0")
    if type(value) is int and abs(value) > LARGEST:
        raise NotJson(f"whole numbers go up to 2**53 ({LARGEST}): write a text, or a decimal number")
    return value


def _a(kind):
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def convert(value, kind):
    """A JSON value, or the text that a shell passes for it, as the type named by an annotation.

    NotJson where it is no JSON value; ValueError or TypeError when it does not fit: 2.5 and True are no int, 1 is a
    float. A text is what is read here: a text within a list is no number.
    """
    return _fit(strict(_read(value, kind) if type(value) is str else value), kind)


def _fit(value, kind):
    if optional := OPTIONAL.fullmatch(kind):
        return None if value is None else _fit(value, optional.group(1))
    if kind == "float" and type(value) is int:
        return float(value)
    if named := LIST.fullmatch(kind):
        if type(value) is list:
            return [_fit(item, named.group(1)) for item in value] if named.group(1) else value
    elif kind not in ("str", "bool", "int", "float", "dict"):
        raise TypeError(f"a parameter cannot be annotated {kind}")
    elif type(value).__name__ == kind:
        return value
    raise TypeError(f"{shown(value)} is no {kind}")


def _read(text, kind):
    """What a text stands for where a value of a type is expected."""
    if optional := OPTIONAL.fullmatch(kind):
        return None if stands_for_none(text, kind) else _read(text, optional.group(1))
    if kind == "bool":
        return {"true": True, "false": False}.get(text.strip(SPACE).lower(), text)
    if kind in ("int", "float"):
        return _number(text.strip(SPACE))
    if named := LIST.fullmatch(kind):
        if text.strip(SPACE).startswith("["):
            return _written(text)
        items = [item.strip(SPACE) for item in text.split(",")]
        return [_read(item, named.group(1) or "str") for item in items if item]
    return _written(text) if kind == "dict" else text


def stands_for_none(text, kind):
    """Whether a text means None where None may be given; a parameter that takes texts has its own `null`."""
    return type(text) is str and (text == "None" or (text == "null" and "str" not in kind))


def _number(text):
    """The number that JSON's spelling means, if it is exactly that; ValueError for another spelling (+1, 1_000, .5)."""
    spelt = NUMBER.fullmatch(text)
    if not spelt:
        raise ValueError(f"{shown(text)} is no JSON number")
    if not any(spelt.groups()):
        if len(text) > len(str(-LARGEST)):
            raise NotJson(f"{shown(text)}: whole numbers go up to 2**53 ({LARGEST}): write a text")
        return _signed(text, int(text))
    value = float(text)
    if math.isinf(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", text)[0])):
        raise NotJson(f"{shown(text)} would become {value}")
    if value and Decimal(repr(value)) != Decimal(text):
        raise NotJson(f"{shown(text)} would become {value!r}, as it has more digits than a float")
    return _signed(text, value)


def _signed(text, value):
    return _same_number(-0.0 if value == 0 and text.startswith("-") else value)


def _written(text):
    """What is written as JSON, or as Python writes the same; ValueError for any other text."""
    if len(text) > LONGEST:
        raise NotJson(f"it is longer than {LONGEST} characters: write it to a file")
    try:
        return json.loads(
            text, parse_int=_number, parse_float=_number, parse_constant=_no_number, object_pairs_hook=_named
        )
    except json.JSONDecodeError:
        return _literal(text.strip(SPACE))
    except RecursionError:
        raise NotJson(f"lists and dicts lie more than {DEEPEST} deep in one another") from None


def _no_number(word):
    raise NotJson(f"JSON has no number {word}")


def _named(pairs):
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotJson(f"{next(name for name in names if names.count(name) > 1)!r} is in one dict twice")
    return held


def _literal(text):
    """JSON as Python spells it, in single quotes and with True, False and None; nothing is evaluated."""
    try:
        with warnings.catch_warnings(action="error", category=Warning):  # "\d" in a text
            node = ast.parse(text, mode="eval").body
        return _of_node(node, text.encode().split(b"\n"))
    except (SyntaxError, MemoryError, RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"{shown(text)} is no JSON") from error
    except ValueError as error:  # a number in a spelling of Python's own
        raise NotJson(str(error)) from error


def _of_node(node, lines):
    if isinstance(node, ast.List):
        return [_of_node(item, lines) for item in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise NotJson("** is no name in a dict")
        names = [_name_of(name, lines) for name in node.keys]
        return _named(list(zip(names, (_of_node(item, lines) for item in node.values), strict=True)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return _number("-" + _spelt(node.operand, lines))
    if isinstance(node, ast.Constant):
        return _number(_spelt(node, lines)) if type(node.value) in (int, float) else strict(node.value)
    raise NotJson(f"{shown(ast.unparse(node))} is no JSON value")


def _name_of(node, lines):
    name = _of_node(node, lines)
    if type(name) is not str:
        raise NotJson(f"a dict's names must be texts, and {shown(name)} is none")
    return name


def _spelt(node, lines):
    """A number as it stands in the text."""
    return lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
