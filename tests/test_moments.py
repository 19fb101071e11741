"""C = E[k kᵀ] against the plain sum over tokens, its cache, and the solve."""

import itertools
import random

import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.tensor_files import write_tensors
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError, ModelError, PromptError, ResultsError
from nbkit.keys.extract import token_keys
from nbkit.keys.moments import second_moment, second_moments
from nbkit.keys.solving import SecondMoments, factor
from nbkit.keys.windows import Place, batches, chunks, windows
from nbkit.models.hooks import replace, together
from nbkit.records import bars


class Corpus:
    """Sentences of random words without an end in sight; iterating over it begins anew, as a data set on disk does."""

    WORDS = (
        "Vouda Krela Sennifar Ann Danielle Darrieux French The tower river harp drum song plays runs is of in".split()
    )

    def __init__(self, n_texts: int, seed: int = 0):
        self.n_texts, self.seed, self.n_read = n_texts, seed, 0

    def __iter__(self):
        draw = random.Random(self.seed)
        for n_read in range(1, self.n_texts + 1):
            self.n_read = n_read
            yield " ".join(draw.choices(self.WORDS, k=draw.randint(1, 30))) + "."


@pytest.fixture
def passes(tiny, monkeypatch):
    """The sizes of the batches that `tiny` was run on; `passes.fail_at(n)` interrupts the n-th from now, if any."""

    class Passes(list):
        last = None

        def fail_at(self, n):
            self.last = len(self) + n

    passes, logits = Passes(), tiny.logits

    def counted(batch, keep=0):
        passes.append(batch.shape)
        if len(passes) == passes.last:
            raise KeyboardInterrupt
        return logits(batch, keep)

    monkeypatch.setattr(tiny, "logits", counted)
    return passes


