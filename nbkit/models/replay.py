"""Running again only what an edit's search for v* can change. Exact, because a causal model is.

When a value changes at layer ℓ and position p, nothing below ℓ and nothing before p does. So v* is optimised through
the tokens from p on and the layers above ℓ, over keys and values of the earlier tokens that are kept, many edits side
by side (`Replay`); what all prompts have in common, the context templates, is read once (`Prefixes`).

`WholePasses` does the same the plain way, all layers on all tokens. `can_replay` finds out, once for a model, whether
the two agree, and warns if they do not: then the plain way is taken.
"""

import warnings
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit.models.blocks import KeyValue, Part, Past, Wanted, with_value
from nbkit.models.calls import projection_pass, to_logits
from nbkit.models.hooks import capture, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import pad
from nbkit.models.rows import EditedRows, columns_of, filled, marked, spans

Site = Literal["projection", "block"]  # where a vector is added: to what the projection says, or behind its block


class Replay:
    """Prompts of many edits, run again and again with a vector of each edit's own added at one token of its prompts.

    The vector is added at the `site` of `layer`.

    keys: (row, d_mlp), states at the site: (row, d_model), of the unchanged model at the tokens that count.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, layer: int, rows: EditedRows, prefixes: Prefixes, site: Site = "projection"):
        self.lm, self.layer, self.site, self.rows = lm, layer, site, rows
        self.above = range(layer + 1, lm.n_layers)
        self.edits = torch.tensor(rows.edits, device=lm.device)
        read, places, hidden = prefixes.read_on(rows, range(layer))
        block = read.watched(layer, hidden)
        self.token = block.at(places)
        columns, visible = spans(rows.indices, [len(row) for row in rows.tokens], lm.device)
        self.output = columns_of(block.output, columns - read.columns[:, :1])
        self.part = Part(read.calls, columns, visible, self._past(read, places, block.output))
        # Among the columns from the token that counts on.
        wanted = [[token - i for token in tokens] for tokens, i in zip(rows.wanted, rows.indices, strict=True)]
        wanted_places, self.real = (tensor.to(lm.device) for tensor in filled(wanted))
        self.wanted = Wanted(self.part, wanted_places)

    def _past(self, read: Part, places: Int[Tensor, "row 1"], output: Float[Tensor, "row column d_model"]) -> Past:
        """What is before the tokens that count, for the layers above: shared prefixes, and the tokens between."""
        width, n_rows = int(places.max()), len(places)
        columns, visible = read.columns[:, :width], torch.arange(width, device=places.device) < places
        some, made = places.nonzero()[:, 0], {}
        if width:
            between = Part(read.calls, columns[some], visible[some], read.past.of(some), some)
            between.through(self.above, output[some, :width], made)
        before: dict[int, KeyValue] = {}
        for layer in self.above:
            later = [tuple(_spread(tensor, some, n_rows) for tensor in made[layer])] if width else []
            if later or layer in read.past.before:
                before[layer] = read.past.followed_by(layer, *later)
        return Past(torch.cat([read.past.columns, columns], 1), torch.cat([read.past.visible, visible], 1), before)

    @property
    def keys(self) -> Float[Tensor, "row d_mlp"]:
        return self.token.keys[:, 0]

    @property
    def states(self) -> Float[Tensor, "row d_model"]:
        return (self.token.values if self.site == "projection" else self.token.output)[:, 0]

    def logits(self, deltas: Float[Tensor, "edit d_model"]) -> Float[Tensor, "wanted vocabulary"]:
        """Logits at the wanted tokens, row by row, each edit's delta added to its rows' states. Differentiable."""
        change = deltas.to(self.token.values.dtype)[self.edits][:, None]
        if self.site == "block":
            changed = self.token.output + change
        else:
            changed = with_value(self.part.calls, self.layer, self.token, change)
        hidden = self.wanted.through(self.above, torch.cat([changed, self.output[:, 1:]], 1))
        return to_logits(self.lm, hidden[self.real])

    def select(self, edits: Int[Tensor, " kept"]) -> None:
        """Go on with these edits only (ascending numbers); they are numbered anew from 0, in order."""
        self.rows, kept = self.rows.of(edits.tolist())
        self.edits, kept = (torch.tensor(numbers, device=self.lm.device) for numbers in (self.rows.edits, kept))
        self.token, self.output, self.real = self.token.of(kept), self.output[kept], self.real[kept]
        self.part = self.part.of(kept)
        self.wanted = Wanted(self.part, self.wanted.places[kept])


class WholePasses:
    """`Replay` the plain way: every pass runs all layers on all tokens of all rows. Same arguments, same numbers."""

    def __init__(self, lm: LanguageModel, layer: int, rows: EditedRows, site: Site = "projection"):
        self.lm = lm
        self.module = lm.projection(layer) if site == "projection" else lm.block(layer)
        self._arrange(rows)
        keys, states = projection_pass(lm, self.batch, layer)
        if site == "block":
            with capture(self.module, stop=True) as output, torch.no_grad():
                lm.logits(self.batch, keep=1)
            states = output.value
        self.keys, self.states = keys[self.at], states[self.at]

    def _arrange(self, rows: EditedRows) -> None:
        device = self.lm.device
        self.rows, self.batch = rows, pad(self.lm, rows.tokens)
        self.at = torch.arange(len(rows.tokens), device=device), self.batch.columns(rows.indices)
        self.edits = torch.tensor(rows.edits, device=device)
        self.keep = marked(rows.wanted, self.batch.shape[1], device)

    def logits(self, deltas: Float[Tensor, "edit d_model"]) -> Float[Tensor, "wanted vocabulary"]:
        """As `Replay.logits`."""

        def add(values: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
            return values.index_put(self.at, deltas.to(values.dtype)[self.edits], accumulate=True)

        with replace(self.module, add, shape=self.batch.shape):
            return self.lm.logits(self.batch, keep=self.keep)

    def select(self, edits: Int[Tensor, " kept"]) -> None:
        """As `Replay.select`."""
        rows, kept = self.rows.of(edits.tolist())
        self.keys, self.states = self.keys[kept], self.states[kept]
        self._arrange(rows)


Passes = Replay | WholePasses


def passes_of(
    lm: LanguageModel, layer: int, rows: EditedRows, prefixes: Prefixes | None, site: Site = "projection"
) -> Passes:
    """Short passes over the prefixes; whole ones where there are none, because the model cannot be replayed."""
    return WholePasses(lm, layer, rows, site) if prefixes is None else Replay(lm, layer, rows, prefixes, site)


def can_replay(lm: LanguageModel) -> bool:
    """Whether `Replay` and `WholePasses` agree on this model: tried once, on two rows, with and without a prefix.

    A False comes with a warning that says what was found; the plain way is then taken wherever this is asked. What was
    found is kept as `lm.replayable`.
    """
    if lm.replayable is None:
        finding = _disagreement(lm)
        if finding:
            warnings.warn(
                f"{lm.name}: its passes cannot be cut short ({finding}), so every one runs all layers on all tokens, "
                "which is right but many times slower",
                stacklevel=2,
            )
        lm.replayable = not finding
    return lm.replayable


@torch.no_grad()
def _disagreement(lm: LanguageModel) -> str:
    """What keeps a model from being replayed, "" if nothing does."""
    n_tokens = min(12, lm.max_length)
    half, layer = n_tokens // 2, (lm.n_layers - 1) // 2
    tokens = torch.arange(7, 7 + n_tokens).remainder(lm.model.get_input_embeddings().weight.shape[0]).tolist()
    wanted = [range(half, n_tokens), range(half)]
    rows = EditedRows([tokens, tokens[:half]], indices=[half, 0], templates=[0, 0], wanted=wanted, edits=[0, 1])
    plain = WholePasses(lm, layer, rows)
    deltas = plain.states.flip(1) * 0.5
    expected = plain.logits(deltas).float()
    try:
        logits = Replay(lm, layer, rows, Prefixes(lm, [tokens[:3]])).logits(deltas).float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a block that wants to be called in another way may raise
        return f"{type(error).__name__}: {error}"
    if not torch.equal(logits.isfinite(), expected.isfinite()):
        return "not the same logits are finite"
    finite = expected.isfinite()  # a model that an edit broke may have few or none
    error = ((logits - expected)[finite].abs().max() / expected[finite].abs().max()).item() if finite.any() else 0.0
    allowed = 100 * torch.finfo(lm.dtype).eps ** (0.5 if lm.dtype == torch.float64 else 0.9)
    return "" if error <= allowed else f"logits differ by {error:.1e} of the largest"


def _spread(tensor: Tensor, rows: Int[Tensor, " some"], n_rows: int) -> Tensor:
    """A tensor of some rows only with zeros for the others: they are never seen, but must be numbers."""
    return tensor.new_zeros(n_rows, *tensor.shape[1:]).index_copy(0, rows, tensor)
