"""NAS: v* brought to a norm, equal to the plain formula on every architecture; and that norm, as measured."""

import numpy as np
import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError
from nbkit.methods import mean_value_norm
from nbkit.methods.verbs import edit, edit_batch
from nbkit.plain import memit as plain_memit
from nbkit.plain import rome as plain_rome
from nbkit.records.requests import EditRequest

LAYER, LAYERS = 1, [0, 1]
SEARCH = {"v_num_grad_steps": 4, "v_lr": 0.1, "clamp_norm_factor": 4.0}
PLAIN = {"lr": 0.1, "steps": 4, "weight_decay": 0.5, "clamp": 4.0, "kl_factor": 0.0625, "early_stop": 0.05}


def relative_error(found, expected) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def plain_values(lm, request, site: str, contexts=("{}",)) -> tuple[torch.Tensor, torch.Tensor]:
    """v, what the projection says at the plain prompt, and the δ of the search at this site."""
    module = lm.projection(LAYER) if site == "projection" else lm.block(LAYER)
    told = plain_rome.tokenized(lm.tokenizer, request.prompt, request.subject, request.target_new, list(contexts))
    texts, ends, target = told
    v, start = (plain_rome.run(lm.model, each, texts[0])[2][ends[0] - 1] for each in (lm.projection(LAYER), module))
    star, _ = plain_rome.search(lm.model, module, texts, ends, target, start, plain_rome.SearchOptions(**PLAIN))
    return v, star - start


@pytest.mark.parametrize("of_the_norm", [0.3, 0.9], ids=["given up", "scaled"])
def test_a_value_of_rome_is_brought_to_the_norm_or_given_up(lm, requests, contexts, tolerance, of_the_norm):
    request, tolerance = requests[2], 100 * tolerance
    v, delta = plain_values(lm, request, "projection", contexts)
    norm = of_the_norm * float((v + delta).norm())
    options = {"layer": LAYER, "context_templates": contexts, "early_stop_loss": 0.05, **SEARCH}
    (plain,) = edit(lm, request, **options)
    (found,) = edit(lm, request, value_norm=norm, **options)
    if of_the_norm < 0.5:
        assert found.info["numerator"] < tolerance * plain.info["numerator"]
        return
    star = (v + delta) * norm / (v + delta).norm()
    assert relative_error(found.info["value_star"], star) < tolerance
    u, k = plain.info["u"], plain.info["key_plain"]
    expected = torch.outer((star - v).to(u), u) / (k @ u)
    assert relative_error(found.deltas[lm.weight_name(LAYER)].dense(), expected) < tolerance
    assert found.info["losses"] == plain.info["losses"], "the search is the same"


def test_the_values_of_memit_s_relatives_are_those_of_the_last_projection(lm, requests, contexts, tolerance):
    moments = {layer: torch.eye(lm.d_mlp, dtype=torch.float64) for layer in LAYERS}
    norms = sorted(float(sum(plain_values(lm, request, "block", contexts)).norm()) for request in requests)
    norm = sum(norms[-2:]) / 4  # the largest is given up, the others are not
    options = {"layers": LAYERS, "second_moment_weight": 3.0, "v_weight_decay": 0.5, "value_norm": norm, **SEARCH}
    found = edit_batch(lm, requests, "memit", contexts, moments, **options)

    def update(K, R, layer):
        return plain_memit.memit_update(K, R, moments[layer].to(K.dtype), 3.0)

    expected = plain_memit.memit(lm, requests, LAYERS, contexts, update, value_norm=norm, **PLAIN)
    for layer in LAYERS:
        error = relative_error(found.deltas[lm.weight_name(layer)].dense(), expected[layer])
        assert error < max(1000 * tolerance, 1e-8), layer


@pytest.mark.parametrize(("method", "site"), [("rome", "projection"), ("alphaedit", "block")])
def test_the_mean_norm_is_of_the_unedited_model_without_the_largest(lm, requests, tolerance, method, site):
    options = {"layer": LAYER} if method == "rome" else {"layers": LAYERS}
    options |= {"v_weight_decay": 0.5, **SEARCH}
    norms = sorted(float(sum(plain_values(lm, request, site)).norm()) for request in requests)
    assert mean_value_norm(lm, requests, method, **options) == pytest.approx(np.mean(norms), rel=100 * tolerance)
    noise = torch.randn(lm.d_model, lm.d_mlp, generator=torch.Generator().manual_seed(0)).to(lm.dtype)
    with applied(lm, Edit({lm.weight_name(0): Dense(noise)})):
        found = mean_value_norm(lm, requests, method, value_norm=7.0, **options)
    assert found == pytest.approx(np.mean(norms), rel=100 * tolerance)


def test_of_twenty_norms_the_largest_is_left_out(tiny, requests):
    subjects = ["Vouda", "Ann", "Krela", "Sennifar", "Danielle Darrieux"]
    prompts = ["{} is located in", "{} plays the", "Therefore {} is", "The mother tongue of {} is"]
    many = [EditRequest(prompt, subject, "drum") for prompt in prompts for subject in subjects]
    norms = sorted(mean_value_norm(tiny, one, "rome", layer=LAYER, **SEARCH) for one in many)
    found = mean_value_norm(tiny, many, "rome", layer=LAYER, progress=False, **SEARCH)
    assert len(norms) == 20 and found == pytest.approx(np.mean(norms[:-1]))
    assert found != pytest.approx(np.mean(norms))


def test_what_it_refuses(tiny, requests):
    with pytest.raises(MethodError, match="ft searches for no value"):
        mean_value_norm(tiny, requests, "ft", layers=[1])
    with pytest.raises(MethodError, match="needs at least one request"):
        mean_value_norm(tiny, [], "rome", layer=1)
    with pytest.raises(MethodError, match="value_norm must be a number from 0 on"):
        edit(tiny, requests, layer=1, value_norm=-1.0)
    with torch.no_grad():
        tiny.weight(2)[0, 0] = torch.nan
    with pytest.raises(MethodError, match="ends in no number for 3 of 3 requests"):
        mean_value_norm(tiny, requests, "rome", layer=1, **SEARCH)
