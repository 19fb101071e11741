"""What many prompts begin with, read once; each prompt is then read on from there."""

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit.models.blocks import KeyValue, Part, Past, reading
from nbkit.models.language_model import LanguageModel
from nbkit.models.rows import EditedRows


class Prefixes:
    """Texts that prompts may begin with, as rows of tokens: their keys and values in every layer.

    They hold for the weights of that moment; `edit_sequence` makes them anew for each edit. Every prompt may share as
    many of a prefix's tokens as its own row begins with (`shared`): at the seam a tokenizer may merge differently.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]):
        self.lm, self.rows = lm, [list(row) for row in rows]
        self.width = max(len(row) for row in self.rows)
        self.before: dict[int, KeyValue] = {}
        if self.width:
            filled = [row or [lm.tokenizer.pad_token_id] for row in self.rows]  # nobody shares what an empty one has
            reading(lm, filled).through(range(lm.n_layers), collected=self.before)

    @classmethod
    def of_templates(cls, lm: LanguageModel, context_templates: Sequence[str]) -> "Prefixes":
        """The context templates' own texts, one a template."""
        texts = [template.split("{}")[0] for template in context_templates]
        return cls(lm, [lm.tokenizer(text, verbose=False).input_ids[: lm.max_length] for text in texts])

    def shared(self, template: int, row: Sequence[int]) -> int:
        """How many tokens `row` begins with that prefix `template` begins with too."""
        return len(os.path.commonprefix([self.rows[template], list(row)]))

    @torch.no_grad()
    def read_on(
        self, rows: EditedRows, layers: range
    ) -> tuple[Part, Int[Tensor, "row 1"], Float[Tensor, "row column d_model"]]:
        """Each row read through `layers`, from 0 on, from the token on where its prefix ends.

        Returns the columns that were read, which of them is the row's token that counts, and the residual stream.
        """
        device = self.lm.device
        # A row reads at least its token that counts, so that its key is seen.
        of_rows = zip(rows.templates, rows.tokens, rows.indices, strict=True)
        starts = [min(self.shared(template, row), index) for template, row, index in of_rows]
        start, index, template = (torch.tensor(x, device=device) for x in (starts, rows.indices, rows.templates))
        earlier = torch.arange(self.width, device=device).expand(len(starts), -1)
        part = reading(self.lm, rows.tokens, starts, Past(earlier, earlier < start[:, None], self.before, template))
        return part, (index - start)[:, None], part.through(layers)