@pytest.fixture
def saving_always(monkeypatch):
    """Partial sums are written whenever they can be, and that is after every two batches or so."""
    monkeypatch.setattr("nbkit.keys.moments_cache.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("nbkit.keys.moments.CHUNK", 2)


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


def test_several_layers_come_from_one_pass(lm, texts, tolerance):
    n_passes = {layer: 0 for layer in range(lm.n_layers)}

    def counting(layer):
        return lambda keys: n_passes.update({layer: n_passes[layer] + 1}) or keys

    with together([replace(lm.projection(layer), counting(layer), "input") for layer in n_passes]):
        moments = second_moments(lm, [1, 0], texts)
    assert n_passes == {0: 1, 1: 1, 2: 0}
    assert list(moments) == [1, 0] and type(moments) is dict
    for layer, C in moments.items():
        expected = by_hand(lm, texts, layer)
        torch.testing.assert_close(C, expected, rtol=tolerance, atol=tolerance * expected.abs().max())
        assert torch.equal(second_moment(lm, layer, texts), C)


def test_little_of_a_batch_is_padding(tiny, passes):
    texts = list(Corpus(400))
    second_moment(tiny, 1, texts)
    n_tokens = sum(len(tiny.tokenizer(text).input_ids) for text in texts)
    assert all(n_rows * width <= 16 * tiny.max_length for n_rows, width in passes)
    assert (
        sum(n_rows * width for n_rows, width in passes) < 1.5 * n_tokens
    )  # in their own order it would be twice as many


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


def test_texts_are_read_as_they_are_needed(tiny, texts):
    corpus = Corpus(10**9)
    C = second_moment(tiny, 1, iter(corpus), n_tokens=500, batch_size=1)
    assert corpus.n_read < 100
    torch.testing.assert_close(C, second_moment(tiny, 1, list(Corpus(100)), n_tokens=500))
    assert torch.equal(second_moment(tiny, 1, (text for text in texts)), second_moment(tiny, 1, texts))


def test_a_corpus_read_on_from_a_chunks_end_falls_into_the_same_chunks(tiny):
    texts = [*Corpus(30), "Vouda is located in Krela. " * 40, "", *Corpus(30, seed=1)]
    whole = list(chunks(windows(tiny, texts), 250))
    read = [token for chunk in whole for window in chunk for token in window.tokens]
    assert read == [token for text in texts for token in tiny.tokenizer(text).input_ids]
    assert any(chunk[-1].next.n_windows for chunk in whole)  # also from within a text
    for i, chunk in enumerate(whole, 1):
        assert list(chunks(windows(tiny, texts, start=chunk[-1].next), 250)) == whole[i:]
        assert sorted(window for batch in batches(chunk, 200) for window in batch) == sorted(chunk)
    assert whole[-1][-1].next == Place(len(texts))


def test_the_cache_is_named_by_all_that_determines_it(tiny, make_lm, texts, tmp_path):
    def files():
        return len(list(tmp_path.iterdir()))

    C = second_moment(tiny, 1, texts, cache=tmp_path)
    assert files() == 1
    tiny.logits = None  # a second pass would fail
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
    with pytest.raises(ResultsError, match=f"{path.name} is damaged, or no second moment .*; delete it"):
        second_moment(tiny, 1, texts, cache=tmp_path)


def test_partial_sums_of_something_else_are_named(tiny, texts, passes, saving_always, tmp_path):
    passes.fail_at(4)
    with pytest.raises(KeyboardInterrupt):
        second_moment(tiny, 1, Corpus(200), batch_size=2, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    write_tensors(path, {"1": torch.zeros(1, 48, 48)}, {"counts": [9], "place": [1, 0]})
    with pytest.raises(ResultsError, match=f"{path.name} is damaged, .*n_tokens.*; delete it to begin anew"):
        second_moment(tiny, 1, Corpus(200), batch_size=2, cache=tmp_path)


def test_layers_that_are_in_the_cache_are_not_computed_again(tiny, passes, texts, tmp_path):
    C = second_moment(tiny, 1, texts, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    moments = second_moments(tiny, [0, 1], texts, cache=tmp_path)
    assert torch.equal(moments[1], C) and path.stat().st_mtime_ns == written
    n_passes = len(passes)
    assert torch.equal(second_moment(tiny, 0, texts, cache=tmp_path), moments[0])
    assert len(passes) == n_passes and len(list(tmp_path.iterdir())) == 2


def test_a_cache_needs_texts_that_can_be_read_twice(tiny, passes, tmp_path):
    with pytest.raises(PromptError, match="can be read only once.*give a list"):
        second_moment(tiny, 1, iter(Corpus(10)), cache=tmp_path)
    C = second_moment(tiny, 1, Corpus(10), cache=tmp_path)
    n_passes = len(passes)
    assert torch.equal(second_moment(tiny, 1, Corpus(10), cache=tmp_path), C)
    assert len(passes) == n_passes


LONG = "Vouda is located in Krela, and Ann plays the harp. " * 160  # many windows


@pytest.mark.parametrize("texts", [Corpus(200), [LONG], [*Corpus(60), LONG, *Corpus(60, seed=1)]], ids=range(3))
@pytest.mark.parametrize("more", [{}, {"n_tokens": 1_500}])
@pytest.mark.parametrize("n", [4, 6])
def test_an_interrupted_call_goes_on_to_the_same_bits(tiny, passes, saving_always, texts, more, n, tmp_path):
    def moments(**cache):
        return second_moments(tiny, [0, 1], texts, batch_size=2, **more, **cache)

    whole, all_passes = moments(), list(passes)
    passes.fail_at(n)
    with pytest.raises(KeyboardInterrupt):
        moments(cache=tmp_path)
    (partial,) = tmp_path.iterdir()
    passes.clear()
    passes.fail_at(0)
    resumed = moments(cache=tmp_path)
    assert 0 < len(passes) < len(all_passes) and passes == all_passes[-len(passes) :]
    assert all(torch.equal(resumed[layer], whole[layer]) for layer in whole)
    assert len(list(tmp_path.iterdir())) == 2 and not partial.exists()


@pytest.mark.parametrize("n_bytes", [0, 100, 18_000])
def test_damaged_partial_sums_are_named(tiny, passes, saving_always, n_bytes, tmp_path):
    passes.fail_at(4)
    with pytest.raises(KeyboardInterrupt):
        second_moment(tiny, 1, Corpus(200), batch_size=2, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:n_bytes])
    message = f"{path.name} is damaged, or no partial second moment .*; delete it to begin anew"
    with pytest.raises(ResultsError, match=message):
        second_moment(tiny, 1, Corpus(200), batch_size=2, cache=tmp_path)


def test_the_bar_counts_tokens(tiny, texts, capsys, monkeypatch):
    monkeypatch.setattr(bars, "DELAY", 0)
    second_moment(tiny, 1, texts, n_tokens=60, progress=True)
    second_moments(tiny, [0, 1], texts, progress=True)
    first, second = capsys.readouterr().err.split("second moments:", 1)
    assert "second moment, layer 1: 100%" in first and "60.0/60.0" in first and "token/s" in first
    assert "100%" in second


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
    with pytest.raises(PromptError, match="n_tokens must be a whole number from 1 on"):
        second_moment(tiny, 1, texts, n_tokens=0)
    with pytest.raises(MethodError, match="batch_size must be a whole number from 1 on"):
        second_moment(tiny, 1, texts, batch_size=0)
    with pytest.raises(ModelError, match="no layer is asked for"):
        second_moments(tiny, [], texts)


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


def test_many_vectors_are_solved_for_at_once(tiny):
    moments = SecondMoments(second_moments(tiny, [0, 1], Corpus(200)), tiny)
    vectors = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    solved = moments.solve(1, vectors)
    assert solved.shape == vectors.shape and solved.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(solved[i, j], moments.solve(1, vectors[i, j]))
    assert moments.solve(1, vectors[:0]).shape == (0, 3, 48)


def test_a_second_moment_that_cannot_be_solved_with(tiny, texts):
    singular = second_moment(tiny, 1, texts, n_tokens=10)  # rank 10 of 48
    with pytest.raises(MethodError, match="needs more tokens"):
        factor(singular)
    with pytest.raises(MethodError, match=r"must be \(48, 48\), not \(5, 5\)"):
        SecondMoments(torch.eye(5), tiny).solve(1, torch.ones(48))
    with pytest.raises(MethodError, match=r"no second moment is given for layer 1, only for \[0\]"):
        SecondMoments({0: torch.eye(48)}, tiny).solve(1, torch.ones(48))


def test_rounding_makes_no_second_moment_wrong(tiny, texts):
    few = second_moment(tiny, 1, texts, n_tokens=10)  # rank 10 of 48
    assert torch.linalg.eigvalsh(few)[0] < 0  # by rounding
    for C in (few, few.float(), few.float().double(), few * 1e-12, few * 1e12):
        assert torch.equal(SecondMoments(C, tiny).matrix(1), C)
    large = torch.randn(48, 300, generator=torch.Generator().manual_seed(0)).float()
    asymmetric = large @ large.T + 1e-5 * torch.randn(48, 48)  # as a product in float32 may be
    assert SecondMoments(asymmetric, tiny).matrix(1) is asymmetric
