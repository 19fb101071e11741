"""Perplexity and edit metrics against plain loops: one text at a time, no padding, probabilities token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.errors import PromptError
from nbkit.models.prompts import target_ids
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity, score_targets


def log_probabilities(lm, ids):
    """Log-probabilities of every next token of one unpadded row: (position, vocabulary)."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def plain_nll(lm, ids, first=1):
    scores = log_probabilities(lm, ids)
    return [-scores[position - 1, ids[position]].item() for position in range(first, len(ids))]


def random_edit(lm, scale=0.1, layer=1):
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(lm.d_model, 1, generator=generator, dtype=torch.float64) * scale
    right = torch.randn(1, lm.d_mlp, generator=generator, dtype=torch.float64)
    return Edit({lm.weight_name(layer): LowRank(left, right)})


def test_perplexity_is_the_mean_of_the_texts_own_without_special_tokens(lm, texts, tolerance):
    rows = lm.tokenizer(texts, add_special_tokens=False).input_ids
    nlls = [plain_nll(lm, row) for row in rows]
    sentence_mean = np.mean([math.exp(np.mean(nll)) for nll in nlls])
    token = math.exp(np.concatenate(nlls).mean())
    for batch_size in (1, 2, 64):
        assert perplexity(lm, texts, batch_size=batch_size) == pytest.approx(sentence_mean, rel=10 * tolerance)
        assert perplexity(lm, texts, kind="token", batch_size=batch_size) == pytest.approx(token, rel=10 * tolerance)


def test_perplexity_of_edited_models_is_that_with_each_edit_applied_alone(tiny, texts):
    edits = [random_edit(tiny, scale) for scale in (0.01, 0.1, 1.0)]
    before = perplexity(tiny, texts)
    expected = []
    for edit in edits:
        with applied(tiny, edit):
            expected.append(perplexity(tiny, texts))
    values = perplexity(tiny, texts, edits=edits)
    assert isinstance(values, np.ndarray)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert len(set(values)) == 3
    assert perplexity(tiny, texts) == before


@pytest.mark.parametrize(("value", "expected"), [(math.nan, math.isnan), (1e300, lambda p: not math.isfinite(p))])
def test_a_broken_model_has_a_perplexity_that_says_so(tiny, texts, value, expected):
    column = torch.full((tiny.d_model, 1), value, dtype=torch.float64)
    edit = Edit({tiny.weight_name(1): LowRank(column, torch.ones(1, tiny.d_mlp, dtype=torch.float64))})
    assert expected(perplexity(tiny, texts, edits=[edit])[0])
    assert math.isfinite(perplexity(tiny, texts))


def test_one_text_in_place_of_a_list_is_refused(tiny):
    with pytest.raises(PromptError, match=r"a list of texts is needed, .* write \['The river'\]"):
        perplexity(tiny, "The river")


def test_a_text_that_cannot_be_scored_is_named(tiny):
    with pytest.raises(PromptError, match="two tokens.*'x'"):
        perplexity(tiny, ["Ann plays the harp.", "x"])
    with pytest.raises(PromptError, match="context"):
        perplexity(tiny, ["Ann plays the harp. " * 60])
    with pytest.raises(ValueError, match="sentence_mean"):
        perplexity(tiny, ["Ann plays the harp."], kind="mean")


def test_targets_are_scored_token_by_token_after_their_prompts(lm, tolerance):
    prompts = ["Ann plays the", "The mother tongue of Danielle Darrieux is", "Ann"]
    targets = ["harp", "the song", "Sennifar"]
    scores = score_targets(lm, prompts, targets, batch_size=2)
    for prompt, target, (_, row) in zip(prompts, targets, scores.iterrows(), strict=True):
        context, ids = lm.tokenizer(prompt).input_ids, target_ids(lm, target)
        nll = plain_nll(lm, context + ids, first=len(context))
        choices = log_probabilities(lm, context + ids)[len(context) - 1 : -1].argmax(-1).tolist()
        assert row["nll"] == pytest.approx(np.mean(nll), rel=10 * tolerance)
        assert row["probability"] == pytest.approx(math.exp(-sum(nll)), rel=100 * tolerance)
        assert row["choices"] == tuple(choices)
        assert row["correct"] == (choices == ids)


@pytest.fixture
def full_request():
    return EditRequest(
        "{} plays the", "Ann", "drum", "harp", case_id="a",
        paraphrase_prompts=("The river runs. Ann plays the", "Because Ann plays the"),
        neighborhood_prompts=("Danielle plays the", "You was born in"), neighborhood_targets=("harp", "Krela"),
    )  # fmt: skip


