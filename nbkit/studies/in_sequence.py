"""What is measured of a model while it is edited in sequence: of the edit just made, and at a checkpoint of all so far.

    measuring = InSequence(lm, texts, generated={"max_tokens": 8, "end": "\\n"})
    measuring.compare_with(requests)                     # before any of them is edited
    measuring.of_edits([request])                        # one row a request, on the model as it is
    measuring.of_model(requests, right_after)            # perplexity, means over all edits so far, forgetting, drift
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from nbkit.edits.overlays import unedited
from nbkit.keys.drift import drift, drifted_layers
from nbkit.keys.moments import default_second_moments
from nbkit.keys.solving import SecondMoments
from nbkit.models.generation import generated as generate
from nbkit.models.language_model import LanguageModel
from nbkit.records import embedded
from nbkit.records.bars import steps
from nbkit.records.requests import EditRequest
from nbkit.studies import metrics as measure
from nbkit.studies.generation import begins_with
from nbkit.studies.task_columns import Tasks

NO_TASKS = Tasks(None)
SAID = {"forgotten": "efficacy_argmax", "forgotten_generated": "efficacy_generated"}  # column -> of which metric


class InSequence:
    """Measures one model; what belongs to the unedited model is computed once.

    generated: arguments of `models.generation.generated`, None for none. text_moment: of ordinary text, which the
    drift is felt by; None: of the unedited model on its default text, where it brings one. tasks: that are scored.
    drift: whether it is measured.
    """

    def __init__(
        self,
        lm: LanguageModel,
        texts: Sequence[str],
        generated: Mapping[str, Any] | None = None,
        text_moment: SecondMoments | None = None,
        tasks: Tasks = NO_TASKS,
        drift: bool = True,
    ):
        self.lm, self.texts, self.generated, self.text_moment, self.tasks = lm, texts, generated, text_moment, tasks
        self.measures_drift = drift
        self.choices: dict[EditRequest, list[tuple[int, ...]]] = {}
        self.moments: dict[tuple[int, ...], SecondMoments] = {}

    def compare_with(self, requests: Sequence[EditRequest]) -> None:
        """What the model says of the requests' neighbours before they are edited; each asked for by itself, so that no
        number depends on which others are."""
        new = [request for request in dict.fromkeys(requests) if request not in self.choices]
        for request in steps(new, f"{self.lm.title}: neighbours", "request"):
            self.choices |= measure.neighborhood_tokens(self.lm, [request])

    def of_edits(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        """The edit metrics of each request on the model as it is, as decimal numbers."""
        frame = measure.edit_metrics(self.lm, requests, self.choices).drop(columns="case_id")
        if self.generated is not None:
            said = generate(self.lm, [request.text for request in requests], **self.generated, progress=False)
            told = [begins_with(one.text, request.target_new) for one, request in zip(said, requests, strict=True)]
            frame["efficacy_generated"] = np.array(told)
        return frame.astype(float)

    def of_model(
        self, requests: Sequence[EditRequest], right_after: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The columns of a checkpoint. requests: all so far; right_after: means of their metrics right after each, None
        where they are in one edit, of which nothing is forgotten."""
        means = self.of_edits(requests).mean().to_dict()
        row = {"perplexity": measure.perplexity(self.lm, self.texts), **means}
        if right_after is not None:
            row |= {name: right_after[metric] - means[metric] for name, metric in SAID.items() if metric in means}
        return row | self.drifted() | self.scored()

    def scored(self) -> dict[str, float]:
        return self.tasks.columns(self.lm)

    @cached_property
    def scored_unedited(self) -> dict[str, float]:
        """As `scored`, of the model that it is asked of first: before any edit, the same for all sequences."""
        return self.scored()

    def drifted(self) -> dict[str, float]:
        if not self.measures_drift:
            return {}
        found = drift(self.lm, self._text_moment())
        return {"drift": found.norm, "drift_felt": found.felt, "drift_felt_relative": found.felt_relative}

    def _text_moment(self) -> SecondMoments | None:
        layers = drifted_layers(self.lm)
        if self.text_moment is not None or not layers or self.lm.known_as not in embedded.MODELS:
            return self.text_moment
        if layers not in self.moments:
            with unedited(self.lm):
                moments = default_second_moments(self.lm, layers, who="the drift of a sequence")
            self.moments[layers] = SecondMoments(moments, self.lm)
        return self.moments[layers]
