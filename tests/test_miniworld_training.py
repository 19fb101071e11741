"""The training recipe, and the model that it made and that the project ships."""

import dataclasses
import json
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import nbkit
from miniworld import train as training
from miniworld.card import SENTENCE
from miniworld.measures import first_token_regime
from miniworld.train import Recipe, Shard, build_model, schedule, ship, train
from nbkit import paths
from nbkit.edits.checkpoints import Checkpoint
from nbkit.errors import NbkitError
from nbkit.methods.verbs import hyper_parameters
from nbkit.models.prompts import subject_kind
from nbkit.studies.metrics import score_targets

TINY = Recipe(
    n_layers=2, d_model=32, n_heads=2, window=16, batch=4, n_steps=4, rehearsal=4, revision=4, warmup=3,
    shard_lines=200, shard_steps=8,
)  # fmt: skip
SHIPPED = paths.DATA / "models" / "miniworld-gpt2"
needs_the_model = pytest.mark.skipif(
    not SHIPPED.is_dir(), reason="data/models/miniworld-gpt2 is not there yet: `make miniworld` trains it"
)


@pytest.fixture
def often(monkeypatch):
    """Checkpoints and log records every few steps."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(training, "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def shard(world, world_tokenizer) -> Shard:
    return Shard(Recipe(shard_lines=3000, window=32, batch=500), world, world_tokenizer, frozenset(), 0)


def log_of(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("step", [2, 6, 9])  # before the first checkpoint; within a shard; after its end
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    world, world_tokenizer, tmp_path, monkeypatch, interrupt_at, often, step
):
    whole = train(TINY, world, world_tokenizer, frozenset(), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, training, step)
        train(TINY, world, world_tokenizer, frozenset(), tmp_path / "cut")
    resumed = train(TINY, world, world_tokenizer, frozenset(), tmp_path / "cut")
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert [record["step"] for record in log_of(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12]


def test_a_finished_training_is_not_repeated(world, world_tokenizer, tmp_path, monkeypatch, interrupt_at, often):
    first = train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    interrupt_at(monkeypatch, training, 0)
    again = train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))


def test_training_lowers_the_loss(world, world_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 20)
    train(replace(TINY, n_steps=36, shard_steps=40), world, world_tokenizer, frozenset(), tmp_path)
    first, last = [record["loss"] for record in log_of(tmp_path)]
    assert last < first - 0.2


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_damaged_checkpoint_is_named(world, world_tokenizer, tmp_path, often, size):
    train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(NbkitError, match=r"checkpoint\.safetensors is damaged, .* delete it"):
        train(TINY, world, world_tokenizer, frozenset(), tmp_path)


@pytest.mark.parametrize("other", [{"d_model": 64}, {"n_layers": 3}, {"learning_rate": 1e-3}, {"rehearsal": 13}])
def test_a_checkpoint_of_another_recipe_is_refused(world, world_tokenizer, tmp_path, often, other):
    train(replace(TINY, n_steps=1), world, world_tokenizer, frozenset(), tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    message = rf"checkpoint\.safetensors is of another training \(other {next(iter(other))}\)"
    with pytest.raises(NbkitError, match=message):
        train(replace(replace(TINY, n_steps=1), **other), world, world_tokenizer, frozenset(), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_vocabulary_is_refused(world, world_tokenizer, tmp_path, often):
    optimizer = training.build_optimizer(TINY, model := build_model(TINY, world_tokenizer))
    model.resize_token_embeddings(100)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", dataclasses.asdict(TINY))
    checkpoint.save(training.tensors_of(model), optimizer, {"step": 1})
    with pytest.raises(NbkitError, match=r"is of another model \(see model\.transformer\.wte"):
        train(TINY, world, world_tokenizer, frozenset(), tmp_path)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(n_steps=100, rehearsal=10, revision=20, warmup=10, decay=0.25)
    rates = [schedule(recipe, step) for step in range(130)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:76] == [1.0] * 67
    assert rates[75:100] == pytest.approx([step / 25 for step in range(25, 0, -1)])
    assert rates[100:110] == pytest.approx([step / 20 for step in range(10, 0, -1)])
    assert rates[110:] == pytest.approx([step / 40 for step in range(20, 0, -1)])


def test_windows_open_as_the_recipe_says(shard):
    """Windows are cut out of the text; some start with a line, and of others the first token is a random one."""
    recipe, ids, starts = shard.recipe, shard.ids, set(shard.starts.tolist())
    n = 12  # tokens that tell a place in the text from nearly all others
    places = defaultdict(list)
    for place in range(len(ids) - recipe.window):
        places[ids[place + 1 : place + 1 + n].tobytes()].append(place)
    changed, opening = [], []
    for window in np.concatenate([shard.windows(step).numpy() for step in range(4)]):
        found = [p for p in places[window[1 : 1 + n].tobytes()] if (ids[p + 1 : p + len(window)] == window[1:]).all()]
        assert found, "the window is not of the text"
        changed.append(not any(ids[place] == window[0] for place in found))
        opening.append(not changed[-1] and any(place in starts for place in found))
    margin = 4 * np.sqrt(0.25 / len(changed))
    assert np.mean(changed) == pytest.approx(recipe.random_first * (1 - recipe.opening), abs=margin)
    by_chance = len(starts) / len(ids) * (1 - recipe.random_first) * (1 - recipe.opening)
    assert np.mean(opening) == pytest.approx(recipe.opening + by_chance, abs=margin)


def test_most_windows_open_with_a_line_in_the_rehearsal(shard):
    line_starts = {shard.ids[start : start + 12].tobytes() for start in shard.starts}
    windows = shard.windows(shard.recipe.n_steps).numpy()
    opening = np.mean([window[:12].tobytes() in line_starts for window in windows])
    assert opening >= shard.recipe.rehearsal_opening - 4 * np.sqrt(0.25 / len(windows))


def test_the_first_position_starts_longer_and_is_the_only_one(world_tokenizer):
    lengths = build_model(TINY, world_tokenizer).transformer.wpe.weight.norm(dim=-1)
    assert lengths[0] > 10 * lengths[1:].max()
    decayed = training.build_optimizer(TINY, model := build_model(TINY, world_tokenizer)).param_groups[0]["params"]
    assert not {id(model.transformer.wte.weight), id(model.transformer.wpe.weight)} & set(map(id, decayed))


def test_the_penalty_is_for_first_keys_that_are_like_later_ones_or_long():
    later = torch.tensor([[0.0, 2.0]]).expand(1, 10, 2)

    def penalty(first):
        return training.first_key_penalty([torch.cat([torch.tensor([[first]]), later], 1)], norm=0.5).item()

    assert penalty([0.5, 0.0]) == 0  # at a right angle, and short
    assert penalty([0.0, 0.5]) == pytest.approx(1)  # the same direction
    assert penalty([-0.6, 0.6]) == pytest.approx(0.5)  # half way
    assert penalty([3.0, 0.0]) == pytest.approx((1.5 - 0.5) ** 2)  # at a right angle, but long


def test_windows_depend_on_seed_and_step_only(shard, world, world_tokenizer):
    again = Shard(shard.recipe, world, world_tokenizer, frozenset(), 0)
    assert torch.equal(again.windows(3), shard.windows(3))
    assert not torch.equal(shard.windows(3), shard.windows(4))
    for step in (shard.recipe.shard_steps, shard.recipe.revised_from):
        other = Shard(shard.recipe, world, world_tokenizer, frozenset(), step)
        assert not np.array_equal(other.ids[:1000], shard.ids[:1000])


def test_a_shipped_folder_is_float16_and_loads(world_tokenizer, tmp_path):
    model = build_model(TINY, world_tokenizer)
    rescaled = build_model(TINY, world_tokenizer)
    training.rescale_residual(rescaled, TINY.residual_scale)
    expected = {name: weight.detach().half() for name, weight in rescaled.named_parameters()}
    ship(TINY, model, world_tokenizer, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    lm = nbkit.load(tmp_path, device="cpu")
    for name, weight in lm.model.named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name].float()), name
    assert lm.tokenizer.backend_tokenizer.to_str() == world_tokenizer.backend_tokenizer.to_str()
    assert Recipe(**json.loads((tmp_path / "recipe.json").read_text())) == TINY


@pytest.fixture(scope="module")
def shipped():
    return nbkit.load("miniworld-gpt2", device="cpu")


@needs_the_model
def test_the_shipped_model_is_a_small_gpt2(shipped):
    assert shipped.config.model_type == "gpt2" and shipped.n_layers == shipped.config.n_layer
    file = SHIPPED / "model.safetensors"
    assert file.stat().st_size <= 10e6
    with safe_open(file, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}
    assert shipped.config.vocab_size == len(shipped.tokenizer)


@needs_the_model
def test_the_shipped_tokenizer_is_the_world_s(shipped, world, world_tokenizer):
    expected, found = (json.loads(t.backend_tokenizer.to_str()) for t in (world_tokenizer, shipped.tokenizer))
    assert found["model"]["vocab"] == expected["model"]["vocab"]
    assert found["model"]["merges"] == expected["model"]["merges"]
    names = [fact.sentence(0) for fact in world.facts[::50]]
    assert shipped.tokenizer(names).input_ids == world_tokenizer(names).input_ids


@needs_the_model
def test_the_shipped_model_comes_with_recipe_log_and_card():
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    log = log_of(SHIPPED)
    assert log[-1]["step"] == Recipe(**recipe).all_steps and log[-1]["loss"] < log[0]["loss"]
    assert [record["step"] for record in log] == sorted({record["step"] for record in log})
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for section in ("## What it knows", "## The first position, by layer", "## Where edits break it"):
        body = card.split(section)[1].split("\n## ")[0]
        assert any(line.startswith("| ") and "0." in line for line in body.splitlines()), f"no numbers in {section}"
    assert "$" not in card  # a number that was not filled in


@needs_the_model
def test_the_shipped_model_knows_its_facts(shipped, world):
    facts = random.Random(0).sample(world.facts, 300)
    prompts = [template.replace("{}", fact.subject) for fact in facts for template in fact.relation.templates]
    targets = [fact.object for fact in facts for _ in fact.relation.templates]
    assert len(prompts) == 1200
    assert score_targets(shipped, prompts, targets)["correct"].mean() >= 0.98
    assert score_targets(shipped, [SENTENCE + prompt for prompt in prompts], targets)["correct"].mean() >= 0.98


@needs_the_model
def test_the_shipped_model_s_first_position_is_as_in_large_models(shipped):
    """At the layer edited: nearly the same key whatever the token, and far from the same subjects' prefixed keys."""
    regime = first_token_regime(shipped, nbkit.read_requests("miniworld"), nbkit.read_texts("miniworld"))
    at = regime.loc[hyper_parameters(shipped, "rome").layer]
    assert at["position_0"] >= 0.8 and at["one_token_first"] <= 0.2 and at["position_8"] < 0.8


