"""Every method's settings on an embedded model, chosen by one rule, of equally many, on requests that nothing reports.

    table = tune(lm, ["ft", "rome"], budget=16, n=20)
    table[table["chosen"]]

The settings of a method are the default that the model has, and then draws from what search.toml says of the method: a
scrambled Halton sequence, the same for the same seed, whose first settings are those of a smaller budget. Each setting
edits the same facts, one by one (`IN_BATCHES`, which are only themselves in batches: `BATCH` at once), and four shares
are measured of it, by `SHARES`: of the edits with which the model says the new target, of the paraphrases after which
it does, of the neighbours' true answers that it still says, and of the edits that leave perplexity below `KEPT` times
what it was.

**The rule**, `choose`: the setting with the largest harmonic mean of the four shares; of equal ones that with the
smaller median of perplexity, then the earlier. Where no setting has all four shares above 0 the default stays. A
setting with which the method refuses to edit has no score, is never chosen, and is one of the budget.

The facts are none of the embedded requests, nor about a subject of one, nor those that `efficacy` and `damage` take;
the model knows them and their neighbours; and **no prompt that is edited or asked opens with a subject of one token**.
So whether edits of such subjects break the model has no say in it, neither for a setting nor against one; nor have
sequences. MEND is trained, not tuned: what its training took is `training_of_mend`.

Rows are stored as a study's, under `tuning`: what was measured before an interrupt is not measured again.
"""

import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from miniworld.card import filled, markdown
from miniworld.efficacy import KINDS, first_of_each, unreported_facts
from nbkit.edits.edit import Edit
from nbkit.errors import MethodError, RequestError
from nbkit.keys.moments import default_second_moments
from nbkit.keys.solving import SecondMoments
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.mend.weights_file import LOG_BESIDE, weights_path
from nbkit.methods.table import METHODS, method_named
from nbkit.methods.values import KL_PROMPT
from nbkit.methods.verbs import edit_batch
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.bars import steps
from nbkit.records.collapse import ratios
from nbkit.records.provenance import canonical, plain
from nbkit.records.requests import EditRequest, read_requests, read_texts
from nbkit.records.results import Store
from nbkit.studies.method_study import MethodStudy, described, outcome_columns
from nbkit.studies.metrics import edit_metrics, perplexity

SEARCH = Path(__file__).with_name("search.toml")
TRAINED = ("mend",)
IN_BATCHES = ("ultraedit", "locft-bf")
BATCH = 10
TUNED = tuple(method for method in METHODS if method not in TRAINED)
SHARES = ["efficacy_argmax", "paraphrase_argmax", "neighborhood_argmax", "perplexity_kept"]
COLUMNS = ["case_id", *SHARES[:3], "perplexity", "perplexity_before", "seconds", "refused"]  # that scores are made of
KEPT = 1.1
N_TEXTS = 50  # the last held-out ones; notebooks measure edits on the first
N_NEIGHBORS = 5  # at most, as the embedded requests have
TAKEN_ELSEWHERE = 30  # facts of each kind, from the first on, that cards and README may report
ALL_KINDS = ("one-token first", *KINDS)
DRAWN = 64  # points of the sequence for each setting: of a small space many are the same


def space_of(method: str) -> dict[str, Any]:
    """What search.toml says of a method; MethodError for one that it does not name, or that is trained."""
    method_named(method)
    if method in TRAINED:
        raise MethodError(f"{method} is trained and not tuned: its recipe is in nbkit/methods/mend/recipes.toml")
    spaces = tomllib.loads(SEARCH.read_text(encoding="utf-8"))
    if method not in spaces:
        raise MethodError(
            f"{SEARCH.name} has no table [{method}], so there is nothing to choose from: "
            "say there which hyper-parameters are tried, and which values of each"
        )
    return spaces[method]


def draws(lm: LanguageModel, method: str, budget: int, seed: int = 0) -> list[dict[str, Any]]:
    """`budget` different settings of a method, the model's default first; each names all that is tuned.

    MethodError for a space that has not so many, and for a hyper-parameter or value that the method cannot have.
    """
    space, default = space_of(method), hyper_parameters(lm, method)
    points = stats.qmc.Halton(len(space), rng=np.random.default_rng(seed)).random(DRAWN * budget)
    columns = [_values(values, at) for values, at in zip(space.values(), points.T, strict=True)]
    settings = [{name: plain(getattr(default, name, None)) for name in space}]
    settings += [dict(zip(space, values, strict=True)) for values in zip(*columns, strict=True)]
    settings = list({canonical(setting): setting for setting in settings}.values())[:budget]
    if len(settings) < budget:
        raise MethodError(
            f"of {method} there are {len(settings)} different settings in {SEARCH.name}, and the budget is {budget}: "
            "all methods get equally many, so lower it or say more values"
        )
    for setting in settings:
        hyper_parameters(lm, method, **setting)
    return settings


