"""Ctrl-C at any instruction leaves no hook, no edit, no wrong hash and no wrong logits behind.

The suite interrupts each operation before some hundreds of its instructions, evenly spread. The long check does so at
20 times as many, and sends SIGINT at random times, so often as NBKIT_INTERRUPTS says:

    NBKIT_INTERRUPTS=20000 python -m pytest -s tests/test_interrupts.py
"""

import _thread
import gc
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from weakref import WeakSet

import pytest
import torch
from tqdm.auto import tqdm

import nbkit
from nbkit.edits import placed
from nbkit.edits.edit import Edit
from nbkit.edits.hashes import hash_of
from nbkit.edits.interrupts import Guarded, _State, uninterrupted
from nbkit.edits.overlays import applied, restoring, unedited
from nbkit.edits.updates import LowRank
from nbkit.models.hooks import capture, instead, replace, together
from nbkit.models.prompts import encode
from nbkit.records.results import Store
from nbkit.studies.sequential import sequential_edits

# Python says so of an interrupt that is raised behind the last line of a generator that is being dropped.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LONG = int(os.environ.get("NBKIT_INTERRUPTS", 0))


@pytest.fixture(autouse=True)
def _listening(monkeypatch):
    """A shell starts what it runs in the background with SIGINT ignored, and a loop over `edit_sequence` that another
    test left unfinished still wants its handler. An interrupt inside tqdm leaves tqdm's lock with this thread, and all
    other threads would wait for it."""
    monkeypatch.setattr(_State, "wanted", WeakSet())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    tqdm.set_lock(threading.RLock())


class _Ctrl_C:
    """`-_Ctrl_C()` makes an interrupt pending and delivers none: only calls, jumps back and beginnings do."""

    __neg__ = staticmethod(_thread.interrupt_main)


CTRL_C = _Ctrl_C()


def interrupted_at(n: int | None, run) -> tuple[int, bool]:
    """Runs with an interrupt that arrives before the n-th instruction; how many there were, and whether it was raised.

    It is raised where Python looks for one next, as that of a user is. None: no interrupt.
    """
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == n:
                sys.settrace(None)
                -CTRL_C  # noqa: B018
                return None
        return trace

    try:
        sys.settrace(trace)
        try:
            run()
        finally:
            sys.settrace(None)
    except KeyboardInterrupt:
        return count, True
    return count, False


