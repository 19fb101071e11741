"""Loading a language model: an embedded one, a local folder, or a Hugging Face id.

    lm = load("miniworld-gpt2")
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from nbkit.architectures import Side
from nbkit.errors import ModelError
from nbkit.models import kept, saved
from nbkit.models.language_model import ORIGIN, LanguageModel, architecture_of, check_finite
from nbkit.records import embedded
from nbkit.records.embedded import embedded_models

__all__ = ["embedded_models", "load"]


def load(
    name: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    side: Side = "decoder",
) -> LanguageModel:
    """Load an embedded model, a local folder, or a Hugging Face id.

    They are looked for in this order; a name that is none of them is refused without asking the hub, and an id is
    asked for once (`embedded.locate_model`, with the nearest names in the message).

    device "auto": the first GPU, else the CPU. dtype "auto": bfloat16 for a bfloat16 checkpoint on a GPU, else
    float32 (a collapsed model overflows float16). Only safetensors are read, and a checkpoint that lacks
    weights or holds NaN is refused: random weights in the gaps would look like a collapse.

    side: of an encoder-decoder (T5), whose keys alone can be read: the "decoder" reads as a language model does, the
    "encoder" sees both ways (models/sides.py). Other models have a decoder only.
    """
    name = str(name)
    if Path(name).is_dir():
        _complete(Path(name))
    place = embedded.locate_model(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(place, str):
        source |= _asked_once(place, revision)
    try:
        config = AutoConfig.from_pretrained(place, **source)
    except (OSError, ValueError) as error:
        where = "the folder" if isinstance(place, Path) else "the Hugging Face hub or its local cache"
        raise ModelError(f"no model of a known type for {name!r} in {where}: {error}") from error
    architecture = architecture_of(config, name, side)  # refuses a model before its weights are read
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = _dtype(dtype, config, device)
    key = (*kept.state_of(place), revision, trust_remote_code, side, str(device), str(dtype))
    lm = kept.take(key, name, side)
    if lm is not None:
        _check_bos(lm)
        return lm
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **source)
        kind = AutoModelForSeq2SeqLM if architecture.side else AutoModelForCausalLM
        model, report = kind.from_pretrained(
            place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{name}: its tokenizer or weights cannot be read, a file is missing or damaged: {error}"
        ) from error
    if report["missing_keys"]:
        raise ModelError(f"{name}: its files lack the weights {', '.join(sorted(report['missing_keys']))}")
    check_finite(model, name, "the file is damaged")
    _align(model)
    lm = LanguageModel.wrap(model.to(device), tokenizer, name, side)
    lm.origin = _origin(Path(place) / ORIGIN)
    kept.lend(key, lm)
    _check_bos(lm)
    return lm


def _asked_once(name: str, revision: str | None) -> dict[str, bool]:
    """How transformers is to look for an id of the hub: {"local_files_only": True} where the hub is out of reach.

    transformers itself asks six times for each file of a model. ModelError for an id that the hub does not have, and
    for one that is neither in the local cache nor to be had.
    """
    cached = name in embedded.cached_models()
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except GatedRepoError:  # transformers says best what to do
        return {}
    except RepositoryNotFoundError as error:
        if cached:
            return {"local_files_only": True}
        raise ModelError(
            f"the Hugging Face hub has no model {name!r}, or it is private and no token is set"
            f"{embedded.nearest_models(name)}"
        ) from error
    except HfHubHTTPError:  # it answered: what is amiss (a file, a revision) transformers says too
        return {}
    except (HTTPError, OfflineModeIsEnabled) as error:  # no connection
        if not cached:
            raise ModelError(
                f"{name!r} is neither an embedded model nor a folder here, nor in the local cache of the Hugging Face "
                f"hub, which is out of reach ({error}){embedded.nearest_models(name)}"
            ) from error
        return {"local_files_only": True}
    return {}


def _complete(folder: Path) -> None:
    try:
        saved.complete(folder)
    except OSError as error:
        raise ModelError(
            f"a model was being saved to {folder} when that was cut short, and its files cannot be moved to their "
            f"places now ({error}); make the folder writable, or move what is in {folder / saved.WHOLE} there by hand"
        ) from error


def _origin(path: Path) -> str | None:
    """What a model that `LanguageModel.save` wrote was before; None for others. ModelError for a damaged file."""
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["origin"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error


def _dtype(dtype: str | torch.dtype, config, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and config.dtype == torch.bfloat16 else torch.float32
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"unknown dtype {dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float64'")
    return getattr(torch, dtype)


def _check_bos(lm: LanguageModel) -> None:
    """Warn when the tokenizer does not do what its family does: the token at position 0 changes every edit."""
    adds_bos = lm.tokenizer("a").input_ids[0] != lm.tokenizer("a", add_special_tokens=False).input_ids[0]
    if adds_bos != lm.architecture.adds_bos:
        habit = "puts no token before a text" if not adds_bos else "puts a token before each text"
        warnings.warn(f"the tokenizer of {lm.name} {habit}, unlike its family's ({lm.config.model_type})", stacklevel=3)


def _align(model: PreTrainedModel) -> None:
    """Moves weights to where the allocator would put them. A file's are mapped as they lie in it, and a product of
    matrices differs in its last bit with their alignment: a saved model would differ from its copy in memory."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
