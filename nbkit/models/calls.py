"""How a model calls its blocks: what it gives them is noted, and what lies below or above them is left out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nbkit.edits.interrupts import Guarded
from nbkit.models.hooks import capture, instead
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.models.rows import Batch

CACHES = ("past_key_values", "layer_past")  # what blocks call the argument that holds earlier keys and values


class Handed(SimpleNamespace):
    """What a block that is called by itself is given in place of transformers' cache: its `update`, if attention runs.

    A hook knows by it that the masks among the block's arguments were made earlier, in a pass through the whole model,
    and changed then if they are to be changed (models/interventions.py).
    """


class Calls:
    """How the model calls its blocks on some rows of tokens: what goes into the first block, and all other arguments.

    hidden: (row, position, d_model). arguments: one dict a layer. Rows are padded on the right, so that a token's
    index and its column are the same, and by at least one, so that the model always makes a mask.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]):
        self.lm = lm
        self.arguments: list[dict[str, Any]] = []
        with _blocks_say(lm, self._note), capture(lm.block(lm.n_layers - 1), stop=True) as last:
            lm.logits(pad(lm, rows, spare=1), keep=1)
        self.hidden = last.value
        self.cache = next(name for name in CACHES if name in self.arguments[0])

    def _note(self, block: nn.Module, *args, **kwargs) -> Tensor:
        named = arguments_of(block, args, kwargs)
        self.arguments.append({k: v for k, v in named.items() if k not in ("self", "kwargs", "hidden_states")})
        return named["hidden_states"]

    def block(
        self, layer: int, hidden: Tensor, arguments: Mapping[str, Any], update: Callable[..., Any] | None = None
    ) -> Tensor:
        """The residual stream after one block.

        arguments: this layer's, cut to the columns that `hidden` is of. update: is told, as transformers' cache, what
        keys and values its attention made, and gives those that it reads; None where attention does not run.
        """
        output = self.lm.block(layer)(hidden, **{**arguments, self.cache: Handed(update=update)})
        return output[0] if isinstance(output, tuple) else output


def arguments_of(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a block is called with, by the names that its own code has for it."""
    bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def to_logits(lm: LanguageModel, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """What the model makes of the residual stream above its last block: its norm, head and whatever else it does."""
    # What is embedded does not matter. Token ids would: models look for padding among them, and a GPU waits for that.
    width = lm.model.get_input_embeddings().weight.shape[1]
    blank = torch.zeros(len(hidden), 1, width, dtype=hidden.dtype, device=lm.device)
    positions = torch.zeros(len(hidden), 1, dtype=torch.long, device=lm.device)
    with _blocks_say(lm, lambda *_args, **_kwargs: hidden[:, None]):
        return lm.model(inputs_embeds=blank, position_ids=positions, use_cache=False).logits[:, 0]


def _blocks_say(lm: LanguageModel, fn: Callable[..., Tensor]) -> Guarded:
    """No block runs; the residual stream after it is `fn(block, *args, **kwargs)`."""

    def said(block: nn.Module, *args, **kwargs):
        hidden = fn(block, *args, **kwargs)
        return (hidden, None) if lm.architecture.block_gives_tuple else hidden

    return instead(list(lm.model.get_submodule(lm.architecture.blocks)), said)


@torch.no_grad()
def projection_pass(
    lm: LanguageModel, batch: Batch, layer: int
) -> tuple[Float[Tensor, "row position d_mlp"], Float[Tensor, "row position d_model"]]:
    """One forward pass up to the projection of `layer`: its input and its output everywhere, padding included."""
    projection = lm.projection(layer)
    with capture(projection, "input", shape=batch.shape) as key:
        with capture(projection, "output", shape=batch.shape, stop=True) as value:
            lm.read(batch)
    return key.value, value.value
