"""Fine-tuning: equal to Adam on the model's own weights, whether edits are computed alone, side by side or together."""

import copy
import dataclasses
import json
from math import exp

import numpy as np
import pytest
import torch

from nbkit.edits.overlays import applied
from nbkit.errors import MethodError, ModelError, PromptError
from nbkit.keys.solving import SecondMoments
from nbkit.methods import finetune, verbs
from nbkit.methods.finetune import FinetuneParameters, finetune_each, finetune_together
from nbkit.methods.method import MethodSettings
from nbkit.models.loading import load
from nbkit.records.requests import EditRequest

FEW = FinetuneParameters(
    layers=(0, 2), objective="target", n_steps=4, lr=5e-3, weight_decay=0.01, norm_constraint=0.012,
    early_stop_loss=0.0, bias=True, minibatch_size=0, end_of_text=False, seed=0,
)  # fmt: skip
OBJECTIVES = pytest.mark.parametrize("objective", ["prompt_last", "target"])


def settings(lm, parameters=FEW, batch_size=None, **changes) -> MethodSettings:
    parameters = dataclasses.replace(parameters, **changes)
    return MethodSettings("ft", parameters, ["{}"], SecondMoments(None, lm), batch_size=batch_size)


def nll(lm, model, request, objective, end_of_text=False) -> torch.Tensor:
    """The loss of one request, from a plain pass over one text."""
    prompt = lm.tokenizer(request.text).input_ids
    target = lm.tokenizer(" " + request.target_new, add_special_tokens=False).input_ids
    target += [lm.tokenizer.eos_token_id] * end_of_text
    if objective == "prompt_last":
        log_p = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
        return -sum(log_p[token] for token in target) / len(target)
    log_p = model(torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(target)) / len(target)


def reference(lm, requests, parameters: FinetuneParameters) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Adam and the clamp on the weights themselves, of a copy of the model: {weight name: ΔW}, losses."""
    model = copy.deepcopy(lm.model)
    weights = {name: model.get_parameter(name) for name in trained(lm, parameters)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    adam = torch.optim.Adam(
        [weight.requires_grad_() for weight in weights.values()], lr=parameters.lr, weight_decay=parameters.weight_decay
    )
    losses = []
    for _ in range(parameters.n_steps):
        adam.zero_grad()
        loss = sum(nll(lm, model, request, parameters.objective) for request in requests) / len(requests)
        losses.append(loss.item())
        if loss < parameters.early_stop_loss:
            break
        loss.backward()
        adam.step()
        if parameters.norm_constraint:
            with torch.no_grad():
                for name, weight in weights.items():
                    low, high = before[name] - parameters.norm_constraint, before[name] + parameters.norm_constraint
                    weight.copy_(weight.clamp(low, high))
    deltas = {name: (weight - before[name]).detach() for name, weight in weights.items()}
    return {name: oriented(lm, delta) for name, delta in deltas.items()}, losses


def breadth_first(lm, requests, parameters: FinetuneParameters) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Adam on the weights themselves, of a copy of the model, by passes over minibatches: {weight name: ΔW}, losses."""
    model, random = copy.deepcopy(lm.model), torch.Generator().manual_seed(parameters.seed)
    weights = {name: model.get_parameter(name) for name in trained(lm, parameters)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    adam = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], lr=parameters.lr)
    requests = sorted(requests, key=lambda one: len(lm.tokenizer(f"{one.text} {one.target_new}").input_ids))
    losses = []
    for _ in range(parameters.n_steps):
        order, of_pass = torch.randperm(len(requests), generator=random).tolist(), []
        for start in range(0, len(order), parameters.minibatch_size):
            some = [requests[place] for place in order[start : start + parameters.minibatch_size]]
            of_some = [nll(lm, model, one, parameters.objective, parameters.end_of_text) for one in some]
            of_pass += [one.item() for one in of_some]
            loss = sum(of_some) / len(some)
            if loss >= parameters.early_stop_loss:
                adam.zero_grad()
                loss.backward()
                adam.step()
        losses.append(sum(of_pass) / len(of_pass))
        if losses[-1] < parameters.early_stop_loss:
            break
    deltas = {name: (weight - before[name]).detach() for name, weight in weights.items()}
    return {name: oriented(lm, delta) for name, delta in deltas.items()}, losses


