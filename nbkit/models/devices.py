"""Where a model is put and in which number type, as a user names them."""

from typing import Any

import torch

from nbkit.errors import ModelError
from nbkit.records.bounds import shown

DTYPES = ("float32", "bfloat16", "float16", "float64")


def device_named(device: str | torch.device) -> torch.device:
    """The device of that name, "auto" for the first GPU or else the CPU; ModelError for one that is not to be had."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = f"use 'auto', 'cpu'{', ' + repr('cuda') if torch.cuda.is_available() else ''} or what torch.device takes"
    if not isinstance(device, str | torch.device):
        raise ModelError(f"device must be a text, not {shown(device)}; {how}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; {how}") from error
    if found.type == "meta":
        raise ModelError(f"on the device {device!r} weights have no values, and nothing can be computed; {how}")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"the device {device!r} cannot be used here ({str(error).splitlines()[0]}); {how}") from error
    return found


def dtype_named(dtype: str | torch.dtype, of_checkpoint: Any, device: torch.device) -> torch.dtype:
    """One of `DTYPES`; "auto" is bfloat16 for such a checkpoint on a GPU, else float32. ModelError for any other."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and of_checkpoint == torch.bfloat16 else torch.float32
    known = {name: getattr(torch, name) for name in DTYPES}
    known |= {kind: kind for kind in known.values()}
    if not isinstance(dtype, str | torch.dtype) or dtype not in known:
        raise ModelError(f"unknown dtype {shown(dtype)}; use 'auto', 'float32', 'bfloat16' or 'float64'")
    return known[dtype]
