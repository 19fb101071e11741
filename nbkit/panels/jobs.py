"""Long work off the page: one job at a time for each model, in a thread of its own, with progress and a way to stop.

    jobs = jobs_of(lm)
    jobs.start("layers", work, show)        # False, and nothing happens, while another job runs
    jobs.cancel()                           # the job stops at its next step

`work(step)` runs in the thread; it calls `step(n_done, n_total)` between its steps, and whatever has a progress bar
tells the job too, and stops there if the job is cancelled. What it returns goes to `show`, an error to `failed`. Both
run where the panel was made: on the kernel's event loop, between cells, so that widgets and figures are touched by one
thread. Without a loop, in a script or a test, they run in the thread of the work.
"""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbkit.errors import ModelError, NbkitError
from nbkit.records import bars


class Cancelled(NbkitError):
    """The user stopped the job; raised inside the work by the next `step`."""


@dataclass
class Job:
    """One piece of work: how far it is, and how long it takes, in seconds."""

    name: str
    n_done: int = 0
    n_total: int = 0
    within: str = ""  # how far what runs in this step is
    began: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """As many for each step that is left as each so far took; None before the first is done."""
        return self.seconds / self.n_done * (self.n_total - self.n_done) if self.n_done else None


class Jobs:
    """The jobs of one model. `current` is the one that runs, or None; `watch` tells of every change of it."""

    def __init__(self):
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._lock, self._thread = threading.Lock(), None
        self._watchers: list[Callable[[Job | None], None]] = []
        self.current: Job | None = None

    def watch(self, watcher: Callable[[Job | None], None]) -> None:
        """Calls `watcher(job)` whenever a job begins or has done a step, and `watcher(None)` when it has ended."""
        if watcher not in self._watchers:
            self._watchers.append(watcher)

    def start(
        self,
        name: str,
        work: Callable[[Callable[[int, int], None]], Any],
        show: Callable[[Any], None],
        failed: Callable[[BaseException], None],
    ) -> bool:
        """Begins the work if no other runs, and says whether it did.

        failed: gets what the work or `show` raised, `Cancelled` among it.
        """
        with self._lock:
            if self.current is not None:
                return False
            job = self.current = Job(name)

        def told() -> None:
            self._here(lambda: self._tell(job))
            if job.cancelled.is_set():
                raise Cancelled(f"{name} was cancelled at {job.n_done} of {job.n_total}")

        def step(n_done: int, n_total: int) -> None:
            job.n_done, job.n_total, job.within = n_done, n_total, ""
            told()

        def within(task: str, n_done: int, n_total: int | None) -> None:
            job.within = f"{task} {n_done:,}" + (f" of {n_total:,}" if n_total else "")
            told()

        def run() -> None:
            try:
                with bars.told_to(within):
                    found = work(step)
            except BaseException as error:  # shown where it was asked for; a thread has nobody else to tell
                self._here(lambda error=error: self._end(failed, error, failed))
            else:
                self._here(lambda: self._end(show, found, failed))

        self._tell(job)
        self._thread = threading.Thread(target=run, name=f"nbkit: {name}", daemon=True)
        self._thread.takes_turns = True  # with cells that run meanwhile, see EditableModel.take_turn
        self._thread.start()
        return True

    def check_free(self) -> None:
        """ModelError while a job runs. For what a panel asks of the model by itself, which would wait for the job and
        keep the page from answering."""
        job = self.current
        if job is not None:
            raise ModelError(f"“{job.name}” is at work on the model; try again when it is through")

    def cancel(self) -> None:
        """Asks the job that runs to stop at its next step."""
        job = self.current
        if job is not None:
            job.cancelled.set()

    def wait(self, timeout: float | None = None) -> None:
        """Until the last job's thread is through, and those that began with its end; each gets so many seconds.

        What they found is shown once the event loop has its turn.
        """
        joined = None
        while self._thread is not joined:
            joined = self._thread
            joined.join(timeout)

    def _end(self, tell: Callable, what: Any, failed: Callable[[BaseException], None]) -> None:
        self.current = None
        self._tell(None)
        try:
            tell(what)
        except Exception as error:
            if tell is failed:
                raise
            failed(error)

    def _tell(self, job: Job | None) -> None:
        for watcher in self._watchers:
            watcher(job)

    def _here(self, call: Callable[[], None]) -> None:
        if self._loop is None or self._loop.is_closed():
            call()
        else:
            self._loop.call_soon_threadsafe(call)


_OF_MODEL: weakref.WeakKeyDictionary[Any, Jobs] = weakref.WeakKeyDictionary()


def jobs_of(lm) -> Jobs:
    """The jobs of a model, the same for all its panels: a model serves one thread at a time."""
    return _OF_MODEL.setdefault(lm, Jobs())
