"""The recipes of the embedded models: those of recipes.toml, and what is changed of them.

recipe_of("miniworld-gpt2", n_steps=100, seed=1)
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes.toml"


@dataclass(frozen=True)
class Recipe:
    """All that makes a training what it is; recipes.toml says what each number means."""

    family: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    window: int
    batch: int
    n_steps: int
    warmup: int
    decay: float
    averaged: float
    learning_rate: float
    weight_decay: float
    opening: float
    random_first: float
    rumours: float
    broken_off: float
    init_std: float
    shard_lines: int
    shard_steps: int
    seed: int


def recipe_of(model: str, **changes: object) -> Recipe:
    """The recipe of a model, `changes` over its own numbers over those that all share. KeyError for another model."""
    shipped = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    return Recipe(**{**shipped.pop("shared"), **shipped[model], **changes})


def trained_models() -> list[str]:
    """The names of all recipes."""
    return [name for name in tomllib.loads(RECIPES.read_text(encoding="utf-8")) if name != "shared"]
