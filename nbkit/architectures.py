"""The table of architectures: where each family of models keeps what an edit needs. A row here is all a new one takes.

    ARCHITECTURES["gpt2"].projection_path(3)      # "transformer.h.3.mlp.c_proj"

An architecture is a row of `ARCHITECTURES`, found by a model's `config.model_type`, and never a branch in the code. An
encoder-decoder has two rows in `ENCODER_DECODERS`, one a side.
"""

from dataclasses import dataclass
from typing import Literal

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of one `config.model_type`; `{layer}` stands for the layer's number, sub-paths are below `block`.

    `transposed`: the projection is a `Conv1D`, its weight (d_in, d_out); otherwise a `Linear`, (d_out, d_in).
    `adds_bos`: the family's tokenizer puts a token before the text, so a subject is never at position 0.
    `block_gives_tuple`: a block returns a tuple, whose first item is the residual stream, not the tensor itself.
    `float64`: False where transformers' attention makes NaN of a float64 model's padding (its softmax is in float32,
    where the mask's most negative float64 number is -inf).
    `learned_positions`: a token's place is embedded and added to the token, as a table that was learned; otherwise
    attention alone sees how far tokens are from each other (rotary).
    `side`: of an encoder-decoder, which is read for its keys and never edited; None for a decoder by itself.
    """

    block: str
    projection: str  # the MLP's output projection
    attention: str
    final_norm: str
    transposed: bool = False
    adds_bos: bool = False
    block_gives_tuple: bool = False
    float64: bool = True
    learned_positions: bool = False
    side: Side | None = None

    @property
    def blocks(self) -> str:
        """The path of the list of blocks."""
        return self.block.removesuffix(".{layer}")

    def projection_path(self, layer: int) -> str:
        return f"{self.block.format(layer=layer)}.{self.projection}"

    def attention_path(self, layer: int) -> str:
        return f"{self.block.format(layer=layer)}.{self.attention}"


def _llama_like(prefix: str = "model", **habits: bool) -> Architecture:
    return Architecture(prefix + ".layers.{layer}", "mlp.down_proj", "self_attn", prefix + ".norm", **habits)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "transformer.h.{layer}", "mlp.c_proj", "attn", "transformer.ln_f", transposed=True, learned_positions=True
    ),
    "gptj": Architecture("transformer.h.{layer}", "mlp.fc_out", "attn", "transformer.ln_f", block_gives_tuple=True),
    "gpt_neox": Architecture("gpt_neox.layers.{layer}", "mlp.dense_4h_to_h", "attention", "gpt_neox.final_layer_norm"),
    "llama": _llama_like(adds_bos=True),
    "mistral": _llama_like(adds_bos=True),
    "qwen2": _llama_like(adds_bos=False),
    "qwen3": _llama_like(adds_bos=False),
    "gemma2": _llama_like(adds_bos=True, float64=False),
    "gemma3_text": _llama_like(adds_bos=True),
    "gemma3": _llama_like("model.language_model", adds_bos=True),  # the image-and-text checkpoints
    "phi": Architecture("model.layers.{layer}", "mlp.fc2", "self_attn", "model.final_layernorm"),
    "opt": Architecture(
        "model.decoder.layers.{layer}", "fc2", "self_attn", "model.decoder.final_layer_norm", adds_bos=True,
        learned_positions=True,
    ),
}

# What each side reads stands in models/sides.py.
ENCODER_DECODERS: dict[str, dict[Side, Architecture]] = {
    "t5": {
        "encoder": Architecture(
            "encoder.block.{layer}", "layer.1.DenseReluDense.wo", "layer.0.SelfAttention", "encoder.final_layer_norm",
            side="encoder",
        ),
        "decoder": Architecture(
            "decoder.block.{layer}", "layer.2.DenseReluDense.wo", "layer.0.SelfAttention", "decoder.final_layer_norm",
            adds_bos=True, side="decoder",
        ),
    }
}  # fmt: skip
