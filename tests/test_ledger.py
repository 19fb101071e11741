"""Edits that stay until they are undone, and the bits that come back."""

import gc
import random
import threading

import pytest
import torch

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.hashes import hash_of
from nbkit.edits.overlays import applied, restoring, unedited
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import ModelError, PromptError
from nbkit.records.requests import EditRequest


def edit_of(lm, *layers, seed=0, dense=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        left, right = torch.randn(32, 2, generator=generator), torch.randn(2, 48, generator=generator)
        delta = LowRank(left.to(dtype), right.to(dtype))
        deltas[lm.weight_name(layer)] = Dense(delta.dense()) if dense else delta
    return Edit(deltas, (EditRequest("{} is in", f"Ann{seed}", "Krela"),), "rome")


def bits(lm):
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def assert_same_bits(lm, before):
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1), (5,), (2, 3), (1, 3, 1)], ids=str)
def test_undoing_gives_every_state_back_bit_for_bit(make_lm, kind, dtype, steps):
    lm = make_lm(kind, dtype=dtype)
    with torch.no_grad():
        lm.weight(2).view(-1)[0] = torch.nan  # bits, not numbers
        lm.weight(2).view(-1)[1] = -0.0
    edits = [
        edit_of(lm, 0, 1, seed=0),
        edit_of(lm, 1, seed=1, dense=True),
        edit_of(lm, 2, 0, seed=2, dtype=torch.bfloat16),
        edit_of(lm, 1, 2, seed=3, dtype=torch.float64),
        edit_of(lm, 0, seed=4),
    ]
    states = [bits(lm)]
    for edit in edits:
        lm.apply(edit)
        states.append(bits(lm))
    for n in steps:
        undone = lm.undo(n)
        left = lm.n_applied
        assert undone == edits[left : left + n]
        assert_same_bits(lm, states[left])
    assert lm.n_applied == 0
    assert_same_bits(lm, states[0])


def test_a_state_that_was_left_can_be_reached_again(tiny):
    first, second, third = (edit_of(tiny, 0, 1, seed=seed) for seed in range(3))
    tiny.apply(first)
    tiny.apply(second)
    both = bits(tiny)
    tiny.apply(third)
    tiny.undo(2)
    tiny.apply(second)
    assert_same_bits(tiny, both)


def test_applying_is_what_the_with_does(lm):
    edit = edit_of(lm, 0, 2)
    with applied(lm, edit):
        inside = bits(lm)
    lm.apply(edit)
    assert_same_bits(lm, inside)


def test_history_lists_what_is_applied(tiny):
    assert len(tiny.history()) == 0
    tiny.apply(edit_of(tiny, 0, 1))
    tiny.apply(edit_of(tiny, 2, seed=1))
    history = tiny.history()
    assert history.index.tolist() == [0, 1]
    assert history["request"].tolist() == ["Ann0 is in", "Ann1 is in"]
    assert history["target_new"].tolist() == ["Krela"] * 2 and history["method"].tolist() == ["rome"] * 2
    assert history["weights"][0] == f"{tiny.weight_name(0)}, {tiny.weight_name(1)}"
    assert history["update_norm"][1] == pytest.approx(tiny.ledger.edits[1].norm())
    tiny.apply(Edit({}))  # an edit without requests or weights
    assert tiny.history()["n_requests"].tolist() == [1, 1, 0]


def test_only_touched_weights_are_kept(tiny):
    tiny.apply(edit_of(tiny, 0))
    tiny.apply(edit_of(tiny, 1))
    assert set(tiny.ledger.below) == {tiny.weight_name(0), tiny.weight_name(1)}
    tiny.undo()
    assert set(tiny.ledger.below) == {tiny.weight_name(0)}


@pytest.mark.parametrize("n", [0, -1, 1.0, True, "all", None])
def test_undo_takes_a_number_of_edits(tiny, n):
    tiny.apply(edit_of(tiny, 0))
    with pytest.raises(ModelError, match="undo takes the number of edits"):
        tiny.undo(n)
    assert tiny.n_applied == 1


