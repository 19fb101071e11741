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
    kept = Kept()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.value = tensor
        if stop:
            raise _Stop(kept)
        return tensor

    try:
        with replace(module, keep, where, shape):
            yield kept
    except _Stop as stopped:
        if stopped.kept is not kept:  # another capture's, further out
            raise


@contextmanager
def replace(
    module: nn.Module,
    fn: Callable[[torch.Tensor], torch.Tensor],
    where: Where = "output",
    shape: tuple[int, int] | None = None,
) -> Iterator[None]:
    """The pass goes on with `fn(tensor)` as the module's input or output. `fn` must not work in place."""
    if where not in ("input", "output"):
        raise ValueError(f"where must be 'input' or 'output', not {where!r}")

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        flat = shape is not None and tensor.dim() == 2
        return fn(tensor.reshape(*shape, -1)).reshape(tensor.shape) if flat else fn(tensor)

    def output_hook(_module, _args, output):
        return changed(output) if isinstance(output, torch.Tensor) else (changed(output[0]), *output[1:])

    def input_hook(_module, args, kwargs):
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, name: changed(kwargs[name])}

    if where == "output":
        handle = module.register_forward_hook(output_hook)
    else:
        handle = module.register_forward_pre_hook(input_hook, with_kwargs=True)
    with handle:
        yield


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
