"""Where the project keeps its files: `data/` (committed), `runs/` (ignored) and `figures/`, beside the package.

Each folder can be moved by an environment variable, which a cluster's scratch disk needs.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("NBKIT_DATA", ROOT / "data")).expanduser()
RUNS = Path(os.environ.get("NBKIT_RUNS", ROOT / "runs")).expanduser()


def figures(otherwise: Path | None = None) -> Path:
    """Where figures go: NBKIT_FIGURES, or else `otherwise`, or else `runs/figures`.

    The committed `figures/` is written by `python -m nbkit figures` alone, so that a trial run replaces nothing.
    """
    return Path(os.environ.get("NBKIT_FIGURES", otherwise or RUNS / "figures")).expanduser()
