"""Trains an embedded model by its recipe, resumably, and ships it.

    model = train(recipe, world, tokenizer, held_out, folder)
    ship(recipe, model, tokenizer, paths.DATA / "models" / "miniworld-gpt2")

No term of the loss, and nothing in the initialisation, mentions a position or a key: what the first position becomes,
it becomes by itself (see windows.py for what it is trained on).

Resumable without stored generators: step n draws its windows from a generator seeded with (seed, n), the spans that
are cut out of them from (seed, n, 1), and shard k of the text from seed + k. Weights and optimiser states are kept as
safetensors.
"""

import copy
import json
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from miniworld.families import build_model, training_loss
from miniworld.recipe import Recipe
from miniworld.windows import Shard
from miniworld.world import World
from nbkit.edits.checkpoints import Checkpoint

LOG_EVERY = 100  # steps
CHECKPOINT_EVERY = 500  # steps, a multiple of LOG_EVERY; so often, too, weights are taken for the average


def build_optimizer(recipe: Recipe, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW with weight decay on the blocks' matrices, and none on embeddings, norms and biases."""
    embeddings = {id(weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
                  for weight in module.parameters()}  # fmt: skip
    decayed = [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in embeddings]
    chosen = set(map(id, decayed))
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear fall to nothing over `decay` of the steps."""
    fallen = max(0.0, 1 - (recipe.n_steps - step) / (recipe.decay * recipe.n_steps)) if recipe.decay else 0.0
    return min((step + 1) / recipe.warmup, 1 - fallen)


def tensors_of(model: PreTrainedModel, average: AveragedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a model, and of its average over some steps."""
    weights = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    means = {f"model_average.{name}": weight.detach() for name, weight in average.module.named_parameters()}
    return weights | means | {"model_average.n": average.n_averaged}


def train(
    recipe: Recipe,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    held_out: frozenset[str],
    folder: Path,
    snapshots: Collection[int] = (),
) -> PreTrainedModel:
    """Trains, or goes on training, the model of a recipe; writes checkpoints and `training_log.jsonl` to `folder`.

    In the end its weights are the mean of those at the checkpoints of the last `recipe.averaged` of the steps, the last
    one always among them: stochastic weight averaging (Izmailov et al. 2018).

    snapshots: steps after which the model is shipped to `folder/step-N`, as it then is: not averaged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, tokenizer).to(device)
    optimizer = build_optimizer(recipe, model)
    average = AveragedModel(model)
    checkpoint, tensors = Checkpoint(folder / "checkpoint.safetensors", asdict(recipe)), tensors_of(model, average)
    progress = checkpoint.load(tensors, optimizer)
    done = 0 if progress is None else progress["step"]
    _forget_log_after(done, folder / "training_log.jsonl")
    shard, losses, started = None, [], time.perf_counter()
    todo = range(done, recipe.n_steps)
    bar = tqdm(todo, initial=done, total=recipe.n_steps, desc=folder.name, unit="step", mininterval=5)
    for step in bar:
        if shard is None or step % recipe.shard_steps == 0:
            shard = Shard(recipe, world, tokenizer, held_out, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(recipe, step)
        rng = np.random.default_rng([recipe.seed, step, 1])
        loss = training_loss(model, shard.windows(step).to(device), rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            record = {"step": step + 1, "tokens": (step + 1) * recipe.batch * recipe.window, "loss": round(mean, 4),
                      "seconds": round(time.perf_counter() - started, 1), "device": device}  # fmt: skip
            with (folder / "training_log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix(loss=f"{mean:.3f}")
        if step + 1 in snapshots:
            ship(recipe, copy.deepcopy(model), tokenizer, folder / f"step-{step + 1}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.n_steps:
            if step + 1 >= (1 - recipe.averaged) * recipe.n_steps:
                average.update_parameters(model)
            checkpoint.save(tensors, optimizer, {"step": step + 1})
    return average.module


def _forget_log_after(done: int, path: Path) -> None:
    """Keep a log's records up to step `done`: the steps between the last checkpoint and a kill are trained again."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        path.write_text("".join(kept))


def ship(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as float16 safetensors with its tokenizer and recipe: a folder that `nbkit.load` reads.

    The model itself is turned to float16 on the CPU.
    """
    model.cpu().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
