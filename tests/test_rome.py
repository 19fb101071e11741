"""ROME: equal to its plain formula on every architecture, and to the published implementation's numbers."""

import json
import re

import numpy as np
import pytest
import torch

from nbkit.edits.overlays import applied
from nbkit.errors import MethodError, ModelError, PromptError, RequestError
from nbkit.keys.extract import in_contexts, keys_and_values
from nbkit.keys.solving import SecondMoments
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.rome import rome_variants
from nbkit.methods.table import METHODS
from nbkit.methods.verbs import edit, edit_sequence, settings_for
from nbkit.models.loading import load
from nbkit.models.prompts import context_templates
from nbkit.plain import rome as plain_rome
from nbkit.records.requests import EditRequest

LAYER = 1
# Few and gentle steps: a random model's loss is rough; what is compared is the formula, not how far rounding spreads.
SHORT = {"layer": LAYER, "v_num_grad_steps": 5, "v_lr": 0.1}


def reference(lm, request, contexts, **options):
    return plain_rome.rome(lm, request, LAYER, contexts, lr=SHORT["v_lr"], steps=SHORT["v_num_grad_steps"], **options)


def relative_error(found, expected) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def random_second_moment(d: int) -> torch.Tensor:
    root = torch.randn(d, 2 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T / (2 * d)


@pytest.fixture
def bits(tiny):
    """Asserts at the end that the model is what it was, bit for bit."""
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    yield
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert tiny.n_applied == 0


@pytest.mark.parametrize("ridge", [None, 0.0, 0.5], ids=["without C", "with C", "with C and a ridge"])
@pytest.mark.parametrize("key_mode", ["mixed", "prefixed", "plain"])
def test_it_equals_the_plain_formula(lm, requests, contexts, tolerance, key_mode, ridge):
    C = None if ridge is None else random_second_moment(lm.d_mlp)
    request = requests[2]  # subject in the middle, target of several tokens
    (found,) = edit(
        lm, request, context_templates=contexts, second_moment=C, key_mode=key_mode, second_moment_ridge=ridge, **SHORT
    )
    ridged = C if not ridge else C + ridge * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
    expected = reference(lm, request, contexts, key_mode=key_mode, C=ridged)
    tolerance *= 100  # five steps of Adam
    assert relative_error(found.deltas[lm.weight_name(LAYER)].dense(), expected["delta_W"]) < tolerance
    assert found.info["numerator"] == pytest.approx(expected["numerator"], rel=tolerance)
    for name in ("denominator", "signed_denominator"):
        assert found.info[name] == pytest.approx(expected[name], rel=tolerance)
    assert np.allclose(found.info["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
    assert relative_error(found.info["u"], expected["u"]) < tolerance


@pytest.mark.parametrize("with_plain", [True, False], ids=["the plain prompt too", "prefixes alone"])
@pytest.mark.parametrize("target_init", ["unprefixed", "prefixed_mean"])
def test_what_v_star_starts_from_and_templates_without_the_plain_prompt(
    lm, requests, contexts, tolerance, target_init, with_plain
):
    """Against the plain formula, in each key mode; where both are means over the templates the residual is δ itself."""
    request, contexts = requests[2], contexts if with_plain else contexts[1:]
    tolerance *= 100
    for key_mode in ("mixed", "prefixed", "plain"):
        chosen = {"key_mode": key_mode, "target_init": target_init}
        (found,) = edit(lm, request, context_templates=contexts, **chosen, **SHORT)
        expected = reference(lm, request, contexts, **chosen)
        assert relative_error(found.deltas[lm.weight_name(LAYER)].dense(), expected["delta_W"]) < tolerance
        assert relative_error(found.info["value_star"], expected["v_star"]) < tolerance
        assert found.info["signed_denominator"] == pytest.approx(expected["signed_denominator"], rel=tolerance)
        assert np.allclose(found.info["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        assert (found.info["n_templates"], found.info["target_init"]) == (len(contexts), target_init)
        starts_where_the_key_is = (key_mode == "prefixed") == (target_init == "prefixed_mean")
        delta = found.info["value_star"] - found.info["value_init"]
        assert starts_where_the_key_is == (found.info["numerator"] == pytest.approx(float(delta.norm()), rel=tolerance))


def test_the_search_stops_once_the_target_has_been_the_first_choice_so_many_times(lm, contexts, tolerance):
    """Against the plain formula; side by side, one by one, and by whole passes. The subject ends the prompt, so that a
    random model comes to say the target; not Gemma 3, whose norms bound what the value can do."""
    requests = [EditRequest("Therefore {}", "Ann", "drum"), EditRequest("The river runs through {}", "Vouda", "harp")]
    search = {"v_lr": 0.5, "v_num_grad_steps": 12, "v_weight_decay": 0.0, "clamp_norm_factor": 100.0, "kl_factor": 0.0}
    chosen = {"layer": LAYER, **search, "early_stop_loss": 0.0, "context_templates": contexts[:2], "progress": False}
    plain = {"lr": 0.5, "steps": 12, "clamp": 100.0, "weight_decay": 0.0, "kl_factor": 0.0, "early_stop": 0.0}
    lengths = {}
    for n in (1, 3):
        together = edit(lm, requests, stop_after_first_choice=n, **chosen)
        alone = edit(lm, requests, stop_after_first_choice=n, batch_size=1, **chosen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm, "replayable", False)
            whole = edit(lm, requests, stop_after_first_choice=n, **chosen)
        for request, *found in zip(requests, together, alone, whole, strict=True):
            expected = plain_rome.rome(lm, request, LAYER, contexts[:2], first_choices=n, **plain)
            lengths[request.subject, n] = len(expected["losses"])
            for one in found:
                assert len(one.info["losses"]) == len(expected["losses"])
                assert one.info["stop_reason"] == "first choice" or len(expected["losses"]) == 12
                assert relative_error(one.info["value_star"], expected["v_star"]) < max(1000 * tolerance, 1e-8)
    assert lengths["Ann", 1] < lengths["Ann", 3] < 12 or "gemma3" in lm.name


def test_variants_share_a_search_and_are_what_each_gives_alone(tiny, requests, contexts):
    C = random_second_moment(tiny.d_mlp)
    several = [
        settings_for(tiny, "rome", contexts[1:], given, {**SHORT, "key_mode": key_mode})
        for key_mode in ("mixed", "prefixed", "plain")
        for given in (None, C)
    ]
    made = rome_variants(tiny, requests, several[0], several)
    name = tiny.weight_name(LAYER)
    for place, variant in enumerate(several):
        alone = METHODS["rome"].each(tiny, requests, variant)
        for of_request, expected in zip(made, alone, strict=True):
            torch.testing.assert_close(of_request[place].deltas[name].dense(), expected.deltas[name].dense())
            assert of_request[place].info["second_moment"] == expected.info["second_moment"]
            assert of_request[place].hparams == expected.hparams
    other = settings_for(tiny, "rome", contexts[1:], None, {**SHORT, "v_lr": 0.2})
    with pytest.raises(MethodError, match="share a search"):
        rome_variants(tiny, requests, several[0], [other])


@pytest.mark.parametrize("key_mode", ["mixed", "prefixed", "plain"])
def test_the_edited_weight_maps_the_key_to_v_star(lm, requests, contexts, tolerance, key_mode):
    """W' k = v*, measured by a new pass over the edited model, at every subject and after leaving not any more."""
    for request in requests:
        (found,) = edit(lm, [request], context_templates=contexts, key_mode=key_mode, **SHORT)
        prompts = in_contexts(request, contexts)

        def values(prompts=prompts, request=request):
            values = keys_and_values(lm, prompts, [request.subject] * len(prompts), LAYER).values
            return values.mean(0) if key_mode == "prefixed" else values[0]

        before = values()
        with applied(lm, found):
            assert relative_error(values(), found.info["value_star"]) < 10 * tolerance
        assert torch.equal(values(), before)
        assert relative_error(before, found.info["value_now"]) < tolerance


def test_the_numbers_in_info_belong_together(tiny, requests, contexts):
    for key_mode in ("mixed", "prefixed", "plain"):
        for found in edit(tiny, requests, context_templates=contexts, key_mode=key_mode, progress=False, **SHORT):
            info = found.info
            delta = found.deltas[tiny.weight_name(LAYER)]
            key = info["key_mean"] if key_mode == "prefixed" else info["key_plain"]
            assert info["signed_denominator"] == pytest.approx(float(key @ info["u"]))
            assert info["denominator"] == abs(info["signed_denominator"])
            assert info["numerator"] == pytest.approx(float((info["value_star"] - info["value_now"]).norm()))
            assert info["update_norm"] == pytest.approx(info["numerator"] / info["denominator"])
            assert info["update_norm"] == pytest.approx(float(delta.dense().norm()))
            assert float(info["u"].norm()) == pytest.approx(1)
            assert (delta.left.shape, delta.right.shape) == ((32, 1), (1, 48))
            assert info["n_templates"] == len(contexts) and info["key_mode"] == key_mode and info["layer"] == LAYER
            for total, nll, kl, decay in info["losses"]:
                assert total == pytest.approx(nll + kl + decay)
    kinds = [found.info["subject_kind"] for found in edit(tiny, requests, context_templates=contexts, **SHORT)]
    assert kinds == ["one-token first", "one-token first", "later"]


def test_target_probability_is_what_the_model_with_the_value_gives(tiny, requests, contexts):
    (found,) = edit(tiny, requests[0], context_templates=contexts, **{**SHORT, "v_num_grad_steps": 1})
    target = tiny.tokenizer(" Sennifar", add_special_tokens=False).input_ids
    expected = 0
    for prompt in in_contexts(requests[0], contexts):  # one step computes a loss and moves nothing: the plain model's
        ids = tiny.tokenizer(prompt.replace("{}", "Vouda")).input_ids
        log_p = tiny.model(torch.tensor([ids + target[:-1]])).logits[0].log_softmax(-1)
        of_tokens = [float(log_p[len(ids) - 1 + t, token]) for t, token in enumerate(target)]
        expected += np.exp(np.mean(of_tokens)) / len(contexts)
    assert found.info["target_probability"] == pytest.approx(expected)
    assert found.info["losses"][0][2:] == [0, 0]
    assert torch.equal(found.info["value_star"], found.info["value_init"])


def test_the_clamp_holds(tiny, requests, contexts):
    hparams = {**SHORT, "v_lr": 5.0, "clamp_norm_factor": 0.5, "v_num_grad_steps": 10}
    for found in edit(tiny, requests, context_templates=contexts, **hparams):
        moved = (found.info["value_star"] - found.info["value_init"]).norm()
        assert float(moved) <= 0.5 * float(found.info["value_init"].norm()) * (1 + 1e-9)


def test_it_stops_early_below_the_loss(tiny, requests, contexts):
    hparams = {**SHORT, "v_num_grad_steps": 12}
    (whole,) = edit(tiny, requests[0], context_templates=contexts, **hparams)
    assert whole.info["stop_reason"] == "steps" and len(whole.info["losses"]) == 12
    totals = [losses[0] for losses in whole.info["losses"]]
    threshold = (totals[0] + totals[-1]) / 2
    n_steps = 1 + next(i for i, total in enumerate(totals) if total < threshold)
    assert 1 < n_steps < 12
    (found,) = edit(tiny, requests[0], context_templates=contexts, early_stop_loss=threshold, **hparams)
    assert found.info["stop_reason"] == "loss"
    assert found.info["losses"] == whole.info["losses"][:n_steps]


def test_a_nan_model_is_reported_not_hidden(tiny, requests, contexts):
    with torch.no_grad():
        tiny.weight(2)[0, 0] = torch.nan
    (found,) = edit(tiny, requests[0], context_templates=contexts, **SHORT)
    assert found.info["stop_reason"] == "nan" and np.isnan(found.info["losses"][-1][0])
    assert len(found.info["losses"]) == 1
    assert tiny.weight_name(LAYER) in found.deltas


def test_the_edited_model_says_the_target_more(make_lm, contexts):
    """The whole chain from prompt to weight does what it should, as far as a random model can be moved."""
    lm = make_lm("gpt2")
    request = EditRequest("{} is located in", "Danielle Darrieux", "Krela")
    hparams = {"layer": 0, "v_lr": 1.0, "v_num_grad_steps": 80, "v_weight_decay": 0.0, "clamp_norm_factor": 100.0}
    (found,) = edit(lm, request, context_templates=contexts, key_mode="plain", **hparams)
    ids = torch.tensor([lm.tokenizer(request.text).input_ids])
    target = lm.tokenizer(" Krela", add_special_tokens=False).input_ids[0]
    before = lm.model(ids).logits[0, -1].softmax(-1)[target]
    with applied(lm, found):
        after = lm.model(ids).logits[0, -1].softmax(-1)[target]
    assert found.info["losses"][-1][1] < found.info["losses"][0][1]
    assert after > 5 * before


def test_many_requests_give_the_same_as_each_alone(tiny, requests, contexts, bits):
    together = edit(tiny, requests, context_templates=contexts, **SHORT)
    for request, found in zip(requests, together, strict=True):
        (alone,) = edit(tiny, request, context_templates=contexts, **SHORT)
        assert found.request is request and found.method == "rome" and found.hparams["v_lr"] == 0.1
        name = tiny.weight_name(LAYER)
        torch.testing.assert_close(found.deltas[name].dense(), alone.deltas[name].dense(), rtol=1e-10, atol=1e-12)


def test_templates_are_sampled_with_seed_0_when_none_are_given(tiny, requests, bits):
    (default,) = edit(tiny, requests[0], **SHORT)
    (given,) = edit(tiny, requests[0], context_templates=context_templates(tiny, seed=0), **SHORT)
    assert default.info["n_templates"] == 21
    assert default.info["losses"] == given.info["losses"]


@pytest.mark.parametrize("subject", ["a {} b", "{x", "São Tomé", "東京都 🙂"])
def test_subjects_with_braces_and_of_any_script(tiny, contexts, subject, bits):
    request = EditRequest("{z} says {} and " + subject.replace("{}", "{ }") + " is", subject, "the {} song")
    (found,) = edit(tiny, request, context_templates=contexts, **SHORT)
    assert np.isfinite(found.info["losses"]).all()


def test_a_subject_that_stands_twice_is_edited_where_the_template_says(tiny, contexts):
    first = EditRequest("{} and Vouda are", "Vouda", "Krela")
    second = EditRequest("Vouda and {} are", "Vouda", "Krela")
    edits = edit(tiny, [first, second], context_templates=contexts, **SHORT)
    keys = [found.info["key_plain"] for found in edits]
    assert not torch.allclose(*keys)
    plain = keys_and_values(tiny, ["{}", "Vouda and {}"], ["Vouda"] * 2, LAYER).keys
    torch.testing.assert_close(torch.stack(keys), plain)


def test_a_bfloat16_model_is_edited_with_float32_updates(make_lm, requests, contexts):
    lm = make_lm("llama", dtype=torch.bfloat16)
    (found,) = edit(lm, requests[0], context_templates=contexts, **SHORT)
    assert found.deltas[lm.weight_name(LAYER)].left.dtype == torch.float32
    with applied(lm, found):
        assert lm.weight(LAYER).dtype == torch.bfloat16


# --- the published implementation's numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "hparams", "tolerance"),
    [
        ("rome_off", "float32", {}, 1e-5),
        ("rome_on64", "float64", {}, 1e-9),
        ("rome_stop", "float32", {"v_weight_decay": 0.0, "clamp_norm_factor": 6}, 1e-5),
    ],
)
def test_it_equals_the_published_implementation(shared, name, dtype, hparams, tolerance):
    folder = shared / "oracles"
    records = json.loads((folder / "requests.json").read_text())
    contexts = json.loads((folder / "contexts.json").read_text())
    C = np.load(folder / "second_moment_3.npy") if name == "rome_on64" else None
    lm = load(folder / "model", device="cpu", dtype=dtype)
    requests = [EditRequest(**record, case_id=i) for i, record in enumerate(records)]
    edits = edit(lm, requests, context_templates=contexts, second_moment=C, layer=3, progress=False, **hparams)
    with np.load(folder / f"{name}.npz") as expected:
        for i, found in enumerate(edits):
            update = np.outer(expected[f"v_{i}"].astype(float), expected[f"u_{i}"].astype(float))
            assert relative_error(found.deltas[lm.weight_name(3)].dense(), update) < tolerance, requests[i]
            assert len(found.info["losses"]) == len(expected[f"losses_{i}"])
            assert np.allclose(found.info["losses"], expected[f"losses_{i}"], rtol=1e-4, atol=1e-6)
            for mine, theirs in [("key_plain", "kstar"), ("value_star", "vstar"), ("value_now", "cur_output")]:
                assert relative_error(found.info[mine], expected[f"{theirs}_{i}"]) < tolerance, (i, mine)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_methods_and_hyper_parameters(tiny, requests, contexts):
    for verb in (edit, edit_sequence):
        with pytest.raises(MethodError, match="unknown method 'roma'; known: "):
            verb(tiny, requests, method="roma")
        with pytest.raises(MethodError, match=r"rome has no hyper-parameter v_rl; it has v_lr, "):
            verb(tiny, requests, layer=1, v_rl=0.5)
        with pytest.raises(ModelError, match="layer 3 does not exist"):
            verb(tiny, requests, layer=3)
        message = 'rome has no default layer for tiny-gpt2; give layer=..., of 0 to 2, or layer="auto" for 1, as deep'
        with pytest.raises(MethodError, match=re.escape(message)):
            verb(tiny, requests)
        with pytest.raises(PromptError, match="context_templates"):
            verb(tiny, requests, layer=1, context_templates=["The. {}", "{}"])
        with pytest.raises(RequestError, match="request 1 is no EditRequest but dict"):
            verb(tiny, [requests[0], {"prompt": "{} is"}], layer=1)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"key_mode": "mixd"}, "key_mode must be one of mixed, prefixed, plain, not 'mixd'"),
        ({"key_mode": 0}, "key_mode must be one of mixed, prefixed, plain, not 0"),
        ({"target_init": "mean"}, "target_init must be one of unprefixed, prefixed_mean, not 'mean'"),
        ({"layer": 1.5}, "layer must be a whole number, not 1.5"),
        ({"layer": True}, "layer must be a whole number, not True"),
        ({"v_lr": "0.5"}, "v_lr must be a number above 0, not '0.5'"),
        ({"v_lr": 0}, "v_lr must be a number above 0, not 0"),
        ({"v_lr": float("nan")}, "v_lr must be a number above 0, not nan"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps must be a whole number from 1 on"),
        ({"v_num_grad_steps": 2.0}, "v_num_grad_steps must be a whole number from 1 on"),
        ({"clamp_norm_factor": -1}, "clamp_norm_factor must be a number above 0"),
        ({"kl_factor": -0.1}, "kl_factor must be a number from 0 on"),
        ({"v_weight_decay": -0.1}, "v_weight_decay must be a number from 0 on"),
        ({"early_stop_loss": [0.05]}, r"early_stop_loss must be a number, not \[0.05\]"),
    ],
)
def test_bad_hyper_parameters(tiny, requests, hparams, message):
    with pytest.raises(MethodError, match=message):
        edit(tiny, requests, **{"layer": 1, **hparams})


def test_a_prompt_beyond_the_context_names_its_request(tiny, contexts, bits):
    long = EditRequest("Vouda " * 100 + "{} is", "Ann", "Krela", case_id=17)
    with pytest.raises(PromptError, match=r"request 17 \(subject 'Ann'\).*more than the context of tiny-gpt2 \(96\)"):
        edit(tiny, long, context_templates=contexts, **SHORT)
    long_target = EditRequest("{} is", "Ann", "Krela " * 100, case_id=18)
    with pytest.raises(PromptError, match="request 18"):
        edit(tiny, long_target, context_templates=contexts, **SHORT)


def test_a_second_moment_is_factored_once_for_many_calls(tiny, requests, contexts, monkeypatch):
    C = random_second_moment(tiny.d_mlp)
    moments = SecondMoments(C, tiny)
    (given,) = edit(tiny, requests[0], context_templates=contexts, second_moment=C, **SHORT)
    (shared,) = edit(tiny, requests[0], context_templates=contexts, second_moment=moments, **SHORT)
    assert torch.equal(given.info["u"], shared.info["u"])
    ridged = {"second_moment": moments, "second_moment_ridge": 0.5}
    (other,) = edit(tiny, requests[0], context_templates=contexts, **ridged, **SHORT)
    assert not torch.allclose(other.info["u"], shared.info["u"])
    monkeypatch.setattr("nbkit.keys.solving.factor", lambda _matrix: pytest.fail("factored again"))
    edit(tiny, requests[1], context_templates=contexts, second_moment=moments, **SHORT)
    edit(tiny, requests[1], context_templates=contexts, **ridged, **SHORT)


def test_a_second_moment_of_another_model(tiny, requests, contexts):
    with pytest.raises(MethodError, match=r"must be \(48, 48\)"):
        edit(tiny, requests[0], context_templates=contexts, second_moment=torch.eye(7), **SHORT)


# --- hyper-parameters by model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai-community/gpt2-xl", (17, 20, 0.5)),
        ("gpt2-xl", (17, 20, 0.5)),
        ("EleutherAI/gpt-j-6B", (5, 20, 0.5)),
        ("meta-llama/Llama-2-7b-hf", (5, 25, 1e-3)),
        ("/models/Mistral-7B-v0.1/", (5, 25, 1e-3)),
    ],
)
def test_defaults_follow_the_model_family(tiny, monkeypatch, name, expected):
    tiny.name = name
    monkeypatch.setattr(tiny, "check_layer", lambda layer: layer)
    found = hyper_parameters(tiny, "rome")
    assert (found.layer, found.v_num_grad_steps, found.v_weight_decay) == expected
    assert (found.key_mode, found.v_lr, found.clamp_norm_factor, found.kl_factor) == ("mixed", 0.5, 4.0, 0.0625)
    assert hyper_parameters(tiny, "rome", v_num_grad_steps=3).v_num_grad_steps == 3
    given_as_none = hyper_parameters(tiny, "rome", layer=None, v_num_grad_steps=None, key_mode=None)
    assert given_as_none == found


