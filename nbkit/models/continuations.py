"""A text and what shall follow it, the target, as tokens: what is read, and where each token of the target is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from nbkit.errors import ModelError
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint
from nbkit.models.prompts import check_length, named, target_ids, tokenize
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class Continuation:
    """A target behind a text. Its last token is only ever predicted, never read."""

    row: list[int]  # the tokens read
    target: list[int]
    predicting: Sequence[int]  # for each token of the target, the token of the row whose logits are of it

    @classmethod
    def of(cls, text: Sequence[int], target: list[int], teacher_forced: bool = True) -> Self:
        """The target's tokens predicted from the text and those of the target before them, or from the text alone."""
        if not teacher_forced:
            return cls(list(text), target, [len(text) - 1] * len(target))
        row = [*text, *target[:-1]]
        return cls(row, target, range(len(text) - 1, len(row)))


def continuations(
    lm: LanguageModel,
    texts: Sequence[str],
    targets: Sequence[str],
    teacher_forced: bool = True,
    end_of_text: bool = False,
) -> list[Continuation]:
    """Of each text, and with `end_of_text` of the tokenizer's end of text behind each target.

    PromptError for an empty text or target, or one beyond the context; ModelError for a tokenizer without such an end.
    """
    if end_of_text and lm.tokenizer.eos_token_id is None:
        raise ModelError(f"{lm.title}: its tokenizer has no end-of-text token to ask for; leave end_of_text out")
    end, asked = [lm.tokenizer.eos_token_id] if end_of_text else [], []
    for text, row, target in zip(texts, tokenize(lm, texts), targets, strict=True):
        asked.append(Continuation.of(row, target_ids(lm, target) + end, teacher_forced))
        check_length(lm, asked[-1].row, text)
    return asked


def wished(
    lm: LanguageModel, requests: Sequence[EditRequest], teacher_forced: bool = True, end_of_text: bool = False
) -> list[Continuation]:
    """The new target of each request behind its prompt, with `end_of_text` the tokenizer's end of text behind it too.

    A PromptError names the request.
    """
    asked = []
    for request in requests:
        with named(request):
            asked += continuations(lm, [request.text], [request.target_new], teacher_forced, end_of_text)
    return asked


def row_bytes(lm: LanguageModel, asked: Sequence[Continuation], lowest: int) -> int:
    """What one row takes, the longest of these, in a pass with gradients back to the layer `lowest`."""
    longest = max((len(each.row) for each in asked), default=1)
    n_logits = max((len(set(each.predicting)) for each in asked), default=1)
    return Footprint(longest, 0, lm.n_layers - lowest, n_logits, backward=True).bytes(lm)
