"""Batches fit the memory there is, by a formula; when they do not, they are halved and nothing is lost."""


import pytest
import torch

from nbkit.methods.verbs import edit
from nbkit.models import memory
from nbkit.models.memory import Footprint, by_cost, in_batches


def test_batches_are_in_order_and_of_the_size_asked_for():
    assert list(in_batches([1, 2, 3, 4, 5], 2, list)) == [[1, 2], [3, 4], [5]]
    assert list(in_batches([1, 2], 0, list)) == [[1], [2]]
    assert list(in_batches([], 4, list)) == []


def test_items_of_like_cost_are_together_and_come_with_their_places(capsys):
    tens = lambda places: [10 * place for place in places]  # noqa: E731
    batches = by_cost([5, 1, 4, 1], 2, tens, "edits", "edit", progress=True, delay=0)
    assert list(batches) == [([1, 3], [10, 30]), ([2, 0], [20, 0])]
    assert "edits: 100%" in capsys.readouterr().err
    assert list(by_cost([], 2, list)) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing(error):
    tried = []

    def compute(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise error
        return list(batch)

    with pytest.warns(UserWarning, match="out of memory: going on with batches of [42]"):
        found = [item for batch in in_batches(range(9), 9, compute) for item in batch]
    assert found == list(range(9)) and tried == [9, 4, 2, 2, 2, 2, 1]


def test_what_does_not_fit_alone_and_other_errors_are_raised():
    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        list(in_batches([1, 2], 2, full))

    def wrong(batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches([1, 2], 2, wrong))


def test_the_footprint_grows_with_what_it_is_made_of(tiny):
    small = Footprint(n_tokens=4, n_earlier=8, n_layers=2, n_logits=1, backward=True)
    assert small.bytes(tiny) == 4 * 8 * (12 * 32 + 4 * 48) * 2 + 4 * 8 * 32 * 2 * 8 + 16 * tiny.config.vocab_size
    forward = Footprint(n_tokens=4, n_earlier=8, n_layers=2, n_logits=1, backward=False)
    assert forward.bytes(tiny) < small.bytes(tiny)


def test_little_memory_means_small_batches_and_the_same_edits(tiny, requests, contexts, monkeypatch):
    options = {"context_templates": contexts, "layer": 1, "v_num_grad_steps": 2, "progress": False}
    expected = edit(tiny, requests, **options)
    sizes = []

    def watched(items, size, compute):
        sizes.append(size)
        return in_batches(items, size, compute)

    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(memory, "in_batches", watched)
    for found, other in zip(edit(tiny, requests, **options), expected, strict=True):
        name = tiny.weight_name(1)
        torch.testing.assert_close(found.deltas[name].dense(), other.deltas[name].dense(), rtol=1e-9, atol=1e-12)
    assert sizes == [0]
