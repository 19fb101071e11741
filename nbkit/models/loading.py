"""Loading a language model: an embedded one, a local folder, or a Hugging Face id.

    lm = load("miniworld-gpt2")
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from nbkit import paths
from nbkit.architectures import Side
from nbkit.errors import ModelError
from nbkit.models.language_model import ORIGIN, LanguageModel, architecture_of, check_finite
from nbkit.records import embedded


def embedded_models() -> list[str]:
    """Names of the models that come with the project."""
    return sorted(folder.parent.name for folder in (paths.DATA / "models").glob("*/config.json"))


def load(
    name: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    side: Side = "decoder",
) -> LanguageModel:
    """Load an embedded model, a local folder, or a Hugging Face id.

    device "auto": the first GPU, else the CPU. dtype "auto": bfloat16 for a bfloat16 checkpoint on a GPU, else
    float32 (a collapsed model overflows float16). Only safetensors are read, and a checkpoint that lacks
    weights or holds NaN is refused: random weights in the gaps would look like a collapse.

    side: of an encoder-decoder (T5), whose keys alone can be read: the "decoder" reads as a language model does, the
    "encoder" sees both ways (models/sides.py). Other models have a decoder only.
    """
    name = str(name)
    place = _place(name)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(place, **source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: neither embedded ({', '.join(embedded_models()) or 'none'}), nor a folder with a "
            f"model of a known type, nor one that could be had from the Hugging Face hub. {error}"
        ) from error
    architecture = architecture_of(config, name, side)  # refuses a model before its weights are read
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = _dtype(dtype, config, device)
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
    _check_bos(lm)
    return lm


def _place(name: str) -> str | Path:
    """What transformers is to load. ModelError for an embedded model that is not there, which no hub has."""
    if name in embedded_models():
        return paths.DATA / "models" / name
    if name in embedded.MODELS and not Path(name).is_dir():
        raise ModelError(
            f"the embedded model {name} is not in {paths.DATA / 'models'}; `make miniworld MODEL={name}` trains it"
        )
    return name


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