# --- sequences --------------------------------------------------------------------------------------------------------


def test_a_sequence_edits_the_edited_model(tiny, requests, contexts, bits):
    weight = tiny.weight(LAYER)
    clean = weight.clone()
    expected = clean.clone()
    (first,) = edit(tiny, requests[0], context_templates=contexts, **SHORT)
    seen = []
    for step in edit_sequence(tiny, requests, context_templates=contexts, progress=False, **SHORT):
        assert step.request is requests[step.index] and step.edit.request is step.request
        expected += step.edit.deltas[tiny.weight_name(LAYER)].dense().T
        torch.testing.assert_close(weight, torch.nn.Parameter(expected, requires_grad=False))
        assert tiny.n_applied == step.index + 1
        seen.append(step.edit)
    assert len(seen) == 3
    assert seen[0].info["losses"] == first.info["losses"]
    with applied(tiny, first):
        (second,) = edit(tiny, requests[1], context_templates=contexts, **SHORT)
    assert seen[1].info["losses"] == second.info["losses"]
    assert torch.equal(weight, clean)


@pytest.mark.parametrize("how", ["break", "raise", "unnamed", "close", "fail"])
def test_a_sequence_that_ends_early_restores(tiny, requests, contexts, how, bits):
    clean = tiny.weight(LAYER).clone()
    if how == "fail":  # the second request cannot be edited
        requests[1] = EditRequest("Vouda " * 100 + "{} is", "Ann", "Krela", case_id=17)
    steps = edit_sequence(tiny, requests, context_templates=contexts, progress=False, **SHORT)
    if how == "break":
        for _step in steps:
            break
        del steps, _step
    elif how == "raise":
        with pytest.raises(KeyboardInterrupt):
            for _step in steps:
                raise KeyboardInterrupt
        steps.close()
    elif how == "unnamed":
        with pytest.raises(KeyboardInterrupt):
            for _step in edit_sequence(tiny, requests, context_templates=contexts, progress=False, **SHORT):
                raise KeyboardInterrupt
    elif how == "close":
        next(steps)
        assert not torch.equal(tiny.weight(LAYER), clean)
        steps.close()
    else:
        with pytest.raises(PromptError, match="request 17"):
            list(steps)
    assert torch.equal(tiny.weight(LAYER), clean)
