"""An intervention changes what it names and nothing else, in whole passes and in short ones, and leaves no trace."""

from functools import partial

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import nbkit
from nbkit import plots, studies
from nbkit.errors import ModelError, PromptError, RequestError
from nbkit.keys.extract import in_contexts, keys, keys_and_values, later_keys
from nbkit.methods.values import KL_PROMPT
from nbkit.models.generation import generated
from nbkit.models.hooks import capture
from nbkit.models.interventions import (
    at_first_token,
    first_hidden,
    first_position_as,
    in_front,
    shifted_by,
    subject_alone,
)
from nbkit.models.prompts import encode, find_subjects, subject_spans, tokenize
from nbkit.records.results import Store
from nbkit.studies.interventions import C_ROME, KEYS, ROME
from nbkit.studies.method_study import MethodStudy

mpl.use("Agg")
SETTINGS = {"layer": 1, "v_num_grad_steps": 3, "progress": False}
SHORT = ["Ann plays the harp", "Vouda is", "I"]  # within every window of the tiny models


def read_in(requests, contexts):
    """The prompts, and their subjects, that an edit of these requests reads."""
    prompts = [[*in_contexts(request, contexts), KL_PROMPT] for request in requests]
    subjects = [[request.subject] * len(of) for request, of in zip(requests, prompts, strict=True)]
    return sum(prompts, []), sum(subjects, [])


def on_passes(lm):
    """The interventions on passes that this model can have."""
    yield from (shifted_by(3), first_hidden(), subject_alone())
    if lm.architecture.learned_positions:
        yield first_position_as(5)


def plainly(lm, ids, hidden=None, positions=None):
    """Logits of one row by transformers alone, with a mask that says for each pair of tokens what is seen."""
    n = len(ids)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if hidden is not None:
        seen &= ~hidden
    mask = torch.zeros(n, n, dtype=lm.dtype).masked_fill(~seen, torch.finfo(lm.dtype).min)[None, None]
    positions = torch.arange(n) if positions is None else positions
    with torch.no_grad():
        ids = torch.tensor([ids])
        return lm.model(input_ids=ids, attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0]


def each_row(lm, texts):
    """Logits of every text in one padded batch, without the padding."""
    batch = encode(lm, texts)
    with torch.no_grad():
        logits = lm.logits(batch)
    return [row[:n] for row, n in zip(logits, batch.lengths.tolist(), strict=True)]


def test_outside_the_with_every_bit_is_what_it_was(lm, requests, contexts, texts):
    before = each_row(lm, texts)
    for one in on_passes(lm):
        with pytest.raises(KeyError), one.during(lm, *read_in(requests, contexts)):
            raise KeyError
        with one.during(lm, *read_in(requests, contexts)):
            nbkit.perplexity(lm, texts, progress=False)
        assert all(torch.equal(*pair) for pair in zip(each_row(lm, texts), before, strict=True)), one.name


def test_position_0_hidden_is_a_mask_without_its_column(lm, tolerance):
    with first_hidden().during(lm):
        found = each_row(lm, SHORT)
        left = encode(lm, SHORT, "left")
        with torch.no_grad():
            of_left = [row[-n:] for row, n in zip(lm.logits(left), left.lengths.tolist(), strict=True)]
    for ids, *both in zip(tokenize(lm, SHORT), found, of_left, strict=True):
        hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        hidden[1:, 0] = True
        for one in both:
            torch.testing.assert_close(one, plainly(lm, ids, hidden), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found[0], each_row(lm, SHORT)[0])


def test_only_the_weights_on_position_0_are_taken_away(make_lm):
    """In the first layer, whose queries and keys are the same as ever, the other weights stay in proportion."""
    lm = make_lm("gpt2")
    lm.model.set_attn_implementation("eager")
    batch = encode(lm, SHORT[:1])

    def weights():
        asked = {"position_ids": batch.position_ids, "output_attentions": True, "use_cache": False}
        return lm.model(input_ids=batch.input_ids, **asked).attentions

    before = weights()
    with first_hidden().during(lm):
        after = weights()
    assert all((layer[:, :, 1:, 0] == 0).all() for layer in after)
    rest = before[0].clone()
    rest[:, :, 1:, 0] = 0
    torch.testing.assert_close(after[0], rest / rest.sum(-1, keepdim=True))


