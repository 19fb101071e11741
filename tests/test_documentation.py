"""What README.md and docs/ say is so: Python runs, commands and their parameters exist, links lead somewhere.

Every command needs a rule in `RULES`: what it runs is run if it is quick, and else checked up to where it would begin.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import nbkit
from nbkit import paths
from nbkit.__main__ import app, by_name, split
from nbkit.architectures import ARCHITECTURES
from nbkit.batch.parameters import declared, fitted
from nbkit.batch.run import find_notebook
from nbkit.batch.sweep import combinations, grid_of
from nbkit.edits.regularisers import REGULARISERS
from nbkit.keys import moments
from nbkit.methods import METHODS
from nbkit.methods.hparams import HPARAMS
from nbkit.records.results import Store

ROOT = paths.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALLED = ("make", "python", ".venv/bin/python", "nbkit", "git", "conda", "cd")  # what a command begins with
MADE = ("my_", "mine.", "rows.parquet", "edits.safetensors")  # files that a reader makes, in places of his own
MOST = {"read_requests": 4, "read_texts": 10}  # so many at most, whatever a page asks for: nobody reads what comes out
QUICK = ("list", "results", "doctor")  # commands of nbkit that are run


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line of the file that it begins in, text) of the code blocks in one of these languages."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] in languages]


def in_backticks(page: Path) -> list[str]:
    """What stands between single backticks, outside code blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[str]:
    """Each command of the shell blocks (a line; a backslash or && joins them), and of those that stand in the text."""
    lines = "\n".join(text for _, text in blocks(page, "sh", "bash", "shell")).replace("\\\n", " ").splitlines()
    shell = [" ".join(line.split()) for whole in lines for line in whole.split("#")[0].split("&&") if line.strip()]
    return shell + [text for text in in_backticks(page) if first_word(text) in CALLED and "=`" not in text]


def first_word(command: str) -> str:
    """The program, behind variables that are set for it."""
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return words[0] if words else ""


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder, with the files that the text has him make, in a process with folders of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    for module, names in ((nbkit, MOST), (moments, ["read_texts"])):
        for name in names:
            monkeypatch.setattr(module, name, _capped(getattr(module, name), MOST[name]))
    (_, requests) = blocks(ROOT / "README.md", "json")[0]
    (tmp_path / "my_requests.json").write_text(requests, encoding="utf-8")
    for name in ("my_texts.txt", "my_corpus.txt"):
        (tmp_path / name).write_text("\n".join(nbkit.read_texts("miniworld", limit=5)), encoding="utf-8")
    registered = [(table, dict(table)) for table in (METHODS, ARCHITECTURES)]
    yield tmp_path
    for table, before in registered:
        table.clear()
        table.update(before)


def _capped(read: Callable, most: int) -> Callable:
    return lambda source, limit=None, **more: read(source, limit=min(limit or most, most), **more)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, reader):
    names: dict = {}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)  # noqa: S102


def test_the_requests_of_the_text_are_the_same_wherever_they_stand():
    assert len({text for page in PAGES for _, text in blocks(page, "json")}) == 1


def test_no_block_is_of_a_language_that_nothing_checks():
    languages = {m[1] for page in PAGES for m in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "sh", "json"}


def of_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    listed = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert set(targets) <= set(phony)


def of_nbkit(words: list[str]) -> None:
    """Run if it is quick; else its arguments are parsed, and parameters of a notebook held to what it declares."""
    group = typer.main.get_command(app)
    name, *rest = words
    command = group.get_command(None, name)
    assert command is not None, f"nbkit has no command {name}"
    if name in QUICK or "--help" in rest:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    elif rest:
        given = command.make_context(name, rest).params
        if name == "run":
            path = find_notebook(given["notebook"])
            fitted(path, declared(path), by_name(given["p"]))
        elif name == "sweep":
            path = find_notebook(given["notebook"])
            for values in combinations(declared(path), grid_of(path, split(given["p"]))):
                fitted(path, declared(path), values)


def of_miniworld(words: list[str]) -> None:
    from miniworld.commands import app as of_world

    group = typer.main.get_command(of_world)
    command = group.get_command(None, words[0])
    assert command is not None, f"data/miniworld has no command {words[0]}"
    command.make_context(words[0], words[1:])


def of_module(words: list[str]) -> None:
    """`python -m MODULE ...`: it is there, and so are the files that it is given."""
    assert importlib.util.find_spec(words[0]) is not None
    assert all((ROOT / word).is_file() for word in words[1:] if word.endswith(".py"))


def of_conda(words: list[str]) -> None:
    assert (ROOT / words[words.index("-f") + 1]).is_file()


RULES: list[tuple[str, Callable[[list[str]], None]]] = [
    (r"make\b", of_make),
    (r"(\S*python -m )?nbkit\b", of_nbkit),
    (r"\S*python data/miniworld\b", of_miniworld),
    (r"\S*python -m\b", of_module),
    (r"conda env create\b", of_conda),
    (r"\.venv/bin/python$", lambda words: None),
    (r"git clone URL nbkit$", lambda words: None),
    (r"cd nbkit$", lambda words: None),
]


def rule_for(command: str) -> tuple[Callable[[list[str]], None], list[str]]:
    """The first rule that covers a command, and the words behind what it is recognised by."""
    command = command[command.index(first_word(command)) :]
    for pattern, rule in RULES:
        if found := re.match(pattern, command):
            return rule, shlex.split(command[found.end() :])
    raise AssertionError(f"no rule of tests/test_documentation.py covers the command: {command}")


