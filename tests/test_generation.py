"""What a model says by itself: against loops of one text at a time, and scores worked out by hand."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.errors import PromptError, RequestError
from nbkit.models.generation import Generated, generated
from nbkit.plain import metrics as plain
from nbkit.records.results import Store
from nbkit.studies import generation
from nbkit.studies.generation import begins_with, entropy, generation_metrics, goes_on_after, reference_texts
from nbkit.studies.single import single_edits

PROMPTS = ["Ann", "The mother tongue of Danielle Darrieux is", "Because the tower plays a song about Vouda. Ann plays"]


@pytest.fixture
def asked(requests):
    return [
        replace(
            request,
            paraphrase_prompts=("I see Vouda in", "Ann plays"),
            neighborhood_prompts=("Danielle plays the",),
            neighborhood_targets=("harp",),
            generation_prompts=("Vouda is", "The river of Krela"),
        )
        for request in requests
    ]


def edit_of(lm, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(lm.d_model, 1, generator=generator), torch.randn(1, lm.d_mlp, generator=generator)
    return Edit({lm.weight_name(1): LowRank(left, right)})


def test_texts_are_those_of_whole_passes_over_one_at_a_time(lm):
    parts = lm.model, lm.tokenizer
    ids = lm.tokenizer(PROMPTS[1]).input_ids
    for _ in range(4):
        end = int(plain.log_probabilities(lm.model, ids)[-1].argmax())  # one that comes, so that this text ends early
        ids.append(end)
    lm.model.generation_config.eos_token_id = [end]
    lm.model.generation_config.repetition_penalty = 5.0  # of the model's own settings only the ends of text count
    ends = [end, lm.tokenizer.eos_token_id]
    expected = [Generated(*plain.generated(*parts, prompt, 12, ends)) for prompt in PROMPTS]
    for batch_size in (2, 64):
        assert generated(lm, PROMPTS, 12, batch_size) == expected
    assert expected[1].ended
    assert lm.model.generation_config.repetition_penalty == 5.0


def test_a_text_may_end_otherwise(tiny):
    (whole,) = generated(tiny, PROMPTS[:1], 12)
    assert len(whole.text) > 5 and not whole.ended
    mark = whole.text[4:6]
    assert generated(tiny, PROMPTS[:1], 12, end=mark) == [Generated(whole.text[: whole.text.index(mark)], True)]
    assert generated(tiny, PROMPTS[:1], 12, end="not said") == [whole]


def test_no_room_to_go_on_is_said(tiny):
    with pytest.raises(PromptError, match="'Ann' has 1 tokens.*no room for 96 more"):
        generated(tiny, ["Ann"], max_tokens=96)
    with pytest.raises(nbkit.NbkitError, match="max_tokens must be a whole number"):
        generated(tiny, ["Ann"], max_tokens=0)


@pytest.mark.parametrize(
    ("text", "begins", "goes_on"),
    [
        (" Krela", True, False),
        ("\nKrela.\n", True, False),
        (" Krela and Vouda", True, True),
        (" Krela. Ann", True, True),
        (" Krelan", False, None),
        (" krela", False, None),
        (" the Krela", False, None),
        ("", False, None),
    ],
)
def test_exact_match_at_the_start(text, begins, goes_on):
    assert begins_with(text, " Krela ") == begins
    if begins:
        assert goes_on_after(text, " Krela ") == goes_on


def test_entropy_by_hand():
    # "a b a b": bigrams ab ab ba, trigrams aba bab
    h2, h3 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)), 1.0
    assert entropy("a b a b") == pytest.approx((2 / 3 * h2 + 4 / 3 * h3) / 2)
    assert entropy("no no no no no no") == entropy("a b") == entropy("") == 0
    assert entropy("Ann, who plays.") == pytest.approx((2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2)
    for text in ("The river runs through Vouda, and the river runs through Krela.", "a b a b", "x"):
        assert entropy(text) == pytest.approx(plain.entropy(text))


def test_the_scores_of_one_request_by_hand(tiny, requests, monkeypatch):
    request = replace(
        requests[0], target_new="Krela", target_true="Sennifar",
        paraphrase_prompts=("p1", "p2", "p3"), neighborhood_prompts=("n1", "n2"), neighborhood_targets=("Ann", "harp"),
        generation_prompts=("Ann plays", "Ann sings"),
    )  # fmt: skip
    said = {
        request.text: Generated(" Krela. The river", False), "p1": Generated(" Krela.", True),
        "p2": Generated(" Vouda", True), "p3": Generated(" Krelan", False), "n1": Generated(" Ann runs", False),
        "n2": Generated(" Ann", True), "Ann plays": Generated(" the harp", True), "Ann sings": Generated(" ", True),
    }  # fmt: skip
    monkeypatch.setattr(generation, "generated", lambda lm, prompts, *_: [said[prompt] for prompt in prompts])
    references = {request: ["harp harp song", "the harp plays"], requests[1]: ["river of plays"]}
    (row,) = generation_metrics(tiny, [request], references=references).to_dict("records")
    assert row["efficacy_generated"] == 1 and row["paraphrase_generated"] == pytest.approx(1 / 3)
    assert row["neighborhood_generated"] == 0.5
    assert row["overgenerated"] == 0.5, "of the two that begin with the target"
    assert row["ended_generated"] == 0.5 and row["text_generated"] == " Krela. The river"
    assert row["entropy_generated"] == pytest.approx((entropy("Ann plays the harp") + entropy("Ann sings")) / 2)
    # Of the three texts one has "song", one "the"; two have "harp", two "plays".
    once, twice = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    text, reference = {"plays": twice, "the": once, "harp": twice}, {"harp": 3 * twice, "song": once, "the": once}
    reference["plays"] = twice
    product = sum(value * reference[word] for word, value in text.items())
    cosine = product / math.hypot(*text.values()) / math.hypot(*reference.values())
    assert row["consistency_generated"] == pytest.approx(cosine)
    whole = "Ann plays the harp Ann sings "
    everything = [text for texts in references.values() for text in texts]
    assert row["consistency_generated"] == pytest.approx(plain.consistency(whole, references[request], everything))


def test_what_a_request_does_not_have_is_nan(tiny, requests):
    measured = generation_metrics(tiny, requests, references=dict.fromkeys(requests, ()), max_tokens=3)
    names = ["paraphrase_generated", "neighborhood_generated", "entropy_generated", "consistency_generated"]
    assert measured[names].isna().all(axis=None) and measured["efficacy_generated"].notna().all()
    with pytest.raises(RequestError, match=r"request 2 \(subject 'Danielle Darrieux'\): the references hold no texts"):
        generation_metrics(tiny, requests, references=dict.fromkeys(requests[:2], ()))
    with pytest.raises(RequestError, match="1 edits for 3 requests"):
        generation_metrics(tiny, requests, edits=[Edit({})])
    assert generation_metrics(tiny, []).empty


def test_each_request_is_asked_of_its_own_edit(tiny, asked):
    edits, before = [edit_of(tiny, seed) for seed in range(len(asked))], tiny.weight(1).clone()
    references = dict.fromkeys(asked, ("The river runs through Vouda.", "Ann plays the harp."))
    options = {"references": references, "max_tokens": 6}
    found = nbkit.generation_metrics(tiny, asked, edits=edits, **options)
    expected = []
    for request, edit in zip(asked, edits, strict=True):
        with applied(tiny, edit):
            expected.append(generation_metrics(tiny, [request], **options))
            text, _ = plain.generated(tiny.model, tiny.tokenizer, request.text, 6, [0])
            assert expected[-1]["text_generated"][0] == text
    pd.testing.assert_frame_equal(found, pd.concat(expected, ignore_index=True))
    assert (found["text_generated"] != generation_metrics(tiny, asked, **options)["text_generated"]).all()
    assert torch.equal(tiny.weight(1), before)


def test_references_are_texts_about_others_that_truly_have_the_target():
    def fact(subject, target_true, relation_id="in"):
        return nbkit.EditRequest("{} is in", subject, "elsewhere", target_true, relation_id=relation_id)

    request = nbkit.EditRequest("{} is in", "Vouda", "Krela", "Sennifar", relation_id="in")
    facts = [fact("Ann", "Krela"), fact("Ann Lee", "Krela"), fact("Bo", "Sennifar"), fact("Vouda", "Krela")]
    facts += [fact("Cy", "Krela", "from")]
    texts = ["Bo is in Krela.", "Ann sings.", "Anna sings.", "Vouda sings.", "I saw Ann Lee and Cy.", "Cy is from it."]
    assert reference_texts([request], facts, texts) == {request: [texts[1], texts[4]]}
    assert reference_texts([request], facts, texts, most=1) == {request: [texts[1]]}
    assert reference_texts([request], [], texts) == {request: []}


def test_single_edits_take_it_as_an_option(tiny, asked, texts, contexts, tmp_path):
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": contexts, "metrics": False}
    store, references = Store(tmp_path), dict.fromkeys(asked, ("Ann plays the harp.",))
    plainly = single_edits(tiny, asked, texts, store=store, **options)
    found = single_edits(
        tiny, asked, texts, store=store, generated={"references": references, "max_tokens": 4}, **options
    )
    assert {"efficacy_generated", "overgenerated", "consistency_generated", "text_generated"} <= set(found.columns)
    assert not any(name.endswith("generated") for name in plainly.columns)
    assert found["entropy_generated"].notna().all()
