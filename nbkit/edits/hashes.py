"""The hash of a model's configuration and weights, and whether a weight was written to since it was taken."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def state(tensor: Tensor) -> int | None:
    """How often a tensor was written to, its views included; None where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version


def states(model: PreTrainedModel) -> dict[int, int] | None:
    """{place in memory: state} of all weights; None if one has none."""
    found = {tensor.data_ptr(): state(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return None if None in found.values() else found


def hash_of(model: PreTrainedModel, instead: Mapping[str, Tensor] | None = None) -> str:
    """sha256 over configuration and weights. instead: {weight name: weight} to take for those in the model."""
    place = {model.get_parameter(name).data_ptr(): weight for name, weight in (instead or {}).items()}
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("transformers_version", "_name_or_path")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        tensor = place.get(tensor.data_ptr(), tensor)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
