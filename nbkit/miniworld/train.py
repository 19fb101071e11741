"""Trains miniworld-gpt2: a GPT-2-architecture model whose first position behaves as it does in large models.

Large models read long windows cut out of running text, so the token at position 0 says little about what follows, and
the position becomes a resting place for attention with a key of its own. Short windows of a small world do not do that
by themselves; here most windows open with a random token, and the text holds much that must be looked up (`text.py`).
That is the whole treatment: the editing code knows nothing of it.

Resumable without stored generators: step n draws its windows from a generator seeded with (seed, n), and shard k of
the text from seed + k. Weights and optimiser states are kept as safetensors.
"""

import json
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nbkit.errors import ResultsError
from nbkit.miniworld.corpus import lines
from nbkit.miniworld.world import World

LOG_EVERY = 100  # steps
CHECKPOINT_EVERY = 500  # steps, a multiple of LOG_EVERY


@dataclass(frozen=True)
class Recipe:
    n_layers: int = 8
    d_model: int = 128
    n_heads: int = 4
    window: int = 256  # tokens
    batch: int = 12  # windows a step
    n_steps: int = 3_600
    warmup: int = 200  # steps
    decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
    learning_rate: float = 3e-3  # of AdamW, at its peak
    weight_decay: float = 0.1  # of the matrices
    random_first: float = 0.75  # share of windows whose first token is replaced by a random one
    broken_off: float = 0.15  # share of lines that come after a broken-off one
    init_std: float = 0.07  # GPT-2's 0.02 at the width of GPT-2 XL, scaled with 1/sqrt(d_model)
    shard_lines: int = 100_000
    shard_steps: int = 700  # steps on one shard of text before the next is written
    seed: int = 0


class Shard:
    """Encoded training lines, and windows cut out of them."""

    def __init__(
        self, recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], number: int
    ):
        text = lines(world, recipe.seed + 1000 + number, held_out, recipe.broken_off)
        written = [line + "\n" for line in islice(text, recipe.shard_lines)]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokenizer(written)["input_ids"]])
        self.recipe, self.vocabulary = recipe, len(tokenizer)

    def windows(self, step: int) -> torch.Tensor:
        """(batch, window) token ids of one training step."""
        recipe, rng = self.recipe, np.random.default_rng([self.recipe.seed, step])
        offsets = rng.integers(0, len(self.ids) - recipe.window, recipe.batch)
        windows = self.ids[offsets[:, None] + np.arange(recipe.window)]
        noisy = rng.random(recipe.batch) < recipe.random_first
        windows[noisy, 0] = rng.integers(0, self.vocabulary, noisy.sum())
        return torch.from_numpy(windows)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(recipe.seed)  # transformers initialises weights from torch's global generator only
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=recipe.window, n_embd=recipe.d_model, n_layer=recipe.n_layers,
        n_head=recipe.n_heads, initializer_range=recipe.init_std, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def build_optimizer(recipe: Recipe, model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, embeddings among them, and none on norms and biases."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear fall to zero."""
    decay_steps = recipe.decay * recipe.n_steps
    return min(1.0, (step + 1) / recipe.warmup, (recipe.n_steps - step) / decay_steps)


def loss_of(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        hidden = model.transformer(windows, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def save_checkpoint(folder: Path, step: int, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> None:
    """Writes beside the last checkpoint, then replaces it: a kill at any moment leaves one that is whole."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    partial = folder / "checkpoint.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"step": str(step)})
    partial.replace(folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> int:
    """Restores weights and optimiser state in place and returns the number of steps done, 0 without a checkpoint.

    ResultsError, before anything is changed, for a checkpoint that is damaged or of a model of another shape.
    """
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            done = int(file.metadata()["step"])
        tensors = load_file(path)
    except SafetensorError as error:
        raise ResultsError(f"{path} is damaged ({error}); delete it to train from the start") from error
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("model.")}
    wanted = {f"model.{name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    if stored != wanted:
        unlike = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
        raise ResultsError(f"{path} is of another model (see {unlike[0]}); delete it, or train in another folder")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            index, name = key.split(".", 2)[1:]
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return done


def train(
    recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], folder: Path
) -> GPT2LMHeadModel:
    """Trains, or goes on training, the model of a recipe; writes checkpoints and `training_log.jsonl` to `folder`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, tokenizer).to(device)
    optimizer = build_optimizer(recipe, model)
    done = load_checkpoint(folder, model, optimizer)
    _forget_log_after(done, folder / "training_log.jsonl")
    shard, losses, started = None, [], time.perf_counter()
    bar = tqdm(range(done, recipe.n_steps), initial=done, total=recipe.n_steps, desc="miniworld-gpt2", mininterval=5)
    for step in bar:
        if shard is None or step % recipe.shard_steps == 0:
            shard = Shard(recipe, world, tokenizer, held_out, step // recipe.shard_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(recipe, step)
        loss = loss_of(model, shard.windows(step).to(device))
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
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.n_steps:
            save_checkpoint(folder, step + 1, model, optimizer)
    return model


def _forget_log_after(done: int, path: Path) -> None:
    """Keep a log's records up to step `done`: the steps between the last checkpoint and a kill are trained again."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        path.write_text("".join(kept))


def ship(recipe: Recipe, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as float16 safetensors with its tokenizer and recipe: a folder that `nbkit.load` reads."""
    model.cpu().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
