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

A comment that begins with "file" or "folder" makes the value a path, which must exist; "file or name" does so when
the value looks like a path (it starts with . / ~ or ends in a data file's suffix). Given paths are relative to where
the command runs; defaults, as in JupyterLab, to the notebook's folder.
"""

import ast
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill

from nbkit.errors import ParameterError

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

    def __str__(self):
        return f"{self.name}: {self.kind}" + (f"  # {self.help}" if self.help else "")

    def convert(self, value):
        """The value as the notebook will see it; a string is read as the declared type. Raises ParameterError."""
        if self.default is None and value in (None, "None"):
            return None
        try:
            return convert(value, self.kind)
        except (ValueError, TypeError, SyntaxError):
            raise ParameterError(f"parameter {self.name}: {value!r} is no {self.kind} ({self})") from None

    def located(self, value, folder):
        """The value, made absolute when it is a path; ParameterError when the path does not exist below `folder`."""
        marked = re.match(r"(file|folder)( or name)?\b", self.help)
        if not marked or not isinstance(value, str) or not value:
            return value
        what, or_name = marked.groups()
        if or_name and not (value.startswith((".", "/", "~")) or Path(value).suffix in DATA_SUFFIXES):
            return value
        path = Path(folder, Path(value).expanduser()).resolve()
        if not (path.is_file() if what == "file" else path.is_dir()):
            raise ParameterError(f"parameter {self.name}: there is no {what} {path}")
        return str(path)


def convert(value, kind):
    """Read a value, or the string a shell passes for it, as a type named by an annotation.

    Raises ValueError, TypeError or SyntaxError when it does not fit: 2.5 and True are no int, 1 is a float.
    """
    if optional := re.fullmatch(r"Optional\[(.+)\]", kind):
        return None if value in (None, "None") else convert(value, optional.group(1))
    text = isinstance(value, str)
    if kind == "str":
        fits = text
    elif kind == "bool":
        if text:
            value = {"true": True, "false": False}.get(value.lower(), value)
        fits = isinstance(value, bool)
    elif kind == "int":
        value = int(value) if text else value
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "float":
        fits = text or (isinstance(value, int | float) and not isinstance(value, bool))
        value = float(value) if fits else value
    elif kind == "dict":
        value = _mapping(value) if text else value
        fits = isinstance(value, dict)
    elif named := re.fullmatch(r"(?:list|List)(?:\[(.+)\])?", kind):
        if text:  # [1, 2] or 1,2
            value = ast.literal_eval(value) if value.strip().startswith("[") else _split(value)
        fits = isinstance(value, list | tuple)
        if fits:
            value = [convert(item, named.group(1)) if named.group(1) else item for item in value]
    else:
        raise TypeError(f"a parameter cannot be annotated {kind}")
    if not fits:
        raise TypeError(f"{value!r} is no {kind}")
    return value


def _mapping(text):
    """As Python or as JSON writes it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return ast.literal_eval(text)


def _split(text):
    return [item.strip() for item in text.split(",") if item.strip()]


def papermill_path(path):
    """A path for papermill, which would take braces in it for parameters of its own."""
    return str(path).replace("{", "{{").replace("}", "}}")


def declared(path) -> dict[str, Parameter]:
    """The parameters of the notebook at `path`, in its order. Raises ParameterError for an unusable notebook."""
    path = Path(path)
    cell = _parameters_cell(path)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # what it would warn of is an error below
    seen = papermill.inspect_notebook(papermill_path(path))
    parameters = {}
    for name, (annotation, value) in _assignments(cell, path).items():
        if name not in seen:
            raise ParameterError(
                f"{path}: papermill cannot read parameter {name}; write it on a line of its own as "
                "`name: type = value  # help`, without = or # in the value and with Optional[...] rather than |"
            )
        try:
            default = ast.literal_eval(value)
        except ValueError:
            default = UNKNOWN
        kind = annotation or type(default).__name__
        _check_declaration(path, name, kind, default)
        parameters[name] = Parameter(name, kind, default, seen[name]["help"])
    return parameters


def checked(path, given: Mapping[str, object]) -> dict[str, object]:
    """The given parameters, converted, in the notebook's order; raises ParameterError for the first that is wrong."""
    parameters = declared(path)
    if unknown := [name for name in given if name not in parameters]:
        listing = "".join(f"\n  {p}" for p in parameters.values()) or " none"
        raise ParameterError(f"{path} has no parameter {', '.join(unknown)}; its parameters:{listing}")
    values = {}
    for name, parameter in parameters.items():
        if name in given:
            values[name] = parameter.located(parameter.convert(given[name]), Path.cwd())
        else:
            parameter.located(parameter.default, Path(path).parent)
    return values


def _parameters_cell(path):
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


def _check_declaration(path, name, kind, default):
    """Refuse a type that is not in the list above, and a default that does not fit its own annotation."""
    if kind == "NoneType":
        raise ParameterError(f"{path}: parameter {name} needs a type, such as `{name}: int = None`")
    scalar = "|".join(SCALARS)
    simple = rf"({scalar}|dict|[lL]ist(\[({scalar})\])?)"
    if not re.fullmatch(rf"{simple}|Optional\[{simple}\]", kind):
        raise ParameterError(f"{path}: parameter {name} cannot be of type {kind}; the types are {', '.join(TYPES)}")
    if default is not None and default is not UNKNOWN:
        Parameter(name, kind, default, f"the default in {path}").convert(default)
