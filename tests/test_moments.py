"""C = E[k kᵀ] against the plain sum over tokens, its cache, and the solve."""

import pytest
import torch

from nbkit.edits import Edit, LowRank, applied
from nbkit.errors import MethodError, ModelError, PromptError, ResultsError
from nbkit.keys import token_keys
from nbkit.moments import SecondMoments, factor, second_moment


def by_hand(lm, texts, layer):
    all_keys = torch.cat(token_keys(lm, texts, layer, batch_size=1)).double()
    return sum(torch.outer(key, key) for key in all_keys) / len(all_keys)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_is_the_mean_outer_product_of_the_keys(lm, texts, tolerance, batch_size):
    C = second_moment(lm, 1, texts, batch_size=batch_size)
    assert C.dtype == torch.float64 and C.shape == (lm.d_mlp, lm.d_mlp)
    expected = by_hand(lm, texts, 1)
    torch.testing.assert_close(C, expected, rtol=tolerance, atol=tolerance * expected.abs().max())
    assert torch.equal(C, C.T)


def test_n_tokens_takes_exactly_the_first(tiny, texts):
    n_first = len(tiny.tokenizer(texts[0]).input_ids)
    second_keys = token_keys(tiny, texts[1:2], 1)[0][:2]
    expected = by_hand(tiny, texts[:1], 1) * n_first + second_keys.T @ second_keys
    torch.testing.assert_close(second_moment(tiny, 1, texts, n_tokens=n_first + 2), expected / (n_first + 2))
    with pytest.raises(PromptError, match=r"100000 tokens are asked for, but the texts hold only \d+"):
        second_moment(tiny, 1, texts, n_tokens=100_000)


def test_a_long_text_is_read_in_windows_of_the_context(tiny):
    text = "Vouda is located in Krela. " * 40
    ids = tiny.tokenizer(text).input_ids
    assert len(ids) > 2 * tiny.max_length
    torch.testing.assert_close(
        second_moment(tiny, 1, [text]).trace() * len(ids),
        sum(
            torch.cat(token_keys(tiny, [tiny.tokenizer.decode(ids[i : i + 96])], 1)).square().sum()
            for i in range(0, len(ids), 96)
        ),
    )


def test_the_cache_is_named_by_all_that_determines_it(tiny, make_lm, texts, tmp_path):
    def files():
        return len(list(tmp_path.iterdir()))

    C = second_moment(tiny, 1, texts, cache=tmp_path)
    assert files() == 1
    tiny.projection(0).forward = None  # a second pass would fail
    assert torch.equal(second_moment(tiny, 1, texts, cache=tmp_path), C)
    other = make_lm("gpt2")
    for n_files, (lm, layer, more) in enumerate(
        [(other, 2, {}), (other, 1, {"n_tokens": 20}), (make_lm("gpt2", seed=1), 1, {})], start=2
    ):
        assert not torch.equal(second_moment(lm, layer, texts, cache=tmp_path, **more), C)
        assert files() == n_files
    with applied(other, Edit({other.weight_name(0): LowRank(torch.ones(32, 1), torch.ones(1, 48))})):
        assert not torch.equal(second_moment(other, 1, texts, cache=tmp_path), C)
    second_moment(other, 1, texts[:-1], cache=tmp_path)
    assert files() == 6


def test_a_damaged_cache_is_named(tiny, texts, tmp_path):
    second_moment(tiny, 1, texts, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResultsError, match=f"{path.name} is damaged; delete it"):
        second_moment(tiny, 1, texts, cache=tmp_path)


def test_a_cache_that_cannot_be_written(tiny, texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        second_moment(tiny, 1, texts, cache=tmp_path / "file")


def test_bad_arguments(tiny, texts):
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        second_moment(tiny, 9, texts)
    with pytest.raises(PromptError, match="a list of texts"):
        second_moment(tiny, 1, texts[0])
    with pytest.raises(PromptError, match="hold no tokens"):
        second_moment(tiny, 1, [])


def test_solve_is_the_inverse_times_the_vector(tiny):
    C = torch.randn(48, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    C = C @ C.T / 200
    vector = torch.arange(48.0)
    solved = SecondMoments(C, tiny).solve(1, vector)
    assert solved.dtype == torch.float64
    torch.testing.assert_close(C @ solved, vector.double())
    torch.testing.assert_close(factor(C) @ factor(C).T, C)
    assert torch.equal(SecondMoments({1: C}, tiny).solve(1, vector), solved)
    assert torch.equal(SecondMoments(C.numpy(), tiny).solve(1, vector), solved)
    assert not SecondMoments(None, tiny)


def test_a_second_moment_that_cannot_be_solved_with(tiny, texts):
    singular = second_moment(tiny, 1, texts, n_tokens=10)  # rank 10 of 48
    with pytest.raises(MethodError, match="needs more tokens"):
        factor(singular)
    with pytest.raises(MethodError, match=r"must be \(48, 48\), not \(5, 5\)"):
        SecondMoments(torch.eye(5), tiny).solve(1, torch.ones(48))
    with pytest.raises(MethodError, match=r"no second moment is given for layer 1, only for \[0\]"):
        SecondMoments({0: torch.eye(48)}, tiny).solve(1, torch.ones(48))
