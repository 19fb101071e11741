"""Where a number comes from: digests of data, code and models, and the provenance columns of a result row.

`digest` names anything that determines a result; `code_version` is the digest of the package's own code, comments
and docstrings apart, so that a better comment does not throw away ten hours of results. Needs no torch.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbkit
from nbkit import paths

# What reads, draws, stores, times or starts things but determines no number: a change there leaves stored rows valid.
# Requests and texts are read in records/, but name rows by their content.
NOT_DETERMINING = ("__main__.py", "errors.py", "paths.py", "records", "batch", "plots", "panels", "plain", "speed")
DETERMINING = ("nbkit", "data", "pyproject.toml")  # of the repository: figures, notebooks and texts change no number
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "lm_eval")


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: records as dicts, arrays and tensors as their shape and SHA-256.

    Raises TypeError for anything whose content it cannot see (a function, a model): hash that yourself.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "detach"):  # a tensor; float64 holds every narrower float exactly, numpy has no bfloat16
        kind, array = str(value.dtype), value.detach().cpu().double().numpy()
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):
        kind, array = str(value.dtype), value
        if not array.shape:
            return plain(array.item())
    else:
        raise TypeError(f"cannot name a result by a {type(value).__name__}: give text, numbers, lists, dicts, arrays")
    return {"dtype": kind, "shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}


def canonical(value: Any) -> str:
    """One JSON text per value: names sorted, no spaces; equal values have equal texts."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def files_digest(folder: Path) -> str:
    """The digest of the names and contents of all files below a folder; compiled Python is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if "__pycache__" not in path.parts]  # running the code beside data writes these
    return digest([[p.relative_to(folder).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files])


def code_of(path: Path) -> str:
    """A source file without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def code_version(package: Path | None = None) -> str:
    """The digest of the code (and tables of hyper-parameters) that determine numbers; see `NOT_DETERMINING`."""
    package = Path(nbkit.__file__).parent if package is None else package
    parts = {}
    for path in sorted(package.rglob("*")):
        relative = path.relative_to(package)
        if path.name == "__init__.py" or not set(relative.parts).isdisjoint(NOT_DETERMINING):
            continue
        if path.suffix == ".py":
            parts[relative.as_posix()] = code_of(path)
        elif path.suffix == ".toml":
            parts[relative.as_posix()] = path.read_text(encoding="utf-8")
    return digest(parts)


@functools.cache
def git_commit() -> str | None:
    """The commit that the repository is at, "-dirty" added when `DETERMINING` differ; None outside a repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    try:
        commit = git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = git("diff", "--quiet", "HEAD", "--", *DETERMINING)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the code version says what ran
        return None
    if commit.returncode or not commit.stdout.strip():
        return None
    return commit.stdout.strip() + ("-dirty" if changed.returncode else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def library_versions() -> str:
    """The versions of Python and of the libraries that compute, as a JSON text."""
    versions = {name: _version(name) for name in LIBRARIES}
    return json.dumps({"python": platform.python_version(), **{k: v for k, v in versions.items() if v}})


def now() -> str:
    """The present moment in UTC, as in the `created` column."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(lm=None, **more) -> dict[str, Any]:
    """The columns that say where a row comes from; `more` adds some (seed, data_hash, parameters ...).

    Args:
        lm: a `LanguageModel`, for the columns model, model_hash, device and dtype.
        more: further columns; dicts and lists become JSON texts.
    """
    columns: dict[str, Any] = {}
    if lm is not None:
        columns |= {"model": lm.name, "model_hash": lm.hash, "device": str(lm.device), "dtype": str(lm.dtype)}
    for name, value in more.items():
        columns[name] = canonical(value) if isinstance(value, (dict, list, tuple)) else plain(value)
    columns |= {
        "nbkit_version": nbkit.__version__,
        "code_version": code_version(),
        "git_commit": git_commit(),
        "libraries": library_versions(),
        "created": now(),
    }
    return columns
