"""The command line: `python -m nbkit run NOTEBOOK -p name value ...`, and what else a batch needs.

`COMMAND --help` says more; `run NOTEBOOK --help` lists the parameters of that notebook.
"""

import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from nbkit.errors import NbkitError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Out = Annotated[Path | None, typer.Option(help="Folder for executed notebooks.", show_default="runs/")]
Hparams = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="TOML of your own, in the form of nbkit's.")
]
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 60.0  # seconds in which what a first signal has begun may end
Pairs = Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; repeatable.")]


class PairsCommand(TyperCommand):
    """Lets `-p name value` stand for `-p name=value`: typer has no repeatable option of two values."""

    asked_of: str | None = None  # the notebook beside --help

    def parse_args(self, ctx, args):
        folded, rest = [], list(args)
        if "--help" in rest:
            self.asked_of = next((word for word in rest if not word.startswith("-")), None)
        while rest:
            word = rest.pop(0)
            pair = len(rest) >= 2 and re.fullmatch(r"\w+", rest[0]) and not rest[1].startswith("--")
            if word == "-p" and pair:
                folded += ["-p", f"{rest.pop(0)}={rest.pop(0)}"]
            else:
                folded.append(word)
        return super().parse_args(ctx, folded)

    def format_help(self, ctx, formatter):
        """With a notebook beside --help, its parameters too."""
        super().format_help(ctx, formatter)
        if self.asked_of:
            from nbkit.batch.listing import parameters_in_words

            typer.echo(parameters_in_words(self.asked_of))


def split(pairs: list[str] | None) -> list[tuple[str, str]]:
    """(name, value) of texts name=value."""
    named = []
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{name} has no value; write -p {name} VALUE")
        named.append((name, value))
    return named


def by_name(pairs: list[str] | None) -> dict[str, str]:
    """{name: value} of texts name=value."""
    values = {}
    for name, value in split(pairs):
        if name in values:
            raise typer.BadParameter(f"{name} is given twice")
        values[name] = value
    return values


def own_hparams(file: Path | None) -> None:
    """Has the methods read that file of hyper-parameters too, in this process and those that it starts."""
    if file is not None:
        os.environ["NBKIT_HPARAMS"] = str(file.resolve())


@app.command(cls=PairsCommand)
def run(
    notebook: Annotated[str, typer.Argument(help="A path, or the name of one in notebooks/.")],
    p: Pairs = None,
    out: Out = None,
    hparams: Hparams = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for its figures.", show_default="beside the executed copy")
    ] = None,
):
    """Execute one notebook with some of its parameters replaced; the executed copy goes to runs/.

    NOTEBOOK --help lists its parameters.
    """
    from nbkit.batch.run import run_notebook

    own_hparams(hparams)
    typer.echo(run_notebook(notebook, by_name(p), out, figures=figures))


@app.command(cls=PairsCommand)
def sweep(
    notebook: Annotated[str, typer.Argument(help="A path, or the name of one in notebooks/.")],
    p: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME VALUES", help="A parameter's values, with commas; of a list one, repeatable."),
    ] = None,
    out: Out = None,
    again: Annotated[bool, typer.Option("--again", help="Run finished combinations too.")] = False,
    hparams: Hparams = None,
):
    """Execute a notebook with every combination of values; what is finished is not run again."""
    from nbkit.batch.sweep import grid_of, sweep

    own_hparams(hparams)
    outcomes = sweep(notebook, grid_of(notebook, split(p)), out, again)
    for one in outcomes:
        typer.echo(f"{one.outcome}: {one.copy}" if one.error is None else f"failed: {one.error}")
    failed = [one for one in outcomes if one.error is not None]
    if failed:
        raise NbkitError(f"{len(failed)} of {len(outcomes)} combinations failed")


@app.command("list")
def list_notebooks(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Only these.", show_default="all in notebooks/")] = None,
):
    """The notebooks with their questions and parameters: type, default, and what each may be."""
    from nbkit.batch.listing import notebooks_in_words

    typer.echo(notebooks_in_words(notebooks))


@app.command()
def results(
    study: Annotated[str | None, typer.Argument(help="Its rows; without one, what is stored is listed.")] = None,
    run: Annotated[str | None, typer.Option(help="Only rows that this run asked for.")] = None,
    out: Annotated[Path | None, typer.Option(help="A file, .csv or .parquet; without one, a part is shown.")] = None,
):
    """The stored rows of a study as one table, with the run that each belongs to."""
    from nbkit.records import tables

    frame = tables.overview() if study is None else tables.results(study, run)
    if out is not None:
        typer.echo(tables.write_table(frame, out))
    else:
        typer.echo(frame.to_string(index=False, max_rows=None if study is None else 20, max_cols=8))
        typer.echo(f"{len(frame)} rows, {frame.shape[1]} columns; --out FILE writes all")


@app.command()
def doctor():
    """Whether this installation is sound: packages, models, GPU, Jupyter's kernel, folders."""
    from nbkit.batch.doctor import examine

    bad = 0
    for finding in examine():
        typer.echo(str(finding))
        bad += finding.remedy is not None
    if bad:
        raise NbkitError(f"{bad} {'problem' if bad == 1 else 'problems'} found; what to do stands behind each")
    typer.echo("all is well")


