"""Edits and edited models as files: what is read is what was written, or it is refused."""

import functools
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.edit_files import load_edits, save_edits
from nbkit.edits.overlays import applied
from nbkit.edits.tensor_files import CHECKED, CHECKSUM
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import ModelError, ResultsError
from nbkit.models.loading import load
from nbkit.records.requests import EditRequest

FULL = EditRequest("{} is in", "Ann", "Krela", "Vouda", 7, ("Where is Ann? In",), ("Bob is in",), ("Vouda",), "P17")
INFO = {
    "losses": [[1.5, 0.1 + 0.2, math.nan], [math.inf, -math.inf, -0.0]],
    "stop_reason": "loss \u2192 \udce9\n",
    "second_moment": True,
    "nothing": None,
    "layers": (1, 2),
    "big": 2**80,
    "by_layer": {3: {"key": torch.arange(6).view(2, 3).T}, "3": torch.tensor(2.5)},
    "by_layer.3": torch.ones(2),
    "array": np.array([[1.5, np.nan]], dtype=np.float32),
    "number": np.float64(0.1),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


def low_rank(dtype=torch.float32, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (32, rank), (rank, 48)
    return LowRank(*(torch.randn(*size, generator=generator).to(dtype) for size in shape))


def edits_of(lm):
    nan = low_rank()
    nan.left[0, 0], nan.left[1, 0], nan.left[2, 0] = torch.nan, torch.inf, -0.0
    return [
        Edit({lm.weight_name(0): nan, lm.weight_name(2): low_rank(torch.bfloat16)}, (FULL,), "rome", {"a": 1.0}, INFO),
        Edit({lm.weight_name(1): Dense(low_rank(torch.float64).dense().T.contiguous().T)}, (FULL,) * 2, "ft"),
        Edit({}),
    ]


def assert_same(one, other):
    """Equal in types and bits."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, float):
        assert repr(one) == repr(other)  # NaN and the sign of zero too
    elif isinstance(one, (LowRank, Dense)):
        assert_same(vars(one), vars(other))
    else:
        assert one == other


def assert_same_edit(one, other):
    assert_same(dict(one.deltas), dict(other.deltas))
    assert one.requests == other.requests and one.method == other.method
    plain = {**one.info, "number": float(one.info["number"])} if "number" in one.info else dict(one.info)
    assert_same(plain, dict(other.info))
    assert_same(dict(one.hparams), dict(other.hparams))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "edits.safetensors"


def test_what_is_read_is_what_was_written(lm, path):
    edits = edits_of(lm)
    save_edits(edits, path, lm)
    read = load_edits(path, lm)
    assert len(read) == 3
    for one, other in zip(edits, read, strict=True):
        assert_same_edit(one, other)


def test_edits_of_a_method(lm, path, requests, contexts):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    edits = nbkit.edit(lm, requests, method="rome", **options)
    nbkit.save_edits(edits, path, lm)
    for one, other in zip(edits, nbkit.load_edits(path, lm), strict=True):
        assert_same_edit(one, other)
        with applied(lm, one):
            weight = lm.weight(1).clone()
        with applied(lm, other):
            assert torch.equal(lm.weight(1), weight)


def test_one_edit_and_none(tiny, path):
    save_edits(edits_of(tiny)[0], path, tiny)
    assert len(load_edits(path, tiny)) == 1
    save_edits([], path, tiny)
    assert load_edits(path, tiny) == []


def test_edits_that_share_their_tensors(tiny, path):
    delta = low_rank()
    info = {"key": delta.right, "row": delta.right[0]}
    edit = Edit({tiny.weight_name(0): delta, tiny.weight_name(1): delta}, info=info)
    save_edits([edit, edit], path, tiny)
    for read in load_edits(path, tiny):
        assert_same_edit(edit, read)


def test_the_file_tells_what_is_in_it_to_any_reader(tiny, path):
    save_edits(edits_of(tiny), path, tiny)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["nbkit"])
    assert about["model"] == "tiny-gpt2" and about["base"] == tiny.hash and about["nbkit"] == nbkit.__version__
    assert about["edits"][0]["requests"][0]["subject"] == "Ann"
    assert "0.transformer.h.0.mlp.c_proj.weight.left" in load_file(path)


def test_edits_of_another_model_are_refused(make_lm, tiny, path):
    save_edits(edits_of(tiny), path, tiny)
    for other in (make_lm("gpt2", seed=1), make_lm("gpt2", dtype=torch.float32)):
        names = rf"edits of tiny-gpt2 \({tiny.hash[:12]}\), not of tiny-gpt2 \({other.hash[:12]}\)"
        with pytest.raises(ModelError, match=names):
            load_edits(path, other)
    assert len(load_edits(path, None)) == 3  # to look at them


def test_the_edits_in_the_weights_do_not_matter(make_lm, tiny, path):
    """The unedited model is what edits belong to, at writing and at reading."""
    edit = edits_of(tiny)[1]
    tiny.apply(edit)
    with applied(tiny, edit):
        save_edits(edit, path, tiny)
    fresh = make_lm("gpt2")
    assert_same_edit(load_edits(path, fresh)[0], edit)
    fresh.apply(edit)
    assert_same_edit(load_edits(path, fresh)[0], edit)
    assert fresh.hash == tiny.hash


def test_an_edit_that_does_not_fit_is_not_written(tiny, path):
    with pytest.raises(ModelError, match="does not have"):
        save_edits(Edit({"elsewhere": low_rank()}), path, tiny)
    assert not path.exists()


@pytest.mark.parametrize("value", [print, {1.5: "a"}, object(), [{1, 2}], np.array(["a", None], dtype=object)])
def test_what_cannot_be_stored_is_named(tiny, path, value):
    with pytest.raises(ResultsError, match=r"edit 0.info.what.* cannot be stored"):
        save_edits(Edit({}, info={"what": value}), path, tiny)
    assert not path.exists()


def test_a_folder_that_is_not_there(tiny, tmp_path):
    with pytest.raises(ResultsError, match="cannot be written"):
        save_edits([], tmp_path / "no" / "edits.safetensors", tiny)


def test_a_file_is_as_open_to_others_as_any_new_one(tiny, path, tmp_path):
    save_edits(edits_of(tiny), path, tiny)
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {path.name, plain.name}


def test_a_write_that_breaks_off_leaves_the_old_file(tiny, path, monkeypatch):
    save_edits(edits_of(tiny), path, tiny)
    whole = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbkit.edits.tensor_files.save_file", full)
    with pytest.raises(ResultsError, match=r"edits.safetensors cannot be written: .*No space left"):
        save_edits([], path, tiny)
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResultsError, match="cannot be written"):
        save_edits([], tmp_path / "edits.safetensors", tiny)


def test_a_damaged_file(tiny, path):
    save_edits(edits_of(tiny), path, tiny)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-10], b"\xff" * len(whole), whole.replace(b"rome", b'\\"me')):
        path.write_bytes(content)
        with pytest.raises(ResultsError, match="edits.safetensors is damaged, or no file of edits"):
            load_edits(path, tiny)


def test_files_of_something_else(tiny, path, tmp_path):
    with pytest.raises(ResultsError, match="there is no file"):
        load_edits(path, tiny)
    with pytest.raises(ResultsError, match="no file of edits"):
        load_edits(tmp_path, tiny)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ResultsError, match="no file of edits"):
        load_edits(path, tiny)
    for about in ("[]", "{}", "1", '{"format": 99, "nbkit": "3.0"}'):
        save_file({"a": torch.ones(2)}, path, metadata={"nbkit": about})
        with pytest.raises(ResultsError, match="no file of edits|written by nbkit 3.0 in a format unknown here"):
            load_edits(path, tiny)


def test_a_request_that_is_none_is_damage(tiny, path):
    record = {"method": "", "requests": [{"prompt": "no place", "subject": "a", "target_new": "b"}], "deltas": {}}
    about = {"format": 1, "nbkit": "0", "model": "m", "base": tiny.hash, "edits": [record]}
    save_file({"a": torch.ones(2)}, path, metadata={"nbkit": json.dumps(about)})
    with pytest.raises(ResultsError, match="damaged"):
        load_edits(path, tiny)


# --- models -----------------------------------------------------------------------------------------------------------


def logits(lm):
    batch = lm.tokenizer("The river runs through Vouda", return_tensors="pt")
    return lm.model(batch.input_ids).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_gives_the_same_logits(make_lm, kind, tmp_path, tied):
    size = {} if kind == "gemma3" else {"tie_word_embeddings": tied}
    # In float32, as transformers computes GPT-J's table of rotations when it loads a float64 model.
    lm = make_lm(kind, dtype=torch.float32, **size)
    lm.apply(Edit({lm.weight_name(1): low_rank()}, (FULL,), "rome"))
    lm.save(tmp_path / "edited")
    read = load(tmp_path / "edited", device="cpu", dtype=lm.dtype)
    assert torch.equal(logits(read), logits(lm))
    assert lm.base_hash == make_lm(kind, dtype=torch.float32, **size).hash, "saving changes nothing of the model"
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, read.model.state_dict()[name]), name
    one, other = (m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (lm.model, read.model))
    assert one is other and one is (tied or kind == "gemma3")
    assert lm.tokenizer("Ann is in Krela.").input_ids == read.tokenizer("Ann is in Krela.").input_ids
    assert read.n_applied == 0


def test_the_edits_lie_beside_the_model(tiny, make_lm, tmp_path):
    first, second = edits_of(tiny)[1], Edit({tiny.weight_name(0): low_rank()}, (FULL,), "rome")
    tiny.apply(first)
    with applied(tiny, second):
        tiny.save(tmp_path)
    read = load_edits(tmp_path / "nbkit_edits.safetensors", make_lm("gpt2"))
    assert_same_edit(read[0], first)
    assert_same_edit(read[1], second)
    with pytest.raises(ModelError, match="not of"):  # the saved model carries them already
        load_edits(tmp_path / "nbkit_edits.safetensors", load(tmp_path, dtype="float64"))
    tiny.undo()
    tiny.save(tmp_path)  # over its own kind
    assert not (tmp_path / "nbkit_edits.safetensors").exists()
    assert torch.equal(logits(load(tmp_path, dtype="float64")), logits(make_lm("gpt2")))


def test_bfloat16_and_half_are_kept(make_lm, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        lm = make_lm("llama", dtype=dtype)
        lm.apply(Edit({lm.weight_name(1): low_rank()}))
        lm.save(tmp_path)
        assert load_file(tmp_path / "model.safetensors")[lm.weight_name(1)].dtype == dtype
        assert torch.equal(logits(load(tmp_path, dtype=dtype, device="cpu")), logits(lm))


def test_nothing_else_is_overwritten(tiny, make_lm, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ModelError, match="is there already and holds no model; save this gpt2 model to a new folder"):
        tiny.save(tmp_path)
    with pytest.raises(ModelError, match="is there already"):
        tiny.save(tmp_path / "note.txt")
    (tmp_path / "empty").mkdir()
    tiny.save(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"holds a model of another kind \(gpt2\); save this llama model"):
        make_lm("llama").save(tmp_path / "empty")
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_model_that_would_not_be_loaded_is_not_saved(tiny, tmp_path):
    tiny.apply(Edit({tiny.weight_name(1): LowRank(torch.full((32, 1), torch.nan), torch.ones(1, 48))}))
    with pytest.raises(ModelError, match="holds NaN or infinite values; such a model is not loaded again"):
        tiny.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_place_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ResultsError, ModelError)):
        tiny.save(tmp_path / "file" / "model")


def test_a_model_that_was_loaded_from_the_folder_stays_what_it_was(make_lm, tmp_path):
    lm = make_lm("llama", dtype=torch.float32)
    lm.save(tmp_path)
    loaded = load(tmp_path, device="cpu")
    before = logits(loaded).clone()
    lm.apply(Edit({lm.weight_name(1): low_rank()}))
    lm.save(tmp_path)
    assert torch.equal(logits(loaded), before)
    loaded.apply(Edit({lm.weight_name(2): low_rank()}))
    loaded.save(tmp_path)  # where its own weights came from
    assert torch.equal(logits(load(tmp_path, device="cpu")), logits(loaded))


def test_a_save_that_breaks_off_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    clean = tiny.hash

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny.tokenizer), "save_pretrained", full)
    tiny.apply(Edit({tiny.weight_name(1): low_rank()}))
    with pytest.raises(ResultsError, match="cannot write the model to .*No space left on device"):
        tiny.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert tiny.base_hash == clean


class Killed(BaseException):
    pass


@pytest.mark.parametrize("first", [False, True])
def test_a_save_that_is_killed_between_any_two_moves_leaves_the_old_or_the_new(make_lm, tmp_path, monkeypatch, first):
    """The old one is in many files and has edits beside it, the new one is in one and has none; or there is no old."""
    old, new = make_lm("gpt2", dtype=torch.float32, seed=1), make_lm("gpt2", dtype=torch.float32)
    known, states = new.hash, []
    for place in itertools.count():
        folder, left = tmp_path / str(place), iter(range(place))
        if not first:
            old.save(folder)
            old.model.save_pretrained(folder, max_shard_size="30KB")
            (folder / "model.safetensors").unlink()
            save_edits([], folder / "nbkit_edits.safetensors", old)
            (folder / "mine.txt").write_text("mine")

        def killed(*arguments, left=left, done, **named):
            if next(left, None) is None:
                raise Killed
            return done(*arguments, **named)

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rmdir"):
                patch.setattr(Path, name, functools.partialmethod(killed, done=getattr(Path, name)))
            try:
                new.save(folder)
                break
            except Killed:
                pass
        assert new.hash == known, "the model in memory is what it was"
        try:
            read = load(folder, dtype="float32", device="cpu").model.state_dict()
        except ModelError as error:
            assert first and "holds no model" in str(error)
            states.append(False)
            continue
        weights = (one.model.state_dict().items() for one in (old, new))
        is_old, is_new = (all(torch.equal(weight, read[name]) for name, weight in items) for items in weights)
        states.append(is_new)
        assert is_old != is_new and (folder / "nbkit_edits.safetensors").exists() == is_old
        assert (folder / "mine.txt").exists() != first and not (folder / ".saved").exists()
    assert states == sorted(states) and {*states} == {False, True} and len(states) > 6


@pytest.mark.parametrize(
    "parts",
    [
        {"left": torch.ones(32, 2), "right": torch.ones(3, 48)},
        {"left": torch.ones(32, 2), "right": torch.ones(2, 48, dtype=torch.float64)},
        {"left": torch.ones(32, 2, dtype=torch.int64), "right": torch.ones(2, 48, dtype=torch.int64)},
        {"left": torch.ones(32), "right": torch.ones(48)},
        {"left": torch.ones(1, 32, 2), "right": torch.ones(1, 2, 48)},
        {"matrix": torch.ones(32 * 48)},
        {"matrix": torch.ones(32, 48, dtype=torch.bool)},
        {"left": torch.ones(48, 2), "right": torch.ones(2, 32)},
        {"matrix": torch.ones(48, 32)},
    ],
    ids=lambda parts: ", ".join(f"{name} {tuple(part.shape)} {part.dtype}" for name, part in parts.items()),
)
def test_updates_that_do_not_multiply_fail_on_load(tiny, path, parts):
    """Those that do, but are of another weight, too."""
    good = low_rank() if len(parts) == 2 else Dense(low_rank().dense())
    save_edits(Edit({tiny.weight_name(1): good}), path, tiny)
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name not in (CHECKED, CHECKSUM)}
    save_file({f"0.{tiny.weight_name(1)}.{name}": tensor for name, tensor in parts.items()}, path, metadata)
    with pytest.raises((ResultsError, ModelError), match=r"update of transformer.h.1.mlp.c_proj.weight is"):
        load_edits(path, tiny)
