"""Keys and values are those of an explicit forward pass, whatever the batch and the padding."""

import pytest
import torch

from nbkit.errors import ModelError, PromptError
from nbkit.keys.extract import in_contexts, keys, keys_and_values, token_keys
from nbkit.records.requests import EditRequest


def key_by_hand(lm, text: str, subject_end: int, layer: int) -> torch.Tensor:
    """The projection's input at the last token of text[:subject_end], from a pass over this one text alone."""
    seen = []
    handle = lm.projection(layer).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        lm.model(torch.tensor([lm.tokenizer(text).input_ids]))
    handle.remove()
    n_before = len(lm.tokenizer(text[:subject_end]).input_ids)  # the subjects used here end where a token ends
    return seen[0].reshape(-1, lm.d_mlp)[n_before - 1]


def test_keys_are_the_projections_inputs(lm, requests, contexts, tolerance):
    found = keys(lm, requests, 1, contexts)
    assert found.shape == (len(requests), len(contexts), lm.d_mlp)
    for i, request in enumerate(requests):
        for j, prompt in enumerate(in_contexts(request, contexts)):
            text, end = prompt.replace("{}", request.subject), prompt.index("{}") + len(request.subject)
            expected = key_by_hand(lm, text, end, 1).to(found.dtype)
            torch.testing.assert_close(found[i, j], expected, rtol=tolerance, atol=tolerance * expected.abs().max())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("batch_size", [64, 4])
def test_whole_passes_give_the_same_keys_whatever_batch_and_padding(
    lm, requests, contexts, tolerance, padding, batch_size
):
    prompts = [prompt for request in requests for prompt in in_contexts(request, contexts)]
    subjects = [request.subject for request in requests for _ in contexts]
    whole = keys_and_values(lm, prompts, subjects, 1, batch_size, padding).keys
    found = keys(lm, requests, 1, contexts).flatten(0, 1)
    torch.testing.assert_close(found, whole, rtol=tolerance, atol=tolerance * whole.abs().max())


def test_values_are_the_affine_map_of_keys(lm, contexts, tolerance):
    prompts = [context.replace("{}", "{} is located in") for context in contexts]
    passed = keys_and_values(lm, prompts, ["Vouda"] * len(prompts), 2)
    weight = lm.weight(2) if lm.architecture.transposed else lm.weight(2).T
    expected = passed.keys @ weight
    if lm.projection(2).bias is not None:
        expected = expected + lm.projection(2).bias
    torch.testing.assert_close(passed.values, expected, rtol=tolerance, atol=tolerance * expected.abs().max())


def test_without_templates_there_is_one_key_a_request(tiny, requests):
    found = keys(tiny, requests, 0)
    assert found.shape == (3, 1, tiny.d_mlp)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_token_keys_leave_padding_out(lm, texts, tolerance, padding):
    found = token_keys(lm, texts, 1, batch_size=2, padding=padding)
    for text, text_keys in zip(texts, found, strict=True):
        assert len(text_keys) == len(lm.tokenizer(text).input_ids)
        expected = key_by_hand(lm, text, len(text), 1).to(text_keys.dtype)
        torch.testing.assert_close(text_keys[-1], expected, rtol=tolerance, atol=tolerance * expected.abs().max())


def test_keys_of_a_bfloat16_model_are_float32(make_lm, requests):
    assert keys(make_lm("gpt2", dtype=torch.bfloat16), requests, 0).dtype == torch.float32


def test_errors_name_the_request_and_the_layer(tiny, requests):
    long = EditRequest("Vouda " * 100 + "{} is", "Ann", "x", case_id="far")
    with pytest.raises(PromptError, match=r"request far \(subject 'Ann'\): .* more than the context"):
        keys(tiny, [*requests, long], 1)
    with pytest.raises(ModelError, match="layer 7 does not exist"):
        keys(tiny, requests, 7)
    with pytest.raises(PromptError, match="context_templates"):
        keys(tiny, requests, 1, ["The. {}"])
