"""`python -m nbkit`: arguments, exit status and messages; runs are processes of their own, as a shell starts them."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbkit.__main__ import main

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "notebooks"


def nbkit(*arguments):
    command = [sys.executable, "-m", "nbkit", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        # Tests that a shell runs in the background ignore Ctrl-C, and what they start would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_run_prints_the_executed_copy(tmp_path):
    result = nbkit("run", FIXTURES / "works.ipynb", "-p", "count", "7", "-p", "rate", "-1e-3", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    copy = Path(result.stdout.strip())
    assert copy.is_file()
    assert copy.name == "works--count=7--rate=-0.001.ipynb"


def test_a_failing_notebook_fails_the_command_without_a_traceback(tmp_path):
    result = nbkit("run", FIXTURES / "fails.ipynb", "--out", tmp_path)
    assert result.returncode == 1
    assert "fails.ipynb, cell 4 failed: ValueError: total is 4" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["works.ipynb", "-p", "cuont", "3"], 1, "no parameter cuont"),
        (["works.ipynb", "-p", "count", "three"], 1, "'three' is no int"),
        (["works.ipynb", "-p", "count"], 2, "has no value"),
        (["works.ipynb", "-p", "count", "3", "-p", "count=4"], 2, "given twice"),
        (["nowhere.ipynb"], 1, "there is no notebook"),
    ],
)
def test_wrong_arguments_are_refused(arguments, status, message, tmp_path, monkeypatch, capsys):
    words = ["nbkit", "run", str(FIXTURES / arguments[0]), *arguments[1:], "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err if status == 2 else end.value.code  # sys.exit(text) prints it and gives status 1
    assert message in " ".join(said.replace("│", " ").split())
    assert end.value.code == status or status == 1
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_lets_the_notebook_clean_up(tmp_path):
    note = tmp_path / "note"  # the notebook interrupts the command and writes this file on its way out
    result = nbkit("run", FIXTURES / "interrupted.ipynb", "-p", "note", note, "--out", tmp_path)
    assert result.returncode == 130
    assert "interrupted" in result.stderr
    assert note.read_text() == "cleaned up"
    assert not [p for p in tmp_path.rglob("*.ipynb") if ".partial" not in p.name]


def test_figures_runs_all_and_lists_what_failed(tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name in ("fails", "works"):
        shutil.copy(FIXTURES / f"{name}.ipynb", notebooks)
    result = nbkit("figures", "--notebooks", notebooks, "--out", tmp_path / "runs")
    assert result.returncode == 1
    assert "1 of 2 notebooks failed: fails.ipynb" in result.stderr
    assert "cell 4 failed" in result.stderr
    assert (tmp_path / "runs/works/works.ipynb").is_file()


def test_figures_without_notebooks_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nbkit", "figures", "--notebooks", str(tmp_path)])
    with pytest.raises(SystemExit, match="no notebooks"):
        main()
