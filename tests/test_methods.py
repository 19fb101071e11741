"""What holds of every method: the verbs, the table of hyper-parameters, and what an edit does to a model."""

import dataclasses
import json
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError, ModelError, PromptError
from nbkit.keys.moments import default_second_moments
from nbkit.methods import hparams
from nbkit.methods.hparams import hyper_parameters, published_layers
from nbkit.methods.method import MethodSettings, batches_by_cost
from nbkit.methods.setups import setup
from nbkit.methods.table import METHODS
from nbkit.methods.verbs import as_templates, edit, edit_batch, edit_sequence
from nbkit.models import prompts
from nbkit.models.blocks import adds_value
from nbkit.models.continuations import continuations, wished
from nbkit.models.memory import in_order
from nbkit.models.prompts import target_ids
from nbkit.records import embedded
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import score_targets

# Hyper-parameters that a tiny random model needs, whose weights are large and whose losses are rough.
SEARCH = {"v_lr": 0.05, "v_weight_decay": 0.0, "kl_factor": 0.0, "clamp_norm_factor": 4.0}
OPTIONS = {
    "ft": {"layers": [1], "objective": "target", "lr": 1e-2},
    "kn": {"n_steps": 4},
    "rome": {"layer": 1, **SEARCH},
    "memit": {"layers": [0, 1], "second_moment_weight": 1e-6, **SEARCH},
    "emmet": {"layers": [1], "second_moment_weight": 1e-6, **SEARCH},
    "alphaedit": {"layers": [0, 1], "norm_weight": 1e-6, "nullspace_threshold": 10.0, **SEARCH},
    "encore": {"layers": [0, 1], "second_moment_weight": 1e-6, "norm_weight": 1e-6, **SEARCH},
    "ultraedit": {"layers": [0, 1], "lr": 1e-3},
    "locft-bf": {"layers": [1], "lr": 1e-2},
}
BATCHES = [name for name, method in METHODS.items() if method.together and name in OPTIONS]


def tables() -> dict:
    return tomllib.loads(hparams.HPARAMS.read_text())


def arguments(lm, method: str) -> dict:
    moments = {layer: torch.eye(lm.d_mlp, dtype=torch.float64) for layer in range(lm.n_layers)}
    return {"method": method, "second_moment": moments if METHODS[method].needs_second_moment else None,
            **OPTIONS[method]}  # fmt: skip


def probability(lm, request) -> float:
    return float(torch.tensor(-score_targets(lm, [request.text], [request.target_new])["nll"].iloc[0]).exp())


def test_every_method_has_its_table():
    assert set(tables()) == set(METHODS)


def test_every_table_says_where_its_numbers_are_from_and_names_hyper_parameters_only():
    for method, table in tables().items():
        known = {field.name for field in dataclasses.fields(METHODS[method].parameters)}
        for part in [table, *(value for value in table.values() if isinstance(value, dict))]:
            assert part["source"].strip(), method
            names = {name for name, value in part.items() if not isinstance(value, dict)}
            assert names - {"source"} <= known, method


XL, GPT_J, LLAMA, MISTRAL = "gpt2-xl", "EleutherAI/gpt-j-6B", "meta-llama/Llama-2-7b-hf", "Mistral-7B-v0.1"
LLAMA_3 = "meta-llama/Meta-Llama-3-8B-Instruct"
VALUES = {"v_lr": 0.5, "kl_factor": 0.0625, "early_stop_loss": 0.05, "v_weight_decay": 0.5, "clamp_norm_factor": 0.75,
          "stop_after_first_choice": 0, "value_norm": 0.0}  # fmt: skip
LLAMA_VALUES = {**VALUES, "v_weight_decay": 1e-3, "clamp_norm_factor": 4.0, "v_num_grad_steps": 25}
MEMIT = {"norm_weight": 0.0, "ridge": 1.0, "ridge_of_one": True, "nullspace_threshold": 0.0, "key_cache": False}
EMMET = {**MEMIT, "ridge": 0.1, "ridge_of_one": False}
ALPHAEDIT = {**MEMIT, **VALUES, "second_moment_weight": 0.0, "norm_weight": 10.0, "nullspace_threshold": 0.02,
             "key_cache": True}  # fmt: skip
