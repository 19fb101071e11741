"""The risk of an edit is known beforehand: its denominators are those of the edit, its bound holds."""

import pandas as pd
import pytest
import torch

from nbkit.errors import MethodError, ModelError
from nbkit.methods.verbs import edit
from nbkit.studies.risk import collapse_risk


@pytest.mark.parametrize("key_mode", ["mixed", "prefixed", "plain"])
@pytest.mark.parametrize("with_second_moment", [False, True])
def test_denominators_are_those_of_the_edits_and_the_bound_holds(lm, requests, contexts, key_mode, with_second_moment):
    noise = torch.randn(lm.d_mlp, 3 * lm.d_mlp, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    C = noise @ noise.T / noise.shape[1] if with_second_moment else None
    shared = {"layer": 1, "key_mode": key_mode, "context_templates": contexts, "second_moment": C}
    frame = collapse_risk(lm, requests, **shared)
    made = edit(lm, requests, progress=False, v_num_grad_steps=5, v_lr=5.0, **shared)  # a rate that reaches the clamp
    assert frame["case_id"].tolist() == ["0", "1", "2"] and frame["subject_kind"][2] == "later"
    for row, found in zip(frame.itertuples(), made, strict=True):
        assert row.denominator == pytest.approx(found.info["denominator"], rel=1e-4)
        assert row.signed_denominator == pytest.approx(found.info["signed_denominator"], rel=1e-4)
        assert found.info["update_norm"] <= row.update_norm_bound * (1 + 1e-5)
        assert row.risk == pytest.approx(row.update_norm_bound / lm.weight(1).norm().item(), rel=1e-5)
    assert (frame["update_norm_bound"] > 0).all()


@pytest.mark.parametrize("key_mode", ["mixed", "prefixed", "plain"])
def test_it_is_of_the_edits_with_all_their_hyper_parameters(tiny, requests, contexts, key_mode):
    noise = torch.randn(tiny.d_mlp, 99, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = {"layer": 1, "key_mode": key_mode, "context_templates": contexts[1:], "second_moment": noise @ noise.T,
              "second_moment_ridge": 0.5, "target_init": "prefixed_mean", "clamp_norm_factor": 0.5}  # fmt: skip
    made = edit(tiny, requests, progress=False, v_num_grad_steps=5, v_lr=5.0, **shared)
    for row, found in zip(collapse_risk(tiny, requests, **shared).itertuples(), made, strict=True):
        assert row.signed_denominator == pytest.approx(found.info["signed_denominator"], rel=1e-9)
        assert row.value_norm == pytest.approx(float(found.info["value_init"].norm()), rel=1e-9)
        assert found.info["update_norm"] <= row.update_norm_bound * (1 + 1e-9)


def test_it_takes_the_models_own_layer_and_seeded_templates(tiny, requests, monkeypatch):
    monkeypatch.setattr("nbkit.methods.hparams._defaults", lambda lm, method: {**DEFAULTS, "layer": 2})
    assert set(collapse_risk(tiny, requests)["layer"]) == {2}
    pd.testing.assert_frame_equal(collapse_risk(tiny, requests), collapse_risk(tiny, requests))
    assert len(collapse_risk(tiny, [])) == 0


def test_wrong_settings_are_refused(tiny, requests):
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        collapse_risk(tiny, requests, layer=9)
    with pytest.raises(MethodError, match="key_mode"):
        collapse_risk(tiny, requests, layer=1, key_mode="none")


DEFAULTS = {"key_mode": "mixed", "target_init": "unprefixed", "v_lr": 0.5, "v_num_grad_steps": 20,
            "v_weight_decay": 0.5, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "early_stop_loss": 0.05,
            "second_moment_ridge": 0.0, "stop_after_first_choice": 0, "value_norm": 0.0}  # fmt: skip
