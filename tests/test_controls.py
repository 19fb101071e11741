"""The controls of RECT: each held against its plain formula in float64, and what it promises to share with the edit."""

import json
import math

import pytest
import torch

import nbkit
from nbkit import regularise
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError, ModelError
from nbkit.records.requests import EditRequest

SIZE, KEEP = 32 * 48, 0.4
KINDS = ("gaussian", "spectrum", "shuffled", "profile")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(rank=3):
    """An update of low rank, and a dense one."""
    return {"low rank": LowRank(drawn(32, rank), drawn(rank, 48, seed=1)), "dense": Dense(drawn(32, 48, seed=2))}


def edit_of(lm, delta=None, layer=1):
    request = EditRequest("{} is in", "Ann", "Krela")
    return Edit({lm.weight_name(layer): delta or updates()["low rank"]}, (request,), "rome")


def only(edit):
    (delta,) = edit.deltas.values()
    return delta.dense()


def weight(lm, layer=1):
    """(d_out, d_in), a view"""
    return lm.weight(layer).T if lm.architecture.transposed else lm.weight(layer)


def moments(lm, layer=1, seed=7):
    """C of keys some of which are a hundred times as large as others."""
    keys = drawn(200, 48, seed=seed) * torch.logspace(-1, 1, 48, dtype=torch.float64)
    return {lm.weight_name(layer): keys.T @ keys / len(keys)}


def felt(update, moment):
    """√E‖ΔW k‖² by the root of C."""
    values, vectors = torch.linalg.eigh(moment)
    return float((update.double() @ vectors * values.clamp(min=0).sqrt()).norm())


@pytest.fixture(params=list(updates()))
def delta(request):
    return updates()[request.param]


# selection


def test_select_by_relative_change_is_rect_bit_for_bit(lm, delta):
    edit = edit_of(lm, delta)
    with torch.no_grad():
        weight(lm)[0, :5] = 0
    rect = only(regularise(edit, lm, "rect", keep=KEEP))
    assert torch.equal(rect, only(regularise(edit, lm, "select", keep=KEEP, by="relative")))


@pytest.mark.parametrize("by", ["change", "felt"])
def test_select_keeps_the_entries_with_the_largest_score(lm, delta, by):
    given = moments(lm)
    kept = only(regularise(edit_of(lm, delta), lm, "select", keep=KEEP, by=by, second_moments=given))
    score = delta.dense().abs()
    if by == "felt":
        score = score * given[lm.weight_name(1)].diagonal().sqrt()[None, :]
    chosen = torch.zeros(SIZE, dtype=torch.bool)
    chosen[score.reshape(-1).argsort(descending=True)[: round(KEEP * SIZE)]] = True
    assert torch.equal(kept, torch.where(chosen.view(32, 48), delta.dense(), 0))


def test_ways_of_selection_differ(tiny):
    edit = edit_of(tiny)
    ways = [only(regularise(edit, tiny, "select", keep=KEEP, by=by, second_moments=moments(tiny))) != 0
            for by in ("change", "relative", "felt")]  # fmt: skip
    assert not torch.equal(ways[0], ways[1]) and not torch.equal(ways[0], ways[2])


def test_random_rescaled_is_the_whole_update_on_average(tiny):
    edit, key = edit_of(tiny), drawn(48, seed=3)
    plain = [only(regularise(edit, tiny, "random", keep=KEEP, seed=seed)) for seed in range(200)]
    rescaled = [only(regularise(edit, tiny, "random", keep=KEEP, seed=seed, rescaled=True)) for seed in range(200)]
    torch.testing.assert_close(rescaled[0], plain[0] * SIZE / round(KEEP * SIZE))
    whole = only(edit) @ key
    mean = torch.stack(rescaled).mean(0) @ key
    assert float((mean - whole).norm() / whole.norm()) < 0.2
    assert float((torch.stack(plain).mean(0) @ key).norm() / whole.norm()) == pytest.approx(KEEP, rel=0.1)


def test_a_share_so_small_that_nothing_is_kept_leaves_nothing(tiny):
    assert not only(regularise(edit_of(tiny), tiny, "random", keep=1e-5, seed=0, rescaled=True)).any()


# scaling


@pytest.mark.parametrize("other", [{"name": "rect", "keep": KEEP}, {"name": "pca", "n_components": 2},
                                   {"name": "scale", "factor": 0.25}])  # fmt: skip
