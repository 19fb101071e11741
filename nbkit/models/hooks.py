"""Reading and replacing what passes through one module, in a `with` that always unhooks.

    with capture(lm.projection(3), where="input", stop=True) as kept:
        lm.model(**batch)
    kept.value                           # (batch, position, d_mlp); the layers above 3 did not run

    with replace(lm.projection(3), lambda v: v + delta):
        lm.model(**batch)

    with instead(lm.attention(3), lambda module, *args, **kwargs: (states, None)):
        lm.model(**batch)                # that module's own code does not run

    with together([replace(one, f), capture(other, stop=True)]):
        lm.model(**batch)                # several at once

Entering and leaving are not interrupted half way (edits/interrupts.py), and while one is open nbkit knows the hook for
its own (edits/placed.py).

A module may take and give tuples (attention does): the first tensor is meant. Some blocks (OPT's) flatten batch and
position into one axis before the MLP; `shape=(batch, position)` gives them back as three axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nbkit.edits.interrupts import Guarded
from nbkit.edits.placed import Placed

Where = Literal["input", "output"]


@dataclass
class Kept:
    """Holds the tensor of the last pass through a captured module; None before there was one."""

    value: torch.Tensor | None = None


class _Stop(Exception):
    """Ends a forward pass from within; caught by the `capture` that raised it."""

    def __init__(self, kept: Kept):
        self.kept = kept


class _Hook(Placed):
    """A hook of torch's on one module."""

    def __init__(self, module: nn.Module, hook: Callable, where: Where):
        super().__init__()
        self.module, self.hook, self.where = module, hook, where

    def begin(self) -> None:
        self.open()
        if self.where == "output":
            handle = self.module.register_forward_hook(self.hook)
        else:
            handle = self.module.register_forward_pre_hook(self.hook, with_kwargs=True)
        self.put(self.hook, handle.remove)


class _Capture(_Hook):
    reads_only = True

    def __init__(self, module: nn.Module, hook: Callable, where: Where, kept: Kept):
        super().__init__(module, hook, where)
        self.kept = kept

    def begin(self) -> Kept:
        super().begin()
        return self.kept

    def end(self, error: BaseException | None = None) -> bool:
        super().end()
        return isinstance(error, _Stop) and error.kept is self.kept  # else another capture's, further out


def capture(
    module: nn.Module, where: Where = "output", stop: bool = False, shape: tuple[int, int] | None = None
) -> Guarded:
    """Keep the module's input or output tensor; `as` gives a `Kept`.

    With `stop` the forward pass ends here, and so does the `with` body.
    """
    kept = Kept()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.value = tensor
        if stop:
            raise _Stop(kept)
        return tensor

    return _Capture(module, _changing(keep, where, shape), where, kept)


def replace(
    module: nn.Module,
    fn: Callable[[torch.Tensor], torch.Tensor],
    where: Where = "output",
    shape: tuple[int, int] | None = None,
) -> Guarded:
    """The pass goes on with `fn(tensor)` as the module's input or output. `fn` must not work in place."""
    return _Hook(module, _changing(fn, where, shape), where)


def before(module: nn.Module, fn: Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]) -> Guarded:
    """The pass goes on with `fn(module, inputs, named)` as the module's arguments, those by place and those by name."""
    return _Hook(module, fn, "input")


def after(module: nn.Module, fn: Callable[[nn.Module, tuple, Any], Any]) -> Guarded:
    """The pass goes on with `fn(module, inputs, output)` as the module's output."""
    return _Hook(module, fn, "output")


def _changing(fn: Callable[[torch.Tensor], torch.Tensor], where: Where, shape: tuple[int, int] | None) -> Callable:
    """The hook that puts `fn(tensor)` in the tensor's place."""
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

    return output_hook if where == "output" else input_hook


def instead(modules: nn.Module | Sequence[nn.Module], fn: Callable) -> Guarded:
    """The modules do not run: calling one gives `fn(module, *args, **kwargs)`. Hooks on it still see that."""
    return _Instead([modules] if isinstance(modules, nn.Module) else modules, fn)


class _Instead(Placed):
    def __init__(self, modules: Sequence[nn.Module], fn: Callable):
        super().__init__()
        self.modules, self.fn = modules, fn

    def begin(self) -> None:
        self.open()
        for module in self.modules:
            said = _Said(module, self.fn)
            module.__dict__["forward"] = said
            self.put(said, said.take_off)


class _Said:
    """What stands in place of a module's forward, and what stood there before: accelerate's, say, or another of these.

    None: the module's own.
    """

    def __init__(self, module: nn.Module, fn: Callable):
        self.module, self.fn, self.before = module, fn, module.__dict__.get("forward")

    def __call__(self, *args, **kwargs):
        return self.fn(self.module, *args, **kwargs)

    def take_off(self) -> None:
        above = self.module.__dict__.get("forward")
        while isinstance(above, _Said) and above is not self and above.before is not self:
            above = above.before
        if isinstance(above, _Said) and above is not self:  # that one is to be left later
            above.before = self.before
        elif above is self and self.before is None:
            del self.module.__dict__["forward"]
        elif above is self:
            self.module.__dict__["forward"] = self.before


class together(Guarded):
    """Several of these at once; `as` gives what each gives."""

    def __init__(self, parts: Sequence[Guarded]):
        self.parts = list(parts)

    def begin(self) -> list:
        return [part.begin() for part in self.parts]

    def end(self, error: BaseException | None) -> bool:
        return any([part.end(error) for part in reversed(self.parts)])  # a list, so that all end
