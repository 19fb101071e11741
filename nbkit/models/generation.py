"""Text that the model goes on with by itself: greedy, until it ends the text or has said so many tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from nbkit.edits.door import verb
from nbkit.edits.interrupts import Guarded, swapped
from nbkit.errors import PromptError
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import by_cost, in_order
from nbkit.models.prompts import pad, tokenize
from nbkit.records.bounds import check_number


@dataclass(frozen=True)
class Generated:
    """How a model went on after a prompt, and whether it ended the text itself.

    text: what is behind the prompt, its leading space included; special tokens are left out.
    """

    text: str
    ended: bool


@verb
@torch.no_grad()
def generated(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_tokens: int = 50,
    batch_size: int = 64,
    end: str | None = None,
    progress: bool = True,
) -> list[Generated]:
    """The likeliest next token, again and again, after each prompt: up to `max_tokens`, or the model's end of text.

    By the model as it is, in order. Nothing of the model's own generation settings counts but its ends of text.
    end: a text that counts as an end too, from which on nothing is kept, as a line break of a model of lines.
    PromptError for a prompt that leaves no room for so many tokens in the context.
    """
    lm.check_causal()
    check_number("max_tokens", max_tokens, whole=True, least=1)
    check_number("batch_size", batch_size, whole=True, least=1)
    if end is not None and (not isinstance(end, str) or not end):
        raise PromptError(f"end must be a text of one character or more, or None, not {end!r}")
    rows = tokenize(lm, prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) + max_tokens > lm.max_length:
            raise PromptError(
                f"{prompt!r} has {len(row)} tokens, after which the context of {lm.name} ({lm.max_length}) has no room "
                f"for {max_tokens} more; ask for fewer (max_tokens)"
            )
    ends = _ends_of_text(lm)

    def compute(places: Sequence[int]) -> list[Generated]:
        batch = pad(lm, [rows[place] for place in places], "left")
        with _plainly(lm, max_tokens, ends):
            ids = lm.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        new = ids[:, batch.shape[1] :].tolist()
        return [_read(lm, rows[place], said, ends, end) for place, said in zip(places, new, strict=True)]

    lengths, name = [len(row) for row in rows], f"{lm.title}: generation"
    return in_order(by_cost(lengths, batch_size, compute, name, "text", progress))


def _ends_of_text(lm: LanguageModel) -> list[int]:
    """Tokens that end a text: those of the model's generation settings and of its tokenizer."""
    of_model = lm.model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*of_model, lm.tokenizer.eos_token_id) if end is not None})


def _plainly(lm: LanguageModel, max_tokens: int, ends: list[int]) -> Guarded:
    """Within this `with`, the model generates greedily. Its own settings, which `generate` takes for whatever a call
    does not say (penalties, sampling), are set aside."""
    plain = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=lm.tokenizer.pad_token_id,
        eos_token_id=ends or None,
    )
    return swapped(lm.model, "generation_config", plain)


def _read(lm: LanguageModel, prompt: list[int], said: list[int], ends: list[int], end: str | None) -> Generated:
    n = next((place for place, token in enumerate(said) if token in ends), len(said))
    # Decoded with the prompt: some tokenizers drop the space that a text of its own would begin with.
    before, whole = (lm.tokenizer.decode(row, skip_special_tokens=True) for row in (prompt, prompt + said[:n]))
    text, mark, _ = whole[len(before) :].partition(end) if end else (whole[len(before) :], "", "")
    return Generated(text, bool(mark) or n < len(said))