def _values(values: list | Mapping[str, float], at: Float[np.ndarray, " n"]) -> list:
    """The values of a list or a range that stand at places between 0 and 1; those of a range with two digits."""
    if isinstance(values, list):
        return [values[place] for place in (at * len(values)).astype(int)]
    return [float(f"{value:.2g}") for value in stats.loguniform.ppf(at, values["from"], values["to"])]


def held_out_requests(lm: LanguageModel, n: int = 20, seed: int = 0) -> list[EditRequest]:
    """`n` requests of each of `KINDS`, of the facts that the module's docstring says, with neighbours of such facts.

    RequestError where the model knows fewer.
    """
    subjects, unreported = {request.subject for request in read_requests("miniworld")}, unreported_facts(lm)
    elsewhere = {one.case_id for one in first_of_each(lm, unreported, TAKEN_ELSEWHERE, ALL_KINDS)}
    facts = [
        fact for fact in Random(seed).sample(unreported, len(unreported))
        if fact.subject not in subjects and fact.case_id not in elsewhere
        and subject_kind(lm, replace(fact, prompt=KL_PROMPT)) != "one-token first"
    ]  # fmt: skip
    alike: dict[tuple, list[EditRequest]] = {}
    for fact in facts:
        alike.setdefault((fact.relation_id, fact.target_true), []).append(fact)
    found: dict[str, list[EditRequest]] = {kind: [] for kind in KINDS}
    for fact in facts:
        texts = [one.text for one in alike[fact.relation_id, fact.target_true] if one.subject != fact.subject]
        texts = texts[:N_NEIGHBORS]
        if texts:
            answers = (fact.target_true,) * len(texts)
            whole = replace(fact, neighborhood_prompts=tuple(texts), neighborhood_targets=answers)
            found[subject_kind(lm, fact)].append(whole)
    fewest = min(map(len, found.values()))
    if fewest < n:
        raise RequestError(f"{lm.title} knows {fewest} held-out facts of a kind of subject, and {n} are asked for")
    return [fact for kind in KINDS for fact in found[kind][:n]]


def tune(
    lm: LanguageModel,
    methods: Sequence[str] = TUNED,
    budget: int = 16,
    n: int = 20,
    seed: int = 0,
    store: Store | None = None,
) -> pd.DataFrame:
    """The settings of each method with their scores, as `scores` gives them, and whether each is chosen.

    n: requests of each kind of subject. seed: of the settings and of the requests. All that is asked for is checked
    before anything is measured.
    """
    drawn = {method: draws(lm, method, budget, seed) for method in methods}
    requests, texts = held_out_requests(lm, n, seed), read_texts("miniworld")[-N_TEXTS:]
    store, before = Store() if store is None else store, perplexity(lm, texts)
    moments = None
    if any(METHODS[method].needs_second_moment for method in drawn):
        moments = SecondMoments.of(default_second_moments(lm, range(lm.n_layers)), lm)  # factored once for all settings
    units = [(method, number, setting) for method in drawn for number, setting in enumerate(drawn[method])]
    frames = []
    for method, number, setting in steps(units, f"{lm.title}: tuning", "setting", delay=0):
        given = moments if METHODS[method].needs_second_moment else None
        one = MethodStudy(lm, method, None, given, store, setting)
        rows = one.study("tuning", {"requests": requests, "texts": texts}).complete(
            ["edits"], lambda _, one=one: measured(one, requests, texts, before), one.task("edits"), len(requests)
        )
        about = {"method": method, "setting": number, "hyper_parameters": canonical(setting)}
        frames.append(rows[COLUMNS].assign(**about))
    table = scores(pd.concat(frames, ignore_index=True))
    chosen = [choose(table[table["method"] == method]).name for method in drawn]
    return table.assign(chosen=table.index.isin(chosen), budget=budget, seed=seed)


