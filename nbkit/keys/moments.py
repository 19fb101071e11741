"""The second moment of the keys, C = E[k kᵀ], not centred, over ordinary text: streamed, in float64.

What ROME's u = C⁻¹ k̄ needs:

    C = second_moment(lm, layer=3, texts=texts, n_tokens=100_000, cache=paths.RUNS / "moments")
    u = SecondMoments(C, lm).solve(3, key)           # in solving.py

Several layers cost one pass over the texts: `second_moments(lm, [3, 4, 5], texts)` is {layer: C}.

Every token counts alike. The first token of each text has a key of position 0, unlike others: short texts give C more
of them than text that fills the context, so lines are better joined to documents before.
"""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit import paths
from nbkit.edits.door import verb
from nbkit.errors import MethodError, ModelError, PromptError, ResultsError
from nbkit.keys.moments_cache import MomentsCache
from nbkit.keys.windows import Place, Window, batches, chunks, windows
from nbkit.models.hooks import capture, replace, together
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.records import embedded
from nbkit.records.bars import bar
from nbkit.records.bounds import check_number, shown
from nbkit.records.requests import read_texts

LONG = 1024  # tokens: a batch has room for so many rows of a context, or of this where the context is longer
CHUNK = 4  # batches' worth of tokens whose windows are sorted by length together