def test_undoing_more_than_was_applied(tiny):
    tiny.apply(edit_of(tiny, 0))
    with pytest.raises(ModelError, match="cannot undo 2: the number of edits applied to tiny-gpt2 is 1"):
        tiny.undo(2)
    assert tiny.n_applied == 1


def test_an_edit_that_does_not_fit_changes_nothing(tiny):
    tiny.apply(edit_of(tiny, 0))
    before = bits(tiny)
    wrong = Edit({**edit_of(tiny, 0, 1).deltas, "transformer.h.9.mlp.c_proj.weight": edit_of(tiny, 0).deltas})
    with pytest.raises(ModelError, match="does not have"):
        tiny.apply(wrong)
    with pytest.raises(ModelError, match="apply takes one Edit, not a list"):
        tiny.apply([edit_of(tiny, 0)])
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_edit_that_breaks_off_half_way_leaves_nothing_behind(tiny, error):
    tiny.apply(edit_of(tiny, 0))
    before = bits(tiny)
    edit = edit_of(tiny, 0, 1, 2, seed=1)

    def fail(self):
        raise error

    broken = Dense(edit.deltas[tiny.weight_name(1)].dense())
    object.__setattr__(broken, "to", lambda device: fail(broken))
    with pytest.raises(error):
        tiny.apply(Edit({**edit.deltas, tiny.weight_name(1): broken}))
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 1 and set(tiny.ledger.below) == {tiny.weight_name(0)}


def test_an_undo_that_breaks_off_can_be_repeated(tiny, monkeypatch):
    states = [bits(tiny)]
    for seed in range(3):
        tiny.apply(edit_of(tiny, 0, 1, seed=seed))
        states.append(bits(tiny))
    calls, add_update = [], tiny.add_update

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add_update(*arguments)

    monkeypatch.setattr(tiny, "add_update", once)
    with pytest.raises(KeyboardInterrupt):
        tiny.undo()
    assert_same_bits(tiny, states[3])
    assert tiny.n_applied == 3
    tiny.undo()
    assert_same_bits(tiny, states[2])


def test_the_ledger_is_closed_inside_a_with(tiny):
    tiny.apply(edit_of(tiny, 0))
    before = bits(tiny)
    with applied(tiny, edit_of(tiny, 1)):
        for call in (lambda: tiny.apply(edit_of(tiny, 2)), tiny.undo):
            with pytest.raises(ModelError, match=r"inside `with applied\(...\)` or a loop over `edit_sequence`"):
                call()
        assert tiny.n_applied == 2 and len(tiny.history()) == 1
    with restoring(tiny), pytest.raises(ModelError, match="inside"):
        tiny.undo()
    assert_same_bits(tiny, before)
    tiny.undo()
    assert tiny.n_applied == 0


def test_a_sequence_on_top_of_the_ledger(tiny, requests, contexts):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    tiny.apply(edit_of(tiny, 1))
    before = bits(tiny)
    for step in nbkit.edit_sequence(tiny, requests, **options):
        assert tiny.n_applied == step.index + 2
        with pytest.raises(ModelError, match="inside"):
            tiny.apply(step.edit)
        if step.index == 1:
            break
    gc.collect()
    assert_same_bits(tiny, before)
    tiny.apply(step.edit)
    assert tiny.n_applied == 2


def test_the_ledger_makes_a_sequence_with_a_regulariser(tiny, requests, contexts):
    """Each edit is computed on the edited model, regularised by its weights, and applied: RECT in sequence."""
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    before = bits(tiny)
    for request in requests:
        [edit] = nbkit.edit(tiny, request, **options)
        tiny.apply(nbkit.regularise(edit, tiny, "rect", keep=0.4))
    assert tiny.n_applied == 3
    total = nbkit.accumulated(tiny.ledger.edits)
    name = tiny.weight_name(1)
    torch.testing.assert_close(tiny.weight(1).data, before[name] + total.deltas[name].dense().T)
    tiny.undo(3)
    assert_same_bits(tiny, before)


