"""Sequences that go on: a longer or an interrupted one gives the rows of one that was left alone, bit for bit."""

import contextlib
import dataclasses
import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_lm

from nbkit.edits.overlays import applied, unedited
from nbkit.edits.regularisers import regularise
from nbkit.edits.updates import total
from nbkit.errors import MethodError, ModelError, RequestError, ResultsError
from nbkit.keys.drift import Drift, drift
from nbkit.methods import verbs
from nbkit.methods.guard import Guard
from nbkit.methods.regularising import regulariser_words
from nbkit.methods.sequence_state import SequenceState, load_state, save_state
from nbkit.methods.verbs import edit, edit_sequence
from nbkit.models.generation import generated
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.records.sequences import sequence_rows, stored_sequences
from nbkit.studies import orders
from nbkit.studies.damage import damage
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.task_scores import task_scores

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
OTHERS = {
    "memit": {"method": "memit", "layers": [0, 1], "second_moment_weight": 3.0, **SEARCH},
    "emmet": {"method": "emmet", "layers": [0, 1], "second_moment_weight": 3.0, **SEARCH},
    "kn": {"method": "kn"},
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


def setup_of(lm, name):
    setup = (SETUPS | OTHERS)[name]
    needs = setup["method"] in ("memit", "emmet", "alphaedit", "encore")
    return {**setup, "context_templates": CONTEXTS, **({"second_moment": moments(lm)} if needs else {})}


def sequence(lm, folder, name="rome", **changes):
    arguments = {"seeds": [0], "evaluate_every": 2, **setup_of(lm, name), **changes}
    return sequential_edits(lm, REQUESTS, TEXTS, store=Store(folder), **arguments)


def same(found, expected):
    pd.testing.assert_frame_equal(found.drop(columns="created"), expected.drop(columns="created"), check_exact=True)


@pytest.fixture
def edited(monkeypatch):
    """The case_id of every request that is edited from here on, in order."""
    seen = []
    for name, method in verbs.METHODS.items():

        def counted(lm, requests, settings, made):
            seen.extend(request.case_id for request in requests)
            return made(lm, requests, settings)

        made = {way: getattr(method, way) for way in ("each", "together") if getattr(method, way)}
        counting = {way: partial(counted, made=function) for way, function in made.items()}
        monkeypatch.setitem(verbs.METHODS, name, dataclasses.replace(method, **counting))
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


def scale_second_edit(monkeypatch, method, factor):
    """From here on the second edit that is made is `factor` times what it should be."""
    made, n_made = verbs.METHODS[method], iter(range(9))

    def each(*arguments):
        edits = made.each(*arguments)
        if next(n_made) != 1:
            return edits
        broken = {weight: delta.scaled(factor) for weight, delta in edits[0].deltas.items()}
        return [dataclasses.replace(edits[0], deltas=broken)]

    monkeypatch.setitem(verbs.METHODS, method, dataclasses.replace(made, each=each))


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e30, 1e12])
@pytest.mark.parametrize("name", [*SETUPS, *OTHERS])
def test_a_model_that_breaks_on_the_way_is_recorded_to_the_end(lm, tmp_path, monkeypatch, name, factor):
    scale_second_edit(monkeypatch, (SETUPS | OTHERS)[name]["method"], factor)
    frame = sequence(lm, tmp_path, name, n_edits=4, generated={"max_tokens": 3})
    assert frame["n_edits"].tolist() == list(range(5)) and frame["update_norm"][1:].notna().any()
    broken = ~np.isfinite(frame["perplexity"][[2, 4]])
    assert broken.all() if math.isnan(factor) else broken.all() or (frame["perplexity"][[2, 4]] > 400).all()
    assert lm.n_applied == 0


@pytest.mark.parametrize(
    "regularise",
    [
        {"name": "rect", "keep": 0.4},
        {"name": "sphere", "energy": 0.5, "alpha": 0.5},
        {"name": "pca", "n_components": 1},
        {"name": "imitate", "kind": "spectrum", "seed": 0},
        {"name": "scale", "norm": 0.1},
    ],
    ids=lambda asked: asked["name"],
)
@pytest.mark.parametrize("factor", [math.nan, 0.0])
def test_what_has_no_direction_is_not_regularised(lm, tmp_path, monkeypatch, regularise, factor):
    scale_second_edit(monkeypatch, "memit", factor)
    frame = sequence(lm, tmp_path, "memit", n_edits=4, regularise=regularise)
    assert np.isfinite(frame["regulariser_norm_ratio"]).tolist() == [False, True, False, *[factor == 0.0] * 2]
    assert np.isfinite(frame["perplexity"][[0, 2, 4]]).tolist() == [True, *[factor == 0.0] * 2]


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


