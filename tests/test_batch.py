"""Strict notebook runs: what is refused, what is executed, how a failure is told. Fixtures: tests/notebooks/."""

import asyncio
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_core.utils import run_sync
from papermill.translators import translate_parameters

from nbkit.batch import NOTEBOOKS, kernels
from nbkit.batch import run as batch
from nbkit.batch.allowed import allowed_by
from nbkit.batch.figures import full_parameters, run_all
from nbkit.batch.parameters import checked, convert, declared, fitted
from nbkit.batch.record import is_finished, keep_record, record_of
from nbkit.batch.run import copy_name, find_notebook, run_notebook
from nbkit.batch.sweep import combinations, grid_of, sweep
from nbkit.errors import NotebookError, ParameterError, ResultsError
from nbkit.methods.table import METHODS
from nbkit.records.files import states

FIXTURES = Path(__file__).parent / "notebooks"


def notebook(name):
    return FIXTURES / f"{name}.ipynb"


def printed(path):
    """The lines that an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for c in cells for o in c.get("outputs", []) if o.output_type == "stream").splitlines()


# --- parameters -------------------------------------------------------------------------------------------------------


def test_declared_reads_names_types_defaults_and_help():
    parameters = declared(notebook("works"))
    assert list(parameters) == ["count", "rate", "name", "flag", "seeds", "methods", "layer", "top", "plain"]
    assert parameters["seeds"].kind == "list[int]"
    assert parameters["seeds"].default == [0, 1]
    assert parameters["rate"].help == "a share, 0 to 1"
    assert parameters["name"].default == "ö, a's"
    assert parameters["plain"].kind == "int"  # from the default


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", "7", 7),
        ("count", "-7", -7),
        ("rate", "1", 1.0),
        ("rate", 1, 1.0),
        ("rate", "1e-3", 1e-3),
        ("name", "7", "7"),
        ("name", "None", "None"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("seeds", "[3, 4]", [3, 4]),
        ("seeds", "3,4", [3, 4]),
        ("seeds", "5", [5]),
        ("seeds", [1, 2], [1, 2]),
        ("seeds", "[]", []),
        ("methods", "rome, memit", ["rome", "memit"]),
        ("methods", "['rome']", ["rome"]),
        ("layer", "None", None),
        ("layer", "3", 3),
        ("top", None, None),
        ("top", "2", 2),
        ("plain", "4", 4),
    ],
)
def test_a_value_is_read_as_the_declared_type(name, value, expected):
    got = checked(notebook("works"), {name: value})[name]
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "2.5"),
        ("count", 2.5),
        ("count", True),
        ("count", "None"),
        ("count", None),
        ("count", "seven"),
        ("rate", "half"),
        ("rate", False),
        ("name", 7),
        ("flag", "1"),
        ("flag", 1),
        ("seeds", "[1, 'a']"),
        ("seeds", "1,a"),
        ("seeds", "[1, 2"),
        ("seeds", 3),
        ("methods", [1]),
        ("plain", "4.5"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"parameter {name}: "):
        checked(notebook("works"), {name: value})


def test_convert_reads_dictionaries():
    assert convert("{'a': 1}", "dict") == {"a": 1}
    assert convert('{"key_cache": true, "layers": [4]}', "dict") == {"key_cache": True, "layers": [4]}
    with pytest.raises(TypeError):
        convert("[1]", "dict")


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ParameterError, match="no parameter cuont") as error:
        checked(notebook("works"), {"cuont": 3})
    assert "count: int  # how many" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no notebook"),
        ("no_parameters", "has no cell tagged"),
        ("two_parameter_cells", "has 2 cells tagged"),
        ("unreadable_parameter", "cannot read parameter limit"),
        ("wrong_default", "count"),
    ],
)
def test_an_unusable_notebook_is_refused(name, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        run_notebook(notebook(name), {}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", '{"cells": [', "[]", "{}", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5}'])
def test_a_damaged_notebook_is_refused(text, tmp_path):
    path = tmp_path / "damaged.ipynb"
    path.write_text(text)
    with pytest.raises(ParameterError, match="is not a notebook"):
        declared(path)


def test_files_that_parameters_name_must_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("[]")
    path = notebook("needs_file")
    assert checked(path, {}) == {}  # the default is found beside the notebook
    assert checked(path, {"records": "mine.json"})["records"] == str(tmp_path / "mine.json")
    assert checked(path, {"requests": "mine.json"})["requests"] == str(tmp_path / "mine.json")
    assert checked(path, {"requests": "other-world"})["requests"] == "other-world"  # a name, not a file
    for wrong in ({"records": "none.json"}, {"records": "."}, {"requests": "none.json"}, {"place": "nowhere"}):
        with pytest.raises(ParameterError, match="there is no (file|folder)"):
            checked(path, wrong)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_requests", "-5", "n_requests: -5 is not allowed; it must be 1 or more"),
        ("n_requests", 0, "must be 1 or more"),
        ("keep", "0", "must be above 0 and at most 1"),
        ("seeds", "[]", "seeds is an empty list: give one or more, each 0 or more"),
        ("seeds", "3,-1", "seeds: -1 is not allowed"),
        ("seeds", "3,3", "seeds has 3 twice"),
        ("layer", "-1", "must be one of 0 or more, auto"),
        ("layer", "outo", "'outo' is no int; did you mean 'auto'?"),
        ("key_mode", "prefxied", "must be one of mixed, prefixed, plain; did you mean 'prefixed'?"),
        ("variants", "ROME,CROME", "'CROME' is not allowed; it must be one of ROME, C-ROME; did you mean 'C-ROME'?"),
        ("model", "miniworld-gtp2", "model: there is no model 'miniworld-gtp2': .* did you mean miniworld-gpt2"),
        ("model", "./nowhere", "model: there is no folder"),
        ("models", "miniworld-gpt2,miniword-llama", "models: there is no model 'miniword-llama'"),
    ],
)
def test_values_that_the_comment_does_not_allow_are_refused_before_a_kernel_starts(name, value, message, tmp_path):
    with pytest.raises(ParameterError, match=re.escape(message).replace(r"\.\*", ".*")):
        run_notebook(notebook("declares"), {name: value}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_comment_allows_is_taken():
    given = {"n_requests": "1", "keep": "1", "seeds": "0,7", "layer": "auto", "variants": "C-ROME", "model": "gpt2"}
    taken = {"n_requests": 1, "keep": 1.0, "seeds": [0, 7], "layer": "auto", "variants": ["C-ROME"], "model": "gpt2"}
    assert checked(notebook("declares"), given) == taken
    assert checked(notebook("declares"), {"layer": "None"}) == {"layer": None}
    assert str(declared(notebook("declares"))["variants"]).endswith("compared [one or more: ROME | C-ROME]")


def test_a_model_folder_counts_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    path = notebook("declares")
    for given in ("mine", "./mine", tmp_path / "mine"):
        assert checked(path, {"model": str(given)})["model"] == str(tmp_path / "mine")
    assert checked(path, {"models": "mine,miniworld-gpt2"})["models"] == [str(tmp_path / "mine"), "miniworld-gpt2"]
    assert checked(path, {"either": "mine@3"})["either"] == f"{tmp_path / 'mine'}@3"
    assert checked(path, {"either": "gpt2-6x256@3"})["either"] == "gpt2-6x256@3"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match="holds no model"):
        checked(path, {"model": "empty"})


@pytest.mark.parametrize("words", ["[1...2]", "[a | 1..2..3]", "[..]"])
def test_brackets_that_make_no_sense_are_refused(words):
    with pytest.raises(ParameterError, match="is no range"):
        allowed_by(f"how many {words}")


def test_methods_named_in_notebooks_are_those_that_there_are():
    of_notebooks = [declared(path)["methods"] for path in NOTEBOOKS.glob("*.ipynb") if "methods" in declared(path)]
    named = [set(parameter.allowed.words) for parameter in of_notebooks if "rome" in parameter.allowed.words]
    assert len(named) > 1 and all(words == set(METHODS) for words in named)


# --- parameters are JSON, and nothing else ----------------------------------------------------------------------------

NEVER = Path("sentinel")  # what a payload would make
RUN = f"exec(bytes({list(f'open({str(NEVER)!r}, {chr(119)!r})'.encode())}).decode())"  # as code, without any quote
PAYLOADS = [
    text.replace("RUN", RUN).replace("SENTINEL", str(NEVER))
    for text in json.loads((Path(__file__).parent / "payloads.json").read_text(encoding="utf-8"))
]
TAKES = """from typing import Optional