@pytest.mark.parametrize("asked_before", [True, False])
def test_hashes_follow_the_ledger(make_lm, kind, asked_before):
    lm = make_lm(kind)
    clean = lm.hash if asked_before else make_lm(kind).hash
    edit = edit_of(lm, 0, 2)
    lm.apply(edit)
    assert lm.hash != clean
    with applied(lm, edit_of(lm, 0, 1, seed=1)):
        assert lm.base_hash == clean
    edited = lm.hash
    lm.undo()
    assert lm.hash == clean == lm.base_hash
    lm.apply(edit)
    assert lm.hash == edited


def test_the_unedited_model_below_all_edits(make_lm, kind):
    lm = make_lm(kind)
    clean, hash_of_clean = bits(lm), lm.hash
    lm.apply(edit_of(lm, 0, 1))
    with applied(lm, edit_of(lm, 1, 2, seed=1)):
        edited, hash_of_edited = bits(lm), lm.hash
        with pytest.raises(MemoryError), unedited(lm):
            assert_same_bits(lm, clean)
            assert lm.hash == lm.base_hash == hash_of_clean and lm.n_applied == 0
            with applied(lm, edit_of(lm, 0, seed=2)):
                assert lm.hash != hash_of_clean
            for call in (lambda: lm.apply(edit_of(lm, 2)), lm.undo):
                with pytest.raises(ModelError, match="inside"):
                    call()
            raise MemoryError
        assert_same_bits(lm, edited)
        assert lm.hash == hash_of_edited and lm.n_applied == 2
    lm.undo()
    assert_same_bits(lm, clean)


def test_an_error_inside_a_method_leaves_the_ledger_open(tiny, contexts):
    """A method that fails closes what it opened."""
    with pytest.raises(PromptError):
        nbkit.edit(tiny, EditRequest("Vouda " * 100 + "{} is", "Ann", "Krela"), layer=1, context_templates=contexts)
    tiny.apply(edit_of(tiny, 0))
    assert tiny.n_applied == 1


def laid(lm, edits):
    """The bits of the unedited model with these edits on it, in this order, and no other way."""
    with restoring(lm) as add:
        for edit in edits:
            add(edit)
        return bits(lm)


@pytest.mark.parametrize("seed", range(12))
def test_overlays_left_in_any_order_leave_what_the_others_added(make_lm, seed):
    """Against the edits that remain, laid on the unedited model one after another."""
    chance = random.Random(seed)
    lm = make_lm("llama", dtype=[torch.float32, torch.bfloat16][seed % 2])
    clean, lasting = bits(lm), edit_of(lm, 1, seed=99)
    assert lm.hash
    lm.apply(lasting)
    began, kept = [], [(None, lasting)]
    for step in range(40):
        action = chance.choice(["begin", "add", "add", "leave", "set aside"])
        if action == "begin" and len(began) < 4:
            overlay = restoring(lm)
            began.append((overlay, overlay.__enter__()))
        elif action == "add" and began:
            overlay, add = chance.choice(began)
            edit = edit_of(lm, *chance.sample(range(3), 2), seed=step, dense=chance.random() < 0.5)
            add(edit)
            kept.append((overlay, edit))
        elif action == "leave" and began:
            overlay, _ = began.pop(chance.randrange(len(began)))
            overlay.__exit__(None, None, None)
            kept = [(own, edit) for own, edit in kept if own is not overlay]
        elif action == "set aside":
            with unedited(lm):
                assert_same_bits(lm, clean)
        assert lm.n_applied == len(kept)
        state, now = bits(lm), lm.hash
        with unedited(lm):
            expected = laid(lm, [edit for _, edit in kept])
        assert all(torch.equal(state[name], expected[name]) for name in state)
        assert now == hash_of(lm.model) and lm.base_hash == hash_of(make_lm("llama", dtype=lm.dtype).model)
    for overlay, _ in began:
        overlay.__exit__(None, None, None)
    lm.undo()
    assert_same_bits(lm, clean)
    assert lm.n_applied == 0 and lm.hash == hash_of(lm.model) and not lm.unedited_weights


