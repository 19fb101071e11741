"""The dose and the time: when a model becomes one that an edit can break.

    tables = climb(rungs("miniworld-gpt2", [("opening", 0.0), ("opening", 0.4)], [0, 1], 2000), questions, folder)
    export(tables, paths.DATA / "miniworld" / "ladder")

A rung is a short training whose recipe is the shipped model's but for one number, the dose, and its seed. The rungs are
looked at when they end, the training of the shipped model at several steps; every such snapshot is asked the same.
Trainings resume, and rows are stored as they are measured (nbkit/records/results.py), so what was interrupted goes on
where it was. Three tables come of it, each row with its training, step and recipe:

edits: one row an edit (layer, setting, subject_kind, perplexity, perplexity_before, numerator, denominator,
    signed_denominator k·u, said_plain, said_behind: the new target is the first choice after the prompt alone, and the
    share of sentences behind which it is).
layers: one row a layer: `measures.first_token_regime`.
recall: one row a kind of subject: n, and the shares of facts said at the plain prompt and behind a sentence.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from miniworld import efficacy, measures
from miniworld.families import tokenizer_of
from miniworld.files import held_out
from miniworld.measures import SENTENCE, UNSEEN, first_token_regime, recall, said
from miniworld.recipe import Recipe, recipe_of
from miniworld.train import train
from miniworld.world import World
from nbkit.errors import ModelError
from nbkit.methods.hparams import HPARAMS, read_tables
from nbkit.methods.verbs import edit
from nbkit.models.loading import load
from nbkit.models.prompts import context_templates, request_columns, subject_kind
from nbkit.records.files import write_atomically
from nbkit.records.provenance import canonical, code_of, code_version, digest, provenance
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies.metrics import perplexity

TABLES = ("edits", "layers", "recall")
REPORTED = 200  # requests of seed 0 that figures report at most: the ladder's come after them
SETTINGS = {"ROME": {}, "C-ROME": {"key_mode": "prefixed"}}
SEARCH = efficacy.SETTINGS[-1]  # the most room: under the published settings few edits of so small a model take
DOSES = ("opening", "weight_decay", "decay")  # the numbers of a recipe that rungs may differ in


def snapshot_steps(n_steps: int) -> list[int]:
    """The steps at which a training is looked at: every sixth of it, and half of the first."""
    return sorted({max(1, round(sixths * n_steps / 6)) for sixths in (0.5, *range(1, 7))})


def rungs(model: str, doses: Sequence[tuple[str, float]], seeds: Sequence[int], n_steps: int) -> dict[str, Recipe]:
    """The recipes of the ladder by the name of their training: those of `model`, but for one dose, seed and steps.

    The model's own recipe is left out where its rate does not fall: its training passes through what that rung is.
    """
    own = recipe_of(model, n_steps=n_steps, averaged=0.0)
    recipes = {
        f"{name}-{value:g}-seed-{seed}": replace(own, **{name: value}, seed=seed)
        for seed in seeds
        for name, value in doses
    }
    return {name: recipe for name, recipe in recipes.items() if recipe != own or own.decay}


def search_of(model: str) -> dict[str, float]:
    """The room of the search for v*: the model's own of hparams.toml, where it has any, or `SEARCH`."""
    own = read_tables(HPARAMS)["rome"].get(model, {})
    return {name: own.get(name, value) for name, value in SEARCH.items()}


@dataclass(frozen=True)
class Questions:
    """What every snapshot is asked.

    model: whose recipe and hyper-parameters they are. n_first, n_others: edits of one-token first subjects, and of each
    other kind. every: of the facts, one in so many is asked for. n_keys: requests of each kind, and texts, whose keys
    are compared.
    """

    world: World
    requests: Sequence[EditRequest]
    texts: Sequence[str]
    model: str = "miniworld-gpt2"
    layers: tuple[int, ...] = (1,)
    n_first: int = 24
    n_others: int = 6
    every: int = 4
    n_keys: int = 100


