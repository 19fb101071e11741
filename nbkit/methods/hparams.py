"""The hyper-parameters that a method runs with: those given, over those of hparams.toml for the model's family."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from nbkit.errors import MethodError
from nbkit.methods.table import method_named
from nbkit.models.language_model import LanguageModel

HPARAMS = Path(__file__).with_suffix(".toml")


def hyper_parameters(lm: LanguageModel, method: str, **hparams: Any) -> Any:
    """The method's parameters for this model: given ones over the family's over the method's own.

    One that is given as None is the default. MethodError if one is unknown, missing, of the wrong type or out of its
    bounds; ModelError for a layer that does not exist, and for a model that is not edited.
    """
    lm.check_causal()
    kind = method_named(method).parameters
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(hparams) - set(names))
    if unknown:
        raise MethodError(f"{method} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(names)}")
    given = {name: value for name, value in hparams.items() if value is not None}
    values = {**_defaults(lm, method), **given}
    missing = [name for name in names if name not in values]
    if missing:
        raise MethodError(f"{method} has no default {', '.join(missing)} for {lm.name}; give it, e.g. {missing[0]}=...")
    parameters = kind(**values)
    for layer in getattr(parameters, "layers", ()):
        lm.check_layer(layer)
    return parameters


def _defaults(lm: LanguageModel, method: str) -> dict[str, Any]:
    table = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))[method]
    families = {name: part for name, part in table.items() if isinstance(part, dict)}
    model = lm.name.rstrip("/").split("/")[-1].lower()
    family = max((name for name in families if name in model), key=len, default=None)
    values = {**table, **families.get(family, {})}
    return {name: value for name, value in values.items() if name not in families and name != "source"}
