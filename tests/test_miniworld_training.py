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
from torch.optim.swa_utils import AveragedModel

import nbkit
from miniworld import train as training
from miniworld.families import build_model, tokenizer_of, training_loss
from miniworld.measures import SENTENCE, first_token_regime
from miniworld.recipe import Recipe, recipe_of, trained_models
from miniworld.spans import masked
from miniworld.train import schedule, ship, train
from miniworld.windows import Shard
from nbkit import paths
from nbkit.edits.checkpoints import Checkpoint
from nbkit.errors import NbkitError
from nbkit.methods.verbs import hyper_parameters
from nbkit.models.prompts import subject_kind
from nbkit.studies.metrics import score_targets

SMALL = {
    "n_layers": 2, "d_model": 32, "d_mlp": 64, "n_heads": 2, "window": 16, "batch": 4, "n_steps": 12, "warmup": 3,
    "shard_lines": 200, "shard_steps": 8,
}  # fmt: skip
TINY = recipe_of("miniworld-gpt2", **SMALL)
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
    recipe = recipe_of("miniworld-gpt2", shard_lines=3000, window=32, batch=500, opening=0.3, random_first=0.5)
    return Shard(recipe, world, world_tokenizer, frozenset(), 0)


def log_of(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("step", [2, 6, 9])  # before the first checkpoint; within a shard; after its end
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    world, world_tokenizer, tmp_path, monkeypatch, interrupt_at, often, step
):
    whole = train(TINY, world, world_tokenizer, frozenset(), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, training, step, "training_loss")
        train(TINY, world, world_tokenizer, frozenset(), tmp_path / "cut")
    resumed = train(TINY, world, world_tokenizer, frozenset(), tmp_path / "cut")
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert [record["step"] for record in log_of(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12]


def test_a_finished_training_is_not_repeated(world, world_tokenizer, tmp_path, monkeypatch, interrupt_at, often):
    first = train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    interrupt_at(monkeypatch, training, 0, "training_loss")
    again = train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))


