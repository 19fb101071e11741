"""Loading a causal language model, and the table that says where each architecture keeps what an edit needs.

    lm = load("miniworld-gpt2")          # an embedded model, a local folder, or a Hugging Face id
    lm.projection(3)                     # the module whose input is the key and whose output is the value, at layer 3
    lm.weight_name(3)                    # "transformer.h.3.mlp.c_proj.weight"
    lm.apply(edit); lm.undo(); lm.history()
    lm.save("edited-model")              # a checkpoint, edits included

An architecture is a row of `ARCHITECTURES`, never a branch in the code.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from nbkit import paths
from nbkit.edit_files import save_edits
from nbkit.edits import Edit, Overlay
from nbkit.errors import ModelError, ResultsError
from nbkit.ledger import Ledger

if TYPE_CHECKING:
    from nbkit.prompts import Batch


@dataclass(frozen=True)
class Architecture:
    """Module paths of one `config.model_type`; `{layer}` stands for the layer's number, sub-paths are below `block`.

    `transposed`: the projection is a `Conv1D`, its weight (d_in, d_out); otherwise a `Linear`, (d_out, d_in).
    `adds_bos`: the family's tokenizer puts a token before the text, so a subject is never at position 0.
    `block_gives_tuple`: a block returns a tuple, whose first item is the residual stream, not the tensor itself.
    `float64`: False where transformers' attention makes NaN of a float64 model's padding (its softmax is in float32,
    where the mask's most negative float64 number is -inf).
    """

    block: str
    projection: str  # the MLP's output projection
    attention: str
    final_norm: str
    transposed: bool = False
    adds_bos: bool = False
    block_gives_tuple: bool = False
    float64: bool = True

    def projection_path(self, layer: int) -> str:
        return f"{self.block.format(layer=layer)}.{self.projection}"

    def attention_path(self, layer: int) -> str:
        return f"{self.block.format(layer=layer)}.{self.attention}"


def _llama_like(prefix: str = "model", **habits: bool) -> Architecture:
    return Architecture(prefix + ".layers.{layer}", "mlp.down_proj", "self_attn", prefix + ".norm", **habits)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h.{layer}", "mlp.c_proj", "attn", "transformer.ln_f", transposed=True),
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
        "model.decoder.layers.{layer}", "fc2", "self_attn", "model.decoder.final_layer_norm", adds_bos=True
    ),
}


@dataclass(eq=False)
class LanguageModel:
    """A causal model in evaluation mode without gradients, its fast tokenizer, and its row of `ARCHITECTURES`.

    overlays: the edits that lie in the weights, lowest first: the ledger, then one for each open `with` of nbkit.edits.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    name: str
    overlays: list[Overlay] = field(default_factory=lambda: [Ledger()], repr=False)
    _hash: str | None = field(default=None, repr=False)

    @classmethod
    def wrap(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "unnamed") -> "LanguageModel":
        """Make a LanguageModel of parts already in memory. The model is set to eval, its gradients are switched off."""
        architecture = architecture_of(model.config, name)
        if not tokenizer.is_fast:
            raise ModelError(f"{name}: its tokenizer is not a fast one, which finding the subject's tokens needs")
        if model.dtype == torch.float64 and not architecture.float64:
            raise ModelError(f"{name}: {model.config.model_type} models cannot be run in float64; use float32")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ModelError(f"{name}: its tokenizer has neither a padding nor an end-of-text token")
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        return cls(model.eval().requires_grad_(False), tokenizer, architecture, name)

    @property
    def config(self):
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(0).dtype

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.weight(0).shape[1 if self.architecture.transposed else 0]

    @property
    def d_mlp(self) -> int:
        return self.weight(0).shape[0 if self.architecture.transposed else 1]

    @property
    def max_length(self) -> int:
        """The context: how many tokens the model can read."""
        return self.config.max_position_embeddings

    @property
    def n_applied(self) -> int:
        """How many edits are in the weights right now."""
        return sum(len(overlay.edits) for overlay in self.overlays)

    @property
    def ledger(self) -> Ledger:
        """The edits of `apply`; those of a `with` are not among them."""
        return self.overlays[0]

    def apply(self, edit: Edit) -> None:
        """Puts an edit into the weights, where it stays until `undo`; it is added on top of those that are there.

        ModelError for an edit that does not fit the weights, and inside `with applied(...)` or a loop over
        `edit_sequence`, whose end would take this edit away unseen. Both can be used on top of edits applied so.
        """
        self.ledger.apply(self, edit)

    def undo(self, n: int = 1) -> list[Edit]:
        """Takes the last n applied edits out of the weights and returns them, in the order in which they were applied.

        Every bit is then what it was before them. ModelError if fewer than n are applied, and where `apply` is refused.
        """
        return self.ledger.undo(self, n)

    def history(self) -> pd.DataFrame:
        """The edits of `apply` that are in the weights, in order: method, n_requests, request (the first one's text),
        target_new, weights, update_norm ‖ΔW‖_F."""
        return self.ledger.history()

    def save(self, folder: str | Path) -> None:
        """Writes the model as it is, edits included, with its tokenizer, for `load(folder)` or transformers.

        If there are edits in the weights they stand by themselves in `nbkit_edits.safetensors` beside it
        (`nbkit.load_edits`; of the unedited model, so they are not to be applied to this one).

        ModelError for a folder with anything but a checkpoint of the same kind, which is overwritten, and for weights
        that are NaN or infinite, which `load` would refuse. ResultsError if it cannot be written.
        """
        folder = Path(folder)
        _check_folder(folder, self.model.config.model_type)
        _check_finite(self.model, self.name, "such a model is not loaded again")
        edits = [edit for overlay in self.overlays for edit in overlay.edits]
        config = vars(self.model.config)
        # save_pretrained notes dtype and class in it, which would change the hash: save_edits asks for that below.
        kept, _ = dict(config), self.base_hash
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
                new = Path(temporary)
                self.model.save_pretrained(new)
                self.tokenizer.save_pretrained(new)
                if edits:
                    save_edits(edits, new / "nbkit_edits.safetensors", self)
                # Moved, not written over: a model in memory may be mapped from the old file, and goes on reading it.
                for old in (*folder.glob("model*.safetensors*"), *folder.glob("nbkit_edits.safetensors")):
                    old.unlink()
                for path in list(new.iterdir()):
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    path.replace(folder / path.name)
        except (OSError, SafetensorError) as error:
            raise ResultsError(f"cannot write the model to {folder}: {error}") from error
        finally:
            config.clear()
            config.update(kept)

    @property
    def hash(self) -> str:
        """sha256 over configuration and weights: names caches and result rows. Remembered while no edit is applied."""
        return _hash(self.model) if self.n_applied else self.base_hash

    @property
    def base_hash(self) -> str:
        """The hash of the unedited model, whatever edits are in the weights."""
        if self._hash is None:
            below = {name: weight for overlay in reversed(self.overlays) for name, weight in overlay.below.items()}
            self._hash = _hash(self.model, below)
        return self._hash

    def logits(self, batch: "Batch", keep: torch.Tensor | int = 0) -> torch.Tensor:
        """One plain forward pass without a cache: logits (row, position, vocabulary).

        `keep`, a Boolean (row, position), asks for those positions only: (kept, vocabulary), row by row.
        """
        return self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=keep,
        ).logits

    def check_layer(self, layer: int) -> int:
        """Return `layer`; ModelError if there is none of that number, or its weight is not in memory."""
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
            raise ModelError(
                f"layer {layer} does not exist in {self.name} ({self.n_layers} layers, 0 to {self.n_layers - 1})"
            )
        if self.model.get_submodule(self.architecture.projection_path(layer)).weight.is_meta:
            raise ModelError(
                f"{self.name}: the weight of layer {layer} is offloaded (on the meta device), where an edit would "
                "never reach it; load the model whole on one device"
            )
        return layer

    def block(self, layer: int) -> nn.Module:
        """One layer: attention and MLP with their norms and residual connections."""
        return self.model.get_submodule(self.architecture.block.format(layer=layer))

    def attention(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.architecture.attention_path(layer))

    def projection(self, layer: int) -> nn.Module:
        """The MLP's output projection: its input is the key k (d_mlp), its output W k + b the value v (d_model)."""
        return self.model.get_submodule(self.architecture.projection_path(self.check_layer(layer)))

    def weight(self, layer: int) -> torch.Tensor:
        """The projection's weight as stored: (d_mlp, d_model) in a transposed architecture, else (d_model, d_mlp)."""
        return self.projection(layer).weight

    def weight_name(self, layer: int) -> str:
        """The name of that weight in `model.named_parameters()`."""
        return self.architecture.projection_path(self.check_layer(layer)) + ".weight"


