"""One kernel for many runs of a notebook: libraries are imported once, and models loaded once.

    with KeptKernel(folder) as kernel:
        execute(..., kernel=kernel)

Between two runs it forgets all variables and figures, and has the environment and folder of a new one; what stays are
imported modules and models that are as they were loaded (models/kept.py). A kernel in which a run failed is not used
again.
"""

import inspect
import os

from nbkit.batch.kernels import START_SECONDS, Kernel


class KeptKernel(Kernel):
    """A kernel that `ready` clears; started where there is none, or one has died."""

    def ready(self):
        """The manager of a kernel that has no variables, and the environment variables NBKIT_... of this process.

        RuntimeError if it does not start.
        """
        settings = {name: value for name, value in os.environ.items() if name.startswith("NBKIT_")}
        settings["NBKIT_KEEP_MODELS"] = "1"
        code = f"{inspect.getsource(_forget)}\n_forget({str(self.folder)!r}, {settings!r})"
        reply = self.ask(lambda client: client.execute(code, silent=True, reply=True, timeout=START_SECONDS))
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"it could not be cleared: {reply['content'].get('evalue')}")
        return self.manager


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
