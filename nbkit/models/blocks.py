"""Calling a model's own blocks on a part of a batch: some columns of some rows, over keys and values that are kept.

The blocks are the model's modules, called as the model calls them, with its own masks and position embeddings, of which
only the rows and columns in question are taken. No attention is written anew here, so what an architecture does with
windows, grouped queries, rotary positions or soft caps is what its own code does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nbkit.errors import ModelError
from nbkit.models.calls import Calls
from nbkit.models.hooks import capture, instead, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.rows import columns_of, spans

KeyValue = tuple[Float[Tensor, "row head position d_head"], Float[Tensor, "row head position d_head"]]


@dataclass(frozen=True)
class Past:
    """Tokens that were read earlier: their columns, which of them a row attends to, and keys and values by layer.

    With `owners`, row i reads the keys and values of row owners[i].
    """

    columns: Int[Tensor, "row earlier"]
    visible: Bool[Tensor, "row earlier"]
    before: Mapping[int, KeyValue]
    owners: Int[Tensor, " row"] | None = None

    def of(self, rows: Int[Tensor, " some"]) -> "Past":
        """The same of some rows."""
        columns, visible = self.columns[rows], self.visible[rows]
        if self.owners is not None:
            return Past(columns, visible, self.before, self.owners[rows])
        return Past(columns, visible, {layer: (key[rows], value[rows]) for layer, (key, value) in self.before.items()})

    def followed_by(self, layer: int, *later: KeyValue) -> KeyValue:
        """Keys and values of one layer, with those of tokens that follow."""
        pairs = list(later)
        if layer in self.before:
            key, value = self.before[layer]
            pairs.insert(0, (key, value) if self.owners is None else (key[self.owners], value[self.owners]))
        return pairs[0] if len(pairs) == 1 else tuple(torch.cat(parts, 2) for parts in zip(*pairs, strict=True))


class Part:
    """Some columns of some rows, to be run through blocks: they attend to the past and, causally, to each other.

    columns: (row, column), those that are not `visible` being filler. rows: which rows of `calls`; None: all.
    """

    def __init__(
        self,
        calls: Calls,
        columns: Int[Tensor, "row column"],
        visible: Bool[Tensor, "row column"],
        past: Past | None = None,
        rows: Int[Tensor, " row"] | None = None,
    ):
        self.calls, self.columns, self.visible, self.past, self.rows = calls, columns, visible, past, rows
        self.queries = columns  # those that attend, and go on
        self._cut: dict[int, Any] = {}  # arguments; layers of one kind share theirs

    def of(self, rows: Int[Tensor, " some"]) -> "Part":
        """The same of some rows."""
        past, own = self.past and self.past.of(rows), rows if self.rows is None else self.rows[rows]
        return Part(self.calls, self.columns[rows], self.visible[rows], past, own)

    def through(
        self, layers: range, hidden: Tensor | None = None, collected: dict[int, KeyValue] | None = None
    ) -> Float[Tensor, "row column d_model"]:
        """The residual stream after `layers`, whose blocks run one after the other.

        hidden: what goes into them; None: what goes into the model's first. collected: takes the keys and values that
        they make, by layer.
        """
        hidden = columns_of(self._of_rows(self.calls.hidden), self.columns) if hidden is None else hidden
        for layer in layers:
            hidden = self.block(layer, hidden, collected)
        return hidden

    def block(
        self, layer: int, hidden: Float[Tensor, "row column d_model"], collected: dict[int, KeyValue] | None = None
    ) -> Float[Tensor, "row query d_model"]:
        """The residual stream after one block; arguments as in `through`."""

        def update(key: Tensor, value: Tensor, *_args, **_kwargs) -> KeyValue:
            if collected is not None:
                collected[layer] = key, value
            return self._seen(layer, key, value)

        return self._run(layer, hidden, update)

    def watched(self, layer: int, hidden: Float[Tensor, "row column d_model"]) -> "BlockPass":
        """`block`, and what passes inside it."""
        lm, shape = self.calls.lm, tuple(self.queries.shape)
        with (
            capture(lm.block(layer), "input") as into_block,
            capture(lm.attention(layer)) as attended,
            capture(lm.projection(layer), "input", shape=shape) as key,
            capture(lm.projection(layer), "output", shape=shape) as value,
        ):
            output = self.block(layer, hidden)
        return BlockPass(into_block.value, attended.value.reshape(*shape, -1), key.value, value.value, output)

    def _run(self, layer: int, hidden: Tensor, update: Callable[..., KeyValue]) -> Tensor:
        """One block. Its attention tells `update`, as transformers' cache, what keys and values it made, and reads
        those that it gives."""
        arguments = {name: self._argument(name, value) for name, value in self.calls.arguments[layer].items()}
        return self.calls.block(layer, hidden, arguments, update)

    def _seen(self, layer: int, *made: Tensor) -> KeyValue:
        return self.past.followed_by(layer, made) if self.past else made

    def _argument(self, name: str, value: Any) -> Any:
        if not isinstance(value, (Tensor, tuple)):
            return value
        if id(value) not in self._cut:
            if name == "attention_mask":
                cut = self._mask(value)
            elif name in ("position_ids", "position_embeddings"):
                cut = tuple(map(self._positions, value)) if isinstance(value, tuple) else self._positions(value)
            else:
                raise ModelError(f"blocks take an argument that cannot be cut to columns: {name}")
            self._cut[id(value)] = cut
        return self._cut[id(value)]

    def _positions(self, tensor: Tensor) -> Tensor:
        index = self.queries[(...,) + (None,) * (tensor.dim() - 2)].expand(-1, -1, *tensor.shape[2:])
        return self._of_rows(tensor).gather(1, index)

    def _mask(self, mask: Tensor) -> Tensor:
        keys, visible = self.columns, self.visible
        if self.past:
            keys, visible = torch.cat([self.past.columns, keys], 1), torch.cat([self.past.visible, visible], 1)
        mask = self._of_rows(mask)
        heads, width = mask.shape[1], mask.shape[3]
        mask = mask.gather(2, self.queries[:, None, :, None].expand(-1, heads, -1, width))
        mask = mask.gather(3, keys[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
        hidden = ~visible[:, None, None, :]
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def _of_rows(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] == 1:
            return tensor.expand(len(self.columns), *tensor.shape[1:])
        return tensor if self.rows is None else tensor[self.rows]


def reading(
    lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None, past: Past | None = None
) -> Part:
    """Rows of tokens, whole, or each from the token of index starts[row] on."""
    columns, visible = spans(starts or [0] * len(rows), [len(row) for row in rows], lm.device)
    return Part(Calls(lm, rows), columns, visible, past)


class Wanted(Part):
    """Some of a part's columns, which are all that the last block is run for.

    places: (row, query), among the columns. Of the others keys and values are made, so that these can attend to them;
    their own attention and MLP are left out.
    """

    def __init__(self, part: Part, places: Int[Tensor, "row query"]):
        super().__init__(part.calls, part.columns, part.visible, part.past, part.rows)
        self.part, self.places, self.queries = part, places, part.columns.gather(1, places)

    def through(self, layers: range, hidden: Float[Tensor, "row column d_model"]) -> Float[Tensor, "row query d_model"]:
        """The residual stream at the wanted columns after `layers`."""
        if not layers:
            return columns_of(hidden, self.places)
        return self.block(layers[-1], self.part.through(layers[:-1], hidden))

    def block(self, layer: int, hidden: Float[Tensor, "row column d_model"]) -> Float[Tensor, "row query d_model"]:
        """The residual stream at the wanted columns after one block."""

        def stop(key: Tensor, value: Tensor, *_args, **_kwargs) -> KeyValue:
            raise _KeysAndValues(self._seen(layer, key, value))

        try:
            self.part._run(layer, hidden, stop)
        except _KeysAndValues as made:
            (seen,) = made.args
        return self._run(layer, columns_of(hidden, self.places), lambda *_args, **_kwargs: seen)


class _KeysAndValues(Exception):
    """Ends a block's pass once its attention has made them."""


