"""Jupyter's kernel for a run: the Python that runs this process, and ended, however the run ends.

    with Kernel(folder) as kernel:
        papermill.execute_notebook(..., km=kernel.ready())
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_core.utils import ensure_event_loop, run_sync

START_SECONDS = 180  # for a kernel to start; a busy machine takes its time
PROBE_SECONDS = 1.0  # for a kernel that runs nothing to answer
STOP_SECONDS = 30.0  # for an interrupted kernel to write what it has computed, and once more to end


class OwnKernel(AsyncKernelManager):
    """Starts the Python that runs this process, whatever kernels named "python3" are registered for the user."""

    def __init__(self, **options):
        super().__init__(shutdown_wait_time=STOP_SECONDS, transport_encryption="auto", **options)
        self.clients = []

    def client(self, **options):
        """A client, whose channels `close_clients` closes: papermill leaves those of a kernel that it did not start."""
        self.clients.append(super().client(**options))
        return self.clients[-1]

    def close_clients(self) -> None:
        for client in self.clients:
            if client.channels_running:
                client.stop_channels()
        self.clients.clear()

    @property
    def kernel_spec(self):
        return KernelSpec(**get_kernel_dict())

    async def end(self, at_once: bool) -> None:
        """Ends the kernel, if there is one: what runs is interrupted and may store, unless it ends `at_once`.

        A kernel that is asked to go closes its connections, whatever its cell is still doing: so that is waited for.
        """
        if self.has_kernel and at_once:
            await self.signal_kernel(signal.SIGKILL)  # one that starts would tell of an interrupt in a traceback
        elif self.has_kernel:
            if not await self._idle(PROBE_SECONDS):  # an idle one would tell of the interrupt as an error
                await self.interrupt_kernel()
                await self._idle(STOP_SECONDS)
            await self.request_shutdown()
        await self.finish_shutdown()
        await self.cleanup_resources()
        self.close_clients()

    async def _idle(self, seconds: float) -> bool:
        """Waits until the kernel takes the next request, has died, or time is over; whether it is one of the former."""
        client = self.client()
        client.start_channels(iopub=False, stdin=False, hb=False)
        waits = [client.kernel_info(reply=True, timeout=None), self._async_wait()]
        ends = [asyncio.ensure_future(wait) for wait in waits]
        try:
            ended, _ = await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(ended)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)
            client.stop_channels()


class Kernel:
    """A kernel that `ready` starts, in a folder, where there is none, and `stop` ends."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manager = None
        self.answers = False

    def ready(self):
        """The manager of a kernel that answers. RuntimeError if it does not start."""
        self.ask(lambda client: client.kernel_info(reply=True, timeout=START_SECONDS))
        return self.manager

    def ask(self, question: Callable):
        """The reply to `question(client)`, of a kernel that is started if there is none, or has died.

        Each time through a client of its own: a kernel answers only the last that has connected.
        """
        if self.manager is not None and not run_sync(self.manager.is_alive)():
            self.stop()
        if self.manager is not None:
            self.manager.close_clients()  # of an earlier run
        else:
            self.manager = OwnKernel()
            run_sync(self.manager.start_kernel)(cwd=str(self.folder))
        reply = run_sync(_answer)(self.manager, question)
        self.answers = True
        return reply

    def stop(self) -> None:
        """Ends the kernel; a cell that it runs is interrupted first, and may write what it has computed."""
        if self.manager is None:
            return
        _settle()
        at_once = not self.answers or not run_sync(self.manager.is_alive)()
        manager, self.manager, self.answers = self.manager, None, False
        run_sync(manager.end)(at_once)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.stop()


def _settle() -> None:
    """Ends what an interrupt has left unfinished in the event loop of this thread.

    asyncio raises an interrupt out of the loop for the task that it struck, and again for each that waits for that one,
    as soon as the loop runs on: then what ends the kernel would be interrupted in turn.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop = ensure_event_loop()
    else:
        return  # in Jupyter `run_sync` uses the loop of another thread, which no signal strikes
    met: set[asyncio.Task] = set()
    while left := asyncio.all_tasks(loop):
        met |= left
        for task in left:
            task.cancel()
        try:
            loop.run_until_complete(asyncio.wait(left, timeout=PROBE_SECONDS))
            break
        except KeyboardInterrupt:
            continue
    for task in met:
        if task.done() and not task.cancelled():
            task.exception()  # asyncio logs one that nobody has asked for


async def _answer(manager, question):
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=START_SECONDS)
        return await question(client)
    finally:
        client.stop_channels()
