"""Second moments on disk: one file a layer, and the partial sums of a call that is not finished.

A file is named by everything that determines what is in it, so a change of the model, an edit applied to it or another
text asks for another file. Files are written whole or not at all.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nbkit.errors import PromptError, ResultsError
from nbkit.models.language_model import LanguageModel
from nbkit.records.files import write_atomically

SAVE_SECONDS = 60.0  # between two writings of the partial sums, or 20 times as long as one takes


class MomentsCache:
    """The files of one call. `options`: what else than model, layer and texts determines the result, as a text."""

    def __init__(self, folder: Path, lm: LanguageModel, layers: Sequence[int], texts: Iterable[str], options: str):
        if iter(texts) is texts:
            raise PromptError(
                "a cache is named by the texts, but these can be read only once, as from a generator: give a list, or "
                "an object that begins anew when it is iterated over, or cache=None"
            )
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        *names, name = _names(lm, texts, [f"{part} {options}" for part in (*layers, sorted(layers))])
        self._results = {
            layer: folder / f"second_moment-{name}.safetensors" for layer, name in zip(layers, names, strict=True)
        }
        self._partial = folder / f"second_moments-{name}.partial.safetensors"
        self._due = time.monotonic() + SAVE_SECONDS

    def result(self, layer: int) -> tuple[Tensor, list] | None:
        """The layer's matrix (d_mlp, d_mlp) and the checks it was stored with; None if it is not there."""
        path = self._results[layer]
        if not path.is_file():
            return None
        with _opened(path, "second moment", "have it computed anew") as file:
            return file.get_tensor("second_moment"), json.loads((file.metadata() or {}).get("checks", "[]"))

    def add_result(self, layer: int, matrix: Tensor, checks: Sequence) -> None:
        _write(self._results[layer], {"second_moment": matrix}, {"checks": checks})

    def partial(self, layers: Sequence[int]) -> tuple[dict[int, Tensor], dict[str, Any]] | None:
        """Sums of `layers` and what was kept with them; None if there are none, or not of all these layers."""
        if not self._partial.is_file():
            return None
        with _opened(self._partial, "partial second moment", "begin anew") as file:
            if not {str(layer) for layer in layers} <= set(file.keys()):
                return None
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            return {layer: file.get_tensor(str(layer)) for layer in layers}, about

    def write_partial_if_due(self, totals: Mapping[int, Tensor], about: Mapping[str, Any]) -> None:
        begin = time.monotonic()
        if begin < self._due:
            return
        _write(self._partial, {str(layer): total for layer, total in totals.items()}, about)
        end = time.monotonic()
        self._due = end + max(SAVE_SECONDS, 20 * (end - begin))

    def remove_partial(self) -> None:
        self._partial.unlink(missing_ok=True)


def _names(lm: LanguageModel, texts: Iterable[str], parts: Sequence[str]) -> list[str]:
    """A name for each part, made of it, the model, its tokenizer and the texts, which are read once for all."""
    tokenizer = lm.tokenizer.backend_tokenizer.to_str()
    digests = [hashlib.sha256(f"{lm.hash} {lm.dtype} {part} {tokenizer}".encode()) for part in parts]
    for text in texts:
        text_digest = hashlib.sha256(text.encode()).digest()
        for digest in digests:
            digest.update(text_digest)
    return [digest.hexdigest()[:32] for digest in digests]


@contextmanager
def _opened(path: Path, what: str, purpose: str) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise ResultsError(f"the stored {what} {path} is damaged; delete it to {purpose}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResultsError(f"the second moment cannot be written to {path}: {error}") from error


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    with _writing(path):
        write_atomically(path, lambda file: _write_safetensors(file, tensors, about))


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """The format of safetensors for float64, one tensor at a time: the sums of all layers may fill a GPU's memory, and
    `safetensors.torch.save` would hold them twice over in the computer's.
    """
    header, end = {"__metadata__": {name: json.dumps(value) for name, value in about.items()}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.cpu().contiguous().numpy().data)
