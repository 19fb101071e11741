"""The second moment of the keys, C = E[k kᵀ], not centred, over ordinary text: streamed, in float64.

What ROME's u = C⁻¹ k̄ needs:

    C = second_moment(lm, layer=3, texts=texts, n_tokens=100_000, cache=paths.RUNS / "moments")
    u = SecondMoments(C, lm).solve(3, key)           # by a Cholesky factor, never by an inverse

Several layers cost one pass over the texts, and how many tokens are enough can be measured on the way:

    moments = second_moments(lm, [3, 4, 5], texts, stop=Convergence({3: keys_3, 4: keys_4, 5: keys_5}, tolerance=0.05))
    moments[4], moments.checks                       # checks: the error of u by tokens read and layer

Every token counts alike; of each text the first ones are keys of position 0, as in the papers' statistics.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from nbkit import paths
from nbkit.errors import MethodError, ModelError, PromptError
from nbkit.keys.moments_cache import MomentsCache
from nbkit.keys.windows import Place, Window, batches, chunks, windows
from nbkit.models.hooks import capture, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.records import embedded
from nbkit.records.provenance import digest
from nbkit.records.requests import read_texts

LONG = 1024  # tokens: a batch has room for so many rows of a context, or of this where the context is longer
CHUNK = 4  # batches' worth of tokens whose windows are sorted by length together
CHECKS = ["n_tokens", "layer", "error", "median_error"]


@dataclass(frozen=True, eq=False)
class Convergence:
    """Ends a pass over the texts once C suffices for these keys: once u = C⁻¹k / |C⁻¹k| is known to `tolerance`.

    keys: {layer: (key, d_mlp)}, the keys k' of edits to come, or of requests like them, at every layer asked for.
    tolerance: of the error of u, a unit vector; 0 never ends the pass, but has the error measured.
    every: tokens between two measurements. One costs three factorisations a layer, as long as d_mlp / 2 tokens' sums.
    quantile: of the keys, how many must be within the tolerance at every layer; 1 is all of them.

    The error of u after n tokens, against endless text, is taken from the two halves of the texts read: the root of the
    mean of |u_half - u|² over both. To first order u is the mean of the two u_half, which are independent and of twice
    its variance, so each is as far from u as u is from its limit. This is the delete-half jackknife's variance plus its
    squared bias (Shao and Tu, The Jackknife and Bootstrap, 1995, chapters 1 and 2). Less will not do: both halves share
    the bias of C⁻¹ over few tokens, so half of |u₁ - u₂| comes out a third too low where n is 8 d_mlp; and how
    far u moved since the last measurement is small where measurements are frequent.

    One split of the texts is one draw: measured, it was mostly right within a fifth for the median of 60 keys, and
    within a factor of two for the worst. It knows only of texts like those read, so shuffle texts that are sorted by
    topic. It falls as 1/√n: a tenth of it costs a hundred times the tokens.
    """

    keys: Mapping[int, Float[Tensor, "key d_mlp"]]
    tolerance: float = 0.05
    every: int = 10_000
    quantile: float = 1.0

    def __post_init__(self):
        if not (self.tolerance >= 0 and self.every >= 1 and 0 <= self.quantile <= 1):
            raise MethodError(
                f"Convergence cannot take tolerance={self.tolerance}, every={self.every}, quantile={self.quantile}: "
                "tolerance must be at least 0, every at least 1 token, quantile from 0 to 1"
            )

    def at(self, layers: Sequence[int], lm: LanguageModel) -> "Convergence":
        """The same for `layers` only, its keys in float64 on the model's device; MethodError if they are of no use."""
        keys = {}
        for layer in layers:
            if layer not in self.keys:
                raise MethodError(f"Convergence has no keys for layer {layer}, only for {sorted(self.keys)}")
            found = torch.as_tensor(self.keys[layer]).detach().to(lm.device, torch.float64)
            if found.dim() != 2 or found.shape[0] == 0 or found.shape[1] != lm.d_mlp:
                raise MethodError(
                    f"the keys of layer {layer} must be (key, {lm.d_mlp}) in {lm.name}, not {tuple(found.shape)}"
                )
            if not found.isfinite().all() or not found.any(1).all():
                raise MethodError(f"a key of layer {layer} is zero, or holds NaN or infinity: it has no direction")
            keys[layer] = found
        return Convergence(keys, self.tolerance, self.every, self.quantile)


class Moments(dict[int, Tensor]):
    """{layer: E[k kᵀ]}, and how well it was known at each measurement of a `Convergence`.

    checks: columns n_tokens (read until then), layer, error (of u, 0 to 2; at the quantile of the keys; infinite while
    C is not positive definite), median_error (over the keys). The last measurement is of what the mapping holds.
    Empty without a `Convergence`.
    """

    def __init__(self, moments: Mapping[int, Tensor], checks: Iterable[tuple[int, int, float, float]] = ()):
        super().__init__(moments)
        self.checks = pd.DataFrame(sorted(checks, key=lambda check: check[0]), columns=CHECKS)


