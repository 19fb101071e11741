"""MEND: equal to the gradient and to a slow loop on every architecture; its training, and what its file refuses."""

import json
import math
import sys
import tomllib
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nbkit import paths
from nbkit.__main__ import main
from nbkit.edits.checkpoints import Checkpoint
from nbkit.edits.overlays import applied
from nbkit.edits.tensor_files import CHECKED, CHECKSUM
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError, NbkitError, PromptError, RequestError
from nbkit.methods.mend import MendParameters, mend_each, mend_together, training
from nbkit.methods.mend.examples import Examples, not_among
from nbkit.methods.mend.gradients import token_gradients
from nbkit.methods.mend.hypernetwork import Hypernetwork, Transform, mlp_weights
from nbkit.methods.mend.recipe import RECIPES, MendRecipe, recipe_of
from nbkit.methods.mend.training import changes_of, losses_of, normalise, train, train_to_file
from nbkit.methods.mend.weights_file import FORMAT, UNCLAMPED, load_hypernetwork, save_hypernetwork, weights_path
from nbkit.methods.method import MethodSettings
from nbkit.models.continuations import continuations
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad, target_ids, tokenize
from nbkit.records.requests import EditRequest

LAYERS = (1, 2)  # of three
CHANGES = {
    "n_last_layers": 2, "rank": 4, "n_steps": 8, "batch": 2, "at_once": 2, "learning_rate": 1e-2,
    "rate_learning_rate": 0.3, "decay": 0.5, "locality_weight": 0.01, "text_tokens": 8, "n_normalising": 4,
    "n_validation": 3, "validate_every": 3,
}  # fmt: skip
SHORT, _ = recipe_of("miniworld-gpt2", changes=CHANGES)


def hypernetwork(lm, seed: int | None = None) -> Hypernetwork:
    """Of the last two layers: g is the identity, or all of it is random."""
    shapes = {name: shape for layer in LAYERS for name, shape in mlp_weights(lm, layer).items()}
    made = Hypernetwork(shapes, rank=4, first_rate=0.1)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        made.log_rate += torch.linspace(0, 1, len(shapes))  # each weight has its own
        for tensor in made.transforms.state_dict().values() if seed is not None else ():
            tensor.normal_(0, 0.3, generator=generator)
        for transform in made.transforms.values() if seed is not None else ():
            transform.std.abs_().add_(0.5)
    return made


def written(lm, folder, seed: int | None = None) -> MethodSettings:
    """What an edit gets: a hypernetwork of this model in a file."""
    path = folder / "mend.safetensors"
    save_hypernetwork(path, hypernetwork(lm, seed), lm)
    return setting(path)


def setting(path="", lr_scale: float = 1.0, batch_size: int | None = None) -> MethodSettings:
    return MethodSettings("mend", MendParameters(str(path), lr_scale), ["{}"], None, batch_size=batch_size)


def plain_nll(lm, request) -> torch.Tensor:
    """The mean negative log-likelihood of the target's tokens behind the prompt, without padding."""
    (prompt,), target = tokenize(lm, [request.text]), target_ids(lm, request.target_new)
    log_p = lm.model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    return -torch.stack([log_p[len(prompt) - 1 + i, token] for i, token in enumerate(target)]).mean()


def gradients(lm, names, loss) -> dict[str, torch.Tensor]:
    """∂loss/∂W in orientation (d_out, d_in), by differentiating with respect to the weights themselves."""
    weights = [lm.model.get_parameter(name).requires_grad_() for name in names]
    try:
        found = torch.autograd.grad(loss(), weights)
    finally:
        lm.model.requires_grad_(False)
    return {name: g.T if lm.architecture.transposed else g for name, g in zip(names, found, strict=True)}


def assert_close(found, expected, tolerance):
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, float(error)


@pytest.fixture
def many() -> list[EditRequest]:
    subjects = ("Vouda", "Ann", "Krela", "Sennifar", "Danielle Darrieux", "The river")
    return [
        EditRequest(prompt, subject, target, case_id=f"{subject} {relation}", relation_id=relation,
                    paraphrase_prompts=(f"Therefore the {relation} of {subject} is",))
        for subject in subjects
        for relation, prompt, target in (("song", "{} plays the", "drum"), ("place", "{} is located in", "Krela"))
    ]  # fmt: skip


