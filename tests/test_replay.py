"""Short passes give what whole ones give: on every architecture, for rows of all shapes, alone and side by side."""

import functools
import warnings

import pytest
import torch

from nbkit.keys.extract import in_contexts
from nbkit.methods.verbs import edit
from nbkit.models import replay
from nbkit.models.blocks import Wanted, reading, with_value
from nbkit.models.hooks import replace
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import find_subjects
from nbkit.models.replay import Replay, WholePasses, can_replay
from nbkit.models.rows import EditedRows, filled
from nbkit.records.requests import EditRequest

FAST = {"layer": 1, "v_num_grad_steps": 4, "v_lr": 0.1, "progress": False}
MANY = [
    EditRequest("{} is located in", "Vouda", "Sennifar"),  # one token, at position 0 where there is no BOS
    EditRequest("{} plays the", "Ann", "drum and the harp"),  # a target of several tokens
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "song"),
    EditRequest("The capital of Krela is called {}", "Sennifar", "Vouda"),  # the subject ends the prompt
    EditRequest("{}", "Vouda", "Krela"),  # nothing but the subject
]


def rows_of(lm, requests, contexts) -> EditedRows:
    """These requests' rows behind every template, with all logits wanted from the subject's last token on."""
    rows, indices, edits, templates = [], [], [], []
    for number, request in enumerate(requests):
        tokens, subject_ends = find_subjects(lm, in_contexts(request, contexts), [request.subject] * len(contexts))
        rows += tokens
        indices += subject_ends
        edits += [number] * len(contexts)
        templates += range(len(contexts))
    wanted = [range(index, len(row)) for row, index in zip(rows, indices, strict=True)]
    return EditedRows(rows, indices, templates, wanted, edits)


def gradient(passes, deltas):
    deltas = deltas.clone().requires_grad_()
    passes.logits(deltas).log_softmax(-1)[:, 0].sum().backward()
    return deltas.grad


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_logits_keys_and_gradients_are_those_of_whole_passes(lm, contexts, tolerance, layer):
    rows = rows_of(lm, MANY, contexts)
    plain, short = WholePasses(lm, layer, rows), Replay(lm, layer, rows, Prefixes.of_templates(lm, contexts))

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max()))

    same(short.keys, plain.keys)
    same(short.states, plain.states)
    deltas = torch.randn(len(MANY), lm.d_model, dtype=lm.dtype, generator=torch.Generator().manual_seed(0))
    same(short.logits(deltas), plain.logits(deltas))
    same(gradient(short, deltas), gradient(plain, deltas))
    kept = torch.tensor([1, 3])  # what stays when others are finished
    for passes in (short, plain):
        passes.select(kept)
    same(short.logits(deltas[kept]), plain.logits(deltas[kept]))
    assert len(short.keys) == len(plain.keys) == 2 * len(contexts)


@pytest.mark.parametrize("batch", [1, 2, len(MANY)])
def test_edits_are_those_of_whole_passes_whatever_the_batch(lm, contexts, tolerance, monkeypatch, batch):
    short = [e for i in range(0, len(MANY), batch) for e in edit(lm, MANY[i : i + batch], "rome", contexts, **FAST)]
    lm.replayable = False
    plain = edit(lm, MANY, "rome", contexts, **FAST)
    for found, expected in zip(short, plain, strict=True):
        name = lm.weight_name(1)
        largest = expected.deltas[name].dense().abs().max()
        torch.testing.assert_close(
            found.deltas[name].dense(), expected.deltas[name].dense(), rtol=0, atol=10 * tolerance * largest
        )
        assert found.info["stop_reason"] == expected.info["stop_reason"]


