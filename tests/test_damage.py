"""What ordinary text will feel of an edit is known from its update, and a guard keeps back the edits it would hurt."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense, LowRank, felt_norms
from nbkit.errors import MethodError, ModelError, ResultsError
from nbkit.keys.moments import second_moments
from nbkit.keys.solving import SecondMoments
from nbkit.methods.guard import Guard
from nbkit.records.calibration import calibration, line, threshold
from nbkit.records.results import Store
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.single import single_edits

QUICK = {"layer": 1, "v_num_grad_steps": 3, "progress": False}


def random_update(lm, kind: str, seed: int, rank: int = 2, size: float = 1.0):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=draw).to(lm.dtype) for shape in ((lm.d_model, rank), (rank, lm.d_mlp)))
    return LowRank(size * left, right) if kind == "low rank" else Dense(size * left @ right)


def edits_of(lm, requests) -> list[Edit]:
    """Low-rank and dense ones, of one and several layers, of one and several requests, with and without biases."""
    names, bias = [lm.weight_name(layer) for layer in range(3)], lm.architecture.projection_path(1) + ".bias"
    has_bias = bias in dict(lm.model.named_parameters())
    biased = {bias: Dense(torch.ones(lm.d_model, 1, dtype=lm.dtype))} if has_bias else {}
    several = {name: random_update(lm, "low rank", 1 + place, rank=1 + place) for place, name in enumerate(names)}
    both = {names[2]: random_update(lm, "dense", 6), names[1]: random_update(lm, "low rank", 7)}
    return [
        Edit({names[1]: random_update(lm, "low rank", 0)}, (requests[0],), "rome"),
        Edit(several, tuple(requests), "memit"),
        Edit({names[1]: random_update(lm, "dense", 5), **biased}, (requests[2],), "ft"),
        Edit(both, (requests[1],), "x"),
        Edit({}, (requests[1],), "none"),
    ]


def weights_of(lm) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in lm.model.named_parameters()}


def same_weights(lm, before) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())


def test_damage_is_the_plain_formula_in_quadrature_over_layers(lm, requests, texts, tolerance):
    moments, edits = second_moments(lm, range(3), texts, progress=False), edits_of(lm, requests)
    before = weights_of(lm)
    frame = nbkit.damage(lm, edits, moments)
    assert same_weights(lm, before)
    for edit, row in zip(edits, frame.itertuples(), strict=True):
        felt, shares = 0.0, 0.0
        for name, delta in edit.deltas.items():
            for layer in range(3):
                if name == lm.weight_name(layer):
                    values, vectors = torch.linalg.eigh(moments[layer])
                    root = vectors * values.clamp(min=0).sqrt()  # root rootᵀ = C
                    moved = (delta.dense().double() @ root).square().sum().item()
                    felt += moved
                    shares += moved / (lm.oriented(name).double() @ root).square().sum().item()
        assert row.felt == pytest.approx(math.sqrt(felt), rel=tolerance)
        assert row.felt_relative == pytest.approx(math.sqrt(shares), rel=tolerance)
        assert row.update_norm == pytest.approx(edit.norm(), rel=tolerance)
        others = [name for name in edit.deltas if name not in map(lm.weight_name, range(3))]
        assert row.unmeasured == ", ".join(others)
    assert frame["case_id"].fillna("").tolist() == ["0", "", "2", "1", "1"]
    assert frame["n_requests"].tolist() == [1, 3, 1, 1, 1]
    assert frame["subject_kind"][2] == "later" and frame["method"].tolist() == ["rome", "memit", "ft", "x", "none"]


def test_one_edit_one_matrix_and_nothing_read(tiny, requests, texts, monkeypatch):
    C = second_moments(tiny, [1], texts, progress=False)[1]
    monkeypatch.setattr(type(tiny), "logits", lambda *_, **__: pytest.fail("a forward pass"))
    edit = edits_of(tiny, requests)[0]
    row = nbkit.damage(tiny, edit, C.numpy()).iloc[0]
    assert row["felt"] == pytest.approx(edit.deltas[tiny.weight_name(1)].felt_norm(C), rel=1e-12)
    assert len(nbkit.damage(tiny, [], C)) == 0


def test_many_updates_at_once_are_felt_as_one_by_one(tiny):
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(200, tiny.d_mlp, dtype=torch.float64, generator=draw)
    updates = [random_update(tiny, "low rank", seed, rank=1 + seed % 3) for seed in range(1100)]
    updates += [random_update(tiny, "dense", 0), LowRank(torch.zeros(32, 0), torch.zeros(0, 48))]
    C = keys.T @ keys / len(keys)
    np.testing.assert_allclose(felt_norms(updates, C), [one.felt_norm(C) for one in updates], rtol=1e-12)


@pytest.mark.parametrize("kind", ["low rank", "dense"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_foretold_as_harmless(tiny, requests, texts, kind, value):
    moments, good = second_moments(tiny, [1], texts, progress=False), random_update(tiny, kind, 0)
    bad = good.scaled(value)
    edits = [Edit({tiny.weight_name(1): one}, (requests[0],)) for one in (bad, good)]
    frame = nbkit.damage(tiny, edits, moments)
    assert not np.isfinite(frame.loc[0, ["update_norm", "felt", "felt_relative"]].astype(float)).any()
    assert np.isfinite(frame.loc[1, ["update_norm", "felt", "felt_relative"]].astype(float)).all()


def test_an_edit_outside_the_projections_alone_is_not_foretold(tiny, requests):
    into = "transformer.h.1.mlp.c_fc.weight"
    edit = Edit({into: LowRank(torch.ones(48, 1), torch.ones(1, 32))}, (requests[0],))
    row = nbkit.damage(tiny, edit).iloc[0]
    assert math.isnan(row["felt_relative"]) and row["unmeasured"] == into


def test_without_a_second_moment_it_is_the_unedited_models_on_its_default_text(
    requests, texts, tmp_path, monkeypatch, make_lm
):
    lm = make_lm("gpt2")
    lm.origin = "miniworld-gpt2"
    monkeypatch.setattr("nbkit.keys.moments.read_texts", lambda name: texts)
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    edits = edits_of(lm, requests)
    C = second_moments(lm, range(3), texts, progress=False)
    given = nbkit.damage(lm, edits, C)
    pd.testing.assert_frame_equal(nbkit.damage(lm, edits, progress=False), given)
    with nbkit.applied(lm, edits[1]):
        other = nbkit.damage(lm, edits, progress=False)
        assert nbkit.edit(lm, requests, guard=Guard(0.1), **QUICK)[0].info["guard"] == "refused"
    for step in nbkit.edit_sequence(lm, requests, guard=Guard(1e9), **QUICK):
        if step.index == 0:
            with nbkit.unedited(lm):
                expected = nbkit.damage(lm, step.edit, C)["felt_relative"][0]
            assert step.edit.info["felt_relative"] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(other["felt"], given["felt"])
    assert other["felt_relative"][0] != given["felt_relative"][0], "W is what is in the model"


def test_bad_arguments_are_refused(tiny, requests, texts):
    edits = edits_of(tiny, requests)
    with pytest.raises(MethodError, match="damage needs second moments, and tiny-gpt2 brings no text"):
        nbkit.damage(tiny, edits)
    with pytest.raises(MethodError, match=r"no second moment is given for layer 0, only for \[1\]"):
        nbkit.damage(tiny, edits, {1: torch.eye(48)})
    with pytest.raises(MethodError, match="must be a list of Edits"):
        nbkit.damage(tiny, [None], torch.eye(48))
    with pytest.raises(ModelError, match=r"is \(5, 48\), the weight of tiny-gpt2 is \(32, 48\)"):
        nbkit.damage(tiny, Edit({tiny.weight_name(1): LowRank(torch.ones(5, 1), torch.ones(1, 48))}), torch.eye(48))
    for given, said in [
        ({"most": 0}, "most must be a number above 0"),
        ({"most": math.nan}, "most must be a number above 0"),
        ({"most": 1, "instead": "c-rome"}, "did you mean 'C-ROME'"),
    ]:
        with pytest.raises(MethodError, match=said):
            Guard(**given)
    ft = {"method": "ft", "layers": [1]}
    for guard, arguments, said in [
        (3.0, {"layer": 1}, r"guard must be a Guard, as nbkit.Guard\(most=\.\.\.\), not 3.0"),
        (Guard(1.0), {"layer": 1}, "the guard needs second moments, and tiny-gpt2 brings no text"),
        (Guard(1.0, second_moment="C"), {"layer": 1}, "a second moment is a matrix"),
        (Guard(1.0, second_moment={2: torch.eye(48)}), {"layer": 1}, "no second moment is given for layer 1"),
        (Guard(1.0, "C-ROME", torch.eye(48)), ft, "C-ROME.* is for edits of rome, not of ft"),
    ]:
        for verb in (nbkit.edit, nbkit.edit_sequence):
            with pytest.raises(MethodError, match=said):
                verb(tiny, requests, guard=guard, **arguments)


@pytest.fixture
def C(tiny, texts):
    return second_moments(tiny, range(3), texts, progress=False)


def foretold(lm, requests, contexts, C, **arguments) -> list[float]:
    edits = nbkit.edit(lm, requests, context_templates=contexts, **QUICK, **arguments)
    return nbkit.damage(lm, edits, C)["felt_relative"].tolist()


def test_the_guard_lets_through_what_is_felt_little_and_refuses_the_rest(tiny, requests, contexts, C):
    felt = foretold(tiny, requests, contexts, C)
    plain = nbkit.edit(tiny, requests, context_templates=contexts, **QUICK)
    before, most = weights_of(tiny), sorted(felt)[1]
    edits = nbkit.edit(tiny, requests, context_templates=contexts, guard=Guard(most, second_moment=C), **QUICK)
    assert same_weights(tiny, before)
    assert [edit.request for edit in edits] == requests
    for edit, other, relative in zip(edits, plain, felt, strict=True):
        assert edit.info["felt_relative"] == pytest.approx(relative, rel=1e-9) and edit.info["guard_most"] == most
        if relative <= most:
            assert edit.info["guard"] == "passed" and edit.norm() == other.norm()
        else:
            assert edit.info["guard"] == "refused" and not edit.deltas and edit.hparams == other.hparams
            assert edit.info["update_norm"] == 0 and edit.info["refused_update_norm"] == other.norm()
            assert edit.info["denominator"] == other.info["denominator"]
    assert [edit.info["guard"] for edit in edits].count("refused") == 1


def test_a_refused_edit_goes_wherever_edits_go_and_does_nothing_there(tiny, requests, contexts, texts, C, tmp_path):
    guard = Guard(1e-9, second_moment=C)
    (edit,) = nbkit.edit(tiny, requests[:1], context_templates=contexts, guard=guard, **QUICK)
    assert "no update" in repr(edit) and edit.norm() == 0
    before, perplexity = weights_of(tiny), nbkit.perplexity(tiny, texts)
    with nbkit.applied(tiny, edit):
        assert same_weights(tiny, before)
    other = edits_of(tiny, requests)[0]
    np.testing.assert_allclose(nbkit.perplexity(tiny, texts, edits=[edit, other])[0], perplexity, rtol=1e-12)
    for measured in (nbkit.edit_metrics, partial(nbkit.generation_metrics, max_tokens=4)):
        pd.testing.assert_frame_equal(measured(tiny, requests[:1], edits=[edit]), measured(tiny, requests[:1]))
    nbkit.save_edits([edit, other], tmp_path / "edits.safetensors", tiny)
    loaded, _ = nbkit.load_edits(tmp_path / "edits.safetensors", tiny)
    assert not loaded.deltas and loaded.info["guard"] == "refused"
    tiny.apply(edit)
    assert tiny.history().loc[0, ["weights", "update_norm"]].tolist() == ["", 0.0] and same_weights(tiny, before)
    assert tiny.undo() == [edit]
    assert nbkit.accumulated([edit, other]).norm() == other.norm()
    assert not nbkit.regularise(edit, tiny, "rect", keep=0.5).deltas
    assert nbkit.damage(tiny, edit).loc[0, "felt_relative"] == 0


def test_c_rome_steps_in_and_is_refused_where_it_is_felt_too_much_too(tiny, requests, contexts, C):
    mixed = foretold(tiny, requests, contexts, C)
    prefixed = foretold(tiny, requests, contexts, C, key_mode="prefixed")
    for most in (0.99 * min(mixed + prefixed), *np.nextafter(mixed, np.inf), *np.nextafter(prefixed, np.inf)):
        guard = Guard(float(most), "C-ROME", C)
        edits = nbkit.edit(tiny, requests, context_templates=contexts, guard=guard, **QUICK)
        for edit, asked, other in zip(edits, mixed, prefixed, strict=True):
            outcome = "passed" if asked <= most else "fell back" if other <= most else "refused"
            assert edit.info["guard"] == outcome and bool(edit.deltas) == (outcome != "refused")
            assert edit.hparams["key_mode"] == ("prefixed" if outcome == "fell back" else "mixed")
            assert edit.info["felt_relative"] == pytest.approx(asked, rel=1e-9)
            if outcome != "passed":
                assert edit.info["felt_relative_instead"] == pytest.approx(other, rel=1e-9)
            if outcome == "fell back":
                assert nbkit.damage(tiny, edit, C)["felt_relative"][0] == pytest.approx(other, rel=1e-9)
    guard = Guard(1e-9, "C-ROME", C)
    (edit,) = nbkit.edit(tiny, requests[:1], context_templates=contexts, key_mode="prefixed", guard=guard, **QUICK)
    assert edit.info["guard"] == "refused" and "felt_relative_instead" not in edit.info


def test_every_method_and_verb_has_the_guard(tiny, requests, contexts, C):
    before, strict, kind = weights_of(tiny), Guard(1e-9, second_moment=C), Guard(math.inf, second_moment=C)
    ft = {"method": "ft", "layers": [1, 2], "progress": False, "n_steps": 2, "bias": True}
    for edit in nbkit.edit(tiny, requests, guard=kind, **ft):
        assert edit.info["guard"] == "passed" and edit.deltas
        assert edit.info["guard_unmeasured"].split(", ") == [name for name in edit.deltas if name.endswith("bias")]
    assert nbkit.edit_batch(tiny, requests, guard=kind, **ft).deltas
    refused = nbkit.edit_batch(tiny, requests, guard=strict, **ft)
    assert not refused.deltas and refused.requests == tuple(requests) and refused.info["guard"] == "refused"
    assert same_weights(tiny, before)


def test_in_a_sequence_each_step_meets_the_weights_with_the_steps_before(tiny, requests, contexts, C):
    arguments = {"context_templates": contexts, **QUICK}
    plain = [step.edit for step in nbkit.edit_sequence(tiny, requests, **arguments)]
    for guard, outcomes in ((Guard(math.inf, second_moment=C), "passed"), (Guard(1e-9, second_moment=C), "refused")):
        before, laid = weights_of(tiny), []
        for step in nbkit.edit_sequence(tiny, requests, guard=guard, **arguments):
            assert step.edit.info["guard"] == outcomes
            assert same_weights(tiny, before) == (outcomes == "refused")
            laid.append(step.edit)
        assert same_weights(tiny, before)
        if outcomes == "passed":
            for index, (edit, other) in enumerate(zip(laid, plain, strict=True)):
                assert edit.norm() == other.norm()
                here = nbkit.accumulated(plain[:index]) if index else Edit({})
                with nbkit.applied(tiny, here):
                    expected = nbkit.damage(tiny, other, C)["felt_relative"][0]
                assert edit.info["felt_relative"] == pytest.approx(expected, rel=1e-6)


def rows(felt, ratio) -> pd.DataFrame:
    felt = np.asarray(felt, float)
    return pd.DataFrame(
        {
            "felt_relative": felt,
            "update_norm": 1 / felt,
            "perplexity": 4.0 * np.asarray(ratio),
            "perplexity_before": 4.0,
        }
    )


def test_the_calibration_finds_the_line_the_rows_are_on():
    draw = np.random.default_rng(0)
    felt = np.exp(draw.normal(size=60))
    frame = rows(felt, 2 * felt**1.5 * np.exp(0.1 * draw.normal(size=60)))
    found = calibration(frame, ratio=4.0, n_resamples=200)
    assert found.line.slope_low < 1.5 < found.line.slope_high and found.line.slope == pytest.approx(1.5, abs=0.1)
    assert found.line.intercept_low < math.log(2) < found.line.intercept_high
    assert found.line.n == 60 and found.line.left_out == 0
    assert found.detections["felt_relative"].auc > 0.95 and found.detections["update_norm"].auc < 0.05
    assert calibration(frame, ratio=4.0, n_resamples=200).line == found.line


def test_edits_without_a_finite_number_are_left_out_of_the_line_and_counted_everywhere_else():
    frame = rows([0.5, 1, 2, 4, 1, 8, 1e-9], [0.9, 1, 2, 30, np.inf, np.nan, 1])
    frame.loc[4, "felt_relative"], frame.loc[6, "felt_relative"] = np.nan, 0.0
    found = calibration(frame, n_resamples=50)
    assert found.line.n == 4 and found.line.left_out == 3
    assert found.detections["felt_relative"].collapsed == 3 and found.detections["felt_relative"].auc == 1
    assert threshold(frame, ratio=10.0) == (pytest.approx(math.sqrt(8)), 0, 3, 7)
    assert math.isnan(line(frame[:2]).slope) and line(frame[:2]).n == 2


def test_the_threshold_misjudges_the_fewest():
    frame = rows([1, 2, 3, 4, 5, 6], [1, 1, 9, 1, 9, 9])
    assert threshold(frame, ratio=2.0) == (pytest.approx(math.sqrt(6)), 1, 3, 6)
    assert math.isnan(threshold(frame, ratio=100.0).cut)
    with pytest.raises(ResultsError, match="no column felt_relative"):
        threshold(frame.drop(columns="felt_relative"))


def test_rows_of_a_study_say_what_the_guard_did(tiny, requests, contexts, texts, C, tmp_path):
    shared = {"store": Store(tmp_path), "context_templates": contexts, "layer": 1, "v_num_grad_steps": 3}
    felt = foretold(tiny, requests, contexts, C)
    guard = Guard(sorted(felt)[1], second_moment=C)
    plain = single_edits(tiny, requests, texts, **shared)
    frame = single_edits(tiny, requests, texts, guard=guard, **shared)
    assert frame["guard"].value_counts().to_dict() == {"passed": 2, "refused": 1} and "guard" not in plain
    refused = frame["guard"] == "refused"
    np.testing.assert_allclose(frame.loc[refused, "perplexity"], frame.loc[refused, "perplexity_before"], rtol=1e-12)
    np.testing.assert_allclose(frame.loc[~refused, "perplexity"], plain.loc[~refused, "perplexity"], rtol=1e-12)
    in_sequence = sequential_edits(tiny, requests, texts, seeds=[0], guard=Guard(1e-9, second_moment=C), **shared)
    assert in_sequence["guard"].dropna().tolist() == ["refused"] * 3 and in_sequence["perplexity"].nunique() == 1


def test_a_study_takes_second_moments_however_they_are_given(tiny, requests, contexts, texts, C, tmp_path):
    shared = {"context_templates": contexts, "layer": 1, "v_num_grad_steps": 3, "metrics": False}
    run = partial(single_edits, tiny, requests, texts, **shared)
    moments, felt = SecondMoments(C, tiny), foretold(tiny, requests, contexts, C)
    given = [(Guard(sorted(felt)[1], second_moment=each), each) for each in (C, moments)]
    frames = [run(store=Store(tmp_path / str(i)), guard=guard) for i, (guard, _) in enumerate(given)]
    frames += [run(store=Store(tmp_path / str(i)), second_moment=each) for i, (_, each) in enumerate(given)]
    for one, other in (frames[:2], frames[2:]):
        pd.testing.assert_frame_equal(one.drop(columns="created"), other.drop(columns="created"))
    again = run(store=Store(tmp_path / "0"), guard=given[1][0])
    pd.testing.assert_frame_equal(again, frames[0])  # the same rows: found, not computed a second time
    assert sequential_edits(tiny, requests, texts, seeds=[0], guard=given[1][0], layer=1, v_num_grad_steps=3,
                            context_templates=contexts, store=Store(tmp_path))["guard"].count() == 3  # fmt: skip
