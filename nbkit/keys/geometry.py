"""Where the keys lie: how alike they are with and without a prefix, by position and layer, and maps of them.

frame = key_geometry(lm, requests, layer=3)              # one row a request and template
vectors = key_vectors(lm, requests, layer=3)             # k_u, k̄ and C⁻¹k̄ of each request
frame = embed(vectors, groups, method="t-SNE")           # their places in the plane
frame = likeness_by_layer(lm, requests, collapses)       # how like the keys of collapsing requests others are
split_half_agreement(lm, 3, vectors[MEAN], texts)        # how far C⁻¹k̄ hangs on which text C is of
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from nbkit.edits.door import verb
from nbkit.errors import RequestError
from nbkit.keys.extract import keys, token_keys
from nbkit.keys.moments import second_moment
from nbkit.keys.solving import SecondMoments
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import context_templates as sampled_templates
from nbkit.models.prompts import request_columns
from nbkit.records.bars import steps
from nbkit.records.requests import EditRequest

PLAIN, MEAN, SOLVED = "$k_u$", r"$\bar{k}$", r"$C^{-1}\bar{k}$"


def _all_keys(lm: LanguageModel, requests, layer: int, context_templates: Sequence[str] | None) -> np.ndarray:
    templates = sampled_templates(lm, seed=0) if context_templates is None else context_templates
    return keys(lm, requests, layer, templates).double().cpu().numpy()  # (request, template, d_mlp)


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines along the last axis; NaN where a vector is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        product = (left * right).sum(-1)
        return product / (np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1))


@verb
def key_geometry(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, context_templates: Sequence[str] | None = None
) -> pd.DataFrame:
    """Similarity and norm of every request's key behind every template; None samples the templates with seed 0.

    Columns: request (its place), case_id (as text), subject, subject_kind, layer, template (its number), prefix
    ("plain" for template 0, else "prefixed"), similarity (cosine to the request's plain key, 1 for itself), norm.
    """
    every_key = _all_keys(lm, requests, layer, context_templates)
    similarities, norms = _cosine(every_key, every_key[:, :1]), np.linalg.norm(every_key, axis=-1)
    rows = []
    for place, (request, similarity, norm) in enumerate(zip(requests, similarities, norms, strict=True)):
        about = {"request": place, **request_columns(lm, request), "layer": layer}
        for i in range(len(norm)):
            prefix = "prefixed" if i else "plain"
            rows.append({**about, "template": i, "prefix": prefix, "similarity": similarity[i], "norm": norm[i]})
    return pd.DataFrame(rows)


@verb
def key_vectors(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
) -> dict[str, np.ndarray]:
    """What ROME's update is made of, each (request, d_mlp): k_u, k̄, and C⁻¹k̄ if a second moment is given."""
    every_key = _all_keys(lm, requests, layer, context_templates)
    vectors = {PLAIN: every_key[:, 0], MEAN: every_key.mean(1)}
    if second_moment is not None:
        moments = SecondMoments(second_moment, lm)
        solved = [moments.solve(layer, torch.as_tensor(k, device=lm.device)) for k in vectors[MEAN]]
        vectors[SOLVED] = np.stack([vector.cpu().numpy() for vector in solved])
    return vectors


@verb
def split_half_agreement(
    lm: LanguageModel,
    layer: int,
    vectors: Float[np.ndarray, "key d_mlp"],
    texts: Sequence[str],
    n_tokens: int | None = None,
    cache: str | Path | None = None,
    ridge: float = 0.0,
) -> Float[np.ndarray, " key"]:
    """How sure the direction u of C⁻¹k is: its cosine by the second moments of two halves of the text, for each key k.

    Args:
        texts: the first half is every other one, the second those between, so that both are of the same kind. Each
            must hold half of `n_tokens`, or PromptError.
        n_tokens: of the C in question; each half has half of them. None: all.
        cache: as in `second_moment`. ridge: of each half's C, see `solving.with_ridge`.
    """
    half = None if n_tokens is None else n_tokens // 2
    keys_there = torch.as_tensor(vectors, device=lm.device)
    solved = [
        SecondMoments(second_moment(lm, layer, part, half, cache=cache), lm).solve(layer, keys_there, ridge)
        for part in steps((texts[::2], texts[1::2]), f"{lm.title}: second moments of two halves", "half")
    ]
    return _cosine(*(direction.cpu().numpy() for direction in solved))


def second_moment_in_words(
    lm: LanguageModel, n_tokens: int, agreement: Float[np.ndarray, " key"], ridge: float = 0.0
) -> str:
    """How far a C of so many tokens can be trusted, for captions. agreement: of `split_half_agreement`."""
    middle, low = np.quantile(agreement, [0.5, 0.05])
    added = f" and {ridge:g} of its mean eigenvalue added to its diagonal" if ridge else ""
    return (
        f"C of {n_tokens} tokens, {n_tokens / lm.d_mlp:.0f} for each dimension of a key{added}; two halves of them "
        f"give a C⁻¹k̄ with a median cosine of {middle:.3f}, 5 % quantile {low:.3f}"
    )


def embed(
    vectors: Mapping[str, np.ndarray], groups: Sequence[str], method: str = "t-SNE", unit: bool = False, seed: int = 42
) -> pd.DataFrame:
    """All vectors in one plane, for `plots.embedding_scatter`.

    Args:
        vectors: {kind: (request, d)}, as `key_vectors` gives them.
        groups: one name a request.
        method: "t-SNE" (scikit-learn's defaults, as in paper B; at least 4 vectors) or "PCA".
        unit: divides each vector by its norm first, which C⁻¹k̄ needs to be compared with keys of another scale.
        seed: of t-SNE.

    Columns: x, y, vector (its kind), group, request (its place). `attrs["variance"]` of a PCA: the two shares.
    """
    kinds, n = list(vectors), len(groups)
    stacked = np.concatenate([np.asarray(vectors[kind], float) for kind in kinds])
    if len(stacked) != n * len(kinds):
        raise ValueError(f"{n} groups do not fit {len(stacked) // len(kinds)} requests")
    if unit:
        stacked = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    if method == "PCA":
        model = PCA(n_components=2, svd_solver="full")
    elif method == "t-SNE":
        model = TSNE(n_components=2, random_state=seed, perplexity=min(30.0, (len(stacked) - 1) / 3))
    else:
        raise ValueError(f"method {method!r} is unknown: choose t-SNE or PCA")
    x, y = model.fit_transform(stacked).T
    frame = pd.DataFrame({"x": x, "y": y, "vector": np.repeat(kinds, n), "group": list(groups) * len(kinds)})
    frame["request"] = list(range(n)) * len(kinds)
    if method == "PCA":
        frame.attrs["variance"] = model.explained_variance_ratio_.tolist()
    return frame


@verb
def likeness_by_layer(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    chosen: Sequence[bool],
    layers: Sequence[int] | None = None,
    context_templates: Sequence[str] | None = None,
) -> pd.DataFrame:
    """How like the plain keys of the chosen requests (those that collapse, say) other keys are, layer by layer.

    Each cosine is to the mean of the chosen requests' unprefixed keys k_u, each of unit norm; for a chosen request to
    that of the others, so that none is held to itself (NaN where it is the only one). The first tokens of prompts are
    Experiment 4.1 of *The Fall of ROME*, prefixed keys its Experiment 4.2.

    Args:
        chosen: one truth value a request. layers: None is all. context_templates: as in `key_geometry`.

    Columns: case_id (as text), subject, subject_kind, chosen, layer, similarity, and vector: "plain" (k_u), "prefixed"
    (the mean of the keys behind the prefixes), "first token" (of the plain prompt, a BOS not counted).
    """
    about = [request_columns(lm, request) | {"chosen": bool(it)} for request, it in zip(requests, chosen, strict=True)]
    members, first = np.array(chosen, bool), int(lm.architecture.adds_bos)
    if not members.any():
        raise RequestError("no request is chosen, so there is no key to compare with")
    layers, frames = range(lm.n_layers) if layers is None else layers, []
    for layer in steps(layers, f"{lm.title}: keys by layer", "layer"):
        every_key = _all_keys(lm, requests, layer, context_templates)
        of_tokens = token_keys(lm, [request.text for request in requests], layer)
        vectors = {
            "plain": every_key[:, 0],
            "prefixed": every_key[:, 1:].mean(1),
            "first token": np.stack([keys[first].double().cpu().numpy() for keys in of_tokens]),
        }
        unit = every_key[:, 0] / np.linalg.norm(every_key[:, 0], axis=-1, keepdims=True)
        centres = unit[members].sum(0) - np.where(members[:, None], unit, 0)
        if members.sum() == 1:
            centres[members] = np.nan
        for name, vector in vectors.items():
            similar = {"layer": layer, "vector": name, "similarity": _cosine(vector, centres)}
            frames.append(pd.DataFrame(about).assign(**similar))
    return pd.concat(frames, ignore_index=True)


@verb
def position_similarity(
    lm: LanguageModel, texts: Sequence[str], layers: Sequence[int], n_positions: int = 12
) -> pd.DataFrame:
    """How alike the keys of different texts are at the same token position: 1 at position 0 whatever the token is.

    One row per layer, position (BOS included) and pair of neighbouring texts that both reach that far: layer, pair (the
    number of its first text), position, similarity (cosine).
    """
    rows = []
    for layer in layers:
        by_text = [k[:n_positions].double().cpu().numpy() for k in token_keys(lm, texts, layer)]
        for pair, (one, other) in enumerate(zip(by_text, by_text[1:], strict=False)):
            shared, about = min(len(one), len(other)), {"layer": layer, "pair": pair}
            similarities = _cosine(one[:shared], other[:shared])
            rows += [{**about, "position": p, "similarity": s} for p, s in enumerate(similarities)]
    return pd.DataFrame(rows)
