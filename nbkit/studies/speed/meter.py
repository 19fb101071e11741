"""The clock, which is torch's own and waits for the device, and the scales: what calls take in seconds and in bytes."""

import threading

import psutil
import torch
from torch.utils.benchmark import timer

SAMPLE_SECONDS = 0.01  # between two looks at a process' memory


class Meter:
    """Adds up what is done in `with meter:`, once or several times.

    seconds: wall time, until the device had done its work. peak_memory: the most bytes in use, on a GPU allocated by
    torch, on a CPU of the process, looked at every `SAMPLE_SECONDS` (what a system keeps is the highest since a process
    began, not since the `with` did). extra_memory: the most bytes in use above those at the beginning of a `with`.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.peak_memory, self.extra_memory = device, 0.0, 0, 0

    def __enter__(self) -> "Meter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._before, self._over = self._in_use(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._start = timer()
        return self

    def __exit__(self, *_) -> None:
        self.seconds += timer() - self._start
        self._over.set()
        self._watcher.join()
        self._note()

    def _watch(self) -> None:
        while not self._over.wait(None if self.device.type == "cuda" else SAMPLE_SECONDS):
            self._note()

    def _note(self) -> None:
        held = self._in_use()
        self.peak_memory = max(self.peak_memory, held)
        self.extra_memory = max(self.extra_memory, held - self._before)

    def _in_use(self) -> int:
        """Bytes; on a GPU the most since the `with` began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss
