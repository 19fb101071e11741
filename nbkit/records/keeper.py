"""Something is written every few seconds while something else is computed, and before a signal ends the process.

with kept_up(study.flush, seconds=5.0):
    compute()
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from nbkit.errors import ResultsError

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def kept_up(write: Callable[[], None], seconds: float) -> Iterator[None]:
    """Within, `write` is called every `seconds` from a thread of its own, and when SIGTERM or SIGHUP comes.

    A signal then ends the process as it would have. One that the program has a handler for is left to it; off the main
    thread all are. `write` may be called while it runs in another thread, and by a signal while it runs in this one. A
    ResultsError of the thread's ends the thread and no more: whoever enters this writes once more behind it.
    """
    over = threading.Event()

    def keep() -> None:
        with contextlib.suppress(ResultsError):
            while not over.wait(seconds):
                write()

    def end(number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        try:
            write()
        finally:
            os.kill(os.getpid(), number)

    in_main = threading.current_thread() is threading.main_thread()
    caught = [number for number in ENDS if in_main and signal.getsignal(number) is signal.SIG_DFL]
    keeper = threading.Thread(target=keep, name="nbkit keeper", daemon=True)
    try:
        for number in caught:
            signal.signal(number, end)
        keeper.start()
        yield
    finally:
        over.set()
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # interrupted while it was started: it ends by itself, as all is over
            keeper.join()
