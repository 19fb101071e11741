"""What notebooks there are and what can be asked of them, in words: `python -m nbkit list`, `run NOTEBOOK --help`."""

from collections.abc import Sequence
from pathlib import Path

import nbformat

from nbkit.batch.parameters import UNKNOWN, declared
from nbkit.batch.run import NOTEBOOKS, find_notebook


def notebooks_in_words(names: Sequence[str] | None = None) -> str:
    """Name, question and parameters of notebooks: of those named, or of all in notebooks/."""
    paths = [find_notebook(name) for name in names] if names else sorted(NOTEBOOKS.glob("*.ipynb"))
    return "\n\n".join(f"{path.stem}: {question(path)}\n{table(path)}" for path in paths)


def parameters_in_words(name: str) -> str:
    """The parameters of one notebook."""
    path = find_notebook(name)
    return f"Parameters of {path.stem} ({question(path)}):\n{table(path)}"


def question(path: Path) -> str:
    """The title of a notebook, which is its question."""
    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    return first[0].lstrip("# ") if first else ""


def table(path: Path) -> str:
    """A line for each parameter: name, type, default, and its comment."""
    rows = []
    for each in declared(path).values():
        default = "" if each.default is UNKNOWN else repr(each.default)
        rows.append((f"{each.name}: {each.kind} = {default}", each.help))
    width = min(48, max(len(declaration) for declaration, _ in rows))
    return "\n".join(f"  {declaration:<{width}}  {words}".rstrip() for declaration, words in rows)