def test_two_sequences_side_by_side(tiny, requests, contexts):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    before, unedited_hash = bits(tiny), tiny.hash
    first, second = nbkit.edit_sequence(tiny, requests[:2], **options), nbkit.edit_sequence(tiny, requests, **options)
    taken = [step for pair in zip(first, second, strict=False) for step in pair]
    assert tiny.n_applied == 2 and len(taken) == 4, "the first has ended, and took its two out"
    with unedited(tiny):
        expected = laid(tiny, [taken[1].edit, taken[3].edit])
    assert_same_bits(tiny, expected)
    assert tiny.hash == hash_of(tiny.model) != unedited_hash
    second.close()
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0 and tiny.hash == unedited_hash


def test_a_sequence_that_the_collector_ends_is_not_taken_out_in_the_middle_of_a_verb(
    tiny, requests, contexts, monkeypatch
):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    before = bits(tiny)
    cycle = [nbkit.edit_sequence(tiny, requests, **options)]
    cycle.append(cycle)
    next(cycle[0])
    edited, expected = bits(tiny), nbkit.perplexity(tiny, ["Ann plays the harp"])
    del cycle
    read = tiny.logits

    def collecting(*arguments, **named):
        gc.collect()
        assert_same_bits(tiny, edited)
        return read(*arguments, **named)

    monkeypatch.setattr(tiny, "logits", collecting)
    assert nbkit.perplexity(tiny, ["Ann plays the harp"]) == expected
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0 and tiny.hash == hash_of(tiny.model)


def in_a_thread(work):
    """What it returns or raises, in another thread."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join()
    return found[0]


def test_a_model_in_use_is_refused_to_another_thread(tiny, requests, contexts):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "progress": False}
    before, edit = bits(tiny), edit_of(tiny, 0)

    def apply():
        with applied(tiny, edit):
            return "applied"

    calls = {
        "apply": lambda: tiny.apply(edit),
        "undo": tiny.undo,
        "applied": apply,
        "hash": lambda: tiny.hash,
        "perplexity": lambda: nbkit.perplexity(tiny, ["Ann plays the harp"]),
        "edit": lambda: nbkit.edit(tiny, requests[0], **options),
        "sequence": lambda: list(nbkit.edit_sequence(tiny, requests[:1], **options)),
    }
    steps = nbkit.edit_sequence(tiny, requests, **options)
    next(steps)
    for name, call in calls.items():
        said = in_a_thread(call)
        assert isinstance(said, ModelError) and "in use by the thread 'MainThread'" in str(said), name
    edited = bits(tiny)
    next(steps)
    in_a_thread(steps.close)  # to end it is anyone's
    assert_same_bits(tiny, before)
    assert not torch.equal(edited[tiny.weight_name(1)], before[tiny.weight_name(1)])
    assert in_a_thread(apply) == "applied" and tiny.n_applied == 0
    assert in_a_thread(lambda: tiny.hash) == tiny.hash == hash_of(tiny.model)


def test_two_threads_leave_the_weights_as_they_were(tiny):
    """Both at once, again and again: one of them waits its turn in words."""
    before, refused, done = bits(tiny), [], []

    def work(layer):
        for seed in range(60):
            try:
                with applied(tiny, edit_of(tiny, layer, seed=seed)):
                    done.append(tiny.hash == hash_of(tiny.model))
            except ModelError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(done) and len(done) + len(refused) == 120 and all("in use by the thread" in said for said in refused)
    assert_same_bits(tiny, before)
    assert tiny.n_applied == 0 and tiny.hash == hash_of(tiny.model)


def test_a_remembered_hash_does_not_outlive_a_change_by_hand(tiny):
    clean = tiny.hash
    with torch.no_grad():
        tiny.weight(0)[0, 0] += 1
    changed = tiny.hash
    assert changed == hash_of(tiny.model) != clean
    with applied(tiny, edit_of(tiny, 0, 1)):
        assert tiny.base_hash == changed
        with torch.no_grad():
            tiny.model.get_input_embeddings().weight[0, 0] += 1
            tiny.weight(0)[0, 1] += 1  # of a weight that is about to be given back
        outside = tiny.base_hash
    assert tiny.hash == outside == hash_of(tiny.model) != changed


def test_an_ended_sequence_takes_no_more(tiny):
    with restoring(tiny) as add:
        pass
    with pytest.raises(ModelError, match="has ended"):
        add(edit_of(tiny, 0))
    assert tiny.n_applied == 0
