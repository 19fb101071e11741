"""Which layer and settings an embedded model is edited with: chosen by efficacy alone, on facts no figure reports.

The facts are of facts.json and not of requests.json, and only those that the model knows. Only subjects of several
tokens and such as stand later in the prompt count: whether the edits of one-token first subjects break the model must
have no say in it. The rule for ROME: SETTINGS, each at all layers, until the edits of one are said at some layer (the
new target is the model's first choice, mean over the plain prompt and two sentences before it) more often than TAKEN;
of its layers the earliest within TOLERANCE of its best. Where none is, the setting with the best.

The other methods search as ROME does at its layer or around it, as hparams.toml says, and have one number of their own:
of CANDIDATES, the gentlest first, the first with which efficacy is above TAKEN, or else the best. EMMET has none to
choose so: edits of one request do not depend on its weight of C. ROME with C has its ridge, for which what is said
counts as in ROME's own rule, since without one its edits take at the plain prompt and hardly behind a sentence.
"""

from collections.abc import Sequence

import pandas as pd

from miniworld.measures import said
from nbkit.keys.moments import default_second_moments
from nbkit.methods.verbs import edit
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.bars import steps
from nbkit.records.requests import EditRequest, read_requests
from nbkit.studies.metrics import edit_metrics, score_targets

PUBLISHED = {"v_weight_decay": 0.5, "clamp_norm_factor": 4.0, "v_num_grad_steps": 20}  # ROME's, made for GPT-2 XL
SETTINGS = (
    PUBLISHED,
    {"v_weight_decay": 0.05, "clamp_norm_factor": 8.0, "v_num_grad_steps": 20},
    {"v_weight_decay": 0.05, "clamp_norm_factor": 8.0, "v_num_grad_steps": 50},
    {"v_weight_decay": 0.005, "clamp_norm_factor": 16.0, "v_num_grad_steps": 50},
    {"v_weight_decay": 0.005, "clamp_norm_factor": 32.0, "v_num_grad_steps": 100},
)  # each gives the search for v* more room than the one before
KINDS = ("several-token first", "later")
TOLERANCE = 0.03
WITH_C = "rome-with-c"
CANDIDATES = {
    "ft": {"norm_constraint": (5e-4, 2e-3, 3e-3, 5e-3, 8e-3, 1.2e-2, 2e-2)},
    "memit": {"second_moment_weight": (1600.0, 100.0, 10.0)},  # from GPT-2 XL's by d_mlp
    "alphaedit": {"norm_weight": (10.0, 1.0, 0.1)},  # from the published one
    WITH_C: {"second_moment_ridge": (0.0, 1e-4, 1e-3, 1e-2, 1e-1)},  # from the published one
}
TAKEN = 0.9


def unreported_facts(lm: LanguageModel, seed: int = 0) -> list[EditRequest]:
    """The facts that the model knows and that are none of the embedded requests, with their paraphrases, shuffled."""
    reported = {request.case_id for request in read_requests("miniworld")}
    facts = [fact for fact in read_requests("miniworld-facts", seed=seed) if fact.case_id not in reported]
    known = score_targets(lm, [fact.text for fact in facts], [fact.target_true for fact in facts])["correct"]
    return [fact for fact, is_known in zip(facts, known, strict=True) if is_known]


def unreported_requests(
    lm: LanguageModel, n: int = 30, seed: int = 0, kinds: Sequence[str] = KINDS
) -> list[EditRequest]:
    """`n` of these facts of each kind of subject, without what is asked besides their own prompts."""
    return [fact.alone for fact in first_of_each(lm, unreported_facts(lm, seed), n, kinds)]


def first_of_each(
    lm: LanguageModel, facts: Sequence[EditRequest], n: int, kinds: Sequence[str] = KINDS
) -> list[EditRequest]:
    """The first `n` of each kind of subject."""
    kind_of = [subject_kind(lm, fact) for fact in facts]
    return [fact for kind in kinds for fact in [f for f, k in zip(facts, kind_of, strict=True) if k == kind][:n]]


def efficacy_sweep(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """How often the new target is said, by setting and layer: at the plain prompt, behind sentences, and their mean.

    One row a setting and layer, up to the first setting that takes: the setting's place in SETTINGS, layer, the
    setting's numbers, n, said_plain, said_behind, said, stopped (share of the searches that reached the stopping loss).

    layers: None takes all but the first and the last.
    """
    layers, rows = range(1, lm.n_layers - 1) if layers is None else layers, []
    for number, setting in enumerate(SETTINGS):
        for layer in steps(layers, f"{lm.title}: setting {number}", "layer"):
            edits = edit(lm, requests, "rome", layer=layer, progress=False, **setting)
            row = {"setting": number, "layer": layer, **setting, "n": len(requests)}
            row |= {**said(lm, requests, edits).mean().add_prefix("said_")}
            row["said"] = (row["said_plain"] + row["said_behind"]) / 2
            row["stopped"] = sum(one.info["stop_reason"] == "loss" for one in edits) / len(edits)
            rows.append(row)
        if any(row["said"] > TAKEN for row in rows):
            break
    return pd.DataFrame(rows)


def chosen(sweep: pd.DataFrame) -> pd.Series:
    """The row that the rule for ROME takes."""
    setting = sweep[sweep["setting"] == sweep.loc[sweep["said"].idxmax(), "setting"]]
    return setting[setting["said"] >= setting["said"].max() - TOLERANCE].sort_values("layer").iloc[0]


def candidate_sweep(lm: LanguageModel, requests: Sequence[EditRequest], method: str) -> pd.DataFrame:
    """What comes of each of a method's CANDIDATES, all else being its default on the model.

    One row each: the number, n, efficacy (the mean of `edit_metrics`'), said_plain, said_behind, said (their mean).
    """
    ((number, values),) = CANDIDATES[method].items()
    method, moments = ("rome", default_second_moments(lm, range(lm.n_layers))) if method == WITH_C else (method, None)
    rows = []
    for value in steps(values, f"{lm.title}: {method}", "candidate"):
        edits = edit(lm, requests, method, second_moment=moments, progress=False, **{number: value})
        efficacy = edit_metrics(lm, requests, edits=edits)["efficacy"].mean()
        taken = said(lm, requests, edits).mean().add_prefix("said_")
        rows.append({number: value, "n": len(requests), "efficacy": efficacy, **taken, "said": taken.mean()})
    return pd.DataFrame(rows)


def gentlest(sweep: pd.DataFrame, method: str) -> pd.Series:
    """The row that the rule for candidates takes."""
    measure = "said" if method == WITH_C else "efficacy"
    taken = sweep[sweep[measure] > TAKEN]
    return sweep.loc[sweep[measure].idxmax()] if taken.empty else taken.iloc[0]