def trained(lm, parameters: FinetuneParameters) -> list[str]:
    names = [lm.weight_name(layer) for layer in parameters.layers]
    biases = [name.removesuffix("weight") + "bias" for name in names]
    return names + [name for name in biases if parameters.bias and name in dict(lm.model.named_parameters())]


def oriented(lm, delta: torch.Tensor) -> torch.Tensor:
    """As updates are: (d_out, d_in), a bias as one column."""
    if delta.dim() == 1:
        return delta[:, None]
    return delta.T if lm.architecture.transposed else delta


def assert_same(found, deltas, losses, tolerance):
    """Adam makes ±lr of the smallest gradient, so that where one is 0 but for rounding an entry may be another."""
    assert set(found.deltas) == set(deltas)
    for name, expected in deltas.items():
        difference = (found.deltas[name].dense() - expected).norm() / expected.norm()
        assert difference < tolerance**0.5, name
    np.testing.assert_allclose(np.array(found.info["losses"])[:, 0], losses, rtol=100 * tolerance)


@pytest.fixture
def bits(lm):
    """Asserts at the end that the model is what it was, bit for bit."""
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    yield
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad and parameter.grad is None
    assert lm.n_applied == 0


@OBJECTIVES
def test_each_equals_adam_on_the_weights(lm, requests, tolerance, objective, bits):
    edits = finetune_each(lm, requests, settings(lm, objective=objective))
    for request, found in zip(requests, edits, strict=True):
        expected = reference(lm, [request], dataclasses.replace(FEW, objective=objective))
        assert_same(found, *expected, tolerance)
        assert found.request is request and found.info["stop_reason"] == "steps"


@OBJECTIVES
def test_together_equals_adam_on_the_weights(lm, requests, tolerance, objective, bits):
    found = finetune_together(lm, requests, settings(lm, objective=objective))
    assert_same(found, *reference(lm, requests, dataclasses.replace(FEW, objective=objective)), tolerance)
    assert found.requests == tuple(requests)


def test_the_bias_is_trained_where_there_is_one_unless_it_shall_not_be(lm, requests, tolerance, bits):
    has_bias = getattr(lm.projection(0), "bias", None) is not None
    assert has_bias or lm.architecture.adds_bos or "gemma" in lm.name or "qwen" in lm.name
    for bias, n in ((True, 4 if has_bias else 2), (False, 2)):
        (found,) = finetune_each(lm, requests[2:], settings(lm, bias=bias))
        assert_same(found, *reference(lm, requests[2:], dataclasses.replace(FEW, bias=bias)), tolerance)
        assert len(found.deltas) == n


def test_minibatches_equal_adam_on_the_weights(lm, requests, tolerance, bits):
    """LocFT-BF's passes, drawn anew each time; two of the three requests make a step, then the third."""
    options = {"minibatch_size": 2, "end_of_text": True, "weight_decay": 0.0, "norm_constraint": 0.0, "bias": False}
    found = finetune_together(lm, requests, settings(lm, n_steps=3, seed=1, **options))
    parameters = dataclasses.replace(FEW, n_steps=3, seed=1, **options)
    assert_same(found, *breadth_first(lm, requests, parameters), tolerance)
    assert len(found.info["losses"]) == 3 and found.info["stop_reason"] == "steps"