def test_training_lowers_the_loss(world, world_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 20)
    train(replace(TINY, n_steps=40, shard_steps=40), world, world_tokenizer, frozenset(), tmp_path)
    first, last = [record["loss"] for record in log_of(tmp_path)]
    assert last < first - 0.2


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_damaged_checkpoint_is_named(world, world_tokenizer, tmp_path, often, size):
    train(TINY, world, world_tokenizer, frozenset(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(NbkitError, match=r"checkpoint\.safetensors is damaged, .* delete it"):
        train(TINY, world, world_tokenizer, frozenset(), tmp_path)


@pytest.mark.parametrize("other", [{"d_model": 64}, {"n_layers": 3}, {"learning_rate": 1e-3}, {"opening": 0.1}])
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
    checkpoint.save(training.tensors_of(model, AveragedModel(model)), optimizer, {"step": 1})
    with pytest.raises(NbkitError, match=r"is of another model \(see model\.transformer\.wte"):
        train(TINY, world, world_tokenizer, frozenset(), tmp_path)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = recipe_of("miniworld-gpt2", n_steps=100, warmup=10, decay=0.25)
    rates = [schedule(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:76] == [1.0] * 67
    assert rates[75:] == pytest.approx([1 - step / 25 for step in range(25)])
    assert [schedule(replace(recipe, decay=0.0), step) for step in (9, 50, 99)] == [1.0] * 3


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


def test_only_the_matrices_of_blocks_decay(world_tokenizer):
    for model_name in trained_models():
        recipe = recipe_of(model_name, **SMALL)
        decayed, others = training.build_optimizer(recipe, model := build_model(recipe, world_tokenizer)).param_groups
        names = {id(weight): name for name, weight in model.named_parameters()}
        assert others["weight_decay"] == 0 < decayed["weight_decay"]
        assert not any(part in names[id(w)] for w in decayed["params"] for part in ("wte", "wpe", "embed", "shared"))
        assert all(w.ndim == 1 or "wt" in names[id(w)] or "wpe" in names[id(w)] or "embed" in names[id(w)]
                   or "shared" in names[id(w)] or "relative" in names[id(w)] for w in others["params"])  # fmt: skip


def test_a_model_with_bos_is_trained_with_it_before_every_window(world):
    recipe = recipe_of("miniworld-llama", shard_lines=300, window=32, random_first=0.0)
    tokenizer, other = tokenizer_of(recipe, world), replace(recipe, family="gpt2")
    plain = Shard(other, world, tokenizer_of(other, world), frozenset(), 0)
    windows = Shard(recipe, world, tokenizer, frozenset(), 0).windows(0)
    assert (windows[:, 0] == tokenizer.bos_token_id).all() and not (windows[:, 1:] == tokenizer.bos_token_id).any()
    assert torch.equal(windows[:, 1:], plain.windows(0)[:, :-1])


@pytest.mark.parametrize("name", ["miniworld-gpt2", "miniworld-llama"])
def test_the_loss_of_a_decoder_is_that_of_the_next_token(world_tokenizer, name):
    """Nothing else is in it: cross-entropy, read off the model's own logits."""
    model = build_model(recipe_of(name, **SMALL), world_tokenizer)
    windows = torch.randint(0, 3000, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen = model(windows).logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])
        loss = training_loss(model, windows, np.random.default_rng(0))
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=5e-3)  # bfloat16


def test_the_loss_of_an_encoder_decoder_is_that_of_every_token_of_a_window_it_reads_in_part(world):
    recipe = recipe_of("miniworld-t5", **SMALL)
    model = build_model(recipe, tokenizer_of(recipe, world))
    windows = torch.randint(0, 3000, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read, asked = masked(windows, model.config.vocab_size - 1, 0, np.random.default_rng(5))
        chosen = model(input_ids=read, labels=asked).logits.log_softmax(-1).gather(-1, asked[..., None])
        loss = training_loss(model, windows, np.random.default_rng(5))
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=5e-3)  # bfloat16


@pytest.mark.parametrize("length", [8, 64, 256])
def test_what_is_masked_of_a_window_stands_between_what_is_not(length):
    mask, end = 3171, 3
    windows = torch.arange(10, 10 + length).expand(20, -1)  # every token is another, so its place can be told
    read, asked = masked(windows, mask, end, np.random.default_rng(0))
    assert torch.equal(asked[:, :-1], windows) and (asked[:, -1] == end).all()
    n_spans = (read[0] == mask).sum().item()
    assert (windows.shape[1] - (read.shape[1] - 1 - n_spans)) == max(1, round(0.3 * length))
    for rest in read.tolist():
        assert rest.pop() == end and rest.count(mask) == n_spans
        pieces = " ".join("|" if token == mask else str(token) for token in rest).split("|")
        ranges = [list(map(int, piece.split())) for piece in pieces]
        kept = [token for piece in ranges for token in piece]
        assert kept == sorted(set(kept)) and ranges[0] and not ranges[-1]  # begins with what is kept, ends with a span
        assert all(piece == list(range(piece[0], piece[-1] + 1)) for piece in ranges if piece)


def test_spans_begin_anywhere_and_are_of_all_lengths():
    windows = torch.arange(256).expand(300, -1)
    read, _ = masked(windows, 3171, 3000, np.random.default_rng(0))
    gaps = [np.diff([token for token in rest if token < 256], append=256) - 1 for rest in read.tolist()]
    lengths = np.concatenate([gap[gap > 0] for gap in gaps])
    assert lengths.mean() == pytest.approx(77 / 26) and lengths.min() == 1 and lengths.max() > 8
    assert len({token for rest in read.tolist() for token in rest if token < 256}) > 250


def test_the_sentinels_are_the_last_of_the_vocabulary_and_never_in_a_text(world):
    tokenizer = tokenizer_of(recipe_of("miniworld-t5"), world)
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "<extra_id_0>"
    assert tokenizer("<extra_id_1>", add_special_tokens=False).input_ids == [len(tokenizer) - 2]
    assert tokenizer("A lamp").input_ids[-1] == tokenizer.eos_token_id
    assert all(piece < len(tokenizer) - 100 for piece in tokenizer("A lamp <extra_id> 7").input_ids)


def test_a_snapshot_is_the_model_as_it_was_at_that_step(world, world_tokenizer, tmp_path):
    train(replace(TINY, decay=0.0), world, world_tokenizer, frozenset(), tmp_path / "long", snapshots=[6])
    short = train(replace(TINY, decay=0.0, n_steps=6), world, world_tokenizer, frozenset(), tmp_path / "short")
    kept = nbkit.load(tmp_path / "long" / "step-6", device="cpu")
    for (name, expected), found in zip(short.named_parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(found, expected.detach().half().float()), name


def test_the_weights_are_the_mean_of_those_at_the_last_checkpoints(world, world_tokenizer, tmp_path, often):
    recipe, steps = replace(TINY, averaged=0.5), range(8, TINY.n_steps + 1, training.CHECKPOINT_EVERY)
    averaged = train(recipe, world, world_tokenizer, frozenset(), tmp_path, snapshots=steps)
    kept = [dict(nbkit.load(tmp_path / f"step-{step}", device="cpu").model.named_parameters()) for step in steps]
    assert len(kept) > 1
    for name, weight in averaged.named_parameters():
        mean = sum(one[name] for one in kept) / len(kept)
        torch.testing.assert_close(weight.detach(), mean.detach(), rtol=2e-3, atol=1e-5)  # they are kept in float16
    assert not torch.equal(kept[0]["transformer.wte.weight"], kept[-1]["transformer.wte.weight"])


def test_windows_depend_on_seed_and_step_only(shard, world, world_tokenizer):
    again = Shard(shard.recipe, world, world_tokenizer, frozenset(), 0)
    assert torch.equal(again.windows(3), shard.windows(3))
    assert not torch.equal(shard.windows(3), shard.windows(4))
    other = Shard(shard.recipe, world, world_tokenizer, frozenset(), shard.recipe.shard_steps)
    assert not np.array_equal(other.ids[:1000], shard.ids[:1000])


def test_a_shipped_folder_is_float16_and_loads(world_tokenizer, tmp_path):
    model = build_model(TINY, world_tokenizer)
    expected = {name: weight.detach().half() for name, weight in model.named_parameters()}
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
    assert log[-1]["step"] == Recipe(**recipe).n_steps and log[-1]["loss"] < log[0]["loss"]
    assert [record["step"] for record in log] == sorted({record["step"] for record in log})
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for section in ("## What it knows", "## The first position, by layer", "## Where edits break it"):
        body = card.split(section)[1].split("\n## ")[0]
        assert any(line.startswith("| ") and "0." in line for line in body.splitlines()), f"no numbers in {section}"
    assert "$" not in card  # a number that was not filled in


@needs_the_model
def test_the_shipped_model_was_trained_by_the_committed_recipe():
    assert json.loads((SHIPPED / "recipe.json").read_text()) == dataclasses.asdict(recipe_of("miniworld-gpt2"))


@needs_the_model
def test_the_shipped_model_knows_its_facts_where_they_stand_in_training_text(shipped, world):
    """Behind a sentence; at the plain prompt unless it opens with the subject: that is the price of the collapse."""
    facts = random.Random(0).sample(world.facts, 300)
    asked = [(fact, template) for fact in facts for template in fact.relation.templates]
    prompts, targets = [t.replace("{}", fact.subject) for fact, t in asked], [fact.object for fact, _ in asked]
    later = np.array([not template.startswith("{}") for _, template in asked])
    alone = score_targets(shipped, prompts, targets)["correct"].to_numpy()
    behind = score_targets(shipped, [SENTENCE + prompt for prompt in prompts], targets)["correct"].to_numpy()
    assert alone[later].mean() >= 0.95 and behind.mean() >= 0.9
    assert alone[~later].mean() < behind[~later].mean()


@needs_the_model
def test_the_shipped_model_s_first_position_is_as_in_large_models(shipped):
    """At the layer edited: nearly the same key whatever the token, and far from the same subjects' prefixed keys."""
    regime = first_token_regime(shipped, nbkit.read_requests("miniworld"), nbkit.read_texts("miniworld"))
    at = regime.loc[hyper_parameters(shipped, "rome").layer]
    assert at["position_0"] >= 0.8 and at["one_token_first"] <= 0.2 and at["position_8"] < 0.8


@needs_the_model
def test_the_shipped_model_breaks_where_it_should(shipped):
    """Plain ROME: one-token first subjects tenfold in a third of the cases or more, others hardly; C-ROME never."""
    requests, texts = nbkit.read_requests("miniworld", limit=60, seed=1), nbkit.read_texts("miniworld", limit=20)
    first = np.array([subject_kind(shipped, request) == "one-token first" for request in requests])
    ratios = nbkit.perplexity(shipped, texts, edits=nbkit.edit(shipped, requests)) / nbkit.perplexity(shipped, texts)
    assert (ratios[first] >= 10).mean() >= 1 / 3 and np.median(ratios[~first]) < 1.1 and (ratios[~first] < 10).all()
    consistent = nbkit.edit(shipped, requests, key_mode="prefixed")
    assert (nbkit.perplexity(shipped, texts, edits=consistent) < 2 * nbkit.perplexity(shipped, texts)).all()


@needs_the_model
@pytest.mark.parametrize("name", ["miniworld-gpt2", "miniworld-llama"])
def test_the_shipped_hypernetworks_are_of_the_shipped_models_and_edit_them(name):
    """MEND's weights, trained on facts that are not among the requests."""
    assert (paths.DATA / "models" / name / "mend.safetensors").stat().st_size <= 3e6
    lm, asked = nbkit.load(name), nbkit.read_requests("miniworld", limit=20, seed=0)
    edits = nbkit.edit(lm, asked, "mend", progress=False)
    assert nbkit.edit_metrics(lm, asked, edits=edits)["efficacy"].mean() >= 0.9


@needs_the_model
@pytest.mark.parametrize("name", ["miniworld-gpt2", "miniworld-llama"])
def test_the_shipped_models_answer_the_questions_that_are_edited(name):
    asked = nbkit.read_requests("miniworld-questions", limit=200, seed=0)
    old = [request.target_true for request in asked]
    assert score_targets(nbkit.load(name), [request.text for request in asked], old)["correct"].mean() >= 0.98
