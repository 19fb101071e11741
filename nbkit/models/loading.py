"""Loading a language model: an embedded one, a local folder, or a Hugging Face id.

    lm = load("miniworld-gpt2")
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from nbkit.architectures import Side
from nbkit.errors import ModelError
from nbkit.models import kept, saved
from nbkit.models.checkpoint_files import (
    INDEX,
    check_config,
    check_folder,
    check_shards,
    check_tokenizer,
    check_types,
    check_weights,
)
from nbkit.models.devices import device_named, dtype_named
from nbkit.models.language_model import ORIGIN, LanguageModel, architecture_of, check_finite
from nbkit.records import bars, embedded
from nbkit.records.bounds import check_text, shown
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
    float32 (a collapsed model overflows float16). Only safetensors of the model's own folder are read, and a checkpoint
    that lacks weights, holds NaN or is quantised is refused: random weights in the gaps would look like a collapse.
    ModelError for whatever else a file of it says that cannot be; a warning for weights that the model has no use for.

    side: of an encoder-decoder (T5), whose keys alone can be read: the "decoder" reads as a language model does, the
    "encoder" sees both ways (models/sides.py). Other models have a decoder only.
    """
    if not isinstance(name, str | Path):
        raise ModelError(f"a model is given by its name or folder, not by {shown(name)}")
    name = str(name)
    check_text("the name of the model", name, ModelError)
    if revision is not None:
        check_text("revision", revision, ModelError)
    if not isinstance(trust_remote_code, bool):
        raise ModelError(f"trust_remote_code must be True or False, not {shown(trust_remote_code)}")
    if os.path.isdir(name):  # and not Path's, which fails for a name that no file can have
        _complete(Path(name))
    place = embedded.locate_model(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(place, str):
        source |= _asked_once(place, revision)
    else:
        check_folder(place)
    try:
        config = AutoConfig.from_pretrained(place, **source)
    except (OSError, ValueError) as error:
        where = "the folder" if isinstance(place, Path) else "the Hugging Face hub or its local cache"
        raise ModelError(f"no model of a known type for {name!r} in {where}: {error}") from error
    except Exception as error:  # whatever it meets where a field has a value of another type than it expects
        raise ModelError(f"{name}: its config.json cannot be used: {error}") from error
    architecture = architecture_of(config, name, side)  # refuses a model before its weights are read
    check_config(config, name, architecture)
    if isinstance(place, str):
        _check_index_of_hub(place, revision, source.get("local_files_only", False))
    device = device_named(device)
    dtype = dtype_named(dtype, config.dtype, device)
    key = (*kept.state_of(place), revision, trust_remote_code, side, str(device), str(dtype))
    lm = kept.take(key, name, side)
    if lm is not None:
        _check_bos(lm)
        return lm
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **source)
    except Exception as error:  # as above
        raise ModelError(f"{name}: its tokenizer cannot be read, a file is missing or damaged: {error!r}") from error
    kind = AutoModelForSeq2SeqLM if architecture.side else AutoModelForCausalLM
    try:
        with _named_bar(name):
            model, report = kind.from_pretrained(
                place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **source,
            )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"{name}: its weights (model.safetensors) cannot be read, a file is missing or damaged: {error}"
        ) from error
    if isinstance(place, Path):
        check_types(place)
    if unused := check_weights(report, config, name, architecture):
        warnings.warn(unused, stacklevel=2)
    check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], name)
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
    except HFValidationError as error:
        raise ModelError(f"{name!r} can be no id of the Hugging Face hub: {error}") from error
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


def _check_index_of_hub(name: str, revision: str | None, local_files_only: bool) -> None:
    index = cached_file(
        name, INDEX, revision=revision, local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if index is not None:
        check_shards(Path(index), here=False)


@contextmanager
def _named_bar(name: str) -> Iterator[None]:
    """Within this `with`, the bar of transformers for the weights that it reads has its name, and is late."""
    looks = {"desc": f"{Path(name).name}: weights", "unit": "weight", "delay": bars.DELAY}
    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, **looks}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


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
        origin = json.loads(path.read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    check_text(f"{path} is damaged: origin", origin, ModelError)
    return origin


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
