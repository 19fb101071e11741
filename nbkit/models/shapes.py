"""Models of a size, with random weights: what speed and memory can be measured on without a download.

    lm = random_model("gpt2-xl", precision="bfloat16")
"""

import gc
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nbkit import paths
from nbkit.edits.interrupts import Guarded
from nbkit.errors import ModelError
from nbkit.models.devices import device_named
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import free_memory
from nbkit.records import embedded


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the layer edited in it (of the published settings, where there are some)."""

    config: type
    sizes: Mapping[str, Any]
    layer: int


_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, Shape] = {
    "gpt2-6x256": Shape(
        transformers.GPT2Config,
        {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 3072, "n_positions": 256,
         "bos_token_id": 0, "eos_token_id": 0},
        layer=2,
    ),
    "gpt2-xl": Shape(transformers.GPT2Config, {"n_layer": 48, "n_embd": 1600, "n_head": 25}, layer=17),
    "gpt-j-6b": Shape(
        transformers.GPTJConfig, {"n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64}, layer=5
    ),
    "llama-2-7b": Shape(
        transformers.LlamaConfig, {**_LLAMA, "intermediate_size": 11008, "max_position_embeddings": 4096}, layer=5
    ),
    "llama-3-8b": Shape(
        transformers.LlamaConfig,
        {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 8192},
        layer=5,
    ),
}  # fmt: skip
# Of every shape: its vocabulary is smaller than theirs, which costs and gains nothing.
TOKENIZER = next(iter(embedded.MODELS))

# name -> (dtype of the weights, torch's precision of float32 products)
PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}


def random_model(shape: str, device: str = "auto", precision: str = "float32", seed: int = 0) -> LanguageModel:
    """A model of a shape in `SHAPES` with weights drawn as its class draws them, under the shape's name.

    ModelError for an unknown shape or precision, and for one whose weights the device has no room for.
    """
    gc.collect()  # an earlier model that nobody holds but itself would take the room of this one
    check_shapes([shape], [precision], device)
    device = device_named(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = _model(shape, dtype=PRECISIONS[precision][0])
    tokenizer = AutoTokenizer.from_pretrained(paths.DATA / "models" / TOKENIZER)
    return LanguageModel.wrap(model, tokenizer, shape)


def check_shapes(shapes: Sequence[str], precisions: Sequence[str], device: str = "auto") -> None:
    """ModelError for the first that is unknown or too large, before hours are spent on the others."""
    place = device_named(device)
    free = free_memory(place)
    for shape, precision in itertools.product(shapes, precisions):
        if shape not in SHAPES:
            raise ModelError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        if precision not in PRECISIONS:
            raise ModelError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
        needed = n_parameters(shape) * PRECISIONS[precision][0].itemsize
        if needed > 0.8 * free:
            raise ModelError(
                f"{shape} in {precision} takes {needed / 2**30:.1f} GiB for its weights alone, and {place} has "
                f"{free / 2**30:.1f} GiB free: leave it out, or choose bfloat16"
            )


def n_parameters(shape: str) -> int:
    """How many numbers a model of the shape holds."""
    with torch.device("meta"):
        return _model(shape).num_parameters()


def _model(shape: str, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(SHAPES[shape].config(**SHAPES[shape].sizes), **options)


class matmul_precision(Guarded):
    """Within this `with`, float32 products are computed as the row of `PRECISIONS` says."""

    def __init__(self, precision: str):
        self.precision, self.before = PRECISIONS[precision][1], torch.get_float32_matmul_precision()

    def begin(self) -> None:
        torch.set_float32_matmul_precision(self.precision)

    def end(self, error: BaseException | None) -> None:
        torch.set_float32_matmul_precision(self.before)