@pytest.fixture
def bits(tiny):
    """Asserts at the end that the model is what it was, bit for bit, without hooks and gradients."""
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    yield
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad, name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


# --- the update -------------------------------------------------------------------------------------------------------


def test_all_matrices_of_the_mlp_are_edited(lm, kind):
    found = mlp_weights(lm, 2)
    gated = kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")
    assert len(found) == (3 if gated else 2) and list(found)[-1] == lm.weight_name(2)
    assert found.pop(lm.weight_name(2)) == (lm.d_model, lm.d_mlp)
    assert set(found.values()) == {(lm.d_mlp, lm.d_model)}


def test_the_identity_makes_steps_along_the_gradient(lm, requests, tolerance, tmp_path):
    given = written(lm, tmp_path)
    rates = load_hypernetwork(lm, given.parameters.weights).log_rate.exp()
    for request, found in zip(requests, mend_each(lm, requests, given), strict=True):
        expected = gradients(lm, found.deltas, lambda request=request: plain_nll(lm, request))
        for (name, delta), rate in zip(found.deltas.items(), rates, strict=True):
            assert_close(delta.dense(), -rate * expected[name], 10 * tolerance)


def test_a_batch_steps_along_the_gradient_of_the_summed_loss(lm, requests, tolerance, tmp_path):
    given = written(lm, tmp_path)
    rates = load_hypernetwork(lm, given.parameters.weights).log_rate.exp()
    found = mend_together(lm, requests, given)
    summed = gradients(lm, found.deltas, lambda: sum(plain_nll(lm, request) for request in requests))
    for (name, delta), rate in zip(found.deltas.items(), rates, strict=True):
        assert_close(delta.dense(), -rate * summed[name], 10 * tolerance)


def test_a_random_network_equals_a_slow_loop(lm, requests, tolerance, tmp_path):
    given = written(lm, tmp_path, seed=1)
    network = load_hypernetwork(lm, given.parameters.weights)
    request = requests[2]
    (found,) = mend_each(lm, [request], given)
    kept = {}
    for name in found.deltas:
        module = lm.model.get_submodule(name.removesuffix(".weight"))
        module.weight.requires_grad_()  # so that its output has a gradient
        module.register_forward_hook(lambda _m, args, out, name=name: kept.update({name: (args[0], out)}))
    outputs = torch.autograd.grad(plain_nll(lm, request), [kept[name][1] for name in found.deltas])
    for name, rate, gradient in zip(found.deltas, network.log_rate.exp(), outputs, strict=True):
        transform, place = network.transform_of(name), network.place[name]
        expected = torch.zeros(found.deltas[name].shape, dtype=torch.float64)
        inputs = kept[name][0].detach().reshape(-1, kept[name][0].shape[-1])
        for u, delta in zip(inputs, gradient.reshape(len(inputs), -1), strict=True):
            if not delta.any():
                continue
            z = (torch.cat([u, delta]) - transform.mean) / transform.std
            for n in (0, 1):
                low_rank = transform.U[n].T @ (transform.V[n].T @ z) + transform.b[n]
                z = z + torch.relu(transform.s[n, place] * low_rank + transform.o[n, place])
            expected -= float(rate) * torch.outer(z[len(u) :], z[: len(u)])
        assert_close(found.deltas[name].dense(), expected, 10 * tolerance)


