"""Many edited models reading the same texts: one pass up to the first edited layer, then one row for each of them.

The edited model is the one that `applied` makes and `lm.save` writes: its weight is W + ΔW, rounded to W's dtype.

In float32 and float64 a row's update is added where the edited weight is used, y = W x + left (right · x), with each
row's own left and right; updates without low rank take a batched matrix product there, those of biases a sum: the same
to that dtype's rounding, and nothing in the model is changed. In bfloat16 and float16 it is not the same, because a
good part of a small ΔW is lost or doubled when the sum is rounded. There the edits lie in the weights in turn
(`InWeights`), with the layers below still shared.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad as with_zeros

from nbkit.edits.edit import Edit
from nbkit.edits.interrupts import Guarded
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.models.blocks import Wanted, reading, with_value
from nbkit.models.calls import to_logits
from nbkit.models.hooks import after, together
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget, by_cost, in_batches
from nbkit.models.prompts import pad
from nbkit.models.replay import can_replay
from nbkit.models.rows import AskedRows, columns_of, filled, marked

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
        self.biases: dict[str, Tensor] = {}  # by module: (edit, 1, d_out)
        for name in dict.fromkeys(name for edit in edits for name in edit.deltas):
            module, _, part = name.rpartition(".")
            if part == "bias":
                (self.biases[module],) = self._stacked(lm, edits, name)
                self.factors.setdefault(module, ())  # which names all modules that change
            else:
                self.factors[module] = self._stacked(lm, edits, name)

    @staticmethod
    def _stacked(lm: LanguageModel, edits: Sequence[Edit], name: str) -> tuple[Tensor, ...]:
        given = [edit.deltas.get(name) for edit in edits]
        weight = [lm.weight_of(name, delta) for delta in given if delta is not None][0]
        d_out, d_in = lm.oriented(name).shape
        nothing = LowRank(weight.new_zeros(d_out, 0), weight.new_zeros(0, d_in))
        deltas = [nothing if delta is None else delta.to(lm.device) for delta in given]
        if all(isinstance(delta, LowRank) for delta in deltas) and weight.dim() > 1:
            rank = max(delta.rank for delta in deltas)
            rights = [with_zeros(d.right.to(weight.dtype), (0, 0, 0, rank - len(d.right))) for d in deltas]
            lefts = [with_zeros(d.left.to(weight.dtype), (0, rank - len(d.right))) for d in deltas]
            parts = [torch.stack(rights), torch.stack(lefts)]
        else:
            parts = [torch.stack([delta.dense().to(weight.dtype) for delta in deltas])]
        return tuple(part.transpose(1, 2) for part in parts)

    def of(self, module: str, states: Float[Tensor, "edit n d_in"]) -> Float[Tensor, "edit n d_out"]:
        """ΔW x + Δb of each edit's own rows."""
        bias = self.biases.get(module)
        if not self.factors[module]:
            return bias.expand(-1, states.shape[1], -1)
        for factor in self.factors[module]:
            states = states @ factor
        return states if bias is None else states + bias

    def added(self, lm: LanguageModel, modules: Iterable[str]) -> Guarded:
        """Within this `with`, the modules' outputs are those of each edit's own weights; rows come edit by edit."""

        def hook(name, _module, args, output):
            states = args[0].reshape(self.n_edits, -1, args[0].shape[-1])
            return output + self.of(name, states).reshape(output.shape)

        return together([after(lm.model.get_submodule(name), partial(hook, name)) for name in modules])

    @staticmethod
    def bytes_each(lm: LanguageModel, edits: Sequence[Edit]) -> int:
        """What one edit of a stack of these takes: its updates on the device, and their place in the stack."""
        largest: dict[str, int] = {}
        for edit in edits:
            for name, delta in edit.deltas.items():
                largest[name] = max(largest.get(name, 0), delta.n_numbers)
        return 2 * lm.dtype.itemsize * sum(largest.values())


class InWeights:
    """One edit in place of `Changes`, put into the weights while it is read: its sums are rounded as a user's are."""

    def __init__(self, lm: LanguageModel, edit: Edit):
        self.n_edits, self.edit = 1, edit
        self.factors = dict.fromkeys(name.removesuffix(".weight") for name in edit.deltas)

    def added(self, lm: LanguageModel, _modules: Iterable[str]) -> Guarded:
        """As `Changes.added`, of all modules that the edit changes."""
        return applied(lm, self.edit)


def rounds(lm: LanguageModel) -> bool:
    """Whether W + ΔW in the model's dtype is another model than W and ΔW side by side."""
    return torch.finfo(lm.dtype).bits < 32


