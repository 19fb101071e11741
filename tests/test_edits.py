"""Edits as values: orientation, applying, and giving every bit back."""

import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied, restoring
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import ModelError
from nbkit.records.requests import EditRequest

generator = torch.Generator().manual_seed(0)


def random_delta(d_out=32, d_in=48, rank=1, dtype=torch.float32):
    return LowRank(
        torch.randn(d_out, rank, generator=generator).to(dtype), torch.randn(rank, d_in, generator=generator).to(dtype)
    )


def bits(lm):
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def assert_same_bits(lm, before):
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name


def test_an_edit_is_shown_in_a_line():
    request = EditRequest("{} plays the", "Ann", "harp")
    shown = repr(Edit({"h.1.c_proj.weight": random_delta()}, (request,) * 5, "memit", info={"u": torch.zeros(999)}))
    assert "memit of [Ann -> harp, Ann -> harp, Ann -> harp and 2 more]; h.1.c_proj.weight: LowRank (32, 48)" in shown
    assert len(shown) < 150


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_update_is_added_in_the_right_orientation(make_lm, kind, square):
    """A square weight fits both ways round; only the architecture's row can tell."""
    size = {"n_inner" if kind == "gpt2" else "intermediate_size": 32} if square else {}
    lm = make_lm(kind, **size)
    delta = random_delta(32, lm.d_mlp, dtype=torch.float64)
    key = torch.randn(lm.d_mlp, generator=generator).double()
    module = lm.projection(1)
    before = module(key)
    with applied(lm, Edit({lm.weight_name(1): delta})):
        torch.testing.assert_close(module(key) - before, delta.left[:, 0] * (delta.right[0] @ key))


def test_low_rank_and_dense_agree(tiny):
    delta = random_delta(rank=3)
    assert delta.shape == (32, 48) == Dense(delta.dense()).shape
    expected = sum(torch.outer(delta.left[:, r], delta.right[r]) for r in range(3))
    torch.testing.assert_close(delta.dense(), expected)
    with applied(tiny, Edit({tiny.weight_name(1): delta})):
        low_rank = tiny.weight(1).clone()
    with applied(tiny, Edit({tiny.weight_name(1): Dense(delta.dense())})):
        assert torch.equal(tiny.weight(1), low_rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leaving_restores_every_bit(make_lm, kind, dtype):
    if dtype == torch.float64 and kind == "gemma2":
        dtype = torch.float32  # this architecture has no float64
    lm = make_lm(kind, dtype=dtype)
    with torch.no_grad():
        lm.weight(1).view(-1)[0] = torch.nan  # bits, not numbers
        lm.weight(1).view(-1)[1] = -0.0
    before = bits(lm)
    with applied(lm, Edit({lm.weight_name(0): random_delta(), lm.weight_name(1): random_delta()})) as inside:
        assert inside is lm and lm.n_applied == 1
        assert not torch.equal(lm.weight(0), before[lm.weight_name(0)])
    assert_same_bits(lm, before)
    assert lm.n_applied == 0


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_restores_too(tiny, error):
    before = bits(tiny)
    with pytest.raises(error), applied(tiny, Edit({tiny.weight_name(0): random_delta()})):
        raise error
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0


def test_infinite_and_nan_updates_are_restored(tiny):
    before = bits(tiny)
    delta = LowRank(torch.full((32, 1), torch.inf), torch.zeros(1, 48))
    with applied(tiny, Edit({tiny.weight_name(0): delta})):
        assert tiny.weight(0).isnan().all()
    assert_same_bits(tiny, before)


@pytest.mark.parametrize("kind", ["gpt2", "gptj"], indirect=True)
def test_a_bias_is_a_weight_of_one_column(lm):
    name = lm.architecture.projection_path(1) + ".bias"
    before, delta = bits(lm), Dense(torch.linspace(0, 1, 32)[:, None])
    edit = Edit({name: delta, lm.weight_name(1): random_delta()})
    lm.apply(edit)
    lm.apply(Edit({name: delta}))
    assert torch.equal(lm.oriented(name), lm.model.get_parameter(name)[:, None])
    torch.testing.assert_close(lm.model.get_parameter(name).data.float(), before[name].float() + 2 * delta.matrix[:, 0])
    assert lm.history()["weights"].tolist() == [f"{name}, {lm.weight_name(1)}", name]
    lm.undo(2)
    assert_same_bits(lm, before)


def test_nested_edits_add_up_and_go_one_by_one(tiny):
    name, first, second = tiny.weight_name(1), random_delta(), random_delta()
    before = bits(tiny)
    with applied(tiny, Edit({name: first})):
        between = tiny.weight(1).clone()
        with applied(tiny, Edit({name: second})):
            assert tiny.n_applied == 2
            both = before[name] + first.dense().T.double() + second.dense().T.double()
            torch.testing.assert_close(tiny.weight(1).data, both)
        assert torch.equal(tiny.weight(1), between)
    assert_same_bits(tiny, before)


def test_restoring_takes_back_any_number_of_edits(tiny):
    before = bits(tiny)
    with restoring(tiny) as add:
        for _ in range(5):
            add(Edit({tiny.weight_name(1): random_delta()}))
        add(Edit({tiny.weight_name(2): random_delta()}))
        assert tiny.n_applied == 6
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0


def test_a_bfloat16_weight_is_rounded_once(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    delta = random_delta()
    exact = lm.weight(0).float() + delta.dense()
    with applied(lm, Edit({lm.weight_name(0): delta})):
        assert torch.equal(lm.weight(0), exact.bfloat16())


@pytest.mark.parametrize(
    ("name", "delta", "message"),
    [
        ("transformer.h.9.mlp.c_proj.weight", random_delta(), "a weight that tiny-gpt2 does not have"),
        (
            "transformer.h.1.mlp.c_proj.weight",
            random_delta(48, 32),
            r"is \(48, 32\), the weight of tiny-gpt2 is \(32, 48\)",
        ),
        ("transformer.h.1.mlp.c_proj.bias", Dense(torch.ones(32)), r"is \(32,\), the weight of tiny-gpt2 is \(32, 1\)"),
        ("transformer.h.1.ln_1.weight", Dense(torch.ones(32, 1)), "ln_1.weight of tiny-gpt2, a vector"),
    ],
)
def test_an_edit_that_does_not_fit_changes_nothing(tiny, name, delta, message):
    before = bits(tiny)
    with pytest.raises(ModelError, match=message):
        with applied(tiny, Edit({tiny.weight_name(0): random_delta(), name: delta})):
            pytest.fail("it was applied")
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0


def test_a_meta_weight_is_refused(tiny):
    tiny.projection(1).weight = torch.nn.Parameter(tiny.weight(1).to("meta"), requires_grad=False)
    with (
        pytest.raises(ModelError, match="offloaded"),
        applied(tiny, Edit({"transformer.h.1.mlp.c_proj.weight": random_delta()})),
    ):
        pass


def test_the_request_of_an_edit():
    ann, bob = (EditRequest("{} is", name, "x") for name in ("Ann", "Bob"))
    assert Edit({}, (ann,)).request is ann
    with pytest.raises(ValueError):
        _ = Edit({}, (ann, bob)).request
