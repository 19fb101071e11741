"""Rows of tokens as padded tensors, and columns of them.

A token's *index* counts from the start of its own row, BOS included and padding not; its *column* is its place in the
padded tensor. Where rows are padded on the right the two are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
