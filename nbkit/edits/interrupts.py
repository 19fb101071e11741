"""Ctrl-C waits while something is put on a model or taken off it, and is delivered right behind it.

    @uninterrupted
    def apply(...): ...                  # runs to its end

    class Placed(Guarded):               # a `with` whose entering and leaving run to their ends, not what is inside it
        def begin(self): ...
        def end(self, error): ...

While such a thing runs or is open, the main thread's handler of SIGINT is `_on_interrupt`, which looks at the stack: an
interrupt inside a part that must run to its end is noted and delivered at that end, any other goes to the handler
before. A flag that is set at the beginning of a part would not do, because Python delivers an interrupt before the
first line of a function too, and so between a `with` and the first line of its `__exit__`. Off the main thread, where
Python delivers no interrupts, nothing is done.
"""

import _signal  # the C functions: those of `signal` make an enum of every handler, for some 10 µs
import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any
from weakref import WeakSet


class _Watch:
    """One that wants our handler. What is dropped without being left, whose watch nobody ends, wants it no longer."""


class _State:
    """Of the process: the handler before ours, who wants ours, and whether an interrupt waits."""

    before: Callable = signal.default_int_handler
    wanted: WeakSet[_Watch] = WeakSet()
    noted = False


_WHOLE: set[CodeType] = set()  # the code of functions that run to their end


def _inside(frame: FrameType | None) -> bool:
    """Whether a part that must run to its end is on the stack."""
    while frame is not None:
        if frame.f_code in _WHOLE:
            return True
        frame = frame.f_back
    return False


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _inside(frame):
        _State.noted = True
    else:
        _State.before(number, frame)


def _watch() -> _Watch | None:
    """Makes our handler the process's, until `_unwatch` has had all that this gave; None where it is left as it is."""
    if threading.get_ident() != threading.main_thread().ident:
        return None
    handler = _signal.getsignal(signal.SIGINT)
    if handler is not _on_interrupt:  # ipykernel puts its own back before every cell
        if not callable(handler):  # ignored, or the end of the process
            return None
        _State.before, _State.noted = handler, False
        _signal.signal(signal.SIGINT, _on_interrupt)
    watch = _Watch()
    _State.wanted.add(watch)
    return watch


def _unwatch(watch: _Watch | None) -> None:
    """Off the main thread, where the garbage collector may end something, the handler stays until the next one ends."""
    if watch is None:
        return
    _State.wanted.discard(watch)
    on_main_thread = threading.get_ident() == threading.main_thread().ident
    if on_main_thread and not _State.wanted and _signal.getsignal(signal.SIGINT) is _on_interrupt:
        _signal.signal(signal.SIGINT, _State.before)


def _deliver() -> None:
    """Hands a noted interrupt to the handler before, unless the caller is itself inside a part that is to end first."""
    frame = sys._getframe(2)
    if threading.get_ident() == threading.main_thread().ident and not _inside(frame):
        _State.noted = False
        _State.before(signal.SIGINT, frame)


def uninterrupted(function: Callable) -> Callable:
    """The function, run to its end. An interrupt that waits is raised behind it, with its work done."""

    @functools.wraps(function)
    def whole(*args, **kwargs):
        watch = _watch()
        try:
            return function(*args, **kwargs)
        finally:
            _unwatch(watch)
            if _State.noted:  # looked at last: between here and the caller Python delivers nothing
                _deliver()

    _WHOLE.add(whole.__code__)
    return whole


class Guarded:
    """A context manager whose `begin` and `end` run to their ends. One object is entered once.

    An interrupt that waits behind `begin` is raised by the `with` line, with `end` done.
    """

    def begin(self) -> Any:
        """What entering does; returns what `as` gives."""

    def end(self, error: BaseException | None) -> bool | None:
        """What leaving does; also called after a `begin` that failed, and must do for however far that came.

        error: what the `with` is left by; True says that it is dealt with.
        """

    def __enter__(self) -> Any:
        self._watch = _watch()
        try:
            value = self.begin()
            if _State.noted:
                _deliver()
        except BaseException as error:
            self.end(error)
            _unwatch(self._watch)
            if _State.noted:
                _deliver()
            raise
        return value

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> bool | None:
        try:
            return self.end(error)
        finally:
            _unwatch(self._watch)
            if _State.noted:
                _deliver()


class swapped(Guarded):
    """An attribute of an object is another inside the `with`, and what it was behind it."""

    def __init__(self, owner: Any, attribute: str, value: Any):
        self.owner, self.attribute, self.value = owner, attribute, value

    def begin(self) -> None:
        self.before = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, self.value)

    def end(self, error: BaseException | None) -> None:
        if hasattr(self, "before"):
            setattr(self.owner, self.attribute, self.before)


_WHOLE |= {Guarded.__enter__.__code__, Guarded.__exit__.__code__}
