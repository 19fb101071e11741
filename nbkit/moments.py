"""The second moment of the keys, C = E[k kᵀ], not centred, over ordinary text: streamed, in float64.

What ROME's u = C⁻¹ k̄ needs:

    C = second_moment(lm, layer=3, texts=texts, n_tokens=100_000, cache=paths.RUNS / "moments")
    u = SecondMoments(C, lm).solve(3, key)           # by a Cholesky factor, never by an inverse

Every token counts alike; of each text the first ones are keys of position 0, as in the papers' statistics.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from nbkit.errors import MethodError, PromptError, ResultsError
from nbkit.files import write_atomically
from nbkit.keys import projection_pass
from nbkit.models import LanguageModel
from nbkit.prompts import pad


def second_moment(
    lm: LanguageModel,
    layer: int,
    texts: Sequence[str],
    n_tokens: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "d_mlp d_mlp"]:
    """E[k kᵀ] of `layer` over the tokens of `texts`, float64, on the model's device.

    Texts are tokenised as everywhere (BOS where the tokenizer adds one); one longer than the context is read in
    windows. `n_tokens`: exactly so many, the first; PromptError if the texts hold fewer. `cache`: a folder where the
    result is kept under a name made of all that determines it, and found again. The model is not changed.
    """
    if isinstance(texts, str):
        raise PromptError("texts must be a list of texts, not one text")
    lm.check_layer(layer)
    path = None
    if cache is not None:
        path = Path(cache).expanduser() / f"second_moment-{_name(lm, layer, texts, n_tokens)}.safetensors"
        if path.is_file():
            return _read(path).to(lm.device)
    rows = _windows(lm, texts, n_tokens)
    total = torch.zeros(lm.d_mlp, lm.d_mlp, dtype=torch.float64, device=lm.device)
    for first in tqdm(range(0, len(rows), batch_size), desc=f"second moment, layer {layer}", disable=not progress):
        batch = pad(lm, rows[first : first + batch_size])
        keys, _ = projection_pass(lm, batch, layer)
        keys = keys[batch.attention_mask.bool()].double()  # (token, d_mlp)
        total += keys.T @ keys
    total /= sum(len(row) for row in rows)
    if path is not None:
        _write(total.cpu(), path)
    return total


def factor(second_moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Lower Cholesky factor L of C = L Lᵀ in float64. MethodError if C is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(second_moment.double())
    if info.item() or not lower.isfinite().all():
        raise MethodError(
            f"the second moment ({second_moment.shape[0]} × {second_moment.shape[0]}) cannot be solved with: it is not "
            "positive definite. It needs more tokens, several times as many as it has rows"
        )
    return lower


class SecondMoments:
    """The second moments an edit was given, by layer, each factored once when first needed.

    `given`: None, one matrix (meant for whichever layer is asked for), or {layer: matrix}; NumPy arrays will do.
    """

    def __init__(self, given: Tensor | np.ndarray | Mapping[int, Tensor] | None, lm: LanguageModel):
        self._lm = lm
        self._given = given
        self._factors: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        return self._given is not None

    def solve(self, layer: int, vector: Float[Tensor, " d_mlp"]) -> Float[Tensor, " d_mlp"]:
        """C⁻¹ vector, in float64."""
        if layer not in self._factors:
            self._factors[layer] = factor(self._matrix(layer))
        return torch.cholesky_solve(vector.double()[:, None], self._factors[layer])[:, 0]

    def _matrix(self, layer: int) -> Tensor:
        matrix = self._given
        if isinstance(matrix, Mapping):
            if layer not in matrix:
                raise MethodError(f"no second moment is given for layer {layer}, only for {sorted(matrix)}")
            matrix = matrix[layer]
        matrix = torch.as_tensor(matrix, device=self._lm.device)
        expected = (self._lm.d_mlp, self._lm.d_mlp)
        if tuple(matrix.shape) != expected:
            raise MethodError(
                f"the second moment of {self._lm.name} must be {expected}, not {tuple(matrix.shape)}; "
                "is it another model's?"
            )
        return matrix


def _windows(lm: LanguageModel, texts: Sequence[str], n_tokens: int | None) -> list[list[int]]:
    """Rows of at most a context's tokens, together exactly `n_tokens` if that is given."""
    rows, n_left = [], n_tokens
    for text in texts:
        ids = lm.tokenizer(text, verbose=False).input_ids[:n_left]
        rows += [ids[first : first + lm.max_length] for first in range(0, len(ids), lm.max_length)]
        if n_left is not None:
            n_left -= len(ids)
            if n_left <= 0:
                return rows
    if n_left:
        raise PromptError(f"{n_tokens} tokens are asked for, but the texts hold only {n_tokens - n_left}")
    if not rows:
        raise PromptError("the texts for the second moment hold no tokens")
    return rows


def _name(lm: LanguageModel, layer: int, texts: Sequence[str], n_tokens: int | None) -> str:
    digest = hashlib.sha256(
        f"{lm.hash} {lm.dtype} {layer} {n_tokens} {lm.tokenizer.backend_tokenizer.to_str()}".encode()
    )
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["second_moment"]
    except (SafetensorError, KeyError) as error:
        raise ResultsError(f"the stored second moment {path} is damaged; delete it to have it computed anew") from error


def _write(matrix: Tensor, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(save({"second_moment": matrix.contiguous()})))
    except OSError as error:
        raise ResultsError(f"the second moment cannot be written to {path}: {error}") from error
