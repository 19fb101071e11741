"""Sequences that go on: a longer or an interrupted one gives the rows of one that was left alone, bit for bit."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_lm

from nbkit.edits.overlays import applied, unedited
from nbkit.edits.updates import total
from nbkit.errors import MethodError, ModelError, RequestError, ResultsError
from nbkit.keys.drift import Drift, drift
from nbkit.methods import verbs
from nbkit.methods.sequence_state import SequenceState, load_state, save_state
from nbkit.methods.verbs import edit, edit_sequence
from nbkit.models.generation import generated
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.records.sequences import sequence_rows, stored_sequences
from nbkit.studies import orders
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens
from nbkit.studies.sequential import sequential_edits

TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]
REQUESTS = [
    EditRequest(prompt, subject, target, target_true="harp", case_id=number,
                neighborhood_prompts=("You plays the",), neighborhood_targets=("harp",))
    for number, (prompt, subject, target) in enumerate([
        ("{} plays the", "Ann", "drum"), ("{} is located in", "Vouda", "chess"),
        ("The mother tongue of {} is", "Danielle Darrieux", "the song"), ("{} plays the", "Krela", "song"),
        ("{} is located in", "Sennifar", "French"), ("Therefore {} is", "Ann", "chess"),
    ])
]  # fmt: skip
CONTEXTS = ["{}", "The river runs. {}", "I. {}"]
SEARCH = {"v_num_grad_steps": 3}
SETUPS = {
    "rome": {"method": "rome", "layer": 1, **SEARCH},
    "memit with key_cache": {
        "method": "memit",
        "layers": [0, 1],
        "key_cache": True,
        "second_moment_weight": 3.0,
        **SEARCH,
    },
    "alphaedit": {"method": "alphaedit", "layers": [1], "nullspace_threshold": 0.5, "norm_weight": 0.1, **SEARCH},
    "encore": {"method": "encore", "layers": [0, 1], "second_moment_weight": 3.0, "norm_weight": 0.1, **SEARCH},
    "ft": {"method": "ft", "layers": [0, 2], "n_steps": 3},
    "ultraedit": {"method": "ultraedit", "layers": [0, 2], "lr": 0.1},
    "locft-bf": {"method": "locft-bf", "layers": [1], "n_steps": 3},
}


@pytest.fixture(scope="module")
def lm():
    """In float32, where another batch or another sum shows."""
    return tiny_lm("gpt2", torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def moments(lm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(200, lm.d_mlp, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 2, lm.d_mlp)
    return keys.T @ keys / len(keys)


def sequence(lm, folder, name="rome", **changes):
    setup = dict(SETUPS[name])
    if setup["method"] in ("memit", "alphaedit", "encore"):
        setup["second_moment"] = moments(lm)
    arguments = {"seeds": [0], "evaluate_every": 2, "context_templates": CONTEXTS, **setup, **changes}
    return sequential_edits(lm, REQUESTS, TEXTS, store=Store(folder), **arguments)


def same(found, expected):
    pd.testing.assert_frame_equal(found.drop(columns="created"), expected.drop(columns="created"), check_exact=True)


@pytest.fixture
def edited(monkeypatch):
    """The case_id of every request that is edited from here on, in order."""
    seen = []
    for name, method in verbs.METHODS.items():

        def each(lm, requests, settings, each=method.each):
            seen.extend(request.case_id for request in requests)
            return each(lm, requests, settings)

        monkeypatch.setitem(verbs.METHODS, name, verbs.dataclasses.replace(method, each=each))
    return seen


@pytest.mark.parametrize("name", SETUPS)
def test_a_longer_sequence_edits_only_what_is_new_to_the_rows_of_an_undisturbed_one(lm, tmp_path, edited, name):
    undisturbed, whole = sequence(lm, tmp_path / "undisturbed", name, n_edits=6), list(edited)
    edited.clear()
    four = sequence(lm, tmp_path / "in two", name, n_edits=4)
    six = sequence(lm, tmp_path / "in two", name, n_edits=6)
    assert edited == whole, "no edit is made twice"
    same(six, undisturbed)
    same(six[:5], four)
    assert lm.n_applied == 0


@pytest.mark.parametrize("name", SETUPS)
def test_a_sequence_that_breaks_off_goes_on_from_its_last_state(lm, tmp_path, monkeypatch, edited, name):
    undisturbed, whole = sequence(lm, tmp_path / "undisturbed", name), list(edited)
    monkeypatch.setattr(orders, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(orders, "STATE_SHARE", np.inf)
    edited.clear()
    row = orders.Orders.row

    def breaking(self, step, *arguments):
        if step.index == 3:
            raise KeyboardInterrupt
        return row(self, step, *arguments)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(orders.Orders, "row", breaking)
        sequence(lm, tmp_path / "broken", name)
    assert lm.n_applied == 0 and edited == whole[:4]
    same(sequence(lm, tmp_path / "broken", name), undisturbed)
    assert edited == whole[:4] + whole[3:], "only the edit that it broke off at is made again"


def test_the_last_measurement_of_a_shorter_sequence_is_no_checkpoint_of_a_longer_one(lm, tmp_path, edited):
    three = sequence(lm, tmp_path, n_edits=3)
    assert three["checkpoint"].tolist() == [True, False, True, True] and three["perplexity"].notna()[3]
    edited.clear()
    six = sequence(lm, tmp_path, n_edits=6)
    assert len(edited) == 3 and six["checkpoint"].tolist() == [True, False, True, False, True, False, True]
    same(six, sequence(lm, tmp_path / "undisturbed", n_edits=6))
    same(sequence(lm, tmp_path, n_edits=3), three)
    with pytest.raises(RequestError, match="n_edits is 7, and there are 6 requests"):
        sequence(lm, tmp_path, n_edits=7)
    edited.clear()
    five = sequence(lm, tmp_path, n_edits=5)  # behind which the state is: its last measurement takes all edits anew
    assert len(edited) == 5
    same(five, sequence(lm, tmp_path / "undisturbed", n_edits=5))
    same(sequence(lm, tmp_path, n_edits=6), six)


def test_stored_sequences_of_several_lengths_have_a_step_once(lm, tmp_path):
    store = Store(tmp_path)
    sequence(lm, tmp_path, n_edits=3)
    sequence(lm, tmp_path, n_edits=4)
    (found,) = stored_sequences(store=store).to_dict("records")
    rows = sequence_rows(found["key"], 0, store=store)
    assert found["n_edits"] == 4 and rows["n_edits"].tolist() == [0, 1, 2, 3, 4]
    assert found["after"] == rows["perplexity"][4]


def test_one_state_an_order_is_kept_and_checked(lm, tmp_path, edited):
    sequence(lm, tmp_path, n_edits=2, seeds=[0, 3])
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.name for path in files] == ["0.safetensors", "3.safetensors"]
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ResultsError, match="0.safetensors is the state of another sequence.*delete it"):
        sequence(lm, tmp_path, n_edits=3)
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    with pytest.raises(ResultsError, match="0.safetensors is damaged.*delete it, and the sequence begins anew"):
        sequence(lm, tmp_path, n_edits=3)
    files[0].unlink()
    edited.clear()
    found = sequence(lm, tmp_path, n_edits=3)
    assert len(edited) == 3, "from the start, though two of its rows are there"
    same(found, sequence(lm, tmp_path / "undisturbed", n_edits=3))


def test_a_state_that_is_too_large_is_not_stored_and_that_is_said(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(orders, "STATE_BYTES", 100)
    with pytest.warns(UserWarning, match="its state takes .* and is not stored"):
        sequence(lm, tmp_path, n_edits=2)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_brings_the_weights_back_bit_for_bit(kind, tmp_path, make_lm):
    lm = make_lm(kind)
    name, weight = lm.weight_name(1), lm.weight(1).detach().clone()
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-30, 6, weight.numel(), dtype=torch.float64).reshape(weight.shape)
    noise = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    target = (noise * scale).to(weight.dtype)
    target[0, 0], target[0, 1], target[1, 0] = torch.nan, torch.inf, 0.0
    state = SequenceState(1, {name: target}, ({"keys_1": torch.arange(3.0)},))
    save_state(state, tmp_path / "state.safetensors", "it")
    read = load_state(tmp_path / "state.safetensors", "it")
    assert torch.equal(read.remembered[0]["keys_1"], torch.arange(3.0))
    request = EditRequest("{} plays the", "Ann", "drum")
    steps = edit_sequence(lm, [request], "ft", start=read, layers=[1])
    assert list(steps) == []
    with verbs.restoring(lm) as add:
        verbs.lay(lm, read, add)
        now = lm.model.get_parameter(name)
        assert torch.equal(now.nan_to_num(nan=7.0), target.nan_to_num(nan=7.0))
    assert torch.equal(lm.weight(1), weight)


def test_a_state_of_another_model_or_of_a_longer_sequence_is_refused(lm):
    arguments = {"method": "rome", "layer": 1, "context_templates": CONTEXTS, **SEARCH}
    name = lm.weight_name(1)
    with pytest.raises(ModelError, match="it is of another model"):
        next(edit_sequence(lm, REQUESTS, start=SequenceState(1, {name: torch.zeros(3, 4)}), **arguments))
    with pytest.raises(ModelError, match="a weight that tiny-gpt2 does not have"):
        next(edit_sequence(lm, REQUESTS, start=SequenceState(1, {"h.9.weight": torch.zeros(3, 4)}), **arguments))
    with pytest.raises(MethodError, match="start behind edit 9, and has 6"):
        edit_sequence(lm, REQUESTS, start=SequenceState(9, {}), **arguments)
    assert lm.n_applied == 0


@pytest.mark.parametrize("name", ["memit with key_cache", "encore", "ultraedit", "locft-bf"])
def test_batches_in_sequence_go_on_too(lm, name):
    arguments = {"per_step": 2, "second_moment": moments(lm), "context_templates": CONTEXTS, **SETUPS[name]}
    whole = [(step.edit, step.state()) for step in edit_sequence(lm, REQUESTS, **arguments)]
    (second, third) = list(edit_sequence(lm, REQUESTS, start=whole[0][1], **arguments))
    assert [second.index, third.index] == [1, 2] and third.requests == tuple(REQUESTS[4:])
    for name, delta in whole[2][0].deltas.items():
        assert torch.equal(third.edit.deltas[name].dense(), delta.dense())


# what is measured


def test_a_checkpoint_says_what_is_said_forgotten_and_how_far_the_weights_are(lm, tmp_path):
    C, saying = moments(lm, 1), {"max_tokens": 3}
    frame = sequence(lm, tmp_path, n_edits=4, generated=saying, text_moment=C)
    order = [REQUESTS[number] for number in frame["case_id"][1:].astype(int)]
    reference = neighborhood_tokens(lm, REQUESTS)
    setup = {name: value for name, value in SETUPS["rome"].items() if name != "method"}
    said_then, before = [], lm.oriented(lm.weight_name(1)).detach().double().clone()
    for step in edit_sequence(lm, order, "rome", CONTEXTS, **setup):
        said_then.append(edit_metrics(lm, [step.request], reference)["efficacy_argmax"][0])
        change = lm.oriented(lm.weight_name(1)).detach().double() - before
        now = edit_metrics(lm, order[: step.index + 1], reference)["efficacy_argmax"].mean()
        begins = [one.text.strip() for one in generated(lm, [r.text for r in order[: step.index + 1]], **saying)]
    last = frame.iloc[4]
    assert last["efficacy_argmax"] == pytest.approx(now)
    assert last["forgotten"] == pytest.approx(np.mean(said_then) - now)
    told = [begin.startswith(request.target_new) for begin, request in zip(begins, order, strict=True)]
    assert last["efficacy_generated"] == pytest.approx(np.mean(told))
    felt, size = ((m @ C * m).sum().sqrt().item() for m in (change, before))
    assert last["drift"] == pytest.approx(change.norm().item())
    assert last["drift_felt"] == pytest.approx(felt) and last["drift_felt_relative"] == pytest.approx(felt / size)
    assert frame["drift"][0] == 0 and frame["drift"][1:].notna().tolist() == [False, True, False, True]


def test_drift_is_of_the_weights_whatever_edits_are_in_them(tiny, requests, contexts):
    C = moments(tiny)
    first, second = edit(tiny, requests[:2], "rome", contexts, layer=1, v_num_grad_steps=2)
    assert drift(tiny, C) == Drift(0.0, 0.0, 0.0)
    with applied(tiny, first):
        assert drift(tiny).norm == pytest.approx(first.norm()) and np.isnan(drift(tiny).felt)
        with applied(tiny, second):
            both = total([first.deltas[tiny.weight_name(1)], second.deltas[tiny.weight_name(1)]])
            found = drift(tiny, C)
            assert found.norm == pytest.approx(both.norm()) and found.felt == pytest.approx(both.felt_norm(C))
            with unedited(tiny):
                assert drift(tiny, C).norm == 0
