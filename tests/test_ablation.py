"""Variants of ROME that share a search for v*: each has the rows that `single_edits` gives for it alone."""

import numpy as np
import pandas as pd
import pytest
import torch

from nbkit import studies
from nbkit.errors import MethodError
from nbkit.records import results
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store

REQUESTS = [
    EditRequest(prompt, subject, new, true, case_id=number, paraphrase_prompts=(f"I know that {subject} is",),
                neighborhood_prompts=("Sennifar is located in",), neighborhood_targets=(true,))
    for number, (prompt, subject, new, true) in enumerate(
        [("{} is located in", "Vouda", "Sennifar", "Krela"), ("Speech of {} is", "Ann", "the song", "French")])
]  # fmt: skip
TEXTS = ["The river runs through Vouda and Sennifar.", "Ann plays the harp in Krela."]
FAST = {"layer": 1, "v_num_grad_steps": 3, "context_templates": ["The river runs. {}", "I. {}"]}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_kept", {})
    return Store(tmp_path / "results")


def test_each_variant_has_the_rows_that_it_has_alone(tiny, store, monkeypatch):
    root = torch.randn(tiny.d_mlp, 99, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = {"": None, " with C": root @ root.T / 99}
    modes = {"ROME": "mixed", "C-ROME": "prefixed", "p-ROME": "plain"}
    variants = {name + words: {"key_mode": mode, "second_moment": moment} for name, mode in modes.items()
                for words, moment in moments.items()}  # fmt: skip
    frame = studies.rome_ablation(tiny, REQUESTS, TEXTS, variants, store=store, target_init="prefixed_mean", **FAST)
    assert frame["variant"].tolist() == [*variants] * 2 and frame["case_id"].tolist() == ["0"] * 6 + ["1"] * 6
    for name, variant in variants.items():
        alone = studies.single_edits(
            tiny, REQUESTS, TEXTS, store=store, target_init="prefixed_mean", **variant, **FAST
        ).drop(columns=["created", "parameters", "study"])
        found = frame[frame["variant"] == name].reset_index(drop=True)[alone.columns]
        numbers = alone.select_dtypes("number").columns
        np.testing.assert_allclose(found[numbers].to_numpy(float), alone[numbers].to_numpy(float), rtol=1e-9)
        words = alone.columns.difference(numbers)
        pd.testing.assert_frame_equal(found[words], alone[words], check_dtype=False)
    assert frame["paraphrase_argmax_prefixed"].between(0, 1).all()

    monkeypatch.setattr("nbkit.studies.ablation.rome_variants", lambda *_: pytest.fail("computed again"))
    again = studies.rome_ablation(tiny, REQUESTS, TEXTS, variants, store=store, target_init="prefixed_mean", **FAST)
    pd.testing.assert_frame_equal(again, frame)


def test_variants_differ_in_keys_and_second_moment_alone(tiny, store):
    for variants in ({"ROME": {"key_mode": "mixed"}}, {"ROME": {"key_mode": "mixed", "v_lr": 1.0}}):
        with pytest.raises(MethodError, match="'ROME' must have key_mode and second_moment"):
            studies.rome_ablation(tiny, REQUESTS, TEXTS, variants, store=store, **FAST)
    with pytest.raises(MethodError, match="one or more"):
        studies.rome_ablation(tiny, REQUESTS, TEXTS, {}, store=store, **FAST)
