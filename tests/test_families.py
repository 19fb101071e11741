"""The embedded models of other families than GPT-2, after a few steps of training, as a user has them."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch

import nbkit
from miniworld.card import write_card_of_keys
from miniworld.families import tokenizer_of
from miniworld.measures import filled_in, recall
from miniworld.recipe import recipe_of, trained_models
from miniworld.train import ship, train
from nbkit import paths
from nbkit.errors import ModelError
from nbkit.keys.extract import keys, keys_and_values, token_keys
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.table import METHODS
from nbkit.models.loading import embedded_models
from nbkit.models.prompts import find_subjects, subject_kind, tokenize
from nbkit.records import embedded
from nbkit.studies.metrics import score_targets

FEW_STEPS = {"window": 64, "batch": 4, "n_steps": 3, "warmup": 1, "shard_lines": 300}
FEW_TOKENS = 2000  # of second moments


@pytest.fixture(scope="module")
def llama(world, tmp_path_factory):
    """miniworld-llama as it is shipped and loaded, hardly trained."""
    folder = tmp_path_factory.mktemp("models") / "miniworld-llama"
    return load(make(folder, world))


@pytest.fixture(scope="module")
def t5_folder(world, tmp_path_factory):
    """miniworld-t5 as it is shipped, hardly trained."""
    return make(tmp_path_factory.mktemp("models") / "miniworld-t5", world)


def make(folder, world):
    recipe = recipe_of(folder.name, **FEW_STEPS)
    tokenizer = tokenizer_of(recipe, world)
    model = train(recipe, world, tokenizer, frozenset(), folder.parent / "work")
    ship(recipe, model, tokenizer, folder)
    return folder


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a tokenizer without the BOS that the family has
        return nbkit.load(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def asked():
    """Twelve requests, with subjects of all three kinds among them."""
    return nbkit.read_requests("miniworld", limit=12, seed=0)


@pytest.fixture(scope="module")
def held_out():
    return nbkit.read_texts("miniworld", limit=4)


def test_every_recipe_is_of_a_model_that_nbkit_knows_by_name():
    assert list(embedded.MODELS) == trained_models()
    assert set(embedded_models()) == set(embedded.MODELS)


def test_an_embedded_model_that_is_not_there_is_not_looked_for_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(ModelError, match="miniworld-llama is not in .*`make miniworld MODEL=miniworld-llama` trains"):
        nbkit.load("miniworld-llama")


def test_a_subject_is_behind_the_bos(llama, asked):
    rows, indices = find_subjects(llama, [r.prompt for r in asked], [r.subject for r in asked])
    kinds = [subject_kind(llama, request) for request in asked]
    assert len(set(kinds)) == 3
    for request, row, index, kind in zip(asked, rows, indices, kinds, strict=True):
        assert row[0] == llama.tokenizer.bos_token_id and llama.tokenizer.bos_token_id not in row[1:]
        assert request.subject.endswith(llama.tokenizer.decode(row[index]).strip())
        assert (index == 1) is (kind == "one-token first")


def test_keys_behind_sampled_templates_are_those_of_whole_passes(llama, asked):
    templates = nbkit.context_templates(llama, seed=0)
    assert not any(llama.tokenizer.bos_token in template for template in templates)
    found = keys(llama, asked, 3, templates)
    prompts = [template.replace("{}", request.prompt) for request in asked for template in templates]
    subjects = [request.subject for request in asked for _ in templates]
    whole = keys_and_values(llama, prompts, subjects, 3).keys.reshape(found.shape)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    assert llama.replayable, "its passes are cut short"


def test_the_first_key_of_every_text_is_the_bos_s(llama, held_out):
    first = torch.stack([of_text[0] for of_text in token_keys(llama, held_out, 3)])
    torch.testing.assert_close(first, first[:1].expand_as(first))


def test_every_method_has_its_parameters(llama):
    for method in METHODS:
        parameters = hyper_parameters(llama, method)
        assert dataclasses.is_dataclass(parameters)
    assert hyper_parameters(llama, "rome").layer in range(llama.n_layers)


def test_recall_tells_subjects_by_their_own_tokens_not_the_bos(llama, world):
    kinds = recall(llama, world, every=200)["subject_kind"]
    assert set(kinds) == {"one-token first", "several-token first", "later"}


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_edits_with_its_own_parameters(asked, held_out, method):
    llama = nbkit.load("miniworld-llama", device="cpu")
    default = hyper_parameters(llama, method)
    layers = [default.layer] if method == "rome" else default.layers
    moments = nbkit.second_moments(llama, layers, nbkit.read_texts("miniworld-training"), n_tokens=FEW_TOKENS)
    edits = nbkit.edit(llama, asked[:3], method, second_moment=moments, progress=False)
    edited = nbkit.perplexity(llama, held_out, edits=edits)
    assert np.isfinite(edited).all() and np.isfinite(nbkit.perplexity(llama, held_out))
    for request, made, expected in zip(asked, edits, edited, strict=False):
        assert set(made.deltas) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers}
        before = score_targets(llama, [request.text], [request.target_new])["nll"].item()
        with nbkit.applied(llama, made):
            assert score_targets(llama, [request.text], [request.target_new])["nll"].item() < before
            assert nbkit.perplexity(llama, held_out) == pytest.approx(expected, rel=1e-4)


def test_both_sides_of_miniworld_t5_are_read_behind_the_templates_of_another_model(llama, t5_folder, asked, held_out):
    templates = nbkit.context_templates(llama, seed=0)
    for side, first in (("encoder", False), ("decoder", True)):
        t5 = load(t5_folder, side=side)
        assert (t5.n_layers, t5.d_mlp) == (4, 512)
        assert keys(t5, asked, 2, templates).isfinite().all()
        start = torch.stack([of_text[0] for of_text in token_keys(t5, held_out, 2)])
        assert torch.allclose(start, start[:1], rtol=1e-4, atol=1e-4) is first
        with pytest.raises(ModelError, match="edits, .* for causal decoders"):
            nbkit.edit(t5, asked)
    assert (t5_folder / "model.safetensors").stat().st_size <= 10e6


def test_the_card_of_an_encoder_decoder_says_what_it_fills_in_and_how_alike_its_keys_are(world, t5_folder, asked):
    few = dataclasses.replace(world, facts=world.facts[::200])
    sides = {side: load(t5_folder, side=side) for side in ("encoder", "decoder")}
    (t5_folder / "training_log.jsonl").write_text('{"step": 3, "tokens": 768, "loss": 7.5, "device": "cpu"}\n')
    write_card_of_keys(sides, few, asked, nbkit.read_texts("miniworld", limit=8), t5_folder)
    card = (t5_folder / "README.md").read_text(encoding="utf-8")
    assert "the cross-entropy of each token of a window, of which the encoder reads a part," in card
    assert "writes a text as `text <|endoftext|>`" in card
    assert len(re.findall(r"^\| [0-3] \| ", card, flags=re.MULTILINE)) == 8  # a row each layer of either side
    assert not re.search(r"\$\w", card)


@torch.no_grad()
def test_what_the_shipped_encoder_decoder_writes_hangs_on_what_its_encoder_has_read():
    lm = nbkit.load("miniworld-t5", device="cpu", side="encoder")
    texts = nbkit.read_texts("miniworld", limit=20)
    read, asked = tokenize(lm, texts), tokenize(lm, texts)

    def loss(of: int, after: int) -> float:
        labels = torch.tensor([asked[of]])
        return lm.model(input_ids=torch.tensor([read[after]]), labels=labels, use_cache=False).loss.item()

    own, another = ([loss(of, (of + shift) % 20) for of in range(20)] for shift in (0, 1))
    assert np.median(own) < 0.5 * np.median(another)
    keys_of = torch.stack([of_text[5] for of_text in token_keys(lm, texts, 3)])
    alike = torch.cosine_similarity(keys_of[:, None], keys_of[None], dim=-1)[~torch.eye(20, dtype=torch.bool)]
    assert alike.median() < 0.9


def test_what_is_filled_in_does_not_hang_on_what_is_asked_beside_it(world):
    lm = nbkit.load("miniworld-t5", device="cpu", side="encoder")
    asked = [(fact.sentence(0).rsplit(" ", 1)[0], fact.object) for fact in world.facts[::40]]
    right = filled_in(lm, [prompt for prompt, _ in asked], [target for _, target in asked], 64)
    assert right == [filled_in(lm, [prompt], [target], 1)[0] for prompt, target in asked] and any(right)