@pytest.mark.parametrize("measure", ["norm", "felt"])
def test_scaled_to_what_another_regulariser_would_leave(lm, delta, other, measure):
    edit = Edit({**edit_of(lm, delta).deltas, lm.weight_name(0): Dense(drawn(32, 48, seed=8))})
    given = {**moments(lm), **moments(lm, 0, seed=9)}
    new = regularise(edit, lm, "scale", like=other, measure=measure, second_moments=given)
    arguments = {name: value for name, value in other.items() if name != "name"}
    wanted = regularise(edit, lm, other["name"], **arguments)
    for name, update in edit.deltas.items():
        size = (lambda of, name=name: felt(of, given[name])) if measure == "felt" else torch.linalg.norm
        made = new.deltas[name].dense()
        assert float(size(made)) == pytest.approx(float(size(wanted.deltas[name].dense())), rel=1e-9)
        torch.testing.assert_close(made / made.norm(), update.dense() / update.dense().norm())
    assert type(new.deltas[lm.weight_name(1)]) is type(delta), "low rank stays low"
    assert new.info["regulariser_like"] == other and len(new.info["regulariser_factors"]) == 2
    json.dumps(dict(new.info))


def test_like_sees_the_weights_that_a_step_meets(tiny):
    edit, earlier = edit_of(tiny), edit_of(tiny, updates()["dense"])
    like = {"name": "rect", "keep": 0.1}
    before = regularise(edit, tiny, "scale", like=like)
    with applied(tiny, earlier):
        step = regularise(edit, tiny, "scale", like=like)
        assert step.norm() == pytest.approx(regularise(edit, tiny, "rect", keep=0.1).norm())
    assert step.norm() != pytest.approx(before.norm(), rel=1e-3)


def test_a_felt_norm_can_be_given_and_another_edit_s_be_taken(tiny):
    edit, given = edit_of(tiny), moments(tiny)
    moment = given[tiny.weight_name(1)]
    new = regularise(edit, tiny, "scale", norm=2.5, measure="felt", second_moments=given)
    assert felt(only(new), moment) == pytest.approx(2.5)
    other = edit_of(tiny, updates()["dense"])
    new = regularise(edit, tiny, "scale", like=other, measure="felt", second_moments=given)
    assert felt(only(new), moment) == pytest.approx(felt(only(other), moment))
    assert new.norm() != pytest.approx(other.norm(), rel=1e-3)


def test_second_moments_reach_the_regulariser_that_is_named(tiny):
    edit, given = edit_of(tiny), moments(tiny)
    like = {"name": "select", "keep": KEEP, "by": "felt"}
    new = regularise(edit, tiny, "scale", like=like, second_moments=given)
    wanted = regularise(edit, tiny, "select", keep=KEEP, by="felt", second_moments=given)
    assert new.norm() == pytest.approx(wanted.norm())
    for made in (new, wanted):
        assert not any("second_moments" in name for name in made.info)
        json.dumps(dict(made.info))


# imitations


@pytest.mark.parametrize("way", KINDS)
def test_an_imitation_shares_what_it_says(lm, delta, way):
    edit = edit_of(lm, delta)
    new, whole = only(regularise(edit, lm, "imitate", kind=way, seed=0)), delta.dense()
    assert new.shape == whole.shape and abs(float((new * whole).sum() / new.norm() / whole.norm())) < 0.3
    if way != "profile":
        assert float(new.norm()) == pytest.approx(float(whole.norm()), rel=1e-9)
    if way == "spectrum":
        torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(whole), rtol=1e-6, atol=1e-6)
    if way == "shuffled":
        assert torch.equal(new.reshape(-1).sort().values, whole.reshape(-1).sort().values)
    if way == "profile":
        ratios = [(each / weight(lm).double()).abs().reshape(-1).sort().values for each in (new, whole)]
        torch.testing.assert_close(*ratios, rtol=1e-6, atol=1e-9)
        assert 0.4 < float(((new * weight(lm)) > 0).double().mean()) < 0.6, "signs are random"


@pytest.mark.parametrize("kind", KINDS)
def test_an_imitation_hangs_on_its_seed_only(tiny, kind):
    edit = Edit({tiny.weight_name(0): updates()["low rank"], tiny.weight_name(1): updates()["low rank"]})
    made = [regularise(edit, tiny, "imitate", kind=kind, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([delta.dense() for delta in one.deltas.values()] for one in made)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other)) and not torch.equal(*first), "each weight has its own"
    assert made[0].info["regulariser_kind"] == kind and made[0].info["regulariser_seed"] == 0