def test_batches_of_a_longer_sequence_are_not_those_that_a_shorter_one_had_left(lm, tmp_path, edited):
    batches = {"name": "memit with key_cache", "per_step": 2, "evaluate_every": 3}
    five = sequence(lm, tmp_path / "in two", n_edits=5, **batches)
    assert five["n_edits"].tolist() == [0, 2, 4, 5] and five["n_requests"].tolist()[1:] == [2, 2, 1]
    assert five["checkpoint"].tolist() == [True, False, True, True], "the fourth is the first beyond three"
    store = Store(tmp_path / "in two")
    assert sequence_rows(stored_sequences(store=store)["key"][0], 0, store=store)["n_edits"].tolist() == [0, 2, 4, 5]
    order, edited[:] = list(edited), []
    six = sequence(lm, tmp_path / "in two", n_edits=6, **batches)
    assert edited[0] == order[4] and len(edited) == 2, "the fifth anew, together with the sixth"
    same(six, sequence(lm, tmp_path / "undisturbed", n_edits=6, **batches))
    edited.clear()
    same(sequence(lm, tmp_path / "in two", n_edits=5, **batches), five)
    assert not edited
    (found,) = stored_sequences(store=store).to_dict("records")
    assert sequence_rows(found["key"], 0, store=store)["n_edits"].tolist() == [0, 2, 4, 6]
    assert sum(int(part.split()[0]) for part in found["subjects"].split(", ")) == 6