@verb
def second_moment(
    lm: LanguageModel,
    layer: int,
    texts: Iterable[str],
    n_tokens: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Float[Tensor, "d_mlp d_mlp"]:
    """E[k kᵀ] of `layer` over the tokens of `texts`, float64, on the model's device; see `second_moments`."""
    return second_moments(lm, [layer], texts, n_tokens, batch_size, cache, progress)[layer]


@verb
def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    texts: Iterable[str],
    n_tokens: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """{layer: E[k kᵀ]} over the tokens of `texts`, float64, on the model's device.

    All layers come from one pass, which holds one matrix a layer. The model is not changed.

    Args:
        texts: read as they come, so a generator of any length will do. Tokenised as everywhere (BOS where the tokenizer
            adds one); one longer than the context is read in windows.
        n_tokens: exactly so many, the first; PromptError if the texts hold fewer.
        batch_size: rows of a full context (1024 tokens where it is longer) that a pass has room for; shorter rows are
            more. It changes the result by rounding only.
        cache: a folder where each layer is kept under a name made of all that determines it, and found again; the
            texts are hashed for it, so they must be there to be read twice. Partial sums are kept there too: a call
            that was interrupted or killed goes on where they were last written, about a minute before, and ends with
            the same bits.
        progress: a bar with tokens per second and the time left.

    Raises ResultsError for a cache that cannot be written, or a damaged file in it.
    """
    layers = _check(lm, layers, texts, n_tokens, batch_size)
    if cache is not None and not isinstance(cache, str | Path):
        raise ResultsError(f"cache must be a folder, not {shown(cache)}")
    store = None if cache is None else MomentsCache(Path(cache).expanduser(), lm, layers, texts, n_tokens)
    moments = {} if store is None else store.results()
    missing = [layer for layer in layers if layer not in moments]
    if missing:
        sums = _Sums.begin(lm, missing, store)
        _add_texts(lm, sums, texts, n_tokens, batch_size, progress, store)
        for layer in missing:
            moments[layer] = sums.finish(layer)
            if store is not None:
                store.add_result(layer, moments[layer])
    if store is not None:
        store.remove_partial()
    return {layer: moments[layer].to(lm.device) for layer in layers}


@verb
def default_second_moments(
    lm: LanguageModel, layers: Sequence[int], progress: bool = True, who: str = "the method"
) -> dict[int, Tensor]:
    """{layer: C} over the text that comes with the model, all of it; cached in `runs/moments`.

    MethodError, which says who needs them, for a model that brings none.
    """
    return second_moments(lm, layers, default_texts(lm, who), cache=paths.RUNS / "moments", progress=progress)


def default_texts(lm: LanguageModel, who: str) -> list[str]:
    """The text that comes with the model; MethodError as said above."""
    world = embedded.MODELS.get(lm.known_as)
    if world is None:
        raise MethodError(
            f"{who} needs second moments, and {lm.title} brings no text to take them from; give "
            "second_moment=nbkit.second_moments(lm, layers, texts, n_tokens=..., cache=...)"
        )
    return read_texts(f"{world}-training")


@dataclass
class _Sums:
    """What was summed up so far: Σ k kᵀ by layer, over how many tokens, and how far the texts are read."""

    totals: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    n_tokens: int = 0
    place: Place = Place()

    @classmethod
    def begin(cls, lm: LanguageModel, layers: Sequence[int], store: MomentsCache | None) -> "_Sums":
        """From where an interrupted call was, else from nothing."""
        kept = None if store is None else store.partial(layers)
        if kept is None:
            shape = lm.d_mlp, lm.d_mlp
            return cls({layer: torch.zeros(shape, dtype=torch.float64, device=lm.device) for layer in layers})
        totals, n_tokens, place = kept
        totals = {layer: total.to(lm.device, copy=True) for layer, total in totals.items()}  # not mapped to the file
        return cls(totals, n_tokens, place)

    def finish(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C of one layer, whose sum is given up: there may be no room for both of all layers."""
        total = self.totals.pop(layer)
        return (total + total.T) / (2 * self.n_tokens)  # symmetric to the last bit, which a matrix product need not be

    @torch.no_grad()
    def add(self, lm: LanguageModel, rows: Sequence[Window]) -> None:
        """One forward pass, which ends at the highest layer."""
        batch = pad(lm, [row.tokens for row in rows])
        lengths = torch.tensor([len(row.tokens) for row in rows])
        real = torch.arange(batch.shape[1]) < lengths[:, None]  # (row, position)
        # Indices made here, because a GPU asked for the size of a Boolean mask makes the program wait for it.
        tokens = real.flatten().nonzero()[:, 0].to(lm.device)
        # Read as they pass and not captured, so that the keys of one layer at a time are held, not of all.
        hooks = [
            replace(lm.projection(layer), partial(_add_keys, total, tokens), "input", shape=batch.shape)
            for layer, total in self.totals.items()
        ]
        with together([*hooks, capture(lm.projection(max(self.totals)), "input", stop=True)]):
            lm.logits(batch, keep=1)
        self.n_tokens += len(tokens)


def _add_keys(
    total: Float[Tensor, "d_mlp d_mlp"], tokens: Int[Tensor, " token"], keys: Float[Tensor, "row position d_mlp"]
) -> Float[Tensor, "row position d_mlp"]:
    """Adds the k kᵀ of some tokens, numbered row by row, to `total`; returns `keys` as they are."""
    chosen = keys.flatten(0, 1)[tokens].double()  # (token, d_mlp)
    total.addmm_(chosen.T, chosen)
    return keys


def _add_texts(
    lm: LanguageModel,
    sums: _Sums,
    texts: Iterable[str],
    n_tokens: int | None,
    batch_size: int,
    progress: bool,
    store: MomentsCache | None,
) -> None:
    """Adds the texts to `sums` from its place on, until they end, or `n_tokens`."""
    room = batch_size * min(lm.max_length, LONG)
    n_left = None if n_tokens is None else n_tokens - sums.n_tokens
    name = "second moments" if len(sums.totals) > 1 else f"second moment, layer {min(sums.totals)}"
    name = f"{lm.title}: {name}"
    with bar(n_tokens, name, "token", progress, done=sums.n_tokens, unit_scale=True) as reading:
        for chunk in chunks(windows(lm, texts, n_left, sums.place), CHUNK * room):
            for rows in batches(chunk, room):
                sums.add(lm, rows)
                reading.update(sum(len(row.tokens) for row in rows))
            sums.place = chunk[-1].next
            if n_tokens is None and isinstance(texts, Sized) and sums.place.n_texts:
                reading.total = round(sums.n_tokens * len(texts) / sums.place.n_texts)  # for the time left
            if store is not None:
                store.write_partial_if_due(sums.totals, sums.n_tokens, sums.place)
    if not sums.n_tokens:
        raise PromptError("the texts for the second moment hold no tokens")
    if n_tokens is not None and sums.n_tokens < n_tokens:
        raise PromptError(f"{n_tokens} tokens are asked for, but the texts hold only {sums.n_tokens}")


def _check(
    lm: LanguageModel, layers: Sequence[int], texts: Iterable[str], n_tokens: int | None, batch_size: int
) -> list[int]:
    if isinstance(texts, str):
        raise PromptError("texts must be a list of texts, not one text")
    if not isinstance(texts, Iterable):
        raise PromptError(f"texts must be a list of texts, not {shown(texts)}")
    if n_tokens is not None:
        check_number("n_tokens", n_tokens, whole=True, error=PromptError, least=1)
    check_number("batch_size", batch_size, whole=True, least=1)
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise ModelError(f"layers must be a list of layers, not {shown(layers)}")
    layers = list(dict.fromkeys(lm.check_layer(layer) for layer in layers))
    if not layers:
        raise ModelError("no layer is asked for")
    return layers
