"""Many edited models in one pass score what each of them scores with its edit in the weights."""

import numpy as np
import pandas as pd
import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import ModelError
from nbkit.models import edited
from nbkit.models.edited import edited_logits
from nbkit.models.rows import AskedRows
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity, score_targets


def update(lm, layer: int, rank: int | None, seed: int, scale: float = 0.02):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(lm.dtype)

    if rank is None:
        return {lm.weight_name(layer): Dense(noise(lm.d_model, lm.d_mlp))}
    return {lm.weight_name(layer): LowRank(noise(lm.d_model, rank), 50 * noise(rank, lm.d_mlp))}


def edits_of_all_kinds(lm) -> list[Edit]:
    return [
        Edit(update(lm, 1, 1, 0)),
        Edit(update(lm, 1, 1, 1)),
        Edit(update(lm, 2, 1, 2)),
        Edit(update(lm, 0, 3, 3)),
        Edit(update(lm, 1, None, 4)),
        Edit(update(lm, 0, 1, 5) | update(lm, 2, 1, 6)),  # two layers
        Edit(update(lm, 1, None, 7)),
    ]


def low_rank_edits(lm) -> list[Edit]:
    """Of different ranks, of one layer and of several."""
    return [
        Edit(update(lm, 0, 1, 0)),
        Edit(update(lm, 1, 3, 1) | update(lm, 2, 1, 2)),
        Edit(update(lm, 2, 5, 3)),
        Edit(update(lm, 0, 2, 4) | update(lm, 1, 1, 5) | update(lm, 2, 4, 6)),
        Edit(update(lm, 1, 1, 7)),
    ]


def one_by_one(lm, edits, measure) -> list:
    values = []
    for edit in edits:
        with applied(lm, edit):
            values.append(measure())
    return values


@pytest.fixture
def many() -> list[EditRequest]:
    return [
        EditRequest("{} is located in", "Vouda", "Sennifar", "Krela", case_id=0,
                    paraphrase_prompts=("I see Vouda in",)),
        EditRequest("{} plays the", "Ann", "drum and chess", "harp", case_id=1,
                    neighborhood_prompts=("Danielle plays",), neighborhood_targets=("harp",)),
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "the song", "French", case_id=2,
                    paraphrase_prompts=("Ann. The mother tongue of Danielle Darrieux is", "Danielle speaks")),
    ]  # fmt: skip


@pytest.mark.parametrize("kind_of_perplexity", ["sentence_mean", "token"])
def test_perplexities(lm, texts, tolerance, kind_of_perplexity):
    edits = edits_of_all_kinds(lm)
    expected = one_by_one(lm, edits, lambda: perplexity(lm, texts, kind=kind_of_perplexity))
    before = lm.model.state_dict()[lm.weight_name(1)].clone()
    found = perplexity(lm, texts, edits=edits, kind=kind_of_perplexity)
    np.testing.assert_allclose(found, expected, rtol=10 * tolerance)
    assert len(set(np.round(found, 6))) == len(edits)
    assert lm.n_applied == 0 and torch.equal(before, lm.weight(1))


@pytest.mark.parametrize("kind", ["gpt2", "phi", "opt", "gptj"], indirect=True)
def test_edits_of_biases(lm, texts, tolerance):
    """With the weight, alone, beside edits that leave the bias, and in a layer below."""

    def bias(layer, seed):
        generator = torch.Generator().manual_seed(seed)
        column = torch.randn(lm.d_model, 1, generator=generator, dtype=torch.float64).to(lm.dtype)
        return {lm.architecture.projection_path(layer) + ".bias": Dense(0.2 * column)}

    edits = [
        Edit(update(lm, 1, None, 0) | bias(1, 1)),
        Edit(update(lm, 1, None, 2) | bias(1, 3)),
        Edit(bias(1, 4)),
        Edit(bias(0, 5) | update(lm, 2, 1, 6)),
        Edit(update(lm, 1, 1, 7)),
    ]
    expected = one_by_one(lm, edits, lambda: perplexity(lm, texts))
    np.testing.assert_allclose(perplexity(lm, texts, edits=edits), expected, rtol=10 * tolerance)
    assert len(set(np.round([*expected, perplexity(lm, texts)], 6))) == 6
    rows = [lm.tokenizer(text).input_ids for text in texts]
    changes, grid, kept = edited.Changes(lm, edits), torch.tensor([[0], [1], [2], [3], [4]]), [range(2, 5)] * 5
    for passes in (edited.WholePass(lm, rows), edited.SharedPass(lm, 0, rows)):
        found = passes.logits(changes, grid, kept).split(3)
        for one, edit, row in zip(found, edits, rows, strict=True):
            with applied(lm, edit):
                plain = lm.model(torch.tensor([row])).logits[0, 2:5]
            assert (one - plain).norm() < 100 * tolerance * plain.norm()


