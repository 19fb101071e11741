"""Reading and replacing what passes through one module, in a `with` that always unhooks.

    with capture(lm.projection(3), where="input", stop=True) as kept:
        lm.model(**batch)
    kept.value                           # (batch, position, d_mlp); the layers above 3 did not run

    with replace(lm.projection(3), lambda v: v + delta):
        lm.model(**batch)

    with instead(lm.attention(3), lambda module, *args, **kwargs: (states, None)):
        lm.model(**batch)                # that module's own code does not run

A module may take and give tuples (attention does): the first tensor is meant. Some blocks (OPT's) flatten batch and
position into one axis before the MLP; `shape=(batch, position)` gives them back as three axes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Where = Literal["input", "output"]


@dataclass
class Kept:
    """Holds the tensor of the last pass through a captured module; None before there was one."""

    value: torch.Tensor | None = None


class _Stop(Exception):
    """Ends a forward pass from within; caught by the `capture` that raised it."""

    def __init__(self, kept: Kept):
        self.kept = kept


@contextmanager
def capture(
    module: nn.Module, where: Where = "output", stop: bool = False, shape: tuple[int, int] | None = None
) -> Iterator[Kept]:
    """Keep the module's input or output tensor. With `stop` the forward pass ends here, and so does the `with` body."""
    _check(where)
    kept = Kept()

    def hook(_module, args, kwargs, output):
        tensor = _first(output) if where == "output" else _argument(args, kwargs)[1]
        kept.value = _unflatten(tensor, shape)
        if stop:
            raise _Stop(kept)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield kept
    except _Stop as stopped:
        if stopped.kept is not kept:  # another capture's, further out
            raise
    finally:
        handle.remove()


@contextmanager
def replace(
    module: nn.Module,
    fn: Callable[[torch.Tensor], torch.Tensor],
    where: Where = "output",
    shape: tuple[int, int] | None = None,
) -> Iterator[None]:
    """The pass goes on with `fn(tensor)` as the module's input or output. `fn` must not work in place."""
    _check(where)

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        return fn(_unflatten(tensor, shape)).reshape(tensor.shape)

    def output_hook(_module, _args, output):
        return changed(output) if isinstance(output, torch.Tensor) else (changed(output[0]), *output[1:])

    def input_hook(_module, args, kwargs):
        name, tensor = _argument(args, kwargs)
        if name is None:
            return (changed(tensor), *args[1:]), kwargs
        return args, {**kwargs, name: changed(tensor)}

    if where == "output":
        handle = module.register_forward_hook(output_hook)
    else:
        handle = module.register_forward_pre_hook(input_hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def instead(module: nn.Module, fn: Callable) -> Iterator[None]:
    """The module does not run: calling it gives `fn(module, *args, **kwargs)`. Hooks on the module still see that."""
    own = module.__dict__.get("forward")  # there if something else, accelerate say, has put itself in its place
    module.forward = lambda *args, **kwargs: fn(module, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _check(where: str) -> None:
    if where not in ("input", "output"):
        raise ValueError(f"where must be 'input' or 'output', not {where!r}")


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _argument(args: tuple, kwargs: dict) -> tuple[str | None, torch.Tensor]:
    """The module's first tensor argument, and its name if it was given by name (attention's `hidden_states`)."""
    if args:
        return None, args[0]
    return next((name, value) for name, value in kwargs.items() if isinstance(value, torch.Tensor))


def _unflatten(tensor: torch.Tensor, shape: tuple[int, int] | None) -> torch.Tensor:
    return tensor.reshape(*shape, -1) if shape is not None and tensor.dim() == 2 else tensor