def second_moment(
    lm: LanguageModel,
    layer: int,
    texts: Iterable[str],
    n_tokens: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "d_mlp d_mlp"]:
    """E[k kᵀ] of `layer` over the tokens of `texts`, float64, on the model's device; see `second_moments`."""
    return second_moments(lm, [layer], texts, n_tokens, batch_size, cache, progress)[layer]


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    texts: Iterable[str],
    n_tokens: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = False,
    stop: Convergence | None = None,
) -> Moments:
    """{layer: E[k kᵀ]} over the tokens of `texts`: (d_mlp, d_mlp) each, float64, on the model's device.

    All layers come from one pass, which holds one matrix a layer, with `stop` two. The model is not changed.

    Args:
        texts: read as they come, so a generator of any length will do. Tokenised as everywhere (BOS where the tokenizer
            adds one); one longer than the context is read in windows.
        n_tokens: exactly so many, the first; PromptError if the texts hold fewer. With `stop`, so many at most.
        batch_size: rows of a full context (1024 tokens where it is longer) that a pass has room for; shorter rows are
            more. It changes the result by rounding only.
        cache: a folder where each layer is kept under a name made of all that determines it, and found again; the
            texts are hashed for it, so they must be there to be read twice. Partial sums are kept there too: a call
            that was interrupted or killed goes on where they were last written, about a minute before, and ends with
            the same bits.
        progress: a bar with tokens per second and the time left.
        stop: ends the pass once C is good enough, which `checks` of the result reports. Warns if it never was.

    Raises ResultsError for a cache that cannot be written, or a damaged file in it.
    """
    layers = _check(lm, layers, texts, n_tokens, batch_size)
    stop = None if stop is None else stop.at(layers, lm)
    found, store = {}, None
    if cache is not None:
        options = f"{n_tokens}" if stop is None else f"{n_tokens} {digest(stop)}"
        store = MomentsCache(Path(cache).expanduser(), lm, layers, texts, options)
        found = {layer: stored for layer in layers if (stored := store.result(layer)) is not None}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        layers_to_read = missing if stop is None else layers  # when a pass stops depends on all layers
        sums = _Sums.begin(lm, layers_to_read, 1 if stop is None else 2, store)
        _read(lm, sums, texts, n_tokens, batch_size, progress, stop, store)
        for layer in layers_to_read:
            found[layer] = sums.finish(layer), [check for check in sums.checks if check[1] == layer]
            if store is not None:
                store.add_result(layer, *found[layer])
    if store is not None:
        store.remove_partial()
    moments = Moments(
        {layer: found[layer][0].to(lm.device) for layer in layers},
        [check for layer in layers for check in found[layer][1]],
    )
    if stop is not None:
        _warn_unless_converged(moments.checks, stop)
    return moments


def default_second_moments(lm: LanguageModel, layers: Sequence[int], progress: bool = False) -> dict[int, Tensor]:
    """{layer: C} over the text that comes with the model, all of it; cached in `runs/moments`.

    MethodError for a model that brings none.
    """
    world = embedded.MODELS.get(Path(lm.name).name)
    if world is None:
        raise MethodError(
            f"the method needs second moments, and {lm.name} brings no text to take them from; give "
            "second_moment=nbkit.second_moments(lm, layers, texts, n_tokens=..., cache=...)"
        )
    texts = read_texts(f"{world}-training")
    return dict(second_moments(lm, layers, texts, cache=paths.RUNS / "moments", progress=progress))


