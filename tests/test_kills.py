"""A study that is killed anywhere, and run again, gives the table of one that was left alone, bit for bit.

Its process is killed after a random time, in a fork so that nothing has to be loaded anew. NBKIT_KILLS sets how often,
over all studies: `NBKIT_KILLS=50 python -m pytest tests/test_kills.py`.
"""

import os
import signal
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_lm
from tqdm.auto import tqdm

from nbkit import studies
from nbkit.records import results
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import single

KILLS = int(os.environ.get("NBKIT_KILLS", "9"))
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
        lm, REQUESTS[:4], TEXTS, seeds=[0, 1, 2, 3], store=store, **FAST
    ),
    "task": lambda lm, store: studies.task_correlation(
        lm, REQUESTS[:3], TEXTS, task_names=["nli"], limit=2, store=store, **FAST
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
