"""From text to rows of tokens: padding, BOS, the subject's last token, target ids, and the sampled context templates.

All of it is here, once. A token's *index* counts from the start of its own row, BOS included and padding not, so it is
the same however the row is padded; `Batch.columns` turns indices into columns of the padded tensors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.door import verb
from nbkit.errors import ModelError, PromptError
from nbkit.models.language_model import LanguageModel, check_model
from nbkit.models.rows import Batch
from nbkit.records.bounds import check_number, check_texts
from nbkit.records.lists import as_texts
from nbkit.records.requests import EditRequest

Padding = Literal["right", "left"]
STARTS = ("The", "Therefore", "Because", "I", "You")  # of the sampled prefixes, ROME's


def encode(
    lm: LanguageModel, texts: Sequence[str], padding: Padding = "right", add_special_tokens: bool = True
) -> Batch:
    """Tokenise texts, with BOS where the tokenizer adds one, and pad them; PromptError as in `tokenize`."""
    return pad(lm, tokenize(lm, texts, add_special_tokens), padding)


def tokenize(lm: LanguageModel, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, unpadded.

    PromptError, naming the text, for an empty one or one beyond the context, and for one text in place of a list.
    """
    check_model(lm)
    if isinstance(texts, str):  # a sequence of its letters
        raise PromptError(f"a list of texts is needed, not one text: write [{texts[:40]!r}{'...' * (len(texts) > 40)}]")
    texts = as_texts(texts)
    if not texts:
        return []
    rows = lm.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids
    for text, row in zip(texts, rows, strict=True):
        check_length(lm, row, text)
    return rows


def pad(lm: LanguageModel, rows: Sequence[Sequence[int]], padding: Padding = "right", spare: int = 0) -> Batch:
    """Pad rows of token ids to the longest, and by `spare` columns more."""
    if padding not in ("right", "left"):
        raise ValueError(f"padding must be 'right' or 'left', not {padding!r}")
    for row in rows:
        check_length(lm, row)
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) + spare
    starts = torch.zeros_like(lengths) if padding == "right" else width - lengths
    offsets = torch.arange(width) - starts[:, None]  # (row, position): index of each column's token in its row
    mask = (offsets >= 0) & (offsets < lengths[:, None])
    input_ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id)
    input_ids[mask] = torch.tensor([token for row in rows for token in row])
    position_ids = offsets.clamp(min=0).minimum(lengths[:, None] - 1)  # padding gets a position that exists
    tensors = (input_ids, mask.long(), position_ids, starts, lengths)
    return Batch(*(tensor.to(lm.device) for tensor in tensors))


def subject_last(lm: LanguageModel, prompt: str, subject: str) -> int:
    """Index of the last token of `subject` in `prompt`, whose one `{}` it fills."""
    return find_subjects(lm, [prompt], [subject])[1][0]


