"""Regularised edits: each held against the plain formula, on every architecture where the orientation matters."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import nbkit
from nbkit import accumulated, regularise
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.regularisers import REGULARISERS
from nbkit.edits.selection import largest
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError, ModelError
from nbkit.records.requests import EditRequest

SIZE = 32 * 48


def low_rank(rank=1, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((32, rank), (rank, 48)))
    return LowRank((scale * left).to(dtype), right.to(dtype))


def edit_of(lm, delta=None, layer=1, **more):
    request = EditRequest("{} is in", "Ann", "Krela")
    return Edit({lm.weight_name(layer): delta or low_rank()}, (request,), "rome", **more)


def only(edit):
    (delta,) = edit.deltas.values()
    return delta.dense()


def weight(lm, layer=1):
    """(d_out, d_in)"""
    return lm.weight(layer).T if lm.architecture.transposed else lm.weight(layer)


def singular_values(edit):
    return torch.linalg.svdvals(only(edit).double())


def test_the_public_name_is_the_function():
    import nbkit.edits.regularisers  # noqa: F401

    assert callable(nbkit.regularise) and nbkit.regularise is regularise


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.123, 1.0])
def test_rect_keeps_the_largest_relative_changes(lm, keep):
    edit = edit_of(lm)
    kept = only(regularise(edit, lm, "rect", keep=keep))
    delta = (only(edit) / weight(lm)).abs().numpy().ravel()  # the plain formula
    order = np.argsort(-delta)[: round(keep * SIZE)]
    expected = np.zeros(SIZE)
    expected[order] = only(edit).numpy().ravel()[order]
    assert np.array_equal(kept.numpy().ravel(), expected)
    assert int((kept != 0).sum()) == round(keep * SIZE)


def test_rect_of_both_orientations_is_the_same(make_lm):
    """GPT-2 stores what Llama stores the other way round; a square weight would fit both."""
    gpt2, llama = make_lm("gpt2", n_inner=32), make_lm("llama", intermediate_size=32)
    with torch.no_grad():
        llama.weight(1).copy_(gpt2.weight(1).T)
    delta = LowRank(low_rank().left, low_rank(seed=3).left.T)
    one, other = (only(regularise(edit_of(lm, delta), lm, "rect", keep=0.3)) for lm in (gpt2, llama))
    assert torch.equal(one, other)


def test_the_share_is_exact_with_ties_and_the_first_are_kept(tiny):
    with torch.no_grad():
        tiny.weight(1).fill_(0.5)
    ones = edit_of(tiny, Dense(torch.ones(32, 48, dtype=torch.float64)))
    kept = only(regularise(ones, tiny, "rect", keep=0.3)).reshape(-1)
    n = round(0.3 * SIZE)
    assert kept[:n].all() and not kept[n:].any()


def test_zero_weights_go_first_and_zero_updates_last(tiny):
    update = torch.arange(1.0, SIZE + 1).double().view(32, 48) / SIZE
    update[0, :10] = 0
    with torch.no_grad():
        tiny.weight(1).fill_(1)
        weight(tiny)[0, :5] = 0  # 0/0: nothing changes there
        weight(tiny)[1, :7] = 0  # a change of a weight of zero is infinitely large
    kept = only(regularise(edit_of(tiny, Dense(update)), tiny, "rect", keep=7 / SIZE))
    assert int((kept != 0).sum()) == 7 and kept[1, :7].all()
    everything = only(regularise(edit_of(tiny, Dense(update)), tiny, "rect", keep=1.0))
    assert torch.equal(everything, update)
    all_but_5 = only(regularise(edit_of(tiny, Dense(update)), tiny, "rect", keep=(SIZE - 10) / SIZE))
    assert torch.equal(all_but_5, update)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 7, 8])
def test_the_mask_of_the_largest_is_exact(n):
    scores = torch.tensor([0.0, 3, 1, 3, torch.inf, 0, 3, 2])
    mask = largest(scores, n)
    expected = sorted(range(8), key=lambda i: (-scores[i], i))[:n]
    assert mask.nonzero().reshape(-1).tolist() == sorted(expected)


def test_rect_sees_the_weight_as_it_stands(tiny):
    """In a sequence W is the weight before this edit, which carries the earlier ones."""
    edit, earlier = edit_of(tiny), edit_of(tiny, low_rank(seed=5))
    unedited = only(regularise(edit, tiny, "rect", keep=0.3))
    with applied(tiny, earlier):
        ratio = (only(edit) / weight(tiny)).abs().reshape(-1)
        sequential = only(regularise(edit, tiny, "rect", keep=0.3))
    assert not torch.equal(unedited, sequential)
    assert set(sequential.reshape(-1).nonzero().reshape(-1).tolist()) == set(
        ratio.topk(round(0.3 * SIZE)).indices.tolist()
    )


def test_rect_keeps_the_bits_of_what_it_keeps(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    edit = edit_of(lm, low_rank(dtype=torch.bfloat16))
    kept = only(regularise(edit, lm, "rect", keep=0.5))
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, torch.where(kept != 0, only(edit), 0))


def test_random_draws_exactly_the_share_and_repeats_with_its_seed(tiny):
    edit = edit_of(tiny)
    kept = only(regularise(edit, tiny, "random", keep=0.4, seed=0))
    assert int((kept != 0).sum()) == round(0.4 * SIZE)
    assert torch.equal(kept, torch.where(kept != 0, only(edit), 0))
    assert torch.equal(kept, only(regularise(edit, tiny, "random", keep=0.4, seed=0)))
    assert not torch.equal(kept, only(regularise(edit, tiny, "random", keep=0.4, seed=1)))
    assert torch.equal(only(regularise(edit, tiny, "random", keep=1, seed=0)), only(edit))


@pytest.mark.parametrize("delta", [low_rank(3), Dense(low_rank(40).dense())], ids=["low rank", "dense"])
@pytest.mark.parametrize("n_components", [1, 2, 7])
def test_pca_is_scikit_learns(lm, delta, n_components):
    edit, stored = edit_of(lm, delta), delta.dense().T.numpy()  # (d_in, d_out), as GPT-2 stores it
    plain = PCA(n_components, svd_solver="full")
    scores = plain.fit_transform(stored)
    proper = only(regularise(edit, lm, "pca", n_components=n_components))
    np.testing.assert_allclose(proper.T, plain.inverse_transform(scores), atol=1e-10)
    released = only(regularise(edit, lm, "pca", n_components=n_components, variant="as_released"))
    expected = np.zeros_like(stored)
    expected[:, :n_components] = scores
    # Behind the rank of the update a component is arbitrary, its scores zero.
    np.testing.assert_allclose(released.T, expected, atol=1e-10)


def test_proper_pca_loses_nothing_of_a_rank_one_update_and_the_released_one_nearly_all(tiny):
    edit = edit_of(tiny)
    proper, released = (regularise(edit, tiny, "pca", n_components=8, variant=v) for v in ("proper", "as_released"))
    torch.testing.assert_close(only(proper), only(edit))
    assert int(only(released).any(1).sum()) == 1  # all scores in one column of ΔWᵀ
    assert torch.cosine_similarity(only(released).reshape(-1), only(edit).reshape(-1), dim=0).abs() < 0.5


@pytest.mark.parametrize("delta", [low_rank(4, scale=0.1), Dense(low_rank(4, scale=0.1).dense())], ids=["low", "dense"])
@pytest.mark.parametrize(
    "arguments", [{}, {"base": 2}, {"base": 1.5}, {"base": 1.2}, {"function": "linear"}], ids=lambda a: str(a)
)
def test_prune_is_the_plain_formula(lm, delta, arguments):
    with torch.no_grad():  # its singular values: 4, the others small
        weight(lm).copy_(4 * low_rank().dense() / torch.linalg.matrix_norm(low_rank().dense(), 2))
    edit = edit_of(lm, LowRank(8 * delta.left, delta.right) if isinstance(delta, LowRank) else Dense(8 * delta.matrix))
    u, s, vh = torch.linalg.svd(only(edit), full_matrices=False)
    base, linear = arguments.get("base", math.e), "function" in arguments
    limit = float(torch.linalg.svdvals(weight(lm).double())[0])
    plain = [
        s_i if s_i < limit
        else 0.5 * s_i + 0.5 * limit if linear
        else math.log(s_i, base) - math.log(limit, base) + limit
        for s_i in s.tolist()
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if arguments.get("base") == 1.2 else "error")  # 1 / ln 1.2 = 5.5 > 4
        new = regularise(edit, lm, "prune", **arguments)
    assert limit < float(s[0])
    torch.testing.assert_close(only(new), u @ torch.diag(torch.tensor(plain).double()) @ vh)
    assert type(next(iter(new.deltas.values()))) is type(delta)
    assert new.info["regulariser_limit"] == [pytest.approx(limit)]
    assert new.info["regulariser_restrained"] == [int((s >= limit).sum())]


def test_prune_leaves_small_singular_values_alone(tiny):
    delta = low_rank(3)
    left = torch.linalg.qr(delta.left).Q * torch.tensor([50.0, 0.2, 0.1]).double()
    edit = edit_of(tiny, LowRank(left, torch.linalg.qr(delta.right.T).Q.T))
    limit = torch.linalg.svdvals(tiny.weight(1))[0]
    assert 0.2 < limit < 50
    new = singular_values(regularise(edit, tiny, "prune"))
    torch.testing.assert_close(new[1:3], torch.tensor([0.2, 0.1]).double())
    torch.testing.assert_close(new[0], (50 / limit).log() + limit)
    small = edit_of(tiny, low_rank(2, scale=1e-3))
    assert regularise(small, tiny, "prune").deltas == small.deltas  # the very same updates


def test_prune_says_when_its_formula_enlarges(tiny):
    with torch.no_grad():
        tiny.weight(1).mul_(0.05)
    edit = edit_of(tiny, low_rank(scale=0.02))
    with pytest.warns(UserWarning, match="prune enlarges singular values of transformer.h.1.mlp.c_proj.weight"):
        new = regularise(edit, tiny, "prune", base=1.2)
    assert new.norm() > edit.norm()


def test_prune_wants_the_unedited_model(tiny):
    with applied(tiny, edit_of(tiny)), pytest.raises(ModelError, match="tiny-gpt2 carries 1 edit"):
        regularise(edit_of(tiny), tiny, "prune")


def test_scale_keeps_low_rank_and_meets_its_norm(tiny):
    edit = Edit({tiny.weight_name(0): low_rank(2), tiny.weight_name(1): Dense(low_rank(seed=2).dense())})
    half = regularise(edit, tiny, "scale", factor=0.5)
    first, second = half.deltas.values()
    assert isinstance(first, LowRank) and isinstance(second, Dense)
    for name, delta in edit.deltas.items():
        torch.testing.assert_close(half.deltas[name].dense(), 0.5 * delta.dense())
    assert regularise(edit, tiny, "scale", norm=3).norm() == pytest.approx(3)
    other = regularise(edit, tiny, "rect", keep=0.2)
    like = regularise(edit, tiny, "scale", like=other)
    for name, delta in other.deltas.items():
        assert like.deltas[name].norm() == pytest.approx(delta.norm())
    assert like.info["regulariser_factors"] == [
        pytest.approx(other.deltas[name].norm() / delta.norm()) for name, delta in edit.deltas.items()
    ]
    with pytest.raises(MethodError, match="zero cannot be scaled"):
        regularise(regularise(edit, tiny, "scale", factor=0), tiny, "scale", norm=1)


def test_the_norm_of_an_update_needs_no_product():
    delta = low_rank(60)  # more than either side
    assert delta.norm() == pytest.approx(float(delta.dense().norm())) == pytest.approx(Dense(delta.dense()).norm())
    edit = Edit({"a": delta, "b": low_rank(seed=1)})
    assert edit.norm() == pytest.approx(math.hypot(*(d.norm() for d in edit.deltas.values())))


def test_info_says_what_was_done(tiny):
    edit = edit_of(tiny, hparams={"layer": 1}, info={"numerator": 2.0, "update_norm": 99.0})
    new = regularise(regularise(edit, tiny, "rect", keep=0.5), tiny, "scale", factor=2.0)
    assert (new.method, new.requests, new.hparams) == ("rome", edit.requests, {"layer": 1})
    assert new.info["regulariser"] == "rect + scale" and new.info["numerator"] == 2.0
    assert new.info["regulariser_keep"] == 0.5 and new.info["regulariser_factor"] == 2.0
    assert new.info["regulariser_norm_ratio"] == pytest.approx(2.0)
    assert new.info["update_norm"] == pytest.approx(float(only(new).norm()))
    assert edit.info == {"numerator": 2.0, "update_norm": 99.0}, "the given edit stays what it was"


@pytest.mark.parametrize("method_edit", [False, True], ids=["low rank", "rome"])
@pytest.mark.parametrize("name", list(REGULARISERS))
def test_every_regulariser_gives_an_edit_that_can_be_applied(lm, requests, contexts, name, method_edit):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    edit = nbkit.edit(lm, requests[:1], method="rome", **options)[0] if method_edit else edit_of(lm, low_rank(2))
    arguments = {"rect": {"keep": 0.4}, "random": {"keep": 0.4, "seed": 0}, "pca": {"n_components": 5}, "prune": {},
                 "select": {"keep": 0.4}, "imitate": {"kind": "spectrum", "seed": 0}, "sphere": {}}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prune's formula may enlarge here
        new = regularise(edit, lm, name, **arguments.get(name, {"factor": 0.5}))
    before = weight(lm).clone()
    with applied(lm, new):
        torch.testing.assert_close(weight(lm) - before, only(new), rtol=1e-3, atol=1e-4, check_dtype=False)
    assert new.requests == edit.requests and new.method == "rome"


@pytest.mark.parametrize("name", ["rect", "random", "pca", "prune", "scale"])
def test_a_bias_is_regularised_as_a_weight_of_one_column(tiny, name):
    bias, column = "transformer.h.1.mlp.c_proj.bias", torch.linspace(1, 2, 32, dtype=torch.float64)[:, None]
    edit = Edit({tiny.weight_name(1): low_rank(2), bias: Dense(column)}, method="ft")
    arguments = {"rect": {"keep": 0.25}, "random": {"keep": 0.25, "seed": 0}, "pca": {"n_components": 2},
                 "prune": {"function": "linear"}, "scale": {"factor": 0.5}}  # fmt: skip
    new = regularise(edit, tiny, name, **arguments[name]).deltas[bias].dense()
    if name in ("rect", "random"):
        kept = new != 0
        assert int(kept.sum()) == 8 and torch.equal(new[kept], column[kept])
    if name == "rect":
        ratio = (column[:, 0] / tiny.model.get_parameter(bias)).abs()
        assert set(kept[:, 0].nonzero()[:, 0].tolist()) == set(ratio.argsort()[-8:].tolist())
    length = float(tiny.model.get_parameter(bias).norm())
    factor = {"pca": 1.0, "prune": (1 + length / float(column.norm())) / 2, "scale": 0.5}.get(name)
    if factor:
        torch.testing.assert_close(new, factor * column)


def test_accumulated_edits_add_up(lm):
    edits = [edit_of(lm, low_rank(seed=seed)) for seed in range(3)] + [edit_of(lm, low_rank(2, seed=9), layer=0)]
    total = accumulated(edits)
    assert isinstance(total.deltas[lm.weight_name(1)], LowRank) and total.deltas[lm.weight_name(1)].left.shape[1] == 3
    torch.testing.assert_close(total.deltas[lm.weight_name(1)].dense(), sum(only(edit) for edit in edits[:3]))
    torch.testing.assert_close(total.deltas[lm.weight_name(0)].dense(), only(edits[3]))
    assert total.requests == sum((edit.requests for edit in edits), ()) and total.method == "rome"
    assert total.info["n_edits"] == 4 and total.info["update_norm"] == pytest.approx(total.norm())
    mixed = accumulated([*edits[:2], regularise(edits[2], lm, "rect", keep=0.5)])
    assert isinstance(mixed.deltas[lm.weight_name(1)], Dense)
    assert mixed.deltas[lm.weight_name(1)].matrix.dtype == torch.float64


def test_accumulated_refuses_nothing_and_what_does_not_fit(tiny):
    with pytest.raises(MethodError, match="no edits"):
        accumulated([])
    with pytest.raises(MethodError, match="different shapes"):
        accumulated([edit_of(tiny), edit_of(tiny, LowRank(torch.ones(5, 1), torch.ones(1, 48)))])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ridge", {}, "unknown regulariser 'ridge'; known: rect, random, pca, prune, scale"),
        ("rect", {"keep": 0.4, "share": 1}, "rect has no argument share; it has keep"),
        ("rect", {}, "rect needs keep"),
        ("random", {}, "random needs keep and seed"),
        *[("rect", {"keep": keep}, "keep must be a number above 0") for keep in (0, -0.1, 1.01, math.nan, True, "all")],
        ("random", {"keep": 0, "seed": 0}, "keep must be a number above 0"),
        ("random", {"keep": 0.5, "seed": 1.5}, "seed must be a whole number"),
        ("pca", {"n_components": 33}, r"n_components is 33, but .* is \(32, 48\)"),
        ("pca", {"n_components": 0}, "n_components must be a whole number from 1 on"),
        ("pca", {"n_components": 2, "variant": "released"}, "variant must be one of proper, as_released, not"),
        ("prune", {"base": 1}, "base must be a number above 1"),
        ("prune", {"function": "sqrt"}, "function must be one of log, linear, not 'sqrt'"),
        ("scale", {}, "exactly one of factor, norm, like"),
        ("scale", {"factor": 1.0, "norm": 1.0}, "exactly one of factor, norm, like"),
        ("scale", {"factor": -1.0}, "factor must be a number from 0 on"),
        ("scale", {"norm": math.nan}, "norm must be a number from 0 on"),
        ("scale", {"like": Edit({})}, "an Edit of the same weights"),
    ],
)
def test_wrong_names_and_arguments_are_refused(tiny, name, arguments, message):
    with pytest.raises(MethodError, match=message):
        regularise(edit_of(tiny), tiny, name, **arguments)


@pytest.mark.parametrize("name", ["pca", "prune"])
def test_nan_has_no_singular_values(tiny, name):
    edit = edit_of(tiny, LowRank(torch.full((32, 1), torch.nan), torch.ones(1, 48)))
    with pytest.raises(MethodError, match="NaN or infinite"):
        regularise(edit, tiny, name, **({"n_components": 2} if name == "pca" else {}))


def test_an_edit_of_another_model_is_refused(tiny):
    with pytest.raises(ModelError, match="a weight that tiny-gpt2 does not have"):
        regularise(Edit({"model.layers.1.mlp.down_proj.weight": low_rank()}), tiny, "rect", keep=0.5)