class SharedPass:
    """Rows of tokens read by the unedited model up to `layer`; edited models whose first change is there go on."""

    def __init__(self, lm: LanguageModel, layer: int, rows: Sequence[Sequence[int]]):
        self.lm, self.layer = lm, layer
        self.part = reading(lm, rows)
        self.block = self.part.watched(layer, self.part.through(range(layer)))

    def logits(
        self, changes: Changes | InWeights, grid: Int[Tensor, "edit row"], kept: Sequence[Sequence[int]]
    ) -> Float[Tensor, "kept vocabulary"]:
        """Logits of edit e on row grid[e, r], edit by edit, row by row; kept: of each, the positions wanted."""
        lm, rows, above = self.lm, grid.flatten(), range(self.layer + 1, self.lm.n_layers)
        projection = lm.architecture.projection_path(self.layer)
        here = [name for name in changes.factors if layer_of(lm, name + ".") == self.layer]
        run = bool(here) and (here != [projection] or isinstance(changes, InWeights))
        part = self.part.of(rows)
        places, real = filled(kept)
        wanted = Wanted(part, places.to(lm.device))
        with changes.added(lm, [name for name in changes.factors if run or name != projection]):
            if run:  # what the projection says is not all that changes here, or the change is in its weight
                hidden = part.block(self.layer, self.block.into_block[rows])
            elif projection in changes.factors:
                hidden = self._with_updates(changes, projection, rows)
            else:
                hidden = self.block.output[rows]
            if places.shape[1] <= part.columns.shape[1] // 2:
                hidden = wanted.through(above, hidden)
            else:
                hidden = columns_of(part.through(above, hidden), wanted.places)
        return to_logits(lm, hidden.flatten(0, 1)[real.flatten().nonzero()[:, 0].to(lm.device)])

    def _with_updates(self, changes: Changes, projection: str, rows: Int[Tensor, " row"]) -> Tensor:
        block = self.block.of(rows)
        update = changes.of(projection, block.keys.reshape(changes.n_edits, -1, block.keys.shape[-1]))
        return with_value(self.part.calls, self.layer, block, update.reshape(block.values.shape))


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
    asked: AskedRows,
    rows_of: Sequence[Sequence[int]],
    batch_size: int | None = None,
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "wanted vocabulary"]]]:
    """Logits of each edited model on its rows, a batch at a time; the model is not changed afterwards.

    Each is the model with W + ΔW rounded to its dtype, which in bfloat16 and float16 takes one edit at a time.

    rows_of: for each edit, the numbers of its rows. batch_size: rows at once, else as many as memory takes. Yields
    which (edit, row) the logits are of, and the logits at all their wanted tokens, one after the other. Edits of
    weights outside the layers, and models that cannot be replayed, go the plain way: each edit applied, all layers run.
    """
    for layer, group in alike(lm, edits):
        if layer is None or not can_replay(lm):
            for edit in group:
                with applied(lm, edits[edit]):
                    for rows, logits in plain_logits(lm, asked, rows_of[edit], batch_size or 64):
                        yield [(edit, row) for row in rows], logits
        else:
            for band in _bands(asked, {edit: rows_of[edit] for edit in group}):
                yield from _together(lm, layer, edits, asked, band, batch_size)


def plain_logits(
    lm: LanguageModel, asked: AskedRows, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Float[Tensor, "wanted vocabulary"]]]:
    """Logits of the model as it is on the rows of these numbers: as `edited_logits`, with the row alone."""

    def compute(places: Sequence[int]) -> Tensor:
        chosen = [rows[place] for place in places]
        batch = pad(lm, [asked.tokens[row] for row in chosen])
        return lm.logits(batch, keep=marked([asked.wanted[row] for row in chosen], batch.shape[1], lm.device))

    for places, logits in by_cost([len(asked.tokens[row]) for row in rows], batch_size, compute):
        yield [rows[place] for place in places], logits


def _bands(asked: AskedRows, rows_of: Mapping[int, Sequence[int]]) -> Iterator[Mapping[int, Sequence[int]]]:
    """Which rows of which edits run together: rows that all edits read by like length, else each edit with its own."""
    common = list(next(iter(rows_of.values())))
    if len(rows_of) > 1 and all(list(rows) == common for rows in rows_of.values()):
        order = sorted(common, key=lambda row: len(asked.tokens[row]))
        for start in range(0, len(order), BAND):
            yield dict.fromkeys(rows_of, order[start : start + BAND])
    elif any(rows_of.values()):
        yield {edit: rows for edit, rows in rows_of.items() if rows}


def _together(
    lm: LanguageModel,
    layer: int,
    edits: Sequence[Edit],
    asked: AskedRows,
    band: Mapping[int, Sequence[int]],
    batch_size: int | None,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """The edits of a band on their rows, as many edits side by side as memory takes."""
    most = max(map(len, band.values()))
    of_band = {row for rows in band.values() for row in rows}
    longest, n_logits = (max(len(lists[row]) for row in of_band) for lists in (asked.tokens, asked.wanted))
    one = most * Footprint(longest, 0, lm.n_layers - layer, n_logits, backward=False).bytes(lm)
    one += Changes.bytes_each(lm, [edits[edit] for edit in band])

    @lru_cache(maxsize=1)  # edits that read the same rows follow each other
    def shared(rows: tuple[int, ...]) -> SharedPass:
        return SharedPass(lm, layer, [asked.tokens[row] for row in rows])

    def compute(chosen: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor]:
        pairs = [(edit, row) for edit in chosen for row in band[edit]]
        place = {row: place for place, row in enumerate(dict.fromkeys(row for _, row in pairs))}
        grid, _ = filled([[place[row] for row in band[edit]] for edit in chosen], most)
        wanted = []
        for edit in chosen:  # with fewer rows than others it reads others' again, of which nothing is wanted
            wanted += [asked.wanted[row] for row in band[edit]] + [()] * (most - len(band[edit]))
        rows = shared(tuple(place))  # read before an edit is in the weights
        changes = InWeights(lm, edits[chosen[0]]) if alone else Changes(lm, [edits[edit] for edit in chosen])
        return pairs, rows.logits(changes, grid.to(lm.device), wanted)

    alone = rounds(lm)
    size = 1 if alone else batch_size // most if batch_size else budget(lm.device) // one
    yield from in_batches(list(band), size, compute)
