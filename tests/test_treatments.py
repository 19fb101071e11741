"""Treatments: each source makes the weights that the verbs make by hand, studies of them resume, errors name them."""

import numpy as np
import pandas as pd
import pytest
import torch

import nbkit
from nbkit import studies
from nbkit.edits.overlays import applied
from nbkit.edits.regularisers import accumulated, regularise
from nbkit.errors import MethodError
from nbkit.records import results
from nbkit.records.results import Store
from nbkit.studies import task_scores as task_scores_module
from nbkit.studies import treatments as treatments_module
from nbkit.studies.metrics import perplexity
from nbkit.studies.treatment_pool import FACTORS, KINDS, NOISES, SOURCES, pool_settings
from nbkit.studies.treatments import Treatment, edits_of, noise

FEW = {"layer": 1, "v_num_grad_steps": 2, "context_templates": ["{}", "The river runs. {}"]}
TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_kept", {})
    return Store(tmp_path / "results")


@pytest.fixture
def many(tiny, requests) -> dict[str, Treatment]:
    """A treatment of each way, and regularised ones."""
    keys = torch.randn(200, tiny.d_mlp, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = {"layers": [1], "second_moment": keys.T @ keys / 200, **{k: v for k, v in FEW.items() if k != "layer"}}
    single = Treatment("ROME", "single", "rome", (requests[0],), FEW)
    return {
        "single": single,
        "scaled": Treatment("ROME scaled", "single", "rome", (requests[0],), FEW, "scale", {"factor": 0.3}),
        "rect": Treatment("ROME with RECT", "single", "rome", (requests[0],), FEW, "rect", {"keep": 0.4}),
        "batch": Treatment("MEMIT batch", "batch", "memit", tuple(requests), together),
        "two": Treatment("ROME sequence", "sequence", "rome", tuple(requests[:2]), FEW),
        "three": Treatment("ROME sequence", "sequence", "rome", tuple(requests), FEW),
        "pruned": Treatment("PRUNE", "sequence", "rome", tuple(requests), FEW, "prune", {"function": "linear"}),
        "noise": Treatment("noise", "noise", relative_norm=0.5, seed=3),
    }


def weights_with(lm, edit) -> list[torch.Tensor]:
    with applied(lm, edit):
        return [lm.weight(layer).detach().clone() for layer in range(lm.n_layers)]


def test_each_treatment_makes_the_weights_that_are_made_by_hand(tiny, requests, many):
    single, of = nbkit.edit(tiny, requests[:1], progress=False, **FEW)[0], many["batch"]
    steps, in_sequence = [], {}
    for step in nbkit.edit_sequence(tiny, requests, progress=False, **FEW):
        steps.append(step.edit)
        in_sequence[len(steps)] = [tiny.weight(layer).detach().clone() for layer in range(tiny.n_layers)]
    by_hand = {
        "single": weights_with(tiny, single),
        "scaled": weights_with(tiny, regularise(single, tiny, "scale", factor=0.3)),
        "rect": weights_with(tiny, regularise(single, tiny, "rect", keep=0.4)),
        "batch": weights_with(tiny, nbkit.edit_batch(tiny, requests, "memit", progress=False, **of.settings)),
        "two": in_sequence[2],
        "three": in_sequence[3],
        "pruned": weights_with(tiny, regularise(accumulated(steps), tiny, "prune", function="linear")),
        "noise": weights_with(tiny, noise(tiny, 0.5, seed=3)),
    }
    before = tiny.hash
    for name, edit in zip(many, edits_of(tiny, list(many.values()), progress=False), strict=True):
        for found, expected in zip(weights_with(tiny, edit), by_hand[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=name)
    assert tiny.hash == before


def test_noise_has_its_norm_in_every_layer_and_its_seed(lm):
    edit = noise(lm, 0.5, seed=3)
    assert list(edit.deltas) == [lm.weight_name(layer) for layer in range(lm.n_layers)]
    for name, delta in edit.deltas.items():
        assert delta.norm() == pytest.approx(0.5 * float(lm.model.get_parameter(name).norm()), rel=1e-5)
    again, other = noise(lm, 0.5, seed=3), noise(lm, 0.5, seed=4)
    name = lm.weight_name(0)
    assert torch.equal(edit.deltas[name].dense(), again.deltas[name].dense())
    assert not torch.allclose(edit.deltas[name].dense(), other.deltas[name].dense())


def test_what_treatments_share_is_computed_once(tiny, many, monkeypatch):
    calls = []
    for verb in ("edit", "edit_sequence"):
        real = getattr(treatments_module, verb)
        monkeypatch.setattr(treatments_module, verb, lambda *given, real=real, **named: calls.append(given[1])
                            or real(*given, **named))  # fmt: skip
    made = {}
    edits_of(tiny, list(many.values()), made, progress=False)
    assert sorted(map(len, calls)) == [1, 3], "one edit for three treatments, one sequence for three"
    edits_of(tiny, list(many.values()), made, progress=False)
    assert len(calls) == 2


def test_studies_measure_each_treated_model_and_compute_only_what_is_missing(tiny, many, store, monkeypatch):
    def task_scores(lm, names, limit=None, include_path=None, all_metrics=False):
        scored.append(1)
        score = float(lm.weight(1).abs().sum())
        return pd.DataFrame([{"task": name, "metric": "acc", "score": score, "choice": True} for name in names])

    scored, computed, real = [], [], edits_of
    monkeypatch.setattr(task_scores_module, "task_scores", task_scores)
    monkeypatch.setattr("nbkit.studies.surrogate.edits_of", lambda lm, some, made: computed.extend(some)
                        or real(lm, some, made, progress=False))  # fmt: skip
    chosen = list(many.values())
    edits = edits_of(tiny, chosen, progress=False)
    first = studies.treated_perplexity(tiny, chosen[:5], TEXTS, store)
    assert len(computed) == 5
    rows = studies.treated_perplexity(tiny, chosen, TEXTS, store)
    assert [one.source for one in computed[5:]] == ["ROME sequence", "PRUNE", "noise"]
    np.testing.assert_allclose(rows["perplexity"], perplexity(tiny, TEXTS, edits=edits), rtol=1e-9)
    assert rows["perplexity_before"].unique() == [perplexity(tiny, TEXTS)]
    pd.testing.assert_series_equal(first["perplexity"], rows["perplexity"][:5])
    assert rows["source"].tolist() == [one.source for one in chosen] and rows["place"].tolist() == list(range(8))

    scores = studies.treated_scores(tiny, chosen[:3], ["nli", "ner"], store=store)
    assert scores["place"].tolist() == [-1, -1, 0, 0, 1, 1, 2, 2] and len(scored) == 4
    assert scores["edited"].tolist() == [False] * 2 + [True] * 6
    more = studies.treated_scores(tiny, chosen[1:4], ["nli", "ner"], store=store)
    assert len(scored) == 5 and more["source"].tolist()[2::2] == [one.source for one in chosen[1:4]]
    expected = [float(weights[1].abs().sum()) for weights in (weights_with(tiny, edit) for edit in edits[1:4])]
    np.testing.assert_allclose(more["score"][2::2], expected, rtol=1e-9)
    renamed = [Treatment("other name", one.way, one.method, one.requests, one.settings) for one in chosen[:1]]
    again = studies.treated_scores(tiny, renamed, ["nli", "ner"], store=store)
    assert len(scored) == 5 and again["source"].tolist()[2:] == ["other name"] * 2


def test_a_treatment_that_cannot_be_made_names_its_source(tiny, requests, store, monkeypatch):
    deep = Treatment("ROME too deep", "single", "rome", (requests[0],), {**FEW, "layer": 99})
    with pytest.raises(MethodError, match="ROME too deep: layer 99 does not exist"):
        edits_of(tiny, [deep], progress=False)
    with pytest.raises(MethodError, match="ROME too deep: layer 99 does not exist"):
        studies.treated_perplexity(tiny, [deep], TEXTS, store)
    with pytest.raises(MethodError, match="two at once: a single takes one request, not 3"):
        Treatment("two at once", "single", "rome", tuple(requests))
    with pytest.raises(MethodError, match="wide: unknown regulariser 'rekt'"):
        edits_of(tiny, [Treatment("wide", "noise", relative_norm=0.1, regulariser="rekt")], progress=False)
    monkeypatch.setattr(treatments_module, "noise", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        edits_of(tiny, [Treatment("hiss", "noise", relative_norm=0.1)], progress=False)
    assert caught.value.__notes__ == ["while the treatment 'hiss' was made"]


def test_a_pool_is_drawn_source_by_source_and_looks_at_nothing(requests):
    lm = nbkit.load("miniworld-gpt2")
    some = nbkit.read_requests("miniworld", limit=12, seed=1)
    everything = studies.pool(lm, some, n_each=8, n_edits=6, layers=[3])
    assert {one.source for one in everything} == set(SOURCES) == set(KINDS)
    of = {source: [one for one in everything if one.source == source] for source in SOURCES}
    assert {source: len(each) for source, each in of.items()} == {
        source: 24 if source == "noise" or source.endswith("scaled") else 8 for source in SOURCES
    }
    alone = studies.pool(lm, some, n_each=8, n_edits=6, layers=[3], sources=["ROME sequence", "noise"])
    assert [one.key for one in alone] == [one.key for one in of["ROME sequence"] + of["noise"]]
    assert [one.requests for one in of["ROME"]] == [one.requests for one in of["KN"]]
    assert [one.draw for one in of["ROME scaled"][::3]] == [one.draw for one in of["ROME"]]
    assert {one.settings.get("layer") for one in of["ROME"]} == {None, 3}
    assert all(FACTORS[0] <= one.arguments["factor"] <= FACTORS[1] for one in of["ROME scaled"])
    assert all(NOISES[0] <= one.relative_norm <= NOISES[1] for one in of["noise"])
    assert len({one.draw for one in of["ROME sequence"]}) == 2, "two sequences, four stops each"
    assert all(2 <= len(one.requests) <= 6 for one in of["MEMIT batch"])
    other = studies.pool(lm, some, n_each=8, n_edits=6, layers=[3], seed=1)
    assert {one.key for one in other if one.way == "noise"}.isdisjoint(one.key for one in of["noise"])


def test_a_pool_leaves_out_what_the_model_cannot_have_and_refuses_what_is_unknown(tiny, requests):
    with pytest.raises(MethodError, match="source must be one of .*did you mean 'ROME'"):
        studies.pool(tiny, requests, n_each=2, n_edits=2, sources=["ROMW"])
    with pytest.raises(MethodError, match="n_each must be a whole number from 1 on and up to 3"):
        studies.pool(tiny, requests, n_each=4, n_edits=2)
    found = studies.pool(tiny, requests, n_each=2, n_edits=2, sources=["MEND", "noise"])
    assert [one.source for one in found] == ["noise"] * 6


def test_settings_of_a_pool_have_second_moments_for_all_its_layers(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    hparams = {"memit": {"layers": [1]}, "rome": {"layer": 1}}
    given = pool_settings(tiny, ["MEMIT", "noise"], [2], hparams, tmp_path / "texts.txt", 40)
    assert sorted(given["memit"]["second_moment"]) == [1, 2] and given["rome"] == {"layer": 1}
    assert hparams == {"memit": {"layers": [1]}, "rome": {"layer": 1}}
