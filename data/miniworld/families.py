"""The families that the embedded models are of: how each is built, and what its loss is.

    model = build_model(recipe, tokenizer := tokenizer_of(recipe, world))
    training_loss(model, windows, rng).backward()

Attention is "eager" in training: with heads and windows so small that is faster on a CPU than the fused kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from miniworld.recipe import Recipe
from miniworld.spans import SENTINELS, masked
from miniworld.tokenizer import END, train_tokenizer
from miniworld.world import World


def tokenizer_of(recipe: Recipe, world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world, as the recipe's family has it."""
    family = FAMILIES[recipe.family]
    return train_tokenizer(world, family.text, family.sentinels)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new model of the recipe's family, initialised as transformers initialises that family."""
    torch.manual_seed(recipe.seed)  # transformers initialises weights from torch's global generator only
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "eager",
    }
    return FAMILIES[recipe.family].build(recipe, len(tokenizer), special)


def _gpt2(recipe: Recipe, vocabulary: int, special: dict) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=recipe.window, n_embd=recipe.d_model, n_layer=recipe.n_layers,
        n_head=recipe.n_heads, n_inner=recipe.d_mlp, initializer_range=recipe.init_std,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(recipe: Recipe, vocabulary: int, special: dict) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=recipe.d_model, intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers, num_attention_heads=recipe.n_heads, num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.window, initializer_range=recipe.init_std, tie_word_embeddings=True, **special,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _t5(recipe: Recipe, vocabulary: int, special: dict) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary, d_model=recipe.d_model, d_kv=recipe.d_model // recipe.n_heads, d_ff=recipe.d_mlp,
        num_layers=recipe.n_layers, num_decoder_layers=recipe.n_layers, num_heads=recipe.n_heads, dropout_rate=0.0,
        decoder_start_token_id=special["bos_token_id"], tie_word_embeddings=True, **special,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Family:
    title: str
    objective: str  # of its training loss
    build: Callable[[Recipe, int, dict], PreTrainedModel]
    text: str = "$A"  # a text as its tokenizer writes it
    sentinels: tuple[str, ...] = ()  # the last tokens of its vocabulary
    edited: bool = True  # whether there are edits of it, which the card measures


NEXT_TOKEN, MASKED = "the next token", "each token of a window, of which the encoder reads a part,"
FAMILIES = {
    "gpt2": Family("GPT-2", NEXT_TOKEN, _gpt2),
    "llama": Family("Llama", NEXT_TOKEN, _llama, text=f"{END} $A"),
    "t5": Family("T5", MASKED, _t5, f"$A {END}", SENTINELS, edited=False),
}


def training_loss(
    model: PreTrainedModel, windows: Int[Tensor, "batch window"], rng: np.random.Generator
) -> Float[Tensor, ""]:
    """Mean cross-entropy of what a model of its family is trained to say, in bfloat16 where that is safe.

    Each token of a window, given those before it; in an encoder-decoder given besides what `rng` leaves of the window.
    """
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        if model.config.is_encoder_decoder:
            read, asked = masked(windows, model.config.vocab_size - 1, model.config.eos_token_id, rng)
            logits = model(input_ids=read, labels=asked, use_cache=False).logits
        else:
            logits, asked = model(windows, use_cache=False).logits[:, :-1], windows[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), asked.flatten())
