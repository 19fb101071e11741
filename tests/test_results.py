"""Stored rows: resumed after interrupts, kept when the disk is full, never mixed up, never computed twice."""

import errno
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from nbkit import paths
from nbkit.errors import ResultsError
from nbkit.records import parts, provenance, results, runs, tables
from nbkit.records.results import Store
from nbkit.records.tables import overview, write_table

KEY = {"model": "abc", "method": "rome", "seed": 0}
UNITS = [f"unit {i}" for i in range(7)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_kept", {})
    return Store(tmp_path / "results")


class Compute:
    """A unit's rows, counting the calls; raises `error` at unit number `at` once."""

    def __init__(self, error=None, at=None):
        self.error, self.at, self.calls = error, at, []

    def __call__(self, unit):
        self.calls.append(unit)
        number = UNITS.index(unit)
        if number == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error
        perplexity = [15.2, math.inf, math.nan][number % 3]
        rows = [{"case_id": number, "perplexity": perplexity, "stop": None if number < 3 else "loss"}]
        return rows + [{"case_id": number, "perplexity": np.float32(1.5), "ok": True}] * (number % 2)


def same(left, right):
    pd.testing.assert_frame_equal(left.drop(columns="created"), right.drop(columns="created"), check_exact=True)


def test_rows_come_back_as_they_were_and_are_not_computed_again(store):
    compute = Compute()
    frame = store.study("toy", KEY, {"commit": "c0"}).complete(UNITS, compute)
    again = store.study("toy", KEY, {"commit": "c1"}).complete(UNITS, compute)
    assert compute.calls == UNITS
    pd.testing.assert_frame_equal(frame, again, check_exact=True)
    assert frame["case_id"].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6]
    assert frame["case_id"].dtype == "int64"
    assert math.isinf(frame["perplexity"][1]) and math.isnan(frame["perplexity"][3])
    assert set(frame["commit"]) == {"c0"} and set(frame["study"]) == {"toy"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("unit 4 is bad"), SystemExit(1)])
@pytest.mark.parametrize("flush_seconds", [0.0, 1000.0])
def test_an_interrupted_study_resumes_and_equals_an_uninterrupted_one(
    store, tmp_path, monkeypatch, error, flush_seconds
):
    monkeypatch.setattr(results, "FLUSH_SECONDS", flush_seconds)
    compute = Compute(type(error)(*error.args), at=4)
    with pytest.raises(type(error)):
        store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == UNITS[:5]
    resumed = store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == UNITS[:5] + UNITS[4:]
    same(resumed, Store(tmp_path / "other").study("toy", KEY).complete(UNITS, Compute()))


def test_rows_follow_the_order_asked_for_not_that_of_computing(store):
    study = store.study("toy", KEY)
    study.complete(UNITS[4:], Compute())
    frame = study.complete(UNITS, Compute())
    assert frame["case_id"].is_monotonic_increasing
    assert study.frame([UNITS[2], UNITS[0]])["case_id"].tolist() == [2, 0]


def test_more_units_compute_only_the_new_ones(store):
    store.study("toy", KEY).complete(UNITS[:3], Compute())
    compute = Compute()
    store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == UNITS[3:]


def test_columns_that_are_empty_in_one_part_keep_their_type(store):
    for number, value in enumerate([None, 2, 2.5, math.nan]):
        with store.study("toy", KEY) as study:
            study.add(str(number), [{"value": value}])
    values = store.study("toy", KEY).frame()["value"]
    assert values.dtype == "float64" and values[1:3].tolist() == [2.0, 2.5]


def test_any_change_of_the_key_is_another_study(store):
    folders = {
        store.study("toy", {**KEY, **change}).folder for change in ({}, {"seed": 1}, {"model": "x"}, {"lr": 0.5})
    }
    assert len(folders) == 4
    assert store.study("toy", dict(reversed(KEY.items()))).folder in folders