def test_batches_that_break_off_go_on_and_are_measured_as_one_edit(lm, tmp_path, monkeypatch):
    batches = {"name": "alphaedit", "per_step": 2, "n_edits": 5, "evaluate_every": 2}
    undisturbed = sequence(lm, tmp_path / "undisturbed", **batches)
    row = orders.Orders.row
    monkeypatch.setattr(orders, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(orders, "STATE_SHARE", np.inf)
    for index in (2, 1):
        def breaking(self, step, *arguments, index=index):
            if step.index == index:
                raise KeyboardInterrupt
            return row(self, step, *arguments)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(orders.Orders, "row", breaking)
            sequence(lm, tmp_path / f"broken at {index}", **batches)
        same(sequence(lm, tmp_path / f"broken at {index}", **batches), undisturbed)

    order, reference = orders.in_order(REQUESTS, 0)[:5], neighborhood_tokens(lm, REQUESTS)
    steps = edit_sequence(lm, order, per_step=2, **setup_of(lm, "alphaedit"))
    for step, of_step in zip(steps, undisturbed.iloc[1:].itertuples(), strict=True):
        so_far = order[: step.index * 2 + len(step.requests)]
        now, of_batch = edit_metrics(lm, so_far, reference), edit_metrics(lm, step.requests, reference)
        assert of_step.case_id == ", ".join(str(request.case_id) for request in step.requests)
        assert of_step.target_probability == pytest.approx(now["target_probability"].mean())
        assert of_step.target_probability_last == pytest.approx(of_batch["target_probability"].mean())
    right_after = undisturbed["target_probability_last"].iloc[1:]
    weighted = np.average(right_after, weights=undisturbed["n_requests"].iloc[1:])
    assert undisturbed["target_probability_after"].iloc[-1] == pytest.approx(weighted)


# regularised


@pytest.mark.parametrize("name", ["rome", "memit with key_cache", "alphaedit"])
def test_each_step_is_regularised_against_the_weights_that_it_meets(lm, name):
    setup = setup_of(lm, name)
    method, C, templates = setup.pop("method"), setup.pop("second_moment", None), setup.pop("context_templates")
    settings = verbs.settings_for(lm, method, templates, C, setup)
    kind, by_hand, earlier = verbs.METHODS[method], [], []
    with verbs.restoring(lm) as add:
        for request in REQUESTS[:4]:
            (plain,) = kind.each(lm, [request], dataclasses.replace(settings, earlier=tuple(earlier)))
            by_hand.append(regularise(plain, lm, "rect", keep=0.4))
            add(by_hand[-1])
            earlier.append(kind.remembers(plain, settings.parameters))
        expected = {weight: lm.model.get_parameter(weight).detach().clone() for weight in plain.deltas}
        at_once = regularise(plain, lm, "rect", keep=0.4)
    asked = {"name": "rect", "keep": 0.4}
    for step, one in zip(edit_sequence(lm, REQUESTS[:4], regularise=asked, **setup_of(lm, name)), by_hand, strict=True):
        for weight, delta in one.deltas.items():
            assert torch.equal(step.edit.deltas[weight].dense(), delta.dense())
            kept = delta.dense().count_nonzero().item() / delta.dense().numel()
            assert kept == pytest.approx(0.4, abs=0.001)
        assert step.edit.info["regulariser"] == "rect" and step.edit.info["update_norm"] == one.norm()
        now = {weight: lm.model.get_parameter(weight).detach().clone() for weight in expected}
    assert all(torch.equal(now[weight], expected[weight]) for weight in expected)
    assert any(not torch.equal(at_once.deltas[w].dense(), by_hand[-1].deltas[w].dense()) for w in expected)


def test_a_sequence_is_regularised_on_every_architecture(kind, make_lm):
    lm = make_lm(kind)
    setup, asked = {"layer": 1, "v_num_grad_steps": 2, "context_templates": CONTEXTS}, {"name": "rect", "keep": 0.3}
    (first,) = edit(lm, REQUESTS[0], regularise=asked, **setup)
    with applied(lm, first):
        second = regularise(edit(lm, REQUESTS[1], **setup)[0], lm, "rect", keep=0.3)
    found = [step.edit for step in edit_sequence(lm, REQUESTS[:2], regularise=asked, **setup)]
    for one, expected in zip(found, (first, second), strict=True):
        assert torch.equal(one.deltas[lm.weight_name(1)].dense(), expected.deltas[lm.weight_name(1)].dense())


def test_what_is_random_is_drawn_anew_in_each_step_and_as_it_would_have_been_when_a_sequence_goes_on(lm, tmp_path):
    draw = {"regularise": {"name": "random", "keep": 0.5, "seed": 3}}
    two = sequence(lm, tmp_path / "in two", n_edits=2, **draw)
    four = sequence(lm, tmp_path / "in two", n_edits=4, **draw)
    same(four, sequence(lm, tmp_path / "undisturbed", n_edits=4, **draw))
    same(four[:3], two)
    seeds = [int(np.random.SeedSequence([3, step]).generate_state(1)[0]) for step in range(4)]
    assert four["regulariser_seed"][1:].tolist() == seeds and len(set(seeds)) == 4
    order = orders.in_order(REQUESTS, 0)
    setup = setup_of(lm, "rome")
    with applied(lm, edit(lm, order[0], regularise={**draw["regularise"], "seed": seeds[0]}, **setup)[0]):
        (second,) = edit(lm, order[1], **setup)
        assert four["update_norm"][2] == regularise(second, lm, "random", keep=0.5, seed=seeds[1]).norm()


@pytest.mark.parametrize("asked, said", [
    ("rect", "must be a regulariser by name and its arguments"),
    ({"keep": 0.4}, "must be a regulariser by name and its arguments"),
    ({"name": "rekt", "keep": 0.4}, "did you mean 'rect'"),
    ({"name": "rect"}, "rect needs keep"),
    ({"name": "rect", "keep": 0}, "keep must be a number above 0 and up to 1"),
    ({"name": "rect", "keep": 0.4, "seed": 0}, "rect has no argument seed"),
    ({"name": "rect", "keep": 0.4, "lm": 0}, "multiple values"),
    ({"name": "random", "keep": 0.4, "seed": -1}, "seed must be a whole number"),
    ({"name": "scale"}, "exactly one of"),
    ({"name": "prune"}, "accumulated update"),
])  # fmt: skip
def test_a_regulariser_that_cannot_be_is_refused_before_any_work(lm, tmp_path, edited, asked, said):
    setup = setup_of(lm, "rome")
    for refused in (
        lambda: edit_sequence(lm, REQUESTS, regularise=asked, **setup),
        lambda: edit(lm, REQUESTS, regularise=asked, **setup),
        lambda: sequence(lm, tmp_path, regularise=asked),
    ):
        with pytest.raises(MethodError, match=said):
            refused()
    assert not edited and not list(tmp_path.iterdir())


def test_a_norm_is_asked_of_each_step(lm):
    steps = edit_sequence(lm, REQUESTS[:2], regularise={"name": "scale", "norm": 0.25}, **setup_of(lm, "rome"))
    assert [step.edit.norm() for step in steps] == pytest.approx([0.25, 0.25])


def test_a_guard_judges_what_is_regularised_and_so_is_what_it_makes_instead(lm):
    setup, C, half = setup_of(lm, "rome"), moments(lm), {"name": "scale", "factor": 0.5}
    mixed, prefixed = (damage(lm, edit(lm, REQUESTS, key_mode=mode, **setup), C) for mode in ("mixed", "prefixed"))
    ratio = prefixed["felt_relative"] / mixed["felt_relative"]
    place = int(ratio.argmin())
    assert ratio[place] < 1, "one that C-ROME makes less of"
    most = float(mixed["felt_relative"][place] + prefixed["felt_relative"][place]) / 4  # between their halves
    guard = Guard(most, "C-ROME", C)
    made = edit(lm, REQUESTS, regularise=half, guard=guard, **setup)
    assert made[place].info["guard"] == "fell back" and made[place].info["regulariser"] == "scale"
    assert made[place].info["felt_relative"] == pytest.approx(mixed["felt_relative"][place] / 2)
    assert damage(lm, [made[place]], C)["felt_relative"][0] == pytest.approx(prefixed["felt_relative"][place] / 2)
    (step,) = edit_sequence(lm, REQUESTS[place], regularise=half, guard=guard, **setup)
    assert step.edit.info["guard"] == "fell back" and step.edit.norm() == pytest.approx(made[place].norm())


def test_sequences_go_by_what_is_felt_and_are_stored_by_the_digest_of_what_that_is_taken_from(lm, tmp_path):
    name, found = lm.weight_name(SETUPS["rome"]["layer"]), []
    for number, moment in enumerate([torch.eye(lm.d_mlp), moments(lm)]):
        asked = {"name": "scale", "like": {"name": "rect", "keep": 0.2}, "measure": "felt"}
        frame = sequence(lm, tmp_path, n_edits=2, regularise=asked | {"second_moments": {name: moment}})
        found.append(frame["update_norm"].dropna())
        plain = sequence(lm, tmp_path, n_edits=2, regularise=asked["like"])["update_norm"].dropna()
        if number == 0:  # of which the norm is Frobenius's
            assert found[0].iloc[0] == pytest.approx(plain.iloc[0])
    assert (found[0] != found[1]).all()
    assert regulariser_words(asked | {"second_moments": {}}) == "scale like=(rect keep=0.2) measure=felt"
    assert regulariser_words(None) == "none"


def test_what_is_not_asked_for_does_not_name_stored_rows(lm, tmp_path):
    names = {"evaluate_every", "method", "context_templates", "second_moment"}
    names |= {field.name for field in dataclasses.fields(verbs.METHODS["rome"].parameters)}
    folders = []
    for number, (more, added) in enumerate([
        ({}, set()), ({"per_step": 1, "regularise": None, "tasks": None, "task_limit": 3}, set()),
        ({"regularise": {"name": "rect", "keep": 0.4}}, {"regularise"}),
    ]):  # fmt: skip
        sequence(lm, tmp_path / str(number), n_edits=1, **more)
        (path,) = (tmp_path / str(number)).rglob("key.json")
        key = json.loads(path.read_text())
        assert set(key["data"]) == {"texts", "requests"} and set(key["parameters"]) == names | added
        folders.append(path.parent.name)
    assert folders[0] == folders[1] != folders[2]


# what is measured


def test_tasks_are_scored_before_any_edit_and_at_checkpoints(lm, tmp_path):
    tasks = {"tasks": ["sentiment", "nli"], "task_limit": 3}
    frame = sequence(lm, tmp_path, n_edits=3, **tasks)
    order = orders.in_order(REQUESTS, 0)[:3]
    expected = [task_scores(lm, tasks["tasks"], 3)]
    for step in edit_sequence(lm, order, **setup_of(lm, "rome")):
        if step.index:
            expected.append(task_scores(lm, tasks["tasks"], 3))
    for name in tasks["tasks"]:
        for column, end in (("score", ""), ("stderr", ":stderr")):
            found = frame.loc[frame["checkpoint"], f"task_{name}{end}"]
            assert found.tolist() == [scores.set_index("task")[column][name] for scores in expected]
    assert frame[["task_nli", "task_nli:stderr"]].isna().all(axis=1).tolist() == [False, True, False, False]


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
