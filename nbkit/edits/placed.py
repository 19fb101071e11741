"""What lies on a model's modules and changes or reads its passes: what nbkit put there, and what others did.

nbkit's own hooks are `Placed`, open from the entering of their `with` to its leaving. The libraries' (transformers
notes hidden states by hooks, accelerate moves weights, torch has parametrisations) are part of the model. Anything
else is foreign: nbkit cannot see whether it only reads, and rows would be stored under the name of a model without it.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator

from torch import nn

from nbkit.edits.interrupts import Guarded
from nbkit.errors import ModelError

LIBRARIES = ("torch", "transformers", "accelerate")
KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HOW = (
    "Take it off (the handle's remove(); where the handle is lost, nbkit.edits.placed.take_off(lm.model)). To read or "
    "change what passes through a module while nbkit runs, use nbkit.models.hooks, whose hooks it knows"
)

_numbers = itertools.count()
_open: dict[int, "Placed"] = {}  # by number, which grows
_owners: dict[int, "Placed"] = {}  # by the id of the function that lies on a module


class Placed(Guarded):
    """Functions of nbkit's on modules, from `begin` to `end`, which must come without an interrupt between.

    reads_only: whether passes are the same with it as without.
    """

    reads_only = False

    def __init__(self):
        self._taking_off: list[tuple[Callable, Callable[[], None]]] = []

    def open(self) -> None:
        """To be called by `begin`, first."""
        self.thread, self.number = threading.current_thread(), next(_numbers)
        _open[self.number] = self

    def put(self, function: Callable, take_off: Callable[[], None]) -> None:
        """Notes a function that now lies on a module, and how it is taken off again."""
        _owners[id(function)] = self
        self._taking_off.append((function, take_off))

    def end(self, error: BaseException | None = None) -> bool | None:
        while self._taking_off:
            function, take_off = self._taking_off[-1]
            take_off()
            _owners.pop(id(function), None)
            self._taking_off.pop()
        _open.pop(getattr(self, "number", None), None)


def next_number() -> int:
    """What is placed from now on has a larger one."""
    return next(_numbers)


def end_since(number: int) -> None:
    """Ends what this thread placed since then and did not end, the last first."""
    for later in sorted((n for n in _open if n > number), reverse=True):
        placed = _open.get(later)
        if placed is not None and placed.thread is threading.current_thread():
            placed.end()


def check(model: nn.Module, name: str, changing: bool = True) -> None:
    """ModelError if something foreign lies on the model, or something that another thread put there and still uses.

    changing: whether what nbkit's own open hooks change is allowed.
    """
    for module, kind, function in _lying_on(model):
        placed = _owners.get(id(function))
        if placed is None and not _of_a_library(function):
            what = "another forward" if kind == "forward" else "a hook"
            raise ModelError(
                f"{_path(model, module, name)} has {what} that is not nbkit's ({_described(function)}). {HOW}"
            )
        if placed is not None and placed.thread is not threading.current_thread() and placed.thread.is_alive():
            raise ModelError(
                f"{_path(model, module, name)} has a hook that the thread {placed.thread.name!r} is using; one model "
                "serves one thread at a time: wait for it, or load the model once for each"
            )
        if placed is not None and not changing and not placed.reads_only:
            raise ModelError(
                f"{_path(model, module, name)} is inside a `with` that changes its passes, so the hash of its weights "
                "does not say what it computes; ask for it (and run studies, whose rows are stored under it) outside"
            )


def take_off(model: nn.Module) -> int:
    """Takes all hooks off a model that are not a library's, nbkit's own too; returns how many there were.

    For one that a hook was left on whose handle is lost.
    """
    found = [each for each in _lying_on(model) if id(each[2]) in _owners or not _of_a_library(each[2])]
    for module, kind, function in found:
        if id(function) in _owners:
            _owners[id(function)].end()
        elif kind == "forward":
            del module.forward
        else:
            hooks = getattr(module, kind)
            for number in [number for number, hook in hooks.items() if hook is function]:
                del hooks[number]
    return len(found)


def _lying_on(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable]]:
    """(module, kind, function) of all hooks, and of what stands in place of a module's own forward."""
    left, seen = [model], set()
    while left:  # several times as fast as named_modules
        module = left.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        for kind in KINDS:
            if own.get(kind):
                yield from ((module, kind, function) for function in list(own[kind].values()))
        if "forward" in own:
            yield module, "forward", own["forward"]
        left.extend(own["_modules"].values())


def _path(model: nn.Module, module: nn.Module, name: str) -> str:
    path = next(path for path, each in model.named_modules() if each is module)
    return f"the module {path} of {name}" if path else name


def _of_a_library(function: Callable) -> bool:
    """By where its code stands: its `__module__` may be a copy of what it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code_of = getattr(function, "__globals__", None)
    module = code_of.get("__name__", "") if code_of is not None else type(function).__module__
    return module.split(".")[0] in LIBRARIES


def _described(function: Callable) -> str:
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"