def test_the_spectrum_of_low_rank_stays_of_low_rank(tiny):
    (delta,) = regularise(edit_of(tiny), tiny, "imitate", kind="spectrum", seed=0).deltas.values()
    assert isinstance(delta, LowRank) and delta.rank == 3


def test_singular_vectors_are_drawn_uniformly(tiny):
    """A QR decomposition alone has signs that depend on the draw's: the mean of a vector would not be 0."""
    edit = edit_of(tiny, LowRank(drawn(32, 1), drawn(1, 48, seed=1)))
    made = [regularise(edit, tiny, "imitate", kind="spectrum", seed=seed) for seed in range(200)]
    vectors = torch.stack([next(iter(one.deltas.values())).right[0] for one in made])
    assert float(vectors.mean(0).abs().max()) < 4 / math.sqrt(48 * 200)
    assert float(vectors.norm(dim=1).max()) == pytest.approx(1)


@pytest.mark.parametrize("way", KINDS)
def test_an_imitation_of_the_same_norm_has_the_same_entries_up_to_a_factor(lm, delta, way):
    edit = edit_of(lm, delta)
    free = only(regularise(edit, lm, "imitate", kind=way, seed=0))
    new = only(regularise(edit, lm, "imitate", kind=way, seed=0, same_norm=True))
    assert float(new.norm()) == pytest.approx(edit.norm(), rel=1e-6)
    torch.testing.assert_close(new, free * (edit.norm() / float(free.norm())), rtol=1e-5, atol=1e-9)
    if way == "profile":
        assert not float(free.norm()) == pytest.approx(edit.norm(), rel=1e-2), "it has another norm by itself"


def test_where_the_weight_is_zero_the_profile_leaves_the_update(tiny):
    with torch.no_grad():
        weight(tiny)[:, :4] = 0
    edit = edit_of(tiny)
    new = only(regularise(edit, tiny, "imitate", kind="profile", seed=0))
    assert torch.equal(new[:, :4], only(edit)[:, :4])
    assert float(torch.isclose(new, only(edit))[:, 4:].double().mean()) < 0.01, "elsewhere all but chance is another"
    ratios = [(each / weight(tiny))[:, 4:].abs().reshape(-1).sort().values for each in (new, only(edit))]
    torch.testing.assert_close(*ratios)


# SPHERE


@pytest.mark.parametrize(("energy", "alpha"), [(0.5, 0.5), (0.5, 0.8), (0.05, 1.0), (0.97, 0.3)])
def test_sphere_is_the_plain_projection(lm, delta, energy, alpha, tolerance):
    new = regularise(edit_of(lm, delta), lm, "sphere", energy=energy, alpha=alpha)
    rows = weight(lm).detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    shares = [float(values[-r:].sum() / values.sum()) for r in range(1, 49)]
    r = next(r for r, share in enumerate(shares, 1) if share > energy)
    u = vectors[:, -r:]
    expected = delta.dense() @ (torch.eye(48, dtype=torch.float64) - alpha * u @ u.T)
    torch.testing.assert_close(only(new), expected, rtol=1e-8, atol=1e-8)
    assert type(next(iter(new.deltas.values()))) is type(delta) and new.info["regulariser_directions"] == [r]


def test_sphere_takes_the_smaller_of_two_matrices(make_lm):
    """A projection that makes the stream larger than the MLP is: eigenvectors of the other product."""
    lm = make_lm("llama", intermediate_size=16)
    edit = edit_of(lm, Dense(drawn(32, 16)))
    rows = torch.nn.functional.normalize(weight(lm).detach().double())
    new = regularise(edit, lm, "sphere", energy=0.5, alpha=1.0)
    u = torch.linalg.svd(rows).Vh[: new.info["regulariser_directions"][0]].T
    torch.testing.assert_close(only(new), only(edit) - only(edit) @ u @ u.T)


def test_sphere_of_both_orientations_is_the_same(make_lm):
    gpt2, llama = make_lm("gpt2", n_inner=32), make_lm("llama", intermediate_size=32)
    with torch.no_grad():
        llama.weight(1).copy_(gpt2.weight(1).T)
    delta = Dense(drawn(32, 32))
    torch.testing.assert_close(*(only(regularise(edit_of(lm, delta), lm, "sphere")) for lm in (gpt2, llama)))


def test_sphere_leaves_rows_of_zero_and_refuses_a_broken_weight(tiny):
    with torch.no_grad():
        weight(tiny)[3] = 0
    assert only(regularise(edit_of(tiny), tiny, "sphere")).isfinite().all()
    with torch.no_grad():
        weight(tiny)[3, 3] = math.inf
    with pytest.raises(MethodError, match="holds NaN or infinite values, and so has no principal directions"):
        regularise(edit_of(tiny), tiny, "sphere")