@pytest.mark.parametrize("reach", [0.0, 0.6, edited.REACH])
def test_low_rank_edits_of_different_layers_and_ranks_in_one_pass(lm, texts, tolerance, reach, monkeypatch):
    """All in one group, some in one, or each layer by itself: it is the same."""
    monkeypatch.setattr(edited, "REACH", reach)
    edits = low_rank_edits(lm)
    expected = one_by_one(lm, edits, lambda: perplexity(lm, texts))
    np.testing.assert_allclose(perplexity(lm, texts, edits=edits), expected, rtol=10 * tolerance)
    monkeypatch.setattr(edited, "budget", lambda _device: 0)  # one at a time, from the group's lowest layer
    np.testing.assert_allclose(perplexity(lm, texts, edits=edits), expected, rtol=10 * tolerance)


def test_which_edits_go_together(tiny, monkeypatch):
    outside = Edit({"transformer.wpe.weight": Dense(torch.ones(tiny.d_model, tiny.max_length))})
    edits = [*low_rank_edits(tiny), *edits_of_all_kinds(tiny)[4:], Edit({}), outside]

    def groups() -> dict:
        return {(layer, tuple(sorted(places))) for layer, places in edited.alike(tiny, edits)}

    rest = {(1, (5, 7)), (None, (8, 9))}  # dense ones by what they change; those that change nothing in a layer
    assert groups() == {(0, (0, 3, 6)), (1, (1, 4)), (2, (2,))} | rest  # by how many layers they have to run
    monkeypatch.setattr(edited, "REACH", 0.6)
    assert groups() == {(0, (0, 1, 3, 4, 6)), (2, (2,))} | rest
    monkeypatch.setattr(edited, "REACH", 0.0)
    assert groups() == {(0, (0, 1, 2, 3, 4, 6))} | rest
    (_, order), *_ = (group for group in edited.alike(tiny, edits) if group[0] == 0)
    assert order[0] in (0, 4) and order[-1] == 3  # by size


def test_whole_passes_give_the_same(lm, texts, tolerance):
    rows = [lm.tokenizer(text).input_ids for text in texts]
    for edits in (low_rank_edits(lm), [edits_of_all_kinds(lm)[4], edits_of_all_kinds(lm)[6]]):
        grid = torch.tensor([[0, 3], [1, 2], [2, 2], [4, 0], [3, 1]])[: len(edits)]
        kept = [range(len(rows[row]) - 1 - edit % 3, len(rows[row])) for edit, of in enumerate(grid) for row in of]
        kept[1] = ()
        changes = edited.Changes(lm, edits)
        found = edited.WholePass(lm, rows).logits(changes, grid, kept)
        layer = min(edited.layer_of(lm, name) for edit in edits for name in edit.deltas)
        expected = edited.SharedPass(lm, layer, rows).logits(changes, grid, kept)
        assert len(found) == sum(map(len, kept))
        assert (found - expected).norm() < 100 * tolerance * expected.norm()