def test_the_transform_equals_the_published_implementation(shared):
    with np.load(shared / "oracles" / "mend_transform.npz") as file:
        stored = {name: torch.from_numpy(file[name]).double() for name in file.files}
    transform = Transform(48, 16, n_weights=3, rank=24, n_hidden=1).double()
    of_layers = {name: [stored[f"layer{n}_{name}"] for n in (0, 1)] for name in ("u", "v", "bias", "scale", "shift")}
    state = {
        "mean": torch.cat([stored["x_mean"], stored["delta_mean"]]),
        "std": torch.cat([stored["x_std"], stored["delta_std"]]),
        "U": torch.stack(of_layers["u"]).mT,
        "V": torch.stack(of_layers["v"]).mT,
        **{mine: torch.stack(of_layers[theirs]) for mine, theirs in (("b", "bias"), ("s", "scale"), ("o", "shift"))},
    }
    transform.load_state_dict(state)
    gives = (stored["x"] != 0).any(-1) & (stored["delta"] != 0).any(-1)
    assert int(gives.sum()) == 8
    for place in range(3):
        u, delta = transform(stored["x"][gives], stored["delta"][gives], place)
        assert_close(u, stored[f"x_new_{place}"], 1e-5)
        assert_close(delta, stored[f"delta_new_{place}"], 1e-5)
        assert_close(u.T @ delta, stored[f"outer_sum_{place}"], 1e-5)


def test_a_new_network_is_the_normalisation_with_directions_of_standard_deviation_one():
    new = Transform(60, 40, n_weights=2, rank=50, n_hidden=1, generator=torch.Generator().manual_seed(0))
    assert new.V.std().item() == pytest.approx(1, rel=0.05) and new.V.mean().item() == pytest.approx(0, abs=0.05)
    assert not any(getattr(new, name).any() for name in ("U", "b", "o")) and bool((new.s == 1).all())


def test_only_tokens_with_a_gradient_give_to_an_edit(tiny, requests, tmp_path):
    """In the last layer those before a target's token; below it, all that are read."""
    for request, found in zip(requests, mend_each(tiny, requests, written(tiny, tmp_path, seed=1)), strict=True):
        n_target = len(target_ids(tiny, request.target_new))
        n_read = len(tokenize(tiny, [request.text])[0]) + n_target - 1
        for layer, rank in ((1, n_read), (2, n_target)):
            delta = found.deltas[tiny.weight_name(layer)]
            assert (delta.left.shape, delta.right.shape) == ((32, rank), (rank, 48))
        assert found.info["n_tokens"] == n_read


def test_many_requests_give_the_same_as_each_alone(tiny, requests, tmp_path, bits):
    given = written(tiny, tmp_path, seed=1)
    together = mend_each(tiny, requests, given)
    in_small_batches = mend_each(tiny, requests, replace(given, batch_size=2))
    for request, found, small in zip(requests, together, in_small_batches, strict=True):
        (alone,) = mend_each(tiny, [request], given)
        one_batch = mend_together(tiny, [request], given)
        assert found.request is request and found.method == "mend"
        for name, delta in found.deltas.items():
            for other in (alone, small, one_batch):
                torch.testing.assert_close(delta.dense(), other.deltas[name].dense(), rtol=1e-10, atol=1e-12)


def test_a_batch_is_low_rank_as_long_as_that_is_smaller(tiny, requests, tmp_path, bits):
    given, requests = written(tiny, tmp_path, seed=1), requests * 2
    found = mend_together(tiny, requests, given)
    # 32·48 numbers are those of 19 tokens
    assert isinstance(found.deltas[tiny.weight_name(1)], Dense)
    assert isinstance(found.deltas[tiny.weight_name(2)], LowRank)
    small = mend_together(tiny, requests, replace(given, batch_size=1))
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta.dense(), small.deltas[name].dense(), rtol=1e-10, atol=1e-12)
    assert found.requests == tuple(requests)
    assert found.info["subject_kind"] == ["one-token first", "one-token first", "later"] * 2
    assert found.info["losses"][0][0] == pytest.approx(sum(float(plain_nll(tiny, r)) for r in requests) / 6)
    assert found.info["update_norm"] == pytest.approx(found.norm())


def test_the_numbers_in_info(tiny, requests, tmp_path, bits):
    given = written(tiny, tmp_path, seed=1)
    twice = mend_each(tiny, requests, setting(given.parameters.weights, lr_scale=2.0))
    for request, found, doubled in zip(requests, mend_each(tiny, requests, given), twice, strict=True):
        nll = float(plain_nll(tiny, request))
        assert found.info["losses"] == [[pytest.approx(nll)]]
        assert found.info["target_probability"] == pytest.approx(math.exp(-nll))
        dense = [delta.dense().square().sum() for delta in found.deltas.values()]
        assert found.info["update_norm"] == pytest.approx(float(sum(dense)) ** 0.5)
        assert doubled.info["update_norm"] == pytest.approx(2 * found.info["update_norm"])
        assert found.hparams == {"weights": given.parameters.weights, "lr_scale": 1.0}


