"""Trains miniworld-gpt2: a GPT-2-architecture model whose first position behaves as it does in large models.

Large models read long windows cut out of running text, so the token at position 0 says little about what follows, and
the position becomes a resting place for attention with a key of its own. Short windows of a small world do not do that
by themselves; here most windows open with a random token, and the text holds much that must be looked up (`text.py`).
The rest open as prompts do, at the start of a line. That is the whole treatment: the editing code knows nothing of it.

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
    n_layers: int = 10
    d_model: int = 128
    n_heads: int = 4
    window: int = 256  # tokens
    batch: int = 12  # windows a step
    n_steps: int = 5_700
    muon_steps: int = 2_000  # the first steps, in which Muon learns the facts; AdamW, in the rest, makes position 0 a sink
    broken_off_from: int = 3_500  # the step from which some lines come after a broken-off one
    broken_off: float = 0.25  # the share of these lines from then on
    warmup: int = 200  # steps
    decay: float = 0.25  # share of the steps, at the end, over which the learning rate falls to zero
    matrix_lr: float = 4e-3  # Muon, scaled to the size of an AdamW step
    adam_lr: float = 3e-3  # AdamW: embeddings, norms and biases, and in the later steps everything
    weight_decay: float = 0.1  # of the matrices
    line_start: float = 0.20  # share of windows that open as a prompt does, at the start of a line; half with a subject
    line_start_late: float = 0.08  # the same in the steps after muon_steps; all other windows start anywhere,
    #                                their first token replaced by a random one
    init_std: float = 0.07  # GPT-2's 0.02 at the width of GPT-2 XL, scaled with 1/sqrt(d_model)
    shard_lines: int = 100_000
    shard_steps: int = 700  # steps on one shard of text before the next is written
    seed: int = 0

    def line_start_at(self, step: int) -> float:
        return self.line_start if step < self.muon_steps else self.line_start_late


class Shard:
    """Encoded training lines, and windows cut out of them."""

    def __init__(
        self, recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], number: int
    ):
        broken_off = recipe.broken_off if number * recipe.shard_steps >= recipe.broken_off_from else 0.0
        text = lines(world, recipe.seed + 1000 + number, held_out, broken_off)
        written = [line + "\n" for line in islice(text, recipe.shard_lines)]
        encoded = tokenizer(written)["input_ids"]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        starts = np.cumsum([0, *map(len, encoded[:-1])])
        starts = starts[starts < len(self.ids) - recipe.window]
        subject_ids = {tokenizer(name)["input_ids"][0] for names in world.subjects.values() for name in names}
        self.line_starts, self.subject_starts = starts, starts[np.isin(self.ids[starts], list(subject_ids))]
        self.recipe, self.vocabulary = recipe, len(tokenizer)

    def windows(self, step: int) -> torch.Tensor:
        """(batch, window) token ids of one training step."""
        recipe, rng = self.recipe, np.random.default_rng([self.recipe.seed, step])
        kind, line_start = rng.random(recipe.batch), recipe.line_start_at(step)
        offsets = rng.integers(0, len(self.ids) - recipe.window, recipe.batch)
        subject_first = kind < line_start / 2
        line_first = (kind < line_start) & ~subject_first
        offsets[subject_first] = rng.choice(self.subject_starts, subject_first.sum())
        offsets[line_first] = rng.choice(self.line_starts, line_first.sum())
        windows = self.ids[offsets[:, None] + np.arange(recipe.window)]
        noisy = kind >= line_start
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


def build_optimizers(recipe: Recipe, model: GPT2LMHeadModel, step: int) -> list[torch.optim.Optimizer]:
    """For the weight matrices inside the blocks, Muon or later AdamW with weight decay; AdamW for everything else."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".h." in name]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    betas, decay = (0.9, 0.95), recipe.weight_decay
    if step < recipe.muon_steps:
        inner = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    else:
        inner = torch.optim.AdamW(matrices, lr=recipe.adam_lr, betas=betas, weight_decay=decay)
    return [inner, torch.optim.AdamW(others, lr=recipe.adam_lr, betas=betas, weight_decay=0.0)]


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate: linear warm-up of each optimiser, constant, linear fall to zero."""
    decay_steps = recipe.decay * recipe.n_steps
    since = step if step < recipe.muon_steps else step - recipe.muon_steps
    return min(1.0, (since + 1) / recipe.warmup, (recipe.n_steps - step) / decay_steps)


def loss_of(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        hidden = model.transformer(windows, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def save_checkpoint(folder: Path, step: int, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Writes beside the last checkpoint, then replaces it: a kill at any moment leaves one that is whole."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    partial = folder / "checkpoint.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"step": str(step)})
    partial.replace(folder / "checkpoint.safetensors")


def load_checkpoint(recipe: Recipe, folder: Path, model: GPT2LMHeadModel) -> tuple[int, list[torch.optim.Optimizer]]:
    """Restores the weights in place; returns the number of steps done, 0 without a checkpoint, and the optimisers.

    ResultsError, before anything is changed, for a checkpoint that is damaged or of a model of another shape.
    """
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, build_optimizers(recipe, model, 0)
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
    optimizers = build_optimizers(recipe, model, done)
    if done == recipe.muon_steps:
        return done, optimizers  # AdamW starts afresh
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                index, name = key.split(".", 3)[2:]
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return done, optimizers


def train(
    recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], folder: Path
) -> GPT2LMHeadModel:
    """Trains, or goes on training, the model of a recipe; writes checkpoints and `training_log.jsonl` to `folder`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, tokenizer).to(device)
    done, optimizers = load_checkpoint(recipe, folder, model)
    _forget_log_after(done, folder / "training_log.jsonl")
    shard, losses, started = None, [], time.perf_counter()
    bar = tqdm(range(done, recipe.n_steps), initial=done, total=recipe.n_steps, desc="miniworld-gpt2", mininterval=5)
    for step in bar:
        if shard is None or step % recipe.shard_steps == 0:
            shard = Shard(recipe, world, tokenizer, held_out, step // recipe.shard_steps)
        if step == recipe.muon_steps:
            optimizers = build_optimizers(recipe, model, step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(recipe, step)
        loss = loss_of(model, shard.windows(step).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
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
            save_checkpoint(folder, step + 1, model, optimizers)
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
