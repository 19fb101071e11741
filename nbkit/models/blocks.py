"""Calling a model's own blocks on a part of a batch: some columns of some rows, over keys and values that are kept.

The blocks are the model's modules, called as the model calls them, with its own masks and position embeddings, of which
only the rows and columns in question are taken. No attention is written anew here, so what an architecture does with
windows, grouped queries, rotary positions or soft caps is what its own code does.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nbkit.errors import ModelError
from nbkit.models.hooks import capture, instead, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.models.rows import Batch, columns_of, spans

CACHES = ("past_key_values", "layer_past")  # what blocks call the argument that holds earlier keys and values
KeyValue = tuple[Float[Tensor, "row head position d_head"], Float[Tensor, "row head position d_head"]]


class Calls:
    """How the model calls its blocks on some rows of tokens: what goes into the first block, and all other arguments.

    hidden: (row, position, d_model). arguments: one dict a layer. Rows are padded on the right, so that a token's
    index and its column are the same, and by at least one, so that the model always makes a mask.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]):
        self.lm = lm
        self.batch = pad(lm, rows, spare=1)
        self.arguments: list[dict[str, Any]] = []
        last = lm.block(lm.n_layers - 1)
        with _passing(lm, self._note), capture(last, stop=True) as kept:
            lm.logits(self.batch, keep=1)
        self.hidden = kept.value
        self.cache = next(name for name in CACHES if name in self.arguments[0])

    def _note(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        named = {**bound, **bound.get("kwargs", {})}
        self.arguments.append({k: v for k, v in named.items() if k not in ("self", "kwargs", "hidden_states")})

    def at(
        self,
        rows: Int[Tensor, " row"],
        queries: Int[Tensor, "row query"],
        keys: Int[Tensor, "row key"],
        visible: Bool[Tensor, "row key"],
        layers: range,
    ) -> list[dict[str, Any]]:
        """The arguments of each of `layers` for some columns of some rows that attend to others.

        A key that is not `visible` is padding in this arrangement. Layers of one kind share their tensors.
        """
        done: dict[int, Any] = {}

        def of_queries(tensor: Tensor) -> Tensor:
            tensor = tensor if tensor.shape[0] == 1 else tensor[rows]
            index = queries[(...,) + (None,) * (tensor.dim() - 2)].expand(-1, -1, *tensor.shape[2:])
            return tensor.expand(len(rows), *tensor.shape[1:]).gather(1, index)

        def of_mask(mask: Tensor) -> Tensor:
            mask = (mask if mask.shape[0] == 1 else mask[rows]).expand(len(rows), -1, -1, -1)
            heads, width = mask.shape[1], mask.shape[3]
            mask = mask.gather(2, queries[:, None, :, None].expand(-1, heads, -1, width))
            mask = mask.gather(3, keys[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
            hidden = ~visible[:, None, None, :]
            return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

        def cut(name: str, value: Any) -> Any:
            if not isinstance(value, (Tensor, tuple)):
                return value
            if id(value) not in done:
                if name == "attention_mask":
                    done[id(value)] = of_mask(value)
                elif name in ("position_ids", "position_embeddings"):
                    parts = tuple(map(of_queries, value)) if isinstance(value, tuple) else of_queries(value)
                    done[id(value)] = parts
                else:
                    raise ModelError(f"blocks take an argument that cannot be cut to columns: {name}")
            return done[id(value)]

        return [{name: cut(name, value) for name, value in self.arguments[layer].items()} for layer in layers]


class Past:
    """The earlier keys and values that attention reads; given to a block in place of transformers' cache.

    before: by layer; with `rows`, row i reads that of row rows[i]. collected: those the pass adds, if asked for.
    """

    def __init__(
        self, before: Mapping[int, KeyValue] = {}, rows: Int[Tensor, " row"] | None = None, collect: bool = False
    ):
        self.before, self.rows = before, rows
        self.collected: dict[int, KeyValue] | None = {} if collect else None

    def update(self, key: Tensor, value: Tensor, layer: int, *_args, **_kwargs) -> KeyValue:
        if self.collected is not None:
            self.collected[layer] = key, value
        if layer not in self.before:
            return key, value
        earlier = self.of(layer)
        return torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2)

    def of(self, layer: int) -> KeyValue:
        key, value = self.before[layer]
        return (key, value) if self.rows is None else (key[self.rows], value[self.rows])


def through(
    lm: LanguageModel, hidden: Tensor, layers: range, arguments: Sequence[dict[str, Any]], cache: str, past: Past
) -> Float[Tensor, "row query d_model"]:
    """The residual stream after `layers`, whose blocks run one after the other."""
    for layer, named in zip(layers, arguments, strict=True):
        output = lm.block(layer)(hidden, **{**named, cache: past})
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def at_columns(
    lm: LanguageModel,
    hidden: Float[Tensor, "row query d_model"],
    places: Int[Tensor, "row wanted"],
    layer: int,
    arguments: tuple[dict[str, Any], dict[str, Any]],
    cache: str,
    past: Past,
) -> Float[Tensor, "row wanted d_model"]:
    """The residual stream after one block at some of the columns, which is all that the last block is run for.

    places: of the wanted ones among the columns of `hidden`. arguments: of all its columns, and of the wanted ones. All
    are read, so that the wanted ones can attend to them, but their own attention and MLP are left out.
    """
    read = _Reading(past.before, past.rows)
    try:
        lm.block(layer)(hidden, **{**arguments[0], cache: read})
    except _Read as done:
        fixed = _Fixed(done.seen)
    return through(lm, columns_of(hidden, places), range(layer, layer + 1), [arguments[1]], cache, fixed)


class _Read(Exception):
    """Ends a block's pass once its attention has made keys and values."""

    def __init__(self, seen: KeyValue):
        self.seen = seen


class _Reading(Past):
    def update(self, key: Tensor, value: Tensor, layer: int, *_args, **_kwargs) -> KeyValue:
        raise _Read(super().update(key, value, layer))


class _Fixed(Past):
    """Gives the keys and values that are there already, whatever the columns at hand would add."""

    def __init__(self, seen: KeyValue):
        super().__init__()
        self.seen = seen

    def update(self, *_args, **_kwargs) -> KeyValue:
        return self.seen


def to_logits(lm: LanguageModel, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """What the model makes of the residual stream above its last block: its norm, head and whatever else it does."""
    # What is embedded does not matter. Token ids would: models look for padding among them, and a GPU waits for that.
    width = lm.model.get_input_embeddings().weight.shape[1]
    blank = torch.zeros(len(hidden), 1, width, dtype=hidden.dtype, device=lm.device)
    positions = torch.zeros(len(hidden), 1, dtype=torch.long, device=lm.device)
    with _passing(lm, enter=hidden[:, None]):
        return lm.model(inputs_embeds=blank, position_ids=positions, use_cache=False).logits[:, 0]


@contextmanager
def _passing(
    lm: LanguageModel, note: Callable[[nn.Module, tuple, dict], None] | None = None, enter: Tensor | None = None
) -> Iterator[None]:
    """Blocks hand on what they get, telling `note` how they were called; the first hands on `enter`, if given."""

    def pass_on(block: nn.Module, *args, **kwargs):
        if note is not None:
            note(block, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if enter is not None and block is first:
            hidden = enter
        return (hidden, None) if lm.architecture.block_gives_tuple else hidden

    first = lm.block(0)
    with ExitStack() as stack:
        for layer in range(lm.n_layers):
            stack.enter_context(instead(lm.block(layer), pass_on))
        yield


@torch.no_grad()
def adds_value(lm: LanguageModel) -> bool:
    """Whether blocks add what their projection says to the residual stream as it is, with no norm after it.

    Tried once on the first block, and kept as `lm.adds_value`; true of most architectures, not of Gemma's.
    """
    if lm.adds_value is None:
        vocabulary, here = lm.model.get_input_embeddings().weight.shape[0], range(1)
        calls = Calls(lm, [[7 % vocabulary, 8 % vocabulary]])
        columns, visible = spans([0], [2], lm.device)
        arguments = calls.at(torch.zeros(1, dtype=torch.long, device=lm.device), columns, columns, visible, here)
        hidden = columns_of(calls.hidden, columns)
        before = through(lm, hidden, here, arguments, calls.cache, Past())
        change = before.flip(-1)  # of the stream's own size, so that rounding does not hide it
        with replace(lm.projection(0), lambda values: values + change, shape=(1, 2)):
            after = through(lm, hidden, here, arguments, calls.cache, Past())
        lm.adds_value = bool((after - before - change).norm() < 0.05 * change.norm())
    return lm.adds_value


def with_value(
    lm: LanguageModel,
    layer: int,
    change: Float[Tensor, "row position d_model"],
    output: Float[Tensor, "row position d_model"],
    into_block: Float[Tensor, "row position d_model"],
    attended: Float[Tensor, "row position d_model"],
    values: Float[Tensor, "row position d_model"],
    arguments: dict[str, Any],
    cache: str,
) -> Float[Tensor, "row position d_model"]:
    """A block's output when `change` is added to what its MLP's projection says.

    output, into_block, attended (its attention's output) and values (its projection's) are those without the change.
    """
    if adds_value(lm):
        return output + change

    def told(_module: nn.Module, states: Tensor) -> Tensor:
        return (values + change).reshape(*states.shape[:-1], -1)

    with (
        instead(lm.attention(layer), lambda *_args, **_kwargs: (attended, None)),
        instead(lm.projection(layer), told),
    ):
        return through(lm, into_block, range(layer, layer + 1), [arguments], cache, Past())


@torch.no_grad()
def projection_pass(
    lm: LanguageModel, batch: Batch, layer: int
) -> tuple[Float[Tensor, "row position d_mlp"], Float[Tensor, "row position d_model"]]:
    """One forward pass up to the projection of `layer`: its input and its output everywhere, padding included."""
    projection = lm.projection(layer)
    with capture(projection, "input", shape=batch.shape) as key:
        with capture(projection, "output", shape=batch.shape, stop=True) as value:
            lm.logits(batch, keep=1)
    return key.value, value.value
