"""The rooms of the package: arrows one way, no circle, few folders, no long file."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbkit

PACKAGE = Path(nbkit.__file__).parent
MAY_IMPORT = {
    "records": set(),
    "edits": {"records"},
    "models": {"records", "edits"},
    "keys": {"records", "edits", "models"},
    "methods": {"records", "edits", "models", "keys"},
    "studies": {"records", "edits", "models", "keys", "methods", "plain"},
    "plain": set(),  # the papers' loops, to be read and compared with, use nothing of the engine
    "plots": {"records"},
    "batch": {"records"},
    "panels": {"records", "edits", "models", "keys", "methods", "studies", "plots"},
}
GROUND = {"errors", "paths", "architectures"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Modules of nbkit that a file imports anywhere in it, in functions and for annotations too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in whole]
        else:
            continue
        yield from (name.removeprefix("nbkit.") for name in names if name.startswith("nbkit."))


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_those_below_it(path):
    room = room_of(module_of(path))
    may = {*MAY_IMPORT, *GROUND} if room == "__main__" else {room, *MAY_IMPORT.get(room, ()), *GROUND}
    assert {room_of(module) for module in imported(path)} <= may


def test_no_circle_of_imports():
    graph = {module_of(path): set(imported(path)) - {module_of(path)} for path in FILES}
    assert sum(map(len, graph.values())) > 100, "the imports are not seen"
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_few_folders_and_few_files_at_the_door():
    folders = {path.parent for path in FILES if path.parent.parent == PACKAGE}
    assert {folder.name for folder in folders} == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *GROUND}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_holds_too_much(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320
