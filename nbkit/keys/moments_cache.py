"""Second moments on disk: one file a layer, and the partial sums of a call that is not finished.

A file is named by everything that determines what is in it, so a change of the model, an edit applied to it or another
text asks for another file. Files are written whole or not at all.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.errors import PromptError, ResultsError
from nbkit.keys.windows import Place
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_text

SAVE_SECONDS = 60.0  # between two writings of the partial sums, or 20 times as long as one takes


class MomentsCache:
    """The files of one call, for the first `n_tokens` of the texts, None for all."""

    def __init__(
        self, folder: Path, lm: LanguageModel, layers: Sequence[int], texts: Iterable[str], n_tokens: int | None
    ):
        if iter(texts) is texts:
            raise PromptError(
                "a cache is named by the texts, but these can be read only once, as from a generator: give a list, or "
                "an object that begins anew when it is iterated over, or cache=None"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"the second moments cannot be written to {folder}: {error}") from error
        *names, name = _names(lm, texts, [f"{part} {n_tokens}" for part in (*layers, sorted(layers))])
        self._results = {
            layer: folder / f"second_moment-{name}.safetensors" for layer, name in zip(layers, names, strict=True)
        }
        self._partial = folder / f"second_moments-{name}.partial.safetensors"
        self._due = time.monotonic() + SAVE_SECONDS

    def results(self) -> dict[int, Tensor]:
        """The matrices (d_mlp, d_mlp) of those layers that are there."""
        moments = {}
        for layer, path in self._results.items():
            if path.is_file():
                with reading_tensors(path, "second moment", "delete it to have it computed anew") as (tensors, _):
                    moments[layer] = tensors["second_moment"]
        return moments

    def add_result(self, layer: int, matrix: Tensor) -> None:
        write_tensors(self._results[layer], {"second_moment": matrix}, {})

    def partial(self, layers: Sequence[int]) -> tuple[dict[int, Tensor], int, Place] | None:
        """Sums of `layers`, over how many tokens, and up to where; None if there are none, or not of all these."""
        if not self._partial.is_file():
            return None
        with reading_tensors(self._partial, "partial second moment", "delete it to begin anew") as (totals, about):
            n_tokens, place = about["n_tokens"], Place(*about["place"])
        if not {str(layer) for layer in layers} <= totals.keys():
            return None
        return {layer: totals[str(layer)] for layer in layers}, n_tokens, place

    def write_partial_if_due(self, totals: Mapping[int, Tensor], n_tokens: int, place: Place) -> None:
        begin = time.monotonic()
        if begin < self._due:
            return
        by_name = {str(layer): total for layer, total in totals.items()}
        write_tensors(self._partial, by_name, {"n_tokens": n_tokens, "place": place})
        end = time.monotonic()
        self._due = end + max(SAVE_SECONDS, 20 * (end - begin))

    def remove_partial(self) -> None:
        self._partial.unlink(missing_ok=True)


def _names(lm: LanguageModel, texts: Iterable[str], parts: Sequence[str]) -> list[str]:
    """A name for each part, made of it, the model, its tokenizer and the texts, which are read once for all."""
    tokenizer = lm.tokenizer.backend_tokenizer.to_str()
    digests = [hashlib.sha256(f"{lm.hash} {lm.dtype} {part} {tokenizer}".encode()) for part in parts]
    for index, text in enumerate(texts):
        check_text(f"texts[{index}]", text, PromptError, empty=True)
        text_digest = hashlib.sha256(text.encode()).digest()
        for digest in digests:
            digest.update(text_digest)
    return [digest.hexdigest()[:32] for digest in digests]
