"""Hooks read and replace the right tensors in every architecture, and never stay behind."""

import functools
import inspect
import threading

import pytest
import torch

import nbkit
from nbkit.edits import placed
from nbkit.errors import ModelError
from nbkit.keys.extract import keys
from nbkit.models.generation import generated
from nbkit.models.hooks import capture, instead, replace
from nbkit.models.prompts import encode
from nbkit.records.results import Store
from nbkit.studies.single import single_edits


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


def twice(_module, _args, output):
    return 2 * output


def left_behind(lm):
    """Ways in which something lies on a model that nbkit does not know."""
    projection = lm.projection(1)
    yield "a hook .*twice", projection.register_forward_hook(twice).remove
    yield "a hook .*print", projection.register_forward_pre_hook(print).remove
    projection.forward = functools.wraps(projection.forward)(functools.partial(twice, projection, ()))
    yield "another forward .*", lambda: projection.__dict__.pop("forward", None)


def test_no_verb_begins_on_a_model_with_foreign_hooks(tiny, requests, texts, tmp_path):
    options = {"layer": 1, "context_templates": ["{}"], "v_num_grad_steps": 1, "progress": False}
    verbs = {
        "edit": lambda: nbkit.edit(tiny, requests, **options),
        "sequence": lambda: nbkit.edit_sequence(tiny, requests, **options),
        "perplexity": lambda: nbkit.perplexity(tiny, texts),
        "metrics": lambda: nbkit.edit_metrics(tiny, requests),
        "generated": lambda: generated(tiny, ["Ann"]),
        "keys": lambda: keys(tiny, requests, 1, ["{}"]),
        "moment": lambda: nbkit.second_moment(tiny, 1, texts),
        "templates": lambda: nbkit.context_templates(tiny),
        "risk": lambda: nbkit.collapse_risk(tiny, requests, context_templates=["{}"], layer=1),
        "scores": lambda: nbkit.task_scores(tiny),
        "study": lambda: single_edits(tiny, requests, texts, store=Store(tmp_path / "results"), **options),
        "hash": lambda: tiny.hash,
        "save": lambda: tiny.save(tmp_path / "saved"),
    }
    before = nbkit.perplexity(tiny, texts)
    for said, remove in left_behind(tiny):
        for name, call in verbs.items():
            with pytest.raises(ModelError, match=rf"transformer.h.1.mlp.c_proj of tiny-gpt2 has {said}.*Take it off"):
                call()
                pytest.fail(f"{name} began")
        remove()
        assert nbkit.perplexity(tiny, texts) == before
    for _ in left_behind(tiny):
        assert placed.take_off(tiny.model) == 1
        assert nbkit.perplexity(tiny, texts) == before
    assert list(tmp_path.iterdir()) == []


def test_the_libraries_hooks_are_part_of_the_model(tiny, texts):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    before, unhooked = nbkit.perplexity(tiny, texts), tiny.hash
    for module in tiny.model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    tiny.model(torch.tensor([[3, 4]]), output_hidden_states=True)  # transformers notes them by hooks that stay
    assert nbkit.perplexity(tiny, texts) == before and tiny.hash == unhooked


def test_nbkit_s_own_open_hooks_are_known_and_name_no_model(tiny, texts):
    before, plain = nbkit.perplexity(tiny, texts), tiny.hash
    with capture(tiny.projection(1)) as value:
        assert nbkit.perplexity(tiny, texts) == before and value.value is not None
        assert tiny.hash == plain, "it only reads"
    with replace(tiny.projection(1), torch.zeros_like):
        assert nbkit.perplexity(tiny, texts) != before
        with pytest.raises(ModelError, match="inside a `with` that changes its passes"):
            _ = tiny.hash
    assert nbkit.perplexity(tiny, texts) == before and tiny.hash == plain


def test_what_another_thread_has_on_a_model_is_refused(tiny, texts):
    said = []

    def work():
        try:
            nbkit.perplexity(tiny, texts)
        except ModelError as error:
            said.append(str(error))

    with capture(tiny.projection(1)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "has a hook that the thread 'MainThread' is using" in said[0]


def test_a_verb_that_fails_leaves_no_hook(tiny, texts, monkeypatch):
    """What it put on the model is gone with it, also what its own code did not come to take off."""

    def careless(*_arguments, **_named):
        replace(tiny.projection(0), torch.zeros_like).__enter__()
        torch.set_grad_enabled(False)
        raise MemoryError

    before = nbkit.perplexity(tiny, texts)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(tiny, "logits", careless)
        nbkit.perplexity(tiny, texts)
    assert n_hooks(tiny.model) == 0 and torch.is_grad_enabled()
    assert nbkit.perplexity(tiny, texts) == before


def test_stand_ins_may_be_taken_off_in_any_order(tiny):
    module, states = tiny.projection(1), torch.ones(1, 48, dtype=torch.float64)
    plain = module(states)
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        number = [instead(module, lambda *_, n=n: n) for n in range(3)]
        for one in number:
            one.__enter__()
        for place in order:
            assert module(states) == max(n for n in range(3) if number[n] is not None)
            number[place].__exit__(None, None, None)
            number[place] = None
        assert torch.equal(module(states), plain) and "forward" not in vars(module)


@pytest.mark.parametrize("room", [nbkit, nbkit.keys, nbkit.methods, nbkit.studies], ids=lambda room: room.__name__)
def test_whatever_takes_a_model_is_behind_the_door(room):
    """All functions offered whose first argument is the model; but for two that only look something up."""
    offered = {name: getattr(room, name) for name in dir(room)}
    functions = {name: each for name, each in offered.items() if inspect.isfunction(each) and not name.startswith("_")}
    taking = {name for name, each in functions.items() if next(iter(inspect.signature(each).parameters), None) == "lm"}
    behind = {name for name in taking if hasattr(functions[name], "__wrapped__")}
    assert taking - behind <= {"hyper_parameters", "published_layers", "setup"} and (behind or not taking)