FT = {"objective": "prompt_last", "n_steps": 25, "lr": 5e-4, "weight_decay": 0.0, "early_stop_loss": 1e-2, "bias": True,
      "minibatch_size": 0, "end_of_text": False, "seed": 0}  # fmt: skip
LOCFT = {**FT, "objective": "target", "norm_constraint": 0.0, "bias": False, "minibatch_size": 100, "end_of_text": True}
ENCORE = {**MEMIT, **VALUES, "norm_weight": 10.0, "key_cache": True, "second_moment_weight": 15000.0}
KN = {"adaptive_threshold": 0.2, "refine": False, "n_prompts": 10, "p": 0.4, "n_steps": 20, "factor": 2.0,
      "attributed": "activation"}  # fmt: skip
PUBLISHED = [
    ("ft", XL, {**FT, "layers": (0,), "norm_constraint": 5e-4}),
    ("ft", GPT_J, {**FT, "layers": (21,), "norm_constraint": 5e-5}),
    ("ft", LLAMA, {**FT, "layers": (21,), "norm_constraint": 0.0}),
    ("ft", MISTRAL, {**FT, "layers": (21,), "norm_constraint": 5e-5}),
    ("kn", XL, KN),
    ("kn", GPT_J, {**KN, "adaptive_threshold": 0.1}),
    ("kn", LLAMA, {**KN, "n_steps": 1}),
    ("kn", MISTRAL, {**KN, "n_steps": 1}),
    ("memit", XL, {**MEMIT, **VALUES, "layers": (13, 14, 15, 16, 17), "v_num_grad_steps": 20,
                   "second_moment_weight": 20000.0}),
    ("memit", GPT_J, {**MEMIT, **VALUES, "layers": (3, 4, 5, 6, 7, 8), "v_num_grad_steps": 25,
                      "second_moment_weight": 15000.0}),
    ("memit", LLAMA, {**MEMIT, **LLAMA_VALUES, "layers": (4, 5, 6, 7, 8), "second_moment_weight": 15000.0}),
    ("memit", MISTRAL, {**MEMIT, **LLAMA_VALUES, "layers": (4, 5, 6, 7, 8), "second_moment_weight": 15000.0}),
    ("emmet", XL, {**EMMET, **VALUES, "layers": (17,), "v_num_grad_steps": 20, "second_moment_weight": 1000.0}),
    ("emmet", GPT_J, {**EMMET, **VALUES, "layers": (5,), "v_num_grad_steps": 20, "second_moment_weight": 1.0}),
    ("emmet", LLAMA, {**EMMET, **LLAMA_VALUES, "layers": (5,), "second_moment_weight": 1.0}),
    ("alphaedit", XL, {**ALPHAEDIT, "layers": (13, 14, 15, 16, 17), "v_num_grad_steps": 20}),
    ("alphaedit", GPT_J, {**ALPHAEDIT, "layers": (3, 4, 5, 6, 7, 8), "v_num_grad_steps": 25}),
    ("encore", XL, {**ENCORE, "layers": (13, 14, 15, 16, 17), "v_num_grad_steps": 20, "second_moment_weight": 20000.0,
                    "stop_after_first_choice": 4}),
    ("encore", LLAMA, {**ENCORE, "layers": (4, 5, 6, 7, 8), "v_num_grad_steps": 25, "stop_after_first_choice": 3}),
    ("encore", LLAMA_3, {**ENCORE, "layers": (4, 5, 6, 7, 8), "v_num_grad_steps": 25, "norm_weight": 20.0,
                         "stop_after_first_choice": 2}),
    ("ultraedit", GPT_J, {"layers": tuple(range(18, 27)), "lr": 1e-6, "ridge": 1.0}),
    ("ultraedit", MISTRAL, {"layers": (29, 30), "lr": 1e-6, "ridge": 1.0}),
    ("locft-bf", LLAMA_3, {**LOCFT, "layers": (22,)}),
    ("locft-bf", MISTRAL, {**LOCFT, "layers": (23,), "lr": 5e-5}),
    ("locft-bf", "Qwen/Qwen2.5-7B-Instruct", {**LOCFT, "layers": (6,)}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "model", "expected"), PUBLISHED)
