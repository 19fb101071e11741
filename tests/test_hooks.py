"""Hooks read and replace the right tensors in every architecture, and never stay behind."""

import pytest
import torch

from nbkit.models.hooks import capture, replace
from nbkit.models.prompts import encode


def affine(lm, layer: int, keys: torch.Tensor) -> torch.Tensor:
    """W k + b by the formula, with W in orientation (d_out, d_in)."""
    module = lm.projection(layer)
    weight = module.weight.T if lm.architecture.transposed else module.weight
    values = torch.einsum("oi,bpi->bpo", weight, keys)
    return values if module.bias is None else values + module.bias


def n_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_projection_maps_the_captured_key_to_the_captured_value(lm, texts, tolerance):
    batch = encode(lm, texts)
    for layer in range(lm.n_layers):
        projection = lm.projection(layer)
        with torch.no_grad(), capture(projection, "input", shape=batch.shape) as key:
            with capture(projection, "output", shape=batch.shape) as value:
                lm.logits(batch)
        assert key.value.shape == (*batch.shape, lm.d_mlp)
        assert value.value.shape == (*batch.shape, lm.d_model)
        torch.testing.assert_close(affine(lm, layer, key.value), value.value, rtol=tolerance, atol=tolerance)


def test_the_value_is_what_the_mlp_adds_to_the_stream(lm, texts):
    """Replacing one layer's value by zero changes the logits, by exactly as much as zeroing weight and bias does."""
    batch = encode(lm, texts[:2])
    module = lm.projection(1)
    with torch.no_grad():
        before = lm.logits(batch)
        with replace(module, torch.zeros_like, shape=batch.shape):
            replaced = lm.logits(batch)
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()
        assert torch.equal(replaced, lm.logits(batch))
    assert not torch.allclose(replaced, before)


def test_replacing_by_the_same_changes_nothing(lm, texts):
    batch = encode(lm, texts)
    with torch.no_grad():
        before = lm.logits(batch)
        for module in (lm.projection(1), lm.model.get_submodule(lm.architecture.attention_path(1))):
            for where in ("input", "output"):
                with replace(module, torch.clone, where, shape=batch.shape):
                    assert torch.equal(lm.logits(batch), before)


def test_an_input_can_be_replaced(lm, texts, tolerance):
    batch = encode(lm, texts)
    with torch.no_grad(), replace(lm.projection(1), lambda keys: 2 * keys, "input", shape=batch.shape):
        with capture(lm.projection(1), "input", shape=batch.shape) as key:
            with capture(lm.projection(1), shape=batch.shape) as value:
                lm.logits(batch)
    torch.testing.assert_close(affine(lm, 1, key.value), value.value, rtol=tolerance, atol=tolerance)


def test_attention_gives_its_tensor_out_of_the_tuple(lm, texts):
    batch = encode(lm, texts)
    with torch.no_grad(), capture(lm.model.get_submodule(lm.architecture.attention_path(0))) as output:
        lm.logits(batch)
    assert output.value.shape == (*batch.shape, lm.d_model)


def test_stop_ends_the_pass_below_the_layers_above(lm, texts):
    batch = encode(lm, texts)
    reached = False
    with torch.no_grad(), capture(lm.projection(2)) as above:
        with capture(lm.projection(1), stop=True) as kept:
            lm.logits(batch)
            reached = True
    assert kept.value is not None and above.value is None and not reached


def test_stop_of_an_outer_capture_passes_through_an_inner_one(tiny, texts):
    batch = encode(tiny, texts)
    with torch.no_grad(), capture(tiny.projection(1), stop=True) as outer:
        with capture(tiny.projection(2)) as inner:
            tiny.logits(batch)
    assert outer.value is not None and inner.value is None


@pytest.mark.parametrize("context", [capture, lambda module: replace(module, torch.clone)])
def test_hooks_are_gone_after_an_exception(tiny, context):
    with pytest.raises(KeyError), context(tiny.projection(1)):
        assert n_hooks(tiny.model) == 1
        raise KeyError
    assert n_hooks(tiny.model) == 0


def test_an_exception_inside_the_pass_is_not_swallowed(tiny, texts):
    def fail(_values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace(tiny.projection(1), fail):
        tiny.logits(encode(tiny, texts))
    assert n_hooks(tiny.model) == 0


def test_where_is_checked(tiny):
    with pytest.raises(ValueError, match="'input' or 'output'"), capture(tiny.projection(0), "inside"):
        pass
