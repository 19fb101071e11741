"""All about a notebook's parameters: which ones it declares, and whether given values fit them.

A notebook declares its parameters in the cell tagged `parameters`, one a line, as papermill reads them:

    requests: str = "miniworld"     # file or name: the requests to edit
    n_requests: int = 200           # how many of them
    seeds: list[int] = [0, 1, 2]    # one curve each
    layer: int = None               # None: the method's own default

papermill itself only logs a parameter that it does not know and never looks at types, so a mistyped name runs for
hours with the default. Here every value is checked before anything runs. The types are int, float, str, bool, list,
list[...], dict and Optional[...]; a parameter whose default is None takes None too; without an annotation the
default's type counts.

Values are JSON and nothing else, whether a command line gives them as text or Python as objects: see values.py.

A comment that ends in brackets says what the value may be, as in `[1..]` or `[mixed | plain]`: see allowed.py. It may
go on in lines of its own below.

A comment that begins with "file" or "folder" makes the value a path, which must exist; "file or name" does so when
the value looks like a path (it starts with . / ~ or ends in a data file's suffix). One that begins with "model" makes
it, or each item of a list, the name of a model, as `nbkit.load` takes it: a folder must be there, and a name that no
model can have is refused; with "model or name" only folders count, and `@` with a layer may follow. Given paths are
relative to where the command runs; defaults, as in JupyterLab, to the notebook's folder.
"""

import ast
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill

from nbkit.batch.allowed import Allowed, allowed_by
from nbkit.batch.values import LONGEST, NotJson, convert, stands_for_none, strict
from nbkit.errors import ModelError, ParameterError
from nbkit.records.bounds import nearest, shown
from nbkit.records.embedded import embedded_models, locate_model

SCALARS = ("int", "float", "str", "bool")
TYPES = (*SCALARS, "list", "list[...]", "dict", "Optional[...]")
DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".safetensors", ".toml", ".txt", ".yaml")
UNKNOWN = object()  # the default of a parameter that is not a literal


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: kind = default  # help`."""

    name: str
    kind: str
    default: object
    help: str
    allowed: Allowed | None = None

    def __str__(self):
        return f"{self.name}: {self.kind}" + (f"  # {self.help}" if self.help else "")

    @property
    def place(self):
        """Of what kind of place it is the name, if the comment says so: groups file, folder or model, and "or name"."""
        return re.match(r"(file|folder|model)s?( or names?)?\b", self.help)

    def convert(self, value):
        """The value as the notebook will see it; a string is read as the declared type.

        Raises ParameterError for a value of another type, and for one that the comment's brackets do not allow.
        """
        if value is None or stands_for_none(value, self.kind):
            if self.default is None or self.kind.startswith("Optional"):
                return None
        if self.allowed and type(value) is str and value in self.allowed.words:
            return [value] if re.match("list|List", self.kind) else value
        try:
            value = convert(value, self.kind)
        except NotJson as error:
            raise ParameterError(f"parameter {self.name}: {error} ({self})") from None
        except (ValueError, TypeError):
            meant = nearest(value, self.allowed.words if self.allowed else ())
            raise ParameterError(f"parameter {self.name}: {shown(value)} is no {self.kind}{meant} ({self})") from None
        if self.allowed:
            self.allowed.check(self.name, value)
        return value

    def located(self, value, folder):
        """The value, made absolute when it is a path; ParameterError when the path does not exist below `folder`."""
        marked = self.place
        if marked and isinstance(value, list):
            return [self.located(item, folder) for item in value]
        if not marked or not isinstance(value, str) or not value:
            return value
        what, or_name = marked.groups()
        try:
            if what == "model":
                return self._located_model(value, folder, or_name)
            if or_name and not (value.startswith((".", "/", "~")) or Path(value).suffix in DATA_SUFFIXES):
                Path(folder, value).exists()  # refused here where no file could be called so
                return value
            path = Path(folder, Path(value).expanduser()).resolve()
            there, value = path.is_file() if what == "file" else path.is_dir(), strict(str(path))
        except (OSError, ValueError, RuntimeError) as error:  # no model, a null, too long, ~ of nobody, a ring of links
            said = error if isinstance(error, ModelError) else f"{shown(value)} can be no {what}: {error}"
            raise ParameterError(f"parameter {self.name}: {said}") from None
        if not there:
            raise ParameterError(f"parameter {self.name}: there is no {what} {path}")
        return value

    def _located_model(self, value, folder, or_name):
        name, at, layer = value.partition("@") if or_name else (value, "", "")
        if or_name and not Path(folder, Path(name).expanduser()).is_dir():
            return value
        place = locate_model(name, folder)
        embedded = name in embedded_models()  # goes by its name, which rows and captions show
        return strict(f"{place.resolve()}{at}{layer}") if isinstance(place, Path) and not embedded else value


def papermill_path(path):
    """A path for papermill, which would take braces in it for parameters of its own."""
    return str(path).replace("{", "{{").replace("}", "}}")