def architecture_of(config, name: str) -> Architecture:
    """The row of a configuration. ModelError says whether the model is of the wrong kind or only not in the table."""
    kind = config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({kind}); edits are defined here for causal decoders")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ModelError(f"{name} is encoder-only ({kind}); edits are defined here for causal decoders")
    raise ModelError(f"{name} has the unknown architecture {kind!r}; known: {', '.join(ARCHITECTURES)}")


def embedded_models() -> list[str]:
    """Names of the models that come with the project."""
    return sorted(folder.parent.name for folder in (paths.DATA / "models").glob("*/config.json"))


def load(
    name: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load an embedded model, a local folder, or a Hugging Face id.

    device "auto": the first GPU, else the CPU. dtype "auto": bfloat16 for a bfloat16 checkpoint on a GPU, else
    float32 (a collapsed model overflows float16). Only safetensors are read, and a checkpoint that lacks
    weights or holds NaN is refused: random weights in the gaps would look like a collapse.
    """
    name = str(name)
    place = paths.DATA / "models" / name if name in embedded_models() else name
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(place, **source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: neither embedded ({', '.join(embedded_models()) or 'none'}), nor a folder with a "
            f"model of a known type, nor one that could be had from the Hugging Face hub. {error}"
        ) from error
    architecture = architecture_of(config, name)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = _dtype(dtype, config, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **source)
        model, report = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{name}: its tokenizer or weights cannot be read, a file is missing or damaged: {error}"
        ) from error
    if report["missing_keys"]:
        raise ModelError(f"{name}: its files lack the weights {', '.join(sorted(report['missing_keys']))}")
    _check_finite(model, name, "the file is damaged")
    _align(model)
    lm = LanguageModel.wrap(model.to(device), tokenizer, name)
    _check_bos(lm, architecture)
    return lm


def _dtype(dtype: str | torch.dtype, config, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and config.dtype == torch.bfloat16 else torch.float32
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"unknown dtype {dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float64'")
    return getattr(torch, dtype)


def _check_bos(lm: LanguageModel, architecture: Architecture) -> None:
    """Warn when the tokenizer does not do what its family does: the token at position 0 changes every edit."""
    adds_bos = len(lm.tokenizer("a").input_ids) > len(lm.tokenizer("a", add_special_tokens=False).input_ids)
    if adds_bos != architecture.adds_bos:
        habit = "puts no token before a text" if not adds_bos else "puts a token before each text"
        warnings.warn(f"the tokenizer of {lm.name} {habit}, unlike its family's ({lm.config.model_type})", stacklevel=3)


def _check_finite(model: PreTrainedModel, name: str, therefore: str) -> None:
    for key, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ModelError(f"{name}: the weight {key} holds NaN or infinite values; {therefore}")


def _align(model: PreTrainedModel) -> None:
    """Moves weights to where the allocator would put them. A file's are mapped as they lie in it, and a product of
    matrices differs in its last bit with their alignment: a saved model would differ from its copy in memory."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _check_folder(folder: Path, model_type: str) -> None:
    """ModelError unless a checkpoint of this kind may be written there; hidden files do not matter."""
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != model_type:
        what = f"holds a model of another kind ({found})" if found else "is there already and holds no model"
        raise ModelError(f"{folder} {what}; save this {model_type} model to a new folder")


def _hash(model: PreTrainedModel, instead: Mapping[str, torch.Tensor] | None = None) -> str:
    """instead: {weight name: weight} to take for those in the model."""
    place = {model.get_parameter(name).data_ptr(): weight for name, weight in (instead or {}).items()}
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("transformers_version", "_name_or_path")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        tensor = place.get(tensor.data_ptr(), tensor)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
