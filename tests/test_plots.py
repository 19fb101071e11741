"""Figures on small frames: what is drawn is what the rows say, nothing is dropped, cut off or too small to read."""

import errno
import itertools
import math
import warnings
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import check_frame_of_a_plot
from matplotlib.collections import PolyCollection
from matplotlib.text import Text
from scipy import stats

from nbkit import plots
from nbkit.errors import ResultsError
from nbkit.plots import points, style
from nbkit.records import correlation
from nbkit.records.ability import with_ability
from nbkit.records.calibration import line
from nbkit.records.collapse import detection
from nbkit.records.survival import surviving

mpl.use("Agg")
RANDOM = np.random.default_rng(0)
KINDS = ["one-token first", "several-token first", "later"]
DAMAGES = ["single edit", "scaled edit", "RECT or PRUNE", "sequence", "batch", "noise"]


def single_frame(perplexity=None):
    """Nine edits of three kinds, three of them beyond every scale."""
    values = [math.inf, 15.5, 15.4, math.nan, 15.6, 15.4, 4e8, 15.5, 700.0] if perplexity is None else perplexity
    kinds = list(itertools.islice(itertools.cycle(KINDS), len(values)))
    frame = pd.DataFrame({"subject_kind": kinds, "perplexity": values, "perplexity_before": 15.4})
    frame["group"] = np.where(frame["perplexity"] < 154, "normal", "collapse")
    frame["numerator"], frame["denominator"] = np.linspace(50, 200, len(frame)), np.geomspace(0.01, 10, len(frame))
    frame["signed_denominator"] = frame["denominator"] * np.where(np.arange(len(frame)) % 4 == 3, -1, 1)
    return frame


def detections():
    """Of a score that tells something, and of one seen on normal edits only."""
    frame = single_frame().assign(risk=lambda frame: 1 / frame["denominator"])
    return {"risk": detection(frame, "risk"), "in vain": detection(frame[frame["perplexity"] < 20], "risk")}


def templates_frame():
    """The same edits with more and more templates, of which fewer and fewer collapse the model."""
    frames = [single_frame([15.5] * n + [700.0] * (9 - n)).assign(n_templates=m) for n, m in [(0, 6), (3, 21), (9, 41)]]
    frame = pd.concat(frames)
    return frame.assign(group=np.where(frame["subject_kind"] == "one-token first", "one-token first", "others"))


def strips_frame():
    c_rome = single_frame().assign(key_mode="C-ROME", perplexity=15.5)
    return pd.concat([single_frame().assign(key_mode="ROME"), c_rome])


def abilities_frame():
    """Six edited models, one of them off the scale."""
    frame = pd.DataFrame({"damage": ["ft", "rome", "rome", "memit", "mend", "rome"]})
    frame["ratio"] = [1.0, 1.9, 4000.0, 1.1, 1.02, math.inf]
    frame["ability"], frame["worst"] = [1.0, 0.8, 0.0, 1.02, 0.97, -0.1], [1.0, 0.4, -0.3, 0.9, 0.8, -0.3]
    return frame


def weight_changes():
    """Of a collapsing edit, and of a normal one with numbers that did not change."""
    change = RANDOM.normal(size=(20, 40))
    return {"collapsing": 100 * change, "normal": np.where(np.arange(40) % 4, 0.1 * change, 0)}


def weight_panels(axes):
    for ax, change in zip(axes, weight_changes().values(), strict=True):
        image = plots.weight_map(change, ax, 1e-3, 1e3)
        assert image.get_array().min() >= 1e-3


def methods_frame():
    """Three methods; the last has no paraphrases to be asked, and one edit of it leaves nothing."""
    frames = []
    for number, name in enumerate(["FT-M", "ROME", "KN"]):
        frame = single_frame().assign(variant=name, efficacy=1.0, paraphrase=np.linspace(0.2, 1, 9) / (number + 1))
        frames.append(frame.assign(neighborhood=0.8 if number < 2 else np.nan))
    return pd.concat(frames)


def methods_panels(axes):
    plots.method_scores(methods_frame(), axes[0])
    plots.perplexity_by_method(methods_frame(), axes[1])
    plots.label_panels(axes)


def task_frame(*names):
    n = 12
    ratio = [1.0, *np.geomspace(1.04, 1e4, n - 3), math.inf, math.nan]
    score = np.linspace(0.9, 0.25, n) + RANDOM.normal(0, 0.02, n)
    rows = {"ratio": ratio, "score": score, "chance": 0.25, "choice": True, "edited": np.arange(n) > 0}
    rows["damage"] = [None, *itertools.islice(itertools.cycle(DAMAGES), n - 1)]
    return pd.concat([pd.DataFrame({**rows, "task": name, "metric": "acc"}) for name in names])


def texts_frame():
    rows = [
        {"text": text, "models": models, "rho": rho, "low": rho - 0.05, "high": rho + 0.1, "n": n}
        for models, n, start in (("all", 120, -0.9), ("below 10 times", 90, -0.6))
        for text, rho in zip(("50 held-out", "500 held-out", "training lines"), start + np.arange(3) / 20, strict=True)
    ]
    return pd.DataFrame(rows)


def risk_frame():
    """Risks of three kinds of subjects, one of them infinite."""
    kinds = ["later", "one-token first", "several-token first"]
    risks = np.random.default_rng(0).lognormal(size=(20, 3)) * [1, 20, 1]
    risks[3, 1] = np.inf
    return pd.DataFrame({"risk": risks.ravel(), "subject_kind": kinds * 20})


def sequence_frame():
    parts = []
    for group, rate, seed in itertools.product(["hard", "normal"], [1.5, 0.1], [0, 1, 2]):
        if (group == "hard") != (rate == 1.5):
            continue
        n_edits = np.arange(11)
        perplexity = 15 * np.exp(rate * n_edits * (1 + seed / 10))
        if group == "hard":
            perplexity[8 + seed // 2 :] = [math.inf, math.nan][seed % 2]
        part = {"group": group, "seed": seed, "n_edits": n_edits, "perplexity": perplexity}
        part |= {"efficacy": np.where(n_edits == 0, np.nan, 1 - rate * n_edits / 20), "checkpoint": n_edits != 5}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts)


def hard_sequences():
    """Those of one study: three orders of the same requests."""
    return sequence_frame().query("group == 'hard'")


def keys_frame():
    parts = []
    for group, plain, similarity in zip(KINDS, (60, 30, 11), (0.1, 0.5, 0.9), strict=True):
        for prefix, norm in [("plain", plain), ("prefixed", 12)]:
            part = {"norm": norm * np.exp(RANDOM.normal(0, 0.1, 40)), "similarity": RANDOM.normal(similarity, 0.05, 40)}
            requests = [f"{group} {number // 4}" for number in range(40)]
            parts.append(pd.DataFrame({**part, "request": requests, "group": group, "prefix": prefix}))
    return pd.concat(parts)


def moves_frame():
    frame = embedding_frame()
    frame["request"] += 5 * (frame["group"] == "collapse")
    return frame[frame["vector"].isin(["$k_u$", r"$\bar{k}$"])]


def settings_frame():
    rows = list(itertools.product(["as published", "with C", "prefixed keys (C-ROME)"], ["hard", "others"]))
    frame = pd.DataFrame(rows, columns=["setting", "group"]).assign(n=8, value=[0.75, 0, 0.4, 0, 0.1, 0.2])
    return frame.assign(low=frame["value"] * 0.6, high=0.3 + frame["value"] * 0.7)


