"""Running again only what an edit's search for v* can change. Exact, because a causal model is.

When a value changes at layer ℓ and position p, nothing below ℓ and nothing before p does. So v* is optimised through
the tokens from p on and the layers above ℓ, over keys and values of the earlier tokens that are kept, many edits side
by side (`Replay`); what all prompts have in common, the context templates, is read once (`Prefixes`).

`WholePasses` does the same the plain way, all layers on all tokens. `can_replay` finds out, once for a model, whether
the two agree, and warns if they do not: then the plain way is taken.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit.models.blocks import Calls, KeyValue, Past, at_columns, projection_pass, through, to_logits, with_value
from nbkit.models.hooks import capture, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.models.rows import columns_of, marked, spans

Site = Literal["projection", "block"]  # where a vector is added: to what the projection says, or behind its block


class Prefixes:
    """The context templates' own texts, read once: keys and values of their tokens in every layer.

    They hold for the weights of that moment; `edit_sequence` makes them anew for each edit. Every prompt may share as
    many of a prefix's tokens as its own row begins with (`shared`): at the seam a tokenizer may merge differently.
    """

    def __init__(self, lm: LanguageModel, context_templates: Sequence[str]):
        texts = [template.split("{}")[0] for template in context_templates]
        self.rows = [lm.tokenizer(text, verbose=False).input_ids[: lm.max_length] for text in texts]
        self._read(lm)

    @classmethod
    def of_rows(cls, lm: LanguageModel, rows: Sequence[Sequence[int]]) -> "Prefixes":
        """Prefixes given as token ids."""
        prefixes = cls.__new__(cls)
        prefixes.rows = [list(row) for row in rows]
        prefixes._read(lm)
        return prefixes

    @torch.no_grad()
    def _read(self, lm: LanguageModel) -> None:
        self.width = max(len(row) for row in self.rows)
        self.before: dict[int, KeyValue] = {}
        if not self.width:
            return
        filled = [row or [lm.tokenizer.pad_token_id] for row in self.rows]  # nobody shares what stands for an empty one
        calls, past = Calls(lm, filled), Past(collect=True)
        columns, visible = spans([0] * len(filled), [len(row) for row in filled], lm.device)
        everyone, layers = torch.arange(len(filled), device=lm.device), range(lm.n_layers)
        arguments = calls.at(everyone, columns, columns, visible, layers)
        through(lm, columns_of(calls.hidden, columns), layers, arguments, calls.cache, past)
        self.before = past.collected

    def shared(self, template: int, row: Sequence[int]) -> int:
        """How many tokens `row` begins with that prefix `template` begins with too."""
        return len(os.path.commonprefix([self.rows[template], list(row)]))


class FirstPass:
    """Rows of tokens read up to `layer`, each from the token on where its prefix ends; key and value at one token.

    templates: the prefix (of `prefixes`) that each row begins with. indices: the token of each row that counts.
    keys: (row, d_mlp), values: (row, d_model), as the model has them there. only_keys: nothing else is wanted, so
    `layer` itself is run for those tokens alone.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        rows: Sequence[Sequence[int]],
        indices: Sequence[int],
        templates: Sequence[int],
        prefixes: Prefixes,
        only_keys: bool = False,
    ):
        self.lm, self.layer, device = lm, layer, lm.device
        self.indices = torch.tensor(indices, device=device)
        self.everyone = torch.arange(len(rows), device=device)
        # A row reads at least its token that counts, so that its key is seen.
        shared = [min(prefixes.shared(t, row), at) for t, row, at in zip(templates, rows, indices, strict=True)]
        self.shared = torch.tensor(shared, device=device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        self.calls = Calls(lm, rows)
        self.past = Past(prefixes.before, torch.tensor(templates, device=device), collect=True)
        width = prefixes.width if prefixes.before else 0
        self.earlier = torch.arange(width, device=device).expand(len(rows), -1)  # the columns of the prefixes
        self.seen = self.earlier < self.shared[:, None]

        columns, visible = spans(shared, self.lengths.tolist(), device)
        arguments = self.arguments(self.everyone, columns, visible, range(layer + 1))
        hidden = columns_of(self.calls.hidden, columns)
        below = range(layer)
        hidden = through(lm, hidden, below, arguments[:-1], self.calls.cache, self.past)
        place = self.everyone, self.indices - self.shared
        if only_keys:
            self.keys, self.values = self._keys_alone(hidden, columns, visible, arguments[-1])
            return
        shape = tuple(hidden.shape[:2])
        projection, attention = lm.projection(layer), lm.attention(layer)
        with (
            capture(projection, "input", shape=shape) as key,
            capture(projection, "output", shape=shape) as value,
            capture(attention) as attended,
        ):
            self.output = through(lm, hidden, range(layer, layer + 1), arguments[-1:], self.calls.cache, self.past)
        self.keys, self.values = key.value[place], value.value[place]
        self.into_block, self.attended = hidden[place][:, None], attended.value.reshape(*shape, -1)[place][:, None]

    def _keys_alone(
        self, hidden: Tensor, columns: Tensor, visible: Tensor, arguments: dict[str, Any]
    ) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_model"]]:
        lm, here = self.lm, range(self.layer, self.layer + 1)
        (of_token,) = self.arguments(self.everyone, columns, visible, here, queries=self.indices[:, None])
        places, shape = (self.indices - self.shared)[:, None], (len(hidden), 1)
        projection = lm.projection(self.layer)
        with capture(projection, "input", shape=shape) as key, capture(projection, "output", shape=shape) as value:
            at_columns(lm, hidden, places, self.layer, (arguments, of_token), self.calls.cache, self.past)
        return key.value[:, 0], value.value[:, 0]

    def arguments(
        self, rows: Tensor, columns: Tensor, visible: Tensor, layers: range, queries: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """The arguments of `layers` for columns of rows (or `queries` among them) that attend to the prefix and to
        each other."""
        keys, seen = torch.cat([self.earlier[rows], columns], 1), torch.cat([self.seen[rows], visible], 1)
        return self.calls.at(rows, columns if queries is None else queries, keys, seen, layers)


class Replay:
    """Prompts of many edits, run again and again with a vector of each edit's own added at one token of its prompts.

    rows: token ids. indices: the token of each row at which the vector is added, at the `site` of `layer`. wanted: the
    tokens of each row, none before its index, whose logits are needed. edits: the number of each row's edit,
    ascending. templates and prefixes as in `FirstPass`.

    keys: (row, d_mlp), states at the site: (row, d_model), of the unchanged model at the indices.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        rows: Sequence[Sequence[int]],
        indices: Sequence[int],
        wanted: Sequence[Sequence[int]],
        edits: Sequence[int],
        templates: Sequence[int],
        prefixes: Prefixes,
        site: Site = "projection",
    ):
        self.lm, self.layer, self.site, device = lm, layer, site, lm.device
        with torch.no_grad():
            first = FirstPass(lm, layer, rows, indices, templates, prefixes)
            self.keys, self.values = first.keys, first.values
            self.edits = torch.tensor(edits, device=device)
            self.columns, self.visible = spans(indices, first.lengths.tolist(), device)
            self.above, self.cache = range(layer + 1, lm.n_layers), first.calls.cache
            self.output = columns_of(first.output, self.columns - first.shared[:, None])
            self.into_block, self.attended = first.into_block, first.attended
            self.states = self.values if site == "projection" else self.output[:, 0]
            self._read_between(first)
            self._arrange(first, wanted)

    def _read_between(self, first: FirstPass) -> None:
        """Keys and values, above the layer, of the tokens between the shared prefix and the changed one."""
        lm, device = self.lm, self.lm.device
        between = first.indices - first.shared
        width = int(between.max())
        some = between.nonzero()[:, 0]
        self.before: dict[int, KeyValue] = {}
        offsets = torch.arange(width, device=device).expand(len(between), -1)
        self.earlier = torch.cat([first.earlier, first.shared[:, None] + offsets], 1)
        self.seen = torch.cat([first.seen, offsets < between[:, None]], 1)
        if not len(self.above):
            return
        past = Past(first.past.before, first.past.rows[some], collect=True)
        if width:
            columns, visible = spans(first.shared[some].tolist(), first.indices[some].tolist(), device)
            arguments = first.arguments(some, columns, visible, self.above)
            hidden = columns_of(first.output[some], columns - first.shared[some, None])
            through(lm, hidden, self.above, arguments, self.cache, past)
        for layer in self.above:
            parts = [first.past.of(layer)] if layer in first.past.before else []
            if width:
                parts.append(tuple(_spread(part, some, len(between)) for part in past.collected[layer]))
            if parts:
                self.before[layer] = tuple(torch.cat(pair, 2) for pair in zip(*parts, strict=True))

    def _arrange(self, first: FirstPass, wanted: Sequence[Sequence[int]]) -> None:
        device, everyone = self.lm.device, first.everyone
        keys, visible = torch.cat([self.earlier, self.columns], 1), torch.cat([self.seen, self.visible], 1)
        self.arguments = first.calls.at(everyone, self.columns, keys, visible, self.above)
        most = max(len(tokens) for tokens in wanted)
        ends = torch.tensor([[*tokens] + [tokens[-1]] * (most - len(tokens)) for tokens in wanted], device=device)
        self.places = ends - first.indices[:, None]  # of the wanted columns among those that are run
        self.real = torch.tensor([[i < len(tokens) for i in range(most)] for tokens in wanted], device=device)
        self.last_arguments = first.calls.at(everyone, ends, keys, visible, self.above[-1:])
        at = self.columns[:, :1]
        here = range(self.layer, self.layer + 1)
        self.block_arguments = first.calls.at(everyone, at, at, torch.ones_like(at, dtype=torch.bool), here)

    def logits(self, deltas: Float[Tensor, "edit d_model"]) -> Float[Tensor, "wanted vocabulary"]:
        """Logits at the wanted tokens, row by row, each edit's delta added to its rows' states. Differentiable."""
        lm, past = self.lm, Past(self.before)
        change, output = deltas.to(self.values.dtype)[self.edits][:, None], self.output[:, :1]
        if self.site == "block":
            changed = output + change
        else:
            changed = with_value(
                lm, self.layer, change, output, self.into_block, self.attended, self.values[:, None],
                self.block_arguments[0], self.cache,
            )  # fmt: skip
        hidden = torch.cat([changed, self.output[:, 1:]], 1)
        if len(self.above):
            hidden = through(lm, hidden, self.above[:-1], self.arguments[:-1], self.cache, past)
            arguments = self.arguments[-1], self.last_arguments[0]
            hidden = at_columns(lm, hidden, self.places, self.above[-1], arguments, self.cache, past)
        else:
            hidden = columns_of(hidden, self.places)
        return to_logits(lm, hidden[self.real])

    def select(self, edits: Int[Tensor, " kept"]) -> None:
        """Go on with these edits only (ascending numbers); they are numbered anew from 0, in order."""
        number = torch.full((int(self.edits.max()) + 1,), -1, device=self.lm.device)
        number[edits] = torch.arange(len(edits), device=self.lm.device)
        rows = (number[self.edits] >= 0).nonzero()[:, 0]
        for name in ("keys", "values", "states", "output", "into_block", "attended", "places", "real"):
            setattr(self, name, getattr(self, name)[rows])
        self.edits = number[self.edits[rows]]
        self.before = {layer: (key[rows], value[rows]) for layer, (key, value) in self.before.items()}
        done: dict[int, Any] = {}
        for name in ("arguments", "last_arguments", "block_arguments"):
            setattr(self, name, [_rows_of(named, rows, done) for named in getattr(self, name)])


class WholePasses:
    """`Replay` the plain way: every pass runs all layers on all tokens of all rows. Same arguments, same numbers."""

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        rows: Sequence[Sequence[int]],
        indices: Sequence[int],
        wanted: Sequence[Sequence[int]],
        edits: Sequence[int],
        site: Site = "projection",
    ):
        self.lm = lm
        self.module = lm.projection(layer) if site == "projection" else lm.block(layer)
        self.rows, self.indices, self.wanted, self.edits = list(rows), list(indices), list(wanted), list(edits)
        self._arrange()
        keys, states = projection_pass(lm, self.batch, layer)
        if site == "block":
            with capture(self.module, stop=True) as output, torch.no_grad():
                lm.logits(self.batch, keep=1)
            states = output.value
        self.keys, self.states = keys[self.at], states[self.at]

    def _arrange(self) -> None:
        device = self.lm.device
        self.batch = pad(self.lm, self.rows)
        self.at = torch.arange(len(self.rows), device=device), self.batch.columns(self.indices)
        self.edit_of_row = torch.tensor(self.edits, device=device)
        self.keep = marked(self.wanted, self.batch.shape[1], device)

    def logits(self, deltas: Float[Tensor, "edit d_model"]) -> Float[Tensor, "wanted vocabulary"]:
        """Logits at the wanted tokens, row by row, each edit's delta added to its rows' states. Differentiable."""

        def add(values: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
            return values.index_put(self.at, deltas.to(values.dtype)[self.edit_of_row], accumulate=True)

        with replace(self.module, add, shape=self.batch.shape):
            return self.lm.logits(self.batch, keep=self.keep)

    def select(self, edits: Int[Tensor, " kept"]) -> None:
        """Go on with these edits only (ascending numbers); they are numbered anew from 0, in order."""
        number = {old: new for new, old in enumerate(edits.tolist())}
        rows = [row for row, edit in enumerate(self.edits) if edit in number]
        self.keys, self.states = self.keys[rows], self.states[rows]
        self.rows, self.indices, self.wanted = (
            [whole[row] for row in rows] for whole in (self.rows, self.indices, self.wanted)
        )
        self.edits = [number[self.edits[row]] for row in rows]
        self._arrange()


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


def _disagreement(lm: LanguageModel) -> str:
    """What keeps a model from being replayed, "" if nothing does."""
    n_tokens = min(12, lm.max_length)
    tokens = torch.arange(7, 7 + n_tokens).remainder(lm.model.get_input_embeddings().weight.shape[0]).tolist()
    rows, indices = [tokens, tokens[: n_tokens // 2]], [n_tokens // 2, 0]
    wanted = [range(n_tokens // 2, n_tokens), range(n_tokens // 2)]
    layer = (lm.n_layers - 1) // 2
    with torch.no_grad():
        plain = WholePasses(lm, layer, rows, indices, wanted, [0, 1])
        deltas = plain.states.flip(1) * 0.5
        expected = plain.logits(deltas).float()
        try:
            prefixes = Prefixes.of_rows(lm, [tokens[:3]])
            found = Replay(lm, layer, rows, indices, wanted, [0, 1], [0, 0], prefixes).logits(deltas).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a block that wants to be called in another way may raise
            return f"{type(error).__name__}: {error}"
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return "not the same logits are finite"
    finite = expected.isfinite()  # a model that an edit broke may have few or none
    error = ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item() if finite.any() else 0.0
    allowed = 100 * torch.finfo(lm.dtype).eps ** (0.5 if lm.dtype == torch.float64 else 0.9)
    return "" if error <= allowed else f"logits differ by {error:.1e} of the largest"


def _spread(part: Tensor, rows: Int[Tensor, " some"], n_rows: int) -> Tensor:
    """`part`, which has some rows only, with zeros for the others: they are never seen, but must be numbers."""
    return part.new_zeros(n_rows, *part.shape[1:]).index_copy(0, rows, part)


def _rows_of(named: dict[str, Any], rows: Tensor, done: dict[int, Any]) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if not isinstance(value, (Tensor, tuple)):
            return value
        if id(value) not in done:
            done[id(value)] = tuple(part[rows] for part in value) if isinstance(value, tuple) else value[rows]
        return done[id(value)]

    return {name: cut(value) for name, value in named.items()}