text: str = ""
texts: list[str] = []
items: list = []
table: dict = {}
count: int = 1
rate: float = 1.0
flag: bool = False
maybe: Optional[str] = None
requests: str = "miniworld"  # file or name: what to edit
"""
EXECUTES = """
import json, os, sys
from IPython.core.inputtransformer2 import TransformerManager
cells, wrong = json.load(sys.stdin), []
before, modules = dict(os.environ), set(sys.modules)
for source, expected in cells:
    held = {}
    exec(TransformerManager().transform_cell(source), held)
    held.pop("__builtins__")
    if repr(held) != repr(expected) or os.path.exists("sentinel") or dict(os.environ) != before:
        wrong.append(source)
print(json.dumps([wrong, sorted(set(sys.modules) - modules)]))
"""


def takes(folder, name="takes"):
    """A notebook that declares a parameter of every type, and prints them."""
    names = [line.split(":")[0] for line in TAKES.splitlines()[2:]]
    return small(folder / f"{name}.ipynb", TAKES, f"import json\n\nprint(json.dumps([{', '.join(names)}]))")


@pytest.mark.filterwarnings("ignore:.*specified")  # papermill takes what follows a ? in a name for a query
def test_no_payload_runs_and_each_text_arrives_as_it_is(tmp_path, monkeypatch):
    """The cells that papermill writes for them are executed as IPython would, in a process of their own."""
    monkeypatch.chdir(tmp_path)
    exec(RUN)
    assert NEVER.is_file(), "the payloads would do nothing"
    NEVER.unlink()
    path = takes(tmp_path)
    known, cells, refused = declared(path), [], 0
    assert len(PAYLOADS) >= 100
    for text in PAYLOADS:
        nested = {text: [text, {"deep": {text: [text, None, True, 1, 0.5]}}]}
        whole = [
            ({"text": text, "maybe": text}, {"text": text, "maybe": text}),
            ({"texts": [text, text + "x"]}, {"texts": [text, text + "x"]}),
            ({"table": nested, "items": [nested]}, {"items": [nested], "table": nested}),
            ({"table": json.dumps(nested), "items": json.dumps([nested])}, {"items": [nested], "table": nested}),
            ({"table": repr(nested), "items": repr([nested])}, {"items": [nested], "table": nested}),
            ({"text": grid_of(path, [("text", '"' + text.replace('"', '""') + '"')])["text"][0]}, {"text": text}),
        ]
        is_text = text.isascii() or not re.search("[\ud800-\udfff]", text)
        for given, expected in whole:
            if is_text:
                assert fitted(path, known, given) == expected
                cells.append((given, expected))
            else:
                with pytest.raises(ParameterError, match="no Unicode text"):
                    fitted(path, known, given)
        for name in ("texts", "items", "table", "count", "rate", "flag", "requests"):
            try:
                cells.append(({name: text}, fitted(path, known, {name: text})))
            except ParameterError:
                refused += 1
        with pytest.raises(ParameterError, match="has no parameter"):
            fitted(path, known, {text: 1})
        copy = copy_name("takes", {"text": text}) if is_text else ""
        assert "/" not in copy and copy.isprintable() and len(copy.encode()) < 200
        try:
            assert declared(takes(tmp_path, text)).keys() == known.keys()
        except (OSError, ValueError):  # no file can be called so
            with pytest.raises(ParameterError):
                run_notebook(text, {}, tmp_path / "out")
    assert refused > 500 and not NEVER.exists() and not (tmp_path / "out").exists()

    sources = [(translate_parameters("python3", "python", values, "Parameters"), values) for _, values in cells]
    command = [sys.executable, "-c", EXECUTES]
    result = subprocess.run(command, input=json.dumps(sources), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    wrong, imported = json.loads(result.stdout)
    assert len(sources) > 800 and not wrong and not NEVER.exists()
    assert not imported


def test_a_payload_arrives_through_a_run_of_a_notebook_that_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"a\"\n!touch {NEVER}\n' \\\u2028{{{RUN}}}\0é"
    name = f"a' + \"{{{RUN}}}; touch {NEVER} #\n!touch {NEVER}"
    given = {"text": text, "table": {text: [text]}}
    copy = run_notebook(takes(tmp_path, name), given, tmp_path / "out", progress=False)
    assert json.loads(printed(copy)[0])[:4] == [text, [], [], {text: [text]}]
    assert not list(tmp_path.rglob(str(NEVER)))


class Text(str):
    """Prints as code."""

    def __str__(self):
        return RUN


REFUSED = [
    ("items", (1, 2), "a tuple is no JSON value: write a list"),
    ("items", [(1,)], "a tuple is no JSON value"),
    ("table", {"a": {"b": [(RUN,)]}}, "a tuple is no JSON value"),
    ("table", f"{{'a': ('x\" + str({RUN}) + \"',)}}", "is no JSON value"),
    ("items", {1, 2}, "a set is no JSON value"),
    ("items", [{"a"}], "a set is no JSON value"),
    ("items", "[{'a'}]", "is no JSON value"),
    ("items", range(2), "a range is no JSON value"),
    ("text", b"x", "a bytes is no JSON value"),
    ("items", "[b'x']", "a bytes is no JSON value"),
    ("text", Text("x"), "a Text is no JSON value: write str(...) of it"),
    ("table", {"a": Text("x")}, "a Text is no JSON value"),
    ("table", {Text("x"): 1}, "a dict's names must be texts"),
    ("table", {1: 2}, "a dict's names must be texts, and 1 is an int"),
    ("table", "{1: 2}", "a dict's names must be texts"),
    ("table", {("a",): 1}, "a dict's names must be texts"),
    ("table", {None: 1}, "a dict's names must be texts"),
    ("text", Path("x"), "is no JSON value"),
    ("items", [object()], "an object is no JSON value"),
    ("items", [lambda: 1], "a function is no JSON value"),
    ("count", np.int64(3), "an int64 is no JSON value"),
    ("rate", np.float64(0.5), "a float64 is no JSON value: write float(...) of it"),
    ("items", np.arange(3), "a ndarray is no JSON value"),
    ("count", 1j, "a complex is no JSON value"),
    ("rate", float("nan"), "JSON has no number nan"),
    ("rate", float("inf"), "JSON has no number inf"),
    ("items", [float("-inf")], "JSON has no number -inf"),
    ("rate", "nan", "'nan' is no float"),
    ("rate", "Infinity", "'Infinity' is no float"),
    ("items", "[NaN]", "JSON has no number NaN"),
    ("table", '{"a": -Infinity}', "JSON has no number -Infinity"),
    ("rate", "1e400", "'1e400' would become inf"),
    ("items", "[1e400]", "'1e400' would become inf"),
    ("table", "{'a': -1e400}", "'-1e400' would become -inf"),
    ("rate", "1e-400", "'1e-400' would become 0.0"),
    ("rate", "3.14159265358979323846", "would become 3.141592653589793"),
    ("items", "[0.1000000000000000055511151231257827]", "would become 0.1"),
    ("rate", "9007199254740993.0", "would become 9007199254740992.0"),
    ("rate", "9007199254740993", "whole numbers go up to 2**53"),
    ("rate", 2**53 + 1, "whole numbers go up to 2**53"),
    ("count", 2**53 + 1, "whole numbers go up to 2**53"),
    ("count", -(10**5000), "whole numbers go up to 2**53"),
    ("count", "9" * 5000, "whole numbers go up to 2**53"),
    ("items", f"[{'9' * 5000}]", "whole numbers go up to 2**53"),
    ("count", "1_000", "'1_000' is no int"),
    ("items", "[1, 1_000, 'a']", "'1_000' is no JSON number"),
    ("items", "[0x10]", "'0x10' is no JSON number"),
    ("count", "+1", "'+1' is no int"),
    ("count", "007", "'007' is no int"),
    ("count", "\u0663", "is no int"),
    ("rate", ".5", "'.5' is no float"),
    ("count", "-0", "-0 is no number of its own"),
    ("rate", -0.0, "-0 is no number of its own"),
    ("items", "[-0.0]", "-0 is no number of its own"),
    ("count", "1.0", "is no int"),
    ("texts", [1], "is no list[str]"),
    ("table", '{"a": 1, "a": 2}', "'a' is in one dict twice"),
    ("table", "{'a': 1, 'a': 2}", "'a' is in one dict twice"),
    ("table", "{**{}}", "no name in a dict"),
    ("items", "[" * 100_000, "deep in one another"),
    ("items", "[" * 60 + "]" * 60, "deep in one another"),
    ("items", f"[{'-' * 90_000}1]", "is no list"),
    ("text", "x" * 200_000, "longer than 100000 characters: write it to a file"),
    ("text", "é" * 50_000, "longer than 100000 characters"),
    ("requests", "x" * 300, "can be no file"),
    ("requests", "~nobody-of-that-name/x.json", "can be no file"),
    ("requests", "./a\0b.json", "requests"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_no_json_is_refused_before_anything_is_written(name, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=re.escape(message)):
        run_notebook(takes(tmp_path), {name: value}, tmp_path / "out")
    if name not in ("table", "items", "texts"):
        with pytest.raises(ParameterError, match=re.escape(message)):
            sweep(takes(tmp_path), {name: [value]}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["takes.ipynb"]


def test_endless_values_are_refused(tmp_path):
    ring = []
    ring.append(ring)
    wide = [1]
    for _ in range(40):
        wide = [wide, wide]
    for value in (ring, wide):
        with pytest.raises(ParameterError, match="deep in one another|longer than"):
            checked(takes(tmp_path), {"items": value})


@pytest.mark.parametrize("given", [[("count", 1)], "count", {"count": 1, 2: 3}, {b"count": 1}, 3])
def test_parameters_come_as_a_dict_by_name(given, tmp_path):
    with pytest.raises(ParameterError, match="as a dict, name -> value|has no parameter"):
        run_notebook(takes(tmp_path), given, tmp_path / "out")


@pytest.mark.parametrize("values", ["12", {1: 2}, {1, 2}, b"12", 3, [], iter([1]), None])
def test_a_grid_takes_lists_of_values(values, tmp_path):
    with pytest.raises(ParameterError, match="count: give a list of one or more values"):
        sweep(takes(tmp_path), {"count": values}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_read_from_the_command_line():
    pairs = [("layer", "1,auto"), ("key_mode", "mixed"), ("key_mode", "plain"), ("seeds", "0,1"), ("seeds", "2")]
    grid = grid_of(notebook("declares"), pairs)
    assert grid == {"layer": ["1", "auto"], "key_mode": ["mixed", "plain"], "seeds": ["0,1", "2"]}
    assert grid_of(notebook("works"), [("name", '"a, b",c')]) == {"name": ["a, b", "c"]}
    assert len(combinations(declared(notebook("declares")), grid)) == 8
    models = combinations(declared(notebook("declares")), {"layer": [1, 2], "model": ["a", "b"]})
    assert [each["model"] for each in models] == ["a", "a", "b", "b"]  # each is loaded once
    with pytest.raises(ParameterError, match="one or more values"):
        combinations(declared(notebook("declares")), {"layer": []})


def test_a_copy_counts_as_finished_only_for_the_same_notebook_parameters_and_files(tmp_path):
    path, copy = tmp_path / "needs_file.ipynb", tmp_path / "copy.ipynb"
    for place in (path, copy):
        place.write_text(notebook("needs_file").read_text())
    (tmp_path / "works.ipynb").write_text("{}")
    known = declared(path)
    assert not is_finished(copy, record_of(path, known, {"place": ""}))
    keep_record(copy, record_of(path, known, {"place": ""}))
    assert is_finished(copy, record_of(path, known, {"place": ""}))
    assert not is_finished(copy, record_of(path, known, {"place": "elsewhere"}))
    (tmp_path / "works.ipynb").write_text("{ }")  # a parameter's default names it
    assert not is_finished(copy, record_of(path, known, {"place": ""}))
    path.write_text(path.read_text().replace("print(", "print (", 1))
    assert not is_finished(copy, record_of(path, known, {"place": ""}))


# --- execution --------------------------------------------------------------------------------------------------------


def test_a_run_uses_this_python_and_the_given_values(tmp_path, monkeypatch):
    # a kernel of the user's that would run something else under the name python3
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    given = {"count": "7", "seeds": "4,5", "layer": "None", "name": "it's {a} \"name\""}

    copy = run_notebook(notebook("works"), given, tmp_path / "runs", progress=False)

    assert copy.parent == tmp_path / "runs/works"
    assert copy.name.startswith("works--count=7--name=it_s")
    values, python, folder = printed(copy)
    assert json.loads(values) == [7, 0.5, "it's {a} \"name\"", False, [4, 5], ["rome"], None, 5, 2]
    assert python == sys.executable
    assert Path(folder) == FIXTURES  # as in JupyterLab
    assert sorted(p.name for p in copy.parent.iterdir()) == [copy.name]


@pytest.mark.parametrize(
    ("name", "number", "begins", "happened"),
    [
        ("fails", 4, "# a comment opens the cell", "ValueError: total is 8"),
        ("kernel_dies", 3, "import os", "kernel died"),
    ],
)
def test_a_failure_names_the_cell(name, number, begins, happened, tmp_path):
    with pytest.raises(NotebookError) as error:
        run_notebook(notebook(name), {"count": 7}, tmp_path, progress=False)
    message = str(error.value)
    assert f"{name}.ipynb, cell {number} failed" in message
    assert begins in message
    assert happened in message
    left = tmp_path / name / f"{name}--count=7.failed.ipynb"
    assert str(left) in message
    assert [p.name for p in left.parent.iterdir()] == [left.name]  # nothing that looks like a complete run


def test_every_cell_that_makes_a_figure_shows_it(tmp_path):
    """A style's end must not switch off what the first figure within it switched on."""
    path = run_notebook(notebook("draws"), {}, tmp_path, progress=False)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if "plt.subplots" in cell.source]
    images = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert images == [1, 1, 1]


