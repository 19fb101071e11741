"""UltraEdit: equal to its formula with dense matrices, on every architecture, alone, in batches and in sequence."""

import numpy as np
import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.errors import MethodError
from nbkit.methods.ultraedit import EPSILON
from nbkit.methods.verbs import edit, edit_batch, edit_sequence
from nbkit.studies.metrics import score_targets

LAYERS = [0, 2]
OPTIONS = {"layers": LAYERS, "lr": 0.02, "ridge": 0.5, "progress": False}


def pairs_of(lm, request) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """{layer: [(h, g) of each token that one of the target's is predicted from]}, by a pass over one text."""
    prompt = lm.tokenizer(request.text).input_ids
    target = lm.tokenizer(" " + request.target_new, add_special_tokens=False).input_ids
    ids, inputs, zeros, handles = [*prompt, *target[:-1]], {}, {}, []
    for layer in LAYERS:

        def hook(_module, args, output, layer=layer):
            zeros[layer] = torch.zeros_like(output, requires_grad=True)
            inputs[layer] = args[0]
            return output + zeros[layer]

        handles.append(lm.projection(layer).register_forward_hook(hook))
    log_p = lm.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    at = [len(prompt) - 1 + place for place in range(len(target))]
    (-sum(log_p[place, token] for place, token in zip(at, target, strict=True))).backward()
    rows = {layer: [part.reshape(len(ids), -1).detach().double() for part in (inputs[layer], zeros[layer].grad)]
            for layer in LAYERS}  # fmt: skip
    return {layer: [(h[place], g[place]) for place in at] for layer, (h, g) in rows.items()}


def reference(lm, requests, before=()) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """{layer: ΔW (d_out, d_in)}, and all pairs so far as vectors; before: those of earlier edits."""
    pairs = [pairs_of(lm, request) for request in requests]
    by_layer = {layer: [pair for one in pairs for pair in one[layer]] for layer in LAYERS}
    seen = [*before, *(torch.cat(pair) for layer in LAYERS for pair in by_layer[layer])]
    mean, std = torch.stack(seen).mean(0), torch.stack(seen).std(0, correction=1)
    updates = {}
    for layer, of_layer in by_layer.items():
        H, V = [], []
        for h, g in of_layer:
            x = (torch.cat([h, g]) - mean) / (std + EPSILON)
            h_hat, g_hat = x[: len(h)], x[len(h) :]
            H.append(h)
            V.append(-OPTIONS["lr"] * h_hat.norm() ** 2 * g_hat)
        H, V = torch.stack(H), torch.stack(V)
        bound = H.T @ H + OPTIONS["ridge"] * torch.eye(lm.d_mlp, dtype=torch.float64)
        updates[layer] = (torch.linalg.inv(bound) @ H.T @ V).T
    return updates, seen


def assert_same(lm, found, updates, tolerance):
    assert set(found.deltas) == {lm.weight_name(layer) for layer in LAYERS}
    for layer, expected in updates.items():
        dense = found.deltas[lm.weight_name(layer)].dense().double()
        assert (dense - expected).norm() < tolerance * expected.norm(), layer


@pytest.fixture
def rounding(tolerance):
    return max(1000 * tolerance, 1e-8)  # a number that hardly changes is divided by its small deviation


def test_a_batch_equals_the_plain_formula(lm, requests, rounding):
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    found = edit_batch(lm, requests, "ultraedit", **OPTIONS)
    updates, seen = reference(lm, requests)
    assert_same(lm, found, updates, rounding)
    assert found.requests == tuple(requests) and found.info["n_pairs"] == len(seen)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())
    with applied(lm, found):
        changed = {name for name, weight in lm.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(found.deltas)


def test_edits_by_themselves_equal_the_plain_formula_and_do_not_see_each_other(lm, requests, rounding):
    together = edit(lm, requests, "ultraedit", **OPTIONS)
    alone = [edit(lm, request, "ultraedit", **OPTIONS)[0] for request in requests]
    for request, one, other in zip(requests, together, alone, strict=True):
        updates, _ = reference(lm, [request])
        assert one.request is request
        for found in (one, other):
            assert_same(lm, found, updates, rounding)


@pytest.mark.parametrize("per_step", [1, 2])
def test_a_sequence_normalises_by_all_that_came_before(lm, requests, rounding, per_step):
    seen = []
    for step in edit_sequence(lm, requests, "ultraedit", per_step=per_step, **OPTIONS):
        undone = Edit({name: delta.scaled(-1.0) for name, delta in step.edit.deltas.items()})
        with applied(lm, undone):  # the model that the step was computed on
            updates, seen = reference(lm, list(step.requests), seen)
        assert_same(lm, step.edit, updates, 10 * rounding)
        assert float(step.edit.info["pairs_n"]) == len(seen)
        mean = torch.stack(seen).mean(0)
        assert (step.edit.info["pairs_mean"] - mean).norm() < rounding * mean.norm()


def test_a_single_pair_leaves_nothing_to_edit_by(tiny, requests):
    (found,) = edit(tiny, requests[0], "ultraedit", **{**OPTIONS, "layers": [1]})
    assert found.info["n_pairs"] == 1 and found.info["update_norm"] == 0.0
    assert not found.deltas[tiny.weight_name(1)].dense().any()


def test_a_batch_makes_its_targets_likelier(tiny, requests):
    before = score_targets(tiny, [r.text for r in requests], [r.target_new for r in requests])["nll"]
    found = edit_batch(tiny, requests, "ultraedit", **{**OPTIONS, "lr": 1e-3})
    assert found.info["losses"] == [[pytest.approx(before.mean())]]
    assert found.info["target_probability"] == pytest.approx(np.exp(-before).mean())
    with applied(tiny, found):
        after = score_targets(tiny, [r.text for r in requests], [r.target_new for r in requests])["nll"]
    assert after.mean() < before.mean()


def test_a_batch_that_memory_takes_in_parts_is_the_same(tiny, requests, monkeypatch):
    expected = edit_batch(tiny, requests, "ultraedit", **OPTIONS)
    monkeypatch.setattr("nbkit.methods.ultraedit.budget", lambda _device: 0)
    found = edit_batch(tiny, requests, "ultraedit", **OPTIONS)
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(found.deltas[name].dense(), delta.dense(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers must be one or more different whole numbers"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"ridge": 0.0}, "ridge must be a number above 0"),
    ],
)
def test_bad_hyper_parameters(tiny, requests, options, message):
    with pytest.raises(MethodError, match=message):
        edit(tiny, requests[0], "ultraedit", **{**OPTIONS, **options})