def declared(path) -> dict[str, Parameter]:
    """The parameters of the notebook at `path`, in its order. Raises ParameterError for an unusable notebook."""
    path = Path(path)
    cell = parameters_cell(path)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # what it would warn of is an error below
    try:
        seen = papermill.inspect_notebook(papermill_path(path))
    except ValueError as error:  # it names no kernel
        raise ParameterError(f"{path}: papermill cannot read it: {error}") from None
    parameters = {}
    for name, (annotation, value) in _assignments(cell, path).items():
        if name not in seen:
            raise ParameterError(
                f"{path}: papermill cannot read parameter {name}; write it on a line of its own as "
                "`name: type = value  # help`, without = or # in the value and with Optional[...] rather than |"
            )
        try:
            default = ast.literal_eval(value)
        except (ValueError, TypeError):
            default = UNKNOWN
        kind = annotation or type(default).__name__
        words = " ".join(filter(None, [seen[name]["help"], *_comments_below(cell.source, value.end_lineno)]))
        try:
            parameters[name] = Parameter(name, kind, default, words, allowed_by(words))
        except ParameterError as error:
            raise ParameterError(f"{path}: parameter {name}: {error}") from None
        _check_declaration(path, parameters[name])
    return parameters


def _comments_below(source, line) -> list[str]:
    """The comments on lines of their own that follow a line (counted from 1) at once."""
    below = itertools.takewhile(lambda text: text.startswith("#"), map(str.strip, source.splitlines()[line:]))
    return [text.lstrip("# ") for text in below]


def checked(path, given: Mapping[str, object]) -> dict[str, object]:
    """The given parameters, converted, in the notebook's order; raises ParameterError for the first that is wrong."""
    return fitted(path, declared(path), given)


def fitted(path, parameters: Mapping[str, Parameter], given: Mapping[str, object]) -> dict[str, object]:
    """As `checked`, for the parameters that the notebook at `path` is known to declare."""
    if not isinstance(given, Mapping):
        raise ParameterError(f"{path}: parameters are given as a dict, name -> value, not as {shown(given)}")
    check_names(path, parameters, given)
    values = {}
    for name, parameter in parameters.items():
        if name in given:
            values[name] = parameter.located(parameter.convert(given[name]), Path.cwd())
        else:
            parameter.located(parameter.default, Path(path).parent)
    if len(json.dumps(values)) > LONGEST:
        raise ParameterError(f"the parameters of {path} are longer than {LONGEST} characters: write them to a file")
    return values


def check_names(path, parameters: Mapping[str, Parameter], given: Iterable[str]) -> None:
    """ParameterError, with the nearest name and a list of all, for a name that the notebook does not declare."""
    if unknown := [name for name in given if type(name) is not str or name not in parameters]:
        listing = "".join(f"\n  {p}" for p in parameters.values()) or " none"
        named = (name if type(name) is str and name.isidentifier() else shown(name) for name in unknown)
        meant = nearest(unknown[0], list(parameters))
        raise ParameterError(f"{path} has no parameter {', '.join(named)}{meant}; its parameters:{listing}")


def parameters_cell(path):
    """The cell of the notebook at `path` that declares its parameters; ParameterError unless there is exactly one."""
    path = Path(path)
    if not path.is_file():
        raise ParameterError(f"there is no notebook {path}")
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, TypeError, AttributeError, KeyError, nbformat.ValidationError) as error:
        raise ParameterError(f"{path} is not a notebook: {error}") from None
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        number = "no cell" if not tagged else f"{len(tagged)} cells"
        raise ParameterError(f"{path} has {number} tagged `parameters`; exactly one must declare them")
    return tagged[0]


def _assignments(cell, path):
    """{name: (annotation as written or None, value node)} of the cell's top-level assignments."""
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        raise ParameterError(f"{path}: the parameters cell is no valid Python (line {error.lineno})") from None
    assignments = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            assignments[node.target.id] = (ast.unparse(node.annotation).strip("'\""), node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assignments[node.targets[0].id] = (None, node.value)
    return assignments


def _check_declaration(path, parameter):
    """Refuse a type that is not in the list above, and a default that its own annotation or brackets do not allow."""
    name, kind, default = parameter.name, parameter.kind, parameter.default
    if kind == "NoneType":
        raise ParameterError(f"{path}: parameter {name} needs a type, such as `{name}: int = None`")
    scalar = "|".join(SCALARS)
    simple = rf"({scalar}|dict|[lL]ist(\[({scalar})\])?)"
    if not re.fullmatch(rf"{simple}|Optional\[{simple}\]", kind):
        raise ParameterError(f"{path}: parameter {name} cannot be of type {kind}; the types are {', '.join(TYPES)}")
    if default is not None and default is not UNKNOWN:
        word = parameter.allowed is not None and default in parameter.allowed.words
        if isinstance(default, str) and "str" not in kind and not word:
            raise ParameterError(f"{path}, the default: parameter {name}: {default!r} is no {kind} ({parameter})")
        try:
            parameter.convert(default)
        except ParameterError as error:
            raise ParameterError(f"{path}, the default: {error}") from None
