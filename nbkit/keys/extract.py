"""Keys and values: what the MLP's output projection reads and writes at chosen tokens.

The key k (d_mlp) is the projection's input, the value W k + b (d_model) its output. A pass ends at the layer asked for,
and gives float32 numbers, or float64 ones from a float64 model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from nbkit.models.blocks import projection_pass
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget, in_batches
from nbkit.models.prompts import Padding, check_templates, find_subjects, named, pad, tokenize
from nbkit.models.replay import FirstPass, Prefixes, can_replay
from nbkit.records.requests import EditRequest

REQUESTS_AT_ONCE = 512  # on a GPU: more does not make it faster


@dataclass(frozen=True)
class KeyPass:
    """Keys and values at one token of each prompt, from one pass."""

    keys: Float[Tensor, "*prompt d_mlp"]
    values: Float[Tensor, "*prompt d_model"]


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


def keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int,
    context_templates: Sequence[str] = ("{}",),
    progress: bool = False,
) -> Float[Tensor, "request template d_mlp"]:
    """Keys at the subject's last token, of every request behind every template (k_u is template 0's, k̄ their mean).

    The templates' own texts are read once for all requests. `keys_and_values` gives the same, text by text.
    """
    templates = check_templates(context_templates)
    dtype = torch.promote_types(lm.dtype, torch.float32)
    found = torch.empty(len(requests), len(templates), lm.d_mlp, dtype=dtype, device=lm.device)
    for places, batch in keys_in_contexts(lm, requests, layer, templates, progress):
        found[places] = batch.keys
    return found


def keys_in_contexts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int,
    context_templates: Sequence[str],
    progress: bool = False,
) -> Iterator[tuple[list[int], KeyPass]]:
    """Keys (request, template, d_mlp) and values (request, template, d_model), a batch of requests at a time.

    How many requests are in a batch is for memory to say, and prompts of like length share one, so each batch comes
    with its requests' places in the list.
    """
    templates = check_templates(context_templates)
    lm.check_layer(layer)
    prefixes = Prefixes(lm, templates) if can_replay(lm) else None
    prompts = [in_contexts(request, templates) for request in requests]
    longest = max((len(request.text) for request in requests), default=0)  # in characters: at least so many tokens
    row = Footprint(min(longest + 1, lm.max_length), 0, 1, 0, backward=False)
    size = min(budget(lm.device) // (len(templates) * row.bytes(lm)), REQUESTS_AT_ONCE)

    @torch.no_grad()
    def compute(places: Sequence[int]) -> tuple[list[int], KeyPass]:
        rows, indices = [], []
        for place in places:
            with named(requests[place]):
                found = find_subjects(lm, prompts[place], [requests[place].subject] * len(templates))
            rows += found[0]
            indices += found[1]
        if prefixes is None:
            found = _whole_pass(lm, rows, indices, layer)
        else:
            # What follows the subject does not reach its key.
            rows = [row[: index + 1] for row, index in zip(rows, indices, strict=True)]
            of_template = list(range(len(templates))) * len(places)
            found = FirstPass(lm, layer, rows, indices, of_template, prefixes, only_keys=True)
        shape = len(places), len(templates)
        batch = KeyPass(widened(found.keys).unflatten(0, shape), widened(found.values).unflatten(0, shape))
        return list(places), batch

    def until_key(place: int) -> int:
        return len(requests[place].prompt.split("{}")[0]) + len(requests[place].subject)  # characters

    order = sorted(range(len(requests)), key=until_key)
    with tqdm(total=len(requests), desc="keys", unit="request", disable=not progress) as bar:
        for places, batch in in_batches(order, size, compute):
            bar.update(len(places))
            yield places, batch


def in_contexts(request: EditRequest, templates: Sequence[str]) -> list[str]:
    """The request's prompt, still with its {}, behind each template's prefix."""
    return [template.replace("{}", request.prompt) for template in templates]


def token_keys(
    lm: LanguageModel, texts: Sequence[str], layer: int, batch_size: int = 64, padding: Padding = "right"
) -> list[Float[Tensor, "token d_mlp"]]:
    """The keys of every token of each text (BOS included, padding not), one tensor a text."""
    rows = tokenize(lm, texts)
    found = []
    for first in range(0, len(rows), batch_size):
        batch = pad(lm, rows[first : first + batch_size], padding)
        batch_keys, _ = projection_pass(lm, batch, layer)
        found.extend(widened(keys[mask.bool()]) for keys, mask in zip(batch_keys, batch.attention_mask, strict=True))
    return found


def widened(tensor: Tensor) -> Tensor:
    """At least float32: vectors are averaged, compared and solved for, which half precision is too coarse for."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