class Snapshot:
    """A model as it was at some step of its training, and what is measured of it."""

    def __init__(self, folder: Path, questions: Questions, store: Store):
        self.questions, self.store = questions, store
        self.recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        self.lm = load(folder)
        self.lm.name = questions.model  # whose defaults in hparams.toml it then has
        self.about = {"training": folder.parent.name, "step": int(folder.name.removeprefix("step-"))}
        self.about |= {name: self.recipe[name] for name in ("family", *DOSES, "seed", "n_steps")}
        self.about |= {"recipe": canonical(self.recipe), "model_hash": self.lm.hash}

    def tables(self) -> dict[str, pd.DataFrame]:
        """The rows of each table; those that are stored are not computed again."""
        asked = self.questions
        kinds = [("ROME", kind) for kind in self.requests] + [("C-ROME", "one-token first")]
        edits = {f"layer {layer}, {setting}, {kind}": (layer, setting, kind)
                 for layer in asked.layers for setting, kind in kinds}  # fmt: skip
        data = {"requests": digest(asked.requests), "texts": digest(asked.texts)}
        searched = {"edited": digest(self.requests), **self.search, "unseen": UNSEEN}
        recalled = {"facts": digest(asked.world.facts), "every": asked.every, "behind": SENTENCE}
        compared = {"layers": asked.layers, "n": asked.n_keys}
        return {
            "edits": self.complete("edits", data | searched, edits, lambda unit: self.edited(*edits[unit])),
            "layers": self.complete("layers", data | compared, ["all"], lambda _: self.regime()),
            "recall": self.complete("recall", recalled, ["all"], lambda _: self.recalled()),
        }

    def complete(self, table: str, key: dict, units: Iterable[str], compute: Callable) -> pd.DataFrame:
        """The rows of these units, of which the key says all that determines them besides the model and the code."""
        code = [code_version(), *(code_of(Path(file)) for file in (__file__, measures.__file__))]
        study = self.store.study(f"ladder_{table}", {"model": self.lm.hash, "code": code, **key}, provenance())
        label = f"{self.about['training']}, step {self.about['step']}: {table}"
        return study.complete(units, compute, label).assign(**self.about)

    @cached_property
    def requests(self) -> dict[str, list[EditRequest]]:
        """The requests that are edited, by kind of subject, without what is asked of neighbours and paraphrases."""
        asked, by_kind = self.questions, {"one-token first": [], "several-token first": [], "later": []}
        for request in asked.requests:
            by_kind[subject_kind(self.lm, request)].append(request.alone)
        most = {kind: asked.n_first if kind == "one-token first" else asked.n_others for kind in by_kind}
        return {kind: of_kind[: most[kind]] for kind, of_kind in by_kind.items()}

    @cached_property
    def search(self) -> dict[str, float]:
        return search_of(self.questions.model)

    @cached_property
    def templates(self) -> list[str]:
        return context_templates(self.lm)

    @cached_property
    def before(self) -> float:
        return perplexity(self.lm, self.questions.texts)

    def edited(self, layer: int, setting: str, kind: str) -> Iterator[dict]:
        """Each request of a kind edited on its own at a layer, one row each."""
        lm, requests = self.lm, self.requests[kind]
        search = {**self.search, **SETTINGS[setting]}
        made = edit(lm, requests, layer=layer, context_templates=self.templates, progress=False, **search)
        after, taken = perplexity(lm, self.questions.texts, edits=made), said(lm, requests, made)
        for place, (request, one) in enumerate(zip(requests, made, strict=True)):
            yield {
                **request_columns(lm, request),
                "layer": layer,
                "setting": setting,
                "perplexity": after[place],
                "perplexity_before": self.before,
                "numerator": one.info["numerator"],
                "denominator": one.info["denominator"],
                "signed_denominator": one.info["signed_denominator"],
                "said_plain": bool(taken["plain"][place]),
                "said_behind": taken["behind"][place],
                **self.search,
            }

    def regime(self) -> list[dict]:
        """The keys of the first position, one row a layer."""
        asked = self.questions
        frame = first_token_regime(self.lm, asked.requests, asked.texts, asked.n_keys, asked.layers)
        return frame.to_dict("records")

    def recalled(self) -> list[dict]:
        """What the model knows, one row a kind of subject."""
        asked = self.questions
        plain = recall(self.lm, asked.world, every=asked.every)
        frame = plain.assign(behind=recall(self.lm, asked.world, SENTENCE, every=asked.every)["correct"])
        kinds = frame.groupby("subject_kind")
        table = kinds[["correct", "behind"]].mean().rename(columns={"correct": "plain"})
        return table.assign(n=kinds.size()).reset_index().to_dict("records")


def snapshots_in(folder: Path) -> list[Path]:
    """The whole snapshots of a training, by step: the recipe is what is written last."""
    whole = [path.parent for path in folder.glob("step-*/recipe.json")]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def train_rung(recipe: Recipe, world: World, folder: Path) -> None:
    """Trains, or goes on training, a rung to its end, and keeps what it then is."""
    kept = folder / f"step-{recipe.n_steps}" / "recipe.json"
    if kept.is_file() and Recipe(**json.loads(kept.read_text(encoding="utf-8"))) == recipe:
        return
    tokenizer = tokenizer_of(recipe, world)
    train(recipe, world, tokenizer, held_out(world), folder, snapshots=[recipe.n_steps])


def climb(
    recipes: Mapping[str, Recipe], questions: Questions, folder: Path, own: Path | None = None
) -> dict[str, pd.DataFrame]:
    """The rows by table of all rungs, which are trained and kept below `folder`; before them those of `own`.

    own: the folder of a training that is there, such as the shipped model's, with the snapshots that it has. ModelError
    for a layer that the models will not have, before any is trained.
    """
    for name, recipe in recipes.items():
        if not set(questions.layers) <= set(range(recipe.n_layers)):
            layers = ", ".join(map(str, questions.layers))
            raise ModelError(f"{name} will have layers 0 to {recipe.n_layers - 1}, and {layers} are to be edited")
    store, measured = Store(folder / "results"), []
    for path in snapshots_in(own) if own is not None else ():
        measured.append(Snapshot(path, questions, store).tables())
    for name, recipe in recipes.items():
        train_rung(recipe, questions.world, folder / name)
        measured.append(Snapshot(folder / name / f"step-{recipe.n_steps}", questions, store).tables())
    return {name: pd.concat([tables[name] for tables in measured], ignore_index=True) for name in TABLES}


def export(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Writes each table to `folder` as a small Parquet file: numbers that were measured are rounded to float32."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table = table.drop(columns=["study", "created", "libraries", "nbkit_version"])
        measured = [column for column in table.select_dtypes("float64") if column not in DOSES]
        with np.errstate(over="ignore"):  # a perplexity beyond float32 is as good as infinite
            table = table.astype(dict.fromkeys(measured, np.float32))
        write_atomically(
            folder / f"{name}.parquet",
            lambda file, table=table: table.to_parquet(file, index=False, compression="zstd"),
        )