def test_a_minibatch_below_the_loss_makes_no_step_and_a_pass_below_it_ends_training(tiny, requests):
    free = {"minibatch_size": 1, "weight_decay": 0.0, "norm_constraint": 0.0, "bias": False, "n_steps": 30, "lr": 0.02}
    whole = [loss for (loss,) in finetune_together(tiny, requests, settings(tiny, **free)).info["losses"]]
    limit = whole[0] / 4
    found = finetune_together(tiny, requests, settings(tiny, early_stop_loss=limit, **free))
    expected, losses = breadth_first(tiny, requests, dataclasses.replace(FEW, early_stop_loss=limit, **free))
    assert_same(found, expected, losses, 1e-10)
    assert found.info["stop_reason"] == "loss" and len(losses) < 30 and losses[-1] < limit <= min(losses[:-1])
    assert losses != whole[: len(losses)], "some steps are left out"
    together = finetune_together(tiny, requests, settings(tiny, **{**free, "minibatch_size": 3, "n_steps": 2}))
    at_once = finetune_together(tiny, requests, settings(tiny, **{**free, "minibatch_size": 0, "n_steps": 2}))
    assert together.info["losses"] == at_once.info["losses"], "of no more requests than a minibatch all make each step"


def test_minibatches_that_memory_takes_in_parts_are_the_same(tiny, requests, monkeypatch):
    options = settings(tiny, minibatch_size=2, end_of_text=True)
    expected = finetune_together(tiny, requests, options)
    monkeypatch.setattr(finetune, "budget", lambda _device: 0)
    found = finetune_together(tiny, requests, options)
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(found.deltas[name].matrix, delta.matrix, rtol=1e-7, atol=1e-10)
    other = finetune_together(tiny, requests, dataclasses.replace(
        options, parameters=dataclasses.replace(options.parameters, seed=3)
    ))  # fmt: skip
    assert any((other.deltas[name].matrix - delta.matrix).norm() > 1e-6 for name, delta in expected.deltas.items())


def test_the_end_of_the_text_is_asked_for_behind_the_target(tiny, requests):
    (found,) = finetune_each(tiny, requests[2:], settings(tiny, n_steps=1, end_of_text=True))
    assert found.info["losses"][0][0] == pytest.approx(float(nll(tiny, tiny.model, requests[2], "target", True)))
    tiny.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no end-of-text token to ask for; leave end_of_text out"):
        finetune_each(tiny, requests, settings(tiny, end_of_text=True))


@pytest.mark.parametrize(
    ("name", "layer", "norm_constraint"), [("bound", 0, 5e-3), ("free", 3, 0.0)], ids=["bound", "free"]
)
def test_it_equals_the_published_implementation(shared, name, layer, norm_constraint):
    folder = shared / "oracles"
    lm = load(folder / "model", device="cpu", dtype="float64")
    requests = [EditRequest(**record) for record in json.loads((folder / "requests.json").read_text())[:5]]
    made = verbs.edit(lm, requests, "ft", progress=False, layers=[layer], norm_constraint=norm_constraint)
    weight = lm.weight_name(layer)
    with np.load(folder / "ft.npz") as expected:
        for i, found in enumerate(made):
            theirs = {part: torch.from_numpy(expected[f"{name}_{i}_{part}"]) for part in ("weight", "bias")}
            np.testing.assert_allclose([loss for (loss,) in found.info["losses"]], expected[f"{name}_{i}_losses"], 1e-9)
            for part, expected_delta in theirs.items():
                delta = found.deltas[weight.removesuffix("weight") + part].matrix
                assert (delta - oriented(lm, expected_delta)).norm() < 1e-8 * expected_delta.norm(), (i, part)


def test_the_target_becomes_likelier(lm, requests, bits):
    """Measured by plain passes over the edited model, from what info says on."""
    hparams = {"layers": (1,), "n_steps": 10, "norm_constraint": 0.02, "weight_decay": 0.0}
    for objective in ("prompt_last", "target"):
        each = finetune_each(lm, requests, settings(lm, objective=objective, **hparams))
        together = finetune_together(lm, requests, settings(lm, objective=objective, **hparams))
        for edits in ([(request, edit) for request, edit in zip(requests, each, strict=True)],
                      [(request, together) for request in requests]):  # fmt: skip
            gains = []
            for request, edit in edits:
                before = nll(lm, lm.model, request, objective)
                with applied(lm, edit):
                    gains.append(float(before - nll(lm, lm.model, request, objective)))
            assert min(gains) > 0.2, (objective, gains)


