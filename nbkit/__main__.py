"""The command line: `python -m nbkit run NOTEBOOK -p name value ...` and `python -m nbkit figures`."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from nbkit.errors import NbkitError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Out = Annotated[Path | None, typer.Option(help="Folder for executed notebooks.", show_default="runs/")]


class PairsCommand(TyperCommand):
    """Lets `-p name value` stand for `-p name=value`: typer has no repeatable option of two values."""

    def parse_args(self, ctx, args):
        folded, rest = [], list(args)
        while rest:
            word = rest.pop(0)
            pair = len(rest) >= 2 and re.fullmatch(r"\w+", rest[0]) and not rest[1].startswith("--")
            if word == "-p" and pair:
                folded += ["-p", f"{rest.pop(0)}={rest.pop(0)}"]
            else:
                folded.append(word)
        return super().parse_args(ctx, folded)


@app.command(cls=PairsCommand)
def run(
    notebook: Annotated[str, typer.Argument(help="A path, or the name of one in notebooks/.")],
    p: Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; repeatable.")] = None,
    out: Out = None,
):
    """Execute one notebook with some of its parameters replaced; the executed copy goes to runs/."""
    from nbkit.batch.run import run_notebook

    parameters = {}
    for pair in p or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{name} has no value; write -p {name} VALUE")
        if name in parameters:
            raise typer.BadParameter(f"{name} is given twice")
        parameters[name] = value
    typer.echo(run_notebook(notebook, parameters, out))


@app.command()
def figures(
    out: Out = None,
    notebooks: Annotated[Path | None, typer.Option(help="Folder of notebooks.", show_default="notebooks/")] = None,
):
    """Execute every notebook with its defaults; figures go to figures/, executed copies to runs/."""
    from nbkit import batch, paths

    folder = notebooks or batch.NOTEBOOKS
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        raise NbkitError(f"there are no notebooks in {folder}")
    failures = batch.run_all(found, out)
    for error in failures.values():
        typer.echo(f"\n{error}", err=True)
    if failures:
        names = ", ".join(path.name for path in failures)
        raise NbkitError(f"{len(failures)} of {len(found)} notebooks failed: {names}")
    typer.echo(f"{len(found)} notebooks done; figures are in {paths.FIGURES}")


@app.command()
def train_mend(
    model: Annotated[str, typer.Option(help="An embedded model, a local folder, or a Hugging Face id.")],
    data: Annotated[
        Path | None, typer.Option(help="Edit requests to train on.", show_default="the embedded world's facts")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts that edits shall not change.", show_default="the embedded world's")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Requests whose facts are not trained on.", show_default="the embedded world's requests"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The hypernetwork.", show_default="where edits look for it")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for checkpoint and log.", show_default="runs/mend/")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="the recipe's")] = None,
    batch: Annotated[int | None, typer.Option(help="Edits a step.", show_default="the recipe's")] = None,
    at_once: Annotated[int | None, typer.Option(help="Edits in one pass.", show_default="the recipe's")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the network.", show_default="the recipe's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.", show_default="the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn.", show_default="the recipe's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
):
    """Train the network that the method mend edits with, going on where an interrupted training stopped."""
    from nbkit.methods import mend_training
    from nbkit.models.loading import load

    given = {
        "n_steps": steps, "batch": batch, "at_once": at_once, "rank": rank, "learning_rate": learning_rate, "seed": seed
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    lm = load(model, device, dtype)
    typer.echo(mend_training.train_to_file(lm, data, texts, held_out, out, work, changes))


def main():
    """Run the command line; a known error becomes one message and exit status 1."""
    try:
        app(prog_name="nbkit")
    except NbkitError as error:
        sys.exit(f"error: {error}")
    except SystemExit as end:
        if end.code == 130:  # typer's status after Ctrl-C
            print("interrupted; rows that were already stored are kept", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
