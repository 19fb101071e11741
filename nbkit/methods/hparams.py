"""The hyper-parameters that a method runs with: those given, over those of tables for the model.

    hyper_parameters(lm, "rome", v_lr=0.1)
    hyper_parameters(lm, "rome", layer="auto")      # a first choice for a model that has no table

Tables are TOML: a method's own, and below it one a family, which is taken for models whose name contains the family's.
They are read from hparams.toml here, over it from the user's file that NBKIT_HPARAMS names, and over that from
hparams.toml in the folder of the model itself, whose family needs no name.

Apart from these defaults a model can have settings that were chosen for it by a search, in tuned.toml in its folder,
which whoever compares methods asks for: `tuned`.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nbkit import paths
from nbkit.errors import MethodError
from nbkit.methods.table import METHODS, method_named
from nbkit.models.language_model import LanguageModel, check_model
from nbkit.records.embedded import embedded_models

HPARAMS = Path(__file__).with_suffix(".toml")
TUNED = "tuned.toml"  # in a model's folder
DEPTHS = {"gpt-j-6b": 28, "llama-2-7b": 32, "llama-3-8b": 32, "gpt2-xl": 48}  # the layers that published models have


def hyper_parameters(lm: LanguageModel, method: str, **hparams: Any) -> Any:
    """The method's parameters for this model: given ones over the family's over the method's own.

    One that is given as None is the default; layer (or layers) "auto" is `published_layers`. MethodError if one is
    unknown, missing, of the wrong type or out of its bounds; ModelError for a layer that does not exist, and for a
    model that is not edited.
    """
    check_model(lm).check_causal()
    kind = method_named(method).parameters
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(hparams) - set(names))
    if unknown:
        raise MethodError(f"{method} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(names)}")
    given = {name: value for name, value in hparams.items() if value is not None}
    given |= {name: published_layers(lm, method)[name] for name in ("layer", "layers") if given.get(name) == "auto"}
    values = {**_defaults(lm, method), **given}
    missing = [name for name in names if name not in values]
    if missing:
        lacking = f"{method} has no default {', '.join(missing)} for {lm.title}"
        raise MethodError(f"{lacking}; {_advice(lm, method, missing)}")
    parameters = kind(**values)
    for layer in getattr(parameters, "layers", ()):
        lm.check_layer(layer)
    return parameters


def tuned(lm: LanguageModel, method: str) -> dict[str, Any]:
    """What tuned.toml in the model's folder says of a method, to be given as its hyper-parameters.

    {} for a method that is not in it, as a trained one, and for a model without that file. MethodError as for other
    tables.
    """
    method_named(method)
    folder = paths.DATA / "models" / lm.name if lm.name in embedded_models() else Path(lm.name)
    table = read_tables(folder / TUNED).get(method, {}) if (folder / TUNED).is_file() else {}
    return {name: value for name, value in table.items() if name != "source"}


def published_layers(lm: LanguageModel, method: str) -> dict[str, Any]:
    """A first choice of layers, {"layer": 2} or {"layers": [1, 2, 3]}: those of a published model, by relative depth.

    Of the models of `DEPTHS` that the method has a table for, it is the one whose number of layers is nearest. A sweep
    over layers may find better ones. MethodError for a method that has no layers.
    """
    tables = {family: table for family, table in read_tables(HPARAMS)[method].items() if family in DEPTHS}
    tables = {family: table for family, table in tables.items() if {"layer", "layers"} & set(table)}
    if not tables:
        raise MethodError(f"{method} has no layers to choose")
    nearest = min(tables, key=lambda family: abs(DEPTHS[family] - lm.n_layers))
    table, scale = tables[nearest], lm.n_layers / DEPTHS[nearest]
    if "layer" in table:
        return {"layer": round(table["layer"] * scale)}
    return {"layers": sorted({round(layer * scale) for layer in table["layers"]})}


def _advice(lm: LanguageModel, method: str, missing: list[str]) -> str:
    layers = [name for name in missing if name in ("layer", "layers")]
    if layers != missing:
        return f"give it, e.g. {missing[0]}=..."
    (name,) = layers
    choice = published_layers(lm, method)[name]
    return f'give {name}=..., of 0 to {lm.n_layers - 1}, or {name}="auto" for {choice}, as deep as in a published model'


def _defaults(lm: LanguageModel, method: str) -> dict[str, Any]:
    files = [HPARAMS, *([Path(own).expanduser()] if (own := os.environ.get("NBKIT_HPARAMS")) else [])]
    values: dict[str, Any] = {}
    for file in files:
        table = read_tables(file).get(method, {})
        families = {name: part for name, part in table.items() if isinstance(part, dict)}
        family = max((name for name in families if name in lm.known_as.lower()), key=len, default=None)
        values |= {name: value for name, value in table.items() if name not in families} | families.get(family, {})
    beside = Path(lm.name) / HPARAMS.name
    if beside.is_file():
        values |= read_tables(beside).get(method, {})
    return {name: value for name, value in values.items() if name != "source"}


def read_tables(path: Path) -> Mapping[str, dict]:
    """The tables of a file; MethodError, naming it, if it cannot be read or has a table or name that nbkit does not."""
    try:
        return _checked(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise MethodError(f"the hyper-parameters of {path} cannot be read: {error.strerror}") from error


@cache
def _checked(path: Path, modified: int) -> Mapping[str, dict]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MethodError(f"{path} is no TOML file: {error}") from error
    for method, table in tables.items():
        if method not in METHODS or not isinstance(table, dict):
            raise MethodError(f"{path} has {method!r} where a method's table should be; methods: {', '.join(METHODS)}")
        known = {"source", *(field.name for field in dataclasses.fields(METHODS[method].parameters))}
        if tables_of := sorted(name for name, value in table.items() if name in known and isinstance(value, dict)):
            raise MethodError(f"{path}, [{method}]: {', '.join(tables_of)} must be a value, not a table")
        own = {name: value for name, value in table.items() if not isinstance(value, dict)}
        for where, names in {method: own, **{f"{method}.{k}": v for k, v in table.items() if k not in own}}.items():
            if unknown := sorted(set(names) - known):
                raise MethodError(f"{path}, [{where}]: no hyper-parameter {', '.join(unknown)}; known: {sorted(known)}")
    return tables
