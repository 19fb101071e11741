"""Many edited models reading the same texts: one pass up to the first edited layer, then one row for each of them.

A row's update is added where the edited weight is used, y = W x + left (right · x), with each row's own left and right;
updates without low rank take a batched matrix product there. Nothing in the model is changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit.blocks import Calls, Past, at_columns, columns_of, marked, spans, through, to_logits, with_value
from nbkit.edits import Edit, LowRank, applied, weight_of
from nbkit.hooks import capture
from nbkit.memory import Footprint, budget, in_batches
from nbkit.models import LanguageModel
from nbkit.prompts import pad
from nbkit.replay import can_replay

BAND = 16  # rows of like length that every edited model reads, in one pass


def layer_of(lm: LanguageModel, name: str) -> int | None:
    """The layer that a weight belongs to, None for one outside all layers (embeddings, the head)."""
    for layer in range(lm.n_layers):
        if name.startswith(lm.architecture.block.format(layer=layer) + "."):
            return layer
    return None


def alike(edits: Sequence[Edit]) -> list[list[int]]:
    """Places of the edits by what they change: those in one list can be stacked (`Changes`)."""
    groups: dict[tuple, list[int]] = {}
    for place, edit in enumerate(edits):
        kind = sorted((n, d.left.shape[1] if isinstance(d, LowRank) else None) for n, d in edit.deltas.items())
        groups.setdefault(tuple(kind), []).append(place)
    return list(groups.values())


class Changes:
    """The updates of several edits that are `alike`, stacked.

    ModelError for a weight that the model does not have or of another shape.
    """

    def __init__(self, lm: LanguageModel, edits: Sequence[Edit]):
        self.factors: dict[str, tuple[Tensor, ...]] = {}  # by module: factors (edit, ., .) whose product is each ΔWᵀ
        for name in edits[0].deltas:
            dtype = [weight_of(lm, name, edit.deltas[name]).dtype for edit in edits][0]
            deltas = [edit.deltas[name].to(lm.device) for edit in edits]
            if isinstance(deltas[0], LowRank):
                parts = [torch.stack([d.right.T for d in deltas]), torch.stack([d.left.T for d in deltas])]
            else:
                parts = [torch.stack([delta.dense().T for delta in deltas])]
            self.factors[name.removesuffix(".weight")] = tuple(part.to(dtype) for part in parts)

    def of(self, module: str, states: Float[Tensor, "edit n d_in"]) -> Float[Tensor, "edit n d_out"]:
        """ΔW x of each edit's own rows."""
        for factor in self.factors[module]:
            states = states @ factor
        return states