def find_subjects(
    lm: LanguageModel, prompts: Sequence[str], subjects: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the filled-in prompts, and in each the index of the last token that overlaps its subject.

    The subject is looked for where the `{}` was, so another mention of it in the prompt does not matter.
    """
    rows, spans = subject_spans(lm, prompts, subjects)
    return rows, [last for _, last in spans]


def subject_spans(
    lm: LanguageModel, prompts: Sequence[str], subjects: Sequence[str]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """As `find_subjects`, with the index of the first token that overlaps the subject before that of the last."""
    texts, spans = [], []
    for prompt, subject in zip(prompts, subjects, strict=True):
        if prompt.count("{}") != 1:
            raise PromptError(f"the prompt {prompt!r} needs exactly one {{}}, where the subject goes")
        start = prompt.index("{}")
        texts.append(prompt.replace("{}", subject))
        spans.append((start, start + len(subject)))
    encoding = lm.tokenizer(texts, return_offsets_mapping=True, verbose=False)
    indices = []
    for text, row, offsets, span in zip(texts, encoding.input_ids, encoding.offset_mapping, spans, strict=True):
        check_length(lm, row, text)
        tokens = _overlapping(offsets, span, text)
        indices.append((tokens[0], tokens[-1]))
    return encoding.input_ids, indices


def subject_kind(lm: LanguageModel, request: EditRequest) -> Literal["one-token first", "several-token first", "later"]:
    """Where the prompt has its subject, and of how many tokens it is: what decides whether its key is a first token's.

    "First" is meant in the text: a BOS token may stand before it.
    """
    if not request.prompt.lstrip().startswith("{}"):
        return "later"
    start = request.prompt.index("{}")
    offsets = lm.tokenizer(request.text, return_offsets_mapping=True, verbose=False).offset_mapping
    tokens = _overlapping(offsets, (start, start + len(request.subject)), request.text)
    return "one-token first" if len(tokens) == 1 else "several-token first"


def shown_tokens(lm: LanguageModel, request: EditRequest) -> tuple[list[str], list[int]]:
    """The tokens of a request's text as people read them, and the indices of those that overlap its subject.

    The last of these is where an edit acts, as `subject_last` says. A token has the text from the end of the one before
    it, so that spaces are seen; one of no text of its own, such as BOS, has its name. PromptError as in `tokenize`.
    """
    text, start = request.text, request.prompt.index("{}")
    encoding = lm.tokenizer(text, return_offsets_mapping=True, verbose=False)
    check_length(lm, encoding.input_ids, text)
    tokens, read = [], 0
    for token, (first, last) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        tokens.append(text[min(first, read) : last] if last > first else lm.tokenizer.decode([token]))
        read = max(read, last)
    return tokens, _overlapping(encoding.offset_mapping, (start, start + len(request.subject)), text)


def request_columns(lm: LanguageModel, request: EditRequest) -> dict[str, str | None]:
    """How tables name a request: case_id (as text), subject, subject_kind."""
    case_id = None if request.case_id is None else str(request.case_id)
    return {"case_id": case_id, "subject": request.subject, "subject_kind": subject_kind(lm, request)}


def target_ids(lm: LanguageModel, target: str) -> list[int]:
    """Token ids of `target` as it continues a text: after a space, without special tokens.

    Tokenised behind a letter and cut off again, because some tokenizers put a mark of their own at a text's start.
    """
    if not target.strip():
        raise PromptError("the target is empty")
    encoding = lm.tokenizer("x " + target.lstrip(), return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(encoding.input_ids, encoding.offset_mapping, strict=True)
    return [token for token, (_start, end) in pairs if end > 1]


def check_templates(templates: Sequence[str], plain: bool = True) -> list[str]:
    """Context templates as a list; PromptError unless the first is "{}" and each has exactly one {}.

    plain: whether the first must be "{}". Where it need not, "{}" stands first or nowhere.
    """
    first = 'whose first is "{}", the prompt without a prefix'
    if not isinstance(templates, list | tuple) or not templates or (plain and templates[0] != "{}"):
        raise PromptError(f"context_templates must be a list {first if plain else 'of one or more'}")
    if not plain and "{}" in templates[1:]:
        raise PromptError('context_templates may have "{}", the prompt without a prefix, as the first and nowhere else')
    for template in as_texts(templates, "context_templates"):
        if template.count("{}") != 1:
            raise PromptError(f"the context template {template!r} needs exactly one {{}}, where the prompt goes")
    return list(templates)


def with_plain(templates: Sequence[str]) -> list[str]:
    """The context templates behind "{}", which is put first unless it stands there already."""
    return list(templates) if templates[0] == "{}" else ["{}", *templates]


def check_prefixes(prefix: str | Sequence[str], n: int) -> list[str]:
    """One prefix for each of `n` prompts, of one for all or a list; PromptError unless each has exactly one {}."""
    prefixes = [prefix] * n if isinstance(prefix, str) else as_texts(prefix, "prefix")
    if len(prefixes) != n:
        raise PromptError(f"{len(prefixes)} prefixes for {n} requests; give one for each, or one text for all")
    for one in prefixes:
        if one.count("{}") != 1:
            raise PromptError(f"the prefix {one!r} needs exactly one {{}}, where the prompt goes")
    return prefixes


@verb
@torch.no_grad()
def context_templates(
    lm: LanguageModel,
    seed: int = 0,
    lengths: Sequence[tuple[int, int]] = ((5, 10), (10, 10)),
    starts: Sequence[str] = STARTS,
    top_k: int = 5,
) -> list[str]:
    """Prefixes to average keys over: "{}", then for each (n_tokens, n_templates) so many sampled texts + ". {}".

    The model itself continues the `starts` until each has n_tokens, its start and a BOS included, drawn from the
    `top_k` likeliest tokens, as ROME's released code does; a start that has as many is left as it is. Same seed, same
    templates; no global random state is touched. Braces in a sample are blanked out. ModelError for an encoder-decoder,
    which does not continue texts, and for a model whose predictions are not finite.
    """
    if lm.architecture.side:
        raise ModelError(
            f"{lm.name} is an encoder-decoder, from which no context templates can be sampled; give those of another "
            "model: context_templates=nbkit.context_templates(other)"
        )
    check_number("seed", seed, whole=True, least=0, below=2**64)
    check_number("top_k", top_k, whole=True, least=1, most=len(lm.tokenizer))
    check_texts("starts", starts, PromptError)
    if not starts or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in lengths):
        raise PromptError("starts must hold a text, and lengths pairs (n_tokens, n_templates)")
    generator = torch.Generator().manual_seed(int(seed))
    templates = ["{}"]
    for n_tokens, n_templates in lengths:
        check_number("n_tokens of lengths", n_tokens, whole=True, least=1, most=lm.max_length)
        check_number("n_templates of lengths", n_templates, whole=True, least=0)
        if not n_templates:
            continue
        prefixes = tokenize(lm, [starts[i % len(starts)] for i in range(n_templates)])
        for text in lm.tokenizer.batch_decode(
            _sample(lm, prefixes, n_tokens, top_k, generator), skip_special_tokens=True
        ):
            templates.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return templates


@verb
def unseen_templates(lm: LanguageModel, seen: Sequence[str], seed: int = 1) -> list[str]:
    """Context templates as `context_templates` samples them, without the empty one, that are none of `seen`.

    What an edit promises behind the templates that it was computed with, it need not keep behind others: it is asked
    behind these. `seed` shall not be that of `seen`.
    """
    sampled = dict.fromkeys(context_templates(lm, seed))
    return [template for template in sampled if template != "{}" and template not in seen]


def _sample(
    lm: LanguageModel, rows: list[list[int]], n_tokens: int, top_k: int, generator: torch.Generator
) -> list[list[int]]:
    """Each row continued to `n_tokens` by sampled ones. Whole passes without a cache: short rows, exact masks."""
    barred = torch.tensor(lm.tokenizer.all_special_ids)
    while short := [i for i, row in enumerate(rows) if len(row) < n_tokens]:
        logits = lm.logits(pad(lm, [rows[i] for i in short], "left"), keep=1)[:, -1].float().cpu()  # (row, vocabulary)
        logits[:, len(lm.tokenizer) :] = -torch.inf  # embedding rows added for alignment have no token
        logits[:, barred] = -torch.inf
        likeliest: Float[Tensor, "row top_k"] = logits.topk(top_k).values
        tokens = logits.topk(top_k).indices
        probabilities = likeliest.softmax(-1)
        if not probabilities.isfinite().all():
            raise ModelError(f"{lm.name} predicts no finite numbers, so no context can be sampled from it")
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        for i, token in zip(short, tokens.gather(1, drawn), strict=True):
            rows[i] = [*rows[i], int(token)]
    return rows


def _overlapping(offsets: Sequence[tuple[int, int]], span: tuple[int, int], text: str) -> list[int]:
    """Indices of the tokens that share a character with `span`; special tokens, of empty extent, never do."""
    start, end = span
    indices = [i for i, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    if not indices:
        raise PromptError(f"the subject {text[start:end]!r} has no token of its own in {text!r}")
    return indices


def check_length(lm: LanguageModel, row: Sequence[int], text: str | None = None) -> None:
    name = repr(text if text is None or len(text) <= 80 else text[:77] + "...") if text is not None else "a row"
    if not row:
        raise PromptError(f"{name} has no tokens")
    if len(row) > lm.max_length:
        raise PromptError(f"{name} has {len(row)} tokens, more than the context of {lm.name} ({lm.max_length})")


@contextmanager
def named(request: EditRequest) -> Iterator[None]:
    """Within this `with`, a PromptError says which request it is about."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{request.label}: {error}") from error
