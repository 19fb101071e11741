"""Running notebooks without a browser, with parameters that are checked before anything starts."""

from nbkit.batch.run import NOTEBOOKS, run_all, run_notebook

__all__ = ["NOTEBOOKS", "run_all", "run_notebook"]
