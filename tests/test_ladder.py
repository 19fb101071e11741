"""The ladder of trainings, on tiny models of a few steps: what it measures, what it does again, what it writes."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import nbkit
from miniworld import ladder
from miniworld.commands import app
from miniworld.ladder import REPORTED, Questions, climb, export, rungs, search_of, snapshot_steps
from nbkit.batch.run import run_notebook
from nbkit.errors import ModelError, ResultsError
from nbkit.records.results import read_table

SMALL = {
    "n_layers": 2, "d_model": 32, "d_mlp": 64, "n_heads": 2, "window": 64, "batch": 4, "warmup": 1, "shard_lines": 200,
}  # fmt: skip
OF_RUN = ["created"]  # columns that another run of the same need not have
N_EDITS = 2 * 2 + 1 + 1  # of a snapshot and layer: two hard ones with ROME and C-ROME, one of each other kind


@pytest.fixture(scope="module")
def recipes():
    """Two doses."""
    doses = [("opening", 0.0), ("opening", 0.4)]
    return {name: replace(recipe, **SMALL) for name, recipe in rungs("miniworld-gpt2", doses, [1], 2).items()}


@pytest.fixture(scope="module")
def questions(world):
    requests, texts = nbkit.read_requests("miniworld", seed=0)[REPORTED:][:60], nbkit.read_texts("miniworld", limit=8)
    return Questions(world, requests, texts, layers=(1,), n_first=2, n_others=1, every=500, n_keys=4)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer(world_tokenizer):
    """Training the tokenizer anew for each rung takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ladder, "tokenizer_of", lambda *_: world_tokenizer)
        yield


@pytest.fixture(scope="module")
def climbed(world, world_tokenizer, recipes, questions, tmp_path_factory):
    """(folder, the training that the ladder does not make, its tables)."""
    folder = tmp_path_factory.mktemp("ladder")
    own = folder / "of its own" / "miniworld-gpt2"
    ladder.train(replace(recipes["opening-0-seed-1"], seed=7), world, world_tokenizer, frozenset(), own, [1, 2])
    return folder, own, climb(recipes, questions, folder, own)


def assert_same(tables, others):
    assert tables.keys() == others.keys()
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table.drop(columns=OF_RUN), others[name].drop(columns=OF_RUN))


def test_every_snapshot_of_every_training_has_its_rows(climbed, recipes, questions):
    folder, own, tables = climbed
    snapshots = [("miniworld-gpt2", 1), ("miniworld-gpt2", 2), ("opening-0-seed-1", 2), ("opening-0.4-seed-1", 2)]
    for name, of_each in {"edits": N_EDITS, "layers": 1, "recall": 3}.items():
        counts = tables[name].groupby(["training", "step"], sort=False).size()
        assert counts.to_dict() == dict.fromkeys(snapshots, of_each)
    edits = tables["edits"]
    assert edits.drop_duplicates("training")["opening"].tolist() == [0.0, 0.0, 0.4]
    assert edits.drop_duplicates("training")["seed"].tolist() == [7, 1, 1]
    assert ladder.Recipe(**json.loads(edits["recipe"].iloc[-1])) == recipes["opening-0.4-seed-1"]
    hard = edits[edits["subject_kind"] == "one-token first"]
    assert hard.groupby(["training", "step", "layer", "setting"]).size().tolist() == [2] * 8
    assert (edits["setting"] == "C-ROME").sum() == 8 and len(edits["case_id"].unique()) == 4