def test_a_subject_alone_sees_nothing_before_it(lm, requests, tolerance):
    request = requests[1]
    prompts, subjects = [f"I. {request.prompt}"], [request.subject]
    (ids,), ((first, last),) = subject_spans(lm, prompts, subjects)
    hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    hidden[first : last + 1, :first] = True
    text = prompts[0].replace("{}", request.subject)
    assert first > 0
    with subject_alone().during(lm, prompts, subjects):
        found, other = each_row(lm, [text, "I play chess"])
    torch.testing.assert_close(found, plainly(lm, ids, hidden), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(other, each_row(lm, ["I play chess"])[0], rtol=tolerance, atol=tolerance)


def test_alone_in_a_rotary_model_a_token_has_the_key_of_a_first_one(lm, requests, contexts, tolerance):
    """It cannot see where it is. With learned positions it can."""
    request = requests[1]
    with subject_alone().during(lm, *read_in([request], contexts)):
        behind = keys(lm, [request], 1, contexts, progress=False)[0]
    rows, spans = subject_spans(lm, in_contexts(request, contexts), [request.subject] * len(contexts))
    tokens = [row[first : last + 1] for row, (first, last) in zip(rows, spans, strict=True)]
    alike = behind[torch.tensor([of_row == tokens[1] for of_row in tokens])]  # behind a prefix a space is among them
    assert len(alike) > 1
    spread = (alike - alike[:1]).abs().max() / alike.abs().max()
    assert (spread > 1e-3) if lm.architecture.learned_positions else (spread < max(tolerance, 1e-5))


def test_another_position_embedding_is_another_position_id(lm, texts, tolerance):
    ids = tokenize(lm, texts[:1])[0]
    count = torch.arange(len(ids))
    with shifted_by(3).during(lm):
        shifted = each_row(lm, texts[:1])[0]
    window = getattr(lm.config, "sliding_window", None)
    if lm.architecture.learned_positions:
        torch.testing.assert_close(shifted, plainly(lm, ids, positions=count + 3), rtol=tolerance, atol=tolerance)
        with first_position_as(5).during(lm):
            replaced = each_row(lm, texts[:1])[0]
        plain = plainly(lm, ids, positions=torch.where(count == 0, 5, count))
        torch.testing.assert_close(replaced, plain, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(replaced, each_row(lm, texts[:1])[0])
    else:
        same = each_row(lm, texts[:1])[0]
        rounding = max(tolerance, 1e-4) * float(same.abs().max())  # angles are float32 in these models
        torch.testing.assert_close(shifted, same, rtol=0, atol=rounding)
        with pytest.raises(ModelError, match="no learned position embeddings.*use shifted_by"):
            first_position_as(5).during(lm)
    assert window is None or len(ids) > window, "beyond the window"


def test_passes_cut_short_are_changed_as_whole_ones_are(lm, requests, contexts, texts, tolerance):
    """Edits, and what they do, are the same by replay and by whole passes."""
    again = nbkit.edit(lm, requests, context_templates=contexts, **SETTINGS)
    moved = []
    for one in on_passes(lm):
        results = []
        for lm.replayable in (True, False):
            with one.during(lm, *read_in(requests, contexts)):
                made = nbkit.edit(lm, requests, context_templates=contexts, **SETTINGS)
                after = nbkit.perplexity(lm, texts, edits=made, progress=False)
            results.append((torch.stack([edit.info["value_star"] for edit in made]),
                            torch.stack([edit.info["key_mean"] for edit in made]), torch.tensor(after)))  # fmt: skip
        for cut, whole in zip(*results, strict=True):
            close = max(100 * tolerance, 1e-6)
            torch.testing.assert_close(cut, whole, rtol=close, atol=close * float(whole.abs().max()), msg=one.name)
        plain = torch.stack([edit.info["key_mean"] for edit in again])
        moved.append(bool((results[0][1] - plain).abs().max() > 1e-3 * plain.abs().max()))
    assert moved == [lm.architecture.learned_positions, True, True, True][: len(moved)]


def test_what_makes_no_sense_is_refused(tiny, texts):
    with pytest.raises(ModelError, match="position 96 does not exist in tiny-gpt2"):
        first_position_as(96).during(tiny)
    with shifted_by(90).during(tiny), pytest.raises(PromptError, match="does not fit into the context"):
        nbkit.perplexity(tiny, texts, progress=False)
    with first_hidden().during(tiny), pytest.raises(ModelError, match="in a pass with a cache"):
        generated(tiny, ["Ann"], 2, progress=False)
    with pytest.raises(PromptError, match="without {}"):
        in_front("{} and", "name")
    with shifted_by(3).during(tiny), pytest.raises(ModelError, match="inside a `with` that changes its passes"):
        _ = tiny.hash


def test_requests_are_rewritten_where_it_says(lm, requests):
    one = at_first_token()
    for request in requests:
        first = one.rewritten(lm, request)
        assert first.text == request.text and first.target_new == request.target_new
        (ids,), (index,) = find_subjects(lm, [first.prompt], [first.subject])
        assert index == lm.architecture.adds_bos and ids == tokenize(lm, [request.text])[0]
    behind = in_front("<|endoftext|>", "end of text").rewritten(lm, requests[0])
    (ids,), (index,) = find_subjects(lm, [behind.prompt], [behind.subject])
    (plain,), (before,) = find_subjects(lm, [requests[0].prompt], [requests[0].subject])
    assert index == before + 1 and ids[index] == plain[before]
    key_of = partial(keys_and_values, lm, subjects=[behind.subject], layer=1)
    assert not torch.allclose(key_of([behind.prompt]).keys, key_of([requests[0].prompt]).keys)


STUDY = {"layer": 1, "v_num_grad_steps": 3}


def test_each_edit_is_made_with_one_thing_changed_and_measured_without(tiny, requests, texts, contexts, tmp_path):
    """Against the same by hand: the verbs inside of the `with`, or on the rewritten requests."""
    ones = [in_front("I. ", "in front"), first_position_as(5), subject_alone()]
    frame = studies.intervened_edits(tiny, requests, texts, ones, Store(tmp_path), contexts, **STUDY)
    assert list(dict.fromkeys(frame["intervention"])) == [*KEYS, *(one.name for one in ones)]
    of = {name: rows.reset_index(drop=True) for name, rows in frame.groupby("intervention")}
    assert all(rows["case_id"].tolist() == ["0", "1", "2"] for rows in of.values())
    for one in ones:
        asked = [one.rewritten(tiny, request) for request in requests]
        with one.during(tiny, *read_in(asked, contexts)):
            inside = nbkit.perplexity(tiny, texts, progress=False)
            made = nbkit.edit(tiny, asked, context_templates=contexts, **SETTINGS)
            said = nbkit.edit_metrics(tiny, asked, edits=made, progress=False)
        rows = of[one.name]
        np.testing.assert_allclose(rows["signed_denominator"], [e.info["signed_denominator"] for e in made], rtol=1e-9)
        np.testing.assert_allclose(rows["perplexity"], nbkit.perplexity(tiny, texts, made, progress=False), rtol=1e-9)
        plain = nbkit.edit_metrics(tiny, requests, edits=made, progress=False)
        np.testing.assert_allclose(rows["target_probability"], plain["target_probability"], rtol=1e-9)
        np.testing.assert_array_equal(rows["efficacy_argmax_intervened"], said["efficacy_argmax"])
        known = rows["perplexity_intervened"]
        assert known.isna().all() if one.passes is None else np.allclose(known, inside)
    for name, mode in ((ROME, "mixed"), (C_ROME, "prefixed")):
        made = nbkit.edit(tiny, requests, context_templates=contexts, key_mode=mode, **SETTINGS)
        np.testing.assert_allclose(of[name]["perplexity"], nbkit.perplexity(tiny, texts, made, progress=False))
        np.testing.assert_allclose(of[name]["numerator"], [e.info["numerator"] for e in made], rtol=1e-6)
    below, above = of["k̄ in the denominator only"], of["k̄ in the numerator only"]
    for one, denominator, numerator in ((below, C_ROME, ROME), (above, ROME, C_ROME)):
        np.testing.assert_allclose(one["denominator"], of[denominator]["denominator"], rtol=1e-6)
        np.testing.assert_allclose(one["numerator"], of[numerator]["numerator"], rtol=1e-6)
    with pytest.MonkeyPatch.context() as patch:  # nothing is computed twice
        patch.setattr(MethodStudy, "edits", None)
        again = studies.intervened_edits(tiny, requests, texts, ones[::-1], Store(tmp_path), contexts, **STUDY)
    assert again["perplexity"].sum() == pytest.approx(frame["perplexity"].sum())


def test_the_later_key_is_of_the_same_tokens_behind_the_prefixes(lm, requests, contexts, tolerance):
    request = requests[1]
    (found,) = later_keys(lm, [request], 1, contexts)
    (own,), ((first, last),) = subject_spans(lm, [request.prompt], [request.subject])
    each = []
    for prefix in contexts[1:]:
        row = tokenize(lm, [prefix.removesuffix(" {}")])[0] + own[first : last + 1]
        with torch.no_grad(), capture(lm.projection(1), "input", shape=(1, len(row))) as key:
            lm.model(input_ids=torch.tensor([row]), use_cache=False)
        each.append(key.value[0, -1])
    torch.testing.assert_close(found, torch.stack(each).mean(0).to(found.dtype), rtol=1e-4, atol=tolerance)


def test_by_layer_a_first_token_is_taken_for_the_subject(tiny, requests, contexts):
    frame = studies.first_tokens_by_layer(tiny, requests, [0, 2], "I. ", contexts)
    for place, one in (("first token", at_first_token()), ("behind a sentence", in_front("I. ", "name"))):
        asked = [one.rewritten(tiny, request) for request in requests]
        risk = nbkit.collapse_risk(tiny, asked, layer=2, context_templates=contexts, progress=False)
        rows = frame[(frame["place"] == place) & (frame["layer"] == 2)]
        np.testing.assert_allclose(rows["signed_denominator"], risk["signed_denominator"])
        assert rows["subject"].tolist() == [request.subject for request in requests]
    assert frame["similarity"].between(-1, 1).all() and len(frame) == 3 * 2 * len(requests)


def test_hard_requests_are_the_first_that_collapse(tiny, requests, texts, contexts, tmp_path):
    arguments = {"store": Store(tmp_path), "context_templates": contexts, **STUDY}
    rows = studies.single_edits(tiny, requests, texts, **arguments)
    ratio = float(np.sort(rows["perplexity"] / rows["perplexity_before"])[-1])  # only the worst collapses
    hard, normal = studies.hard_and_normal(tiny, requests, texts, 2, 1, ratio=ratio, **arguments)
    worst = int(rows["perplexity"].argmax())
    assert hard == [requests[worst]] and normal == [requests[0 if worst else 1]]
    with pytest.raises(RequestError, match="none is a collapse one.*Take more requests"):
        studies.hard_and_normal(tiny, requests, texts, 1, 1, ratio=2 * ratio, **arguments)


def test_the_figure_has_a_row_each_and_shows_what_is_infinite():
    rows = [(name, kind, group, value, value and 4.0 / value)
            for name, kind in (("as it is", "keys"), ("in front", "request")) for group in ("hard", "normal")
            for value in (-0.02, 5.0, 40.0)]  # fmt: skip
    names = ["intervention", "changes", "group", "signed_denominator", "perplexity"]
    frame = pd.DataFrame(rows, columns=names).assign(perplexity_before=4.0)
    frame.loc[0, "perplexity"] = np.inf
    frame["perplexity"] = frame["perplexity"].abs()
    with plots.paper_style():
        fig, axes = plt.subplots(1, 2)
        plots.intervention_strips(frame, axes)
        fig.canvas.draw()
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["as it is", "in front"]
    shown = np.concatenate([line.get_xdata() for line in axes[0].lines if line.get_ls() == "None"])
    assert sorted(shown) == sorted(frame["signed_denominator"])
    low, high = axes[0].get_xlim()
    assert low < -0.02 and high > 40
    assert "infinite or NaN (1 of 12)" in [text.get_text() for text in axes[0].get_legend().get_texts()]
    plt.close(fig)