def measured(
    study: MethodStudy, requests: Sequence[EditRequest], texts: Sequence[str], before: float
) -> Iterator[dict[str, Any]]:
    """One row an edit with a setting: the request, perplexity, perplexity_before, what the method reports, the edit
    metrics, and seconds, which are those of all edits of the setting together with their measuring.

    Where the method refuses to edit, all that is measured is NaN, and `refused` says why.
    """
    lm, started = study.lm, time.perf_counter()
    try:
        made = edits_for(study, requests)
    except MethodError as error:
        rows = [{**dict.fromkeys([*SHARES[:3], "perplexity"], float("nan")), "refused": str(error)}] * len(requests)
    else:
        asked = edit_metrics(lm, requests, edits=made).drop(columns="case_id").to_dict("records")
        rows = [
            {**outcome_columns(one), **row, "perplexity": value, "refused": ""}
            for one, row, value in zip(made, asked, perplexity(lm, texts, edits=made), strict=True)
        ]
    seconds = time.perf_counter() - started
    for request, row in zip(requests, rows, strict=True):
        yield {**described(lm, request), **row, "perplexity_before": before, "seconds": seconds}


def edits_for(study: MethodStudy, requests: Sequence[EditRequest]) -> list[Edit]:
    """The edit that each request is in: one of its own, or its batch's."""
    if study.method not in IN_BATCHES:
        return study.edits(requests)
    made = []
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        made += [edit_batch(study.lm, batch, progress=False, **study.arguments)] * len(batch)
    return made


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: method, setting (its number; 0 is the default), hyper_parameters (JSON), n, `SHARES`,
    median_ratio and largest_ratio (of perplexity after to before; NaN counts as infinite), seconds, refused (why there
    are no edits, or an empty text), score, which is NaN then."""
    ratio = ratios(rows)
    rows = rows.assign(ratio=ratio, perplexity_kept=ratio < KEPT)
    table = rows.groupby(["method", "setting", "hyper_parameters"], sort=False).agg(
        n=("ratio", "size"),
        **{share: (share, "mean") for share in SHARES},
        median_ratio=("ratio", "median"),
        largest_ratio=("ratio", "max"),
        seconds=("seconds", "first"),
        refused=("refused", "first"),
    )
    score = stats.hmean(table[SHARES].to_numpy(float), axis=1)
    return table.assign(score=score.round(9)).reset_index()  # rounded, so that equal ones are


def choose(table: pd.DataFrame) -> pd.Series:
    """The rule: of the settings of one method, the default first, the row that is chosen."""
    best = table.sort_values(["score", "median_ratio"], ascending=[False, True], kind="stable").iloc[0]
    return best if best["score"] > 0 else table.iloc[0]


def training_of_mend(lm: LanguageModel) -> dict[str, Any] | None:
    """What the training of the model's hypernetwork took: steps, edits, seconds, device; None where it has none.

    Of the log beside it. Logs of earlier versions say no device.
    """
    log = weights_path(lm.name).with_name(LOG_BESIDE)
    if not log.is_file():
        return None
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {"steps": last["step"], **{name: last.get(name, "not recorded") for name in ("edits", "seconds", "device")}}


def chosen_lines(table: pd.DataFrame, model: str) -> str:
    """The chosen settings as tuned.toml has them, which `nbkit.methods.hparams.tuned` reads."""
    parts = []
    for row in table[table["chosen"]].to_dict("records"):
        lines = [f"{name} = {json.dumps(value)}" for name, value in json.loads(row["hyper_parameters"]).items()]
        source = f"`python data/miniworld tune {model}`: of {row['budget']} settings, see data/miniworld/tuning.py"
        parts.append("\n".join([f"[{row['method']}]", f"source = {json.dumps(source)}", *lines]))
    return "\n\n".join(parts) + "\n"


def card_of_tuning(lm: LanguageModel, table: pd.DataFrame) -> str:
    """The rule, what it chose, and what that took."""
    by_method = table.groupby("method", sort=False)
    columns = ["method", "hyper_parameters", *SHARES, "median_ratio", "largest_ratio", "score"]
    chosen = table.loc[table["chosen"], columns].set_index("method")
    chosen["score_of_default"] = by_method["score"].first()
    chosen["refused"] = by_method["refused"].agg(lambda refused: (refused != "").sum())
    chosen["seconds"] = by_method["seconds"].sum()
    trained = training_of_mend(lm)
    return filled(
        "card_of_tuning.md",
        name=lm.name,
        budget=table["budget"].iloc[0],
        seed=table["seed"].iloc[0],
        n=table["n"].iloc[0],
        n_texts=N_TEXTS,
        kept=f"{KEPT:g}",
        chosen=markdown(chosen.reset_index()),
        mend="none is trained for this model" if trained is None else markdown(pd.DataFrame([trained])),
        device=lm.device,
    )
