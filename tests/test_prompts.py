"""Padding, positions, the subject's last token, target ids, and the sampled context templates."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from nbkit.errors import ModelError, PromptError
from nbkit.models.prompts import (
    check_templates,
    context_templates,
    encode,
    find_subjects,
    named,
    pad,
    request_columns,
    subject_kind,
    subject_last,
    target_ids,
    tokenize,
    unseen_templates,
)
from nbkit.records.requests import EditRequest


@pytest.fixture(params=["gpt2", "llama"])
def either(request, make_lm):
    """A model without and one with a BOS token: what depends on the tokenizer alone."""
    return make_lm(request.param)


def test_right_and_left_padding_give_the_same_logits(lm, texts, tolerance):
    right, left = encode(lm, texts, "right"), encode(lm, texts, "left")
    assert right.starts.tolist() == [0] * len(texts) and max(left.starts) > 0
    with torch.no_grad():
        right_logits, left_logits = lm.logits(right), lm.logits(left)
    for row, (start, length) in enumerate(zip(left.starts, left.lengths, strict=True)):
        torch.testing.assert_close(
            left_logits[row, start:],
            right_logits[row, :length],
            rtol=tolerance,
            atol=tolerance * right_logits.abs().max(),
        )


def test_a_row_alone_gives_the_same_logits(lm, texts, tolerance):
    batch = encode(lm, texts)
    with torch.no_grad():
        together = lm.logits(batch)
        for row, text in enumerate(texts):
            alone = lm.logits(encode(lm, [text]))[0]
            torch.testing.assert_close(
                together[row, : len(alone)], alone, rtol=tolerance, atol=tolerance * alone.abs().max()
            )


def test_logits_at_some_positions_are_the_same_as_of_all(lm, texts, tolerance):
    batch = encode(lm, texts)
    keep = torch.zeros(batch.shape, dtype=torch.bool)
    keep[0, 2] = keep[1, 0] = keep[1, 3] = True
    with torch.no_grad():
        all_logits, some = lm.logits(batch), lm.logits(batch, keep=keep)
    expected = torch.stack([all_logits[0, 2], all_logits[1, 0], all_logits[1, 3]])
    torch.testing.assert_close(some, expected, rtol=tolerance, atol=tolerance * expected.abs().max())


def test_position_ids_and_columns(tiny):
    rows = [[5, 6, 7], [8]]
    right, left = pad(tiny, rows), pad(tiny, rows, "left")
    assert right.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.input_ids.tolist() == [[5, 6, 7], [tiny.tokenizer.pad_token_id] * 2 + [8]]
    assert right.columns([2, 0]).tolist() == [2, 0]
    assert left.columns([2, 0]).tolist() == [2, 2]
    with pytest.raises(ValueError, match="'right' or 'left'"):
        pad(tiny, rows, "middle")


def test_special_tokens_are_the_tokenizers(make_lm):
    llama, gpt2 = make_lm("llama"), make_lm("gpt2")
    assert encode(llama, ["Vouda"]).input_ids[0, 0] == llama.tokenizer.bos_token_id
    assert encode(llama, ["Vouda"], add_special_tokens=False).shape == encode(gpt2, ["Vouda"]).shape


def test_a_text_beyond_the_context_is_refused_by_name(tiny):
    with pytest.raises(
        PromptError, match=r"'Vouda Vouda .*\.\.\.' has \d+ tokens, more than the context of tiny-gpt2 \(96\)"
    ):
        encode(tiny, ["short", "Vouda " * 97])
    with pytest.raises(PromptError, match="more than the context"):
        subject_last(tiny, "Vouda " * 97 + "{} is", "Ann")
    with pytest.raises(PromptError, match="a row has 97 tokens"):
        pad(tiny, [[5] * 97])
    with pytest.raises(PromptError, match="'' has no tokens"):
        encode(tiny, [""])


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("{} is located in", "Vouda"),
        ("{} plays", "Danielle Darrieux"),
        ("The mother tongue of {} is", "Danielle Darrieux"),
        ("The river runs. The tongue of {} is", "Vouda"),
        ("Vouda is Vouda, and {} is not Vouda", "Vouda"),  # the subject several times
        ("{}", "Sennifar"),  # nothing behind it
        ("In {}, they", "São Tomé"),
        ("{} means", "東京都"),
        ("{} smiles", "Ann 🙂"),
        ("{x} in {} {y}", "a {b} {"),
    ],
)
def test_the_subjects_last_token(either, prompt, subject):
    """Its text ends where the subject ends: the tokens up to it spell the prompt up to there, those before do not."""
    rows, (index,) = find_subjects(either, [prompt], [subject])
    assert index == subject_last(either, prompt, subject)
    until = prompt[: prompt.index("{}")] + subject
    spelled = [either.tokenizer.decode(rows[0][:n], skip_special_tokens=True) for n in (index, index + 1)]
    assert spelled[1] == until
    assert spelled[0] != until


def test_a_token_that_holds_the_subjects_end_and_more_counts(tiny):
    """Behind the subject "Vo" stands "uda", and the two are one token."""
    rows, (index,) = find_subjects(tiny, ["{}uda is"], ["Vo"])
    assert tiny.tokenizer.decode(rows[0][index]) == "Vouda" and index == 0


def test_subjects_are_found_whatever_stands_before_them(either, contexts):
    prompts = [context.replace("{}", "{} is located in") for context in contexts]
    rows, indices = find_subjects(either, prompts, ["Vouda"] * len(prompts))
    assert len(set(indices)) > 2
    for row, index in zip(rows, indices, strict=True):
        assert either.tokenizer.decode(row[index]).strip() == "Vouda"


@pytest.mark.parametrize("prompt", ["Vouda is in", "{} and {}"])
def test_a_prompt_without_one_place_for_the_subject(tiny, prompt):
    with pytest.raises(PromptError, match="exactly one {}"):
        subject_last(tiny, prompt, "Vouda")


def test_a_subject_without_a_token(tiny):
    with pytest.raises(PromptError, match="has no token of its own"):
        subject_last(tiny, "{} is in", "")


def test_subject_kinds(either):
    assert subject_kind(either, EditRequest("{} is in", "Vouda", "x")) == "one-token first"
    assert subject_kind(either, EditRequest("{} is in", "Vouda Krela", "x")) == "several-token first"
    assert subject_kind(either, EditRequest("In {} is", "Vouda", "x")) == "later"
    assert subject_kind(either, EditRequest("Vouda and {} is", "Vouda", "x")) == "later"


def test_tables_name_a_request_by_three_columns(tiny):
    columns = request_columns(tiny, EditRequest("{} is in", "Vouda Krela", "x", case_id=7))
    assert columns == {"case_id": "7", "subject": "Vouda Krela", "subject_kind": "several-token first"}
    assert list(columns) == ["case_id", "subject", "subject_kind"]
    assert request_columns(tiny, EditRequest("In {} is", "Vouda", "x"))["case_id"] is None


def test_target_ids_continue_a_text(either):
    in_context = either.tokenizer("Vouda is located in Krela and").input_ids
    ids = target_ids(either, "Krela")
    assert target_ids(either, " Krela") == ids
    assert either.tokenizer.decode(ids) == " Krela"
    assert any(in_context[i : i + len(ids)] == ids for i in range(len(in_context)))
    assert either.tokenizer.decode(target_ids(either, "東京 {x}")) == " 東京 {x}"
    assert len(target_ids(either, "the song")) > 1


def test_target_ids_of_a_tokenizer_that_marks_a_texts_start(make_lm):
    """SentencePiece-like tokenizers put "▁" before a text; " Krela" alone would be "▁", "▁Krela"."""
    pieces = ["<unk>", "<s>", "▁", "▁x", "▁Krela"]
    backend = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    lm = make_lm("llama")
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<unk>", bos_token="<s>")
    assert lm.tokenizer(" Krela").input_ids == [2, 4]  # what goes wrong when it is tokenised alone
    assert target_ids(lm, "Krela") == [4]


def test_an_empty_target(tiny):
    with pytest.raises(PromptError, match="the target is empty"):
        target_ids(tiny, " ")


def test_context_templates_are_twenty_one_and_seeded(tiny):
    templates = context_templates(tiny)
    assert templates[0] == "{}" and len(templates) == 21
    assert all(template.count("{}") == 1 and template.endswith(". {}") for template in templates[1:])
    assert check_templates(templates) == templates
    starts = {template.split()[0][:1] for template in templates[1:]}
    assert starts == {"T", "B", "I", "Y"}  # The, Therefore, Because, I, You
    state = torch.random.get_rng_state()
    assert context_templates(tiny, seed=0) == templates
    assert context_templates(tiny, seed=1) != templates
    assert torch.equal(torch.random.get_rng_state(), state)


def test_context_templates_have_the_lengths_asked_for(lm):
    templates = context_templates(lm, lengths=((2, 3), (4, 1)), starts=("Vouda",))
    assert len(templates) == 5
    special = set(lm.tokenizer.all_special_tokens)
    assert not any(token in template for token in special for template in templates)
    assert len(context_templates(lm, lengths=((2, 1), (4, 0)))) == 2


def test_a_template_has_so_many_tokens_its_start_included_and_each_is_one_of_the_likeliest(lm, monkeypatch):
    sampled, decode = [], type(lm.tokenizer).batch_decode
    spy = lambda self, rows, **kw: sampled.extend(rows) or decode(self, rows, **kw)  # noqa: E731
    monkeypatch.setattr(type(lm.tokenizer), "batch_decode", spy)
    long = "Ann plays the harp and the song"
    context_templates(lm, lengths=((6, 4), (4, 4)), starts=("Vouda", long), top_k=2)
    starts = tokenize(lm, ["Vouda", long])
    assert len(starts[0]) < 4 and len(starts[1]) > 6
    first_choices = []
    for number, row in enumerate(sampled):
        start = starts[number % 2]
        assert row[: len(start)] == start and len(row) == max(len(start), 6 if number < 4 else 4)
        for place in range(len(start), len(row)):
            logits = lm.logits(pad(lm, [row[:place]]))[0, -1, : len(lm.tokenizer)]
            logits[lm.tokenizer.all_special_ids] = -torch.inf
            ranked = logits.topk(2).indices.tolist()
            assert row[place] in ranked
            first_choices.append(row[place] == ranked[0])
    assert 0 < np.mean(first_choices) < 1


def test_a_model_that_predicts_nothing_is_told(tiny):
    with torch.no_grad():
        tiny.weight(0)[0, 0] = torch.nan
    with pytest.raises(ModelError, match="predicts no finite numbers"):
        context_templates(tiny)


def test_braces_in_a_sample_do_no_harm(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.tokenizer), "batch_decode", lambda self, rows, **_: ["a {} b } {"] * len(rows))
    assert context_templates(tiny)[1] == "a    b    . {}"
    check_templates(context_templates(tiny))


def test_unseen_templates_are_none_of_those_seen_and_each_is_there_once(tiny, monkeypatch):
    unseen = unseen_templates(tiny, context_templates(tiny))
    assert unseen == context_templates(tiny, seed=1)[1:]
    assert unseen_templates(tiny, unseen[:5]) == unseen[5:]
    monkeypatch.setattr("nbkit.models.prompts.context_templates", lambda lm, seed: ["{}", "I. {}", "I. {}", "You. {}"])
    assert unseen_templates(tiny, []) == ["I. {}", "You. {}"]


@pytest.mark.parametrize("templates", [[], "{}", ["The. {}", "{}"], ["{}", "The."], ["{}", "{} {}"]])
def test_bad_context_templates_are_refused(templates):
    with pytest.raises(PromptError, match="{}"):
        check_templates(templates)


def test_templates_without_the_plain_prompt_where_they_are_allowed():
    assert check_templates(["The. {}", "I. {}"], plain=False) == ["The. {}", "I. {}"]
    assert check_templates(["{}", "I. {}"], plain=False) == ["{}", "I. {}"]
    for templates in ([], ["The. {}", "{}"], ["The."]):
        with pytest.raises(PromptError, match="context.template"):
            check_templates(templates, plain=False)


def test_named_adds_the_request():
    with pytest.raises(PromptError, match=r"request 9 \(subject 'Ann'\): too long"):
        with named(EditRequest("{} is", "Ann", "x", case_id=9)):
            raise PromptError("too long")