def test_an_edit_touches_its_weights_and_leaves_no_trace(tiny, requests, tmp_path, bits):
    (found,) = mend_each(tiny, requests[:1], written(tiny, tmp_path, seed=1))
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    with applied(tiny, found):
        changed = {name for name, p in tiny.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(found.deltas) == {name for layer in LAYERS for name in mlp_weights(tiny, layer)}


def test_a_sequence_takes_the_gradient_of_the_edited_model(tiny, requests, tmp_path, bits):
    given = written(tiny, tmp_path)
    (first,) = mend_each(tiny, requests[:1], given)
    with applied(tiny, first):
        (second,) = mend_each(tiny, requests[:1], given)
        expected = float(plain_nll(tiny, requests[0]))
    assert second.info["losses"][0][0] == pytest.approx(expected) != first.info["losses"][0][0]


def test_a_prompt_beyond_the_context_names_its_request(tiny, tmp_path, bits):
    long = EditRequest("Vouda " * 100 + "{} is", "Ann", "Krela", case_id=17)
    with pytest.raises(PromptError, match=r"request 17 \(subject 'Ann'\).*more than the context of tiny-gpt2 \(96\)"):
        mend_each(tiny, [long], written(tiny, tmp_path))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_model_without_a_hypernetwork_is_told_how_to_get_one(tiny, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    assert weights_path("openai-community/gpt2-xl") == tmp_path / "mend/openai-community--gpt2-xl/mend.safetensors"
    for path in ("", tmp_path / "nowhere"):
        with pytest.raises(MethodError, match="no trained hypernetwork .* train-mend --model tiny-gpt2"):
            mend_each(tiny, requests, setting(path))
    save_hypernetwork(weights_path(tiny.name), hypernetwork(tiny), tiny)
    assert len(mend_each(tiny, requests, setting())) == 3


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("gpt2", {"seed": 1}, "tiny-gpt2 had other weights"),
        ("gpt2", {"n_inner": 40}, r"mlp.c_fc.weight is \(48, 32\), the weight of tiny-gpt2 is \(40, 32\)"),
        ("llama", {}, "changes transformer.h.1.mlp.c_fc.weight, a weight that tiny-llama does not have"),
    ],
)
def test_another_model_s_hypernetwork_is_refused(tiny, requests, make_lm, tmp_path, kind, config, message):
    given = written(tiny, tmp_path)
    with pytest.raises(MethodError, match=rf"trained for another model than tiny-{kind}: .*{message}.*train-mend"):
        mend_each(make_lm(kind, **config), requests, given)


def test_the_same_model_is_known_when_edited_and_in_another_number_type(tiny, requests, tmp_path):
    given = written(tiny, tmp_path)
    (first,) = mend_each(tiny, requests[:1], given)
    with applied(tiny, first):
        tiny._hash = None
        assert load_hypernetwork(tiny, given.parameters.weights).shapes
    coarse = LanguageModel.wrap(deepcopy(tiny.model).to(torch.bfloat16), tiny.tokenizer, "tiny-gpt2")
    (found,) = mend_each(coarse, requests[:1], given)
    for name, delta in found.deltas.items():
        assert delta.left.dtype == torch.float32
        assert_close(delta.dense(), first.deltas[name].dense(), 0.1)


@pytest.mark.parametrize("content", [b"", b"nonsense", "cut", "other"])
def test_a_damaged_file_is_named(tiny, requests, tmp_path, content):
    given = written(tiny, tmp_path)
    path = tmp_path / "mend.safetensors"
    if content == "other":
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-100] if content == "cut" else content)
    with pytest.raises(MethodError, match=r"mend\.safetensors is damaged, or no hypernetwork"):
        mend_each(tiny, requests, given)


