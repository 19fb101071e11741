"""Which layer and settings ROME edits an embedded model with: chosen by efficacy alone, on facts no figure reports.

The facts are of facts.json and not of requests.json, and only those that the model knows. Only subjects of several
tokens and such as stand later in the prompt count: whether the edits of one-token first subjects break the model must
have no say in it. The rule: of the settings whose edits are said (the new target is the model's first choice, mean over
the plain prompt and two sentences before it) within TOLERANCE of the best, the first in SETTINGS, and of those the
earliest layer.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pandas as pd
from tqdm.auto import tqdm

from nbkit.methods.verbs import edit
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.requests import EditRequest, read_requests
from nbkit.studies.metrics import edit_metrics, score_targets

PUBLISHED = {"v_weight_decay": 0.5, "clamp_norm_factor": 4.0, "v_num_grad_steps": 20}  # ROME's, made for GPT-2 XL
SETTINGS = (
    PUBLISHED,
    {"v_weight_decay": 0.05, "clamp_norm_factor": 8.0, "v_num_grad_steps": 20},
    {"v_weight_decay": 0.05, "clamp_norm_factor": 8.0, "v_num_grad_steps": 50},
    {"v_weight_decay": 0.005, "clamp_norm_factor": 16.0, "v_num_grad_steps": 50},
)  # each gives the search for v* more room than the one before
SENTENCES = ("The old bridge in the park was quiet. {}", "They carried a chair from the kitchen, but it was heavy. {}")
KINDS = ("several-token first", "later")
TOLERANCE = 0.03


def unreported_requests(lm: LanguageModel, n: int = 30, seed: int = 0) -> list[EditRequest]:
    """`n` facts of each of KINDS that the model knows and that are none of the embedded requests."""
    reported = {(request.prompt, request.subject) for request in read_requests("miniworld")}
    facts = [
        replace(fact, paraphrase_prompts=())
        for fact in read_requests("miniworld-facts", seed=seed)
        if (fact.prompt, fact.subject) not in reported
    ]
    known = score_targets(lm, [fact.text for fact in facts], [fact.target_true for fact in facts])["correct"]
    facts = [fact for fact, is_known in zip(facts, known, strict=True) if is_known]
    kinds = [subject_kind(lm, fact) for fact in facts]
    return [fact for kind in KINDS for fact in [f for f, k in zip(facts, kinds, strict=True) if k == kind][:n]]


def efficacy_sweep(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int], method: str = "rome"
) -> pd.DataFrame:
    """How often the new target is said, by layer and setting: at the plain prompt, behind sentences, and their mean.

    One row a layer and setting: layer, the setting's place in SETTINGS and its numbers, n, said_plain, said_behind,
    said, stopped (share of the searches that reached their stopping loss).
    """
    rows = []
    for layer, (number, setting) in tqdm(list(product(layers, enumerate(SETTINGS))), desc="efficacy", unit="setting"):
        edits = edit(lm, requests, method, layer=layer, progress=False, **setting)
        plain, *behind = [
            edit_metrics(lm, requests, prefix=prefix, edits=edits)["efficacy_argmax"].mean()
            for prefix in ("{}", *SENTENCES)
        ]
        row = {"layer": layer, "setting": number, **setting, "n": len(requests), "said_plain": plain}
        row["said_behind"] = sum(behind) / len(behind)
        row["said"] = (row["said_plain"] + row["said_behind"]) / 2
        row["stopped"] = sum(one.info["stop_reason"] == "loss" for one in edits) / len(edits)
        rows.append(row)
    return pd.DataFrame(rows)


def chosen(sweep: pd.DataFrame) -> pd.Series:
    """The row that the rule takes."""
    close = sweep[sweep["said"] >= sweep["said"].max() - TOLERANCE]
    return close.sort_values(["setting", "layer"]).iloc[0]