# all of them

EACH = [("select", {"keep": KEEP}), ("select", {"keep": KEEP, "by": "felt"}), ("sphere", {}),
        ("random", {"keep": KEEP, "seed": 0, "rescaled": True}),
        ("scale", {"like": {"name": "rect", "keep": KEEP}, "measure": "felt"}),
        *[("imitate", {"kind": kind, "seed": 0}) for kind in KINDS]]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), EACH)
def test_a_bias_is_a_weight_of_one_column_whose_input_is_one(tiny, name, arguments):
    bias, column = "transformer.h.1.mlp.c_proj.bias", Dense(torch.linspace(1, 2, 32, dtype=torch.float64)[:, None])
    edit = Edit({**edit_of(tiny).deltas, bias: column}, method="ft")
    if "felt" in arguments.values():
        arguments = {**arguments, "second_moments": moments(tiny)}
    new = regularise(edit, tiny, name, **arguments).deltas[bias].dense()
    assert new.shape == (32, 1)
    if name == "select":
        assert new.nonzero()[:, 0].tolist() == list(range(32 - round(KEEP * 32), 32))
    if name == "sphere":
        assert torch.equal(new, column.matrix)
    if name == "scale":
        rect = regularise(edit, tiny, "rect", keep=KEEP).deltas[bias].norm()
        torch.testing.assert_close(new, column.matrix * rect / column.norm())
    if arguments.get("kind") in ("gaussian", "spectrum"):
        assert float(new.norm()) == pytest.approx(column.norm())


@pytest.mark.parametrize(("name", "arguments"), EACH)
def test_number_types_stay_and_the_edit_goes_into_a_file(make_lm, tmp_path, name, arguments):
    lm = make_lm("llama", dtype=torch.bfloat16)
    edit = edit_of(lm, updates()["low rank"].to(torch.bfloat16))
    if "felt" in arguments.values():
        arguments = {**arguments, "second_moments": moments(lm)}
    new = regularise(edit, lm, name, **arguments)
    assert only(new).dtype == torch.bfloat16 and only(new).isfinite().all()
    nbkit.save_edits([new], tmp_path / "edits.safetensors", lm)
    (again,) = nbkit.load_edits(tmp_path / "edits.safetensors", lm)
    assert torch.equal(only(again), only(new)) and dict(again.info) == dict(new.info)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("random", {"keep": 0.5, "seed": 0, "rescaled": "yes"}, "rescaled must be True or False, not 'yes'"),
        ("select", {"keep": 0}, "keep must be a number above 0"),
        ("select", {"keep": 0.5, "by": "size"}, "by must be one of change, relative, felt, not 'size'"),
        ("select", {"keep": 0.5, "by": "felt"}, r"second_moments=\{'transformer.h.1.mlp.c_proj.weight': C\}"),
        ("select", {"keep": 0.5, "by": "felt", "second_moments": {"other": 1}}, "needs the second moment of its keys"),
        ("select", {"keep": 0.5, "by": "felt", "second_moments": 5}, "must be {weight name: matrix}, not 5"),
        ("scale", {"like": {"keep": 0.4}}, "unknown regulariser None"),
        ("scale", {"like": {"name": "rekt"}}, "unknown regulariser 'rekt'"),
        ("scale", {"like": {"name": "rect"}}, "rect needs keep"),
        ("scale", {"like": {"name": "rect", "keep": 2}}, "keep must be a number above 0"),
        ("scale", {"like": {"name": "rect", "keep": 0.4, 5: 1}}, "rect has no argument 5; it has keep"),
        ("scale", {"like": {"name": "rect", "keep": 0.4, "second_moments": {}}}, "give second_moments to scale itself"),
        ("scale", {"like": "rect"}, "an Edit of the same weights, or a regulariser with its arguments"),
        ("scale", {"norm": 1.0, "measure": "size"}, "measure must be one of norm, felt"),
        ("scale", {"norm": 1.0, "measure": "felt"}, "needs the second moment of its keys"),
        ("scale", {"factor": 1.0, "measure": "felt"}, "a factor is the same in every norm"),
        ("imitate", {}, "imitate needs kind and seed"),
        ("imitate", {"kind": "noise", "seed": 0}, "kind must be one of gaussian, spectrum, shuffled, profile"),
        ("imitate", {"kind": "gaussian", "seed": -1}, "seed must be a whole number from 0 on"),
        ("imitate", {"kind": "profile", "seed": 0, "same_norm": 1}, "same_norm must be True or False, not 1"),
        ("sphere", {"energy": 1.0}, "energy must be a number above 0 and below 1"),
        ("sphere", {"alpha": 1.1}, "alpha must be a number from 0 on and up to 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(tiny, name, arguments, message):
    with pytest.raises(MethodError, match=message):
        regularise(edit_of(tiny), tiny, name, **arguments)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(32), r"must be \(48, 48\), not \(32, 32\)"),
        (torch.full((48, 48), math.nan), "holds NaN"),
        (-torch.eye(48), "negative values"),
        ("C", "no matrix of numbers"),
    ],
)
def test_what_is_no_second_moment_is_refused(tiny, matrix, message):
    with pytest.raises(MethodError, match=message):
        regularise(edit_of(tiny), tiny, "scale", norm=1, measure="felt", second_moments={tiny.weight_name(1): matrix})