def test_rows_say_what_was_measured_of_the_snapshot(climbed, questions, world):
    folder, _, tables = climbed
    rows = tables["edits"].query("training == 'opening-0.4-seed-1' and step == 2 and layer == 1 and setting == 'ROME'")
    lm = nbkit.load(folder / "opening-0.4-seed-1" / "step-2", device="cpu")
    assert set(rows["model_hash"]) == {lm.hash}
    of_case = {str(request.case_id): request for request in questions.requests}
    asked = [of_case[case] for case in rows["case_id"]]
    made = nbkit.edit(lm, asked, layer=1, progress=False, **search_of("miniworld-gpt2"))
    np.testing.assert_allclose(rows["perplexity"], nbkit.perplexity(lm, questions.texts, edits=made), rtol=1e-4)
    np.testing.assert_allclose(rows["perplexity_before"], nbkit.perplexity(lm, questions.texts), rtol=1e-5)
    np.testing.assert_allclose(rows["denominator"], [one.info["denominator"] for one in made], rtol=1e-4)
    said = nbkit.edit_metrics(lm, asked, edits=made)["efficacy_argmax"].astype(bool)
    assert rows["said_plain"].tolist() == said.tolist()
    every = tables["edits"]
    np.testing.assert_allclose(every["signed_denominator"].abs(), every["denominator"], rtol=1e-4)
    assert (every.loc[every["setting"] == "C-ROME", "signed_denominator"] > 0).all()
    assert tables["recall"].groupby(["training", "step"])["n"].sum().unique().tolist() == [4 * len(world.facts[::500])]
    assert tables["layers"]["position_0"].between(-1, 1).all() and tables["layers"]["negative"].between(0, 1).all()


def test_an_interrupted_ladder_goes_on_where_it_was(climbed, recipes, questions, tmp_path, monkeypatch, interrupt_at):
    _, own, tables = climbed
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, ladder, 2 * N_EDITS + 5, "request_columns")  # amid the edits by C-ROME of the first rung
        climb(recipes, questions, tmp_path, own)
    assert (tmp_path / "opening-0-seed-1" / "step-2").is_dir() and not (tmp_path / "opening-0.4-seed-1").exists()
    rows = []
    described = ladder.request_columns
    monkeypatch.setattr(ladder, "request_columns", lambda *about: rows.append(about) or described(*about))
    assert_same(climb(recipes, questions, tmp_path, own), tables)
    assert len(rows) == 4 * N_EDITS - (2 * N_EDITS + 4)  # those two are measured together, so both again


def test_what_was_trained_and_measured_is_not_done_again(climbed, recipes, questions, monkeypatch):
    folder, own, tables = climbed
    for name in ("train", "edit", "recall", "first_token_regime", "perplexity"):
        monkeypatch.setattr(ladder, name, lambda *_, **__: pytest.fail("done again"))
    assert_same(climb(recipes, questions, folder, own), tables)
    without = climb(recipes, questions, folder)
    assert set(without["edits"]["training"]) == set(recipes)


def test_the_tables_are_small_files_that_can_be_read_back(climbed, tmp_path):
    _, _, tables = climbed
    export(tables, tmp_path / "rows")
    for name, table in tables.items():
        path = tmp_path / "rows" / f"{name}.parquet"
        back = read_table(path, "the command")
        assert path.stat().st_size < 50_000 and len(back) == len(table) and "created" not in back
        for column in back:
            if pd.api.types.is_float_dtype(back[column]):
                np.testing.assert_allclose(back[column], table[column], rtol=1e-6)
            else:
                assert back[column].tolist() == table[column].tolist(), column
    assert back["opening"].unique().tolist() == [0.0, 0.4]


