"""Rows of tokens as padded tensors, and columns of them.

A token's *index* counts from the start of its own row, BOS included and padding not; its *column* is its place in the
padded tensor. Where rows are padded on the right the two are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens padded to one width, on the model's device. Position ids count each row's own tokens from 0."""

    input_ids: Int[Tensor, "row position"]
    attention_mask: Int[Tensor, "row position"]
    position_ids: Int[Tensor, "row position"]
    starts: Int[Tensor, " row"]  # the column of each row's first token
    lengths: Int[Tensor, " row"]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.input_ids.shape)

    def columns(self, indices: Sequence[int] | Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Columns of the given token indices, one a row."""
        return self.starts + torch.as_tensor(indices, device=self.starts.device)


@dataclass(frozen=True)
class AskedRows:
    """Rows of tokens, and the tokens of each whose logits are wanted."""

    tokens: Sequence[Sequence[int]]
    wanted: Sequence[Sequence[int]]


@dataclass(frozen=True)
class EditedRows:
    """Rows of tokens of many edits, each with a token that counts: where the edit changes something, or a key is read.

    tokens: token ids. indices: of each row's token that counts. templates: the number of the prefix that each begins
    with. wanted: the tokens of each row, none before the one that counts, whose logits are asked for. edits: the number
    of each row's edit, ascending from 0.
    """

    tokens: Sequence[Sequence[int]]
    indices: Sequence[int]
    templates: Sequence[int]
    wanted: Sequence[Sequence[int]] = ()
    edits: Sequence[int] = ()

    def of(self, edits: Sequence[int]) -> tuple["EditedRows", list[int]]:
        """The rows of these edits, which are numbered anew from 0, in order; and which rows these are."""
        number = {old: new for new, old in enumerate(edits)}
        kept = [row for row, edit in enumerate(self.edits) if edit in number]
        parts = {part.name: [getattr(self, part.name)[row] for row in kept] for part in fields(self)}
        return EditedRows(**{**parts, "edits": [number[edit] for edit in parts["edits"]]}), kept


def spans(starts: Sequence[int], ends: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns starts..ends-1 of each row, filled up with its last one, and which of them are not filler."""
    start, end = torch.tensor(starts, device=device)[:, None], torch.tensor(ends, device=device)[:, None]
    columns = start + torch.arange(int((end - start).max()), device=device)
    return columns.minimum(end - 1), columns < end


def columns_of(
    tensor: Float[Tensor, "row position d"], columns: Int[Tensor, "row query"]
) -> Float[Tensor, "row query d"]:
    return tensor.gather(1, columns[..., None].expand(-1, -1, tensor.shape[-1]))


def marked(tokens: Sequence[Sequence[int]], width: int, device: torch.device) -> Bool[Tensor, "row position"]:
    """Where the given tokens of each row are; rows are padded on the right, so index and column are the same."""
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, of_row in enumerate(tokens):
        mask[row, list(of_row)] = True
    return mask.to(device)


def filled(lists: Sequence[Sequence[int]], width: int = 0) -> tuple[Int[Tensor, "row n"], Bool[Tensor, "row n"]]:
    """Lists of unlike length as one tensor, at least so wide, and what of it is not filler. Filler is 0."""
    width = max(width, *map(len, lists))
    numbers = torch.tensor([[*one] + [0] * (width - len(one)) for one in lists])
    return numbers, torch.arange(width) < torch.tensor([len(one) for one in lists])[:, None]