def test_a_notebook_is_found_by_how_its_name_begins():
    assert find_notebook("01").stem == find_notebook("01_single").stem == "01_single_edit_collapse"
    assert find_notebook("01b").stem == "01b_models_side_by_side"
    for name in ("0", "zz", "0*"):
        with pytest.raises(ParameterError, match=re.escape(f"there is no notebook {name}; notebooks/ holds: 00_")):
            find_notebook(name)


def test_the_figures_of_a_run_lie_beside_its_copy_and_those_of_a_grid_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_FIGURES", str(tmp_path / "elsewhere"))  # where a run with other parameters would replace
    for seed in (1, 2):
        copy = run_notebook(notebook("draws"), {"seed": seed}, tmp_path, progress=False)
        assert (copy.with_suffix("") / "drawn.md").read_text() == f"Drawn with seed {seed}.\n"
    copy = run_notebook(notebook("draws"), {}, tmp_path / "all", progress=False, figures=tmp_path / "published")
    assert (tmp_path / "published" / "drawn.png").is_file() and not copy.with_suffix("").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_refusals_come_before_anything_runs(tmp_path):
    with pytest.raises(ParameterError):
        run_notebook(notebook("fails"), {"count": "many"}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot write"):
        run_notebook(notebook("fails"), {}, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResultsError, match="cannot write"):
        run_notebook(notebook("fails"), {}, tmp_path)


def test_a_kernel_that_does_not_start_is_a_failure(tmp_path, monkeypatch):
    command = {"argv": [sys.executable, "-c", "raise SystemExit(3)"], "display_name": "x", "language": "python"}
    monkeypatch.setattr(kernels, "get_kernel_dict", lambda: command)
    with pytest.raises(NotebookError, match="works.ipynb: the kernel did not start"):
        run_notebook(notebook("works"), {}, tmp_path, progress=False)


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batch.papermill, "execute_notebook", full)
    with pytest.raises(ResultsError, match="could not be written: .*No space left"):
        run_notebook(notebook("works"), {}, tmp_path)