def factor(second_moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Lower Cholesky factor L of C = L Lᵀ in float64. MethodError if C is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(second_moment.double())
    if info.item() or not lower.isfinite().all():
        raise MethodError(
            f"the second moment ({second_moment.shape[0]} × {second_moment.shape[0]}) cannot be solved with: it is not "
            "positive definite. It needs more tokens, several times as many as it has rows"
        )
    return lower


class SecondMoments:
    """The second moments an edit was given, by layer, each factored once when first needed.

    `given`: None, one matrix (meant for whichever layer is asked for), or {layer: matrix}; NumPy arrays will do.
    """

    def __init__(self, given: Tensor | np.ndarray | Mapping[int, Tensor] | None, lm: LanguageModel):
        self._lm = lm
        self._given = given
        self._factors: dict[int, Tensor] = {}
        self._eigen: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        return self._given is not None

    def solve(self, layer: int, vectors: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        """C⁻¹ of one vector, or of each of any number, in float64."""
        if layer not in self._factors:
            self._factors[layer] = factor(self.matrix(layer))
        return _solve(self._factors[layer], vectors)

    def small_directions(self, layer: int, threshold: float) -> Float[Tensor, "d_mlp m"]:
        """Orthonormal eigenvectors of C whose eigenvalue is below `threshold`, where ordinary text has few keys.

        In float64, decomposed once a layer. MethodError if there are none.
        """
        if layer not in self._eigen:
            self._eigen[layer] = torch.linalg.eigh(self.matrix(layer).double())
        values, vectors = self._eigen[layer]
        if not (values < threshold).any():
            raise MethodError(
                f"no eigenvalue of the second moment at layer {layer} is below {threshold:g}; the smallest is "
                f"{values[0].item():.3g}, so nullspace_threshold must be larger"
            )
        return vectors[:, values < threshold]

    def matrix(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C of a layer on the model's device; MethodError if none of its size was given."""
        matrix = self._given
        if isinstance(matrix, Mapping):
            if layer not in matrix:
                raise MethodError(f"no second moment is given for layer {layer}, only for {sorted(matrix)}")
            matrix = matrix[layer]
        matrix = torch.as_tensor(matrix, device=self._lm.device)
        expected = (self._lm.d_mlp, self._lm.d_mlp)
        if tuple(matrix.shape) != expected:
            raise MethodError(
                f"the second moment of {self._lm.name} must be {expected}, not {tuple(matrix.shape)}; "
                "is it another model's?"
            )
        return matrix


def _solve(lower: Float[Tensor, "d d"], vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    columns = vectors.double().reshape(-1, vectors.shape[-1]).T
    return torch.cholesky_solve(columns, lower).T.reshape(vectors.shape)


@dataclass
class _Sums:
    """What was summed up so far, in the two halves of the corpus if there is a `stop` that compares them, else in one.

    counts: tokens in each half. place: how far the texts are read. checks: rows of `Moments.checks`.
    """

    totals: dict[int, Float[Tensor, "half d_mlp d_mlp"]]
    counts: list[int]
    place: Place = Place()
    checks: list[tuple[int, int, float, float]] = field(default_factory=list)

    @classmethod
    def begin(cls, lm: LanguageModel, layers: Sequence[int], n_halves: int, store: MomentsCache | None) -> "_Sums":
        """From where an interrupted call was, else from nothing."""
        kept = None if store is None else store.partial(layers)
        if kept is None:
            shape = (n_halves, lm.d_mlp, lm.d_mlp)
            totals = {layer: torch.zeros(shape, dtype=torch.float64, device=lm.device) for layer in layers}
            return cls(totals, [0] * n_halves)
        totals, about = kept
        totals = {layer: total.to(lm.device, copy=True) for layer, total in totals.items()}  # not mapped to the file
        return cls(totals, about["counts"], Place(*about["place"]), about["checks"])

    def about(self) -> dict:
        """What `begin` needs besides the totals."""
        return {"counts": self.counts, "place": self.place, "checks": self.checks}

    @property
    def n_tokens(self) -> int:
        return sum(self.counts)

    def finish(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C of one layer, whose sums are given up: there may be no room for both of all layers."""
        total = self.totals.pop(layer).sum(0)
        return (total + total.T) / (2 * self.n_tokens)  # symmetric to the last bit, which a matrix product need not be

    @torch.no_grad()
    def add(self, lm: LanguageModel, rows: Sequence[Window]) -> None:
        """One forward pass, which ends at the highest layer."""
        batch = pad(lm, [row.tokens for row in rows])
        halves = torch.tensor([row.half % len(self.counts) for row in rows])
        lengths = torch.tensor([len(row.tokens) for row in rows])
        real = torch.arange(batch.shape[1]) < lengths[:, None]  # (row, position)
        # Indices made here, because a GPU asked for the size of a Boolean mask makes the program wait for it.
        members = [(real & (halves == half)[:, None]).flatten().nonzero()[:, 0] for half in range(len(self.counts))]
        self.counts = [count + len(member) for count, member in zip(self.counts, members, strict=True)]
        members = [member.to(lm.device) for member in members]

        def reader(totals):
            def read(keys: Float[Tensor, "row position d_mlp"]) -> Tensor:
                for total, member in zip(totals, members, strict=True):
                    chosen = keys.flatten(0, 1)[member].double()  # (token, d_mlp)
                    total.addmm_(chosen.T, chosen)
                return keys

            return read

        # Read as they pass and not captured, so that the keys of one layer at a time are held, not of all.
        with ExitStack() as hooks:
            for layer, totals in self.totals.items():
                hooks.enter_context(replace(lm.projection(layer), reader(totals), "input", shape=batch.shape))
            hooks.enter_context(capture(lm.projection(max(self.totals)), "input", stop=True))
            lm.logits(batch, keep=1)

    def check(self, stop: Convergence) -> float:
        """Measures the error of u at every layer; returns the largest."""
        for layer, totals in self.totals.items():
            errors = _u_errors(stop.keys[layer], totals, self.counts)
            error, median = (torch.quantile(errors, at, interpolation="higher").item() for at in (stop.quantile, 0.5))
            self.checks.append((self.n_tokens, layer, error, median))
        return max(error for *_, error, _median in self.checks[-len(self.totals) :])


def _u_errors(
    keys: Float[Tensor, "key d_mlp"], totals: Float[Tensor, "half d_mlp d_mlp"], counts: Sequence[int]
) -> Float[Tensor, " key"]:
    """The error of u by the delete-half jackknife, see `Convergence`; infinite while a half cannot be solved with."""
    try:
        u, *of_halves = (_u(matrix, keys) for matrix in (totals.sum(0), *totals))
    except MethodError:
        return keys.new_full((len(keys),), torch.inf)
    squares = torch.stack([(of_half - u).square().sum(1) for of_half in of_halves])  # (half, key)
    weights = squares.new_tensor(counts) / sum(counts)  # halves of n₁ and n₂ tokens differ from u by σ²(1/nᵢ - 1/n)
    return (weights @ squares).sqrt()


def _u(matrix: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "key d_mlp"]) -> Float[Tensor, "key d_mlp"]:
    solved = _solve(factor(matrix), keys)
    return solved / solved.norm(dim=1, keepdim=True)


def _read(
    lm: LanguageModel,
    sums: _Sums,
    texts: Iterable[str],
    n_tokens: int | None,
    batch_size: int,
    progress: bool,
    stop: Convergence | None,
    store: MomentsCache | None,
) -> None:
    """Adds the texts to `sums` from its place on, until they end, or `n_tokens`, or `stop` is satisfied."""
    room = batch_size * min(lm.max_length, LONG)
    every = None if stop is None else stop.every
    n_left = None if n_tokens is None else n_tokens - sums.n_tokens
    name = "second moments" if len(sums.totals) > 1 else f"second moment, layer {min(sums.totals)}"
    bar = tqdm(total=n_tokens, initial=sums.n_tokens, desc=name, unit="token", unit_scale=True, disable=not progress)
    with bar:
        for chunk in chunks(windows(lm, texts, n_left, sums.place), CHUNK * room, every, sums.n_tokens):
            n_before = sums.n_tokens
            for rows in batches(chunk, room):
                sums.add(lm, rows)
                bar.update(sum(len(row.tokens) for row in rows))
            sums.place = chunk[-1].next
            if n_tokens is None and isinstance(texts, Sized) and sums.place.n_texts:
                bar.total = round(sums.n_tokens * len(texts) / sums.place.n_texts)  # for the time left
            if stop is not None and sums.n_tokens // every > n_before // every:
                error = sums.check(stop)
                bar.set_postfix(error=f"{error:.3g}")
                if error <= stop.tolerance:
                    return
            if store is not None:
                store.write_partial_if_due(sums.totals, sums.about())
    if not sums.n_tokens:
        raise PromptError("the texts for the second moment hold no tokens")
    if n_tokens is not None and sums.n_tokens < n_tokens:
        raise PromptError(f"{n_tokens} tokens are asked for, but the texts hold only {sums.n_tokens}")
    if stop is not None and (not sums.checks or sums.checks[-1][0] < sums.n_tokens):
        sums.check(stop)


def _check(
    lm: LanguageModel, layers: Sequence[int], texts: Iterable[str], n_tokens: int | None, batch_size: int
) -> list[int]:
    if isinstance(texts, str):
        raise PromptError("texts must be a list of texts, not one text")
    if n_tokens is not None and n_tokens < 1:
        raise PromptError(f"n_tokens is {n_tokens}: at least one token is needed, or None for all that the texts hold")
    if batch_size < 1:
        raise MethodError(f"batch_size is {batch_size}: a batch has at least one row")
    layers = list(dict.fromkeys(lm.check_layer(layer) for layer in layers))
    if not layers:
        raise ModelError("no layer is asked for")
    return layers


def _warn_unless_converged(checks: pd.DataFrame, stop: Convergence) -> None:
    n_tokens = checks.n_tokens.max()
    error = checks.error[checks.n_tokens == n_tokens].max()
    if error <= stop.tolerance or stop.tolerance == 0:
        return
    if np.isfinite(error):
        needed = f"about {n_tokens * (error / stop.tolerance) ** 2:.1e} tokens would do"
    else:
        needed = "they are not even positive definite"
    warnings.warn(
        f"the second moments have not converged after {n_tokens} tokens: the error of u is {error:.2g}, more than "
        f"{stop.tolerance:g}; {needed}",
        stacklevel=3,
    )
