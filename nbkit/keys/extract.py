"""Keys and values: what the MLP's output projection reads and writes at chosen tokens.

The key k (d_mlp) is the projection's input, the value W k + b (d_model) its output. A pass ends at the layer asked for,
and gives float32 numbers, or float64 ones from a float64 model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.door import verb
from nbkit.models.blocks import Wanted
from nbkit.models.calls import projection_pass
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget, by_cost
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import Padding, check_templates, find_subjects, named, pad, tokenize
from nbkit.models.replay import can_replay
from nbkit.models.rows import EditedRows
from nbkit.records.requests import EditRequest

REQUESTS_AT_ONCE = 512  # on a GPU: more does not make it faster


@dataclass(frozen=True)
class KeyPass:
    """Keys and values at one token of each prompt, from one pass."""

    keys: Float[Tensor, "*prompt d_mlp"]
    values: Float[Tensor, "*prompt d_model"]


@verb
def keys_and_values(
    lm: LanguageModel,
    prompts: Sequence[str],
    subjects: Sequence[str],
    layer: int,
    batch_size: int = 64,
    padding: Padding = "right",
) -> KeyPass:
    """Key and value of `layer` at the last token of each prompt's subject; every prompt has one {} for its subject."""
    return _whole_pass(lm, *find_subjects(lm, prompts, subjects), layer, batch_size, padding)


def _whole_pass(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    indices: Sequence[int],
    layer: int,
    batch_size: int = 64,
    padding: Padding = "right",
) -> KeyPass:
    keys, values = [], []
    for first in range(0, len(rows), batch_size):
        batch = pad(lm, rows[first : first + batch_size], padding)
        batch_keys, batch_values = projection_pass(lm, batch, layer)
        at = torch.arange(batch.shape[0], device=lm.device), batch.columns(indices[first : first + batch_size])
        keys.append(batch_keys[at])
        values.append(batch_values[at])
    return KeyPass(widened(torch.cat(keys)), widened(torch.cat(values)))


@verb
def keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int,
    context_templates: Sequence[str] = ("{}",),
    progress: bool = True,
) -> Float[Tensor, "request template d_mlp"]:
    """Keys at the subject's last token, of every request behind every template (k_u is template 0's, k̄ their mean).

    The templates' own texts are read once for all requests. `keys_and_values` gives the same, text by text.
    """
    templates = check_templates(context_templates)
    dtype = torch.promote_types(lm.dtype, torch.float32)
    all_keys = torch.empty(len(requests), len(templates), lm.d_mlp, dtype=dtype, device=lm.device)
    for places, batch in keys_in_contexts(lm, requests, layer, templates, progress):
        all_keys[places] = batch.keys
    return all_keys


@verb
def keys_in_contexts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int,
    context_templates: Sequence[str],
    progress: bool = True,
) -> Iterator[tuple[list[int], KeyPass]]:
    """Keys (request, template, d_mlp) and values (request, template, d_model), a batch of requests at a time.

    How many requests are in a batch is for memory to say, and prompts of like length share one, so each batch comes
    with its requests' places in the list.
    """
    templates = check_templates(context_templates)
    lm.check_layer(layer)
    prefixes = Prefixes.of_templates(lm, templates) if can_replay(lm) else None
    longest = max((len(request.text) for request in requests), default=0)  # in characters: at least so many tokens
    row = Footprint(min(longest + 1, lm.max_length), 0, 1, 0, backward=False)
    size = min(budget(lm.device) // (len(templates) * row.bytes(lm)), REQUESTS_AT_ONCE)

    @torch.no_grad()
    def compute(places: Sequence[int]) -> KeyPass:
        rows, indices = [], []
        for request in (requests[place] for place in places):
            with named(request):
                of_request = find_subjects(lm, in_contexts(request, templates), [request.subject] * len(templates))
            rows += of_request[0]
            indices += of_request[1]
        if prefixes is None:
            both = _whole_pass(lm, rows, indices, layer)
        else:
            # What follows the subject does not reach its key.
            rows = [row[: index + 1] for row, index in zip(rows, indices, strict=True)]
            of_keys = EditedRows(rows, indices, templates=[*range(len(templates))] * len(places))
            part, at, hidden = prefixes.read_on(of_keys, range(layer))
            both = Wanted(part, at).watched(layer, hidden)
        shape = len(places), len(templates), -1
        return KeyPass(widened(both.keys).reshape(shape), widened(both.values).reshape(shape))

    until_key = [len(request.prompt.split("{}")[0]) + len(request.subject) for request in requests]  # characters
    yield from by_cost(until_key, size, compute, f"{lm.title}: keys", "request", progress)


@verb
@torch.no_grad()
def later_keys(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, context_templates: Sequence[str]
) -> Float[Tensor, "request d_mlp"]:
    """The mean key of each subject's last token behind the prefixes, with the very tokens that its plain prompt has.

    Behind a space many tokenizers write a word with another token; here only what stands before it is another. The
    empty prefix is left out, and a BOS is not repeated. On CPU.
    """
    special = set(lm.tokenizer.all_special_ids)
    prefixes = [template.split("{}")[0].rstrip() for template in context_templates if template != "{}"]
    before, means = tokenize(lm, prefixes), []
    rows, indices = find_subjects(lm, [r.prompt for r in requests], [r.subject for r in requests])
    for row, index in zip(rows, indices, strict=True):
        own = [token for token in row[: index + 1] if token not in special]
        batch = pad(lm, [prefix + own for prefix in before])
        of_row, _ = projection_pass(lm, batch, layer)
        at = torch.arange(len(before), device=lm.device), batch.lengths - 1
        means.append(widened(of_row[at]).mean(0).cpu())
    return torch.stack(means)


def in_contexts(request: EditRequest, templates: Sequence[str]) -> list[str]:
    """The request's prompt, still with its {}, behind each template's prefix."""
    return [template.replace("{}", request.prompt) for template in templates]


@verb
def token_keys(
    lm: LanguageModel, texts: Sequence[str], layer: int, batch_size: int = 64, padding: Padding = "right"
) -> list[Float[Tensor, "token d_mlp"]]:
    """The keys of every token of each text (BOS included, padding not), one tensor a text."""
    rows = tokenize(lm, texts)
    by_text = []
    for first in range(0, len(rows), batch_size):
        batch = pad(lm, rows[first : first + batch_size], padding)
        batch_keys, _ = projection_pass(lm, batch, layer)
        by_text += [widened(keys[mask.bool()]) for keys, mask in zip(batch_keys, batch.attention_mask, strict=True)]
    return by_text


def widened(tensor: Tensor) -> Tensor:
    """At least float32: vectors are averaged, compared and solved for, which half precision is too coarse for."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
