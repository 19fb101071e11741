"""The statistics of perplexity as a surrogate, each against a plain computation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records import ability, correlation, selection, thresholds
from nbkit.studies.task_scores import task_names, task_texts


def candidates(n: int = 300) -> pd.DataFrame:
    random = np.random.default_rng(0)
    perplexity = 4 * np.exp(random.gamma(0.5, 1.5, n))
    perplexity[:3] = [math.inf, math.nan, 3.9]
    source = random.choice(["FT", "ROME", "noise"], n, p=[0.6, 0.3, 0.1])
    draw = [str(i // 3) for i in range(n)]
    return pd.DataFrame({"perplexity": perplexity, "perplexity_before": 4.0, "source": source, "draw": draw})


def test_bins_count_nan_and_infinity_as_the_worst():
    rows = pd.DataFrame({"perplexity": [1.0, 4.4, 40, math.inf, math.nan], "perplexity_before": 4.0})
    assert selection.bins(rows, [1.1, 10]).tolist() == [
        "below 1.1", "1.1 to 10", "10 and more", "10 and more", "10 and more"
    ]  # fmt: skip
    for edges in ([2, 1], [1, 1], [], ["1"]):
        with pytest.raises(ResultsError, match="edges of bins"):
            selection.bins(rows, edges)


def test_models_are_drawn_evenly_from_bins_and_sources_and_never_twice_of_one_draw():
    rows = candidates()
    places = selection.stratified(rows, 50, seed=1)
    assert len(places) == 50 == rows["draw"].iloc[places].nunique() and places == sorted(places)
    assert places == selection.stratified(rows.assign(score=0.0), 50, seed=1)
    assert places != selection.stratified(rows, 50, seed=2)
    table = selection.selected(rows, places)
    full = table["candidates"] >= 20
    assert full.sum() >= 5 and table["selected"][full].between(5, 6).all() and table["candidates"].sum() == 300
    of_bin = selection.bins(rows).iloc[places]
    first = rows.iloc[places][of_bin == "below 1.05"]["source"].value_counts()
    assert first.max() <= 2, "sources take turns, though two thirds of the candidates are of one"


def test_a_bin_does_not_make_up_for_all_that_others_lack():
    rows = candidates(30)
    assert selection.stratified(rows.assign(draw=range(30)), 300) == list(range(30))
    assert len(selection.stratified(rows, 300)) == rows["draw"].nunique()
    whole = rows.assign(perplexity=[4.0] * 29 + [40], draw=range(30))
    assert selection.selected(whole, selection.stratified(whole, 20))["selected"].tolist() == [4, *[0] * 7, 1, 0]


def scores() -> pd.DataFrame:
    """An unedited model and two others; nli is chosen among two, ner is written, guessing is at chance."""
    rows = []
    for place, (nli, ner, guess) in {-1: (0.9, 0.8, 0.5), 0: (0.7, 0.6, 0.9), 1: (0.45, 0.0, 0.1)}.items():
        for task, score, choice, chance in (("nli", nli, True, 0.5), ("ner", ner, False, 0.3),
                                            ("guess", guess, True, 0.5)):  # fmt: skip
            rows.append({"place": place, "edited": place >= 0, "task": task, "score": score, "stderr": 0.05,
                         "chance": chance, "choice": choice, "source": f"s{place}", "ratio": 1.0 + place})  # fmt: skip
    return pd.DataFrame(rows)


def test_ability_is_the_score_above_the_floor_over_the_unedited_models():
    kept = ability.retained(scores())
    of = kept.set_index(["place", "task"])["retained"]
    assert of[0, "nli"] == pytest.approx((0.7 - 0.5) / 0.4) and of[1, "nli"] == pytest.approx(-0.05 / 0.4)
    assert of[0, "ner"] == pytest.approx(0.6 / 0.8) and of[1, "ner"] == 0 and of[-1, "ner"] == 1
    assert kept[kept["task"] == "guess"]["retained"].isna().all()
    models = ability.abilities(kept)
    np.testing.assert_allclose(models["ability"], [(0.5 + 0.75) / 2, -0.125 / 2])
    np.testing.assert_allclose(models["worst"], [0.5, -0.125])
    assert models["worst_task"].tolist() == ["nli", "nli"] and models["source"].tolist() == ["s0", "s1"]
    assert models["n_tasks"].tolist() == [2, 2] and models["ratio"].tolist() == [1, 2]


def test_ability_needs_the_unedited_model_and_a_task_that_it_can_do():
    with pytest.raises(ResultsError, match="relative to the unedited model.*guess, ner, nli"):
        ability.retained(scores().query("edited"))
    with pytest.raises(ResultsError, match="no task that the unedited model does better"):
        ability.abilities(ability.retained(scores().query("task == 'guess'")))


def test_misjudged_models_are_those_far_from_what_perplexity_lets_expect():
    ratio = np.linspace(1, 20, 20)
    models = pd.DataFrame({"ratio": ratio, "ability": 1 - ratio / 20, "source": "usual"})
    models.loc[2, ["ability", "source"]] = 0.1, "lost unseen"
    models.loc[19, ["ratio", "ability", "source"]] = math.inf, 0.9, "kept unseen"
    found = ability.misjudged(models, 1)
    assert found["source"].tolist() == ["lost unseen", "kept unseen"]
    assert (found["missed"] == found["ability"] - found["expected"]).all()
    assert len(ability.misjudged(models[:3], 5)) == 3


def test_the_best_threshold_is_the_one_of_a_plain_search():
    random = np.random.default_rng(0)
    for n in (6, 20, 51):
        ratio = np.exp(random.normal(size=n)).round(1) + 0.1
        lost = random.random(n) < ratio / (1 + ratio)
        lost[0], lost[1] = True, False
        quality = {t: (ratio[lost] >= t).mean() - (ratio[~lost] >= t).mean() for t in [*ratio, math.inf]}
        found = thresholds.best_threshold(ratio, lost)
        assert (ratio[lost] >= found).mean() - (ratio[~lost] >= found).mean() == pytest.approx(max(quality.values()))
    assert thresholds.best_threshold([1, 4, math.inf], [False, True, True]) == pytest.approx(2)
    assert thresholds.best_threshold([3, 1], [False, True]) == math.inf
    assert math.isnan(thresholds.best_threshold([1, 2], [True, True]))


def test_a_threshold_is_tried_on_the_other_half():
    ratio = np.exp(np.random.default_rng(1).normal(size=60))
    ratio[0] = math.nan
    clear = thresholds.halves(ratio, ~(ratio < 1), seed=3, n_splits=50)
    assert (clear["lost"] + clear["kept"]).unique().tolist() == [30]
    assert clear["found"].mean() > 0.9 and clear["false_alarms"].mean() < 0.1
    assert ((clear["found_low"] <= clear["found"]) & (clear["found"] <= clear["found_high"])).all()
    summary = thresholds.over_splits(clear)
    assert summary.loc["threshold", "low"] <= summary.loc["threshold", "median"] <= summary.loc["threshold", "high"]
    noise = thresholds.halves(ratio, np.random.default_rng(0).random(60) < 0.5, seed=3, n_splits=200)
    assert abs(noise["found"].mean() - noise["false_alarms"].mean()) < 0.15, "chosen and tried on the same it is not"
    pd.testing.assert_frame_equal(clear, thresholds.halves(ratio, ~(ratio < 1), seed=3, n_splits=50))
    assert thresholds.halves(ratio, ratio > 1e9).empty


def test_texts_are_compared_by_rank_on_the_same_resamples():
    random = np.random.default_rng(0)
    score = random.normal(size=80)
    near = np.exp(-score + 0.3 * random.normal(size=80))
    values = pd.DataFrame({"far": np.exp(-score + 2 * random.normal(size=80)), "near": near})
    values.loc[0, "near"], score[1] = math.nan, math.nan
    found = correlation.compared(values, score).set_index("text")
    used = values.drop(index=1).fillna(math.inf)
    for name in values:
        assert found.loc[name, "rho"] == pytest.approx(stats.spearmanr(used[name], score[~np.isnan(score)]).statistic)
        single = correlation.spearman(values[name], score)
        np.testing.assert_allclose(found.loc[name, ["low", "high"]].astype(float), single[1:3], atol=0.03)
    assert found.loc["near", "agreement"] == pytest.approx(stats.spearmanr(used["near"], used["far"]).statistic)
    assert found.loc["near", "difference"] == pytest.approx(found.loc["near", "rho"] - found.loc["far", "rho"])
    assert found.loc["near", "difference_high"] < 0 and (found["n"] == 79).all()
    assert found.loc["far", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert math.isnan(correlation.compared(values[:2], [1.0, 2.0])["low"][0])


def test_the_texts_of_tasks_are_prompts_of_all_of_them():
    texts = task_texts(20, seed=1)
    assert len(texts) == len(set(texts)) == 20 and texts == task_texts(20, seed=1) != task_texts(20, seed=2)
    assert len(task_names()) == 10 and sum(text.startswith("premise:") for text in texts) == 2
    assert all(text.startswith("review:") for text in task_texts(5, ["sentiment"]))