@dataclass(frozen=True)
class BlockPass:
    """What one block was given, and what it and its parts made of that: each (row, position, d).

    attended: its attention's output. keys and values: its projection's input and output.
    """

    into_block: Float[Tensor, "row position d_model"]
    attended: Float[Tensor, "row position d_model"]
    keys: Float[Tensor, "row position d_mlp"]
    values: Float[Tensor, "row position d_model"]
    output: Float[Tensor, "row position d_model"]

    def of(self, rows: Int[Tensor, " some"]) -> "BlockPass":
        """The same of some rows."""
        return BlockPass(*(tensor[rows] for tensor in vars(self).values()))

    def at(self, places: Int[Tensor, "row some"]) -> "BlockPass":
        """The same at some positions of each row."""
        return BlockPass(*(columns_of(tensor, places) for tensor in vars(self).values()))


def with_value(
    calls: Calls, layer: int, block: BlockPass, change: Float[Tensor, "row position d_model"]
) -> Float[Tensor, "row position d_model"]:
    """The block's output when `change` is added to what its MLP's projection says."""
    lm = calls.lm
    if adds_value(lm):
        return block.output + change

    def told(_module: nn.Module, states: Tensor) -> Tensor:
        return (block.values + change).reshape(*states.shape[:-1], -1)

    with (
        instead(lm.attention(layer), lambda *_args, **_kwargs: (block.attended, None)),
        instead(lm.projection(layer), told),
    ):  # the other arguments are attention's
        return calls.block(layer, block.into_block, calls.arguments[layer])


@torch.no_grad()
def adds_value(lm: LanguageModel) -> bool:
    """Whether blocks add what their projection says to the residual stream as it is, with no norm after it.

    Tried once on the first block, and kept as `lm.adds_value`; true of most architectures, not of Gemma's.
    """
    if lm.adds_value is None:
        vocabulary = lm.model.get_input_embeddings().weight.shape[0]
        part = reading(lm, [[7 % vocabulary, 8 % vocabulary]])
        before = part.through(range(1))
        change = before.flip(-1)  # of the stream's own size, so that rounding does not hide it
        with replace(lm.projection(0), lambda values: values + change, shape=(1, 2)):
            after = part.through(range(1))
        lm.adds_value = bool((after - before - change).norm() < 0.05 * change.norm())
    return lm.adds_value
