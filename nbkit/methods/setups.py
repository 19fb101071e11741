"""A method as a notebook's parameters name it: the arguments of the verbs and studies, and a caption's words for it.

    chosen = setup(lm, "memit", second_moment_texts="miniworld-training")
    studies.single_edits(lm, requests, texts, **chosen.arguments)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbkit import paths
from nbkit.errors import MethodError
from nbkit.keys.moments import second_moments
from nbkit.methods.hparams import hyper_parameters, tuned
from nbkit.methods.table import METHODS, method_named
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_choice
from nbkit.records.requests import read_texts

OF_ROME = "mixed"  # the key mode that a method without any is as good as given
SETTINGS = (DEFAULT, TUNED) = ("default", "tuned")


@dataclass(frozen=True)
class Setup:
    """arguments: of `edit`, `edit_sequence` and every study. parameters: all the hyper-parameters it then runs with."""

    arguments: Mapping[str, Any]
    parameters: Any
    words: str


def setup(
    lm: LanguageModel,
    method: str,
    layer: int | str | None = None,
    key_mode: str = OF_ROME,
    hparams: Mapping[str, Any] | None = None,
    second_moment_texts: str | Path | None = None,
    second_moment_tokens: int | None = None,
    settings: str = DEFAULT,
) -> Setup:
    """What these parameters mean for a method and a model.

    layer: for a method of several layers, this one alone; None is the default, "auto" as in `hyper_parameters`.
    key_mode: of ROME. hparams: over both. second_moment_texts: a file, or a name that `read_texts` knows, whose keys'
    second moments are used, over `second_moment_tokens`, and cached in `runs/moments`; None leaves it to the method, as
    in `edit`. settings: what stands below all these, "default", or "tuned" for `tuned` over the defaults.
    MethodError for what the method does not have.
    """
    names = {field.name for field in dataclasses.fields(method_named(method).parameters)}
    check_choice("settings", settings, SETTINGS)
    chosen = tuned(lm, method) if settings == TUNED else {}
    arguments: dict[str, Any] = {"method": method}
    if layer is not None:
        if not names & {"layer", "layers"}:
            raise MethodError(f"{method} finds the layers that it edits by itself; leave layer out")
        several = "layers" in names
        chosen = {name: value for name, value in chosen.items() if name not in ("layer", "layers")}
        arguments["layers" if several else "layer"] = [layer] if several and layer != "auto" else layer
    if "key_mode" in names:
        arguments["key_mode"] = key_mode
    elif key_mode != OF_ROME:
        raise MethodError(f"{method} has no key_mode; only rome has")
    if hparams is not None and not isinstance(hparams, Mapping):
        raise MethodError(f"hparams must be hyper-parameters by name, as {{'v_lr': 0.1}}, not {hparams!r}")
    given = {name: value for name, value in (hparams or {}).items() if value is not None or name not in chosen}
    arguments = chosen | arguments | given
    parameters = hyper_parameters(lm, **arguments)
    if second_moment_texts is not None:
        if not METHODS[method].takes_second_moment:
            raise MethodError(f"{method} uses no second moment; leave second_moment_texts out")
        arguments["second_moment"] = second_moments(
            lm, parameters.layers, read_texts(second_moment_texts), n_tokens=second_moment_tokens,
            cache=paths.RUNS / "moments",
        )  # fmt: skip
    more = [] if second_moment_texts is None else [f"C of {Path(second_moment_texts).name}"]
    more += ["tuned"] if chosen else []
    return Setup(arguments, parameters, ", ".join([in_words(method, parameters), *more]))


def in_words(method: str, parameters: Any) -> str:
    """A method with what tells it from its relatives: "rome, mixed keys, layer 4"."""
    words = [method]
    if hasattr(parameters, "key_mode"):
        words.append(f"{parameters.key_mode} keys")
    if hasattr(parameters, "objective"):
        words.append(parameters.objective)
    if layers := list(getattr(parameters, "layers", ())):
        words.append(f"layer{'s' if layers[1:] else ''} {', '.join(map(str, layers))}")
    return ", ".join(words)
