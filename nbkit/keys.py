"""Keys and values: what the MLP's output projection reads and writes at chosen tokens.

The key k (d_mlp) is the projection's input, the value W k + b (d_model) its output. A pass ends at the layer asked for,
and gives float32 numbers, or float64 ones from a float64 model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.hooks import capture
from nbkit.models import LanguageModel
from nbkit.prompts import Batch, Padding, check_templates, find_subjects, named, pad, tokenize
from nbkit.requests import EditRequest


@dataclass(frozen=True)
class KeyPass:
    """Keys and values at one token of each prompt, from one pass."""

    keys: Float[Tensor, "prompt d_mlp"]
    values: Float[Tensor, "prompt d_model"]


def keys_and_values(
    lm: LanguageModel,
    prompts: Sequence[str],
    subjects: Sequence[str],
    layer: int,
    batch_size: int = 64,
    padding: Padding = "right",
) -> KeyPass:
    """Key and value of `layer` at the last token of each prompt's subject; every prompt has one {} for its subject."""
    rows, indices = find_subjects(lm, prompts, subjects)
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
    batch_size: int = 64,
    padding: Padding = "right",
) -> Float[Tensor, "request template d_mlp"]:
    """Keys at the subject's last token, of every request behind every template (k_u is template 0's, k̄ their mean)."""
    templates = check_templates(context_templates)
    lm.check_layer(layer)
    for request in requests:  # tokenised here only so that an unusable prompt is reported by its request
        with named(request):
            find_subjects(lm, in_contexts(request, templates), [request.subject] * len(templates))
    prompts = [prompt for request in requests for prompt in in_contexts(request, templates)]
    subjects = [request.subject for request in requests for _ in templates]
    return keys_and_values(lm, prompts, subjects, layer, batch_size, padding).keys.unflatten(0, (len(requests), -1))


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


@torch.no_grad()
def projection_pass(
    lm: LanguageModel, batch: Batch, layer: int
) -> tuple[Float[Tensor, "row position d_mlp"], Float[Tensor, "row position d_model"]]:
    """One forward pass up to the projection of `layer`: its input and its output everywhere, padding included."""
    projection = lm.projection(layer)
    with capture(projection, "input", shape=batch.shape) as key:
        with capture(projection, "output", shape=batch.shape, stop=True) as value:
            lm.logits(batch, keep=1)
    return key.value, value.value


def widened(tensor: Tensor) -> Tensor:
    """At least float32: vectors are averaged, compared and solved for, which half precision is too coarse for."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
