"""Files of tensors: every bit back, whole or not at all, and damage is named."""

import math

import pytest
import torch

from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.errors import ResultsError


def test_every_bit_and_everything_said_comes_back(tmp_path):
    square = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    tensors = {
        "transposed": square.T,
        "shared": square,
        "half": torch.tensor([1.5, math.nan, math.inf], dtype=torch.bfloat16),
        "whole": torch.arange(3),
        "empty": torch.zeros(0, 5),
        "one": torch.tensor(2.0),
    }
    about = {"step": 3, "recipe": {"rank": 8, "name": "“x”"}, "limit": math.inf}
    write_tensors(tmp_path / "a.safetensors", tensors, about)
    with reading_tensors(tmp_path / "a.safetensors", "test") as (back, said):
        assert said == about and set(back) == set(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            torch.testing.assert_close(back[name], tensor.contiguous(), rtol=0, atol=0, equal_nan=True)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbkit.records.files.os.fsync", full)
    with pytest.raises(ResultsError, match="a.safetensors cannot be written: .*No space left"):
        write_tensors(path, {"x": torch.zeros(2)}, {})
    with reading_tensors(path, "test") as (back, _):
        assert torch.equal(back["x"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x08\0\0\0\0\0\0\0{broken}"])
def test_damage_is_named_with_what_to_do(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match="a.safetensors is damaged, or no file of keys .*; delete it"):
        with reading_tensors(path, "file of keys", "delete it"):
            pass


def test_a_missing_file_and_missing_content_are_named(tmp_path):
    with pytest.raises(ResultsError, match="there is no file"), reading_tensors(tmp_path / "b.safetensors", "test"):
        pass
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises(ResultsError, match="a.safetensors is damaged, or no test .*KeyError"):
        with reading_tensors(tmp_path / "a.safetensors", "test") as (tensors, _):
            tensors["y"]
