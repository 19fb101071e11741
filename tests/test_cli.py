"""`python -m nbkit`: arguments, exit status and messages; runs are processes of their own, as a shell starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from nbkit.__main__ import main
from nbkit.batch import doctor
from nbkit.batch.record import run_named

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


def test_a_sweep_runs_all_combinations_in_one_kernel_and_goes_on_where_it_was(tmp_path):
    """The notebook fails where count is 5, and prints its kernel's process."""
    grid = ["sweep", FIXTURES / "counts.ipynb", "-p", "count", "3,4,5", "-p", "seeds", "0,1", "--out", tmp_path]
    result = nbkit(*grid)
    assert result.returncode == 1
    assert "1 of 3 combinations failed" in result.stderr
    assert "failed: counts.ipynb, cell 3 failed: ValueError: five" in result.stdout
    copies = [tmp_path / "counts" / f"counts--count={count}--seeds=0,1.ipynb" for count in (3, 4)]
    lines = [printed(copy) for copy in copies]
    assert [line[0] for line in lines] == ["3 [0, 1]", "4 [0, 1]"]
    assert len({line[1] for line in lines}) == 1, "each run had a kernel of its own"
    assert {line[2] for line in lines} == {"none of another run"}
    assert [line[3] for line in lines] == [copy.stem for copy in copies]

    again = nbkit(*grid)
    assert again.stdout.count("was done before") == 2
    assert [printed(copy) for copy in copies] == lines


def printed(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    streams = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream"]
    return "".join(line for stream in streams for line in stream["text"]).splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--help", "declares"], "key_mode: str = 'mixed'  which key [mixed | prefixed | plain]"),
        (["run", "declares", "--help"], "n_requests: int = 120 how many of them [1..]"),
        (["list", "declares"], "variants: list[str] = ['ROME'] compared [one or more: ROME | C-ROME]"),
        (["sweep", "declares", "-p", "layer", "1,-2"], "layer: -2 is not allowed"),
        (["sweep", "declares", "-p", "layre", "1,2"], "no parameter layre; did you mean 'layer'?"),
        (["results", "single_edits"], "no rows of a study 'single_edits' are stored"),
    ],
)
def test_what_the_other_commands_say(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    words = [str(FIXTURES / "declares.ipynb") if word == "declares" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["nbkit", *words])
    with pytest.raises(SystemExit) as end:
        main()
    output = capsys.readouterr().out + str(end.value.code or "")
    assert " ".join(said.split()) in " ".join(output.split())


def test_doctor_names_what_is_broken_and_what_to_do(monkeypatch, tmp_path, capsys):
    for sound in ("packages", "kernel", "gpu"):  # seconds each, and the machine's own affair
        good = doctor.Finding(sound, "sound")
        monkeypatch.setattr(doctor, sound, lambda good=good: [good] if good.what == "packages" else good)
    monkeypatch.setattr(sys, "argv", ["nbkit", "doctor"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().out

    damaged = tmp_path / "data/models/miniworld-gpt2"
    shutil.copytree(ROOT / "data/models/miniworld-gpt2", damaged)
    shutil.copytree(ROOT / "data/miniworld", tmp_path / "data/miniworld", ignore=shutil.ignore_patterns("text.txt"))
    weights = load_file(damaged / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, damaged / "model.safetensors", {"format": "pt"})
    (tmp_path / "runs").touch()
    monkeypatch.setattr("nbkit.paths.DATA", tmp_path / "data")
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path / "runs" / "below-a-file")
    with pytest.raises(SystemExit, match="2 problems found"):
        main()
    said = capsys.readouterr().out
    assert "BAD model miniworld-gpt2" in said and "make miniworld MODEL=miniworld-gpt2" in said
    assert "set NBKIT_RUNS to another one" in said


def test_doctor_tells_a_package_of_another_version():
    assert doctor.package(Requirement("numpy>=2")).remedy is None
    assert "and <1 needed" in doctor.package(Requirement("numpy<1")).found
    assert doctor.package(Requirement("no-such-package")).remedy


@pytest.mark.parametrize(
    ("command", "name", "line"),
    [
        ("run", "SIGINT", "interrupted; rows that were already stored are kept"),
        ("run", "SIGTERM", "interrupted by SIGTERM; rows that were already stored are kept"),
        ("run", "SIGHUP", "interrupted by SIGHUP; rows that were already stored are kept"),
        ("sweep", "SIGTERM", "interrupted by SIGTERM; rows that were already stored are kept"),
        ("sweep", "SIGINT", "interrupted; rows that were already stored are kept"),
        ("figures", "SIGINT", "interrupted; rows that were already stored are kept"),
    ],
)
def test_a_signal_lets_the_notebook_clean_up_and_is_told_in_one_line(command, name, line, tmp_path):
    note = tmp_path / "note"  # the notebook sends the signal to the command and writes this file on its way out
    path, given = FIXTURES / "interrupted.ipynb", ["-p", "note", note, "-p", "name", name]
    if command == "figures":
        (tmp_path / "notebooks").mkdir()
        text = path.read_text().replace('note: str = \\"\\"', f'note: str = \\"{note}\\"')
        text = text.replace("os.getppid()", "__import__('psutil').Process(os.getppid()).ppid()")
        (tmp_path / "notebooks" / path.name).write_text(text)
        path, given = "--notebooks", [tmp_path / "notebooks"]
    result = nbkit(command, path, *given, "--out", tmp_path / "runs")
    assert (result.returncode, result.stdout, result.stderr) == (128 + signal.Signals[name], "", f"{line}\n")
    cleaned, kernel = note.read_text().rsplit(" ", 1)
    assert cleaned == "cleaned up"
    with pytest.raises(ProcessLookupError):
        os.kill(int(kernel), 0)
    (partial,) = (tmp_path / "runs").rglob("*.ipynb")  # what had run is kept, and nothing looks like a complete run
    assert partial.name.endswith(".partial.ipynb") and "time.sleep" in partial.read_text()


def test_what_a_signal_strikes_before_it_has_begun_adds_no_line():
    code = """
        import os, signal, time
        from nbkit import __main__ as command
        async def struck(): ...
        def app(prog_name):
            coroutine = struck()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        command.app = app
        command.main()
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    line = "interrupted by SIGTERM; rows that were already stored are kept\n"
    assert (result.returncode, result.stdout, result.stderr) == (128 + signal.SIGTERM, "", line)


def test_ctrl_c_ends_doctor_in_one_line(monkeypatch, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(doctor, "packages", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["nbkit", "doctor"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (130, 1)


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


def test_hyper_parameters_of_one_s_own_reach_the_notebook_from_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[rome]\nlayer = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBKIT_HPARAMS", "before")
    seen = {}
    monkeypatch.setattr("nbkit.batch.run.run_notebook", lambda *_, **__: seen.update(os.environ))
    monkeypatch.setattr(sys, "argv", ["nbkit", "run", "01", "--hparams", "mine.toml"])
    with pytest.raises(SystemExit):
        main()
    assert seen["NBKIT_HPARAMS"] == str(tmp_path / "mine.toml")
    monkeypatch.setenv("NBKIT_HPARAMS", "mine.toml")
    monkeypatch.setenv("NBKIT_STYLE", "ggplot")
    with run_named("01", Path("01.ipynb"), {}, {}, "figures"):
        assert os.environ["NBKIT_HPARAMS"] == str(tmp_path / "mine.toml") and os.environ["NBKIT_STYLE"] == "ggplot"
        assert os.environ["NBKIT_FIGURES"] == str(tmp_path / "figures")
    assert os.environ["NBKIT_HPARAMS"] == "mine.toml"
