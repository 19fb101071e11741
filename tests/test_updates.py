"""The arithmetic of updates: whatever is stored, the numbers are those of the dense matrix."""

import pytest
import torch

from nbkit.edits.updates import Dense, LowRank, total
from nbkit.errors import MethodError


def random_update(kind: str, seed: int = 0, dtype=torch.float64, rank: int = 2):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(6, rank, generator=generator, dtype=torch.float64).to(dtype)
    right = torch.randn(rank, 9, generator=generator, dtype=torch.float64).to(dtype)
    return LowRank(left, right) if kind == "low rank" else Dense(left @ right)


KINDS = pytest.mark.parametrize("kind", ["low rank", "dense"])


@KINDS
def test_what_an_update_says_of_itself(kind):
    update = random_update(kind)
    matrix = update.dense()
    assert update.shape == (6, 9) == tuple(matrix.shape)
    assert update.n_numbers == {"low rank": 30, "dense": 54}[kind]
    assert update.rank == {"low rank": 2, "dense": 6}[kind]
    assert update.norm() == pytest.approx(matrix.norm().item(), rel=1e-12)
    assert update.dtype == torch.float64 and update.device == matrix.device
    assert update.isfinite()


@KINDS
def test_scaled_centred_and_decomposed(kind):
    update = random_update(kind)
    matrix = update.dense()
    torch.testing.assert_close(update.scaled(-0.5).dense(), -0.5 * matrix)
    mean, rest = update.centred()
    torch.testing.assert_close(mean, matrix.mean(1, keepdim=True))
    torch.testing.assert_close(rest.dense(), matrix - matrix.mean(1, keepdim=True))
    svd = update.svd()
    torch.testing.assert_close((svd.u * svd.s) @ svd.vh, matrix)
    torch.testing.assert_close(svd.s[:2], torch.linalg.svdvals(matrix)[:2])
    doubled = update.with_svd(svd._replace(s=2 * svd.s))
    assert type(doubled) is type(update)
    torch.testing.assert_close(doubled.dense(), 2 * matrix)


@KINDS
def test_nan_and_infinity_are_seen(kind):
    assert not random_update(kind).scaled(float("inf")).isfinite()
    assert not random_update(kind).scaled(float("nan")).isfinite()


def test_factors_are_kept_only_where_they_are_smaller():
    small, large = random_update("low rank"), random_update("low rank", rank=4)
    assert small.compact() is small
    assert isinstance(large.compact(), Dense)
    assert torch.equal(large.compact().dense(), large.dense())
    assert isinstance(random_update("dense").compact(), Dense)


def test_the_sum_of_low_rank_updates_has_low_rank():
    updates = [random_update("low rank", seed) for seed in range(3)]
    added = total(updates)
    assert isinstance(added, LowRank) and added.rank == 6
    torch.testing.assert_close(added.dense(), sum(update.dense() for update in updates))
    assert total(updates[:1]) is updates[0]


def test_a_dense_update_among_them_makes_the_sum_dense_in_the_widest_type():
    narrow, wide = random_update("low rank", dtype=torch.bfloat16), random_update("dense", 1, torch.float32)
    added = total([narrow, wide])
    assert isinstance(added, Dense) and added.dtype == torch.float32
    expected = narrow.dense().double() + wide.dense().double()
    torch.testing.assert_close(added.dense(), expected.float(), rtol=1e-6, atol=0)


def test_updates_of_different_models_are_not_added():
    with pytest.raises(MethodError, match=r"the updates of W have different shapes"):
        total([random_update("dense"), Dense(torch.zeros(3, 9))], "W")


@KINDS
def test_what_keys_feel_of_an_update(kind):
    """√E‖ΔW k‖² over the keys that C is of, by the keys themselves."""
    keys = torch.randn(50, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    update = random_update(kind)
    moved = (keys @ update.dense().T).square().sum(1).mean().sqrt()
    assert update.felt_norm(keys.T @ keys / len(keys)) == pytest.approx(moved.item(), rel=1e-12)