def test_float32_perplexities(kind, make_lm, texts):
    lm = make_lm(kind, dtype=torch.float32)
    edits = edits_of_all_kinds(lm)
    expected = one_by_one(lm, edits, lambda: perplexity(lm, texts))
    np.testing.assert_allclose(perplexity(lm, texts, edits=edits), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_reduced_precision_it_is_the_model_that_an_edit_leaves_in_the_weights(kind, make_lm, texts, many, dtype):
    """W + ΔW rounded once. A ΔW that rounding takes away altogether changes nothing; others count as stored."""
    lm = make_lm(kind, dtype=dtype)
    weight = lm.oriented(lm.weight_name(1)).double()
    apart = torch.finfo(dtype).eps * 2.0 ** weight.abs().log2().floor()  # from the next larger number
    updates = torch.zeros_like(weight), 0.2 * apart, 0.4 * apart.mean().expand_as(apart)
    edits = [Edit({lm.weight_name(1): Dense(update)}) for update in updates] + edits_of_all_kinds(lm)[2:6]
    expected = one_by_one(lm, edits, lambda: perplexity(lm, texts))
    before = lm.weight(1).clone()
    found = perplexity(lm, texts, edits=edits)
    np.testing.assert_allclose(found, expected, rtol=2e-4)  # the same up to how the passes are cut
    assert found[1] == found[0] != found[2]
    assert lm.n_applied == 0 and torch.equal(before, lm.weight(1))
    probability = edit_metrics(lm, many, edits=edits[3:6])["target_probability"]
    for place, (request, edit) in enumerate(zip(many, edits[3:6], strict=True)):
        with applied(lm, edit):
            expected = edit_metrics(lm, [request])["target_probability"][0]
        assert probability[place] == pytest.approx(expected, rel=1e-3)


def test_edit_metrics_each_with_its_own_edit(lm, many):
    edits = edits_of_all_kinds(lm)[:3]
    reference = neighborhood_tokens(lm, many)
    expected = []
    for request, edit in zip(many, edits, strict=True):
        with applied(lm, edit):
            expected.append(edit_metrics(lm, [request], reference, prefix="The river. {}"))
    found = edit_metrics(lm, many, reference, prefix="The river. {}", edits=edits)
    pd.testing.assert_frame_equal(found, pd.concat(expected, ignore_index=True), rtol=1e-4)


def test_rows_are_asked_of_the_edit_they_name(tiny):
    edits = edits_of_all_kinds(tiny)[:2]
    prompts, targets = ["Vouda is in", "Ann plays the", "Ann plays the"], ["Krela", "harp", "harp"]
    found = score_targets(tiny, prompts, targets, edits=edits, edit_of=[1, 0, 1])
    for row, edit in enumerate([edits[1], edits[0], edits[1]]):
        with applied(tiny, edit):
            assert found["nll"][row] == pytest.approx(score_targets(tiny, prompts, targets)["nll"][row], rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_matter(tiny, texts, batch_size):
    rows = [tiny.tokenizer(text).input_ids for text in texts]
    asked = AskedRows(rows, wanted=[range(1, len(row)) for row in rows])
    edits = edits_of_all_kinds(tiny)

    def logits(**options):
        found = {}
        for pairs, values in edited_logits(tiny, edits, asked, [range(len(rows))] * len(edits), **options):
            found |= zip(pairs, values.split([len(asked.wanted[row]) for _, row in pairs]), strict=True)
        return found

    found, expected = logits(batch_size=batch_size), logits()
    assert set(found) == {(edit, row) for edit in range(len(edits)) for row in range(len(rows))}
    for pair in expected:
        torch.testing.assert_close(found[pair], expected[pair], rtol=1e-10, atol=1e-10)


def test_edits_without_rows_give_no_logits_and_do_not_change_how_others_run(tiny, texts):
    asked = AskedRows([tiny.tokenizer(text).input_ids for text in texts[:2]], wanted=[[0, 2], [1]])
    edits = low_rank_edits(tiny)[:3]
    assert list(edited_logits(tiny, edits, asked, [[], [], []])) == []
    assert list(edited_logits(tiny, edits[:1], asked, [[]])) == []
    pairs = [pair for pairs, _ in edited_logits(tiny, edits, asked, [[0, 1], [], [0, 1]]) for pair in pairs]
    assert sorted(pairs) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    bands = list(edited._bands(asked, {0: [0, 1], 1: [], 2: [0, 1]}))
    assert bands == [{0: [0, 1], 2: [0, 1]}]  # each with its own rows: not all read the same


def test_updates_elsewhere_in_a_layer_and_outside_all_layers(tiny, texts, monkeypatch):
    inner = tiny.weight_name(1).replace("c_proj", "c_fc")
    up = Dense(0.02 * torch.randn(tiny.d_mlp, tiny.d_model, dtype=tiny.dtype))
    edits = [Edit({inner: up}), Edit({inner: up} | update(tiny, 1, 1, 0))]
    expected = one_by_one(tiny, edits, lambda: perplexity(tiny, texts))
    np.testing.assert_allclose(perplexity(tiny, texts, edits=edits), expected, rtol=1e-10)

    positions = Dense(0.02 * torch.randn(tiny.d_model, tiny.max_length, dtype=tiny.dtype))
    outside = Edit({"transformer.wpe.weight": positions})
    expected = one_by_one(tiny, [outside], lambda: perplexity(tiny, texts))
    monkeypatch.setattr(edited, "SharedPass", None)  # the plain way needs none
    np.testing.assert_allclose(perplexity(tiny, texts, edits=[outside]), expected, rtol=1e-10)


def test_a_broken_model_spoils_only_its_own_numbers(tiny, texts):
    edits = edits_of_all_kinds(tiny)[:3]
    edits[1].deltas[tiny.weight_name(1)].left.fill_(torch.nan)
    found = perplexity(tiny, texts, edits=edits)
    assert np.isnan(found[1]) and np.isfinite(found[[0, 2]]).all()


def test_an_update_of_another_shape_is_refused(tiny, texts):
    wrong = Edit({tiny.weight_name(1): LowRank(torch.ones(5, 1), torch.ones(1, tiny.d_mlp))})
    with pytest.raises(ModelError, match="the edit's update of .* is \\(5, 48\\)"):
        perplexity(tiny, texts, edits=[wrong])
    with pytest.raises(ModelError, match="a weight that tiny-gpt2 does not have"):
        perplexity(tiny, texts, edits=[Edit({"transformer.h.1.nothing.weight": Dense(torch.ones(5, 5))})])
    assert len(perplexity(tiny, texts, edits=[])) == 0
