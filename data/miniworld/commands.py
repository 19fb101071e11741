"""The commands of `python data/miniworld`: make the embedded model from nothing, or measure the one that is there."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from miniworld.world import build_world
from nbkit import paths

MODEL = "miniworld-gpt2"
FOLDER = paths.DATA / "models" / MODEL
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def train(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and the log.")] = paths.RUNS / "miniworld",
    n_steps: Annotated[int | None, typer.Option(help="Training steps; the recipe's own if not given.")] = None,
):
    """Write the world's files, train its model (going on where it stopped), ship and measure it."""
    from miniworld import train as training
    from miniworld.files import held_out, write_files
    from miniworld.tokenizer import train_tokenizer

    recipe = training.Recipe() if n_steps is None else training.Recipe(n_steps=n_steps)
    world = build_world()
    write_files(world, paths.DATA)
    tokenizer = train_tokenizer(world)
    model = training.train(recipe, world, tokenizer, held_out(world), work)
    training.ship(recipe, model, tokenizer, FOLDER)
    shutil.copy(work / "training_log.jsonl", FOLDER)
    card()


@app.command()
def card(n_sweep: Annotated[int, typer.Option(help="Requests of each kind of subject in the edit sweep.")] = 30):
    """Measure the shipped model and write its card."""
    from miniworld.card import write_card
    from nbkit.models.loading import load
    from nbkit.records.requests import read_requests, read_texts

    write_card(
        load(MODEL),
        build_world(),
        requests=read_requests("miniworld"),
        texts=read_texts("miniworld"),
        corpus=read_texts(paths.DATA / "miniworld" / "text.txt"),
        folder=FOLDER,
        n_sweep=n_sweep,
    )
