"""`python data/miniworld train | card`: make the embedded model from nothing, or measure the one that is there."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where these files are the package `miniworld`

from miniworld.commands import app  # noqa: E402

app(prog_name="miniworld")
