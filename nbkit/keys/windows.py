"""A corpus as batches of windows of tokens, streamed: a few batches of it are in memory, however long it is.

    for chunk in chunks(windows(lm, texts, n_tokens=100_000), n_tokens=65_536):
        for batch in batches(chunk, room=16_384):
            pad(lm, [window.tokens for window in batch])

`windows(lm, texts, start=chunk[-1].next)` goes on behind a chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from nbkit.errors import PromptError
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_text


class Place(NamedTuple):
    """Where to go on reading: behind so many texts, and so many windows of the text after them."""

    n_texts: int = 0
    n_windows: int = 0


class Window(NamedTuple):
    """At most a context's tokens of one text, and what comes next."""

    tokens: list[int]
    next: Place


def windows(
    lm: LanguageModel, texts: Iterable[str], n_tokens: int | None = None, start: Place | None = None
) -> Iterator[Window]:
    """The texts in order, one longer than the context in several windows; ends after exactly `n_tokens` if given.

    Texts are tokenised one at a time, with BOS where the tokenizer adds one. `start`: the first so many texts and
    windows are passed over without being tokenised or counted. PromptError for what is no text.
    """
    start = start or Place()
    n_left = n_tokens
    for index, text in enumerate(islice(texts, start.n_texts, None), start.n_texts):
        check_text(f"texts[{index}]", text, PromptError, empty=True)
        first = start.n_windows if index == start.n_texts else 0
        ids = lm.tokenizer(text, verbose=False).input_ids[first * lm.max_length :][:n_left]
        for n_windows, at in enumerate(range(0, len(ids), lm.max_length), first + 1):
            at_end = at + lm.max_length >= len(ids)
            following = Place(index + 1) if at_end else Place(index, n_windows)
            yield Window(ids[at : at + lm.max_length], following)
        if n_left is not None:
            n_left -= len(ids)
            if n_left <= 0:
                return


def chunks(corpus: Iterable[Window], n_tokens: int) -> Iterator[list[Window]]:
    """Runs of windows, each ending with the one that reaches `n_tokens`; the last may have fewer.

    So a corpus that is read on from where a chunk ended falls into the same chunks as one that is read at once.
    """
    chunk, n_held = [], 0
    for window in corpus:
        chunk.append(window)
        n_held += len(window.tokens)
        if n_held >= n_tokens:
            yield chunk
            chunk, n_held = [], 0
    if chunk:
        yield chunk


def batches(chunk: Sequence[Window], room: int) -> Iterator[list[Window]]:
    """A chunk's windows, sorted by length so that little is padding; rows × width of a batch is at most `room`, unless
    one row alone is wider. The longest come first: if memory does not suffice for them, it shows at once.
    """
    rows = sorted(chunk, key=lambda window: -len(window.tokens))
    first = 0
    while first < len(rows):
        n_rows = max(1, room // len(rows[first].tokens))
        yield rows[first : first + n_rows]
        first += n_rows
