"""Forward passes in which one layer's value is changed at one token of each row: what v* is optimised through.

Plain for now: every pass runs all layers on all tokens, and only the logits are limited to the positions asked for.
By causality the layers below the edit and the tokens before the subject's last one never change, so a later version
may keep those; `Replay` is the one place that would know.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.hooks import replace
from nbkit.models import LanguageModel
from nbkit.prompts import pad


class Replay:
    """Rows of tokens that are run again and again with another vector added to the value of `layer`.

    rows: token ids. indices: the token of each row whose value is changed. wanted: the tokens of each row, ascending,
    whose logits are needed.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        rows: Sequence[Sequence[int]],
        indices: Sequence[int],
        wanted: Sequence[Sequence[int]],
    ):
        self.lm = lm
        self.projection = lm.projection(layer)
        self.batch = pad(lm, rows)
        self.at = torch.arange(len(rows), device=lm.device), self.batch.columns(indices)
        self.keep = torch.zeros(self.batch.shape, dtype=torch.bool)  # (row, position)
        for row, tokens in enumerate(wanted):
            self.keep[row, list(tokens)] = True  # rows are padded on the right: index and column are the same
        self.keep = self.keep.to(lm.device)

    def logits(self, delta: Float[Tensor, " d_model"]) -> Float[Tensor, "wanted vocabulary"]:
        """Logits at the wanted tokens, row by row, `delta` added to each row's value. Differentiable in `delta`."""

        def add(values: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
            return values.index_put(self.at, delta.to(values.dtype).expand(values.shape[0], -1), accumulate=True)

        with replace(self.projection, add, shape=self.batch.shape):
            return self.lm.logits(self.batch, keep=self.keep)
