"""What is measured: a model, requests and texts, and the work that every path does with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nbkit.edits.edit import Edit
from nbkit.edits.interrupts import Guarded, swapped
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError
from nbkit.methods.rome import RomeParameters
from nbkit.methods.values import edits_at_once, value_job
from nbkit.methods.verbs import edit, hyper_parameters
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import load
from nbkit.models.shapes import PRECISIONS, SHAPES, random_model
from nbkit.plain import metrics as plain_metrics
from nbkit.plain import rome as plain_rome
from nbkit.records.requests import EditRequest
from nbkit.studies import metrics
from nbkit.studies.risk import collapse_risk


@dataclass(frozen=True)
class Workload:
    """A model, the requests it is edited with (taken in turn, from the first again when there are too few), and texts.

    hparams: of ROME, as in `nbkit.edit`. No second moment is used.
    """

    lm: LanguageModel
    requests: Sequence[EditRequest]
    context_templates: Sequence[str]
    texts: Sequence[str] = ()
    hparams: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> RomeParameters:
        """The hyper-parameters that edits are made with, defaults included."""
        return hyper_parameters(self.lm, "rome", **self.hparams)

    def some(self, start: int, n: int) -> list[EditRequest]:
        """n requests from number `start` on."""
        return [self.requests[place % len(self.requests)] for place in range(start, start + n)]

    def edit(self, requests: Sequence[EditRequest]) -> list[Edit]:
        return edit(self.lm, requests, "rome", self.context_templates, progress=False, **self.hparams)

    def evaluate(self, requests: Sequence[EditRequest], edits: Sequence[Edit]) -> tuple[np.ndarray, pd.DataFrame]:
        """Perplexity of each edited model, and the metrics of each edit."""
        reference = metrics.neighborhood_tokens(self.lm, requests)
        perplexities = metrics.perplexity(self.lm, self.texts, edits=edits, progress=False)
        return perplexities, metrics.edit_metrics(self.lm, requests, reference, edits=edits, progress=False)

    def screen(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        p = self.parameters
        arguments = {"context_templates": self.context_templates, "key_mode": p.key_mode, "progress": False}
        return collapse_risk(self.lm, requests, p.layer, **arguments)

    def edit_plainly(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """The same as `edit`, one request after the other: see plain/rome.py."""
        p, edits = self.parameters, []
        options = {
            "lr": p.v_lr, "steps": p.v_num_grad_steps, "weight_decay": p.v_weight_decay,
            "clamp": p.clamp_norm_factor, "kl_factor": p.kl_factor, "early_stop": p.early_stop_loss,
        }  # fmt: skip
        for request in requests:
            made = plain_rome.rome(self.lm, request, p.layer, self.context_templates, p.key_mode, **options)
            deltas = {self.lm.weight_name(p.layer): Dense(made["delta_W"])}
            edits.append(Edit(deltas, (request,), "rome", info={"losses": made["losses"]}))
        return edits

    def evaluate_plainly(
        self, requests: Sequence[EditRequest], edits: Sequence[Edit]
    ) -> tuple[list[float], list[dict[str, float]]]:
        """The same as `evaluate`, edit by edit and text by text: see plain/metrics.py."""
        parts, perplexities, rows = (self.lm.model, self.lm.tokenizer), [], []
        for request, made in zip(requests, edits, strict=True):
            reference = plain_metrics.neighborhood_tokens(*parts, request)
            with applied(self.lm, made):
                perplexities.append(plain_metrics.perplexity(*parts, list(self.texts)))
                rows.append(plain_metrics.edit_metrics(*parts, request, reference))
        return perplexities, rows


def workload(
    name: str,
    requests: Sequence[EditRequest],
    context_templates: Sequence[str],
    texts: Sequence[str] = (),
    device: str = "auto",
    precision: str = "float32",
) -> Workload:
    """That of a shape with random weights, or of a model by any name that `nbkit.load` takes, at the layer it has.

    "NAME@LAYER" takes another layer. A random model's loss says nothing, so in a shape no search for v* stops early:
    each takes all of its steps.
    """
    whole, (name, _, layer) = name, name.partition("@")
    if name in SHAPES:
        lm = random_model(name, device, precision)
        hparams = {"layer": SHAPES[name].layer, "early_stop_loss": 0.0}
    else:
        lm, hparams = load(name, device, PRECISIONS[precision][0]), {}
    if layer:
        if not layer.isdecimal():
            raise MethodError(f"{whole!r}: behind the @ stands the number of a layer, not {layer!r}")
        lm.name, hparams = whole, {**hparams, "layer": int(layer)}
    return Workload(lm, requests, context_templates, texts, hparams)


def whole_passes(lm: LanguageModel) -> Guarded:
    """Within this `with`, the model is taken for one that cannot be replayed: all layers on all tokens."""
    return swapped(lm, "replayable", False)


def edits_in_a_batch(work: Workload, n: int) -> int:
    """How many of n edits asked for together share a batch, unless memory runs out: the others come after them."""
    jobs = [value_job(work.lm, request, work.context_templates) for request in work.some(0, n)]
    return min(n, max(1, edits_at_once(work.lm, jobs, work.parameters.layer)))
