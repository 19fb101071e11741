"""Progress bars: one a task, with its name, its unit and the time left, and none where nobody waits."""

import ast
import json
import re
import time
from pathlib import Path

import pytest

import nbkit
from nbkit import paths, studies
from nbkit.records import bars
from nbkit.records.bars import bar, steps
from nbkit.records.results import Store

SOURCES = [*sorted(Path(nbkit.__file__).parent.rglob("*.py")), *sorted((paths.ROOT / "notebooks").glob("*.ipynb"))]
FAST = {"layer": 1, "v_num_grad_steps": 1, "context_templates": ["{}"]}


@pytest.fixture
def at_once(monkeypatch):
    """Bars are drawn and noted at once, however soon a task is through."""
    monkeypatch.setattr(bars, "DELAY", 0)
    monkeypatch.setattr(bars, "REDRAWN", 0)


def names(err: str) -> list[str]:
    """What bars stand on the screen, each once: what is before the share done in a line."""
    return list(dict.fromkeys(re.findall(r"([^\r\n]*?): +\d+%", err)))


def tree_of(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")
    return ast.parse(text)


def test_every_bar_has_a_name_and_a_unit_and_comes_from_tqdm_auto():
    nodes = [(path, node) for path in SOURCES for node in ast.walk(tree_of(path))]
    for path, node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tqdm"):
            assert node.module == "tqdm.auto", path
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("tqdm") for alias in node.names), path
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
            assert {"desc", "unit"} <= {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"


def test_a_bar_says_what_how_far_and_how_long_it_will_take(capsys, at_once):
    for _ in steps(range(3), "miniworld-gpt2: keys", "layer"):
        time.sleep(0.15)
    # what is behind < is the time left
    shown = r"miniworld-gpt2: keys:  67%.* 2/3 \[\d\d:\d\d<\d\d:\d\d,.*(layer/s|s/layer)"
    assert re.search(shown, capsys.readouterr().err)


def test_what_is_done_at_once_leaves_no_line(capsys):
    for _ in steps(range(1000), "keys", "layer"):
        pass
    assert capsys.readouterr().err == ""


def test_a_listener_is_told_in_place_of_a_bar(capsys, at_once):
    told = []
    with bars.told_to(lambda *task: told.append(task)):
        with bar(2, "miniworld-gpt2: single edits", "edit", progress=False) as outer:
            for _ in steps(range(2), "miniworld-gpt2: rome", "edit"):
                pass
            outer.update(2)
    assert told == [("rome", 1, 2), ("rome", 2, 2), ("single edits", 2, 2)]
    assert capsys.readouterr().err == ""


def test_none_if_none_is_wanted(capsys, at_once):
    for _ in steps(range(3), "keys", "layer", progress=False):
        pass
    assert capsys.readouterr().err == ""


def test_a_task_within_another_stands_behind_its_bar(capsys, at_once):
    with bar(2, "miniworld-gpt2: single edits", "edit") as outer:
        for _ in steps(range(4), "miniworld-gpt2: rome", "edit"):
            time.sleep(0.01)
        outer.update(2)
    shown = capsys.readouterr().err
    assert names(shown) == ["miniworld-gpt2: single edits"]
    assert re.search(r"0/2 .*, rome 2/4, \d\d:\d\d left\]", shown)
    assert " left]" not in shown.splitlines()[-1].split("\r")[-1]  # it is gone when it is through


def test_a_task_that_breaks_off_does_not_hide_the_bars_of_later_ones(capsys, at_once):
    with pytest.raises(ZeroDivisionError):
        for number in steps(range(3), "first", "edit"):
            1 / number  # noqa: B018
    with pytest.raises(ZeroDivisionError), bar(2, "second", "edit"):
        1 / 0  # noqa: B018
    for _ in steps(range(2), "third", "edit"):
        pass
    assert names(capsys.readouterr().err) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("study", "last"),
    [(studies.single_edits, "single edits"), (studies.sequential_edits, "sequences")],
)
def test_a_study_shows_one_bar_and_none_when_it_is_stored(study, last, tiny, requests, texts, tmp_path, capfd, at_once):
    capfd.readouterr()
    for shown in ([f"{tiny.title}, rome, mixed keys, layer 1: {last}"], []):
        study(tiny, requests, texts[:2], store=Store(tmp_path), **FAST)
        assert names(capfd.readouterr().err) == shown


def test_studies_of_treated_models_show_one_bar_each_and_none_when_stored(tmp_path, capfd, at_once):
    lm, store = nbkit.load("miniworld-gpt2"), Store(tmp_path)
    noises = [studies.Treatment("noise", "noise", relative_norm=norm) for norm in (0.1, 0.2)]
    capfd.readouterr()
    for shown in ([f"{lm.title}: perplexity of treated models", f"{lm.title}: task scores of treated models"], []):
        studies.treated_perplexity(lm, noises, nbkit.read_texts("miniworld", limit=2), store)
        studies.treated_scores(lm, noises, ["nli"], 2, store=store)
        assert names(capfd.readouterr().err) == shown


def test_the_scores_of_tasks_show_one_bar(capfd, at_once):
    lm = nbkit.load("miniworld-gpt2")
    capfd.readouterr()
    nbkit.task_scores(lm, ["nli", "ner"], limit=2)
    assert names(capfd.readouterr().err) == ["miniworld-gpt2: task scores"]


def test_a_model_that_is_loaded_has_a_bar_by_its_name(capfd, at_once, tiny, tmp_path):
    tiny.save(tmp_path / "own")
    capfd.readouterr()
    nbkit.load(tmp_path / "own")
    assert names(capfd.readouterr().err) == ["own: weights"]
