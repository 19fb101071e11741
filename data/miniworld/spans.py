"""What T5 is trained on: windows with spans cut out, for the encoder to read and the decoder to fill in.

    read, asked = without_spans(windows, vocabulary, end, rng)

As in T5 (Raffel et al. 2020, section 3.1.4): `NOISE` of the tokens are cut out, in spans of `MEAN_SPAN` on average.
The encoder reads the rest, with a sentinel in the place of each span; the decoder is asked for each sentinel and what
it stands for. Sentinels are the last ids of the vocabulary, the very last being the first span's.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

NOISE = 0.15  # of a window's tokens
MEAN_SPAN = 3  # tokens
N_SENTINELS = 100
SENTINELS = tuple(f"<extra_id_{number}>" for number in reversed(range(N_SENTINELS)))  # as they follow in a vocabulary


def without_spans(
    windows: Int[Tensor, "batch window"], vocabulary: int, end: int, rng: np.random.Generator
) -> tuple[Int[Tensor, "batch read"], Int[Tensor, "batch asked"]]:
    """What the encoder reads of each window, and what the decoder is asked for; both close with `end`.

    vocabulary: its size, sentinels included. Every window has as many spans, and loses as many tokens.
    """
    length = windows.shape[1]
    n_cut = max(1, round(length * NOISE))
    n_spans = max(1, round(n_cut / MEAN_SPAN))
    if n_spans > N_SENTINELS:
        raise ValueError(f"windows of {length} tokens lose {n_spans} spans, and there are {N_SENTINELS} sentinels")
    sentinels = vocabulary - 1 - np.arange(n_spans)
    read, asked = [], []
    for row in windows.cpu().numpy():
        kept, cut = composition(rng, length - n_cut, n_spans), composition(rng, n_cut, n_spans)
        is_cut = np.repeat([False, True] * n_spans, np.stack([kept, cut], axis=1).ravel())
        read.append([*np.insert(row[~is_cut], np.cumsum(kept), sentinels), end])
        asked.append([*np.insert(row[is_cut], np.cumsum(cut) - cut, sentinels), end])
    return torch.tensor(read, device=windows.device), torch.tensor(asked, device=windows.device)


def composition(rng: np.random.Generator, total: int, parts: int) -> Int[np.ndarray, " parts"]:
    """`total` as a sum of so many positive numbers, each way of it as likely as any other."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