def edit_of(lm, *layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        left, right = torch.randn(32, 1, generator=generator), torch.randn(1, 48, generator=generator)
        deltas[lm.weight_name(layer)] = LowRank(left, right)
    return Edit(deltas)


class Watched:
    """A model, and what is true of it whenever nobody is using it, by how many edits are applied to stay."""

    def __init__(self, lm, texts, folder):
        self.lm, self.batch = lm, encode(lm, texts[:1])
        self.edits = [edit_of(lm, 0, 1, seed=seed) for seed in range(2)]
        self.states, self.handler = [], signal.getsignal(signal.SIGINT)
        self.folder, self.numbers = folder, itertools.count()
        for edit in [None, *self.edits]:
            if edit is not None:
                lm.apply(edit)
            self.states.append((self.bits(), hash_of(lm.model), self.logits()))
        lm.undo(2)
        assert lm.hash == self.states[0][1]

    def bits(self):
        return [parameter.detach().clone() for parameter in self.lm.model.parameters()]

    @torch.no_grad()
    def logits(self):
        return self.lm.model(input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask).logits

    def wrong(self) -> list[str]:
        lm, (bits, known_hash, logits) = self.lm, self.states[self.lm.n_applied]
        held = {
            "a hook": not list(placed._lying_on(lm.model)) and not placed._open,
            "weights": all(map(torch.equal, self.bits(), bits)),
            "hash": lm.hash == known_hash and lm.base_hash == self.states[0][1],
            "logits": torch.equal(self.logits(), logits),
            "a verb": not lm.uses and not lm.set_aside and len(lm.overlays) == 1,
            "gradients": torch.is_grad_enabled(),
            "the handler": signal.getsignal(signal.SIGINT) is self.handler,
        }
        return [name for name, right in held.items() if not right]


@pytest.fixture
def watched(tiny, texts, tmp_path):
    return Watched(tiny, texts, tmp_path)


def hooks(watched):
    projection, block = watched.lm.projection(1), watched.lm.block(0)
    states = torch.ones(1, 48, dtype=watched.lm.dtype)
    with replace(projection, torch.clone), instead(block, torch.clone):
        with together([capture(projection), capture(projection, "input", stop=True)]):
            projection(states)


def overlays(watched):
    with applied(watched.lm, watched.edits[0]):
        with unedited(watched.lm), restoring(watched.lm) as add:
            add(watched.edits[1])


def out_of_order(watched):
    def steps(edits):
        with restoring(watched.lm) as add:
            for edit in edits:
                add(edit)
                yield

    for _ in zip(steps(watched.edits), steps(watched.edits[::-1]), strict=False):
        pass


def ledger(watched):
    watched.lm.apply(watched.edits[0])
    watched.lm.apply(watched.edits[1])
    watched.lm.undo()
    watched.lm.undo()


def verb(watched):
    watched.lm.replayable = watched.lm.adds_value = None
    nbkit.perplexity(watched.lm, ["Ann plays the harp"], edits=watched.edits)


def sequence(watched):
    request = nbkit.EditRequest("{} plays the", "Ann", "drum")
    options = {"layer": 1, "v_num_grad_steps": 1, "context_templates": ["{}"], "progress": False}
    for _ in nbkit.edit_sequence(watched.lm, [request] * 2, **options):
        pass


def study(watched):
    request = nbkit.EditRequest("{} plays the", "Ann", "drum")
    options = {"layer": 1, "v_num_grad_steps": 1, "context_templates": ["{}"]}
    store = Store(watched.folder / str(next(watched.numbers)))
    sequential_edits(watched.lm, [request], ["Ann plays the harp"], seeds=[0], store=store, **options)


OPERATIONS = {each.__name__: each for each in (hooks, overlays, out_of_order, ledger, verb, sequence, study)}


def put_back(watched):
    if watched.lm.n_applied:
        watched.lm.undo(watched.lm.n_applied)


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else is tracing")
@pytest.mark.parametrize(
    ("operation", "most"),
    [
        ("hooks", 900),
        ("overlays", 500),
        ("out_of_order", 300),
        ("ledger", 300),
        ("verb", 60),
        ("sequence", 60),
        ("study", 12),
    ],
)
def test_an_interrupt_at_any_instruction_leaves_nothing_behind(watched, operation, most):
    def run():
        OPERATIONS[operation](watched)

    n_instructions, _ = interrupted_at(None, run)
    n_instructions, _ = interrupted_at(None, run)  # without what is done once
    most *= 20 if LONG else 1
    places = range(1, n_instructions + 1, max(1, n_instructions // most))
    raised = 0
    for place in places:
        _, was = interrupted_at(place, run)
        raised += was
        assert watched.wrong() == [], f"interrupted before instruction {place} of {n_instructions}"
        put_back(watched)
    assert raised > 0.9 * len(places)


@pytest.mark.skipif(not LONG, reason="long: set NBKIT_INTERRUPTS to how many, say 20000")
def test_interrupts_at_random_times(watched):
    n, rng = LONG, random.Random(0)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    lasts = dict.fromkeys(OPERATIONS, math.inf)
    for name in [*OPERATIONS] * 10:
        began = time.perf_counter()
        OPERATIONS[name](watched)
        lasts[name] = min(lasts[name], time.perf_counter() - began)
    raised, wrong = dict.fromkeys(OPERATIONS, 0), []
    while sum(raised.values()) < n:
        name = rng.choice(list(OPERATIONS))
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() * lasts[name]))
            try:
                OPERATIONS[name](watched)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            raised[name] += 1
        if found := watched.wrong():
            wrong.append((name, found))
        put_back(watched)
    print(f"\n{sum(raised.values())} interrupts {raised}: {len(wrong)} wrong {wrong[:5]}")
    assert not wrong


def test_an_interrupt_waits_for_the_end_and_is_raised_there():
    done = []

    @uninterrupted
    def inner():
        signal.raise_signal(signal.SIGINT)
        done.append("inner")

    @uninterrupted
    def outer():
        inner()
        done.append("outer")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        outer()
    assert done == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_inside_a_with_is_raised_at_once():
    class Waits(Guarded):
        def begin(self):
            signal.raise_signal(signal.SIGINT)

        def end(self, error):
            ended.append(error)

    ended = []
    with pytest.raises(KeyboardInterrupt), Waits():
        pytest.fail("the body was entered")
    assert len(ended) == 1 and isinstance(ended[0], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), Guarded():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_another_thread_and_another_handler_are_left_alone():
    """A handler that is put in place inside (ipykernel does before each cell) stays, and threads need none."""
    seen, before = [], signal.getsignal(signal.SIGINT)
    try:
        with Guarded():
            signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        signal.raise_signal(signal.SIGINT)
        assert seen == [1]
        thread = threading.Thread(target=uninterrupted(lambda: seen.append(2)))
        thread.start()
        thread.join()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Guarded():
            signal.raise_signal(signal.SIGINT)
        assert seen == [1, 2] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()


def test_what_ends_on_another_thread_or_never_does_not_keep_the_handler():
    """As a loop over `edit_sequence` that was broken off, and that the garbage collector ends wherever it runs."""
    before = signal.getsignal(signal.SIGINT)
    elsewhere = Guarded()
    elsewhere.__enter__()
    thread = threading.Thread(target=elsewhere.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    Guarded().__enter__()
    with Guarded():
        pass
    assert signal.getsignal(signal.SIGINT) is before
