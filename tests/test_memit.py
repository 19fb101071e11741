"""MEMIT, EMMET, AlphaEdit, ENCORE: equal to their papers' formulae on every architecture, and to published numbers."""

import json

import numpy as np
import pytest
import torch

from nbkit.edits.overlays import applied
from nbkit.errors import MethodError
from nbkit.keys.solving import SecondMoments
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.memit import right_factor
from nbkit.methods.verbs import edit, edit_batch, edit_sequence
from nbkit.models.loading import load
from nbkit.plain import memit as plain_memit
from nbkit.records.requests import EditRequest

LAYERS = [0, 1]
SHORT = {"layers": LAYERS, "v_num_grad_steps": 4, "v_lr": 0.1, "clamp_norm_factor": 4.0}
SEARCH = {"lr": 0.1, "steps": 4, "weight_decay": 0.5, "clamp": 4.0, "kl_factor": 0.0625, "early_stop": 0.05}
RELATIVES = ["memit", "emmet", "alphaedit", "encore"]


def relative_error(found, expected) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def moments(lm):
    """A second moment a layer, half of whose eigenvalues are small."""
    return {layer: made_up(lm.d_mlp, layer) for layer in range(lm.n_layers)}


def made_up(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    values = torch.cat([torch.linspace(0.001, 0.01, d // 2), torch.linspace(0.1, 2, d - d // 2)]).double()
    return basis * values @ basis.T


OPTIONS = {
    "memit": {"second_moment_weight": 3.0},
    "emmet": {"second_moment_weight": 1.0, "ridge": 0.1},
    "alphaedit": {"nullspace_threshold": 0.02, "norm_weight": 0.5},
    "encore": {"second_moment_weight": 3.0, "norm_weight": 0.5, "stop_after_first_choice": 2},
}


def reference_update(method, moments, earlier=None):
    def update(K, R, layer):
        C = moments[layer].to(K.dtype)
        K_p = None if earlier is None else earlier[layer]
        if method == "memit":
            return plain_memit.memit_update(K, R, C, 3.0, K_p)
        if method == "encore":
            return plain_memit.memit_update(K, R, C, 3.0, K_p, norm_weight=0.5)
        if method == "emmet":
            return plain_memit.emmet_update(K, R, C, 0.1)
        return plain_memit.alphaedit_update(K, R, C, 0.02, 0.5, K_p)

    return update


@pytest.mark.parametrize("method", RELATIVES)
def test_a_batch_equals_the_plain_formula(lm, requests, contexts, moments, tolerance, method):
    found = edit_batch(lm, requests, method, contexts, moments, **SHORT, **OPTIONS[method])
    search = SEARCH | ({"first_choices": 2} if method == "encore" else {})
    expected = plain_memit.memit(lm, requests, LAYERS, contexts, reference_update(method, moments), **search)
    assert found.method == method and found.requests == tuple(requests)
    for layer in LAYERS:
        error = relative_error(found.deltas[lm.weight_name(layer)].dense(), expected[layer])
        assert error < max(1000 * tolerance, 1e-8), layer


def test_the_search_of_encore_stops_in_a_batch_as_in_the_plain_formula(lm, contexts, moments, tolerance):
    """With subjects at the prompts' ends, where a random model comes to say the target."""
    requests = [EditRequest("Therefore {}", "Ann", "drum"), EditRequest("The river runs through {}", "Vouda", "harp")]
    search = {"v_lr": 0.5, "v_num_grad_steps": 12, "v_weight_decay": 0.0, "clamp_norm_factor": 100.0, "kl_factor": 0.0}
    found = edit_batch(lm, requests, "encore", contexts[:2], moments, layers=LAYERS, **search, **OPTIONS["encore"])
    plain = {"lr": 0.5, "steps": 12, "weight_decay": 0.0, "clamp": 100.0, "kl_factor": 0.0, "first_choices": 2}
    expected = plain_memit.memit(lm, requests, LAYERS, contexts[:2], reference_update("encore", moments), **plain)
    assert "first choice" in found.info["stop_reason"]
    for layer in LAYERS:
        error = relative_error(found.deltas[lm.weight_name(layer)].dense(), expected[layer])
        assert error < max(1000 * tolerance, 1e-8), layer


@pytest.mark.parametrize("method", RELATIVES)
def test_an_edit_is_a_batch_of_one_and_changes_what_the_model_says(lm, requests, contexts, moments, method):
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    options = {**SHORT, **OPTIONS[method], "v_lr": 0.5, "v_num_grad_steps": 8}
    if method == "alphaedit":
        options["norm_weight"] = 0.01
    edits = edit(lm, requests, method, contexts, moments, **options)
    for request, found in zip(requests, edits, strict=True):
        alone = edit_batch(lm, request, method, contexts, moments, **options)
        for layer in LAYERS:
            one, other = (e.deltas[lm.weight_name(layer)].dense() for e in (found, alone))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
        losses = found.info["losses"]
        assert losses[-1][1] < losses[0][1]
        with applied(lm, found):
            changed = {n for n, weight in lm.model.named_parameters() if not torch.equal(weight, before[n])}
            assert changed == {lm.weight_name(layer) for layer in LAYERS}
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())


def test_the_stream_behind_the_last_layer_comes_close_to_z(tiny, requests, contexts):
    """With nearly no bound on the update, each layer does its share, and the last one does the rest."""
    moments = {layer: torch.eye(tiny.d_mlp, dtype=torch.float64) for layer in LAYERS}
    options = {**SHORT, "second_moment_weight": 1e-9}
    found = edit_batch(tiny, requests, "memit", ["{}"], moments, **options)
    from nbkit.methods.memit import states_behind

    before = (found.info["z"] - states_behind(tiny, requests, LAYERS[-1])).norm()
    with applied(tiny, found):
        assert (found.info["z"] - states_behind(tiny, requests, LAYERS[-1])).norm() < 1e-6 * before


def test_emmet_without_ridge_fulfils_every_request_and_says_when_it_cannot(tiny, requests, contexts):
    moments = {1: made_up(tiny.d_mlp, 0)}
    options = {**SHORT, "layers": [1], "ridge": 0.0}
    found = edit_batch(tiny, requests, "emmet", contexts, moments, **options)
    K = found.info["keys_1"].T
    residual = found.deltas[tiny.weight_name(1)].dense() @ K
    from nbkit.methods.memit import states_behind

    expected = (found.info["z"] - states_behind(tiny, requests, 1)).T
    assert relative_error(residual, expected) < 1e-8
    with pytest.raises(MethodError, match="not independent, so ridge must be above 0"):
        edit_batch(tiny, [requests[0], requests[0]], "emmet", contexts, moments, **options)


def test_keys_of_a_broken_model_give_a_factor_that_says_so(tiny):
    generator, C = torch.Generator().manual_seed(0), made_up(tiny.d_mlp, 0)
    key = torch.randn(2, tiny.d_mlp, dtype=torch.float64, generator=generator)
    moments, huge = SecondMoments({1: C}, tiny), 1e9 * torch.ones(2, tiny.d_mlp, dtype=torch.float64)

    def factor_of(key, earlier=(), moments=moments, **changes):
        return right_factor(key, earlier, moments, 1, hyper_parameters(tiny, "memit", **SHORT, **changes))

    for broken in (key / 0, torch.zeros_like(key[:1])):
        assert factor_of(broken, ridge=0.0, second_moment_weight=3.0).isnan().all()
    assert factor_of(key, [key / 0], second_moment_weight=3.0).isnan().all()
    assert factor_of(key, [huge], second_moment_weight=1e-3).isnan().all(), "float64 has not digits enough for both"
    with pytest.raises(MethodError, match="needs more tokens"):
        factor_of(key, [key], SecondMoments({1: key.T @ key}, tiny), second_moment_weight=3.0)
    assert factor_of(huge, second_moment_weight=3.0).isnan().all()


def test_emmet_has_its_ridge_for_several_requests_only(tiny, requests, contexts):
    """As released: one request's constraint holds exactly, whatever ridge and the weight of C are; not so a batch's."""
    moments, options = {1: made_up(tiny.d_mlp, 0)}, {**SHORT, "layers": [1]}

    def update(some, **changes):
        return edit_batch(tiny, some, "emmet", contexts, moments, **options, **changes).deltas[tiny.weight_name(1)]

    def expected(K, R, layer):
        return R @ torch.linalg.inv(K.T @ torch.linalg.inv(moments[1]) @ K) @ K.T @ torch.linalg.inv(moments[1])

    plain = plain_memit.memit(tiny, requests[:1], [1], contexts, expected, **SEARCH)[1]
    for changes in ({}, {"ridge": 30.0}, {"second_moment_weight": 1.0}):
        assert relative_error(update(requests[:1], **changes).dense(), plain) < 1e-8
    assert relative_error(update(requests, ridge=30.0).dense(), update(requests).dense()) > 0.1
    assert relative_error(update(requests[:1], ridge_of_one=True).dense(), plain) > 0.01
    (alone,) = edit(tiny, requests[:1], "memit", contexts, moments, **options, second_moment_weight=1000.0)
    assert relative_error(alone.deltas[tiny.weight_name(1)].dense(), plain) > 0.1, "MEMIT's belongs to its formula"


def test_alphaedit_leaves_the_large_directions_of_the_second_moment_alone(lm, requests, contexts, moments):
    found = edit_batch(lm, requests, "alphaedit", contexts, moments, **SHORT, **OPTIONS["alphaedit"])
    for layer in LAYERS:
        values, vectors = torch.linalg.eigh(moments[layer])
        update = found.deltas[lm.weight_name(layer)].dense().double().cpu()
        assert (update @ vectors[:, values >= 0.02]).norm() <= 1e-6 * update.norm()
        assert (update @ vectors[:, values < 0.02]).norm() > 0.9 * update.norm()


@pytest.mark.parametrize("method", ["memit", "alphaedit", "encore"])
def test_a_sequence_with_a_key_cache_equals_the_plain_formula(tiny, requests, contexts, method):
    moments = {layer: made_up(tiny.d_mlp, layer) for layer in LAYERS}
    options = {**SHORT, **OPTIONS[method], "key_cache": True}
    search, steps, earlier = SEARCH | ({"first_choices": 2} if method == "encore" else {}), [], None
    for step in edit_sequence(tiny, requests, method, contexts, moments, per_step=2, **options):
        steps.append(step)
        if step.index == 0:
            earlier = {layer: step.edit.info[f"keys_{layer}"].T for layer in LAYERS}
    assert [len(step.requests) for step in steps] == [2, 1]
    with applied(tiny, steps[0].edit):
        update = reference_update(method, moments, earlier)
        expected = plain_memit.memit(tiny, requests[2:], LAYERS, contexts, update, **search)
    for layer in LAYERS:
        assert relative_error(steps[1].edit.deltas[tiny.weight_name(layer)].dense(), expected[layer]) < 1e-8
    options["key_cache"] = False
    without = list(edit_sequence(tiny, requests, method, contexts, moments, per_step=2, **options))
    name = tiny.weight_name(0)
    assert relative_error(without[1].edit.deltas[name].dense(), steps[1].edit.deltas[name].dense()) > 1e-3


def test_it_equals_the_published_implementation(shared):
    folder = shared / "oracles"
    records = json.loads((folder / "requests_memit.json").read_text())
    contexts = json.loads((folder / "contexts_memit.json").read_text())
    stored = {layer: np.load(folder / f"second_moment_{layer}.npy") for layer in (3, 4, 5)}
    moments = {layer: C.astype(np.float32) for layer, C in stored.items()}  # rounded, as the published code rounds it
    lm = load(folder / "model", device="cpu", dtype="float64")
    requests = [EditRequest(**record) for record in records]
    found = edit_batch(
        lm, requests, "memit", contexts, moments, layers=[3, 4, 5], second_moment_weight=100.0, v_num_grad_steps=20
    )
    with np.load(folder / "memit.npz") as expected:
        assert relative_error(found.info["z"], expected["zs"]) < 1e-9
        for layer in (3, 4, 5):
            update = expected[f"resid_0_L{layer}"] @ expected[f"adj_k_0_L{layer}"].T
            assert relative_error(found.deltas[lm.weight_name(layer)].dense(), update) < 1e-11, layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers must be one or more different whole numbers"),
        ({"layers": [1, 1]}, "layers must be one or more different whole numbers"),
        ({"layers": 1}, "layers must be one or more different whole numbers, not 1"),
        ({"layers": [0.0]}, "layers must be one or more different whole numbers"),
        ({"key_cache": 0}, "key_cache must be True or False, not 0"),
        ({"second_moment_weight": 0.0}, "second_moment_weight and norm_weight are both 0"),
        ({"ridge": -1.0}, "ridge must be a number from 0 on, not -1.0"),
        ({"nullspace_threshold": 1e-9}, "no eigenvalue of the second moment at layer 0 is below 1e-09"),
    ],
)
def test_bad_hyper_parameters(tiny, requests, contexts, options, message):
    moments = {layer: made_up(tiny.d_mlp, layer) for layer in LAYERS}
    with pytest.raises(MethodError, match=message):
        edit(tiny, requests[0], "memit", contexts, moments, **{**SHORT, **options})


def test_what_a_verb_refuses(tiny, requests, contexts):
    with pytest.raises(MethodError, match="per_step must be a whole number from 1 on, not 0"):
        edit_sequence(tiny, requests, "rome", contexts, layer=1, per_step=0)
    with pytest.raises(MethodError, match="a batch needs at least one request"):
        edit_batch(tiny, [], "memit", contexts, layers=[1])
    with pytest.raises(MethodError, match="tiny-gpt2 brings no text to take them from"):
        edit_batch(tiny, requests, "memit", contexts, layers=[1])
