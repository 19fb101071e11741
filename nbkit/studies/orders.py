"""The orders of a study of sequences: their rows edit by edit, and a state of each, from which a longer or an
interrupted one goes on.

A unit is one edit, `unit_of(seed, n_edits)`, 0 being the model before any; what is measured after a last edit where no
checkpoint is, is another, `end_of(seed, n_edits)`. Edits may carry several requests each, by which n_edits counts; what
is left for the last is then such an end too, and no part of a longer order, which edits those requests together with
the ones that follow.

Units are handed over in segments: those from one stored state to the next, so that rows are stored before the state
behind them. An order has one state file, replaced by its next and kept when the order is done; none is of what lies
behind an edit with fewer requests than the others. To delete it costs no rows: a longer order is then edited from its
start, while rows that are stored are neither measured nor stored again. So is a shorter one whose last measurements are
not there.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nbkit.errors import RequestError, ResultsError
from nbkit.methods.sequence_state import SequenceState, load_state, save_state
from nbkit.methods.verbs import Step, edit_sequence
from nbkit.models.prompts import request_columns
from nbkit.records.bounds import check_number
from nbkit.records.requests import EditRequest
from nbkit.records.results import Study
from nbkit.studies import metrics as measure
from nbkit.studies.in_sequence import InSequence
from nbkit.studies.method_study import MethodStudy, described, outcome_columns

STATE_SECONDS = 10.0  # what a killed sequence loses at most, beside the edit that it was at
STATE_SHARE = 0.05  # of the time may go into storing states: large ones are stored more rarely
STATE_BYTES = 8 * 2**30  # one that is larger is not stored

Segment = list[tuple[str, list[dict[str, Any]]]]


def unit_of(seed: int, n_edits: int) -> str:
    return f"{seed} {n_edits}"


def end_of(seed: int, n_edits: int) -> str:
    return f"{seed} {n_edits} end"


def in_order(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """All requests in the order of a seed, however many of them are edited: the shorter sequence begins the longer."""
    return [requests[place] for place in np.random.default_rng(seed).permutation(len(requests))]


def checked_n_edits(n_edits: int | None, requests: Sequence[EditRequest]) -> int:
    """How many of the requests are edited, None for all; RequestError for more than there are."""
    n_edits = len(requests) if n_edits is None else n_edits
    check_number("n_edits", n_edits, whole=True, least=1)
    if n_edits > len(requests):
        raise RequestError(f"n_edits is {n_edits}, and there are {len(requests)} requests to edit")
    return n_edits


@dataclass
class Orders:
    """What the orders of one study share. n_edits: how many requests each is to edit, `per_step` by each edit."""

    setting: MethodStudy
    study: Study
    measuring: InSequence
    requests: Sequence[EditRequest]
    n_edits: int
    evaluate_every: int
    per_step: int = 1

    def units(self, seed: int) -> list[str]:
        """Of one order, as many for each."""
        whole = self.n_edits % self.per_step == 0 and self.checkpoint(self.n_edits)
        last = [] if whole else [end_of(seed, self.n_edits)]
        return [*(unit_of(seed, n) for n in range(0, self.n_edits + 1, self.per_step)), *last]

    def checkpoint(self, n_edits: int) -> bool:
        """Whether an edit of as many requests as the others reached another multiple of `evaluate_every`."""
        return n_edits // self.evaluate_every > (n_edits - self.per_step) // self.evaluate_every

    def segments(self, asked: Sequence[str]) -> Iterator[Segment]:
        """The units of one order that are asked for, none of which is stored, with the row of each."""
        seed, first = (int(part) for part in asked[0].split()[:2])  # they are asked for in order
        wanted = set(asked)
        order = in_order(self.requests, seed)[: self.n_edits]
        path, name = self.study.folder / "states" / f"{seed}.safetensors", f"{self.study.folder.name}, order {seed}"
        stored = load_state(path, name) if path.exists() else SequenceState(0, {})
        start = stored if stored.n_steps * self.per_step < first else SequenceState(0, {})
        self.measuring.compare_with(order)
        segment: Segment = [(unit, [self.unedited(seed)]) for unit in asked[:1] if first == 0]
        right_after: list[dict[str, float]] = []  # of each request
        for n in range(self.per_step, start.n_steps * self.per_step + 1, self.per_step):
            right_after += [self.stored_last(seed, n)] * self.per_step
        saved, took = time.monotonic(), 0.0
        # Closed by hand: a traceback kept by a notebook would keep the generator, and the edits in the weights, alive.
        arguments = {"per_step": self.per_step, "start": start, **self.setting.arguments}
        with closing(edit_sequence(self.setting.lm, order, **arguments)) as steps:
            for step in steps:
                n = step.index * self.per_step + len(step.requests)
                last = self.stored_last(seed, n) if self.study.done(unit_of(seed, n)) else self.last(step.requests)
                right_after += [last] * len(step.requests)
                for unit, at_end in ((unit_of(seed, n), False), (end_of(seed, n), True)):
                    if unit in wanted:
                        row = {"seed": seed, **self.row(step, order[:n], right_after, at_end)}
                        segment.append((unit, [row]))
                due = time.monotonic() - saved > max(STATE_SECONDS, took / STATE_SHARE)
                whole, next_n = n % self.per_step == 0, n + self.per_step
                if whole and n > stored.n_steps * self.per_step and (due or next_n > len(order)):
                    yield segment
                    segment, began = [], time.monotonic()
                    store_state(step, path, name)
                    saved, took = time.monotonic(), time.monotonic() - began
        if segment:
            yield segment

    def unedited(self, seed: int) -> dict[str, Any]:
        perplexity = self.setting.readable(measure.perplexity(self.setting.lm, self.measuring.texts))
        row = {"seed": seed, "n_edits": 0, "checkpoint": True, "perplexity": perplexity}
        return row | self.measuring.drifted() | self.measuring.scored_unedited

    def last(self, requests: Sequence[EditRequest]) -> dict[str, float]:
        return self.measuring.of_edits(requests).mean().to_dict()

    def stored_last(self, seed: int, n: int) -> dict[str, float]:
        """What was measured right after an edit whose row is stored."""
        (row,) = self.study.frame([unit_of(seed, n)]).to_dict("records")
        return {name.removesuffix("_last"): value for name, value in row.items() if name.endswith("_last")}

    def row(
        self, step: Step, edited: Sequence[EditRequest], right_after: Sequence[dict[str, float]], at_end: bool
    ) -> dict[str, Any]:
        checkpoint = at_end or self.checkpoint(len(edited))
        last, means = right_after[-1], pd.DataFrame(right_after).mean().to_dict()
        row = {"n_edits": len(edited), "checkpoint": checkpoint}
        about = described(self.setting.lm, step.request) if self.per_step == 1 else self.described_together(step)
        row |= {**about, **outcome_columns(step.edit)}
        row |= {f"{name}_last": value for name, value in last.items()}
        row |= {f"{name}_after": value for name, value in means.items()}
        row |= dict.fromkeys(["perplexity", *last], np.nan)
        return row | (self.measuring.of_model(edited, means) if checkpoint else {})

    def described_together(self, step: Step) -> dict[str, Any]:
        about = pd.DataFrame([request_columns(self.setting.lm, request) for request in step.requests])
        named = {name: ", ".join(about[name].dropna()) for name in ("case_id", "subject_kind")}
        return {**named, "n_requests": len(step.requests)}


def store_state(step: Step, path: Path, name: str) -> None:
    """The state behind a step, in place of the one before; a warning where it is too large. ResultsError if it cannot
    be written."""
    state = step.state()
    if state.n_bytes > STATE_BYTES:
        warnings.warn(
            f"{name}: its state takes {state.n_bytes / 2**30:.1f} GiB, above {STATE_BYTES / 2**30:.1f}, and is not "
            "stored; rows are, but what is interrupted, or made longer later, is edited anew from its start",
            stacklevel=2,
        )
        return
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{path.parent} cannot be made: {error}") from error
    save_state(state, path, name)
