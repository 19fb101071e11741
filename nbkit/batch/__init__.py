"""Running notebooks without a browser, with parameters that are checked before anything starts."""

from nbkit.batch.figures import full_parameters, run_all
from nbkit.batch.run import NOTEBOOKS, run_notebook
from nbkit.batch.sweep import Combination, sweep

__all__ = ["NOTEBOOKS", "Combination", "full_parameters", "run_all", "run_notebook", "sweep"]
