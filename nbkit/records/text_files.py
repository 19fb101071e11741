"""A user's files as texts and as JSON records, read strictly: UTF-8 with or without a BOM, and lines that end where an
editor shows their ends.

    records = read_records(path)          # a JSON list, or JSON lines
    lines = read_lines(path)

Whatever cannot be read is a RequestError that names the file and, where it is one record's fault, the record.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbkit.errors import RequestError

OTHER_ENCODINGS = {  # UTF-32 first: its mark begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
MOST_DIGITS = 400  # of a whole number; Python refuses to read some thousands, and no field needs twenty
SPACE = re.compile(r"[ \t\n]*")  # JSON's own, line ends being one character here; JSON lines may hold others in texts


class HugeNumber:
    """Stands for a whole number of too many digits, for whoever reads the field to refuse it by name."""

    def __init__(self, digits: str):
        self.n_digits = len(digits.lstrip("-"))

    def __repr__(self) -> str:
        return f"a number of {self.n_digits:,} digits"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its BOM, line ends as one character."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    for mark, encoding in OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise RequestError(f"{path.name} is a text in {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path.name}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8; save a text in Latin-1, "
            "Windows-1252 or another encoding as UTF-8 first"
        ) from error
    if "\0" in text:
        raise RequestError(f"{path.name} holds the character NUL: it is no text in UTF-8 (is it UTF-16, or no text?)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the space around them, blank ones left out."""
    # Not splitlines(), for which a text ends at U+0085, U+2028 and others that editors show in the middle of a line.
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_records(path: Path) -> list:
    """A JSON list, or JSON lines, as a list of records. A name that stands twice in one object is refused."""
    text, records = read_text(path), []
    items = _of_list(text) if text.lstrip(" \t\n").startswith("[") else _of_lines(text)
    while True:
        where = f"{path.name}, record {len(records)}"
        try:
            records.append(next(items))
        except StopIteration:
            return records
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
        except RecursionError as error:
            raise RequestError(f"{where}: it is nested too deeply to be a record") from error
        except json.JSONDecodeError as error:
            raise RequestError(
                f"{where}: this is neither a JSON list nor JSON lines (one object in each line): {error}"
            ) from error


def _of_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"in line {number}: {error.msg}", line, error.pos) from error


def _of_list(text: str) -> Iterator[Any]:
    """Item by item, so that an error is one of a record."""
    at = _behind_space(text, text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        item, at = _DECODER.raw_decode(text, at)
        yield item
        at = _behind_space(text, at)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _behind_space(text, at + 1) if more else at
    if (end := _behind_space(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _behind_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()


def _whole_number(digits: str) -> int | HugeNumber:
    return int(digits) if len(digits) <= MOST_DIGITS else HugeNumber(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the field {twice!r} stands twice in one object; which of the two is meant?")
    return named


_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_object)
