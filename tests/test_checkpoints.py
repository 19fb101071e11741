"""A checkpoint sets a training to where it was, or changes nothing."""

from dataclasses import replace

import pytest
import torch

from nbkit.edits.checkpoints import Checkpoint
from nbkit.errors import ResultsError


def begun(seed: int, d_out: int = 3):
    model = torch.nn.Linear(4, d_out)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(model, optimizer, steps):
    for step in steps:
        model(torch.full((2, 4), step / 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(model):
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path / "checkpoint.safetensors", {"seed": 0, "learning_rate": 0.1, "data": "abc"})


def test_a_training_goes_on_to_the_same_bits(checkpoint):
    whole, optimizer = begun(0)
    trained(whole, optimizer, range(3))
    checkpoint.save(tensors_of(whole), optimizer, {"step": 3, "log": [{"loss": 0.1}]})
    trained(whole, optimizer, range(3, 6))
    other, optimizer = begun(1)
    assert checkpoint.load(tensors_of(other), optimizer) == {"step": 3, "log": [{"loss": 0.1}]}
    trained(other, optimizer, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), other.parameters(), strict=True))


def test_without_a_file_nothing_is_taken_up(checkpoint):
    model, optimizer = begun(0)
    assert checkpoint.load(tensors_of(model), optimizer) is None


@pytest.mark.parametrize(
    ("training", "d_out", "message"),
    [
        ({"seed": 1}, 3, r"is of another training \(other seed\); delete it, or train in another folder"),
        ({"data": "b", "rank": 2}, 3, r"is of another training \(other data, rank\)"),
        ({}, 5, r"is of another model \(see model.bias\); delete it, or train in another folder"),
        (None, 3, r"is damaged, or no checkpoint \(.*\); delete it to train from the start"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(checkpoint, training, d_out, message):
    model, optimizer = begun(0)
    trained(model, optimizer, range(2))
    checkpoint.save(tensors_of(model), optimizer, {"step": 2})
    if training is None:
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-1])
    mine = replace(checkpoint, training={**checkpoint.training, **(training or {})})
    other, optimizer = begun(1, d_out)
    with pytest.raises(ResultsError, match=message):
        mine.load(tensors_of(other), optimizer)
    fresh, _ = begun(1, d_out)
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), fresh.parameters(), strict=True))
    assert not optimizer.state_dict()["state"]
