"""Many edited models reading the same texts: one pass up to the first edited layer, then one row for each of them.

A row's update is added where the edited weight is used, y = W x + left (right · x), with each row's own left and right;
updates without low rank take a batched matrix product there. Nothing in the model is changed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad as with_zeros

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.models.blocks import Calls, Past, at_columns, through, to_logits, with_value
from nbkit.models.hooks import capture
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget, in_batches
from nbkit.models.prompts import pad
from nbkit.models.replay import can_replay
from nbkit.models.rows import columns_of, marked, spans

BAND = 16  # rows of like length that every edited model reads, in one pass
REACH = 0.75  # edits go together when each has at least this share of the group's layers to run anyway


def layer_of(lm: LanguageModel, name: str) -> int | None:
    """The layer that a weight belongs to, None for one outside all layers (embeddings, the head)."""
    for layer in range(lm.n_layers):
        if name.startswith(lm.architecture.block.format(layer=layer) + "."):
            return layer
    return None


def alike(lm: LanguageModel, edits: Sequence[Edit]) -> list[tuple[int | None, list[int]]]:
    """Places of the edits that can be stacked (`Changes`), and the lowest layer that any of them changes.

    Low-rank updates go together whatever their ranks and weights are, unless one would make another run many more
    layers than it needs; others go with those of the same weights. A layer of None: edits that change something
    outside the layers, or nothing.
    """
    kinds: dict[tuple[str, ...] | str | None, list[int]] = {}
    lowest: list[int] = []
    for place, edit in enumerate(edits):
        layers = [layer_of(lm, name) for name in edit.deltas]
        outside = None in layers or not layers
        lowest.append(-1 if outside else min(layers))
        low_rank = all(isinstance(delta, LowRank) for delta in edit.deltas.values())
        kinds.setdefault(None if outside else "low rank" if low_rank else tuple(sorted(edit.deltas)), []).append(place)
    groups: list[tuple[int | None, list[int]]] = [(None, kinds.pop(None))] if None in kinds else []
    for places in kinds.values():
        first = None
        for place in sorted(places, key=lowest.__getitem__):
            if first is None or lm.n_layers - lowest[place] < REACH * (lm.n_layers - first):
                first = lowest[place]
                groups.append((first, []))
            groups[-1][1].append(place)
    for _, places in groups:  # so that a batch, which is a run of them, has ranks that are much the same
        places.sort(key=lambda place: sum(delta.n_numbers for delta in edits[place].deltas.values()))
    return groups


class Changes:
    """The updates of several edits, stacked. Differentiable in the updates.

    Low-rank ones are padded with zeros to the largest rank, and an edit that does not change what another does has
    zeros there. ModelError for a weight that the model does not have or of another shape.
    """

    def __init__(self, lm: LanguageModel, edits: Sequence[Edit]):
        self.n_edits = len(edits)
        self.factors: dict[str, tuple[Tensor, ...]] = {}  # by module: factors (edit, ., .) whose product is each ΔWᵀ
        for name in dict.fromkeys(name for edit in edits for name in edit.deltas):
            given = [edit.deltas.get(name) for edit in edits]
            weight = [lm.weight_of(name, delta) for delta in given if delta is not None][0]
            (d_out, d_in) = next(delta.shape for delta in given if delta is not None)
            nothing = LowRank(weight.new_zeros(d_out, 0), weight.new_zeros(0, d_in))
            deltas = [nothing if delta is None else delta.to(lm.device) for delta in given]
            if all(isinstance(delta, LowRank) for delta in deltas):
                rank = max(delta.rank for delta in deltas)
                rights = [with_zeros(d.right.to(weight.dtype), (0, 0, 0, rank - len(d.right))) for d in deltas]
                lefts = [with_zeros(d.left.to(weight.dtype), (0, rank - len(d.right))) for d in deltas]
                parts = [torch.stack(rights), torch.stack(lefts)]
            else:
                parts = [torch.stack([delta.dense().to(weight.dtype) for delta in deltas])]
            self.factors[name.removesuffix(".weight")] = tuple(part.transpose(1, 2) for part in parts)

    def of(self, module: str, states: Float[Tensor, "edit n d_in"]) -> Float[Tensor, "edit n d_out"]:
        """ΔW x of each edit's own rows."""
        for factor in self.factors[module]:
            states = states @ factor
        return states

    @contextmanager
    def added(self, lm: LanguageModel, modules: Iterable[str]) -> Iterator[None]:
        """Within this `with`, the modules' outputs are those of each edit's own weights; rows come edit by edit."""

        def hook(name, _module, args, output):
            states = args[0].reshape(self.n_edits, -1, args[0].shape[-1])
            return output + self.of(name, states).reshape(output.shape)

        with ExitStack() as stack:
            for name in modules:
                handle = lm.model.get_submodule(name).register_forward_hook(partial(hook, name))
                stack.callback(handle.remove)
            yield

    @staticmethod
    def bytes_each(lm: LanguageModel, edits: Sequence[Edit]) -> int:
        """What one edit of a stack of these takes: its updates on the device, and their place in the stack."""
        largest: dict[str, int] = {}
        for edit in edits:
            for name, delta in edit.deltas.items():
                largest[name] = max(largest.get(name, 0), delta.n_numbers)
        return 2 * lm.dtype.itemsize * sum(largest.values())


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
        inside = any(layer_of(lm, name + ".") == self.layer for name in changes.factors if name != projection)
        most = max(map(len, kept))
        places = torch.tensor([[*positions] + [0] * (most - len(positions)) for positions in kept], device=lm.device)
        real = torch.tensor([i for i in range(len(kept) * most) if i % most < len(kept[i // most])], device=lm.device)
        with changes.added(lm, [name for name in changes.factors if inside or name != projection]):
            if inside:  # something else in this block changes as well, so it is run
                hidden = through(lm, self.into_block[rows], layers[:1], arguments[:1], self.calls.cache, Past())
            elif projection in changes.factors:
                keys = self.keys[rows].reshape(n_edits, -1, self.keys.shape[-1])
                update = changes.of(projection, keys).reshape(len(rows), n_positions, -1)
                hidden = with_value(
                    lm, self.layer, update, self.output[rows], self.into_block[rows], self.attended[rows],
                    self.values[rows], arguments[0], self.calls.cache,
                )  # fmt: skip
            else:
                hidden = self.output[rows]
            if len(layers) > 1 and most <= n_positions // 2:
                hidden = through(lm, hidden, layers[1:-1], arguments[1:-1], self.calls.cache, Past())
                (of_kept,) = self.calls.at(rows, columns.gather(1, places), columns, visible, layers[-1:])
                last = arguments[-1], of_kept
                hidden = at_columns(lm, hidden, places, layers[-1], last, self.calls.cache, Past())
            else:
                hidden = through(lm, hidden, layers[1:], arguments[1:], self.calls.cache, Past())
                hidden = columns_of(hidden, places)
        return to_logits(lm, hidden.flatten(0, 1)[real])


class WholePass:
    """`SharedPass` the plain way: every pass runs all layers on all rows. Same arguments, same numbers."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]):
        self.lm, self.rows = lm, rows

    def logits(
        self, changes: Changes, grid: Int[Tensor, "edit row"], kept: Sequence[Sequence[int]]
    ) -> Float[Tensor, "kept vocabulary"]:
        """As `SharedPass.logits`."""
        batch = pad(self.lm, [self.rows[number] for number in grid.flatten().tolist()])
        with changes.added(self.lm, changes.factors):
            return self.lm.logits(batch, keep=marked(kept, batch.shape[1], self.lm.device))


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
    for layer, group in alike(lm, edits):
        if layer is None or not can_replay(lm):
            for edit in group:
                with applied(lm, edits[edit]):
                    yield from plain_logits(lm, edit, rows, kept, rows_of[edit], batch_size or 64)
            continue
        for band, members in _bands(rows, rows_of, group):
            yield from _together(lm, layer, edits, members, rows, kept, band, batch_size)


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
    one += Changes.bytes_each(lm, [edits[edit] for edit in members])
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