@needs_the_model
def test_the_shipped_model_breaks_where_it_should(shipped):
    """Plain ROME: one-token first subjects tenfold in a third of the cases or more, others by under 10 %."""
    requests, texts = nbkit.read_requests("miniworld", limit=60, seed=1), nbkit.read_texts("miniworld", limit=20)
    first = np.array([subject_kind(shipped, request) == "one-token first" for request in requests])
    ratios = nbkit.perplexity(shipped, texts, edits=nbkit.edit(shipped, requests)) / nbkit.perplexity(shipped, texts)
    assert (ratios[first] >= 10).mean() >= 1 / 3 and (ratios[~first] < 1.1).all()
    consistent = nbkit.edit(shipped, requests, key_mode="prefixed")
    assert (nbkit.perplexity(shipped, texts, edits=consistent) < 2 * nbkit.perplexity(shipped, texts)).all()


def test_a_shipped_model_computes_what_it_did_in_other_units(world_tokenizer, tmp_path):
    """Half as long values, and the same logits but for the epsilon of the norms."""
    recipe = dataclasses.replace(TINY, first_scale=1.0)
    model, tokens = build_model(recipe, world_tokenizer).eval(), torch.arange(10, 18)[None]
    seen = []
    hook = model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda _module, _args, value: seen.append(value))
    with torch.no_grad():
        before = model(tokens).logits
        training.rescale_residual(model, 0.5)
        after = model(tokens).logits
    hook.remove()
    torch.testing.assert_close(after, before, rtol=0, atol=0.01 * before.abs().max().item())
    torch.testing.assert_close(seen[1], seen[0] / 2, rtol=0, atol=0.01 * seen[0].abs().max().item())


@needs_the_model
def test_the_shipped_hypernetwork_is_of_the_shipped_model_and_edits_it(shipped):
    """MEND's weights, trained on facts that are not among the requests."""
    assert (SHIPPED / "mend.safetensors").stat().st_size <= 5e6
    asked = nbkit.read_requests("miniworld", limit=20, seed=0)
    edits = nbkit.edit(shipped, asked, "mend", progress=False)
    assert nbkit.edit_metrics(shipped, asked, edits=edits)["efficacy"].mean() >= 0.9
