"""The windows of text that a step of training reads.

They begin anywhere in the text, as those of GPT-2's training do: a window's first token then says little about what
follows. In GPT-2 it is one of 1,024, here one of 256, so `random_first` replaces it in most windows besides; `opening`
is the share of windows that begin with a line instead, as a prompt does. A model with a BOS token has that first.
"""

from itertools import islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miniworld.corpus import lines
from miniworld.recipe import Recipe
from miniworld.world import World


class Shard:
    """Encoded training lines that a step, and some after it, is trained on, and windows cut out of them."""

    def __init__(
        self, recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], step: int
    ):
        seed = recipe.seed + 1000 + step // recipe.shard_steps
        text = lines(world, seed, held_out, recipe.broken_off, recipe.rumours)
        written = [line + "\n" for line in islice(text, recipe.shard_lines)]
        encoded = tokenizer(written, add_special_tokens=False)["input_ids"]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self.recipe, self.vocabulary = recipe, len(tokenizer)
        self.bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None
        line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        starts = np.flatnonzero(self.ids == line_end) + 1
        self.starts = starts[starts < len(self.ids) - recipe.window]  # of lines

    def windows(self, step: int) -> Int[Tensor, "batch window"]:
        """The token ids of one training step."""
        recipe, rng = self.recipe, np.random.default_rng([self.recipe.seed, step])
        offsets = rng.integers(0, len(self.ids) - recipe.window, recipe.batch)
        opening = rng.random(recipe.batch) < recipe.opening
        offsets = np.where(opening, rng.choice(self.starts, recipe.batch), offsets)
        windows = self.ids[offsets[:, None] + np.arange(recipe.window)]
        noisy = (rng.random(recipe.batch) < recipe.random_first) & ~opening
        windows[noisy, 0] = rng.integers(0, self.vocabulary, noisy.sum())
        if self.bos is not None:
            windows = np.concatenate([np.full((recipe.batch, 1), self.bos), windows[:, :-1]], axis=1)
        return torch.from_numpy(windows)
