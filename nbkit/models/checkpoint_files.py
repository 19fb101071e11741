"""What is checked of a checkpoint besides what transformers checks, which reads on where a file says what cannot be.

`check_folder` before a folder is read, `check_config` before weights are, `check_weights` of what was found in them.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from nbkit.architectures import Architecture
from nbkit.errors import ModelError
from nbkit.models.devices import DTYPES
from nbkit.records.bounds import shown

INDEX = "model.safetensors.index.json"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors name them
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_folder(folder: Path) -> None:
    """ModelError for a JSON file that is damaged, a dtype that nobody knows, and weights that are no safetensors."""
    content = {name: _object(folder / name) for name in OBJECTS if (folder / name).is_file()}
    config = content["config.json"]
    where = folder / "config.json"
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None and str(config[name]).removeprefix("torch.") not in (*DTYPES, "auto"):
            raise ModelError(f"{where}: unknown {name} {shown(config[name])}; known: {', '.join(DTYPES)}")
    if not isinstance(config.get("model_type", ""), str):
        raise ModelError(f"{where}: model_type must be a text, not {shown(config['model_type'])}")
    if config.get("quantization_config") is not None:
        raise ModelError(_quantised(str(folder)))
    if not (folder / "model.safetensors").is_file() and INDEX in content:
        check_shards(folder / INDEX, content[INDEX])


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged, or no JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object with named fields, not {shown(value)}")
    return value


def check_shards(index: Path, content: Mapping[str, Any] | None = None, here: bool = True) -> None:
    """ModelError for an index of weights that names other files than safetensors beside it. here: they must be there,
    which those of the hub are not yet."""
    weight_map = (_object(index) if content is None else content).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map that says which file each weight is in")
    for weight, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index} has {weight} in {shown(file)}; only safetensors are read, and only from the model's folder"
            )
        if here and not (index.parent / file).is_file():
            raise ModelError(f"{index} has {weight} in {file}, which is not there: a part of the download is missing")


def check_types(folder: Path) -> None:
    """ModelError for a matrix of whole numbers or truth values in the folder's weights, which would be read as it is.
    The files have been read, so they are no others and no damaged ones."""
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else {folder / file for file in _object(folder / INDEX)["weight_map"].values()}
    for file in files:
        with safe_open(file, "pt") as held:
            for name in held.keys():
                kind = held.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind not in FLOATS:
                    raise ModelError(f"{file} has {name} in {kind}, and weights are in {', '.join(FLOATS)}: quantised?")


def check_config(config: PreTrainedConfig, name: str, architecture: Architecture) -> None:
    """ModelError for sizes and activations that no model can have, and for quantised weights."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(_quantised(name))
    text = config.get_text_config()
    for field in SIZES:
        value = getattr(text, field, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            where = f"{name}: {_own(text, field)} in config.json"
            raise ModelError(f"{where} must be a whole number from 1 on, not {value!r}")
    for field in ACTIVATIONS:
        value = getattr(text, field, None)
        if value is not None and value not in ACT2FN:
            raise ModelError(f"{name}: {_own(text, field)} in config.json is the unknown activation {value!r}")
    for field, value in text.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{name}: {field} in config.json is {value}, and must be a finite number")
    if config.is_encoder_decoder and not architecture.side:
        raise ModelError(f"{name}: is_encoder_decoder in config.json is set, and no {config.model_type} model is one")


def _quantised(name: str) -> str:
    return (
        f"{name} is quantised (quantization_config in config.json): its weights are not the matrices that edits are "
        "added to; take the unquantised checkpoint"
    )


def _own(config: PreTrainedConfig, field: str) -> str:
    """What the configuration's own file calls a field."""
    return config.attribute_map.get(field, field)


def check_weights(report: Mapping[str, Any], config: PreTrainedConfig, name: str, architecture: Architecture) -> str:
    """ModelError for weights that the files lack, have in another shape, or have of layers that the model has not.

    Returns a warning of weights that the model has no use for, "" if there are none.
    """
    if report["missing_keys"]:
        raise ModelError(f"{name}: its files lack the weights {', '.join(sorted(report['missing_keys']))}")
    for weight, held, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{name}: its files have {weight} as {tuple(held)}, and by its config.json it is {tuple(expected)}"
        )
    unused = sorted(report["unexpected_keys"])
    n_layers = config.get_text_config().num_hidden_layers
    *outer, blocks = architecture.blocks.split(".")
    of_block = re.compile("".join(rf"(?:{part}\.)?" for part in outer) + rf"{blocks}\.(\d+)\.")
    for weight in unused:
        if (found := of_block.match(weight)) and int(found[1]) >= n_layers:
            field = _own(config.get_text_config(), "num_hidden_layers")
            raise ModelError(
                f"{name}: its files hold {weight}, and by {field} in config.json it has {n_layers} layers, 0 to "
                f"{n_layers - 1}: is {field} wrong?"
            )
    if not unused:
        return ""
    return f"{name}: its files hold {len(unused)} weights that the model has no use for, such as {unused[0]}"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, n_tokens: int, name: str) -> None:
    """ModelError for a tokenizer that makes nothing of a text, or pads with a token that the model does not have."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{name}: model_max_length in tokenizer_config.json must be a number, not {tokenizer.model_max_length!r}"
        )
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise ModelError(f"{name}: its tokenizer makes no token of the text 'a': is a file missing (tokenizer.json)?")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= n_tokens:
        raise ModelError(
            f"{name}: its tokenizer pads with {tokenizer.pad_token!r}, whose number {tokenizer.pad_token_id} is beyond "
            f"the {n_tokens} tokens of the model"
        )
