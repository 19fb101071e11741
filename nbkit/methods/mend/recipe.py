"""Recipes for training a hypernetwork: the shipped ones of recipes.toml, and what a user changes of them.

    recipe, files = recipe_of("miniworld-gpt2", changes={"n_steps": "500"})
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from nbkit.errors import MethodError, RequestError
from nbkit.records.bounds import Bounded, bounded

RECIPES = Path(__file__).parent / "recipes.toml"


@dataclass(frozen=True)
class MendRecipe(Bounded):
    """The numbers of a training."""

    n_last_layers: int = bounded(least=1)  # whose MLPs are edited
    rank: int = bounded(least=1)  # of g's steps
    n_hidden: int = bounded(least=0)  # steps of g besides the last, which is like them
    first_rate: float = bounded(above=0)  # α at the start
    n_steps: int = bounded(least=1)
    batch: int = bounded(least=1)  # edits a step, each of the unedited model
    at_once: int = bounded(least=1)  # edits in one pass: fewer take less memory and give the same
    learning_rate: float = bounded(above=0)  # of Adam, on g
    rate_learning_rate: float = bounded(above=0)  # of Adam, on log α
    decay: float = bounded(least=0, most=1)  # share of the steps, at the end, over which both fall to zero
    edit_weight: float = bounded(least=0)
    locality_weight: float = bounded(least=0)
    grad_clip: float = bounded(above=0, most=math.inf)  # the gradient's largest norm
    text_tokens: int = bounded(least=1)  # a text is cut to so many
    n_normalising: int = bounded(least=1)  # requests whose tokens give mean and std
    n_validation: int = bounded(least=1)  # requests held out, to choose the best by
    validate_every: int = bounded(least=1)  # steps, after which there is a checkpoint too
    seed: int = bounded(least=0)


@dataclass(frozen=True)
class TrainingFiles(Bounded):
    """What a training reads, by path or by the name of embedded data, and where it writes."""

    data: str  # requests to edit
    texts: str  # that edits shall not change; "": none
    held_out: str  # requests whose facts are not trained on; "": none
    out: str  # the hypernetwork; "": where edits look for it
    work: str  # folder for checkpoint and log; "": below runs/mend


def recipe_of(
    model: str, file: Path | None = None, changes: Mapping[str, object] | None = None
) -> tuple[MendRecipe, TrainingFiles]:
    """The recipe for a model: `changes` over the values of a TOML file over those that are shipped.

    Texts among the changes are read as what the value should be. MethodError, naming it, for a value that is unknown or
    cannot be, or a file that cannot be read; RequestError where there is nothing to train on.
    """
    shipped = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    values = shipped["published"] | shipped.get(model, {}) | _table(file) | dict(changes or {})
    kinds = {field.name: field.type for part in (MendRecipe, TrainingFiles) for field in fields(part)}
    if unknown := [name for name in values if name not in kinds]:
        raise MethodError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(kinds)}")
    for name, value in values.items():
        try:
            values[name] = kinds[name](value) if isinstance(value, str) else value
        except ValueError as error:
            raise MethodError(f"{name} must be {kinds[name].__name__}, not {value!r}") from error
    recipe, files = (
        part(**{field.name: values[field.name] for field in fields(part)}) for part in (MendRecipe, TrainingFiles)
    )
    if not files.data:
        raise RequestError(f"no recipe is shipped for {model}: give it a file of requests to train on (-p data FILE)")
    return recipe, files


def _table(file: Path | None) -> dict[str, object]:
    try:
        return {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"{file} is no recipe: {error}") from error
