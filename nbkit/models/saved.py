"""The files of a checkpoint's folder are replaced whole: cut short at any point, the old or the new one is loaded.

    with writing(folder) as new:
        model.save_pretrained(new)       # the new files, in a hidden folder of their own
    # here they are in their places

Once they are all written their folder takes the name `WHOLE`: from then on the new checkpoint is the one that counts.
`complete` moves its files to their places and can be repeated after a kill; `save` and `load` begin with it.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nbkit.edits.interrupts import uninterrupted

WHOLE = ".saved"
NAMES = ".names.json"  # in it: of all its files, which lie elsewhere by and by
EDITS = "nbkit_edits.safetensors"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder for the new files, which take the places of the old behind the `with`; after an error nothing changes.

    Files of other names stay, but for weights and edits. Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        names = sorted(path.name for path in new.iterdir())
        (new / NAMES).write_text(json.dumps(names), encoding="utf-8")
        for path in (path for path in new.rglob("*") if path.is_file()):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        new.replace(folder / WHOLE)
    complete(folder)


@uninterrupted
def complete(folder: Path) -> None:
    """Ends a `writing` that was cut short after its files were whole; does nothing if there is none. OSError."""
    whole = folder / WHOLE
    if not whole.is_dir():
        return
    if (whole / NAMES).is_file():
        names = json.loads((whole / NAMES).read_text(encoding="utf-8"))
        # The old weights go first and the new come last, with their index: what lies there meanwhile is refused by
        # anyone who loads it, and not taken for a model. Moved, not written over: a model in memory may be mapped from
        # the old file, and goes on reading it.
        for old in (*folder.glob("model*.safetensors*"), *folder.glob(EDITS)):
            if old.name not in names or (whole / old.name).exists():
                old.unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: (".safetensors" in name, name.endswith(".index.json"), name)):
            if (whole / name).exists():
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                (whole / name).replace(folder / name)
        (whole / NAMES).unlink(missing_ok=True)
    whole.rmdir()