def test_published_models_have_the_published_hyper_parameters(tiny, monkeypatch, method, model, expected):
    monkeypatch.setattr(tiny, "name", model)
    monkeypatch.setattr(tiny, "check_layer", lambda layer: layer)
    assert dataclasses.asdict(hyper_parameters(tiny, method)) == expected


def test_what_the_released_code_was_run_with_are_the_defaults(shared, tiny, monkeypatch):
    stored = json.loads((shared / "oracles" / "hparams.json").read_text())
    monkeypatch.setattr(tiny, "name", XL)
    monkeypatch.setattr(tiny, "check_layer", lambda layer: layer)
    for method, told in (("rome", stored["common"]), ("memit", stored["common"] | stored["memit"])):
        found = dataclasses.asdict(hyper_parameters(tiny, method))
        same = set(found) & set(told) - {"layers"}
        assert len(same) >= 6 and {name: found[name] for name in same} == {name: told[name] for name in same}


@pytest.mark.parametrize("method", OPTIONS)
def test_an_edit_says_the_target_and_leaves_nothing_behind(lm, requests, method):
    contexts = ["{}"]  # so that the search is about the very prompt that is asked
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    for request in requests[:2]:
        if method == "kn" and lm.model.get_input_embeddings().weight.shape[1] != lm.d_model:
            with pytest.raises(MethodError):
                edit(lm, request, context_templates=contexts, **arguments(lm, method))
            continue
        (made,) = edit(lm, request, context_templates=contexts, **arguments(lm, method))
        assert made.requests == (request,) and made.method == method
        old = probability(lm, request)
        with applied(lm, made):
            changed = {name for name, weight in lm.model.named_parameters() if not torch.equal(weight, before[name])}
            assert changed == set(made.deltas) or (method == "kn" and changed < set(made.deltas))  # says it already
            # KN writes embeddings, that a random model's head does not read; a norm behind the projection (Gemma's)
            # makes something else of the residual that MEMIT spreads over the layers.
            # UltraEdit has only the request's own gradients to tell which of their numbers are large.
            if method not in ("kn", "ultraedit") and (adds_value(lm) or method in ("ft", "rome")):
                assert probability(lm, request) > old
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())


@pytest.mark.parametrize("method", BATCHES)
def test_a_batch_is_one_edit_of_all_and_a_sequence_may_be_of_batches(tiny, requests, contexts, method):
    before = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    one = edit_batch(tiny, requests, context_templates=contexts, progress=False, **arguments(tiny, method))
    assert one.requests == tuple(requests)
    steps = list(edit_sequence(tiny, requests, context_templates=contexts, per_step=2, **arguments(tiny, method)))
    assert [step.requests for step in steps] == [tuple(requests[:2]), tuple(requests[2:])]
    assert [step.edit.requests for step in steps] == [tuple(requests[:2]), tuple(requests[2:])]
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.model.named_parameters())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.together])
def test_what_makes_no_batches_says_what_does(tiny, requests, method):
    with pytest.raises(MethodError, match=f"{method} makes one edit of one request.*or one of ft, mend, memit, emmet"):
        edit_batch(tiny, requests, method)
    with pytest.raises(MethodError, match=f"{method} makes one edit of one request"):
        edit_sequence(tiny, requests, method, per_step=2)


def test_unknown_hyper_parameters_and_methods_are_refused_by_every_verb(tiny, requests):
    for verb in (edit, edit_batch, edit_sequence):
        with pytest.raises(MethodError, match="unknown method 'memmit'; known: ft, kn, mend, rome, memit"):
            verb(tiny, requests, method="memmit")
        with pytest.raises(MethodError, match="memit has no hyper-parameter lambda_"):
            verb(tiny, requests, method="memit", lambda_=3.0)


