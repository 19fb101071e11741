"""A bit that has changed on a disk is noticed in every kind of stored file, and the message names the file."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbkit.edits.checkpoints import Checkpoint
from nbkit.edits.edit import Edit
from nbkit.edits.edit_files import load_edits, save_edits
from nbkit.edits.tensor_files import CHECKED, CHECKSUM, reading_tensors, write_tensors
from nbkit.edits.updates import LowRank
from nbkit.errors import ResultsError
from nbkit.keys.moments import second_moment
from nbkit.records import runs
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store, Study

KEY = {"model": "é", "lr": 1e-5, "layers": [1, 2]}


@pytest.fixture
def files(tiny, tmp_path, monkeypatch):
    """{kind: (file, what reads it)}, as small as they can be, so that every part of them is hit."""
    run = {"run": "r", "notebook": "n", "parameters": {"lr": 1e-5}, "started": "now"}
    monkeypatch.setenv(runs.SETTING, json.dumps(run))
    study = Store(tmp_path).study("toy", KEY)
    study.complete(["a", "b"], lambda unit: [{"perplexity": float("inf"), "stop": unit}])
    (part,), (note,) = study.folder.glob("part-*"), study.folder.glob("runs/*")

    edit = Edit({"w": LowRank(torch.ones(4, 1), torch.ones(1, 3))}, (EditRequest("{} is", "Ann", "é"),), "rome")
    monkeypatch.setattr(tiny, "weight_of", lambda name, delta: None)
    save_edits(edit, tmp_path / "edits.safetensors", tiny)

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", {"seed": 0})
    checkpoint.save(model.state_dict(), optimizer, {"step": 3})

    def moment():
        return second_moment(tiny, 1, ["Ann plays."], cache=tmp_path / "moments")

    moment()
    (kept,) = (tmp_path / "moments").iterdir()
    return {
        "rows": (part, lambda: Store(tmp_path).study("toy", KEY)),
        "key": (study.folder / "key.json", lambda: Study.stored(study.folder)),
        "note of a run": (note, lambda: runs.runs_of(study.folder)),
        "edits": (tmp_path / "edits.safetensors", lambda: load_edits(tmp_path / "edits.safetensors", None)),
        "checkpoint": (checkpoint.path, lambda: checkpoint.load(model.state_dict(), optimizer)),
        "second moment": (kept, moment),
    }


@pytest.mark.parametrize("kind", ["rows", "key", "note of a run", "edits", "checkpoint", "second moment"])
def test_every_flipped_bit_is_noticed_and_the_file_is_named(files, kind):
    path, read = files[kind]
    content = path.read_bytes()
    n_bits = 8 * len(content)
    header = range(min(n_bits, 8 * 1000))  # where safetensors and JSON say what is what
    draw = random.Random(0)
    for bit in {*draw.choices(range(n_bits), k=400), *draw.sample(header, k=min(400, len(header)))}:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ResultsError, match=path.name.replace(".", r"\.")):
            read()
            pytest.fail(f"bit {bit} of the file of {kind} was flipped unnoticed")
    path.write_bytes(content)
    read()


def test_files_from_before_there_were_checksums_are_read(files, tmp_path: Path):
    part, read = files["rows"]
    part.rename(part.with_name("part-00000000000000000001-0123abcd.parquet"))
    assert read().done("a")
    note, read = files["note of a run"]
    before = {name: value for name, value in json.loads(note.read_text()).items() if name != "checksum"}
    note.write_text(json.dumps(before, indent=1, ensure_ascii=False))
    assert read() == [before]
    save_file({"x": torch.ones(2)}, tmp_path / "old.safetensors", {"step": "3"})
    with reading_tensors(tmp_path / "old.safetensors", "test") as (tensors, about):
        assert about == {"step": 3} and torch.equal(tensors["x"], torch.ones(2))


@pytest.mark.parametrize("lost", [CHECKED, CHECKSUM])
def test_a_file_that_has_lost_its_checksum_is_not_taken_for_an_old_one(tmp_path, lost):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, {})
    path.write_bytes(path.read_bytes().replace(lost.encode(), lost.replace("nbkit", "nbkat").encode()))
    with pytest.raises(ResultsError, match="a.safetensors is damaged, .*checksum"), reading_tensors(path, "test"):
        pass
