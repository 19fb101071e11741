"""Progress bars: one a task, which says its name, how far it is in which units, and the time left.

    with bar(len(texts), f"{lm.title}: perplexity", "text", progress) as shown:
        shown.update(3)
    for layer in steps(range(8), f"{lm.title}: keys", "layer"):
        ...

Of tasks within tasks only the outermost has a bar, as its end is what one waits for; how far the task within it is
stands behind that bar. In a notebook it is a widget, in a terminal a line. Inside `with told_to(listener)` this thread
draws none, and the listener is told instead.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from tqdm.auto import tqdm

DELAY = 1.0  # seconds after which a bar is drawn: what is done by then leaves no line behind
REDRAWN = 0.5  # seconds between two notes of a task within another

Item = TypeVar("Item")

_here = threading.local()  # .outermost: a weak reference to the bar that was opened last by this thread; .listener


class Within:
    """A task within one that has a bar: it writes behind that bar how far it is."""

    def __init__(self, outer: tqdm, total: int | None, name: str, done: int = 0):
        self.outer, self.total, self.n, self.done = outer, total, done, done
        self.name = name.partition(": ")[2] or name  # the bar names the model
        self.start = self.noted = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.noted >= REDRAWN and self.n > self.done:
            self.noted = now
            left = ""
            if self.total:
                seconds = (now - self.start) / (self.n - self.done) * max(0, self.total - self.n)
                left = f"/{self.total}, {tqdm.format_interval(seconds)} left"
            self.outer.set_postfix_str(f"{self.name} {self.n}{left}")

    def set_postfix(self, **values: Any) -> None:
        """Nothing: there is no room for more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.noted > self.start:
            self.outer.set_postfix_str("")


class Told:
    """A task whose progress a listener is told, as often as a bar would be drawn."""

    def __init__(self, listener: "Listener", total: int | None, name: str, done: int = 0):
        self.listener, self.total, self.name, self.n = listener, total, name.partition(": ")[2] or name, done
        self.told = -float("inf")

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.told >= REDRAWN:
            self.listener(self.name, self.n, self.total)
            self.told = time.monotonic()

    def set_postfix(self, **values: Any) -> None:
        """Nothing: a listener wants to know how far it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass


Listener = Callable[[str, int, int | None], None]  # of a task: its name, how far it is, of how much


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within this `with` no bar of this thread is drawn, and the listener is told. What it raises ends the task."""
    before, _here.listener = getattr(_here, "listener", None), listener
    try:
        yield
    finally:
        _here.listener = before


def bar(
    total: int | None,
    name: str,
    unit: str,
    progress: bool = True,
    done: int = 0,
    delay: float | None = None,
    **looks: Any,
) -> "tqdm | Within | Told":
    """A context manager for a task of `total` units, `done` of which are there; its `update(n)` says that n more are.

    name: "MODEL: what is done". progress: False for no bar. delay: seconds until it is drawn, DELAY for None.
    looks: of tqdm. A bar of a single unit is taken away when it is through.
    """
    listener = getattr(_here, "listener", None)
    if listener is not None:
        return Told(listener, total, name, done)
    if not progress:
        return tqdm(desc=name, unit=unit, disable=True)
    outermost = getattr(_here, "outermost", lambda: None)()
    if outermost is not None and not outermost.disable:  # a bar that is closed is disabled
        return Within(outermost, total, name, done)
    looks |= {"delay": DELAY if delay is None else delay, "leave": total != 1}
    shown = tqdm(desc=name, unit=unit, total=total, initial=done, **looks)
    _here.outermost = weakref.ref(shown)
    return shown


def steps(items: Collection[Item], name: str, unit: str, progress: bool = True, **looks: Any) -> Iterator[Item]:
    """The items, with a `bar` that counts those whose loop is through."""
    with bar(len(items), name, unit, progress, **looks) as shown:
        for item in items:
            yield item
            shown.update()