def test_a_network_that_was_trained_with_another_formula_is_refused(tiny, requests, tmp_path):
    given = written(tiny, tmp_path)
    with safe_open(given.parameters.weights, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    about = {name: text for name, text in about.items() if name not in (CHECKED, CHECKSUM)}
    assert json.loads(about["format"]) == FORMAT
    save_file(tensors, given.parameters.weights, about | {"format": json.dumps(UNCLAMPED)})
    with pytest.raises(MethodError, match="last step was not bounded below by zero.* train-mend --model tiny-gpt2"):
        mend_each(tiny, requests, given)


def test_a_file_that_is_replaced_is_read_anew(tiny, requests, tmp_path):
    given = written(tiny, tmp_path)
    (first,) = mend_each(tiny, requests[:1], given)
    written(tiny, tmp_path, seed=1)
    (second,) = mend_each(tiny, requests[:1], given)
    assert first.info["update_norm"] != second.info["update_norm"]


@pytest.mark.parametrize("lr_scale", [0.0, -1.0, math.nan])
def test_bad_parameters(lr_scale):
    with pytest.raises(MethodError, match="lr_scale must be a number above 0"):
        MendParameters("", lr_scale)


# --- the training -----------------------------------------------------------------------------------------------------


def test_the_edited_pass_of_training_equals_the_edited_model(lm, requests, texts, tolerance, tmp_path):
    given = written(lm, tmp_path, seed=1)
    network = load_hypernetwork(lm, given.parameters.weights)
    asked = continuations(lm, [r.text for r in requests], [r.target_new for r in requests])
    changes = changes_of(lm, network, token_gradients(lm, asked, network.shapes))
    rows = tokenize(lm, texts[:2])
    with changes.added(lm, changes.factors):
        found = lm.logits(pad(lm, rows * len(requests))).unflatten(0, (len(requests), 2))
    for logits, edit in zip(found, mend_each(lm, requests, given), strict=True):
        with applied(lm, edit):
            expected = lm.logits(batch := pad(lm, rows))
        mask = batch.attention_mask.bool()
        assert_close(logits[mask], expected[mask], 100 * tolerance)


def test_the_losses_are_those_of_plain_passes_of_edited_models(tiny, many, texts, tmp_path):
    """The target's nll on what is asked, and KL(p_unedited ‖ p_edited) of what should not change."""
    given = written(tiny, tmp_path, seed=1)
    network = load_hypernetwork(tiny, given.parameters.weights)
    examples = Examples(tiny, many, texts, 8).draw(4, np.random.default_rng(0))
    edited = continuations(tiny, [r.text for r in many], [r.target_new for r in many])
    of_row = {tuple(one.row): request for one, request in zip(edited, many, strict=True)}
    nlls, divergences, backwards = [], [], []
    for example in examples:
        (made,) = mend_each(tiny, [of_row[tuple(example.edited.row)]], given)
        for row, kept in example.unchanged:
            p = tiny.model(torch.tensor([row])).logits[0, list(kept)].log_softmax(-1)
            with applied(tiny, made):
                q = tiny.model(torch.tensor([row])).logits[0, list(kept)].log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1).mean())
            backwards.append((q.exp() * (q - p)).sum(-1).mean())
        with applied(tiny, made):
            log_p = tiny.model(torch.tensor([example.asked.row])).logits[0].log_softmax(-1)
        nlls.append(-log_p[list(example.asked.predicting), example.asked.target].mean())
    nll, kl = losses_of(tiny, network, examples).tolist()
    assert nll == pytest.approx(float(sum(nlls)) / len(nlls))
    assert kl == pytest.approx(float(sum(divergences)) / len(divergences))
    assert kl != pytest.approx(float(sum(backwards)) / len(backwards), rel=0.01)


