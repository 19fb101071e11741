"""The commands of `python data/miniworld`: make an embedded model from nothing, measure one, or many on their way."""

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
    """Write the world's files, train a model of it (going on where it stopped), ship it and write its card.

    What the model was at some steps of its training is kept below the work folder, for `ladder`.
    """
    from miniworld.families import tokenizer_of
    from miniworld.files import held_out, write_files
    from miniworld.ladder import snapshot_steps
    from miniworld.recipe import recipe_of
    from miniworld.train import ship
    from miniworld.train import train as train_model

    recipe = recipe_of(model) if n_steps is None else recipe_of(model, n_steps=n_steps)
    world, folder = build_world(), paths.DATA / "models" / model
    write_files(world, paths.DATA)
    tokenizer = tokenizer_of(recipe, world)
    kept = snapshot_steps(recipe.n_steps)
    trained = train_model(recipe, world, tokenizer, held_out(world), work / model, snapshots=kept)
    ship(recipe, trained, tokenizer, folder)
    shutil.copy(work / model / "training_log.jsonl", folder)
    card(model)


@app.command()
def card(
    model: Name = "miniworld-gpt2",
    n_sweep: Annotated[int, typer.Option(help="Requests of each kind of subject in the edit sweep.")] = 15,
    n_efficacy: Annotated[int, typer.Option(help="Facts of each of two kinds, for the choice of layer.")] = 30,
):
    """Measure a shipped model and write its card."""
    from miniworld.card import write_card, write_card_of_keys
    from miniworld.families import FAMILIES
    from miniworld.recipe import recipe_of
    from nbkit.models.loading import load
    from nbkit.records.requests import read_requests, read_texts

    world, folder = build_world(), paths.DATA / "models" / model
    requests, texts = read_requests("miniworld"), read_texts("miniworld")
    if FAMILIES[recipe_of(model).family].edited:
        corpus = read_texts("miniworld-training")
        write_card(load(model), world, requests, texts, corpus, folder, n_sweep, n_efficacy)
    else:
        sides = {side: load(model, side=side) for side in ("encoder", "decoder")}
        write_card_of_keys(sides, world, requests, texts, folder)


@app.command()
def efficacy(
    model: Name = "miniworld-gpt2",
    method: Annotated[str, typer.Option(help="rome, or one whose own number is chosen once ROME's default stands.")] = (
        "rome"
    ),
    n: Annotated[int, typer.Option(help="Facts of each of the two kinds of subject.")] = 30,
):
    """Which layer and settings a method's default should be: see efficacy.py for the rules."""
    from miniworld.efficacy import CANDIDATES, candidate_sweep, chosen, efficacy_sweep, gentlest, unreported_requests
    from nbkit.models.loading import load

    if method not in ("rome", *CANDIDATES):
        raise typer.BadParameter(f"no rule for {method}: choose of rome, {', '.join(CANDIDATES)}")
    lm = load(model)
    requests = unreported_requests(lm, n)
    if method == "rome":
        sweep = efficacy_sweep(lm, requests)
        taken = chosen(sweep)
    else:
        sweep = candidate_sweep(lm, requests, method)
        taken = gentlest(sweep, method)
    print(sweep.round(4).to_string(index=False))
    print("chosen:", taken.to_dict())


@app.command()
def damage(
    model: Name = "miniworld-gpt2",
    setting: Annotated[
        list[str] | None, typer.Option(help="METHOD, or rome/KEY_MODE; once for each. All if not given.")
    ] = None,
    n: Annotated[int, typer.Option(help="Facts of each of the three kinds of subject.")] = 20,
    rows: Annotated[Path | None, typer.Option(help="A .parquet or .csv file for the rows, one an edit.")] = None,
):
    """How far an update foretells the perplexity of the edited model: see damage.py."""
    from miniworld.damage import damages, settings_of, summary
    from miniworld.efficacy import unreported_requests
    from nbkit.models.loading import load
    from nbkit.records.requests import read_texts
    from nbkit.records.tables import write_table

    lm = load(model)
    requests = unreported_requests(lm, n, kinds=("one-token first", "several-token first", "later"))
    frame = damages(lm, requests, read_texts("miniworld", limit=50), setting or settings_of(lm))
    if rows is not None:
        write_table(frame, rows)
    print(summary(frame).to_string(index=False, float_format="{:.3g}".format))


