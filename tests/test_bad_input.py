"""A request that cannot be used, met in the middle of a study: it is named, and what came before is kept."""

import dataclasses

import pytest

from nbkit import studies
from nbkit.errors import PromptError
from nbkit.records import results
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store

GOOD = EditRequest("{} plays the", "Ann", "drum", "harp", case_id=1, paraphrase_prompts=("I know that Ann plays the",))
BAD = {
    "its prompt": dataclasses.replace(GOOD, prompt="Vouda " * 100 + "{} plays the", case_id=17),
    "its target": dataclasses.replace(GOOD, target_new="Krela " * 100, case_id=17),
    "a paraphrase": dataclasses.replace(GOOD, paraphrase_prompts=("Vouda " * 100 + "is in",), case_id=17),
}
TEXTS = ["The river runs through Vouda and Sennifar."]


@pytest.mark.parametrize("what", BAD)
def test_a_text_beyond_the_context_is_named_and_loses_nothing(tiny, tmp_path, monkeypatch, what):
    monkeypatch.setattr(results, "_kept", {})
    store = Store(tmp_path)
    options = {"layer": 1, "v_num_grad_steps": 2, "context_templates": ["{}", "The river runs. {}"], "store": store}
    with pytest.raises(PromptError, match="more than the context of tiny-gpt2") as error:
        studies.single_edits(tiny, [GOOD, BAD[what]], TEXTS, **options)
    assert "17" in str(error.value) or "Vouda Vouda" in str(error.value)
    assert tiny.n_applied == 0
    monkeypatch.setattr("nbkit.studies.method_study.edit", None)  # to edit again would fail
    assert studies.single_edits(tiny, [GOOD], TEXTS, **options)["case_id"].tolist() == ["1"]