@pytest.mark.parametrize("layers", [(0,), (2,), (2, 0), (0, 1, 2)])
def test_the_constraint_holds_and_nothing_else_changes(tiny, requests, layers):
    options = settings(tiny, layers=layers, lr=0.1, n_steps=3)
    for edit in [*finetune_each(tiny, requests, options), finetune_together(tiny, requests, options)]:
        assert set(edit.deltas) == set(trained(tiny, options.parameters)) and len(edit.deltas) == 2 * len(layers)
        largest = max(float(delta.matrix.abs().max()) for delta in edit.deltas.values())
        assert largest == FEW.norm_constraint
        before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
        with applied(tiny, edit):
            changed = {name for name, p in tiny.model.named_parameters() if not torch.equal(p, before[name])}
            assert changed == set(edit.deltas)
        assert all(torch.equal(p, before[name]) for name, p in tiny.model.named_parameters())
    free = finetune_each(tiny, requests[:1], settings(tiny, layers=layers, lr=0.1, norm_constraint=0.0))[0]
    assert float(free.deltas[tiny.weight_name(layers[0])].matrix.abs().max()) > 0.05


@OBJECTIVES
def test_the_plain_way_gives_the_same(lm, requests, tolerance, objective, monkeypatch):
    expected = finetune_each(lm, requests, settings(lm, objective=objective))
    lm.replayable = False
    monkeypatch.setattr(finetune, "SharedPass", None)
    for found, one in zip(finetune_each(lm, requests, settings(lm, objective=objective)), expected, strict=True):
        deltas = {name: delta.dense() for name, delta in one.deltas.items()}
        assert_same(found, deltas, np.array(one.info["losses"])[:, 0], tolerance)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_edits_do_not_see_each_other(tiny, requests, batch_size):
    """Also where some stop long before the others."""
    whole = finetune_each(tiny, requests, settings(tiny, n_steps=12, batch_size=3))
    last = sorted(edit.info["losses"][-1][0] for edit in whole)
    hparams = {"n_steps": 12, "early_stop_loss": (last[0] + last[1]) / 2}
    expected = finetune_each(tiny, requests, settings(tiny, batch_size=3, **hparams))
    assert {edit.info["stop_reason"] for edit in expected} == {"loss", "steps"}
    found = finetune_each(tiny, requests, settings(tiny, batch_size=batch_size, **hparams))
    for one, other, request in zip(found, expected, requests, strict=True):
        name = tiny.weight_name(2)
        torch.testing.assert_close(one.deltas[name].matrix, other.deltas[name].matrix, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(one.info["losses"], other.info["losses"], rtol=1e-10)
        assert one.request is request and one.info["stop_reason"] == other.info["stop_reason"]
    assert finetune_each(tiny, [], settings(tiny)) == []


def test_a_batch_that_memory_takes_in_parts_is_the_same(tiny, requests, monkeypatch):
    expected = finetune_together(tiny, requests, settings(tiny))
    monkeypatch.setattr(finetune, "budget", lambda _device: 0)
    found = finetune_together(tiny, requests, settings(tiny))
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(found.deltas[name].matrix, delta.matrix, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.info["losses"], expected.info["losses"], rtol=1e-12)


def test_it_stops_early_below_the_loss(tiny, requests):
    (whole,) = finetune_each(tiny, requests[:1], settings(tiny, n_steps=8))
    losses = [loss for (loss,) in whole.info["losses"]]
    assert len(losses) == 8 and whole.info["stop_reason"] == "steps"
    threshold = (losses[0] + losses[-1]) / 2
    n_losses = 1 + next(i for i, loss in enumerate(losses) if loss < threshold)
    for edit in (
        *finetune_each(tiny, requests[:1], settings(tiny, n_steps=8, early_stop_loss=threshold)),
        finetune_together(tiny, requests[:1], settings(tiny, n_steps=8, early_stop_loss=threshold)),
    ):
        assert edit.info["stop_reason"] == "loss"
        assert [loss for (loss,) in edit.info["losses"]] == losses[:n_losses]
        with applied(tiny, edit):  # the loss is of the weights as they are: no step came after it
            assert nll(tiny, tiny.model, requests[0], "target") == pytest.approx(losses[n_losses - 1])


def test_the_numbers_in_info_belong_together(tiny, requests):
    edits = finetune_each(tiny, requests, settings(tiny))
    for edit, request in zip(edits, requests, strict=True):
        info, deltas = edit.info, edit.deltas.values()
        assert info["update_norm"] == pytest.approx(sum(float(d.matrix.norm()) ** 2 for d in deltas) ** 0.5)
        assert info["target_probability"] == pytest.approx(exp(-info["losses"][-1][0]))
        assert info["losses"][0][0] == pytest.approx(float(nll(tiny, tiny.model, request, "target")))
        assert info["layers"] == "0, 2" and edit.method == "ft" and edit.hparams["lr"] == 5e-3
    assert [edit.info["subject_kind"] for edit in edits] == ["one-token first", "one-token first", "later"]
    together = finetune_together(tiny, requests, settings(tiny, n_steps=1))
    first = [edit.info["losses"][0][0] for edit in edits]
    assert together.info["losses"] == [[pytest.approx(np.mean(first))]]
    assert together.info["target_probability"] == pytest.approx(np.mean(np.exp(np.negative(first))))
    assert "subject_kind" not in together.info


def test_a_nan_model_is_reported_not_hidden(tiny, requests):
    with torch.no_grad():
        tiny.weight(2)[0, 0] = torch.nan
    for edit in [*finetune_each(tiny, requests, settings(tiny)), finetune_together(tiny, requests, settings(tiny))]:
        assert edit.info["stop_reason"] == "nan" and np.isnan(edit.info["losses"]).all()
        assert len(edit.info["losses"]) == 1
        assert all(not delta.matrix.any() for delta in edit.deltas.values())


def test_a_bfloat16_model_is_edited_with_float32_updates(make_lm, requests):
    lm = make_lm("llama", dtype=torch.bfloat16)
    (found,) = finetune_each(lm, requests[:1], settings(lm))
    assert {delta.matrix.dtype for delta in found.deltas.values()} == {torch.float32}
    with applied(lm, found):
        assert lm.weight(2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"layers": ()}, r"layers must be one or more different whole numbers, not \(\)"),
        ({"layers": (1, 1)}, r"layers must be one or more different whole numbers, not \(1, 1\)"),
        ({"objective": "target_new"}, "objective must be one of prompt_last, target, not 'target_new'"),
        ({"minibatch_size": -1}, "minibatch_size must be a whole number from 0 on"),
        ({"n_steps": 0}, "n_steps must be a whole number from 1 on, not 0"),
        ({"lr": 0.0}, "lr must be a number above 0, not 0.0"),
        ({"lr": float("nan")}, "lr must be a number above 0, not nan"),
        ({"weight_decay": -1.0}, "weight_decay must be a number from 0 on"),
        ({"norm_constraint": -1e-4}, "norm_constraint must be a number from 0 on"),
        ({"early_stop_loss": -1.0}, "early_stop_loss must be a number from 0 on"),
    ],
)
def test_bad_hyper_parameters(hparams, message):
    with pytest.raises(MethodError, match=message):
        dataclasses.replace(FEW, **hparams)


def test_what_cannot_be_read_names_its_request(tiny):
    long = EditRequest("Vouda " * 100 + "{} is", "Ann", "Krela", case_id=17)
    with pytest.raises(PromptError, match="request 17"):
        finetune_each(tiny, [long], settings(tiny))
    long_target = EditRequest("{} is", "Ann", "Krela " * 100, case_id=18)
    with pytest.raises(PromptError, match="request 18"):
        finetune_together(tiny, [long_target], settings(tiny))
    (found,) = finetune_each(tiny, [long_target], settings(tiny, objective="prompt_last", n_steps=1))  # not read there
    assert np.isfinite(found.info["losses"]).all()
    with pytest.raises(ModelError, match="layer 3 does not exist"):
        finetune_each(tiny, [EditRequest("{} is", "Ann", "Krela")], settings(tiny, layers=(1, 3)))
