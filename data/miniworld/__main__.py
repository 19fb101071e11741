"""`python data/miniworld train | card | efficacy | tune | damage | ladder`: an embedded model made and measured."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where these files are the package `miniworld`

from miniworld.commands import app  # noqa: E402

app(prog_name="miniworld")
