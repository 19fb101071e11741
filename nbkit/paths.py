"""Where the project keeps its files: `data/` (committed), `runs/` (ignored) and `figures/`, beside the package.

Each folder can be moved by an environment variable, which a cluster's scratch disk needs.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("NBKIT_DATA", ROOT / "data")).expanduser()
RUNS = Path(os.environ.get("NBKIT_RUNS", ROOT / "runs")).expanduser()
FIGURES = Path(os.environ.get("NBKIT_FIGURES", ROOT / "figures")).expanduser()