def test_run_all_finishes_the_others(tmp_path):
    paths = [notebook("fails"), notebook("no_parameters"), notebook("works")]
    failures = run_all(paths, tmp_path, progress=False, jobs=2)
    assert list(failures) == paths[:2]
    assert isinstance(failures[paths[0]], NotebookError)
    assert isinstance(failures[paths[1]], ParameterError)
    assert (tmp_path / "works/works.ipynb").is_file()


def test_the_full_size_of_a_notebook_stands_in_a_file_that_fits_it(tmp_path):
    path = Path(shutil.copy(notebook("works"), tmp_path))
    assert full_parameters(path) == {}
    file = tmp_path / "full" / "works.toml"
    file.parent.mkdir()
    file.write_text("count = 7\n")
    assert full_parameters(path) == {"count": 7}
    assert run_all([path], tmp_path / "runs", progress=False, full=True, jobs=1) == {}
    assert [copy.name for copy in (tmp_path / "runs").rglob("*.ipynb")] == ["works--count=7.ipynb"]
    for text, said in (("cuont = 7", "no parameter cuont"), ("count = ", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ParameterError, match=f"works.toml.*{said}"):
            full_parameters(path)
        assert list(run_all([path], tmp_path / "runs", progress=False, full=True)) == [path]


@pytest.mark.parametrize("file", sorted((NOTEBOOKS / "full").glob("*")), ids=lambda file: file.stem)
def test_every_file_of_full_sizes_fits_a_notebook(file):
    assert full_parameters(NOTEBOOKS / f"{file.stem}.ipynb")


def test_copy_names_are_readable_and_never_shared():
    assert copy_name("nb", {}) == "nb.ipynb"
    assert copy_name("nb", {"n": 3, "seeds": [1, 2]}) == "nb--n=3--seeds=1,2.ipynb"
    slash, space = copy_name("nb", {"model": "a/b"}), copy_name("nb", {"model": "a b"})
    assert slash.startswith("nb--model=a_b--")
    assert slash != space
    assert re.fullmatch(r"nb--model=mine--\w{16}\.ipynb", copy_name("nb", {"model": "/home/me/models/mine"}))
    long = [copy_name("nb", {"text": letter * 300 + end}) for end in "ab" for letter in "xй字"]
    assert len(set(long)) == 6
    assert max(len(name.encode()) for name in long) < 150
    alike = [{"x": ["a,b"]}, {"x": ["a", "b"]}, {"x": "a--n=1"}, {"x": "a", "n": 1}, {"x": "None"}, {"x": None}]
    alike += [{"x": "7"}, {"x": 7}, {"x": "True"}, {"x": True}, {"x": [""]}, {"x": []}, {"x": "'a'"}, {"x": '"a"'}]
    alike += [{"x": {"a": 1}}, {"x": {"a": "1"}}, {"x": "{'a': 1}"}, {"x": "a.partial"}, {"x": "a.failed"}]
    alike += [{"x": "1e-05"}, {"x": 1e-05}, {"x": [["a"]]}, {"x": ["['a']"]}, {"x": "é"}, {"x": "e\u0301"}, {"x": "a"}]
    names = [copy_name("nb", values) for values in alike]
    assert len({name.lower() for name in names}) == len(alike)
    assert not [name for name in names if name.endswith((".partial.ipynb", ".failed.ipynb"))]


MEETS = """import os, time
from pathlib import Path

Path(place, str(os.getpid())).touch()
while len(list(Path(place).iterdir())) < 2:
    time.sleep(0.1)
print(len(list(Path(out).rglob("*.partial.ipynb"))), os.getpid())
"""


def small(path, declares, code):
    """A notebook of two cells."""
    cells = [nbformat.v4.new_code_cell(declares, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


def test_two_processes_with_the_same_parameters_write_no_file_of_each_other_s(tmp_path):
    (tmp_path / "place").mkdir()
    path = small(tmp_path / "meets.ipynb", 'place: str = ""\nout: str = ""', MEETS)
    given = ["-p", "place", tmp_path / "place", "-p", "out", tmp_path / "out", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "nbkit", "run", *map(str, [path, *given])]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [each.wait(300) for each in both] == [0, 0]
    (copy,) = (tmp_path / "out").rglob("*.ipynb")
    ((number, kernel),) = map(str.split, printed(copy))
    assert number == "2" and kernel in {each.name for each in (tmp_path / "place").iterdir()}


def test_a_folder_deleted_while_its_notebook_runs_is_told(tmp_path):
    path = small(tmp_path / "deletes.ipynb", 'place: str = ""', "import shutil\n\nshutil.rmtree(place)")
    with pytest.raises(ResultsError, match="deletes.* could not be written"):
        run_notebook(path, {"place": str(tmp_path / "out")}, tmp_path / "out", progress=False)


def test_files_that_change_are_told_by_their_states(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert states("~/model") == states(tmp_path / "none") == []
    (tmp_path / "model/a.bin").write_bytes(b"12")
    ((name, size, _),) = states("~/model")
    assert (name, size) == ("a.bin", 2)
    (tmp_path / "model/gone.bin").symlink_to("nowhere")  # as one deleted while the folder is read
    assert len(states(tmp_path / "model")) == len(states("~/model/a.bin")) == 1


def test_an_interrupt_that_others_in_the_event_loop_wait_for_leaves_no_kernel(tmp_path, caplog, capfd):
    async def struck():
        raise KeyboardInterrupt

    async def waits():
        await asyncio.ensure_future(struck())

    async def waits_for_that():
        await asyncio.ensure_future(waits())

    with pytest.raises(KeyboardInterrupt), kernels.Kernel(tmp_path) as kernel:
        process = kernel.ready().provisioner.process
        run_sync(waits_for_that)()
    gc.collect()
    assert process.poll() is not None
    assert (caplog.text, capfd.readouterr()) == ("", ("", ""))


def test_a_kernel_that_runs_nothing_ends_without_a_word(tmp_path):
    """An interrupt, as a busy one gets, would make an idle one tell of an error."""
    code = "from nbkit.batch.kernels import Kernel\nwith Kernel('.') as kernel: kernel.ready()"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
