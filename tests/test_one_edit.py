"""One edit and all it did: the numbers are those of the verbs and metrics by themselves."""

import numpy as np
import pytest
import torch

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError, ModelError
from nbkit.keys.extract import token_keys
from nbkit.records.requests import EditRequest
from nbkit.studies.one_edit import N_STEPS

REQUEST = EditRequest(
    prompt="{} plays the",
    subject="Ann",
    target_new="drum",
    target_true="harp",
    case_id=7,
    paraphrase_prompts=("In Krela Ann plays the",),
    neighborhood_prompts=("Danielle plays the", "You play the"),
    neighborhood_targets=("harp", "harp"),
    generation_prompts=("Ann was born in",),
)
OPTIONS = {"layer": 1, "v_num_grad_steps": 3, "context_templates": ["{}", "I. {}"], "max_tokens": 4}


def test_the_numbers_are_those_of_the_verbs(lm, texts):
    before = lm.hash
    found = nbkit.one_edit(lm, REQUEST, texts, **OPTIONS)
    templates = OPTIONS["context_templates"]
    [edit] = nbkit.edit(lm, [REQUEST], layer=1, v_num_grad_steps=3, context_templates=templates)
    assert found.edit.norm() == edit.norm() and lm.hash == before
    assert found.perplexity["unedited"] == found.perplexity["before"] == nbkit.perplexity(lm, texts)
    with nbkit.applied(lm, edit):
        assert found.perplexity["after"] == nbkit.perplexity(lm, texts)
        metrics = nbkit.edit_metrics(lm, [REQUEST]).iloc[0]
    at_prompt = found.answers.iloc[0]
    assert at_prompt["probability_after"] == pytest.approx(metrics["target_probability"], rel=1e-5)
    assert found.metrics.loc["after", "efficacy"] == metrics["efficacy"]
    assert (at_prompt["rank_after"] == 1) == (metrics["efficacy_argmax"] == 1)
    assert found.answers["role"].value_counts()["neighbour"] == 2
    assert list(found.said["prompt"]) == [REQUEST.text, "Ann was born in"]
    assert found.ratio == found.perplexity["after"] / found.perplexity["before"]


def test_what_ordinary_keys_feel_is_taken_over_the_keys_themselves(tiny, texts):
    found = nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS)
    (row,) = found.weights.to_dict("records")
    keys = torch.cat(token_keys(tiny, texts, 1)).double()
    delta = found.edit.deltas[tiny.weight_name(1)].dense().double()
    for of, matrix in (("felt", delta), ("of_output", tiny.oriented(tiny.weight_name(1)).double())):
        assert row[of] == pytest.approx((keys @ matrix.T).square().sum(1).mean().sqrt().item(), rel=1e-6)


def test_before_is_the_model_with_what_it_carries(tiny, texts):
    weight = tiny.weight_name(0)
    tiny.apply(Edit({weight: Dense(torch.linspace(-0.1, 0.1, 32 * 48, dtype=torch.float64).view(32, 48))}))
    carried = nbkit.perplexity(tiny, texts)
    found = nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS)
    assert found.n_before == 1 and found.perplexity["before"] == carried != found.perplexity["unedited"]
    tiny.undo()
    assert nbkit.perplexity(tiny, texts) == found.perplexity["unedited"]


def test_a_regulariser_is_looked_at_with_the_edit(tiny, texts):
    whole = nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS)
    found = nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS, regulariser="scale", regulariser_arguments={"factor": 0.5})
    assert found.edit.norm() == pytest.approx(0.5 * whole.edit.norm())


def test_no_numbers_are_no_first_rank(tiny, texts, monkeypatch):
    broken = Edit({tiny.weight_name(1): Dense(torch.full((32, 48), np.nan, dtype=torch.float64))}, (REQUEST,), "rome")
    monkeypatch.setattr("nbkit.studies.one_edit.edits_of", lambda *_, **__: [broken])
    found = nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS)
    assert found.answers["rank_after"].isna().all() and found.answers["says_after"].isna().all()
    assert found.collapsed() and found.ratio == np.inf


def test_what_a_step_raises_ends_the_work_and_leaves_the_model(tiny, texts):
    before, told = tiny.hash, []

    def step(n_done, n_total):
        told.append((n_done, n_total))
        if n_done == 2:
            raise MethodError("enough")

    with pytest.raises(MethodError, match="enough"):
        nbkit.one_edit(tiny, REQUEST, texts, **OPTIONS, step=step)
    assert told == [(0, N_STEPS), (1, N_STEPS), (2, N_STEPS)] and tiny.hash == before


def test_a_sweep_is_an_edit_into_each_layer(tiny, texts):
    options = {"v_num_grad_steps": 2, "context_templates": ["{}"]}
    rows = list(nbkit.layer_sweep(tiny, REQUEST, texts, [2, 0], **options))
    assert [row["layer"] for row in rows] == [2, 0]
    [edit] = nbkit.edit(tiny, [REQUEST], layer=0, **options)
    assert rows[1]["update_norm"] == edit.norm()
    assert rows[1]["perplexity"] == pytest.approx(nbkit.perplexity(tiny, texts, edits=[edit])[0])


def test_a_sweep_that_is_left_leaves_the_model(tiny, texts):
    before = tiny.hash
    for _ in nbkit.layer_sweep(tiny, REQUEST, texts, v_num_grad_steps=2, context_templates=["{}"]):
        break
    assert tiny.hash == before and nbkit.perplexity(tiny, texts) > 0


def test_a_sweep_refuses_at_once(tiny, texts):
    with pytest.raises(ModelError, match="layer 9"):
        nbkit.layer_sweep(tiny, REQUEST, texts, [0, 9])
    with pytest.raises(MethodError, match="given no layer"):
        nbkit.layer_sweep(tiny, REQUEST, texts, method="kn")
