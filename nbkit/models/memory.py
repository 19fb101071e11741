"""How many edits, or edited models, fit into memory at once; and what happens when the estimate was wrong.

The estimate is a formula over the model's sizes, not a trial: see `Footprint`. On a GPU most of what is free is used,
on a CPU a small, fixed part, because more does not make it faster there. If memory runs out all the same, the batch is
halved and computed anew; nothing that was finished before is lost.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import bar

Item, Result = TypeVar("Item"), TypeVar("Result")
GPU_SHARE = 0.6  # of the free memory, which the estimate may use
CPU_SHARE, CPU_MOST = 0.25, 2**26  # bytes: a batch beyond some 64 MB is slower, its rows are more unlike in length


def free_memory(device: torch.device) -> int:
    """Bytes that could be had on the device now; on a GPU with what torch keeps cached."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def budget(device: torch.device) -> int:
    """Bytes that one batch may take."""
    free = free_memory(device)
    return int(free * GPU_SHARE) if device.type == "cuda" else int(min(free * CPU_SHARE, CPU_MOST))


@dataclass(frozen=True)
class Footprint:
    """Bytes that one row (of tokens) takes, by the formula below, with sizes in numbers and b bytes a number.

    Per token and layer that is kept for a backward pass: b (12 d_model + 4 d_mlp); without one, a single layer's.
    Per earlier token and layer, its key and value, twice (kept, and beside the new ones): 4 b d_model.
    Per token whose logits are taken: 16 vocabulary, four float32 copies.
    """

    n_tokens: int
    n_earlier: int
    n_layers: int
    n_logits: int
    backward: bool

    def bytes(self, lm: LanguageModel) -> int:
        b = lm.dtype.itemsize
        kept = self.n_layers if self.backward else 1
        per_token = b * (12 * lm.d_model + 4 * lm.d_mlp) * max(kept, 1)
        earlier = 4 * b * lm.d_model * self.n_layers * self.n_earlier
        return self.n_tokens * per_token + earlier + 16 * self.n_logits * lm.config.vocab_size


def in_batches(items: Sequence[Item], size: int, compute: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
    """`compute` on batches of at most `size` items, in order.

    Out of memory, the batch is halved, with a warning, and batches stay so.
    """
    start, size = 0, max(1, size)
    while start < len(items):
        batch = items[start : start + size]
        try:
            result = compute(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
            size = len(batch) // 2
        else:
            yield result
            start += len(batch)
            continue
        # Outside the except block, where the traceback no longer keeps the failed batch's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with batches of {size}", stacklevel=2)


def by_cost(
    costs: Sequence,
    size: int,
    compute: Callable[[list[int]], Result],
    name: str = "batches",
    unit: str = "item",
    progress: bool = False,
    delay: float | None = None,
) -> Iterator[tuple[list[int], Result]]:
    """`compute` on the places of all items, those of like cost together: each batch's places, and what it gave.

    costs: of each item, what padding in a batch depends on. size: as in `in_batches`. progress, delay: of the bar of
    this name, see `bar`.
    """
    order = sorted(range(len(costs)), key=costs.__getitem__)
    with bar(len(costs), name, unit, progress, delay=delay) as shown:
        for places, result in in_batches(order, size, lambda places: (places, compute(places))):
            shown.update(len(places))
            yield places, result


def in_order(batches: Iterable[tuple[Sequence[int], Sequence[Result]]]) -> list[Result]:
    """One result for each place, by place, from batches of places and their results."""
    results: dict[int, Result] = {}
    for places, of_batch in batches:
        results |= zip(places, of_batch, strict=True)
    return [results[place] for place in sorted(results)]


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
