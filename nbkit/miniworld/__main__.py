"""`python -m nbkit.miniworld`: write the world's files, train its model (resuming where it stopped), ship it with its card."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from nbkit import paths
from nbkit.miniworld.files import held_out, write_files
from nbkit.miniworld.tokenizer import train_tokenizer
from nbkit.miniworld.train import Recipe, ship, train
from nbkit.miniworld.world import build_world

MODEL = "miniworld-gpt2"


def main(
    work: Annotated[Path, typer.Option(help="folder for checkpoints and the log")] = paths.RUNS / "miniworld",
    n_steps: Annotated[int, typer.Option(help="training steps")] = Recipe.n_steps,
) -> None:
    recipe, world = Recipe(n_steps=n_steps), build_world()
    write_files(world, paths.DATA)
    tokenizer = train_tokenizer(world)
    model = train(recipe, world, tokenizer, held_out(world), work)
    folder = paths.DATA / "models" / MODEL
    ship(recipe, model, tokenizer, folder)
    shutil.copy(work / "training_log.jsonl", folder / "training_log.jsonl")


if __name__ == "__main__":
    typer.run(main)
