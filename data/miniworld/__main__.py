"""`python data/miniworld train | card | efficacy | damage | ladder`: an embedded model from nothing, and measured."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where these files are the package `miniworld`

from miniworld.commands import app  # noqa: E402

app(prog_name="miniworld")