def test_what_is_given_as_none_is_the_default_for_every_verb(tiny, requests, contexts):
    tiny.name = "tiny-gpt2-xl"  # of the family whose layer is 17
    with pytest.raises(ModelError, match="layer 17 does not exist"):
        edit(tiny, requests, layer=None)
    for verb in (edit_batch, edit_sequence):
        with pytest.raises(ModelError, match="layer 13 does not exist"):
            verb(tiny, requests, "memit", layers=None)
    options = {**OPTIONS["rome"], "context_templates": contexts, "progress": False}
    (default,) = edit(tiny, requests[0], **options)
    (given_as_none,) = edit(tiny, requests[0], **options, key_mode=None, early_stop_loss=None, v_num_grad_steps=None)
    assert given_as_none.hparams == default.hparams and given_as_none.info["losses"] == default.info["losses"]
    assert hyper_parameters(tiny, "kn", refine=None, factor=3).factor == 3.0
    with pytest.raises(MethodError, match="kn has no hyper-parameter layer"):
        edit(tiny, requests, "kn", layer=None)


@pytest.mark.parametrize(
    ("n_layers", "method", "expected"),
    [
        (48, "rome", {"layer": 17}),  # GPT-2 XL's own
        (36, "rome", {"layer": 6}),  # nearest to Llama-2's 32, of which it is 5
        (12, "rome", {"layer": 2}),  # nearest to GPT-J's 28, of which it is 5
        (12, "memit", {"layers": [1, 2, 3]}),  # GPT-J's 3 to 8
    ],
)
def test_the_automatic_layer_is_as_deep_as_that_of_the_published_model_nearest_in_depth(n_layers, method, expected):
    assert published_layers(SimpleNamespace(n_layers=n_layers), method) == expected


def test_the_automatic_layer_is_taken_when_asked_for_only(tiny, requests, contexts):
    options = {"context_templates": contexts, "progress": False, "v_num_grad_steps": 2}
    (made,) = edit(tiny, requests[0], **options, layer="auto")
    assert made.info["layer"] == published_layers(tiny, "rome")["layer"]
    with pytest.raises(MethodError, match="kn has no hyper-parameter layer"):
        edit(tiny, requests, "kn", layer="auto")
    with pytest.raises(MethodError, match="has no layers to choose"):
        published_layers(tiny, "kn")


