"""One thing changed at a time, in a request or in the model's passes, to see what it is the cause of.

    one = in_front("The door was open. ")                # or at_first_token(): the request is another
    request = one.rewritten(lm, request)

    one = first_hidden()                                 # or subject_alone(), first_position_as(8), shifted_by(8)
    with one.during(lm, prompts, subjects):              # the passes are others, in here
        nbkit.edit(lm, requests)

An intervention on passes changes what the model is given (position ids, which tokens attend to which), by hooks of
nbkit's on the whole model and its blocks. Passes cut short (models/replay.py) take positions and masks from a pass
through the whole model, so they are changed with it, and only once: `calls.Handed` says which blocks were called by
themselves. Outside the `with` the model is what it was.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from nbkit.edits.interrupts import Guarded
from nbkit.errors import ModelError, PromptError
from nbkit.models.calls import CACHES, Handed, arguments_of
from nbkit.models.hooks import before, together
from nbkit.models.language_model import LanguageModel, check_model
from nbkit.models.prompts import subject_spans
from nbkit.records.bounds import check_number, check_text
from nbkit.records.requests import EditRequest

MASKED_BY = ("eager", "sdpa")  # implementations of attention whose masks say for each pair of tokens what is seen


@dataclass(frozen=True)
class Intervention:
    """A name, and what is changed under it: the request by `rewrite`, passes by `passes`; none of both changes nothing.

    arguments: all that tells it from others of its kind, as JSON has it.
    """

    name: str
    rewrite: Callable[[LanguageModel, EditRequest], EditRequest] | None = None
    passes: Callable[[LanguageModel, Sequence[str], Sequence[str]], Guarded] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def rewritten(self, lm: LanguageModel, request: EditRequest) -> EditRequest:
        """The request as the intervention has it: the same one for an intervention on passes."""
        return request if self.rewrite is None else self.rewrite(lm, request)

    def during(self, lm: LanguageModel, prompts: Sequence[str] = (), subjects: Sequence[str] = ()) -> Guarded:
        """The `with` in which passes are changed; one that changes nothing for an intervention on requests.

        prompts, subjects: of `find_subjects`: what will be read in it, for `subject_alone` to know the subjects.
        ModelError for a model that cannot be changed so.
        """
        check_model(lm).check_causal()
        return Guarded() if self.passes is None else self.passes(lm, prompts, subjects)


def in_front(text: str, name: str) -> Intervention:
    """The text stands before every prompt, behind the prefixes of context templates; it may hold special tokens."""
    check_text("text", text, PromptError, empty=True)
    if not text or "{}" in text:
        raise PromptError(f"what is put in front of prompts must be a text without {{}}, not {text!r}")

    def rewrite(_lm: LanguageModel, request: EditRequest) -> EditRequest:
        return replace(request, prompt=text + request.prompt)

    return Intervention(name, rewrite=rewrite, arguments={"in_front": text})


def at_first_token(name: str = "edited at the prompt’s first token") -> Intervention:
    """The first token of the prompt's text is the subject. The text is the same, and so is a request whose subject it
    was; with a BOS the first token behind it is meant."""

    def rewrite(lm: LanguageModel, request: EditRequest) -> EditRequest:
        text = request.text
        offsets = lm.tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
        end = next(last for first, last in offsets if text[first:last].strip())
        return replace(request, prompt="{}" + text[end:], subject=text[:end])

    return Intervention(name, rewrite=rewrite, arguments={"at_first_token": True})


def first_position_as(position: int, name: str | None = None) -> Intervention:
    """Tokens at position 0 have the position embedding of a later one; all others keep theirs.

    ModelError for a model without learned positions: in a rotary one the first token sees itself alone, at distance 0
    from itself whatever its position is called.
    """
    check_number("position", position, whole=True, least=1)

    def passes(lm: LanguageModel, *_) -> Guarded:
        if not lm.architecture.learned_positions:
            raise ModelError(
                f"{lm.name} ({lm.config.model_type}) has no learned position embeddings that position 0 could be given "
                "another of; use shifted_by"
            )
        if position >= lm.max_length:
            raise ModelError(f"position {position} does not exist in {lm.name} (0 to {lm.max_length - 1})")
        return _positions_by(lm, lambda ids: torch.where(ids == 0, position, ids))

    return Intervention(name or f"position 0 embedded as {position}", passes=passes, arguments={"position": position})


def shifted_by(by: int, name: str | None = None) -> Intervention:
    """All positions are called `by` more. A rotary model sees distances only, and so computes the same, to rounding."""
    check_number("by", by, whole=True, least=1)

    def passes(lm: LanguageModel, *_) -> Guarded:
        def later(ids: Tensor) -> Tensor:
            if lm.architecture.learned_positions and int(ids.max()) + by >= lm.max_length:
                raise PromptError(
                    f"a row of {int(ids.max()) + 1} tokens does not fit into the context of {lm.name} "
                    f"({lm.max_length}) with its positions shifted by {by}"
                )
            return ids + by

        return _positions_by(lm, later)

    return Intervention(name or f"positions shifted by {by}", passes=passes, arguments={"by": by})


def first_hidden(name: str = "position 0 seen by no later token") -> Intervention:
    """No token but itself attends to what is at position 0 (a BOS, where there is one), in any layer."""

    def passes(lm: LanguageModel, *_) -> Guarded:
        def hidden(rows: _Rows, width: int) -> Bool[Tensor, "row query key"]:
            column = torch.arange(width, device=rows.starts.device)
            first = column == rows.starts[:, None]
            return (column > rows.starts[:, None])[:, :, None] & first[:, None, :]

        return _hiding(lm, hidden)

    return Intervention(name, passes=passes, arguments={"first_hidden": True})


def subject_alone(name: str = "subject sees itself alone") -> Intervention:
    """The subject's tokens attend to no token before the subject, in any layer: neither prefix nor BOS."""

    def passes(lm: LanguageModel, prompts: Sequence[str], subjects: Sequence[str]) -> Guarded:
        found = zip(*subject_spans(lm, prompts, subjects), strict=True) if prompts else ()
        spans = {tuple(row[: last + 1]): first for row, (first, last) in found}
        lengths = sorted({len(row) for row in spans}, reverse=True)

        def hidden(rows: _Rows, width: int) -> Bool[Tensor, "row query key"]:
            hide = torch.zeros(len(rows.tokens), width, width, dtype=torch.bool)
            for row, (tokens, start) in enumerate(zip(rows.tokens.tolist(), rows.starts.tolist(), strict=True)):
                begun = (tuple(tokens[start : start + length]) for length in lengths)
                known = next((found for found in begun if found in spans), None)  # the longest: subjects share tokens
                if known is not None:
                    first, end = start + spans[known], start + len(known)
                    hide[row, first:end, :first] = True
            return hide.to(rows.starts.device)

        return _hiding(lm, hidden)

    return Intervention(name, passes=passes, arguments={"subject_alone": True})