def embedding_frame():
    kinds = ["$k_u$", r"$\bar{k}$", r"$C^{-1}\bar{k}$"]
    rows = list(itertools.product(["normal", "collapse"], kinds, range(5)))
    frame = pd.DataFrame(rows, columns=["group", "vector", "request"])
    return frame.assign(x=RANDOM.normal(size=len(rows)), y=RANDOM.normal(size=len(rows)))


def this_key_frame():
    rows = list(itertools.product(["$k_u$", r"$\bar{k}$"], range(9)))
    frame = pd.DataFrame(rows, columns=["vector", "request"])
    frame["group"] = frame["request"].map(lambda request: "later" if request % 2 else "one-token first")
    return frame.assign(x=RANDOM.normal(size=len(rows)), y=RANDOM.normal(size=len(rows)))


def curve_frame():
    rows = list(itertools.product(KINDS, range(8), range(6)))
    frame = pd.DataFrame(rows, columns=["group", "position", "pair"])
    return frame.assign(similarity=np.where(frame["position"] == 0, 0.95, 0.15) + RANDOM.normal(0, 0.02, len(rows)))


def architectures_panels(axes):
    """Four models of unlike many layers: by position, then twice by depth."""
    layers = {"miniworld-gpt2": 8, "miniworld-llama": 8, "miniworld-t5 decoder": 4, "miniworld-t5 encoder": 4}
    rows = [(name, layer / (n - 1), place) for name, n in layers.items() for layer in range(n) for place in range(12)]
    frame = pd.DataFrame(rows, columns=["model", "depth", "position"])
    frame["similarity"] = 0.5 + RANDOM.normal(0, 0.1, len(frame))
    for ax, x in zip(axes, ["position", "depth", "depth"], strict=True):
        plots.similarity_curves(frame, ax, x=x, group="model")
    plots.shared_legend(axes[0].figure, axes, ncols=3)
    plots.label_panels(axes)


def timing_frame():
    models = ["miniworld-gpt2", "gpt2-6x256"]
    paths = [("plain", 1), ("whole passes", 1), ("replay", 1), ("replay", 8), ("replay", 64)]
    rows = list(itertools.product(["edit", "edit and evaluate"], models, enumerate(paths), range(3)))
    return pd.DataFrame(
        [(what, model, *path, repeat, (1 + repeat / 10) * (1 + (model == models[1])) / (1 + 4 * place))
         for what, model, (place, path), repeat in rows],
        columns=["what", "model", "path", "n", "repeat", "seconds_per_item"])  # fmt: skip


def shares_frame():
    parts = ["tokenizing", "first pass", "forward", "output head", "softmax", "backward", "rest"]
    shares = {
        ("plain", 1, 1.9): [0.001, 0, 0.7, 0.06, 0.01, 0.2, 0.029],
        ("replay", 64, 0.11): [0.01, 0.1, 0.4, 0.04, 0.01, 0.4, 0.04],
    }
    rows = [
        {"path": path, "n": n, "part": part, "share": share, "seconds_per_edit": share * total}
        for (path, n, total), values in shares.items()
        for part, share in zip(parts, values, strict=True)
    ]
    return pd.DataFrame(rows)


def growth_frame():
    n = np.minimum(np.arange(64, 5064, 64), 5000)
    items = np.diff(n, prepend=0)
    seconds, memory = 0.2 + RANDOM.normal(0, 0.01, len(n)), 6e8 + RANDOM.normal(0, 1e7, len(n))
    return pd.DataFrame({"n": n, "items": items, "seconds_per_item": seconds, "peak_memory": memory})