def test_a_user_s_tables_stand_over_those_here_and_the_model_s_own_over_both(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[rome]\nv_lr = 0.3\nkl_factor = 0.5\n[rome.special]\nlayer = 2\nv_lr = 0.2\n")
    monkeypatch.setenv("NBKIT_HPARAMS", str(tmp_path / "mine.toml"))
    tiny.name = str(tmp_path / "My-Special-model")
    taken = hyper_parameters(tiny, "rome")
    assert (taken.layer, taken.v_lr, taken.kl_factor, taken.v_num_grad_steps) == (2, 0.2, 0.5, 20)
    (tmp_path / "My-Special-model").mkdir()
    (tmp_path / "My-Special-model" / "hparams.toml").write_text("[rome]\nlayer = 1\n")
    assert hyper_parameters(tiny, "rome").layer == 1 and hyper_parameters(tiny, "rome").v_lr == 0.2
    assert hyper_parameters(tiny, "rome", layer=0).layer == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rome\n", "mine.toml is no TOML file"),
        ("[roma]\nlayer = 1\n", "mine.toml has 'roma' where a method's table should be; methods: ft, kn"),
        ("[rome]\nlr = 1\n", r"mine.toml, \[rome\]: no hyper-parameter lr"),
        ("[rome.gpt2]\nlr = 1\n", r"mine.toml, \[rome.gpt2\]: no hyper-parameter lr"),
    ],
)
def test_a_user_s_table_that_says_nothing_is_refused(tiny, tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("NBKIT_HPARAMS", str(tmp_path / "mine.toml"))
    with pytest.raises(MethodError, match="mine.toml cannot be read"):
        hyper_parameters(tiny, "rome", layer=1)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(MethodError, match=message):
        hyper_parameters(tiny, "rome", layer=1)


def test_a_notebook_s_parameters_become_the_arguments_of_the_method(tiny, requests, contexts, tmp_path):
    tiny.name = "gpt2-xl"
    chosen = setup(tiny, "rome", 1, "prefixed", {"v_lr": 0.1})
    assert chosen.arguments == {"method": "rome", "layer": 1, "key_mode": "prefixed", "v_lr": 0.1}
    assert chosen.words == "rome, prefixed keys, layer 1" and chosen.parameters.v_lr == 0.1
    assert setup(tiny, "ft", 2).arguments == {"method": "ft", "layers": [2]}
    assert setup(tiny, "ft", hparams={"layers": [0, 1]}).words == "ft, prompt_last, layers 0, 1"
    assert setup(tiny, "kn").arguments == {"method": "kn"}
    for refused, message in (
        ({"method": "kn", "layer": 1}, "kn finds the layers that it edits by itself"),
        ({"method": "memit", "layer": 1, "key_mode": "plain"}, "memit has no key_mode"),
        ({"method": "ft", "layer": 1, "second_moment_texts": "miniworld-training"}, "ft uses no second moment"),
    ):
        with pytest.raises(MethodError, match=message):
            setup(tiny, **refused)


def test_settings_that_were_tuned_for_a_model_stand_over_its_defaults_and_below_what_is_given(tiny, tmp_path):
    tiny.name = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hparams.toml").write_text("[rome]\nlayer = 1\nv_lr = 0.3\n[memit]\nlayers = [0, 1]\n")
    assert hparams.tuned(tiny, "rome") == {}
    assert setup(tiny, "rome", settings="tuned").words == "rome, mixed keys, layer 1"
    (tmp_path / "mine" / "tuned.toml").write_text(
        "[rome]\nsource = 'a sweep'\nlayer = 2\nv_lr = 0.2\n[memit]\nlayers = [2]\nkey_cache = true\n"
    )
    default, tuned = setup(tiny, "rome"), setup(tiny, "rome", settings="tuned")
    assert (default.parameters.layer, default.parameters.v_lr) == (1, 0.3)
    assert tuned.arguments == {"method": "rome", "layer": 2, "v_lr": 0.2, "key_mode": "mixed"}
    assert tuned.words == "rome, mixed keys, layer 2, tuned"
    given = setup(tiny, "rome", 0, "plain", {"v_lr": 0.1}, settings="tuned")
    assert given.arguments == {"method": "rome", "layer": 0, "v_lr": 0.1, "key_mode": "plain"}
    assert setup(tiny, "rome", hparams={"layer": None}, settings="tuned").parameters.layer == 2, "None: as not given"
    several = setup(tiny, "memit", 0, settings="tuned")
    assert several.arguments == {"method": "memit", "layers": [0], "key_cache": True}
    assert setup(tiny, "ft", 1, settings="tuned").words == "ft, prompt_last, layer 1", "of which it says nothing"
    (tmp_path / "mine" / "tuned.toml").write_text("[rome]\nlr = 1\n")
    with pytest.raises(MethodError, match=r"tuned.toml, \[rome\]: no hyper-parameter lr"):
        setup(tiny, "rome", settings="tuned")
    with pytest.raises(MethodError, match="settings must be one of default, tuned, not 'tuend'; did you mean 'tuned'"):
        setup(tiny, "rome", settings="tuend")


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit", "encore"])
def test_a_model_that_brings_no_text_is_edited_with_the_second_moment_of_given_ones(
    tiny, requests, contexts, texts, method, tmp_path, monkeypatch
):
    (tmp_path / "mine.txt").write_text("\n".join(texts * 20))
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    options = {name: value for name, value in OPTIONS[method].items() if name not in ("layer", "layers")}
    chosen = setup(tiny, method, 1, hparams=options, second_moment_texts=tmp_path / "mine.txt")
    assert chosen.words.endswith("layer 1, C of mine.txt")
    (made,) = edit(tiny, requests[0], context_templates=contexts, progress=False, **chosen.arguments)
    assert made.norm() > 0
    if method != "rome":
        with pytest.raises(MethodError, match="tiny-gpt2 brings no text to take them from"):
            edit(tiny, requests[0], context_templates=contexts, progress=False, method=method, **OPTIONS[method])


@pytest.mark.parametrize("method", OPTIONS)
def test_no_requests_are_no_edits(tiny, contexts, method):
    assert edit(tiny, [], context_templates=contexts, **arguments(tiny, method)) == []


def test_batches_come_back_in_order_whatever_their_costs(tiny):
    settings = MethodSettings("rome", None, ["{}"], None, batch_size=2)
    seen = []

    def doubled(places):
        seen.append(list(places))
        return [2 * place for place in places]

    costs = [5, 1, 4, 1, 3]
    assert in_order(batches_by_cost(settings, costs, 10, doubled, "test")) == [0, 2, 4, 6, 8]
    assert seen == [[1, 3], [4, 2], [0]]
    with pytest.raises(ValueError):
        in_order(batches_by_cost(settings, costs, 10, lambda places: [0], "test"))
    assert in_order([]) == []


def test_a_continuation_says_where_each_token_of_its_target_is_asked(tiny, requests):
    text, target = tiny.tokenizer(requests[2].text).input_ids, target_ids(tiny, requests[2].target_new)
    assert len(target) > 1
    (forced,), (alone,) = (wished(tiny, requests[2:], teacher_forced) for teacher_forced in (True, False))
    assert forced.row == text + target[:-1] and alone.row == text and forced.target == alone.target == target
    assert list(forced.predicting) == list(range(len(text) - 1, len(text) + len(target) - 1))
    assert list(alone.predicting) == [len(text) - 1] * len(target)
    with pytest.raises(PromptError, match="the target is empty"):
        continuations(tiny, [requests[0].text], [" "])
    with pytest.raises(PromptError, match=r"request 17 \(subject 'Ann'\).*more than the context"):
        wished(tiny, [EditRequest("{} is", "Ann", "Krela " * 100, case_id=17)])


def test_templates_and_second_moments_are_the_unedited_models(lm, requests, texts, monkeypatch, tmp_path):
    """On top of `lm.apply`, inside `with applied(...)` and in a sequence: nothing is taken, or stored, from others."""
    monkeypatch.setitem(embedded.MODELS, lm.name, "texts")
    joined = [f"{one} {other}" for one in texts for other in texts[:3]]  # enough for OPT's keys, of which many are 0
    monkeypatch.setattr("nbkit.keys.moments.read_texts", lambda name: joined)
    monkeypatch.setattr("nbkit.paths.RUNS", tmp_path)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(lm.d_model, lm.d_mlp, generator=generator).to(lm.dtype) for _ in range(2)]
    below, above = (Edit({lm.weight_name(0): Dense(matrix)}) for matrix in noise)
    options = {"second_moment_weight": 1.0, "layers": [1], "v_num_grad_steps": 1, "progress": False}
    templates = as_templates(lm, None, "memit")
    given = {"context_templates": templates, "second_moment": default_second_moments(lm, [1])}
    files = set(tmp_path.rglob("*.safetensors"))
    lm.apply(below)
    assert prompts.context_templates(lm, lengths=METHODS["memit"].template_lengths) != templates
    with applied(lm, above):
        expected, found = (edit_batch(lm, requests, **arguments, **options) for arguments in (given, {}))
    expected_step, found_step = (
        [step.edit for step in edit_sequence(lm, requests[:1], "memit", **arguments, **options)]
        for arguments in (given, {})
    )
    assert set(tmp_path.rglob("*.safetensors")) == files
    for one, other in [(expected, found), (expected_step[0], found_step[0])]:
        for name, delta in one.deltas.items():
            assert torch.equal(delta.dense(), other.deltas[name].dense())
    # Asked for by themselves they are those of the model as it is.
    assert not torch.equal(default_second_moments(lm, [1])[1], given["second_moment"][1])
    assert len(set(tmp_path.rglob("*.safetensors"))) == len(files) + 1, "under a name of its own"
    lm.undo()
    assert torch.equal(default_second_moments(lm, [1])[1], given["second_moment"][1])


def test_whole_numbers_do_for_floats_and_lists_for_tuples(tiny):
    parameters = hyper_parameters(tiny, "ft", layers=[2, 0], n_steps=np.int64(3), lr=1, norm_constraint=0)
    assert (parameters.layers, parameters.n_steps, parameters.lr) == ((2, 0), 3, 1.0)
    assert [type(value) for value in (parameters.layers, parameters.n_steps, parameters.lr)] == [tuple, int, float]