def test_a_step_follows_the_two_losses_by_their_weights(tiny, many, texts, tmp_path):
    recipe = replace(SHORT, edit_weight=0.3, locality_weight=500.0, grad_clip=1e9)
    state = training.MendTraining(tiny, recipe, Checkpoint(tmp_path / "checkpoint.safetensors", {}))
    with torch.no_grad():
        state.hypernetwork.log_rate += 3  # so that edits change what they should not
    examples = Examples(tiny, many, texts, 8).draw(2, np.random.default_rng(0))
    nll, kl = losses_of(tiny, state.hypernetwork, examples)
    rates = state.hypernetwork.log_rate
    of_nll, of_kl = (torch.autograd.grad(loss, rates, retain_graph=True)[0] for loss in (nll, kl))
    expected = 0.3 * of_nll + 500 * of_kl
    assert all(part.norm() > 0.05 * expected.norm() for part in (0.3 * of_nll, 500 * of_kl))
    state.optimizer.zero_grad = lambda: None
    state.make_step(examples)
    torch.testing.assert_close(state.hypernetwork.log_rate.grad, expected)
    state.validate(examples)
    record = state.log[-1]
    weighted = 0.3 * record["validation_nll"] + 500 * record["validation_kl"]
    assert record["validation_loss"] == pytest.approx(weighted, rel=1e-3)


def test_the_edited_model_is_asked_on_paraphrases_too_and_edited_on_the_prompt(tiny, many):
    request = replace(many[0], paraphrase_prompts=("At home Vouda plays the", "Vouda knows the"))
    drawn = [Examples(tiny, [request], [], 8).draw(1, np.random.default_rng(seed))[0] for seed in range(30)]

    def prompts(asked):
        return {tiny.tokenizer.decode(one.row[: one.predicting[0] + 1]) for one in asked}

    assert prompts(example.edited for example in drawn) == {request.text}
    assert prompts(example.asked for example in drawn) == {request.text, *request.paraphrase_prompts}


def test_gradients_reach_every_part_of_the_network(tiny, many, texts):
    network = hypernetwork(tiny).double()
    examples = Examples(tiny, many, texts, 8).draw(3, np.random.default_rng(0))
    losses = losses_of(tiny, network, examples)
    losses.sum().backward()
    for name, parameter in network.named_parameters():
        part = name.split(".")[-1]
        moves = parameter.grad.abs().sum() > 0
        assert moves == (part not in ("V", "s")), name  # these two first move once U has
    assert losses[1] > 0


def test_mean_and_std_are_those_of_the_tokens_that_give(tiny, many):
    network = hypernetwork(tiny).double()
    normalise(tiny, network, many, at_once=5)
    asked = continuations(tiny, [r.text for r in many], [r.target_new for r in many])
    found = token_gradients(tiny, asked, network.shapes)
    for shape in set(network.shapes.values()):
        names = [name for name in network.shapes if network.shapes[name] == shape]
        x = torch.cat([torch.cat([found.u[n], found.delta[n]], -1)[found.gives[n]] for n in names])
        transform = network.transform_of(names[0])
        torch.testing.assert_close(transform.mean, x.mean(0))
        torch.testing.assert_close(transform.std, x.std(0, correction=0))


def test_training_lowers_the_loss_and_edits_work(tiny, many, texts, tmp_path, bits):
    network = train(tiny, many, texts, replace(SHORT, n_steps=60, validate_every=15), tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 15, 30, 45, 60]
    best = min(log, key=lambda record: record["validation_loss"])
    assert best["validation_loss"] < 0.9 * log[0]["validation_loss"]
    save_hypernetwork(tmp_path / "mend.safetensors", network, tiny)
    for edit in mend_each(tiny, many[:3], setting(tmp_path / "mend.safetensors")):
        with applied(tiny, edit):
            assert float(plain_nll(tiny, edit.request)) < edit.info["losses"][0][0]