@app.command()
def tune(
    model: Annotated[
        list[str] | None, typer.Argument(help="Embedded models; all that are edited if none is given.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; once for each. All but MEND, which is trained, if not given.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Settings of each method, its default among them.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each of the two kinds of subject.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the settings that are drawn, and of the requests.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the models' folders, to which the files are written.")] = (
        paths.DATA / "models"
    ),
):
    """Choose every method's settings by one rule, of equally many, on requests that nothing reports: see tuning.py.

    Written are tuned.toml (what is chosen), tuning.csv (all settings and their scores) and tuning.md (the card); with
    --method nothing is. What was measured before an interrupt is not measured again.
    """
    from miniworld.families import FAMILIES
    from miniworld.recipe import recipe_of
    from miniworld.tuning import TUNED, card_of_tuning, chosen_lines, space_of
    from miniworld.tuning import tune as tune_model
    from nbkit.errors import NbkitError
    from nbkit.methods.hparams import TUNED as TUNED_FILE
    from nbkit.models.loading import load
    from nbkit.records.embedded import embedded_models
    from nbkit.records.tables import write_table

    try:
        for name in method or TUNED:
            space_of(name)
    except NbkitError as error:
        raise typer.BadParameter(str(error)) from error
    for name in model or [name for name in embedded_models() if FAMILIES[recipe_of(name).family].edited]:
        lm = load(name)
        table = tune_model(lm, method or TUNED, budget, requests, seed)
        card, lines = card_of_tuning(lm, table), chosen_lines(table, name)
        print(table.round(4).to_string(index=False), card, lines, sep="\n\n")
        if not method:
            write_table(table, out / name / "tuning.csv")
            (out / name / "tuning.md").write_text(card, encoding="utf-8")
            (out / name / TUNED_FILE).write_text(lines, encoding="utf-8")


@app.command()
def ladder(
    model: Name = "miniworld-gpt2",
    dose: Annotated[list[str], typer.Option(help="What a training has otherwise, as NAME=VALUE; once for each.")] = (
        "opening=0",
        "opening=0.4",
    ),
    seed: Annotated[list[int], typer.Option(help="Seed of a training; once for each.")] = (0, 1),
    n_steps: Annotated[int, typer.Option(help="Steps of each training.")] = 2000,
    layer: Annotated[list[int], typer.Option(help="Layer that is edited; once for each.")] = (1,),
    n_first: Annotated[int, typer.Option(help="Edits of one-token first subjects, of each snapshot and layer.")] = 24,
    n_others: Annotated[int, typer.Option(help="Edits of each other kind of subject.")] = 6,
    every: Annotated[int, typer.Option(help="Of the facts, one in so many is asked for.")] = 4,
    doses: Annotated[bool, typer.Option(help="Whether to train the doses, or only to follow the model itself.")] = True,
    work: Annotated[Path, typer.Option(help="Folder for trainings and rows.")] = paths.RUNS / "miniworld" / "ladder",
    own: Annotated[Path | None, typer.Option(help="Folder of the model's own training, as `train` left it.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = paths.DATA / "miniworld" / "ladder",
):
    """Train short models at several doses, and measure when they, and the model itself, became breakable.

    A dose is a number of the recipe: opening, weight_decay or decay (recipes.toml says what they are).

    What was trained and measured before an interrupt is not done again.
    """
    from miniworld.ladder import DOSES, REPORTED, Questions, climb, export, rungs, snapshots_in
    from nbkit.records.requests import read_requests, read_texts

    varied = []
    for name, _, value in (given.partition("=") for given in dose):
        try:
            varied.append((DOSES[DOSES.index(name)], float(value)))
        except ValueError:
            known = ", ".join(DOSES)
            raise typer.BadParameter(f"{name}={value} is no dose: give NAME=NUMBER, the names are {known}") from None
    own = paths.RUNS / "miniworld" / model if own is None else own
    if not snapshots_in(own):
        typer.echo(f"{own} holds no snapshots of {model}: `python data/miniworld train {model}` keeps them", err=True)
    requests, texts = read_requests("miniworld", seed=0)[REPORTED:], read_texts("miniworld", limit=50)
    questions = Questions(build_world(), requests, texts, model, tuple(layer), n_first, n_others, every)
    export(climb(rungs(model, varied, seed, n_steps) if doses else {}, questions, work, own), out)
    typer.echo(f"the rows are in {out}")
