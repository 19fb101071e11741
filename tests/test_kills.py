"""A study that is killed anywhere, and run again, gives the table of one that was left alone, bit for bit.

Its process is killed after a random time: in a fork, so that nothing has to be loaded anew, and as a notebook's run,
whose driver, kernel or whole group of processes is killed. NBKIT_KILLS sets how often in each of the two, over all
studies and all victims: `NBKIT_KILLS=50 python -m pytest tests/test_kills.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import tiny_lm
from tqdm.auto import tqdm

from nbkit import paths, studies
from nbkit.records import results
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import orders, single

KILLS = int(os.environ.get("NBKIT_KILLS", 9))
NOTEBOOK = paths.ROOT / "tests" / "notebooks" / "edits.ipynb"
TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]
REQUESTS = [
    EditRequest(prompt, subject, target, target_true="harp", case_id=f"{prompt} {subject} {target}")
    for prompt in ("{} plays the", "{} is located in", "The mother tongue of {} is")
    for subject, target in (("Ann", "drum"), ("Vouda", "chess"), ("Danielle Darrieux", "the song"))
]
FAST = {"layer": 1, "v_num_grad_steps": 3, "context_templates": ["{}", "The river runs. {}", "I. {}"]}

STUDIES = {
    "single": lambda lm, store: studies.single_edits(lm, REQUESTS, TEXTS, store=store, **FAST),
    "sequential": lambda lm, store: studies.sequential_edits(
        lm, REQUESTS[:5], TEXTS, seeds=[0, 1, 2], evaluate_every=2, store=store, **FAST
    ),
    "task": lambda lm, store: studies.treated_scores(
        lm, [studies.Treatment("ROME", "single", "rome", (one,), FAST) for one in REQUESTS[:3]], ["nli"], 2, store=store
    ),
}


def killed_after(seconds: float, work) -> bool:
    """Run `work` in a fork, killed after so many seconds; whether it was not done by then."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            tqdm.set_lock(threading.RLock())  # not the one that forks share, which the killed would keep
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", STUDIES)
def test_a_killed_study_resumes_to_the_undisturbed_table(tmp_path, monkeypatch, name):
    monkeypatch.setattr(results, "_kept", {})
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(single, "EDITS_AT_ONCE", 4)
    monkeypatch.setattr(orders, "STATE_SECONDS", 0.02)  # so that kills meet states, and fall between rows and states
    monkeypatch.setattr(orders, "STATE_SHARE", 1.0)
    lm, n_threads = tiny_lm("gpt2", torch.float32), torch.get_num_threads()  # of float32, where another batch shows
    torch.set_num_threads(1)
    try:
        work = STUDIES[name]
        started = time.perf_counter()
        undisturbed = work(lm, Store(tmp_path / "undisturbed")).drop(columns="created")
        seconds, rng, n_killed = time.perf_counter() - started, np.random.default_rng(0), 0
        for trial in range(max(1, KILLS // len(STUDIES))):
            store = Store(tmp_path / f"store {trial}")
            n_killed += killed_after(rng.uniform(0, seconds), lambda store=store: work(lm, store))
            found = work(lm, store).drop(columns="created")
            pd.testing.assert_frame_equal(found, undisturbed, check_exact=True)
        assert n_killed
    finally:
        torch.set_num_threads(n_threads)


class Run:
    """`python -m nbkit run` of the notebook of edits, in a group of its own, with its rows in a folder."""

    def __init__(self, folder):
        self.results = folder / "results"
        settings = {"NBKIT_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "nbkit", "run", str(NOTEBOOK)], env={**os.environ, **settings}, cwd=paths.ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def kernel(self) -> psutil.Process | None:
        children = psutil.Process(self.driver.pid).children(recursive=True)
        return next((child for child in children if "ipykernel_launcher" in child.cmdline()), None)

    def wait_for_rows(self) -> bool:
        """Until the first rows are stored; False where the run ended without any."""
        while not any(self.results.rglob("part-*")):
            if self.driver.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def end(self) -> None:
        assert self.driver.wait(timeout=300) == 0

    def tables(self) -> list[pd.DataFrame]:
        """The rows of each study in the order of their units, without what tells one run from another."""
        found = []
        for key in sorted(self.results.rglob("key.json")):
            study = results.Study.stored(key.parent)
            frame = study.frame(sorted(study.units))
            found.append(frame.drop(columns=["created", "git_commit"]))
        return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[pd.DataFrame], float]:
    """The tables of a run that was left alone, and the seconds from its first rows to its end."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    assert run.wait_for_rows()
    started = time.perf_counter()
    run.end()
    assert len(run.tables()) == 3
    return run.tables(), time.perf_counter() - started


LONG = pytest.mark.skipif("NBKIT_KILLS" not in os.environ, reason="long: set NBKIT_KILLS to how many")


@pytest.mark.parametrize("victim", ["driver", pytest.param("kernel", marks=LONG), pytest.param("group", marks=LONG)])
def test_a_run_that_is_killed_resumes_to_the_undisturbed_table(tmp_path, undisturbed, victim):
    tables, seconds = undisturbed
    rng = np.random.default_rng(0)
    for trial in range(max(1, KILLS // 9)):
        killed = Run(tmp_path / f"{victim} {trial}")
        assert killed.wait_for_rows()
        kernel = killed.kernel()
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(psutil.NoSuchProcess):  # of a run that was quicker than the one left alone
            if victim == "group":
                os.killpg(killed.driver.pid, signal.SIGKILL)
            (killed.driver if victim == "driver" else kernel).kill()
        killed.driver.wait(timeout=60)
        kernel.wait(timeout=60)  # which does not outlive its driver
        again = Run(tmp_path / f"{victim} {trial}")
        again.end()
        for found, expected in zip(again.tables(), tables, strict=True):
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