@pytest.mark.parametrize("calls", [3, 9, 13])  # before the first checkpoint; between two; after the second
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    tiny, many, texts, tmp_path, monkeypatch, interrupt_at, calls, bits
):
    def log_of(folder):
        records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if name != "seconds"} for record in records]

    whole = train(tiny, many, texts, SHORT, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, training, calls)
        train(tiny, many, texts, SHORT, tmp_path / "cut", progress=False)
    resumed = train(tiny, many, texts, SHORT, tmp_path / "cut", progress=False)
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert [record["step"] for record in log_of(tmp_path / "whole")] == [0, 3, 6, 8]
    log = [json.loads(line) for line in (tmp_path / "cut" / "training_log.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in log]
    assert seconds == sorted(seconds), "those before the interrupt count"
    assert {record["device"] for record in log} == {"cpu"}
    with monkeypatch.context() as patched:
        interrupt_at(patched, training, 0)  # a finished training is not repeated
        again = train(tiny, many, texts, SHORT, tmp_path / "cut", progress=False)
    assert all(torch.equal(again.state_dict()[name], expected) for name, expected in whole.state_dict().items())


def test_fewer_at_once_give_the_same(tiny, many, texts, tmp_path):
    recipe = replace(SHORT, n_steps=2)
    one = train(tiny, many, texts, recipe, tmp_path / "one", progress=False)
    other = train(tiny, many, texts, replace(recipe, at_once=1), tmp_path / "other", progress=False)
    for name, expected in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], expected, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_that_does_not_fit_is_refused(tiny, make_lm, many, texts, tmp_path, monkeypatch):
    def again(lm=tiny, recipe=SHORT, texts=texts):
        return train(lm, many, texts, recipe, tmp_path, progress=False)

    again()
    with monkeypatch.context() as patched, pytest.raises(NbkitError, match=r"\(other formula\)"):
        patched.setattr(training, "FORMAT", UNCLAMPED)
        again()
    with pytest.raises(NbkitError, match=r"checkpoint\.safetensors is of another training \(other rank, seed\)"):
        again(recipe=replace(SHORT, rank=3, seed=1))
    with pytest.raises(NbkitError, match=r"\(other model\)"):
        again(lm=make_lm("gpt2", seed=1))
    with pytest.raises(NbkitError, match=r"\(other data\)"):
        again(texts=texts[:1])
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(NbkitError, match=r"checkpoint\.safetensors is damaged, .* delete it"):
        again()


def test_too_few_requests_and_bad_recipes(tiny, many, texts, tmp_path):
    with pytest.raises(RequestError, match="3 requests are too few to hold out 3"):
        train(tiny, many[:3], texts, SHORT, tmp_path)
    for name in ("batch", "learning_rate", "rank"):
        with pytest.raises(MethodError, match=f"{name} must be"):
            replace(SHORT, **{name: 0})


def test_facts_that_are_held_out_are_known_by_relation_and_by_prompt(many):
    other_words = replace(many[0], prompt="At home, {} plays the", paraphrase_prompts=())
    assert not_among(many, [other_words]) == many[1:]
    nameless = replace(many[3], relation_id=None, target_new="boats")
    assert not_among(many, [nameless]) == [*many[:3], *many[4:]]
    assert not_among(many, []) == many


def test_neighbours_of_a_request_are_what_should_not_change(tiny, requests):
    request = replace(requests[0], neighborhood_prompts=("Ann plays the",), neighborhood_targets=("the harp",))
    examples = Examples(tiny, [request], [], 8)
    (example,) = examples.draw(5, np.random.default_rng(0))
    ((row, kept),) = example.unchanged
    target = target_ids(tiny, "the harp")
    assert row == tokenize(tiny, ["Ann plays the"])[0] + target[:-1] and len(kept) == len(target)


def test_the_shipped_recipes():
    published, files = recipe_of("gpt2-xl", changes={"data": "facts.json"})
    assert (published.rank, published.n_steps, published.learning_rate) == (1920, 10_000, 1e-6)
    assert (published.batch, published.edit_weight, published.locality_weight) == (10, 0.1, 1.0)
    assert (published.n_last_layers, published.n_hidden, published.grad_clip, published.first_rate) == (3, 1, 100, 1e-4)
    assert (files.data, files.texts, files.held_out) == ("facts.json", "", "")
    embedded, files = recipe_of("miniworld-gpt2")
    assert (embedded.rank, embedded.n_steps, embedded.learning_rate) == (128, 3_000, 1e-4)
    assert (files.data, files.texts, files.held_out) == ("miniworld-facts", "miniworld-training-lines", "miniworld")
    names = {field.name for field in fields(MendRecipe)} | {field.name for field in fields(files)}
    assert set(tomllib.loads(RECIPES.read_text())["published"]) == names


def test_a_file_changes_the_shipped_recipe_and_single_values_change_the_file(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('rank = 7\nlearning_rate = 1\nheld_out = ""\n')
    recipe, files = recipe_of("miniworld-gpt2", file, {"rank": "9", "first_rate": "1e-5", "out": "12"})
    shipped, _ = recipe_of("miniworld-gpt2")
    assert recipe == replace(shipped, rank=9, first_rate=1e-5, learning_rate=1.0)
    assert (files.data, files.held_out, files.out) == ("miniworld-facts", "", "12")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": "9"}, "a recipe has no ranks; it has n_last_layers, rank, .*data, texts"),
        ({"rank": "nine"}, "rank must be int, not 'nine'"),
        ({"rank": "0"}, "rank must be a whole number from 1 on, not 0"),
        ({"rank": 1.5}, "rank must be a whole number from 1 on, not 1.5"),
        ({"data": ""}, "give it a file of requests to train on"),
    ],
)
def test_values_that_a_recipe_cannot_have(changes, message):
    with pytest.raises((MethodError, RequestError), match=message):
        recipe_of("miniworld-gpt2", changes=changes)


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "own.toml").write_text("rank: 9")
    for name in ("own.toml", "nowhere.toml"):
        with pytest.raises(MethodError, match=f"{name} is no recipe"):
            recipe_of("miniworld-gpt2", tmp_path / name)