def test_a_damaged_part_is_named(store):
    study = store.study("toy", KEY)
    study.complete(UNITS, Compute())
    (part,) = study.folder.glob("part-*.parquet")
    for damage in (b"", b"PAR1 not a table", part.read_bytes()[:-30]):
        part.write_bytes(damage)
        with pytest.raises(ResultsError, match=part.name):
            store.study("toy", KEY)
    part.unlink()
    compute = Compute()
    store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == UNITS


def test_a_part_without_its_unit_column_is_named(store):
    study = store.study("toy", KEY)
    study.complete(UNITS, Compute())
    pd.DataFrame({"perplexity": [1.0]}).to_parquet(study.folder / "part-9.parquet")
    with pytest.raises(ResultsError, match=r"part-9\.parquet is damaged"):
        store.study("toy", KEY)


@pytest.mark.parametrize("text", ["{", json.dumps({"model": "other"})])
def test_a_damaged_key_file_is_named(store, text):
    study = store.study("toy", KEY)
    study.complete(UNITS, Compute())
    (study.folder / "key.json").write_text(text)
    with pytest.raises(ResultsError, match="key.json"):
        store.study("toy", KEY)


def test_a_folder_that_cannot_be_made_stops_the_study_before_it_computes(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    compute = Compute()
    with pytest.raises(ResultsError, match=r"cannot write results to .*NBKIT_RUNS"):
        Store(tmp_path / "file").study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == []


def test_a_read_only_folder_stops_the_study_before_it_computes_but_can_be_read(store, monkeypatch):
    study = store.study("toy", KEY)
    study.complete(UNITS[:2], Compute())

    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(results, "write_atomically", read_only)
    compute = Compute()
    with pytest.raises(ResultsError, match="Read-only file system; nothing was computed"):
        store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == []
    assert len(store.study("toy", KEY).complete(UNITS[:2], compute)) == 3


class FullDisk:
    """A Parquet writer that fails with ENOSPC, after a few bytes, while `full`."""

    def __init__(self, monkeypatch):
        self.full, self.write = True, pq.write_table
        monkeypatch.setattr(parts.pq, "write_table", self)

    def __call__(self, table, file):
        if self.full:
            file.write(b"PAR1")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.write(table, file)


@pytest.mark.parametrize("flush_seconds", [0.0, 1000.0])
def test_a_full_disk_loses_nothing_that_was_computed(store, tmp_path, monkeypatch, flush_seconds):
    monkeypatch.setattr(results, "FLUSH_SECONDS", flush_seconds)
    disk, compute = FullDisk(monkeypatch), Compute()
    with pytest.raises(ResultsError, match="No space left on device; . finished units are kept") as caught:
        store.study("toy", KEY).complete(UNITS, compute)
    computed = list(compute.calls)
    assert len(caught.value.study.frame()) >= len(computed) >= 1
    assert not list(store.folder.rglob("*PAR1*")) and not list(store.folder.rglob("*.parquet*"))
    with pytest.raises(ResultsError, match="No space left"):  # still full: what is in memory stays there
        store.study("toy", KEY).complete(UNITS, compute)
    disk.full = False
    resumed = store.study("toy", KEY).complete(UNITS, compute)
    assert compute.calls == UNITS
    same(resumed, Store(tmp_path / "other").study("toy", KEY).complete(UNITS, Compute()))
    same(resumed, Store(store.folder).study("toy", KEY).frame())


def test_ctrl_c_on_a_full_disk_names_the_disk_and_keeps_the_rows(store, monkeypatch):
    FullDisk(monkeypatch)
    with pytest.raises(ResultsError, match="3 finished units are kept") as caught:
        store.study("toy", KEY).complete(UNITS, Compute(KeyboardInterrupt(), at=3))
    assert isinstance(caught.value.__cause__.__context__, KeyboardInterrupt)


def test_an_interrupt_while_writing_leaves_no_broken_part(store, monkeypatch):
    def interrupted(table, file):
        file.write(b"PAR1")
        raise KeyboardInterrupt

    study = store.study("toy", KEY)
    study.__enter__()
    study.add("unit 0", Compute()("unit 0"))
    with monkeypatch.context() as patch:
        patch.setattr(parts.pq, "write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.flush()
    assert [path.name for path in study.folder.iterdir()] == ["key.json"]
    study.flush()
    assert store.study("toy", KEY).done("unit 0")


def test_finished_units_are_stored_while_the_next_one_is_computed(store, monkeypatch):
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.02)
    seen = []

    def compute(unit):
        monkeypatch.setattr(results, "FLUSH_SECONDS", 1000.0)  # for `add`: what is stored, the waiting has stored
        deadline = time.monotonic() + 20
        while seen and unit not in store.study("toy", KEY).units and time.monotonic() < deadline:
            time.sleep(0.01)
            if seen[-1] in store.study("toy", KEY).units:
                break
        seen.append(unit)
        yield {"case_id": UNITS.index(unit), "stored": len(store.study("toy", KEY).units)}

    assert store.study("toy", KEY).complete(UNITS[:3], compute)["stored"].tolist() == [0, 1, 2]


def test_units_computed_together_are_stored_at_once_and_again_beside_the_same(store):
    asked = []

    def compute(units, stop=True):
        asked.append(units)
        if stop and len(asked) == 3:
            raise KeyboardInterrupt
        yield [(unit, [{"case_id": UNITS.index(unit)}]) for unit in units]
        assert set(units) <= set(store.study("toy", KEY).units)

    with pytest.raises(KeyboardInterrupt):
        store.study("toy", KEY).complete_together(UNITS, compute, size=2)
    assert len(list(store.study("toy", KEY).folder.glob("part-*.parquet"))) == 2
    frame = store.study("toy", KEY).complete_together(UNITS, partial(compute, stop=False), size=2)
    assert frame["case_id"].tolist() == list(range(7))
    assert asked == [UNITS[:2], UNITS[2:4], UNITS[4:6], UNITS[4:6], UNITS[6:]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_process_stores_what_is_finished(store, number):
    code = """
        import os, sys, time
        from nbkit.records import results
        def compute(unit):
            if unit == "2":
                os.kill(os.getpid(), int(sys.argv[2]))
                time.sleep(20)
            return [{"number": int(unit)}]
        results.Store(sys.argv[1]).study("toy", {"seed": 0}).complete([str(i) for i in range(5)], compute)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(store.folder), str(int(number))]
    assert subprocess.run(command, cwd=paths.ROOT, capture_output=True, timeout=60).returncode == -number
    assert store.study("toy", {"seed": 0}).units == ["0", "1"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_values_that_no_column_can_hold_are_refused_and_the_rest_is_kept(store):
    with pytest.raises(ResultsError, match="unit b"), store.study("toy", KEY) as study:
        study.add("a", [{"case_id": 1}])
        study.add("b", [{"case_id": object()}])
    with pytest.raises(ResultsError, match="unit c: a column has another type"), store.study("toy", KEY) as study:
        study.add("c", [{"case_id": "text"}])
    with pytest.raises(ResultsError, match="has no rows"), store.study("toy", KEY) as study:
        study.add("d", [])
    assert store.study("toy", KEY).frame()["case_id"].tolist() == [1]


def test_folders_deleted_in_the_middle_leave_a_store_that_opens(store, monkeypatch):
    """By another process, or by hand: what is left is read, and only what is gone is computed again."""
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.0)
    whole, compute = Store(store.folder / "whole").study("toy", KEY).complete(UNITS, Compute()), Compute()

    def deleting(unit):
        if unit == UNITS[4]:
            shutil.rmtree(store.folder / "toy")
        return compute(unit)

    same(store.study("toy", KEY).complete(UNITS, deleting), whole)
    assert set(tables.results("toy", store=store)["case_id"]) == {4, 5, 6}  # their key is there again
    again = Compute()
    same(store.study("toy", KEY).complete(UNITS, again), whole)
    assert again.calls == UNITS[:4]

    folder = store.study("toy", KEY).folder
    for number in (0, 6):
        run_of(f"r{number}", monkeypatch)
        store.study("toy", KEY).complete([UNITS[number]], again)
    parts = {part: set(pq.read_table(part)["unit"].to_pylist()) for part in folder.glob("part-*.parquet")}
    for part in parts:
        if UNITS[0] in parts[part]:
            part.unlink()
    assert overview(store)["run"].fillna("").tolist() == ["r6", ""]  # the note of the other is there, its rows are not
    listed = sorted(folder.glob("part-*.parquet"))
    monkeypatch.setattr(type(folder), "glob", lambda *_: iter([folder / "part-gone.parquet", *listed]))
    assert UNITS[6] in store.study("toy", KEY).units  # one is deleted between listing and reading


def test_two_processes_share_a_study(store):
    code = """
        import sys, time
        from nbkit.records import results
        results.FLUSH_SECONDS = 0.0
        first = int(sys.argv[2])
        study = results.Store(sys.argv[1]).study("toy", {"seed": 0})
        def compute(unit):
            time.sleep(0.002)
            return [{"number": int(unit), "perplexity": float("inf")}]
        study.complete([str(i) for i in range(first, first + 60)], compute)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(store.folder)]
    processes = [subprocess.Popen([*command, str(first)], cwd=paths.ROOT, stderr=subprocess.PIPE) for first in (0, 40)]
    for process in processes:
        _, output = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode()
    frame = store.study("toy", {"seed": 0}).frame([str(i) for i in range(100)])
    assert frame["number"].tolist() == list(range(100))
    assert np.isinf(frame["perplexity"]).all()


# provenance


def write_package(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    provenance.code_version.cache_clear()
    return provenance.code_version(folder)


def test_code_version_sees_code_and_hyperparameters_but_not_words_or_drawings(tmp_path):
    package = tmp_path / "package"
    code = '"""Words."""\ndef f(x):\n    """More."""\n    return x + 1\n'
    first = write_package(package, {"methods/rome.py": code, "methods/hparams.toml": "a = 1"})
    assert write_package(package, {"methods/rome.py": "def f(x):  # said otherwise\n    return x + 1\n"}) == first
    others = ("plots/style.py", "records/results.py", "plain/rome.py", "__main__.py")
    assert write_package(package, dict.fromkeys(others, "x = 1")) == first
    changed = write_package(package, {"methods/rome.py": "def f(x):\n    return x + 2\n"})
    assert changed != first
    assert write_package(package, {"methods/hparams.toml": "a = 2"}) not in (first, changed)


@pytest.mark.parametrize(
    ("name", "determines"), [("studies/single.py", True), ("plots/style.py", False), ("__init__.py", False)]
)
def test_code_version_of_this_package_covers_its_studies(tmp_path, name, determines):
    package = shutil.copytree(paths.ROOT / "nbkit", tmp_path / "nbkit")
    with open(package / name, "a") as file:
        file.write("\nADDED = 1\n")
    assert (provenance.code_version(package) != provenance.code_version()) == determines


def test_digest_depends_on_content_only():
    array = np.arange(6.0)
    assert provenance.digest({"a": 1, "b": array}) == provenance.digest({"b": array.copy(), "a": 1})
    assert provenance.digest(array) != provenance.digest(array.reshape(2, 3))
    assert provenance.digest([math.inf]) != provenance.digest([math.nan])
    with pytest.raises(TypeError, match="function"):
        provenance.digest({"f": len})


def test_digest_of_files_sees_names_and_contents(tmp_path):
    (tmp_path / "a.yaml").write_text("x")
    first = provenance.files_digest(tmp_path)
    (tmp_path / "a.yaml").write_text("y")
    second = provenance.files_digest(tmp_path)
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    third = provenance.files_digest(tmp_path)
    assert len({first, second, third}) == 3
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "scorer.pyc").write_text("compiled when the scorer is first run")
    assert provenance.files_digest(tmp_path) == third


def test_provenance_columns():
    class Model:
        name, hash, device, dtype = "tiny", "abc", "cpu", "torch.float32"

    columns = results.provenance(Model(), seed=3, parameters={"layer": 2, "templates": ("{}",)})
    assert columns["model"] == "tiny" and columns["seed"] == 3
    assert json.loads(columns["parameters"]) == {"layer": 2, "templates": ["{}"]}
    assert {"code_version", "git_commit", "libraries", "created", "device", "dtype"} <= set(columns)


@pytest.mark.parametrize(
    ("file", "dirty"),
    [("figures/a.png", False), ("notebooks/01.ipynb", False), ("README.md", False), ("nbkit/a.py", True),
     ("data/a.json", True)],
)  # fmt: skip
def test_what_makes_a_commit_dirty_is_code_and_data_not_figures_and_notebooks(tmp_path, monkeypatch, file, dirty):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for path in ("figures/a.png", "notebooks/01.ipynb", "README.md", "nbkit/a.py", "data/a.json", "pyproject.toml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / file).write_text("two")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{12}" + ("-dirty" if dirty else ""), provenance.git_commit.__wrapped__())


def test_neither_results_nor_plots_import_torch():
    code = "import sys, nbkit.records.results, nbkit.plots; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, check=False).returncode == 0


# --- one table of all rows --------------------------------------------------------------------------------------------


def run_of(name, monkeypatch, **parameters):
    """As the batch runner names a run."""
    run = {"run": name, "notebook": "01_toy", "parameters": parameters, "started": "now"}
    monkeypatch.setenv(runs.SETTING, json.dumps(run))


@pytest.fixture
def stored(store, monkeypatch):
    """Rows of two keys: of two runs that share units, and of JupyterLab, which is no run."""
    run_of("01_toy--n=2", monkeypatch, n=2, seed=5)
    store.study("toy", {"parameters": {"layer": 1, "layers": [1, 2]}}).complete(UNITS[:2], Compute())
    run_of("01_toy--n=3", monkeypatch, n=3, seed=5)
    study = store.study("toy", {"parameters": {"layer": 1, "layers": [1, 2]}})
    study.complete(UNITS[:2], Compute())  # as a notebook asks twice, for some and for others
    study.complete(UNITS[2:3], Compute())
    monkeypatch.delenv(runs.SETTING)
    store.study("toy", {"parameters": {"layer": "all"}}).complete(UNITS[:1], Compute())
    return store


def test_the_table_of_a_study_says_which_run_each_row_belongs_to(stored):
    table = tables.results("toy", store=stored)
    sizes = table.groupby("run", dropna=False).agg(rows=("case_id", "size"), n=("run_n", "first"))
    assert sizes.loc["01_toy--n=2"].tolist() == [3, 2]  # the second unit has two rows
    assert sizes.loc["01_toy--n=3"].tolist() == [4, 3]
    assert sizes.loc[sizes.index.isna()].to_numpy().tolist() == [[1, 1]]
    assert set(table["notebook"].dropna()) == {"01_toy"}
    assert set(table["run_seed"].dropna()) == {5}
    assert set(table["parameters.layers"].dropna()) == {"[1,2]"}
    assert table["key"].nunique() == 2
    assert tables.results("toy", run="01_toy--n=2", store=stored)["case_id"].tolist() == [0, 1, 1]
    assert overview(stored)["study"].tolist() == ["toy"] * 3


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_table_is_written_as_its_ending_says(stored, tmp_path, ending):
    table = tables.results("toy", store=stored)
    path = write_table(table, tmp_path / f"new/rows.{ending}")
    read = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    assert read.columns.tolist() == table.columns.tolist()
    assert read["case_id"].tolist() == table["case_id"].tolist()
    assert set(read["parameters.layer"].map(str)) == {"1", "all"}
    with pytest.raises(ResultsError, match="ends in neither of .csv, .parquet"):
        write_table(table, tmp_path / "rows.xls")


def test_a_study_or_run_that_is_not_there_is_named_with_the_nearest(stored):
    with pytest.raises(ResultsError, match="'toi'.* did you mean 'toy'"):
        tables.results("toi", store=stored)
    with pytest.raises(ResultsError, match="did you mean '01_toy--n=3'"):
        tables.results("toy", run="01_toy-n=3", store=stored)
