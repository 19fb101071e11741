"""What the encoder-decoder is trained on: windows with spans masked for the encoder, which the decoder writes whole.

    read, asked = masked(windows, mask, end, rng)

The objective is BART's (Lewis et al. 2020, text infilling): `NOISE` of the tokens are cut out, in spans of `MEAN_SPAN`
on average drawn as T5 draws its own, one mask stands for each span, and the decoder is asked for every token. T5's own
objective asks for the spans alone: in 10,000 steps of this size the decoder then learnt which words are frequent, and
not to look at what the encoder had read. Asked for everything, it learns first to copy, and so where to look.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

NOISE = 0.3  # of a window's tokens
MEAN_SPAN = 3  # tokens
SENTINELS = tuple(f"<extra_id_{number}>" for number in reversed(range(100)))  # T5's, in the order of its vocabulary
MASK = SENTINELS[-1]  # the one that is used here


def masked(
    windows: Int[Tensor, "batch window"], mask: int, end: int, rng: np.random.Generator
) -> tuple[Int[Tensor, "batch read"], Int[Tensor, "batch asked"]]:
    """What the encoder reads of each window, and what the decoder is asked for; both close with `end`.

    Every window has as many spans, and loses as many tokens.
    """
    length = windows.shape[1]
    n_cut = max(1, round(length * NOISE))
    n_spans = max(1, round(n_cut / MEAN_SPAN))
    read = []
    for row in windows.cpu().numpy():
        kept, cut = composition(rng, length - n_cut, n_spans), composition(rng, n_cut, n_spans)
        is_cut = np.repeat([False, True] * n_spans, np.stack([kept, cut], axis=1).ravel())
        read.append([*np.insert(row[~is_cut], np.cumsum(kept), mask), end])
    asked = torch.nn.functional.pad(windows, (0, 1), value=end)
    return torch.tensor(read, device=windows.device), asked


def composition(rng: np.random.Generator, total: int, parts: int) -> Int[np.ndarray, " parts"]:
    """`total` as a sum of so many positive numbers, each way of it as likely as any other."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
