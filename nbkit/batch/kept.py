"""One kernel for many runs of a notebook: libraries are imported once, and models loaded once.

    with KeptKernel(folder) as kernel:
        execute(..., kernel=kernel)

Between two runs it forgets all variables and figures, and has the environment and folder of a new one; what stays are
imported modules and models that are as they were loaded (models/kept.py). A kernel in which a run failed is not used
again.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path

from jupyter_core.utils import run_sync

from nbkit.batch.run import START_SECONDS, OwnKernel


class KeptKernel:
    """A kernel that `ready` starts where there is none, and `stop` ends."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manager = None

    def ready(self):
        """The manager of a kernel that has no variables, and the environment variables NBKIT_... of this process.

        RuntimeError if it does not start.
        """
        if self.manager is not None and not run_sync(self.manager.is_alive)():
            self.stop()
        settings = {name: value for name, value in os.environ.items() if name.startswith("NBKIT_")}
        settings["NBKIT_KEEP_MODELS"] = "1"
        code = f"{inspect.getsource(_forget)}\n_forget({str(self.folder)!r}, {settings!r})"
        reply = self.ask(lambda client: client.execute(code, silent=True, reply=True, timeout=START_SECONDS))
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"it could not be cleared: {reply['content'].get('evalue')}")
        return self.manager

    def ask(self, question: Callable):
        """The reply to `question(client)`, of a kernel that is started if there is none.

        Each time through a client of its own: a kernel answers only the last that has connected.
        """
        if self.manager is None:
            self.manager = OwnKernel()
            run_sync(self.manager.start_kernel)(cwd=str(self.folder))
        return run_sync(_answer)(self.manager, question)

    def stop(self) -> None:
        """Ends the kernel; a cell that it runs is interrupted first, and may write what it has computed."""
        if self.manager is None:
            return
        manager, self.manager = self.manager, None
        run_sync(manager.shutdown_kernel)(now=not run_sync(manager.is_alive)())
        run_sync(manager.cleanup_resources)()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.stop()


async def _answer(manager, question):
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=START_SECONDS)
        return await question(client)
    finally:
        client.stop_channels()


def _forget(folder, settings):
    """Runs in the kernel, from this text: it must not import nbkit where the notebook did not."""
    import gc
    import importlib
    import os
    import sys
    import warnings

    from IPython import get_ipython

    if "nbkit.models.kept" in sys.modules:
        sys.modules["nbkit.models.kept"].take_back()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    get_ipython().reset(new_session=True)
    gc.collect()
    with warnings.catch_warnings():  # whose end makes Python forget which warnings it has shown
        pass
    for name in [name for name in os.environ if name.startswith("NBKIT_") and name not in settings]:
        del os.environ[name]
    os.environ.update(settings)
    os.chdir(folder)
    if "nbkit.paths" in sys.modules:
        importlib.reload(sys.modules["nbkit.paths"])