def test_float32_edits_are_those_of_whole_passes(kind, make_lm, contexts, monkeypatch):
    lm = make_lm(kind, dtype=torch.float32)
    short = edit(lm, MANY, "rome", contexts, **FAST)
    lm.replayable = False
    for found, expected in zip(short, edit(lm, MANY, "rome", contexts, **FAST), strict=True):
        one, other = (e.deltas[lm.weight_name(1)].dense() for e in (found, expected))
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("without_prefixes", [False, True])
def test_with_and_without_bos_and_prefixes(make_lm, contexts, bos, without_prefixes):
    lm = make_lm("gpt2")
    if bos:
        lm.tokenizer = make_lm("llama").tokenizer
    contexts = ["{}"] if without_prefixes else contexts
    rows = rows_of(lm, MANY, contexts)
    deltas = torch.randn(len(MANY), lm.d_model, dtype=lm.dtype)
    expected = WholePasses(lm, 1, rows).logits(deltas)
    found = Replay(lm, 1, rows, Prefixes.of_templates(lm, contexts)).logits(deltas)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_finished_edits_leave_the_batch_and_the_others_go_on(tiny, contexts):
    """With a bar that some losses pass early, each edit stops where it would alone."""
    options = {**FAST, "v_num_grad_steps": 12, "early_stop_loss": 4.0, "v_lr": 0.5}
    together = edit(tiny, MANY, "rome", contexts, **options)
    steps = [len(found.info["losses"]) for found in together]
    assert len(set(steps)) > 1
    for request, found in zip(MANY, together, strict=True):
        (alone,) = edit(tiny, request, "rome", contexts, **options)
        assert found.info["stop_reason"] == alone.info["stop_reason"]
        torch.testing.assert_close(torch.tensor(found.info["losses"]), torch.tensor(alone.info["losses"]))
        torch.testing.assert_close(found.info["value_star"], alone.info["value_star"])


def test_prefixes_share_what_a_row_begins_with(tiny):
    prefixes = Prefixes(tiny, [[], [5, 6, 7]])
    assert prefixes.shared(0, [5, 6]) == 0
    assert prefixes.shared(1, [5, 6]) == 2 and prefixes.shared(1, [5, 9, 7]) == 1
    assert prefixes.shared(1, [5, 6, 7, 8]) == 3


def test_some_edits_rows_are_numbered_anew():
    rows = EditedRows([[1], [2, 3], [4], [5]], [0, 1, 0, 0], [0, 1, 0, 1], [[0], [1], [0], []], edits=[0, 1, 1, 2])
    chosen, kept = rows.of([1, 2])
    assert kept == [1, 2, 3]
    assert chosen == EditedRows([[2, 3], [4], [5]], [1, 0, 0], [1, 0, 1], [[1], [0], []], edits=[0, 0, 1])


def test_lists_of_unlike_length_are_filled_up():
    numbers, real = filled([[3, 4], [], [5]])
    assert numbers.tolist() == [[3, 4], [0, 0], [5, 0]]
    assert real.tolist() == [[True, True], [False, False], [True, False]]
    numbers, real = filled([range(2)], width=3)
    assert numbers.tolist() == [[0, 1, 0]] and real.tolist() == [[True, True, False]]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_block_run_for_some_columns_says_there_what_it_says_of_all(lm, texts, tolerance, layer):
    part = reading(lm, [lm.tokenizer(text).input_ids for text in texts])
    places = torch.tensor([[2, 0]] * len(texts))
    into_block = part.through(range(layer))
    whole, some = part.watched(layer, into_block).at(places), Wanted(part, places).watched(layer, into_block)
    for name, expected in vars(whole).items():
        torch.testing.assert_close(
            getattr(some, name), expected, rtol=0, atol=tolerance * max(1, expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("layer", [0, 2])
def test_a_changed_value_is_that_of_a_changed_projection(lm, texts, tolerance, layer):
    part = reading(lm, [lm.tokenizer(text).input_ids for text in texts])
    block = part.watched(layer, part.through(range(layer)))
    change = block.values.flip(-1)
    with replace(lm.projection(layer), lambda values: values + change, shape=tuple(change.shape[:2])):
        expected = part.block(layer, block.into_block)
    found = with_value(part.calls, layer, block, change)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max())


def test_every_architecture_can_be_replayed_without_a_warning(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_replay(lm)


def test_a_model_whose_blocks_must_be_called_otherwise_is_edited_the_plain_way_and_said_to_be(
    make_lm, contexts
):
    usual, odd = make_lm("gpt2"), make_lm("gpt2")
    block, usually = odd.block(2), type(odd.block(2))
    # Depends on how many columns it is given, as no block of the table does.
    slope = torch.linspace(0, 1, odd.d_model, dtype=odd.dtype)

    class Odd(usually):
        @functools.wraps(usually.forward)
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) + slope * hidden_states.shape[1]

    block.__class__ = Odd
    with pytest.warns(UserWarning, match="cannot be cut short .logits differ"):
        assert not can_replay(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        (found,) = edit(odd, MANY[0], "rome", contexts, **FAST)
    assert torch.isfinite(found.deltas[odd.weight_name(1)].dense()).all()
    assert can_replay(usual)


def test_a_model_of_nothing_but_nan_is_not_called_unreplayable(make_lm, monkeypatch):
    lm = make_lm("gpt2")
    lm.weight(2).fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_replay(lm)
    assert replay._disagreement(lm) == ""
