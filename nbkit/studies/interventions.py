"""What makes an edit of ROME collapse the model: edits computed with one thing changed at a time.

    hard, normal = hard_and_normal(lm, requests, texts, n_hard=10, n_normal=10)
    sentence = "The door was open. "
    frame = intervened_edits(lm, hard + normal, texts, standard_interventions(lm, sentence, position=8))
    layers = first_tokens_by_layer(lm, hard + normal, range(lm.n_layers), sentence)

The change is there while keys and v* are computed, and gone when the edited model is measured; what the change itself
does to the unedited model's perplexity stands beside that. Where only the formula has other keys, v* is ROME's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError, RequestError
from nbkit.keys.extract import in_contexts, keys, later_keys
from nbkit.methods.values import KL_PROMPT
from nbkit.methods.verbs import as_templates
from nbkit.models.interventions import (
    Intervention,
    at_first_token,
    first_hidden,
    first_position_as,
    in_front,
    shifted_by,
    subject_alone,
)
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import request_columns
from nbkit.records.bars import bar, steps
from nbkit.records.bounds import check_number
from nbkit.records.collapse import outcomes
from nbkit.records.lists import as_requests, as_texts
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies.method_study import MethodStudy, by_digest, described, outcome_columns
from nbkit.studies.single import single_edits

ROME, C_ROME = "ROME as it is", "C-ROME"
KEYS = {  # what stands for k in the denominator and in the numerator, where nothing else is changed
    ROME: ("plain", "plain"),
    C_ROME: ("mean", "mean"),
    "k̄ in the denominator only": ("mean", "plain"),
    "k̄ in the numerator only": ("plain", "mean"),
    "key of the same token later": ("later", "later"),
}
EDITS_AT_ONCE = 32


def standard_interventions(lm: LanguageModel, sentence: str, position: int) -> list[Intervention]:
    """What is changed one at a time on this model, besides the keys of the formula.

    sentence: put before the prompt, with the space or line break that follows it. position: what position 0 is embedded
    as, where positions are learned; else by how much all positions are shifted.
    """
    end, learned = lm.tokenizer.eos_token or lm.tokenizer.bos_token, lm.architecture.learned_positions
    return [
        in_front(sentence, "sentence in front"),
        *([in_front(end, "end-of-text token in front")] if end else []),
        in_front("\n", "line break in front"),
        at_first_token(),
        first_position_as(position) if learned else shifted_by(position),
        first_hidden(),
        subject_alone(),
    ]


@verb
def hard_and_normal(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    n_hard: int,
    n_normal: int,
    ratio: float = 10.0,
    store: Store | None = None,
    **arguments,
) -> tuple[list[EditRequest], list[EditRequest]]:
    """The first requests whose edit by ROME raises perplexity `ratio` times or more, and the first others; so many.

    Requests are edited in order, as `single_edits` does with these arguments, until there are enough of both; fewer
    come back where the list has not as many, RequestError where it has none of either. Nothing but perplexity is looked
    at.
    """
    for name, number in (("n_hard", n_hard), ("n_normal", n_normal)):
        check_number(name, number, whole=True, least=1)
    requests = as_requests(requests)
    found: dict[str, list[EditRequest]] = {"collapse": [], "normal": []}
    for start in range(0, len(requests), n_hard):
        some = requests[start : start + n_hard]
        rows = single_edits(lm, some, texts, store=store, **arguments)
        for request, outcome in zip(some, outcomes(rows, ratio), strict=True):
            found[outcome].append(request)
        if len(found["collapse"]) >= n_hard and len(found["normal"]) >= n_normal:
            break
    for outcome, of_kind in found.items():
        if not of_kind:
            raise RequestError(
                f"{lm.title}: of the edits of {len(requests)} requests none is a {outcome} one, to be compared with "
                f"the others; a collapse raises perplexity {ratio:g} times. Take more requests, or others"
            )
    return found["collapse"][:n_hard], found["normal"][:n_normal]


@verb
def intervened_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    interventions: Sequence[Intervention],
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
    **hparams,
) -> pd.DataFrame:
    """Every request edited by ROME as it is, with each of `KEYS` in the formula, and under each intervention.

    One row an intervention and request, in that order. Arguments as of `single_edits`, with ROME's hyper-parameters but
    key_mode, which is "mixed". The model is not changed.

    Columns: those of `single_edits` without paraphrases and neighbours, of which subject and subject_kind are those of
    the request as it was given; intervention (its name); changes ("keys", "request" or "passes");
    perplexity_intervened, of the unedited model under an intervention on passes (NaN for others); similarity, the
    cosine of k_u and k̄; efficacy_intervened and efficacy_argmax_intervened, as efficacy is, but asked as the edit was
    computed: of the rewritten prompt, or under the changed passes.

    RequestError for no requests, ModelError for an intervention that the model cannot have.
    """
    requests, texts = as_requests(requests), as_texts(texts)
    if not requests:
        raise RequestError("there is no request to edit")
    if hparams.get("key_mode", "mixed") != "mixed":
        raise MethodError(f"interventions are on ROME, whose key_mode is mixed, not {hparams['key_mode']}")
    setting = MethodStudy(lm, "rome", context_templates, second_moment, store, hparams)
    for each in interventions:
        each.during(lm)  # refuses before any work
    made: dict[EditRequest, Edit] = {}
    parts = [_Keys(setting, texts, made), *(_Changed(setting, texts, made, each) for each in interventions)]
    shown = steps(parts, f"{lm.title}: interventions", "intervention")
    return pd.concat([part.rows(requests) for part in shown], ignore_index=True)


class _Part(ABC):
    """Rows of one intervention, or of those that share their edits, each stored under its own key.

    made: edits by ROME as it is, which parts have computed for the others.
    """

    name: str
    arguments: Mapping

    def __init__(self, setting: MethodStudy, texts: Sequence[str], made: dict[EditRequest, Edit]):
        self.setting, self.lm, self.texts, self.made = setting, setting.lm, texts, made

    def rows(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        study = self.setting.study("interventions", {"texts": self.texts}, intervention=dict(self.arguments))
        setting, units = self.setting, by_digest(requests)
        _ = setting.arguments, setting.unseen_prefixes  # of the model with nothing changed
        self.before = None

        def compute(some: Sequence[str]) -> Iterator[list[tuple[str, list[dict]]]]:
            if self.before is None:
                self.before = setting.readable(measure.perplexity(self.lm, self.texts))
            rows = self.measured([units[unit] for unit in some])
            yield [(unit, list(of_unit)) for unit, of_unit in zip(some, rows, strict=True)]

        keys_of = [digest(request) for request in requests]
        frame = study.complete_together(keys_of, compute, EDITS_AT_ONCE, setting.task(self.name), "edit")
        order = frame["intervention"].map({name: at for at, name in enumerate(dict.fromkeys(frame["intervention"]))})
        return frame.iloc[order.argsort(kind="stable")]

    @abstractmethod
    def measured(self, requests: Sequence[EditRequest]) -> list[list[dict]]:
        """The rows of each request."""

    def plain_edits(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """By ROME as it is; those that are there are not computed again."""
        missing = [request for request in dict.fromkeys(requests) if request not in self.made]
        self.made.update(zip(missing, self.setting.edits(missing) if missing else (), strict=True))
        return [self.made[request] for request in requests]

    def described(self, name: str, changes: str, requests: Sequence[EditRequest], made: Sequence[Edit]) -> list[dict]:
        """One row a request: what its edit did to the model with nothing changed."""
        alone = [request.alone for request in requests]
        metrics = self.setting.metrics_of_each(alone, made, {request: [] for request in alone})
        after = measure.perplexity(self.lm, self.texts, edits=made)
        rows = []
        for request, edit, value, row in zip(requests, made, after, metrics, strict=True):
            similarity = torch.cosine_similarity(edit.info["key_plain"], edit.info["key_mean"], dim=0)
            about = {"intervention": name, "changes": changes, **described(self.lm, request)}
            about |= {"perplexity": value, "perplexity_before": self.before, "similarity": float(similarity)}
            about |= {key: value for key, value in outcome_columns(edit).items() if key != "subject_kind"}
            rows.append({**about, **{key: row[key] for key in row if not key.startswith(_LEFT_OUT)}})
        return rows


_LEFT_OUT = ("paraphrase", "neighborhood", "generalization", "locality")


class _Keys(_Part):
    """ROME as it is, and with other keys in its formula."""

    name, arguments = "keys of the formula", {"keys": {name: list(of) for name, of in KEYS.items()}}

    def measured(self, requests: Sequence[EditRequest]) -> list[list[dict]]:
        plain = self.plain_edits(requests)
        later = later_keys(self.lm, requests, plain[0].info["layer"], self.setting.arguments["context_templates"])
        by_name = []
        for name, (below, above) in KEYS.items():
            made = []
            for edit, key in zip(plain, later, strict=True):
                known = {"plain": edit.info["key_plain"], "mean": edit.info["key_mean"], "later": key}
                made.append(edit if name == ROME else with_keys(self.lm, edit, known[below], known[above]))
            rows = self.described(name, "keys", requests, made)
            nan = float("nan")
            for row in rows:
                row |= {"perplexity_intervened": nan, "efficacy_intervened": row["efficacy"],
                        "efficacy_argmax_intervened": row["efficacy_argmax"]}  # fmt: skip
            by_name.append(rows)
        return [list(rows) for rows in zip(*by_name, strict=True)]


class _Changed(_Part):
    """Edits computed under one intervention."""

    def __init__(self, setting: MethodStudy, texts: Sequence[str], made: dict, intervention: Intervention):
        super().__init__(setting, texts, made)
        self.intervention, self.name = intervention, intervention.name
        self.arguments = {"name": self.name, **intervention.arguments}
        self.unedited: float | None = None

    def measured(self, requests: Sequence[EditRequest]) -> list[list[dict]]:
        lm, one, on_passes = self.lm, self.intervention, self.intervention.passes is not None
        asked = [one.rewritten(lm, request) for request in requests]
        templates = self.setting.arguments["context_templates"]
        read = [[*in_contexts(request, templates), KL_PROMPT] for request in asked]
        subjects = [request.subject for request, prompts in zip(asked, read, strict=True) for _ in prompts]
        with ExitStack() as stack:
            stack.enter_context(one.during(lm, sum(read, []), subjects))
            if self.unedited is None:
                self.unedited = measure.perplexity(lm, self.texts) if on_passes else float("nan")
            made = self.setting.edits(asked) if on_passes else self.plain_edits(asked)
            inside = measure.edit_metrics(lm, [request.alone for request in asked], edits=made)
        rows = self.described(self.name, "passes" if on_passes else "request", requests, made)
        for row, (_, said) in zip(rows, inside.iterrows(), strict=True):
            row |= {f"{name}_intervened": said[name] for name in ("efficacy", "efficacy_argmax")}
            row["perplexity_intervened"] = self.unedited
        return [[row] for row in rows]


@verb
def with_keys(lm: LanguageModel, edit: Edit, below: Float[Tensor, " d_mlp"], above: Float[Tensor, " d_mlp"]) -> Edit:
    """ROME's edit with other keys in its formula: (v* - W k_above - b) uᵀ / (k_below · u), v* and u as they are.

    edit: of `nbkit.edit` by ROME, on CPU or not; nothing is changed. Its info has the numbers of the new update.
    """
    info, (name,) = edit.info, edit.deltas
    weight = lm.oriented(name).detach().cpu().double()
    u, plain = info["u"].double(), info["key_plain"].double()
    value = info["value_now"].double() + weight @ (above.double() - plain)  # W k_above + b
    residual, divisor = info["value_star"].double() - value, below.double() @ u
    dtype = edit.deltas[name].dtype
    delta = LowRank(left=(residual / divisor)[:, None].to(dtype), right=u[None].to(dtype)).to(edit.deltas[name].device)
    numerator, denominator = float(residual.norm()), float(divisor.abs())
    numbers = {"numerator": numerator, "denominator": denominator, "signed_denominator": float(divisor)}
    numbers |= {"update_norm": numerator / denominator, "value_now": value.to(info["value_now"].dtype)}
    return replace(edit, deltas={name: delta}, info={**info, **numbers})


@verb
def first_tokens_by_layer(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    sentence: str,
    context_templates: Sequence[str] | None = None,
) -> pd.DataFrame:
    """What ROME's denominator would be at a prompt's first token, at its subject, and at the subject behind a sentence.

    In each of these places the token is taken for the subject's last: k_u is its key in the prompt, k̄ the mean over the
    context templates, u along k̄ (so without C). The model is not changed.

    Columns: those of `request_columns`, layer, place ("subject", "first token", "behind a sentence"), token (the text
    taken for the subject: the keys of first tokens that are the same are the same too), signed_denominator k_u·u,
    similarity (the cosine of k_u and k̄).
    """
    requests = as_requests(requests)
    places = {"subject": Intervention("as it is"), "first token": at_first_token(),
              "behind a sentence": in_front(sentence, "sentence")}  # fmt: skip
    templates = as_templates(lm, context_templates)
    rows = []
    with bar(len(places) * len(layers), f"{lm.title}: keys by layer", "layer") as shown:
        for place, one in places.items():
            asked = [one.rewritten(lm, request) for request in requests]
            for layer in layers:
                every = keys(lm, asked, layer, templates, progress=False).double()
                plain, mean = every[:, 0], every.mean(1)
                along = (plain * mean).sum(-1) / mean.norm(dim=-1)
                numbers = zip(along.tolist(), plain.norm(dim=-1).tolist(), strict=True)
                for request, taken, (divisor, norm) in zip(requests, asked, numbers, strict=True):
                    about = {**request_columns(lm, request), "layer": layer, "place": place, "token": taken.subject}
                    rows.append({**about, "signed_denominator": divisor, "similarity": divisor / norm})
                shown.update(1)
    return pd.DataFrame(rows)
