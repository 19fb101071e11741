"""All there is to see of one edit: what it was to change, what it did change, and how it was made.

    outcome = one_edit(lm, request, texts, method="rome", key_mode="mixed")
    outcome.answers, outcome.said, outcome.perplexity, outcome.weights, outcome.edit.info

The model is left as it was. What it carries by `lm.apply` stays, and is then what "before" means.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied, unedited
from nbkit.edits.regularisers import regularise
from nbkit.edits.updates import Dense
from nbkit.keys.felt import projections
from nbkit.keys.moments import second_moments
from nbkit.methods.verbs import SecondMomentLike, as_templates
from nbkit.methods.verbs import edit as edits_of
from nbkit.models.generation import generated
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import encode, target_ids, tokenize, unseen_templates
from nbkit.records.collapse import outcomes, ratios
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity, score_targets

N_LIKELIEST = 5  # next tokens before, and as many after
N_STEPS = 4  # how often `one_edit` says how far it is
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """One edit and what it did.

    answers: one row a prompt: role ("prompt", "behind an unseen prefix", "paraphrase", "neighbour"), prompt, answer
        (the new target, or the neighbour's own), and before and after the edit: probability of the whole answer, rank
        of its first token among all (1: the likeliest; NaN where the model gives no numbers), says (the likeliest
        token).
    next_tokens: token, of_target, before, after: the likeliest next tokens at the prompt, before or after the edit, and
        the new target's first, of_target.
    said: one row a prompt: prompt, before, after: what the model goes on with by itself, greedily.
    metrics: one row of `edit_metrics` before, one after.
    perplexity: of the held-out texts: unedited (without any edit), before, after.
    weights: one row a weight: weight, norm ‖ΔW‖_F, of_weight ‖W‖_F, felt √E‖ΔW k‖², of_output √E‖W k‖², both over the
        keys of the held-out texts in the unedited model; NaN for a weight that is no MLP projection.
    seconds: that the edit itself took.
    """

    request: EditRequest
    edit: Edit
    answers: pd.DataFrame
    next_tokens: pd.DataFrame
    said: pd.DataFrame
    metrics: pd.DataFrame
    perplexity: Mapping[str, float]
    weights: pd.DataFrame
    n_before: int
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times perplexity is what it was before; infinite where it is infinite or NaN."""
        return float(ratios(self._perplexities).iloc[0])

    def collapsed(self, ratio: float = 10.0) -> bool:
        """Whether perplexity is so many times what it was before, or is no number."""
        return outcomes(self._perplexities, ratio).iloc[0] == "collapse"

    @property
    def _perplexities(self) -> pd.DataFrame:
        return pd.DataFrame([{"perplexity": self.perplexity["after"], "perplexity_before": self.perplexity["before"]}])


@verb
def one_edit(
    lm: LanguageModel,
    request: EditRequest,
    texts: Sequence[str],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    regulariser: str | None = None,
    regulariser_arguments: Mapping[str, Any] | None = None,
    max_tokens: int = 20,
    end: str | None = None,
    step: Step | None = None,
    **hparams: Any,
) -> Outcome:
    """The edit of one request, and all that `Outcome` has.

    Args:
        texts: held-out ones, for perplexity and for what ordinary keys feel of the update.
        regulariser, regulariser_arguments: of `nbkit.regularise`, applied to the edit before it is looked at.
        max_tokens, end: of `generated`; fewer where the context has no room for so many.
        step: called with how many of `N_STEPS` parts are done; what it raises ends the work.

    The others as in `nbkit.edit`. The model is not changed.
    """
    tell = step or (lambda n_done, n_total: None)
    templates = as_templates(lm, context_templates, method)
    tell(0, N_STEPS)
    began = time.perf_counter()
    edit = edits_of(lm, [request], method, templates, second_moment, progress=False, **hparams)[0]
    if regulariser is not None:
        edit = regularise(edit, lm, regulariser, **(regulariser_arguments or {}))
    seconds = time.perf_counter() - began
    tell(1, N_STEPS)
    layers, carries = projections(lm, [edit]), lm.n_applied > 0
    with unedited(lm):
        unseen = unseen_templates(lm, templates)[:1]
        without = perplexity(lm, texts) if carries else None
        moments = second_moments(lm, list(layers.values()), texts)
    reference = neighborhood_tokens(lm, [request])
    asked = _asked(request, unseen)

    def looked_at() -> tuple[pd.DataFrame, np.ndarray, list[str], pd.DataFrame, float]:
        return (
            *_answers(lm, asked),
            _goes_on(lm, request, max_tokens, end),
            edit_metrics(lm, [request], reference),
            perplexity(lm, texts),
        )

    answers, likely, said, metrics, before = looked_at()
    tell(2, N_STEPS)
    with applied(lm, edit):
        answers_after, likely_after, said_after, metrics_after, after = looked_at()
    tell(3, N_STEPS)
    found = Outcome(
        request=request,
        edit=edit,
        answers=pd.concat([asked, answers.add_suffix("_before"), answers_after.add_suffix("_after")], axis=1),
        next_tokens=_next_tokens(lm, request, likely, likely_after),
        said=pd.DataFrame({"prompt": _opened(request), "before": said, "after": said_after}),
        metrics=pd.concat([metrics, metrics_after], ignore_index=True).set_axis(["before", "after"]),
        perplexity={"unedited": without if carries else before, "before": before, "after": after},
        weights=_weights(lm, edit, {name: moments[layer] for name, layer in layers.items()}),
        n_before=lm.n_applied,
        seconds=seconds,
    )
    tell(4, N_STEPS)
    return found


def _asked(request: EditRequest, unseen: Sequence[str]) -> pd.DataFrame:
    """What the model is asked: role, prompt, answer."""
    rows = [("prompt", request.text, request.target_new)]
    rows += [("behind an unseen prefix", one.replace("{}", request.text), request.target_new) for one in unseen]
    rows += [("paraphrase", prompt, request.target_new) for prompt in request.paraphrase_prompts]
    neighbours = zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True)
    rows += [("neighbour", prompt, answer) for prompt, answer in neighbours]
    return pd.DataFrame(rows, columns=["role", "prompt", "answer"])