class SharedPass:
    """Rows of tokens read by the unedited model up to `layer`; edited models whose first change is there go on."""

    def __init__(self, lm: LanguageModel, layer: int, rows: Sequence[Sequence[int]]):
        self.lm, self.layer = lm, layer
        self.calls = Calls(lm, rows)
        everyone = torch.arange(len(rows), device=lm.device)
        self.columns, self.visible = spans([0] * len(rows), [len(row) for row in rows], lm.device)
        below, here = range(layer), range(layer, layer + 1)
        arguments = self.calls.at(everyone, self.columns, self.columns, self.visible, range(layer + 1))
        hidden = self.calls.hidden[:, : self.columns.shape[1]]
        self.into_block = through(lm, hidden, below, arguments[:-1], self.calls.cache, Past())
        shape = tuple(self.columns.shape)
        with (
            capture(lm.attention(layer)) as attended,
            capture(lm.projection(layer), "input", shape=shape) as key,
            capture(lm.projection(layer), "output", shape=shape) as value,
        ):
            self.output = through(lm, self.into_block, here, arguments[-1:], self.calls.cache, Past())
        self.attended, self.keys, self.values = attended.value.reshape(*shape, -1), key.value, value.value

    def logits(
        self, changes: Changes, grid: Int[Tensor, "edit row"], kept: Sequence[Sequence[int]]
    ) -> Float[Tensor, "kept vocabulary"]:
        """Logits of edit e on row grid[e, r], edit by edit, row by row; kept: of each, the positions wanted."""
        lm, rows = self.lm, grid.flatten()
        n_edits, n_positions = grid.shape[0], self.columns.shape[1]
        columns, visible = self.columns[rows], self.visible[rows]
        layers = range(self.layer, lm.n_layers)
        arguments = self.calls.at(rows, columns, columns, visible, layers)
        projection = lm.architecture.projection_path(self.layer)
        elsewhere = [module for module in changes.factors if module != projection]
        most = max(map(len, kept))
        places = torch.tensor([[*positions] + [0] * (most - len(positions)) for positions in kept], device=lm.device)
        real = torch.tensor([i for i in range(len(kept) * most) if i % most < len(kept[i // most])], device=lm.device)
        with ExitStack() as stack:
            for module in elsewhere:
                stack.enter_context(self._adding(changes, module, n_edits))
            if any(layer_of(lm, module + ".") == self.layer for module in elsewhere):
                stack.enter_context(self._adding(changes, projection, n_edits))
                hidden = through(lm, self.into_block[rows], layers[:1], arguments[:1], self.calls.cache, Past())
            else:
                keys = self.keys[rows].reshape(n_edits, -1, self.keys.shape[-1])
                update = changes.of(projection, keys).reshape(len(rows), n_positions, -1)
                hidden = with_value(
                    lm, self.layer, update, self.output[rows], self.into_block[rows], self.attended[rows],
                    self.values[rows], arguments[0], self.calls.cache,
                )  # fmt: skip
            if len(layers) > 1 and most <= n_positions // 2:
                hidden = through(lm, hidden, layers[1:-1], arguments[1:-1], self.calls.cache, Past())
                (of_kept,) = self.calls.at(rows, columns.gather(1, places), columns, visible, layers[-1:])
                last = arguments[-1], of_kept
                hidden = at_columns(lm, hidden, places, layers[-1], last, self.calls.cache, Past())
            else:
                hidden = through(lm, hidden, layers[1:], arguments[1:], self.calls.cache, Past())
                hidden = columns_of(hidden, places)
        return to_logits(lm, hidden.flatten(0, 1)[real])

    def _adding(self, changes: Changes, module: str, n_edits: int) -> ExitStack:
        """Within this `with`, the module's output is that of each row's own edited weight."""

        def hook(_module, args, output):
            states = args[0].reshape(n_edits, -1, args[0].shape[-1])
            return output + changes.of(module, states).reshape(output.shape)

        stack = ExitStack()
        if module in changes.factors:
            stack.callback(self.lm.model.get_submodule(module).register_forward_hook(hook).remove)
        return stack


def edited_logits(
    lm: LanguageModel,
    edits: Sequence[Edit],
    rows: Sequence[Sequence[int]],
    kept: Sequence[range],
    rows_of: Sequence[Sequence[int]],
    batch_size: int | None = None,
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "kept vocabulary"]]]:
    """Logits of each edited model on its rows, a batch at a time; the model is not changed.

    kept: the positions of each row whose logits are wanted. rows_of: for each edit, the numbers of its rows.
    batch_size: rows at once, else as many as memory takes. Yields which (edit, row) the logits are of, and the logits
    of all their kept positions, one after the other. Edits of weights outside the layers, and models that cannot be
    replayed, go the plain way: every edit applied, all layers run.
    """
    for group in alike(edits):
        layers = [layer_of(lm, name) for name in edits[group[0]].deltas]
        if None in layers or not layers or not can_replay(lm):
            for edit in group:
                with applied(lm, edits[edit]):
                    yield from plain_logits(lm, edit, rows, kept, rows_of[edit], batch_size or 64)
            continue
        for band, members in _bands(rows, rows_of, group):
            yield from _together(lm, min(layers), edits, members, rows, kept, band, batch_size)


def plain_logits(
    lm: LanguageModel,
    edit: int,
    rows: Sequence[Sequence[int]],
    kept: Sequence[range],
    numbers: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """As `edited_logits`, for the rows of these numbers and the model as it is, which carries edit number `edit`."""
    order = sorted(numbers, key=lambda number: len(rows[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad(lm, [rows[number] for number in chosen])
        keep = marked([kept[number] for number in chosen], batch.shape[1], lm.device)
        yield [(edit, number) for number in chosen], lm.logits(batch, keep=keep)


def _bands(
    rows: Sequence[Sequence[int]], rows_of: Sequence[Sequence[int]], group: Sequence[int]
) -> Iterator[tuple[dict[int, list[int]], list[int]]]:
    """Which rows of which edits run together: rows that all edits read by like length, else each edit with its own."""
    common = list(rows_of[group[0]])
    if len(group) > 1 and all(list(rows_of[edit]) == common for edit in group):
        order = sorted(common, key=lambda number: len(rows[number]))
        for start in range(0, len(order), BAND):
            band = order[start : start + BAND]
            yield dict.fromkeys(group, band), list(group)
    else:
        yield {edit: list(rows_of[edit]) for edit in group}, [edit for edit in group if rows_of[edit]]


def _filled(numbers: Sequence[int], n: int) -> list[tuple[int, bool]]:
    """An edit's rows, and whether they are its own: with fewer rows than others it reads its first one again."""
    return [(number, True) for number in numbers] + [(numbers[0], False)] * (n - len(numbers))


def _together(
    lm: LanguageModel,
    layer: int,
    edits: Sequence[Edit],
    members: Sequence[int],
    rows: Sequence[Sequence[int]],
    kept: Sequence[range],
    band: Mapping[int, list[int]],
    batch_size: int | None,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    if not members:
        return
    most = max(len(band[edit]) for edit in members)
    longest = max(len(rows[number]) for edit in members for number in band[edit])
    n_logits = max(len(kept[number]) for edit in members for number in band[edit])
    one = most * Footprint(longest, 0, lm.n_layers - layer, n_logits, backward=False).bytes(lm)
    shared: tuple[list[int], SharedPass] | None = None

    def compute(chosen: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor]:
        nonlocal shared
        numbers = list(dict.fromkeys(number for edit in chosen for number in band[edit]))
        if shared is None or shared[0] != numbers:
            shared = numbers, SharedPass(lm, layer, [rows[number] for number in numbers])
        place = {number: row for row, number in enumerate(numbers)}
        grid = torch.tensor([[place[n] for n, _ in _filled(band[e], most)] for e in chosen])
        wanted = [kept[n] if own else () for e in chosen for n, own in _filled(band[e], most)]
        logits = shared[1].logits(Changes(lm, [edits[e] for e in chosen]), grid.to(lm.device), wanted)
        return [(e, n) for e in chosen for n in band[e]], logits

    size = batch_size // most if batch_size else budget(lm.device) // one
    yield from in_batches(members, size, compute)
