"""What an edit needs of a model: weights by name, the edits that lie in them, and a hash. No tokenizer, no text.

`models.LanguageModel` is one; all that edits do to a model goes through here.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from nbkit.architectures import Architecture
from nbkit.edits import placed
from nbkit.edits.door import in_use
from nbkit.edits.edit import Edit
from nbkit.edits.hashes import hash_of, state, states
from nbkit.edits.interrupts import uninterrupted
from nbkit.edits.updates import Update
from nbkit.errors import ModelError

TURN_SECONDS = 0.01  # between two looks at whose turn it is
OVERLAY_SECONDS = 5  # that a panel's job waits for a `with applied(...)` of a cell


@dataclass(eq=False)
class Overlay:
    """Edits that lie in a model's weights, and the weights that they touch as they were below: one copy of each,
    however many edits are added.

    laid: {turn: edit}; turns count over all overlays of a model, in the order in which edits were added. thread, depth:
    who began it, inside of how many verbs; None for one that stays. ended: to be taken out, as soon as no verb that
    was begun inside it is at work.
    """

    laid: dict[int, Edit] = field(default_factory=dict)
    below: dict[str, Tensor] = field(default_factory=dict)
    thread: threading.Thread | None = None
    depth: int = 0
    ended: bool = False

    @property
    def edits(self) -> list[Edit]:
        return list(self.laid.values())


Laid = tuple[int, Overlay, Edit]  # its turn, where it is counted, and what was added


@dataclass(eq=False)
class EditableModel:
    """A model with its row of the table of architectures.

    overlays: the edits that lie in the weights, lowest first; those of a `with` lie above those of `apply`.

    One thread at a time uses it: while a verb, a `with applied(...)` or a loop over `edit_sequence` of one is open,
    another's get a ModelError. Panels' jobs and the others wait for each other's verbs instead (`take_turn`).
    """

    model: PreTrainedModel
    architecture: Architecture
    name: str
    overlays: list[Overlay] = field(default_factory=list, repr=False)
    uses: list[in_use] = field(default_factory=list, repr=False, init=False)  # the outermost verb first
    set_aside: list[Any] = field(default_factory=list, repr=False, init=False)  # each open `unedited`
    lock: Any = field(default_factory=threading.RLock, repr=False, init=False)
    _changing: bool = field(default=False, repr=False, init=False)
    # The unedited model's hash, and of each weight, by its place in memory, which of its states it was made of.
    _known: tuple[str, dict[int, int]] | None = field(default=None, repr=False, init=False)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def n_applied(self) -> int:
        """How many edits are in the weights right now."""
        return sum(len(overlay.laid) for overlay in self.overlays)

    @property
    def laid(self) -> list[Laid]:
        """All edits in the weights, in the order in which they were added."""
        laid = [(turn, overlay, edit) for overlay in self.overlays for turn, edit in overlay.laid.items()]
        return sorted(laid, key=lambda each: each[0])

    @property
    def hash(self) -> str:
        """sha256 over configuration and weights: names caches and result rows.

        That of the unedited model is remembered, until something else than nbkit writes to its weights (which is seen
        unless it goes round torch's count of changes, by a weight's `.data`). ModelError where weights do not say what
        the model computes: with foreign hooks on it, or inside a `with` that changes its passes.
        """
        with in_use(self):
            placed.check(self.model, self.name, changing=False)
            return hash_of(self.model) if self.n_applied else self.base_hash

    @property
    def base_hash(self) -> str:
        """The hash of the unedited model, whatever edits are in the weights."""
        with in_use(self):
            placed.check(self.model, self.name, changing=False)
            now = states(self.model)
            if self._known is None or now is None or self._known[1] != now:
                self._known = hash_of(self.model, self.unedited_weights), now
            return self._known[0]

    @property
    def unedited_weights(self) -> dict[str, Tensor]:
        """{name: weight without any edit} of the weights that edits have changed, as stored."""
        weights: dict[str, Tensor] = {}
        for _, overlay, edit in self.laid:
            for name in edit.deltas:
                if name in overlay.below:  # not yet, for the rest of one that is just being added
                    weights.setdefault(name, overlay.below[name])
        return weights

    def oriented(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """A weight as updates see it; a view, transposed where the architecture stores it so, a bias as one column."""
        weight = self.model.get_parameter(name)
        if weight.dim() == 1:
            return weight[:, None]
        return weight.T if self.architecture.transposed else weight

    def check_causal(self) -> None:
        """ModelError for a side of an encoder-decoder: keys are all that is defined for it."""
        if self.architecture.side:
            raise ModelError(
                f"{self.name} is an encoder-decoder ({self.model.config.model_type}), whose keys can be read; edits, "
                "and what is measured of them, are defined here for causal decoders"
            )

    def weight_of(self, name: str, delta: Update) -> Tensor:
        """The weight that an update is of, as stored; ModelError if there is none of that name and shape in memory."""
        self.check_causal()
        try:
            weight = self.model.get_parameter(name)
        except AttributeError as error:
            raise ModelError(f"the edit changes {name}, a weight that {self.name} does not have") from error
        if weight.is_meta:
            raise ModelError(
                f"{self.name}: {name} is offloaded (on the meta device), where an edit would never reach it"
            )
        if weight.dim() == 1 and not name.endswith(".bias"):
            raise ModelError(f"the edit changes {name} of {self.name}, a vector: edits are of matrices and of biases")
        shape = tuple(self.oriented(name).shape)
        if tuple(delta.shape) != shape:
            raise ModelError(
                f"the edit's update of {name} is {tuple(delta.shape)}, "
                f"the weight of {self.name} is {shape} (d_out, d_in)"
            )
        return weight

    @torch.no_grad()
    def add_update(self, name: str, delta: Update) -> None:
        """Adds an update to its weight, for good."""
        weight = self.oriented(name)
        update = delta.to(weight.device).dense()
        # Added in the wider of the two types and rounded once, which matters for a bfloat16 weight.
        wide = torch.promote_types(weight.dtype, update.dtype)
        self._write(weight, weight.to(wide) + update.to(wide))

    def put(self, name: str, weight: Tensor) -> None:
        """Gives a weight these numbers, as stored."""
        self._write(self.model.get_parameter(name), weight)

    @torch.no_grad()
    def _write(self, place: Tensor, numbers: Tensor) -> None:
        """A change of nbkit's own, which the remembered hash knows of; not one that somebody else made before it."""
        known = self._known
        mine = known is not None and known[1] is not None and known[1].get(place.data_ptr()) == state(place)
        self._known = None
        place.copy_(numbers)
        if mine:
            known[1][place.data_ptr()] = state(place)
            self._known = known

    def take_turn(self) -> None:
        """Waits while a verb of another thread is at work, if that thread or this one has `takes_turns`: those of a
        panel's jobs have, which begin while cells run. They wait for a `with applied(...)` of a cell too, but not for
        ever, since a loop over `edit_sequence` may have been left. Others are refused, as `check_thread` says."""
        me = threading.current_thread()
        patient, until = getattr(me, "takes_turns", False), time.monotonic() + OVERLAY_SECONDS

        def elsewhere(thread: threading.Thread | None) -> bool:
            return thread not in (None, me) and thread.is_alive()

        def awaited() -> bool:
            verbs = [use.thread for use in [*self.uses] if patient or getattr(use.thread, "takes_turns", False)]
            lain = [each.thread for each in [*self.overlays]] if patient and time.monotonic() < until else []
            return any(map(elsewhere, verbs + lain))

        while awaited():
            time.sleep(TURN_SECONDS)

    def check_thread(self) -> None:
        """ModelError while another thread is using the model."""
        for holder in (*self.uses, *self.overlays):
            thread = holder.thread
            if thread not in (None, threading.current_thread()) and thread.is_alive():
                what = "it carries edits" if isinstance(holder, Overlay) else "a verb is at work on it"
                raise ModelError(
                    f"{self.name} is in use by the thread {thread.name!r} ({what}), and one model serves one thread at "
                    f"a time, not {threading.current_thread().name!r} beside it: wait until that one is through, or "
                    "load the model once for each thread"
                )

    @uninterrupted
    def change(self, work: Callable[[], Any]) -> Any:
        """Does what changes weights and overlays: to its end, by one thread, and not in the middle of another."""
        with self.lock:
            self.check_thread()
            before, self._changing = self._changing, True
            try:
                return work()
            finally:
                self._changing = before
                self.settle()

    @uninterrupted
    def settle(self) -> None:
        """Takes out the overlays that have ended, but none in the middle of a verb that was begun inside it: the
        collector may end one at any instruction of any thread."""
        with self.lock:
            me = threading.current_thread()
            if self._changing or any(use.thread is not me and use.thread.is_alive() for use in self.uses):
                return
            self._changing = True
            try:
                while due := [each for each in self.overlays if each.ended and each.depth >= len(self.uses)]:
                    self._remove(due[-1])
            finally:
                self._changing = False

    def end_above(self, depth: int) -> None:
        """Ends what was begun inside of more verbs than that."""
        for one in reversed(self.set_aside):
            if one.depth > depth:
                one.end(None)
        for overlay in self.overlays:
            overlay.ended = overlay.ended or overlay.depth > depth
        self.settle()

    def _remove(self, overlay: Overlay) -> None:
        since = min(overlay.laid, default=0)
        above = [edit.deltas for turn, other, edit in self.laid if turn > since and other is not overlay]
        if not any(name in deltas for deltas in above for name in overlay.below):
            for name, weight in overlay.below.items():
                self.put(name, weight)
        else:
            self.take_out(overlay.laid)
        self.overlays.remove(overlay)
        overlay.laid, overlay.below = {}, {}

    def take_out(self, turns: Collection[int]) -> None:
        """Makes weights and overlays what they would be if these edits had not been added.

        The others are added again in their order, to the weights without any: the same sums, so the same bits.
        """
        laid, unedited = self.laid, self.unedited_weights
        names = {name for turn, _, edit in laid if turn in turns for name in edit.deltas if name in unedited}
        try:
            for name in names:
                self._lay_again(name, unedited[name], [each for each in laid if each[0] not in turns])
        except BaseException:  # out of memory, say
            for name in names:
                self._lay_again(name, unedited[name], laid)
            raise
        for overlay in self.overlays:
            overlay.laid = {turn: edit for turn, edit in overlay.laid.items() if turn not in turns}

    def _lay_again(self, name: str, unedited: Tensor, laid: Sequence[Laid]) -> None:
        self.put(name, unedited)
        for overlay in self.overlays:
            overlay.below.pop(name, None)
        weight, below = self.model.get_parameter(name), unedited
        for _, overlay, edit in laid:
            if name in edit.deltas:
                if name not in overlay.below:
                    overlay.below[name] = weight.detach().clone() if below is None else below
                below = None  # the copy that there is will do for the first only
                self.add_update(name, edit.deltas[name])
