"""Whatever is malformed is refused, in words that say what is wrong: the tables in malformed/ hold what was tried.

A case is what is given and a part of what is said of it. It is right if an error of nbkit says so, or, where that is
enough, a warning; any other exception, and no word at all, is wrong.
"""

import gzip
import json
import logging
import math
import shutil
import tomllib
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import nbkit
from nbkit import paths, studies
from nbkit.edits.updates import LowRank
from nbkit.errors import NbkitError
from nbkit.keys.extract import keys
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.setups import setup
from nbkit.models.shapes import random_model
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.records.selection import stratified
from nbkit.records.tables import write_table

TABLES = {path.stem: tomllib.loads(path.read_text("utf-8")) for path in (Path(__file__).parent / "malformed").glob("*")}
GOOD = {"prompt": "{} is in", "subject": "Vouda", "target_new": "Krela", "case_id": 41}
NUMBERS = {"nan": math.nan, "inf": math.inf, "torch": torch, "np": np, "json": json, "gzip": gzip, "GOOD": GOOD}


def table(file: str, *names: str):
    cases = [(given, said) for name in names for given, said in TABLES[file][name].items()]
    return pytest.mark.parametrize(("given", "said"), cases, ids=[given[:60] or "nothing" for given, _ in cases])


def refused(said: str, call) -> None:
    """`call` raises an error of nbkit, or warns, in these words."""
    assert said
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            given = call()
        except NbkitError as error:
            assert said in str(error)
            return
    assert [one for one in heard if said in str(one.message)], f"accepted: {given!r:.200}"


@pytest.fixture
def file(tmp_path):
    """`file(name, content)`: the path of a file that holds this text, these bytes, or these records."""

    def file(name: str, content: str | bytes | list) -> Path:
        content = json.dumps(content) if isinstance(content, list) else content
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return tmp_path / name

    return file


@pytest.fixture(scope="module")
def world(make_lm):
    """What the cases call by name."""
    lm = make_lm("gpt2")
    requests = [
        EditRequest("{} is located in", "Vouda", "Sennifar", "Krela", 0, ("I say that Vouda is in",)),
        EditRequest("{} plays the", "Ann", "drum", case_id=1),
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "the song", "French", case_id=2),
    ]
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(48, 200, dtype=torch.float64, generator=draw)

    def edit_of(name: str, d_out: int = 32, d_in: int = 48) -> nbkit.Edit:
        return nbkit.Edit({name: LowRank(torch.ones(d_out, 1), torch.ones(1, d_in))}, (requests[0],), "by hand")

    def changed(matrix, row, column, value):
        matrix = matrix.clone()
        matrix[row, column] = value
        return matrix

    def apply(lm, one):
        with nbkit.applied(lm, one):
            pass

    def edit(lm, requests, **given):
        return nbkit.edit(lm, requests, **{"context_templates": ["{}"], **given})

    names = {name: getattr(nbkit, name) for name in nbkit.__all__ if name not in ("__version__", "NbkitError")}
    return {
        **vars(studies), **names, **NUMBERS, "lm": lm, "edit": edit, "requests": requests,
        "apply": apply, "changed": changed,
        "texts": ["The river runs through Vouda and Sennifar.", "Ann plays the harp."],
        "C": some @ some.T / 200, "singular": some[:, :9] @ some[:, :9].T,
        "edits": [edit_of(lm.weight_name(1)) for _ in requests],
        "other_edit": edit_of("transformer.h.9.mlp.c_proj.weight"), "thin_edit": edit_of(lm.weight_name(1), 5),
        "long_prompt": EditRequest("Vouda " * 100 + "{} plays the", "Ann", "drum"),
        "long_target": EditRequest("{} plays the", "Ann", "Krela " * 100),
        "keys": keys, "hyper_parameters": hyper_parameters, "setup": setup, "Store": Store, "stratified": stratified,
        "random_model": random_model, "write_table": write_table, "results_frame": pd.DataFrame({"a": [1]}),
    }  # fmt: skip


@table("requests", "request")
def test_a_request(given, said):
    refused(said, lambda: eval(f"EditRequest(**{{**GOOD, **dict({given})}})", {**NUMBERS, "EditRequest": EditRequest}))


@table("requests", "file_of_requests")
@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_a_file_of_requests(given, said, file):
    refused(said, lambda: nbkit.read_requests(file("mine.json", given)))


@table("requests", "file_of_texts")
def test_a_file_of_texts(given, said, file):
    refused(said, lambda: nbkit.read_texts(file("mine.json", given)))


@table("calls", "files_of_hyper_parameters")
def test_a_file_of_hyper_parameters(given, said, world, file, monkeypatch):
    monkeypatch.setenv("NBKIT_HPARAMS", str(file("mine.toml", given)))
    method = "ft" if given.startswith("[ft]") else "rome"
    refused(said, lambda: hyper_parameters(world["lm"], method))


@pytest.mark.parametrize(("name", "said"), [("nowhere.toml", "cannot be read"), (".", "cannot be read")])
def test_no_file_of_hyper_parameters(name, said, world, tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_HPARAMS", str(tmp_path / name))
    refused(said, lambda: hyper_parameters(world["lm"], "rome", layer=1))


@table("requests", "reading")
def test_reading(given, said, file, tmp_path):
    reading = {"read_requests": nbkit.read_requests, "read_texts": nbkit.read_texts}
    refused(said, lambda: eval(given, {**NUMBERS, **reading, "file": file, "folder": tmp_path}))


@table("calls", *(name for name in TABLES["calls"] if name != "files_of_hyper_parameters"))
def test_a_call(given, said, world, file, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    before = world["lm"].hash
    refused(said, lambda: eval(given, {**world, "file": file, "folder": tmp_path}))
    assert world["lm"].n_applied == 0 and world["lm"].hash == before


# --- folders of models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_model(make_lm, tmp_path_factory):
    """A tiny model as a user's own folder, to be copied."""
    folder = tmp_path_factory.mktemp("model") / "own-model"
    lm = make_lm("gpt2")
    lm.model.float().save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def changes(own_model, tmp_path):
    """What the cases change in a copy of it."""
    folder = tmp_path / "own-model"
    shutil.copytree(own_model, folder)

    def write(name: str, content: str | bytes) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def fields(name: str, **changed) -> None:
        held = {**json.loads((folder / name).read_text()), **changed}
        write(name, json.dumps({field: value for field, value in held.items() if value is not None}))

    def weights(change) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return {
        **NUMBERS, "load": nbkit.load, "folder": folder, "write": write, "weights": weights,
        "read": lambda name: (folder / name).read_bytes(),
        "remove": lambda name: (folder / name).unlink(missing_ok=True),
        "rename": lambda old, new: (folder / old).rename(folder / new),
        "config": partial(fields, "config.json"), "tokenizer_config": partial(fields, "tokenizer_config.json"),
        "index": lambda content: write("model.safetensors.index.json", json.dumps({"weight_map": content})),
    }  # fmt: skip


@pytest.fixture
def quiet():
    """transformers says much about such folders, besides what it raises."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@table("models", "folder")
def test_a_folder_of_a_model(given, said, changes, quiet):
    eval(given, changes)
    refused(said, lambda: nbkit.load(changes["folder"], device="cpu"))


@table("models", "arguments")
def test_arguments_of_load(given, said, changes, quiet):
    refused(said, lambda: eval(given, changes))


def test_there_are_hundreds_of_cases_and_each_says_something():
    cases = [said for file in TABLES.values() for cases in file.values() for said in cases.values()]
    assert len(cases) >= 300 and all(cases)
