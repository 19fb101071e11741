"""The command line: `python -m nbkit run NOTEBOOK -p name value ...`, `python -m nbkit figures`, and train-mend."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from nbkit.errors import NbkitError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Out = Annotated[Path | None, typer.Option(help="Folder for executed notebooks.", show_default="runs/")]
Pairs = Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; repeatable.")]


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


def by_name(pairs: list[str] | None) -> dict[str, str]:
    """{name: value} of texts name=value."""
    values = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{name} has no value; write -p {name} VALUE")
        if name in values:
            raise typer.BadParameter(f"{name} is given twice")
        values[name] = value
    return values


@app.command(cls=PairsCommand)
def run(
    notebook: Annotated[str, typer.Argument(help="A path, or the name of one in notebooks/.")],
    p: Pairs = None,
    out: Out = None,
):
    """Execute one notebook with some of its parameters replaced; the executed copy goes to runs/."""
    from nbkit.batch.run import run_notebook

    typer.echo(run_notebook(notebook, by_name(p), out))


@app.command()
def figures(
    out: Out = None,
    notebooks: Annotated[Path | None, typer.Option(help="Folder of notebooks.", show_default="notebooks/")] = None,
):
    """Execute every notebook with its defaults; figures go to figures/, executed copies to runs/.

    Those of another folder of notebooks go beside the executed copies.
    """
    from nbkit import batch, paths

    folder = notebooks or batch.NOTEBOOKS
    all_of_them = sorted(folder.glob("*.ipynb"))
    if not all_of_them:
        raise NbkitError(f"there are no notebooks in {folder}")
    drawn = paths.figures(paths.ROOT / "figures") if notebooks is None else None
    failures = batch.run_all(all_of_them, out, figures=drawn)
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