def test_a_table_that_is_missing_or_damaged_names_the_command(tmp_path):
    with pytest.raises(ResultsError, match=r"edits\.parquet is not there: `python data/miniworld ladder` makes it"):
        read_table(tmp_path / "edits.parquet", "python data/miniworld ladder")
    (tmp_path / "edits.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResultsError, match=r"edits\.parquet is damaged .*: `python data/miniworld ladder` makes it"):
        read_table(tmp_path / "edits.parquet", "python data/miniworld ladder")


def test_the_notebook_draws_both_figures_from_the_rows(climbed, tmp_path):
    _, _, tables = climbed
    export(tables, tmp_path / "rows")
    values, folder = {"rows": str(tmp_path / "rows"), "layer": 1}, tmp_path / "figures"
    run_notebook("06_when_a_model_becomes_breakable", values, tmp_path / "runs", progress=False, figures=folder)
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    figures = ("06_dose", "06_time")
    assert written == [f"{figure}.{kind}" for figure in figures for kind in ("md", "pdf", "png")]
    assert "opening-" not in (tmp_path / "figures" / "06_time.md").read_text(encoding="utf-8")
    assert "(seeds 1, 7)" in (tmp_path / "figures" / "06_dose.md").read_text(encoding="utf-8")


def test_a_training_is_looked_at_from_its_first_steps_to_its_last():
    assert snapshot_steps(6000) == [500, 1000, 2000, 3000, 4000, 5000, 6000]
    assert snapshot_steps(2) == [1, 2] and snapshot_steps(1) == [1]


def test_a_layer_that_is_not_there_is_refused_before_anything_is_trained(recipes, questions, tmp_path):
    with pytest.raises(ModelError, match="opening-0-seed-1 will have layers 0 to 1, and 1, 2 are to be edited"):
        climb(recipes, replace(questions, layers=(1, 2)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_the_shipped_model_keeps_it_as_it_was_on_the_way(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr("miniworld.files.write_files", lambda *_: None)
    monkeypatch.setattr("miniworld.families.tokenizer_of", lambda *_: None)
    monkeypatch.setattr("miniworld.train.train", lambda *_, snapshots: kept.update(snapshots=snapshots) or 1 / 0)
    result = CliRunner().invoke(app, ["train", "--work", str(tmp_path), "--n-steps", "60"])
    assert isinstance(result.exception, ZeroDivisionError)  # nothing is shipped
    assert kept["snapshots"] == [5, 10, 20, 30, 40, 50, 60]


def test_what_a_model_has_of_its_own_in_the_table_is_what_the_search_takes(tmp_path, monkeypatch):
    path = tmp_path / "hparams.toml"
    path.write_text("[rome]\nv_weight_decay = 0.5\n[rome.this]\nlayer = 3\nclamp_norm_factor = 6.0\n")
    monkeypatch.setattr(ladder, "HPARAMS", path)
    assert search_of("this") == {**ladder.SEARCH, "clamp_norm_factor": 6.0}
    assert search_of("that") == ladder.SEARCH


@pytest.mark.parametrize("dose", ["opening", "opening=much", "window=3", ""])
def test_a_dose_that_is_none_is_refused(dose, monkeypatch):
    monkeypatch.setattr(ladder, "climb", lambda *_: pytest.fail("begun"))
    result = CliRunner().invoke(app, ["ladder", "--dose", dose])
    assert result.exit_code == 2 and "is no dose" in result.output


def test_the_ladder_leaves_out_what_the_shipped_training_passes_through():
    doses = [("opening", 0.0), ("opening", 0.1), ("decay", 0.3)]
    assert list(rungs("miniworld-gpt2", doses, [0, 1], 2000)) == [
        "opening-0.1-seed-0", "decay-0.3-seed-0", "opening-0-seed-1", "opening-0.1-seed-1", "decay-0.3-seed-1",
    ]  # fmt: skip


def test_the_command_hands_over_its_options(tmp_path, monkeypatch):
    handed = {}
    monkeypatch.setattr(ladder, "climb", lambda *given: handed.update(climb=given))
    monkeypatch.setattr(ladder, "export", lambda tables, folder: handed.update(out=folder))
    options = "--dose opening=0 --dose decay=0.3 --seed 5 --n-steps 7 --layer 1 --n-first 3".split()
    folders = ["--own", tmp_path / "none", "--work", tmp_path, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["ladder", *options, *map(str, folders)])
    assert result.exit_code == 0, result.output
    assert "none holds no snapshots of miniworld-gpt2: `python data/miniworld train" in result.output
    recipes, questions, folder, own = handed["climb"]
    assert list(recipes) == ["opening-0-seed-5", "decay-0.3-seed-5"] and recipes["decay-0.3-seed-5"].n_steps == 7
    assert questions.layers == (1,) and questions.n_first == 3 and len(questions.requests) == 700
    assert folder == tmp_path and own == tmp_path / "none" and handed["out"] == tmp_path / "out"