def _positions_by(lm: LanguageModel, fn: Callable[[Tensor], Tensor]) -> Guarded:
    """Every pass through the whole model has the position ids that `fn` makes of its own."""

    def change(_model: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        if named.get("position_ids") is None:
            raise ModelError(f"{lm.name}: a pass without position ids cannot have others; this one is not of nbkit's")
        return inputs, {**named, "position_ids": fn(named["position_ids"])}

    return before(lm.model, change)


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass through the whole model, (row, position), and the column of each one's first token."""

    tokens: Tensor
    starts: Tensor


def _hiding(lm: LanguageModel, hidden: Callable[[_Rows, int], Bool[Tensor, "row query key"]]) -> Guarded:
    """Attention is taken away where `hidden` says so, of the rows and the width of a pass; nothing else changes."""
    implementation = lm.config._attn_implementation
    if implementation not in MASKED_BY:
        raise ModelError(
            f"{lm.name} computes attention by {implementation!r}, which has no mask for each pair of tokens; load it "
            f"with one of {', '.join(MASKED_BY)}: lm.model.set_attn_implementation('sdpa')"
        )
    state = _Pass()
    watched = before(lm.model, partial(_begin, state))
    changed = [before(lm.block(layer), partial(_hide, lm, state, hidden)) for layer in range(lm.n_layers)]
    return together([watched, *changed])


class _Pass:
    """The pass through the whole model that is under way: its rows (None: it has no tokens), and masks made for it.

    masks: {id of the model's own: (that, the changed one)}, since layers of one kind share theirs.
    """

    def __init__(self):
        self.rows: _Rows | None = None
        self.masks: dict[int, tuple[Tensor | None, Tensor]] = {}


def _begin(state: _Pass, _model: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """Notes what a pass through the whole model reads, and leaves it as it is."""
    tokens, state.rows, state.masks = named.get("input_ids"), None, {}
    if tokens is not None:
        real = named.get("attention_mask")
        starts = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device) if real is None else real.argmax(1)
        state.rows = _Rows(tokens, starts)
    return inputs, named


def _hide(
    lm: LanguageModel,
    state: _Pass,
    hidden: Callable[[_Rows, int], Tensor],
    block: nn.Module,
    inputs: tuple,
    named: dict,
) -> tuple[tuple, dict]:
    """A block's arguments with the changed mask; those of a block that is called by itself as they are."""
    given = arguments_of(block, inputs, named)
    cache = next((given[name] for name in CACHES if name in given), None)
    if isinstance(cache, Handed) or state.rows is None:
        return inputs, named
    if cache is not None:
        raise ModelError(f"{lm.name}: attention cannot be taken away in a pass with a cache, as generation makes one")
    mask = given.get("attention_mask")
    if id(mask) not in state.masks:
        state.masks[id(mask)] = mask, _without(mask, hidden(state.rows, state.rows.tokens.shape[1]))
    changed = state.masks[id(mask)][1]
    place = list(inspect.signature(type(block).forward).parameters).index("attention_mask") - 1  # but for `self`
    if place < len(inputs):
        return (*inputs[:place], changed, *inputs[place + 1 :]), named
    return inputs, {**named, "attention_mask": changed}


def _without(mask: Tensor | None, hide: Bool[Tensor, "row query key"]) -> Tensor:
    """A mask with less to see: True or 0 where a query sees a key. None is a causal one, of a batch without padding.

    A query that nothing is left of keeps what it had: it is of padding, since tokens see themselves.
    """
    hide = hide[:, None]
    if mask is None:
        mask = torch.ones(hide.shape[-2:], dtype=torch.bool, device=hide.device).tril()[None, None]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    hide = hide & (seen & ~hide).any(-1, keepdim=True)
    return mask.masked_fill(hide, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