@torch.no_grad()
def _answers(lm: LanguageModel, asked: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """probability, rank and says of each, and the probabilities of all next tokens at the first of them."""
    scores = score_targets(lm, asked["prompt"].tolist(), asked["answer"].tolist())
    logits = lm.logits(encode(lm, asked["prompt"].tolist(), "left"), keep=1)[:, -1].float().cpu()
    rows = []
    for probability, row, answer in zip(scores["probability"], logits, asked["answer"], strict=True):
        first, finite = row[target_ids(lm, answer)[0]], not row.isnan().any()
        rank = 1.0 + int((row > first).sum()) if finite else np.nan
        says = lm.tokenizer.decode([int(row.argmax())]) if finite else None
        rows.append({"probability": probability, "rank": rank, "says": says})
    return pd.DataFrame(rows), logits[0].softmax(-1).numpy()


def _next_tokens(lm: LanguageModel, request: EditRequest, before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    both = pd.DataFrame({"before": before, "after": after})
    likeliest = [token for when in both for token in both[when].nlargest(N_LIKELIEST).index]
    first = target_ids(lm, request.target_new)[0]
    both = both.loc[list(dict.fromkeys([first, *likeliest]))]
    both.insert(0, "token", [lm.tokenizer.decode([token]) for token in both.index])
    both.insert(1, "of_target", both.index == first)
    return both.sort_values("after", ascending=False, kind="stable", ignore_index=True)


def _opened(request: EditRequest) -> list[str]:
    return [request.text, *request.generation_prompts]


def _goes_on(lm: LanguageModel, request: EditRequest, max_tokens: int, end: str | None) -> list[str]:
    prompts = _opened(request)
    room = lm.max_length - max(map(len, tokenize(lm, prompts)))
    return [one.text for one in generated(lm, prompts, max(1, min(max_tokens, room)), end=end)]


def _weights(lm: LanguageModel, edit: Edit, moments: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """moments: of the keys of each weight that is an MLP projection, by its name."""
    rows = []
    for name, delta in edit.deltas.items():
        weight, felt, of_output = Dense(lm.oriented(name)), np.nan, np.nan
        if name in moments:
            felt, of_output = delta.to(lm.device).felt_norm(moments[name]), weight.felt_norm(moments[name])
        row = {"weight": name, "norm": delta.norm(), "of_weight": weight.norm()}
        rows.append({**row, "felt": felt, "of_output": of_output})
    return pd.DataFrame(rows)
