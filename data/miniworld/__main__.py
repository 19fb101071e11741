"""`python data/miniworld train | card | ladder`: make the embedded model from nothing, and measure what came of it."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where these files are the package `miniworld`

from miniworld.commands import app  # noqa: E402

app(prog_name="miniworld")