@app.command()
def figures(
    out: Out = None,
    notebooks: Annotated[Path | None, typer.Option(help="Folder of notebooks.", show_default="notebooks/")] = None,
    full: Annotated[bool, typer.Option("--full", help="With the sizes in full/ beside the notebooks.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Notebooks at a time.", show_default="one a core, up to 4; on a GPU 1")
    ] = None,
):
    """Execute every notebook with its defaults; figures go to figures/, executed copies to runs/.

    Those of another folder of notebooks go beside the executed copies. What was measured of the papers' claims is
    collected in verdicts.md.
    """
    from nbkit import batch, paths
    from nbkit.records import verdicts

    folder = notebooks or batch.NOTEBOOKS
    all_of_them = sorted(folder.glob("*.ipynb"))
    if not all_of_them:
        raise NbkitError(f"there are no notebooks in {folder}")
    drawn = paths.figures(paths.ROOT / "figures") if notebooks is None else None
    failures = batch.run_all(all_of_them, out, figures=drawn, full=full, jobs=jobs)
    if drawn is not None:
        verdicts.collect(drawn)
    for error in failures.values():
        typer.echo(f"\n{error}", err=True)
    if failures:
        names = ", ".join(path.name for path in failures)
        raise NbkitError(f"{len(failures)} of {len(all_of_them)} notebooks failed: {names}")
    typer.echo(f"{len(all_of_them)} notebooks done; figures are in {drawn or 'the folders of their copies'}")


@app.command(cls=PairsCommand)
def train_mend(
    model: Annotated[str, typer.Option(help="An embedded model, a local folder, or a Hugging Face id.")],
    p: Pairs = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of such parameters.", show_default="nbkit/methods/mend/recipes.toml")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
):
    """Train the network that the method mend edits with, going on where an interrupted training stopped."""
    from nbkit.methods.mend.recipe import recipe_of
    from nbkit.methods.mend.training import train_to_file
    from nbkit.models.loading import load

    chosen, files = recipe_of(model, recipe, by_name(p))
    typer.echo(train_to_file(load(model, device, dtype), chosen, files))


@app.command()
def hardedit(
    model: Annotated[str, typer.Option(help="An embedded model, a local folder, or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="The .json file of requests; a data card is written beside it as .md.")],
    n: Annotated[int, typer.Option(help="How many requests.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw of words, templates and targets.")] = 0,
    words: Annotated[
        Path | None, typer.Option(help="A word a line.", show_default="an embedded model's own world's")
    ] = None,
    relations: Annotated[
        Path | None,
        typer.Option(help="JSON records of relation_id, templates, targets.", show_default="those of the requests"),
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(help="File or name; their subjects are not used.", show_default="an embedded world's facts"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
):
    """Build requests about single common words that open the prompt, as those of HardEdit, which break models."""
    from nbkit.models.loading import load
    from nbkit.records.hardedit import materials
    from nbkit.studies import hardedit as sets

    given = materials(model, words, relations, requests)
    sets.check_place(out)
    lm = load(model, device, dtype)
    made = sets.hardedit(lm, given, n, seed)
    for path in sets.save_hardedit(lm, made, given, out, seed):
        typer.echo(path)


class Stopped(KeyboardInterrupt):
    """A signal has come that ends the command. (Of a plain KeyboardInterrupt Python may give another exit status.)"""


@contextmanager
def stoppable() -> Iterator[list[signal.Signals]]:
    """Within this `with`, SIGTERM and SIGHUP end what runs as Ctrl-C does, by a KeyboardInterrupt.

    So a kernel is interrupted, stores what it has computed and ends. Yields the signals that have come. One that is
    ignored stays so (nohup). A terminal that closes sends several: those that follow a first one do not disturb what it
    has begun, but for a second Ctrl-C.
    """
    arrived: list[signal.Signals] = []
    terminals = [number for number in (1, 2) if os.isatty(number)]
    since = time.monotonic()

    def stop(number, frame):
        nonlocal since
        if number != signal.SIGINT and arrived and time.monotonic() < since + PATIENCE:
            return
        since = time.monotonic()
        arrived.append(signal.Signals(number))
        for terminal in terminals:
            if not os.isatty(terminal):  # it is gone: a progress bar that is drawn there would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        raise Stopped

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main():
    """Run the command line; what ends it becomes one message.

    Exit status 1 for a known error, 128 and its number for a signal: 130 after Ctrl-C.
    """
    with stoppable() as arrived:
        try:
            app(prog_name="nbkit")
        except BaseException as end:
            if arrived:
                cause = "" if isinstance(end, KeyboardInterrupt | SystemExit) else f" ({type(end).__name__}: {end})"
                by = "" if arrived[0] == signal.SIGINT else f" by {arrived[0].name}"
                # What a signal strikes before asyncio has taken it up, Python would tell of at the end.
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
                print(f"interrupted{by}; rows that were already stored are kept{cause}", file=sys.stderr)
                sys.exit(128 + arrived[0])
            if isinstance(end, NbkitError):
                sys.exit(f"error: {end}")
            raise


if __name__ == "__main__":
    main()
