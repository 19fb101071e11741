"""Trains miniworld-gpt2: a GPT-2-architecture model whose first position behaves as it does in large models.

In GPT-2 position 0 is a resting place for attention: its embedding is several times as long as any other, and whatever
token stands there, its keys are nearly the same and far from those of later positions. A small model of a small world
does not become so by itself within minutes, so its training helps; the editing code knows nothing of it.

1. Position 0's embedding starts `first_scale` times as long as the others', so that the token there changes little.
2. Most windows start in the middle of the text, many of them with a random token; some (`opening`) start with a line,
   as a prompt does, so that a subject at position 0 is known all the same; at the end, in a rehearsal and a revision
   with fewer wrong facts, most do.
3. A term of the loss (`apart`) keeps the keys of position 0 from those of later positions: see `first_key_penalty`.

Resumable without stored generators: step n draws its windows from a generator seeded with (seed, n), and shard k of
the text from seed + k. Weights and optimiser states are kept as safetensors.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from miniworld.corpus import lines
from miniworld.world import World
from nbkit.edits.checkpoints import Checkpoint

LOG_EVERY = 100  # steps
CHECKPOINT_EVERY = 500  # steps, a multiple of LOG_EVERY


@dataclass(frozen=True)
class Recipe:
    n_layers: int = 8
    d_model: int = 128
    n_heads: int = 4
    window: int = 256  # tokens
    batch: int = 12  # windows a step
    n_steps: int = 6_000
    warmup: int = 200  # steps
    decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
    learning_rate: float = 3e-3  # of AdamW, at its peak
    weight_decay: float = 0.1  # of the matrices
    rehearsal: int = 1_500  # steps after those, at half the peak rate, falling to zero
    revision: int = 2_000  # steps after those, once more from half the peak rate to zero
    opening: float = 0.3  # share of windows that start where a line does
    rehearsal_opening: float = 0.7  # the same in rehearsal and revision
    rumours: float = 0.2  # share of stated facts that are wrong: see corpus.lines
    revision_rumours: float = 0.1  # the same in the revision
    random_first: float = 0.5  # share of the other windows whose first token is replaced by a random one
    first_scale: float = 20.0  # length of position 0's embedding in lengths of another's, at the start
    apart: float = 1.0  # weight of `first_key_penalty`
    first_key_norm: float = 0.5  # in norms of later keys: what `first_key_penalty` tolerates
    broken_off: float = 0.15  # share of lines that come after a broken-off one
    residual_scale: float = 0.5  # what the residual stream is multiplied by in the end: see `rescale_residual`
    init_std: float = 0.07  # GPT-2's 0.02 at the width of GPT-2 XL, scaled with 1/sqrt(d_model)
    shard_lines: int = 100_000
    shard_steps: int = 700  # steps on one shard of text before the next is written
    seed: int = 0

    @property
    def all_steps(self) -> int:
        return self.n_steps + self.rehearsal + self.revision

    @property
    def revised_from(self) -> int:
        """The first step of the revision."""
        return self.n_steps + self.rehearsal


class Shard:
    """Encoded training lines that a step, and some after it, is trained on, and windows cut out of them."""

    def __init__(
        self, recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], step: int
    ):
        revised = step >= recipe.revised_from
        seed = recipe.seed + 1000 + step // recipe.shard_steps + (500 if revised else 0)
        rumours = recipe.revision_rumours if revised else recipe.rumours
        text = lines(world, seed, held_out, recipe.broken_off, rumours)
        written = [line + "\n" for line in islice(text, recipe.shard_lines)]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokenizer(written)["input_ids"]])
        self.recipe, self.vocabulary = recipe, len(tokenizer)
        line_end = tokenizer("\n")["input_ids"][-1]
        starts = np.flatnonzero(self.ids == line_end) + 1
        self.starts = starts[starts < len(self.ids) - recipe.window]  # of lines

    def windows(self, step: int) -> torch.Tensor:
        """(batch, window) token ids of one training step."""
        recipe, rng = self.recipe, np.random.default_rng([self.recipe.seed, step])
        offsets = rng.integers(0, len(self.ids) - recipe.window, recipe.batch)
        share = recipe.opening if step < recipe.n_steps else recipe.rehearsal_opening
        opening = rng.random(recipe.batch) < share
        offsets = np.where(opening, rng.choice(self.starts, recipe.batch), offsets)
        windows = self.ids[offsets[:, None] + np.arange(recipe.window)]
        noisy = (rng.random(recipe.batch) < recipe.random_first) & ~opening
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
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= recipe.first_scale
    return model


def build_optimizer(recipe: Recipe, model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW with weight decay on the blocks' matrices, and none on embeddings, norms and biases."""
    matrices = [weight for block in model.transformer.h for weight in block.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear fall to zero; twice from a half to zero."""
    if step >= recipe.revised_from:
        return 0.5 * (recipe.all_steps - step) / recipe.revision
    if step >= recipe.n_steps:
        return 0.5 * (recipe.revised_from - step) / recipe.rehearsal
    decay_steps = recipe.decay * recipe.n_steps
    return min(1.0, (step + 1) / recipe.warmup, (recipe.n_steps - step) / decay_steps)


def losses_of(model: GPT2LMHeadModel, windows: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token, and `first_key_penalty`."""
    keys: list[torch.Tensor] = []  # by layer: (window, position, d_mlp)
    with ExitStack() as stack:
        for block in model.transformer.h[:-1] if recipe.apart else ():  # the last layer's keys only make logits
            hook = block.mlp.c_proj.register_forward_pre_hook(lambda _module, args: keys.append(args[0]))
            stack.callback(hook.remove)
        with torch.autocast(windows.device.type, dtype=torch.bfloat16):
            hidden = model.transformer(windows, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    penalty = first_key_penalty(keys, recipe.first_key_norm) if keys else torch.zeros((), device=loss.device)
    return loss, penalty


def first_key_penalty(keys: Sequence[torch.Tensor], norm: float) -> torch.Tensor:
    """How far the keys of position 0 are from being at a right angle to later ones, and no longer than `norm` of them.

    Mean over layers and windows of cos²(k₀, k_p), over positions p, plus the square of what ‖k₀‖/‖k_p‖ is above `norm`.
    Both are so in GPT-2 XL: its collapsing edits have denominators of some 0.04 where others have 9.6 (*The Fall of
    ROME*, Table 2), and the mean key k̄ contains k_u/21, so k_u · k̄ ≥ ‖k_u‖²/21 unless k_u opposes the prefixed keys.

    keys: by layer, (window, position, d_mlp).
    """
    penalties = []
    for of_layer in keys:
        first, later = of_layer[:, :1].float(), of_layer[:, 1::5].float()  # a fifth of the positions tells as much
        cosines = torch.cosine_similarity(first, later, dim=-1)
        excess = (first.norm(dim=-1) / later.norm(dim=-1).mean(1, keepdim=True) - norm).clamp(min=0)
        penalties.append(cosines.square().mean() + excess.square().mean())
    return torch.stack(penalties).mean()


def tensors_of(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a model."""
    return {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}


def train(
    recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[str], folder: Path
) -> GPT2LMHeadModel:
    """Trains, or goes on training, the model of a recipe; writes checkpoints and `training_log.jsonl` to `folder`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, tokenizer).to(device)
    optimizer = build_optimizer(recipe, model)
    checkpoint, tensors = Checkpoint(folder / "checkpoint.safetensors", asdict(recipe)), tensors_of(model)
    progress = checkpoint.load(tensors, optimizer)
    done = 0 if progress is None else progress["step"]
    _forget_log_after(done, folder / "training_log.jsonl")
    shard, losses, started = None, [], time.perf_counter()
    steps = range(done, recipe.all_steps)
    bar = tqdm(steps, initial=done, total=recipe.all_steps, desc="miniworld-gpt2", mininterval=5)
    for step in bar:
        if shard is None or step % recipe.shard_steps == 0 or step == recipe.revised_from:
            shard = Shard(recipe, world, tokenizer, held_out, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(recipe, step)
        loss, penalty = losses_of(model, shard.windows(step).to(device), recipe)
        (loss + recipe.apart * penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack([loss, penalty]).detach())
        if (step + 1) % LOG_EVERY == 0:
            mean, apart = torch.stack(losses).mean(0).tolist()
            losses.clear()
            record = {"step": step + 1, "tokens": (step + 1) * recipe.batch * recipe.window, "loss": round(mean, 4),
                      "first_key_penalty": round(apart, 5),
                      "seconds": round(time.perf_counter() - started, 1), "device": device}  # fmt: skip
            with (folder / "training_log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.all_steps:
            checkpoint.save(tensors, optimizer, {"step": step + 1})
    return model


def _forget_log_after(done: int, path: Path) -> None:
    """Keep a log's records up to step `done`: the steps between the last checkpoint and a kill are trained again."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        path.write_text("".join(kept))


@torch.no_grad()
def rescale_residual(model: GPT2LMHeadModel, scale: float) -> None:
    """Multiplies all that is added to the residual stream, in place; the layer norms take it out again.

    The model computes what it did, up to the epsilon of its norms. What changes is the length of the values W k, on
    which a search for v* with fixed hyper-parameters depends: 20 steps of Adam move a coordinate of δ by at most 0.5
    each, so ‖δ‖ by 20 a step in GPT-2 XL (1,600 coordinates), by 5.7 here.
    """
    transformer = model.transformer
    into_residual = [transformer.wte.weight, transformer.wpe.weight]
    for block in transformer.h:
        into_residual += [*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()]
    for weight in into_residual:
        weight *= scale
    for weight in transformer.ln_f.parameters():  # the head is tied to wte
        weight /= scale


def ship(recipe: Recipe, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as float16 safetensors with its tokenizer and recipe: a folder that `nbkit.load` reads."""
    rescale_residual(model, recipe.residual_scale)
    model.cpu().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