def test_edit_metrics_are_the_shares_they_say(lm, full_request):
    request = full_request
    (row,) = edit_metrics(lm, [request]).to_dict("records")

    def nll(prompt, target):
        context = lm.tokenizer(prompt).input_ids
        return np.mean(plain_nll(lm, context + target_ids(lm, target), first=len(context)))

    assert row["case_id"] == "a"
    assert row["efficacy"] == (nll(request.text, "drum") < nll(request.text, "harp"))
    assert row["paraphrase"] == np.mean([nll(p, "drum") < nll(p, "harp") for p in request.paraphrase_prompts])
    pairs = zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True)
    assert row["neighborhood"] == np.mean([nll(p, answer) < nll(p, "drum") for p, answer in pairs])
    assert math.isnan(row["locality"])

    def less(prompt, one, other):
        return math.exp(-nll(prompt, one)) - math.exp(-nll(prompt, other))

    by_how_much = [less(prompt, "drum", "harp") for prompt in (request.text, *request.paraphrase_prompts)]
    pairs = zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True)
    of_neighbors = np.mean([less(prompt, answer, "drum") for prompt, answer in pairs])
    assert row["efficacy_magnitude"] == pytest.approx(by_how_much[0], rel=1e-3)
    assert row["paraphrase_magnitude"] == pytest.approx(np.mean(by_how_much[1:]), rel=1e-3)
    assert row["neighborhood_magnitude"] == pytest.approx(of_neighbors, rel=1e-3)


def test_metrics_see_an_edit_and_locality_compares_with_the_unedited_model(tiny, full_request):
    """An edit that writes the target's output embedding into every value makes it the first choice everywhere."""
    reference = neighborhood_tokens(tiny, [full_request])
    (unchanged,) = edit_metrics(tiny, [full_request], reference).to_dict("records")
    assert unchanged["locality"] == 1
    (token,) = target_ids(tiny, "drum")
    direction = tiny.model.lm_head.weight[token].double()[:, None]
    keys = torch.full((1, tiny.d_mlp), 1e4, dtype=torch.float64)
    for sign in (1, -1):  # keys have either sign
        edit = Edit({tiny.weight_name(2): LowRank(sign * direction, keys)})
        with applied(tiny, edit):
            (row,) = edit_metrics(tiny, [full_request], reference).to_dict("records")
            if row["efficacy_argmax"]:
                break
    assert row["efficacy"] == row["efficacy_argmax"] == row["reliability"] == 1
    assert row["locality"] < 1
    assert row["target_probability"] > 10 * unchanged["target_probability"]


def test_first_choices_are_held_against_what_is_expected_at_each_prompt(tiny, full_request):
    """In a model that says "drum" whatever it reads: the new target on the prompts, the true answer on neighbours."""
    (token,) = target_ids(tiny, "drum")
    with torch.no_grad():
        tiny.model.transformer.ln_f.weight.zero_()
        tiny.model.transformer.ln_f.bias.copy_(tiny.model.lm_head.weight[token])
    other = replace(full_request, target_new="harp", target_true="drum", neighborhood_targets=("drum", "Krela"))
    says_it, says_the_old = edit_metrics(tiny, [full_request, other]).to_dict("records")
    names = ("efficacy_argmax", "paraphrase_argmax", "neighborhood_argmax", "reliability", "generalization")
    assert [says_it[name] for name in names] == [1, 1, 0, 1, 1]
    assert [says_the_old[name] for name in names] == [0, 0, 0.5, 0, 0]


def test_the_prefix_goes_before_the_rewrite_prompt_only(tiny, full_request):
    (plain,), (behind,) = (
        edit_metrics(tiny, [full_request], prefix=prefix).to_dict("records") for prefix in ("{}", "The river runs. {}")
    )
    expected = score_targets(tiny, ["The river runs. Ann plays the"], ["drum"])["probability"][0]
    assert behind["target_probability"] == pytest.approx(expected)
    assert behind["target_probability"] != plain["target_probability"]
    assert behind["paraphrase"] == plain["paraphrase"] and behind["neighborhood"] == plain["neighborhood"]


def test_the_prefix_goes_before_paraphrases_where_that_is_asked_for(tiny, full_request):
    prefix = "The river runs. {}"
    (found,) = edit_metrics(tiny, [full_request], prefix=prefix, prefix_paraphrases=True).to_dict("records")
    there = replace(full_request, paraphrase_prompts=[prefix.format(p) for p in full_request.paraphrase_prompts])
    (expected,) = edit_metrics(tiny, [there], prefix=prefix).to_dict("records")
    assert found == pytest.approx(expected, nan_ok=True)
    (plain,) = edit_metrics(tiny, [full_request], prefix=prefix).to_dict("records")
    assert found["paraphrase_magnitude"] != plain["paraphrase_magnitude"]


def test_what_a_request_does_not_have_is_nan(tiny):
    rows = edit_metrics(tiny, [EditRequest("{} plays the", "Ann", "drum")])
    assert rows[["efficacy", "paraphrase", "neighborhood", "locality"]].isna().all(axis=None)
    assert rows[["efficacy_argmax", "target_probability", "reliability"]].notna().all(axis=None)
