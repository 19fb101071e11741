"""The commands of `python data/miniworld`: make an embedded model from nothing, or measure one that is there."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from miniworld.world import build_world
from nbkit import paths

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(help="An embedded model, as recipes.toml names them.")]


@app.command()
def train(
    model: Name = "miniworld-gpt2",
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and the log, below it one a model.")] = (
        paths.RUNS / "miniworld"
    ),
    n_steps: Annotated[int | None, typer.Option(help="Training steps; the recipe's own if not given.")] = None,
):
    """Write the world's files, train a model of it (going on where it stopped), ship and measure it."""
    from miniworld.families import FAMILIES
    from miniworld.files import held_out, write_files
    from miniworld.recipe import recipe_of
    from miniworld.tokenizer import train_tokenizer
    from miniworld.train import ship
    from miniworld.train import train as train_model

    recipe = recipe_of(model) if n_steps is None else recipe_of(model, n_steps=n_steps)
    world, folder = build_world(), paths.DATA / "models" / model
    write_files(world, paths.DATA)
    tokenizer = train_tokenizer(world, FAMILIES[recipe.family].adds_bos)
    trained = train_model(recipe, world, tokenizer, held_out(world), work / model)
    ship(recipe, trained, tokenizer, folder)
    shutil.copy(work / model / "training_log.jsonl", folder)
    card(model)


@app.command()
def card(
    model: Name = "miniworld-gpt2",
    n_sweep: Annotated[int, typer.Option(help="Requests of each kind of subject in the edit sweep.")] = 30,
):
    """Measure a shipped model and write its card."""
    from miniworld.card import write_card
    from nbkit.models.loading import load
    from nbkit.records.requests import read_requests, read_texts

    write_card(
        load(model),
        build_world(),
        requests=read_requests("miniworld"),
        texts=read_texts("miniworld"),
        corpus=read_texts("miniworld-training"),
        folder=paths.DATA / "models" / model,
        n_sweep=n_sweep,
    )


@app.command()
def efficacy(
    model: Name = "miniworld-gpt2",
    n: Annotated[int, typer.Option(help="Facts of each of the two kinds of subject.")] = 30,
):
    """Which layer and settings ROME's default should be: see efficacy.py for the rule."""
    from miniworld.efficacy import chosen, efficacy_sweep, unreported_requests
    from nbkit.models.loading import load

    lm = load(model)
    sweep = efficacy_sweep(lm, unreported_requests(lm, n), range(1, lm.n_layers - 1))
    print(sweep.round(3).to_string(index=False))
    print("chosen:", chosen(sweep).to_dict())