def test_training_from_files(tiny, many, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    data, held_out, lines = tmp_path / "data.json", tmp_path / "held_out.json", tmp_path / "texts.txt"
    for path, some in ((data, many), (held_out, many[:2])):
        names = ("prompt", "subject", "target_new", "relation_id", "paraphrase_prompts")
        path.write_text(json.dumps([{name: getattr(request, name) for name in names} for request in some]))
    lines.write_text("\n".join(texts))
    seen = []
    monkeypatch.setattr(training, "train", lambda lm, requests, *rest: seen.append(requests) or train(
        lm, requests, *rest))  # fmt: skip
    given = {"n_steps": 2, "data": str(data), "texts": str(lines), "held_out": str(held_out)}
    out = train_to_file(tiny, *recipe_of(tiny.name, changes=CHANGES | given), progress=False)
    assert out == weights_path(tiny.name) and (out.parent / "mend_training_log.jsonl").is_file()
    assert [request.subject for request in seen[0]] == [request.subject for request in many[2:]]
    assert len(mend_each(tiny, many, setting())) == len(many)


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """`command(*words)` runs train-mend on a saved tiny model."""
    tiny.model.float().save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")

    def run(*words):
        fixed = ["nbkit", "train-mend", "--model", str(tmp_path / "model"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*fixed, *map(str, words)])
        main()

    return run


def test_the_command_wants_data_for_a_model_that_is_not_embedded(command):
    with pytest.raises(SystemExit, match="give it a file of requests to train on .-p data FILE."):
        command()


def test_the_command_names_what_a_recipe_has(command):
    with pytest.raises(SystemExit, match="a recipe has no steps; it has n_last_layers, .*n_steps"):
        command("-p", "steps", "3")


def test_the_command_takes_a_recipe_and_changes_of_it(command, many, tmp_path, capsys):
    data, own, work = tmp_path / "data.json", tmp_path / "own.toml", tmp_path / "work"
    out = tmp_path / "out" / "trained.safetensors"
    names = ("prompt", "subject", "target_new", "relation_id")
    data.write_text(json.dumps([{name: getattr(request, name) for name in names} for request in many]))
    own.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in CHANGES.items()))
    with pytest.raises(SystemExit) as end:
        command("--recipe", own, "-p", "data", data, "-p", "n_steps=2", "-p", "out", out, "-p", "work", work)
    assert end.value.code == 0 and capsys.readouterr().out.strip() == str(out) and out.is_file()
    log = (out.parent / "mend_training_log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [0, 2]
    assert (work / "checkpoint.safetensors").is_file()