def test_what_is_not_finite_has_no_spectrum_and_stays_elsewhere(tiny):
    edit = edit_of(tiny, Dense(drawn(32, 48).index_fill(0, torch.tensor([3]), math.nan)))
    with pytest.raises(MethodError, match="NaN or infinite"):
        regularise(edit, tiny, "imitate", kind="spectrum", seed=0)
    for kind in ("gaussian", "shuffled", "profile"):
        assert only(regularise(edit, tiny, "imitate", kind=kind, seed=0)).isnan().any()


# statistics of δ


def test_delta_statistics_are_the_plain_sums(lm):
    original = weight(lm).detach().double().clone()
    edits = [edit_of(lm, updates()["low rank"]), edit_of(lm, updates()["dense"])]
    first = None
    for edit in edits:
        lm.apply(edit)
        change = weight(lm).detach().double() - original
        delta = (change / original).abs()
        found = nbkit.delta_statistics(lm, first.thresholds if first else None)
        assert found.manhattan == pytest.approx(float(change.abs().sum()))
        assert found.shares == pytest.approx([float((delta > level).double().mean()) for level in found.thresholds])
        first = first or found
    assert first.shares == pytest.approx([0.2, 0.1], abs=1 / SIZE) and found.thresholds == first.thresholds
    assert found.shares[0] > 0.2 and found.shares[0] > found.shares[1]


def test_delta_statistics_are_of_all_edited_weights_and_leave_the_model_as_it_is(tiny):
    bias = "transformer.h.1.mlp.c_proj.bias"
    edit = Edit({**edit_of(tiny).deltas, tiny.weight_name(0): updates()["dense"], bias: Dense(drawn(32, 1))})
    with torch.no_grad():
        weight(tiny)[0, :3] = 0  # any change there is infinitely large
    before = {name: tiny.oriented(name).detach().clone() for name in edit.deltas}
    with applied(tiny, edit):
        now = {name: tiny.oriented(name).detach().clone() for name in edit.deltas}
        found = nbkit.delta_statistics(tiny, [0.5, math.inf])
        assert all(torch.equal(tiny.oriented(name), weight) for name, weight in now.items())
    change = torch.cat([(now[name] - before[name]).reshape(-1) for name in now]).abs()
    ratio = change / torch.cat([weight.reshape(-1) for weight in before.values()]).abs()
    assert found.manhattan == pytest.approx(float(change.sum()))
    assert found.shares == pytest.approx([float((ratio > 0.5).double().mean()), 0.0]) and found.thresholds[0] == 0.5
    nothing = nbkit.delta_statistics(tiny, [0.5])
    assert (nothing.manhattan, nothing.shares) == (0.0, (0.0,))


def test_an_edit_of_few_entries_has_a_threshold_of_zero(tiny):
    update = torch.zeros(32, 48, dtype=torch.float64)
    update[:, 0] = 1
    with applied(tiny, edit_of(tiny, Dense(update))):
        found = nbkit.delta_statistics(tiny)
    assert found.thresholds == (0.0, 0.0) and found.shares == pytest.approx([1 / 48] * 2)


def test_delta_statistics_need_an_edit_or_thresholds(tiny):
    with pytest.raises(ModelError, match="carries no edit"):
        nbkit.delta_statistics(tiny)
    for wrong, message in (([-1], r"thresholds\[0\] must be"), (0.5, "a list of numbers"), ("0.5", "a list of numbers"),
                           ([math.nan], r"thresholds\[0\] must be")):  # fmt: skip
        with pytest.raises(MethodError, match=message):
            nbkit.delta_statistics(tiny, wrong)