def trainings_frame():
    """Edits of two kinds at four doses of two seeds each: fewer of the first kind collapse, the larger the dose."""
    rows = list(itertools.product([0.0, 0.02, 0.1, 0.4], [0, 1], KINDS[:2], range(8)))
    frame = pd.DataFrame(rows, columns=["opening", "seed", "group", "edit"])
    broken = (frame["group"] == KINDS[0]) & (frame["edit"] >= 16 * frame["opening"] + frame["seed"])
    frame["step"], frame["perplexity_before"] = frame["opening"] * 10_000, 3.0
    frame["perplexity"] = np.where(broken, [math.nan, 700.0] * (len(frame) // 2), 3.1)
    return frame.assign(signed_denominator=frame["opening"] + frame["edit"] - 3)


def trainings_values(name):
    """One value a training and group."""
    table = trainings_frame().drop_duplicates(["opening", "seed", "group"])
    return table.assign(**{name: 0.1 + table["opening"] + table["seed"] / 10})


LOSS = pd.DataFrame({"step": range(6), "nll": [6, 3, 1.5, 0.7, 0.2, 0.04], "kl": 0.01, "weight_decay": 0.02})
TOKENS = pd.DataFrame(
    {"token": [" Krela", "\n", " $x$", " averyveryverylongtokenthatdoesnotend"], "before": [0.1, 0.2, 0.3, 0.05],
     "after": [0.9, 0.02, 0.03, 0.0]}
)  # fmt: skip
TEMPLATES = pd.DataFrame(
    {"template": ["{}", "The river runs through the middle of the city. {}"], "similarity": [1.0, -0.1]}
)


def tasks_panels(axes):
    names = ["reasoning", "nli", "open_qa", "closed_qa", "dialogue", "summarisation", "ner"]
    shown = plots.perplexity_vs_tasks(task_frame(*names), axes)
    plots.shared_legend(shown[0].figure, shown)


def one_edit_panels(axes):
    """Two edits, with as many templates and tokens as the notebook shows."""
    similar = pd.DataFrame({"similarity": [1.0] + [-0.1] * 20})
    tokens = pd.DataFrame({"token": [f" Harkchion{i}" for i in range(11)], "before": 0.05, "after": 0.9})
    for row in axes:
        plots.one_edit_panels(similar, LOSS, {"plain prompt": tokens, "unseen prefix": tokens}, row, " Harkchion0")
        row[0].set_ylabel("Fairkflus Zouleash\n(later)")
    plots.shared_legend(axes[0, 0].figure, axes.flat)
    plots.label_panels(axes[0])


def sequence_panels(axes):
    plots.sequential_curves(sequence_frame(), axes[0])
    plots.sequential_curves(sequence_frame(), axes[1], y="efficacy", band="iqr")
    plots.shared_legend(axes[0].figure, axes, ncols=2)
    plots.label_panels(axes)


def survival_frame():
    lives = {"hard": ([2, 2, 4, 6, 8], [True] * 5), "normal": ([6, 12, 20, 20, 20], [True] * 2 + [False] * 3)}
    curves = [
        surviving(pd.DataFrame({"n_edits": ends, "collapsed": collapsed})).assign(group=name)
        for name, (ends, collapsed) in lives.items()
    ]
    return pd.concat(curves)


def layers_frame():
    frame = pd.DataFrame({"layer": range(5), "perplexity": [4.0, 400.0, 8.0, np.nan, 4.1], "perplexity_before": 4.0})
    return frame.assign(target_probability=[0.9, 0.1, 0.5, 0, 0], paraphrase_argmax=np.nan, neighborhood_argmax=0.5)


def throughput_panels(axes):
    plots.seconds_per_edit(timing_frame(), axes[0, 0])
    plots.time_shares(shares_frame(), axes[0, 1])
    plots.cost_growth(growth_frame(), axes[1, 0])
    plots.cost_growth(growth_frame(), axes[1, 1], y="peak_memory")
    plots.label_panels(axes.flat)


def training_panels(x):
    edits, alike, known = trainings_frame(), trainings_values("similarity"), trainings_values("recall")
    return lambda axes: plots.training_panels(edits, alike, known, axes, x)


def screened_frame():
    """Nine requests of which five were edited; one whose risk is no number is among the worst."""
    risk = [math.nan, 60.0, 9.0, 3.0, 0.7, 0.6, 0.6, 0.5, 0.5]
    chosen = ["worst"] * 3 + [None, "random", None, "random", None, None]
    outcome = ["collapse", "collapse", "normal", None, "normal", None, "collapse", None, None]
    return pd.DataFrame({"risk": risk, "chosen": chosen, "outcome": outcome})


def damage_frame():
    """Edits by three methods; one breaks the model beyond number, one was refused, of one nothing could be foretold."""
    felt = [0.1, 0.2, 0.4, 3.0, 2.0, 90.0, 140.0, 0.0, math.nan]
    ratio = [1.0, 1.01, 2.0, 1.1, 1.0, 300.0, math.inf, 1.0, 1.2]
    guard = ["passed"] * 5 + ["fell back"] * 2 + ["refused"] * 2
    frame = pd.DataFrame({"method": ["FT"] * 2 + ["KN"] + ["ROME"] * 6, "felt_relative": felt, "guard": guard})
    frame["perplexity"], frame["perplexity_before"] = 4 * np.array(ratio), 4.0
    return frame.assign(update_norm=felt, efficacy=1.0, policy=["no guard"] * 4 + ["refuse"] * 5)


def areas_frame():
    """Two methods of which one does no harm, by two scores."""
    seen = {"ROME": [(0.9, 0.8, 1.0, 4, 8), (0.7, 0.5, 0.9, 4, 8)], "FT": [(math.nan,) * 3 + (0, 8)] * 2}
    rows = [(method, score, *row) for method, of in seen.items() for score, row in zip("ab", of, strict=True)]
    return pd.DataFrame(rows, columns=["method", "score", "auc", "low", "high", "rising", "n"])


def controls_frame():
    """Nine regularisers of two methods in sequence, three orders each, and batches of several sizes."""
    names = ["none", *(f"RECT {keep} %" for keep in (80, 60, 40, 20)), "random", "PCA as released", "PCA", "scaled"]
    rows = [
        {"method": method, "regulariser": name, "seed": seed, "n_edits": n, "batch_size": size,
         "task_nli": 0.5 + 0.4 * math.exp(-n * rate), "task_open_qa": 0.6 * math.exp(-n * (rate + seed / 200)),
         "reliability": 1 - 0.09 * (8 - place) - seed / 50, "generalization": 0.6, "locality": 0.8}
        for rate, method in ((0.02, "ROME"), (0.01, "MEMIT")) for place, name in enumerate(names) for seed in range(3)
        for size in (1, 10, 1000) for n in range(0, 21, 5)
    ]  # fmt: skip
    rows = pd.DataFrame(rows)
    return rows.assign(task_nli=rows["task_nli"].where(rows["n_edits"] == 0, rows["task_nli"] - rows.index % 27 / 200))


def control_curves(axes):
    frame = controls_frame()
    shown = plots.task_curves(frame.query("method == 'ROME' and batch_size == 1"), axes[0], {"nli": 0.5})
    batches = frame.query("regulariser == 'none' and n_edits in (0, 20)")
    shown += plots.task_curves(batches, axes[1], {"nli": 0.5}, x="batch_size", by="method")
    plots.shared_legend(axes[0, 0].figure, shown, ncols=6)


def two_scorers(axes):
    frame = controls_frame().query("batch_size == 1 and regulariser == 'none'")
    for ax, name in zip(axes, ("task_nli:as_released", "task_open_qa:as_released"), strict=True):
        frame = frame.assign(**{name: frame["task_nli"].where((frame["n_edits"] < 15) | (ax is axes[0]))})
        plots.two_scorers(frame, ax, name.removeprefix("task_").split(":")[0])
    plots.shared_legend(axes[0].figure, axes)


def pareto_points(ax):
    frame = with_ability(controls_frame().query("batch_size == 1"), {"nli": 0.5, "open_qa": 0})
    return plots.pareto_front(frame.query("n_edits == 20"), ax)


def changes_by_step(axes):
    rank_one = RANDOM.standard_t(3, (15, 80, 1)) * RANDOM.standard_t(3, (15, 1, 320))
    plots.weight_maps({f"{n} edits": rank_one[:n].sum(0) for n in (1, 5, 10, 15)}, axes, cells=40)


# name: (draws on an axes or an array of them, height in inches, arguments of plt.subplots)
FIGURES = {
    "perplexity_per_edit": (lambda ax: plots.perplexity_per_edit(single_frame(), ax), 2.5, {}),
    "per_edit_narrow": (lambda ax: plots.perplexity_per_edit(single_frame([15.0, 15.1, 15.3]), ax), 2.5, {}),
    "perplexity_strips": (lambda ax: plots.perplexity_strips(strips_frame(), ax), 2.6, {}),
    "collapse_share": (lambda ax: plots.collapse_share(single_frame(), ax), 1.5, {}),
    "collapse_by_templates": (lambda ax: plots.collapse_by_templates(templates_frame(), ax), 2.2, {}),
    "risk_roc": (lambda ax: plots.risk_roc(detections(), ax), 3.2, {}),
    "perplexity_vs_task": (lambda ax: plots.perplexity_vs_task(task_frame("open_qa"), ax), 2.6, {}),
    "ability_vs_perplexity": (
        lambda ax: plots.ability_vs_perplexity(task_frame("open_qa")[1:].assign(ability=RANDOM.random(11)), ax, 10.0),
        3.2,
        {},
    ),
    "rho_by_text": (lambda ax: plots.rho_by_text(texts_frame(), ax), 2.4, {}),
    "perplexity_vs_tasks": (tasks_panels, 4.5, {"nrows": 2, "ncols": 4}),
    "sequential_curves": (sequence_panels, 2.6, {"ncols": 2}),
    "sequence_step": (lambda ax: plots.sequence_step(hard_sequences(), ax, seed=1, step=2), 2.6, {}),
    "survival_curves": (lambda ax: plots.survival_curves(survival_frame(), ax), 2.0, {}),
    "ratio_by_layer": (lambda ax: plots.ratio_by_layer(layers_frame(), ax), 2.2, {}),
    "success_by_layer": (lambda ax: plots.success_by_layer(layers_frame(), ax), 2.2, {}),
    "key_among_others": (lambda ax: plots.key_among_others(this_key_frame(), ax), 3.0, {}),
    "risk_distribution": (lambda ax: plots.risk_distribution(risk_frame(), ax, chosen=12.0), 2.4, {}),
    "screened_risk": (lambda ax: plots.screened_risk(screened_frame(), ax), 2.6, {}),
    "damage_calibration": (
        lambda ax: plots.damage_calibration(damage_frame(), ax, line(damage_frame()), most=4),
        3.0,
        {},
    ),
    "areas_by_method": (lambda ax: plots.areas_by_method(areas_frame(), ax), 2.4, {}),
    "guard_outcomes": (lambda ax: plots.guard_outcomes(damage_frame(), ax), 2.6, {}),
    "denominators": (lambda ax: plots.denominators(single_frame(), ax), 2.5, {}),
    "similarity_histogram": (lambda ax: plots.similarity_histogram(keys_frame(), ax), 2.4, {}),
    "norm_histogram": (lambda ax: plots.norm_histogram(keys_frame(), ax), 2.6, {}),
    "embedding_scatter": (lambda ax: plots.embedding_scatter(embedding_frame(), ax), 3.0, {}),
    "key_moves": (lambda ax: plots.key_moves(moves_frame(), ax), 3.0, {}),
    "setting_shares": (lambda ax: plots.setting_shares(settings_frame(), ax), 2.0, {}),
    "similarity_curves": (lambda ax: plots.similarity_curves(curve_frame(), ax), 2.4, {}),
    "similarity_by_architecture": (architectures_panels, 2.6, {"ncols": 3}),
    "loss_curve": (lambda ax: plots.loss_curve(LOSS, ax), 2.4, {}),
    "top_tokens": (lambda ax: plots.top_tokens(TOKENS, ax, target=" Krela"), 2.0, {}),
    "one_edit": (one_edit_panels, 4.6, {"nrows": 2, "ncols": 4}),
    "seconds_per_edit": (lambda ax: plots.seconds_per_edit(timing_frame(), ax), 2.6, {}),
    "time_shares": (lambda ax: plots.time_shares(shares_frame(), ax), 2.2, {}),
    "cost_growth": (lambda ax: plots.cost_growth(growth_frame(), ax), 2.2, {}),
    "memory_growth": (lambda ax: plots.cost_growth(growth_frame(), ax, y="peak_memory"), 2.2, {}),
    "throughput": (throughput_panels, 4.6, {"nrows": 2, "ncols": 2}),
    "methods": (methods_panels, 1.9, {"ncols": 2}),
    "training_by_step": (training_panels("step"), 5.0, {"nrows": 2, "ncols": 2}),
    "training_by_dose": (training_panels("opening"), 5.0, {"nrows": 2, "ncols": 2}),
    "ability_and_worst_task": (lambda ax: plots.ability_vs_perplexity(abilities_frame(), ax, worst=True), 3.0, {}),
    "weights_above": (lambda ax: plots.weights_above(weight_changes(), ax), 2.4, {}),
    "weight_maps": (weight_panels, 2.4, {"ncols": 2}),
    "control_curves": (control_curves, 4.4, {"nrows": 2, "ncols": 2}),
    "batch_grid": (lambda ax: plots.batch_grid(controls_frame()[:45], ax, "task_nli"), 1.8, {}),
    "two_scorers": (two_scorers, 2.4, {"ncols": 2}),
    "pareto_front": (pareto_points, 3.4, {}),
    "scores_by_regulariser": (
        lambda ax: plots.method_scores(controls_frame(), ax, "regulariser", plots.ZSRE_SCORES),
        2.6,
        {},
    ),
    "weight_maps_by_step": (changes_by_step, 2.0, {"ncols": 4}),
    "template_similarity": (lambda ax: plots.template_similarity(TEMPLATES, ax), 1.5, {}),
}


def draw(name):
    """The figure of that name; random frames are the same each time."""
    global RANDOM
    RANDOM = np.random.default_rng(0)
    function, height, panels = FIGURES[name]
    width = plots.TWO_COLUMNS if panels else plots.COLUMN
    fig, axes = plt.subplots(figsize=(width, height), **panels)
    drawn = function(axes)
    assert panels or drawn is axes
    return fig


def shown_ticks(axis):
    """The tick labels that are drawn: matplotlib keeps others, beyond the axis' ends and on its other side."""
    low, high = sorted(axis.get_view_interval())
    labels = [label for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
              for label in (tick.label1, tick.label2)]  # fmt: skip
    return [label for label in labels if label.get_text() and label.get_visible()]


def texts_of(fig):
    ticks = {t for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.findobj(Text) if t is not axis.label}
    shown = [label for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for label in shown_ticks(axis)]
    others = [text for text in fig.findobj(Text) if text not in ticks and text.get_visible()]
    return shown + [text for text in others if text.get_text().strip()]


def labels_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read_at_its_printed_size(name):
    with plots.paper_style(), warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout does not fit
        fig = draw(name)
        fig.canvas.draw()
        whole = fig.bbox
        for text in texts_of(fig):
            box = text.get_window_extent()
            assert text.get_fontsize() >= 7, text
            assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1, f"{text.get_text()!r} is cut off at the side"
            assert box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1, f"{text.get_text()!r} is cut off above or below"
        for ax in fig.axes:
            for axis in (ax.xaxis, ax.yaxis):
                boxes = [label.get_window_extent() for label in shown_ticks(axis)]
                assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), f"{axis} labels"
                assert len(boxes) >= 2 or not axis.get_ticklocs().size, f"{axis} has too few labels"
            assert ax.get_ylabel() or shown_ticks(ax.yaxis)
        plt.close(fig)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_drawn_again_has_the_same_bytes(name, tmp_path):
    written = []
    for folder in ("first", "second"):
        with plots.paper_style():
            fig = draw(name)
            paths = plots.save_figure(fig, name, "n = 9, seeds 0-2.", tmp_path / folder)
            plt.close(fig)
        assert [path.name for path in paths] == [f"{name}.md", f"{name}.pdf", f"{name}.png"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    caption, pdf, png = written[0]
    assert caption == b"n = 9, seeds 0-2.\n"
    assert b"CreationDate" not in pdf and b"matplotlib" not in pdf.lower()
    assert b"Software" not in png and png.startswith(b"\x89PNG")


def test_kinds_of_file_and_style_are_the_user_s_to_set(ax, tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_FIGURES", str(tmp_path / "mine"))
    monkeypatch.setenv("NBKIT_FIGURE_FORMATS", "png, svg")
    written = plots.save_figure(ax.figure, "toy", "Toy.")
    assert written == [tmp_path / "mine" / file for file in ("toy.md", "toy.svg", "toy.png")]
    monkeypatch.setenv("NBKIT_FIGURE_FORMATS", "docx")
    with pytest.raises(ResultsError, match="NBKIT_FIGURE_FORMATS is 'docx'; name some of .*svg"):
        plots.save_figure(ax.figure, "toy", "Toy.")
    (tmp_path / "own.mplstyle").write_text("font.family: serif\n")
    monkeypatch.setenv("NBKIT_STYLE", str(tmp_path / "own.mplstyle"))
    with plots.paper_style():
        assert mpl.rcParams["font.family"] == ["serif"] and mpl.rcParams["font.size"] == 8
    monkeypatch.setenv("NBKIT_STYLE", "no style")
    with pytest.raises(ResultsError, match="NBKIT_STYLE is 'no style'"), plots.paper_style():
        pass


def test_a_caption_names_models_number_type_and_files_without_their_folders():
    lm = SimpleNamespace(title="gpt2-xl", dtype="torch.float32")
    read = {"requests": "/home/ann/counterfact.json", "texts": "miniworld", "C": None}
    assert plots.sources(lm, **read) == "gpt2-xl in float32, requests of counterfact.json and texts of miniworld."
    assert plots.sources(lm, texts="a") == "gpt2-xl in float32, texts of a."
    others = [SimpleNamespace(title=name, dtype=dtype) for name, dtype in (("b", "torch.float32"), ("c", "bfloat16"))]
    assert plots.sources(lm, *others, texts="a") == "gpt2-xl and b in float32 and c in bfloat16, texts of a."


def test_without_a_folder_figures_do_not_replace_the_project_s(ax, tmp_path, monkeypatch):
    monkeypatch.delenv("NBKIT_FIGURES", raising=False)
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    assert plots.save_figure(ax.figure, "toy", "Toy.")[0] == tmp_path / "figures" / "toy.md"


def test_an_unwritable_figure_folder_is_said_and_old_files_stay(ax, tmp_path, monkeypatch):
    ax.plot([1, 2])
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot write toy to .*NBKIT_FIGURES"):
        plots.save_figure(ax.figure, "toy", "Toy.", tmp_path / "file" / "figures")
    (path, *_) = plots.save_figure(ax.figure, "toy", "Old.", tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nbkit.records.files.os.fsync", full)
    with pytest.raises(ResultsError, match="No space left"):
        plots.save_figure(ax.figure, "toy", "New.", tmp_path)
    assert path.read_text() == "Old.\n" and len(list(tmp_path.iterdir())) == 4


def test_perplexities_off_the_scale_stand_at_the_top_edge_and_are_counted(ax):
    plots.perplexity_per_edit(single_frame(), ax)
    assert ax.get_yscale() == "log"
    triangles = [line for line in ax.lines if line.get_marker() == "^"]
    assert np.concatenate([line.get_xdata() for line in triangles]).tolist() == [1, 4, 7]
    assert {y for line in triangles for y in line.get_ydata()} == {1e6}
    assert ax.get_ylim()[1] == pytest.approx(1.15e6)
    assert "> $10^{6}$ or not finite (3 of 9)" in labels_of(ax)
    assert "unedited (15.4)" in labels_of(ax) and "one-token first (n = 3)" in labels_of(ax)
    points = [line for line in ax.lines if line.get_marker() in "osD"]
    assert sum(len(line.get_xdata()) for line in points) == 6


def test_of_texts_that_the_model_cannot_read_the_unedited_perplexity_stays_on_the_scale(ax):
    frame = single_frame([3e8, 2.9e8, 4e9, 4e15, math.inf]).assign(perplexity_before=2.84e8)
    plots.perplexity_per_edit(frame, ax)
    low, high = ax.get_ylim()
    assert low < 2.84e8 < high == pytest.approx(1.15e12)
    assert {"> $10^{12}$ or not finite (2 of 5)", "unedited (2.84e+08)"} <= set(labels_of(ax))
    points = [line for line in ax.lines if line.get_marker() in "osD"]
    assert sorted(y for line in points for y in line.get_ydata()) == [2.9e8, 3e8, 4e9]


def test_without_large_ones_the_edge_lies_above_the_largest_perplexity(ax):
    plots.perplexity_per_edit(single_frame([10.0, 20.0, math.nan]), ax)
    assert ax.get_ylim()[1] == pytest.approx(60 * 1.15)
    assert "infinite or NaN (1 of 3)" in labels_of(ax)


def test_all_finite_perplexities_need_no_edge(ax):
    plots.perplexity_per_edit(single_frame([10.0, 20.0, 30.0]), ax)
    assert not any("NaN" in label or "finite" in label for label in labels_of(ax))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nothing_finite_at_all_can_be_drawn(ax, value):
    plots.perplexity_per_edit(single_frame([value] * 3), ax)
    assert "infinite or NaN (3 of 3)" in labels_of(ax)
    ax.figure.canvas.draw()


def test_strips_show_every_value_and_the_medians(ax):
    frame = strips_frame()
    plots.perplexity_strips(frame, ax)
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == len(frame)
    medians = sorted(line.get_ydata()[0] for line in ax.lines if line.get_color() == "black")
    assert medians[-1] == 1e6 and medians[0] == 15.4 and len(medians) == 6


def test_the_medians_of_strips_hide_no_point(ax):
    plots.perplexity_strips(strips_frame(), ax)
    points = [x for line in ax.lines if line.get_linestyle() == "None" for x in line.get_xdata()]
    medians = [line.get_xdata() for line in ax.lines if line.get_color() == "black"]
    assert not any(low <= x <= high for low, high in medians for x in points)


def test_abilities_reach_down_to_the_worst_task(ax):
    frame = abilities_frame()
    plots.ability_vs_perplexity(frame, ax, worst=True)
    reach = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert reach == frame[["worst", "ability"]].to_numpy().tolist()
    assert "infinite or NaN (1 of 6)" in labels_of(ax)


def test_weights_above_is_the_share_of_numbers_larger_than_a_size(ax):
    changes = weight_changes()
    plots.weights_above(changes, ax)
    for curve, change in zip(ax.lines, changes.values(), strict=True):
        for size, share in list(zip(*curve.get_data(), strict=True))[::37]:
            assert share == pytest.approx((np.abs(change) > size).mean())
    assert labels_of(ax)[0] == f"collapsing (largest {np.abs(changes['collapsing']).max():.2g})"
    with pytest.raises(ValueError, match="no change of a weight"):
        plots.weights_above({"nothing": np.zeros((2, 2))}, ax)


def test_collapse_share_counts_infinite_and_nan_as_collapsed(ax):
    plots.collapse_share(single_frame(), ax, ratio=10)
    assert [bar.get_width() for bar in ax.patches] == [1.0, 0.0, pytest.approx(1 / 3)]
    assert [text.get_text() for text in ax.texts] == ["3 of 3", "0 of 3", "1 of 3"]


def test_risk_roc_draws_the_curve_and_says_where_there_is_none(ax):
    plots.risk_roc(detections(), ax)
    expected = detections()["risk"]
    _, curve, missing = ax.lines
    assert curve.get_xdata().tolist() == expected.curve["false_alarms"].tolist()
    assert curve.get_ydata().tolist() == expected.curve["found"].tolist() and not len(missing.get_xdata())
    assert f"risk: AUC {expected.auc:.2f}" in curve.get_label() and "0 of 5 collapse" in missing.get_label()


def test_rho_is_spearmans_over_the_edited_models_with_nan_as_the_worst(ax):
    frame = task_frame("open_qa")
    plots.perplexity_vs_task(frame, ax)
    edited = frame[1:]
    expected = stats.spearmanr(edited["ratio"].fillna(math.inf), edited["score"]).statistic
    found = correlation.spearman(edited["ratio"], edited["score"])
    assert found.rho == pytest.approx(expected) and -1 <= found.low <= found.rho <= found.high <= 1 and found.n == 11
    assert found == correlation.spearman(edited["ratio"], edited["score"])
    assert found != correlation.spearman(edited["ratio"], edited["score"], seed=1)
    title = ax.get_title("right")
    assert title.startswith("open qa\n") and f"{found.rho:.2f}".replace("-", "−") in title
    (row,) = correlation.correlations(frame.rename(columns={"ratio": "perplexity"})).to_dict("records")
    assert row == {"task": "open_qa", **found._asdict()}


def test_every_model_is_a_point_of_its_kind_of_damage_and_the_unedited_one_a_line(ax):
    frame = task_frame("open_qa")
    plots.perplexity_vs_task(frame, ax)
    points_of = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points_of) == 11
    assert len({line.get_color() for line in points_of if line.get_marker() != ">"}) == 6
    assert sum(len(line.get_xdata()) for line in points_of if line.get_marker() == ">") == 2
    levels = {line.get_label(): set(line.get_ydata()) for line in ax.lines}
    assert levels["unedited"] == {frame["score"].iloc[0]} and levels["guessing"] == {0.25}
    assert "infinite or NaN (2 of 11)" in labels_of(ax)
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "Accuracy" and ax.get_ylim() == (-0.04, 1.04)


def test_a_kind_of_damage_looks_alike_wherever_it_is_drawn():
    frame = task_frame("a", "b")
    without = frame["task"].eq("b") & frame["damage"].isin(["single edit", "scaled edit"])
    fig, axes = plt.subplots(1, 3)
    shown = plots.perplexity_vs_tasks(frame[~without], axes)
    looks = [
        {text.get_text(): (line.get_color(), line.get_marker())
         for text, line in zip(ax.get_legend().get_texts(), ax.get_legend().legend_handles, strict=True)}
        for ax in shown
    ]  # fmt: skip
    assert looks[1]["noise"] == looks[0]["noise"] and "single edit" in looks[0] and "single edit" not in looks[1]
    assert len(fig.axes) == 2


def test_a_task_whose_answers_are_written_has_no_line_of_guessing(ax):
    plots.perplexity_vs_task(task_frame("open_qa").assign(choice=False), ax)
    assert "guessing" not in labels_of(ax) and "unedited" in labels_of(ax)


def test_rho_by_text_has_a_mark_and_an_interval_for_every_text(ax):
    plots.rho_by_text(texts_frame(), ax)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["50 held-out", "500 held-out", "training lines"]
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    np.testing.assert_allclose(marks[1].get_xdata(), [-0.6, -0.55, -0.5])
    assert labels_of(ax) == ["all (n = 120)", "below 10 times (n = 90)"]
    assert [len(lines.get_segments()) for lines in ax.collections] == [3, 3]


@pytest.mark.parametrize(
    ("ratio", "score", "n"),
    [([1, 2], [1, 2], 2), ([1, 1, 1], [1, 2, 3], 3), ([1, 2, 3], [5, 5, 5], 3), ([1, 2, 3], [1, np.nan, 3], 2)],
)
def test_rho_that_is_not_defined_is_said(ax, ratio, score, n):
    found = correlation.spearman(ratio, score)
    assert np.isnan([found.rho, found.low, found.high]).all() and found.n == n
    plots.perplexity_vs_task(pd.DataFrame({"task": "nli", "ratio": ratio, "score": score, "damage": "noise"}), ax)
    assert ax.get_title("right") == "nli\nρ undefined"


def test_tasks_that_do_not_fit_are_refused(ax):
    with pytest.raises(ValueError, match="2 tasks need as many axes, not 1"):
        plots.perplexity_vs_tasks(task_frame("a", "b"), [ax])
    with pytest.raises(ValueError, match="one panel shows one task"):
        plots.perplexity_vs_task(task_frame("a", "b"), ax)


def test_sequential_curves_are_medians_over_seeds_with_the_band_stated(ax):
    frame = sequence_frame()
    plots.sequential_curves(frame, ax)
    normal = frame[(frame["group"] == "normal") & frame["checkpoint"]].groupby("n_edits")["perplexity"]
    (line,) = [line for line in ax.lines if line.get_label() == "normal (3 seeds)"]
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10], "edit 5 is no checkpoint"
    np.testing.assert_allclose(line.get_ydata(), normal.median())
    bands = [band for band in ax.collections if isinstance(band, PolyCollection)]
    corners = bands[1].get_paths()[0].vertices[:, 1]
    assert corners.min() == pytest.approx(normal.min().min()) and corners.max() == pytest.approx(normal.max().max())
    assert "median; band: minimum to maximum" in labels_of(ax)
    (hard,) = [line for line in ax.lines if line.get_label() == "hard (3 seeds)"]
    (triangles,) = [line for line in ax.lines if line.get_marker() == "^"]
    assert hard.get_ydata()[-2:].tolist() == [1e6, 1e6] and triangles.get_xdata().tolist() == [7, 8, 9, 10]
    n_over = int((~(frame[frame["checkpoint"]]["perplexity"] <= 1e6)).sum())
    assert f"> $10^{{6}}$ or not finite ({n_over} of 60)" in labels_of(ax)


def test_survival_is_a_step_curve_that_goes_on_to_the_end(ax):
    plots.survival_curves(survival_frame(), ax, n_edits=20)
    hard, normal = ax.lines
    assert hard.get_xdata().tolist() == [0, 2, 4, 6, 8, 20] and hard.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(hard.get_ydata(), [1, 0.6, 0.4, 0.2, 0, 0])
    np.testing.assert_allclose(normal.get_ydata()[-2:], [0.6, 0.6])


def test_a_layer_without_a_perplexity_stands_at_the_top(ax):
    plots.ratio_by_layer(layers_frame(), ax)
    rise = ax.lines[0].get_ydata()
    assert rise[3] == rise.max() > rise[1] == 100


def test_the_key_in_question_is_the_last_request(ax):
    frame = this_key_frame()
    plots.key_among_others(frame, ax)
    this = frame[frame["request"] == frame["request"].max()]
    [joined] = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == len(this)]
    assert joined.get_xdata().tolist() == this["x"].tolist()


def test_sequential_success_is_linear_and_starts_at_the_first_edit(ax):
    plots.sequential_curves(sequence_frame(), ax, y="efficacy", band="iqr")
    assert ax.get_yscale() == "linear" and min(ax.lines[0].get_xdata()) == 1
    assert "median; band: 25th to 75th percentile" in labels_of(ax)
    with pytest.raises(ValueError, match="choose one of range, iqr"):
        plots.sequential_curves(sequence_frame(), ax, band="std")


def test_collapse_by_templates_has_a_share_and_its_interval_at_each_number(ax):
    plots.collapse_by_templates(templates_frame().sample(frac=1, random_state=0), ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["6", "21", "41"]
    drawn = dict(zip([label.split(" (")[0] for label in labels_of(ax)], ax.lines, strict=True))
    assert drawn["one-token first"].get_ydata() == pytest.approx([1, 2 / 3, 0])
    assert drawn["others"].get_ydata() == pytest.approx([1, 2 / 3, 0])
    assert sorted(labels_of(ax)) == ["one-token first (n = 3)", "others (n = 6)"]
    ends = ax.collections[labels_of(ax).index("others (n = 6)")].get_segments()[0][:, 1]
    wilson = stats.binomtest(6, 6).proportion_ci(method="wilson")
    assert ends == pytest.approx([wilson.low, wilson.high])


def test_a_screening_marks_what_was_edited_and_counts_the_rest(ax):
    plots.screened_risk(screened_frame(), ax)
    assert {"not edited (n = 4)", "edited: collapse (n = 3)", "edited: normal (n = 2)", "the 3 worst"} < set(
        labels_of(ax)
    )
    assert "infinite or NaN (1 of 9)" in labels_of(ax)
    placed = np.sort(np.concatenate([each.get_xdata() for each in ax.lines]))
    np.testing.assert_array_equal(placed, np.arange(1, 10))


def test_the_calibration_line_is_the_fit_and_what_has_no_place_is_counted(ax):
    frame = damage_frame()
    fit = line(frame)
    plots.damage_calibration(frame, ax, fit)
    (drawn,) = [each for each in ax.lines if each.get_label().startswith("slope")]
    np.testing.assert_allclose(np.log(drawn.get_ydata()), fit.intercept + fit.slope * np.log(drawn.get_xdata()))
    assert "0 or no number, not drawn: 2" in labels_of(ax) and "ROME (n = 6)" in labels_of(ax)
    assert "infinite or NaN (1 of 9)" in labels_of(ax)


def test_areas_stand_at_their_values_and_methods_without_harm_say_so(ax):
    plots.areas_by_method(areas_frame(), ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ROME, 4 of 8 rise", "FT, 0 of 8 rise"]
    assert [each.get_xdata()[0] for each in ax.lines if each.get_label() in "ab"] == [0.9, 0.7]


def test_denominators_show_by_open_markers_which_are_negative(ax):
    frame = single_frame()
    plots.denominators(frame, ax)
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    open_ones = np.concatenate([line.get_ydata() for line in points if line.get_markerfacecolor() == "none"])
    assert sorted(open_ones) == sorted(-frame["signed_denominator"][frame["signed_denominator"] < 0])
    assert sum(len(line.get_xdata()) for line in points) == 2 * len(frame)
    assert ["(2 negative, open)" in tick.get_text() for tick in ax.get_xticklabels()] == [False, True]
    of_normal = frame.loc[frame["group"] == "normal", "denominator"].median()
    assert f"{of_normal:.3g}" in {text.get_text() for text in ax.texts}
    ax.clear()
    plots.denominators(frame.assign(signed_denominator=frame["denominator"]), ax)
    assert not any("negative" in tick.get_text() for tick in ax.get_xticklabels())


def test_denominators_leave_out_only_what_a_log_axis_cannot_show_and_say_so(ax):
    frame = single_frame()
    frame.loc[[0, 1], "signed_denominator"] = [0.0, math.nan]
    plots.denominators(frame, ax)
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == 2 * len(frame) - 2
    assert "(2 not drawn: zero or not finite)" in ax.get_xticklabels()[1].get_text()
    medians = {text.get_text() for text in ax.texts}
    assert f"{frame.loc[frame['group'] == 'collapse', 'numerator'].median():.3g}" in medians


def test_histograms_hold_every_key(ax):
    frame = keys_frame()
    frame.loc[frame.index[0], "similarity"] = 1.0000001  # rounding
    plots.norm_histogram(frame, ax)
    assert labels_of(ax) == [*(f"{kind} (10 requests)" for kind in KINDS), "plain (120 keys)", "prefixed (120 keys)"]
    heights = [np.ptp(patch.get_path().vertices[:, 1]) for patch in ax.patches]
    assert len(ax.patches) == 6 and max(heights) <= 1
    ax.clear()
    plots.similarity_histogram(frame, ax)
    assert ax.get_xlim() == (-1 if (frame["similarity"] < -1 / 40).any() else 0, 1)
    assert labels_of(ax)[:-1] == [f"{kind} (10 requests, 80 pairs)" for kind in KINDS]
    middles = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    of_requests = frame.groupby(["group", "request"], sort=False)["similarity"].median()
    np.testing.assert_allclose(middles, of_requests.groupby("group", sort=False).median())
    with pytest.raises(ValueError, match="'plain' and 'prefixed'"):
        plots.norm_histogram(frame.assign(prefix="both"), ax)


def test_embedding_shows_colour_by_group_and_marker_by_kind(ax):
    plots.embedding_scatter(embedding_frame(), ax, method="PCA")
    assert len(ax.lines) == 6 and all(len(line.get_xdata()) == 5 for line in ax.lines)
    assert len({line.get_marker() for line in ax.lines}) == 3 and ax.get_xlabel() == "PCA 1"


def test_moves_join_the_two_keys_of_each_request(ax):
    frame = moves_frame()
    plots.key_moves(frame, ax)
    drawn = {tuple(map(tuple, segment)) for lines in ax.collections for segment in lines.get_segments()}
    expected = {tuple(map(tuple, rows[["x", "y"]].to_numpy())) for _, rows in frame.groupby("request")}
    assert drawn == expected and len(expected) == 10
    with pytest.raises(ValueError, match="the frame has 3"):
        plots.key_moves(embedding_frame(), ax)


def test_settings_have_a_row_each_and_the_first_one_a_line_through_all(ax):
    frame = settings_frame()
    plots.setting_shares(frame, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(frame["setting"].unique())
    assert labels_of(ax) == ["hard (n = 8)", "others (n = 8)", "as in as published"]
    points = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert sorted(np.concatenate([line.get_xdata() for line in points])) == sorted(frame["value"])
    ends = sorted((round(a[0], 6), round(b[0], 6)) for c in ax.collections for a, b in c.get_segments())
    assert ends == sorted(zip(frame["low"].round(6), frame["high"].round(6), strict=True))
    assert {line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"} == {0.75, 0}


def test_loss_parts_add_up_and_a_loss_that_became_nan_is_drawn(ax):
    plots.loss_curve(LOSS, ax)
    (total,) = [line for line in ax.lines if line.get_label() == "total"]
    np.testing.assert_allclose(total.get_ydata(), LOSS[["nll", "kl", "weight_decay"]].sum(axis=1))
    plots.loss_curve(LOSS.assign(nll=[6, 5, 4, 3, 2, math.nan]), ax.figure.subplots())


def test_the_stopping_loss_is_a_line_where_there_is_one(ax):
    plots.loss_curve(LOSS, ax, threshold=0.2)
    (stop,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert set(stop.get_ydata()) == {0.2} and "stop below 0.2" in labels_of(ax)
    ax.clear()
    plots.loss_curve(LOSS, ax, threshold=None)
    assert len(ax.lines) == 1


def test_panels_of_edits_share_a_legend_that_names_lines_and_areas():
    with plots.paper_style():
        fig = draw("one_edit")
        shown = [text.get_text() for text in fig.legends[0].get_texts()]
        plt.close(fig)
    search = ["new target (NLL)", "essence (KL)", "size of the change", "total", "stop below 0.05"]
    assert shown == [*search, "before", "after"]


def test_token_labels_show_blanks_and_no_mathematics(ax):
    plots.top_tokens(TOKENS, ax, target=" Krela")
    labels = ax.get_yticklabels()
    assert [label.get_text()[0] for label in labels] == ["␣", "⏎", "␣", "␣"]
    assert labels[0].get_fontweight() == "bold" and labels[2].get_text() == r"␣\$x\$"
    assert len(labels[3].get_text()) == 30


def test_seconds_per_edit_are_medians_with_the_plain_loop_beside_them(ax):
    frame = timing_frame()
    plots.seconds_per_edit(frame, ax)
    (line,) = [line for line in ax.lines if line.get_label() == "miniworld-gpt2"]
    assert line.get_xdata().tolist() == [1, 8, 64]
    np.testing.assert_allclose(line.get_ydata(), [1.1 / 9, 1.1 / 13, 1.1 / 17])
    dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed, [1.1, 2.2])
    assert [text.get_text() for text in ax.texts] == ["17×", "17×"]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    with pytest.raises(ValueError, match="no rows of 'screen'"):
        plots.seconds_per_edit(frame, ax, what="screen")


def test_time_shares_add_up_to_the_whole(ax):
    plots.time_shares(shares_frame(), ax)
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert max(ends) == pytest.approx(1.0) and len(ax.patches) == 14
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["plain\n(1 edit)\n1.9 s", "replay\n(64 edits)\n0.11 s"]
    with pytest.raises(ValueError, match="at most 7 parts"):
        plots.time_shares(pd.concat([shares_frame(), shares_frame().assign(part="one more")]), ax)


def test_growth_is_the_mean_over_requests_not_over_batches(ax):
    frame = pd.DataFrame({"n": [64, 100], "items": [64, 36], "seconds_per_item": [1.0, 2.0]})
    frame["peak_memory"] = [2**31, 2**30]
    plots.cost_growth(frame, ax)
    (line,) = [line for line in ax.lines if line.get_label() == "mean so far"]
    np.testing.assert_allclose(line.get_ydata(), [1.0, 1.36])
    ax.clear()
    plots.cost_growth(frame, ax, y="peak_memory")
    (line,) = [line for line in ax.lines if line.get_label() == "highest so far"]
    assert line.get_ydata().tolist() == [2, 2] and ax.get_ylim()[0] == 0


def test_every_training_is_a_point_with_its_interval_and_the_line_is_their_mean(ax):
    plots.collapse_over(trainings_frame(), ax, x="opening", group="group")
    points_of = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert len(points_of) == 4 * 2 * 2 and len({line.get_xdata()[0] for line in points_of}) == 16
    hard = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in points_of if line.get_marker() == "D")
    counts = [8, 7, 7, 6, 6, 5, 1, 0]
    assert [y for _, y in hard] == pytest.approx([count / 8 for count in counts])
    colour = next(line.get_color() for line in points_of if line.get_marker() == "D")
    mean, *bars = [line for line in ax.lines if line.get_color() == colour and line.get_linestyle() == "-"]
    assert mean.get_ydata() == pytest.approx(np.reshape(counts, (4, 2)).mean(1) / 8)
    interval = stats.binomtest(7, 8).proportion_ci(method="wilson")
    assert bars[1].get_ydata() == pytest.approx([interval.low, interval.high])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.02", "0.1", "0.4"]


def test_medians_of_trainings_have_bars_over_their_middle_half(ax):
    plots.median_over(trainings_frame(), ax, "signed_denominator", "step", "group")
    points_of = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sorted({line.get_ydata()[0] for line in points_of}) == pytest.approx([0.5, 0.52, 0.6, 0.9])
    bars = [line.get_ydata() for line in ax.lines if line.get_linestyle() == "-" and len(set(line.get_xdata())) == 1]
    assert bars[0] == pytest.approx([-1.25, 2.25]) and len(bars) == 16


def test_a_training_with_several_values_of_a_kind_is_refused(ax):
    frame = trainings_values("recall")
    plots.value_over(frame, ax, "recall", "step", "group")
    with pytest.raises(ValueError, match="several rows of one step, seed and group"):
        plots.value_over(pd.concat([frame, frame.iloc[:1]]), ax, "recall", "step", "group")


def test_the_papers_settings_hold_inside_the_with_only():
    before = dict(mpl.rcParams)
    with plots.paper_style():
        assert mpl.rcParams["font.family"] == ["DejaVu Sans"] and mpl.rcParams["pdf.fonttype"] == 42
        assert mpl.rcParams["savefig.dpi"] == 300 and not mpl.rcParams["axes.spines.top"]
        assert mpl.rcParams["svg.hashsalt"] == "nbkit" and mpl.rcParams["figure.constrained_layout.use"]
    assert dict(mpl.rcParams) == before


def test_strips_stand_side_by_side_and_keep_their_place_where_a_group_is_missing():
    places = [(pd.Series([1.0, 2.0, 3.0]), pd.Series(["a", "b", "a"])), (pd.Series([math.inf]), pd.Series(["b"]))]
    styles = {"a": ("red", "o"), "b": ("blue", "s")}
    drawn = list(points.strips(places, styles, width=0.4, spread=0.1))
    assert [strip.middle for strip in drawn] == pytest.approx([-0.2, 0.2, 1.2])
    assert [strip.values.tolist() for strip in drawn] == [[1, 3], [2], [math.inf]]
    assert [strip.style for strip in drawn] == [styles["a"], styles["b"], styles["b"]]
    assert all((abs(strip.places - strip.middle) <= 0.1).all() for strip in drawn)
    again = points.strips(places, styles, width=0.4, spread=0.1)
    assert all((one.places == other.places).all() for one, other in zip(drawn, again, strict=True))


@pytest.mark.parametrize(("along", "marker"), [("x", ">"), ("y", "^")])
def test_the_edge_is_at_the_end_of_the_axis_of_the_values(ax, along, marker):
    edge = points.Edge(pd.Series([1.0, 2e6, math.nan, 5e5]), 1e6, along)
    edge.points(ax, np.arange(4), edge.values, ("red", "o"))
    (handle,) = edge.finish(ax)
    assert edge.position == 1e6 and handle.get_label() == "> $10^{6}$ or not finite (2 of 4)"
    shown, over = ([line.get_xdata(), line.get_ydata()] for line in ax.lines)
    values, places = (0, 1) if along == "x" else (1, 0)
    assert shown[values].tolist() == [1, 5e5] and shown[places].tolist() == [0, 3]
    assert over[values].tolist() == [1e6, 1e6] and over[places].tolist() == [1, 2]
    assert ax.lines[1].get_marker() == handle.get_marker() == marker
    limits = ax.get_xlim() if along == "x" else ax.get_ylim()
    assert limits[1] == pytest.approx(1.15e6)


def test_risks_are_drawn_one_point_a_request_and_the_chosen_one_is_named(ax):
    frame = risk_frame()
    plots.risk_distribution(frame, ax, chosen=1e9)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["chosen (1e+09)", "infinite or NaN (1 of 60)"]
    assert sum(len(line.get_xdata()) for line in ax.lines if line.get_ls() == "None") == 60
    (mark,) = [line for line in ax.lines if line.get_ls() == "-"]
    assert set(mark.get_xdata()) == {1e9} and ax.get_xlim()[1] > 1e9


def test_known_groups_look_alike_everywhere_and_no_two_groups_share_a_colour():
    assert style.group_styles(["hard", "normal"])["normal"] == style.group_styles(["normal", "x"])["normal"]
    many = style.group_styles(map(str, range(20)))
    assert len(set(many.values())) == 20
    looks = style.group_styles(["normal", "collapse", "a", "b", "c"])
    assert len({colour for colour, _ in looks.values()}) == 5


@pytest.mark.parametrize(
    ("function", "frame"),
    [(plots.perplexity_per_edit, single_frame()), (plots.denominators, single_frame()), (plots.top_tokens, TOKENS),
     (plots.sequential_curves, sequence_frame()), (plots.similarity_histogram, keys_frame()),
     (plots.risk_distribution, risk_frame()),
     (plots.seconds_per_edit, timing_frame()), (plots.time_shares, shares_frame()),
     (plots.cost_growth, growth_frame()),
     (lambda frame, ax: plots.collapse_over(frame, ax, group="group"), trainings_frame())],
)  # fmt: skip
def test_missing_columns_and_empty_frames_are_named(ax, function, frame):
    check_frame_of_a_plot(function, frame, ax)