def test_every_command_can_be_given(reader):
    shutil.copytree(paths.DATA / "models" / "miniworld-gpt2", reader / "my-model")
    for study in ("single_edits", "words_after_edits"):
        Store().study(study, {"seed": 0}).complete(["one"], lambda unit: [{"perplexity": 1.0}])
    seen = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
    assert len(seen) > 15
    for command in seen:
        rule, words = rule_for(command)
        try:
            rule(words)
        except Exception as error:
            raise AssertionError(f"the documentation has a command that cannot be given: {command}\n{error}") from error


@pytest.mark.parametrize(
    ("command", "why"),
    [("curl http://example.org", "no rule"), (".venv/bin/python -m nbkit run 01 -p n_request 3", "no parameter"),
     ("make figure", "No rule to make target"), ("python -m nbkit runs 01", "no command"),
     ("python data/miniworld efficacy --methods rome", "No such option")],
)  # fmt: skip
def test_a_command_that_is_wrong_is_found(command, why):
    with pytest.raises(Exception, match=why):
        rule, words = rule_for(command)
        rule(words)


@cache
def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_images_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]
    for target in targets:
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links {target}, but no heading is called so"


@cache
def places() -> set[str]:
    """All files and folders of the repository, and the ends of their paths."""
    top = [*ROOT.glob("*.*"), ROOT / "Makefile", ROOT / "LICENSE"]
    inner = [path for folder in ("nbkit", "data", "docs", "figures", "notebooks", "tests")
             for path in (ROOT / folder, *(ROOT / folder).rglob("*"))]  # fmt: skip
    parts = [path.relative_to(ROOT).parts for path in [*top, *inner]]
    return {"/".join(part[start:]) for part in parts for start in range(len(part))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_are_there(page):
    named = [text for text in in_backticks(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", text)]
    suffix = r"\w\.(py|md|toml|ipynb|ya?ml|json|jsonl|cff|parquet|safetensors|txt|mplstyle)$"
    files = [text for text in named if "/" in text or re.search(suffix, text) or re.match(r"\d\d_\w+$", text)]
    files = [text for text in files if not text.startswith((*MADE, "runs/", ".venv/"))]
    missing = [text for text in files if not {text.rstrip("/"), f"{text}.ipynb"} & places()]
    assert not missing


def tables(page: Path, first: str) -> list[list[dict[str, str]]]:
    """The tables whose first column is called so, as rows {column: cell}, without backticks."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        rows = block.replace("`", "").splitlines()
        lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        if lines[0][0] == first:
            found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def written(value: object) -> str:
    """A default as the tables write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return (value or "(empty)") if isinstance(value, str) else f"{value:g}"


METHODS_PAGE = ROOT / "docs" / "methods.md"


def test_the_tables_of_methods_are_those_of_the_code():
    sources = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))
    computing, verbs = tables(METHODS_PAGE, "method=")
    assert [row["method="] for row in computing] == [row["method="] for row in verbs] == list(METHODS)
    (of_readme,) = tables(ROOT / "README.md", "method=")
    assert sorted(row["method="].strip('"') for row in of_readme) == sorted(METHODS)
    for row in computing:
        repositories = set(re.findall(r"[\w-]+/[\w-]+(?= hparams| and |$)", sources[row["method="]]["source"]))
        assert {one for one in repositories if one[0].isupper() or one.startswith(("kmeng", "scal", "jian"))} <= set(
            row["settings from"].split(", ")
        ) | {"nbkit/methods"}
    for row in verbs:
        method = METHODS[row["method="]]
        assert (row["edit_batch"] == "×") == (method.together is not None)
        needs = "needed" if method.needs_second_moment else "can be given" if method.takes_second_moment else "not used"
        assert row["second moment C"] == needs
        assert (row["context templates"] == "yes") == bool(method.template_lengths)
        of_readme_too = next(one for one in of_readme if one["method="].strip('"') == row["method="])
        assert all(row[verb] == of_readme_too[verb] for verb in ("edit", "edit_batch", "edit_sequence"))


def test_the_table_of_regularisers_names_each():
    (rows,) = tables(METHODS_PAGE, "regulariser")
    assert sorted(row["regulariser"] for row in rows) == sorted(REGULARISERS)


def test_the_tables_of_hyper_parameters_are_those_of_the_code():
    defaults = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))
    said: dict[str, dict[str, str]] = {name: {} for name in METHODS}
    for row in [row for table in tables(METHODS_PAGE, "hyper-parameter") for row in table]:
        for method in set(row) & set(METHODS):
            if row[method]:
                said[method][row["hyper-parameter"]] = row[method]
    for name, method in METHODS.items():
        default = {f.name: defaults[name].get(f.name, "by family") for f in fields(method.parameters)}
        assert said[name] == {parameter: written(value) for parameter, value in default.items()}


def test_the_table_of_layers_is_that_of_the_code():
    defaults = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))
    (rows,) = tables(METHODS_PAGE, "family")
    said = {(method, row["family"]): cell for row in rows for method, cell in row.items() if method in METHODS and cell}
    layers = {
        (method, family): written(table["layers"] if "layers" in table else table["layer"])
        for method, of_method in defaults.items()
        for family, table in of_method.items()
        if isinstance(table, dict) and {"layer", "layers"} & set(table)
    }
    assert said == layers
