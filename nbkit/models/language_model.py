"""A causal language model as the rest of nbkit sees it: its parts by name, a plain pass, the edits in its weights.

    lm.projection(3)                     # the module whose input is the key and whose output is the value, at layer 3
    lm.weight_name(3)                    # "transformer.h.3.mlp.c_proj.weight"
    lm.apply(edit); lm.undo(); lm.history()
    lm.save("edited-model")              # a checkpoint, edits included
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from nbkit.architectures import ARCHITECTURES, ENCODER_DECODERS, Architecture, Side
from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.edit_files import save_edits
from nbkit.edits.editable import EditableModel
from nbkit.edits.interrupts import Guarded
from nbkit.edits.ledger import Ledger
from nbkit.errors import ModelError, ResultsError
from nbkit.models import saved, sides
from nbkit.models.rows import Batch
from nbkit.records.bounds import shown

ORIGIN = "nbkit.json"  # beside a saved model: what it was before


@dataclass(eq=False)
class LanguageModel(EditableModel):
    """A causal model in evaluation mode without gradients, its fast tokenizer, and its row of `ARCHITECTURES`.

    Or one side of an encoder-decoder, which keys are read of; all else is then refused with a ModelError.

    overlays: the ledger, then one for each open `with` of nbkit.edits.
    replayable: whether passes may be cut short to what an edit can change; None until it was tried
    (`replay.can_replay`). Setting it to False takes the plain way everywhere.
    adds_value: whether blocks add to the stream what their projection says; None until tried (`blocks.adds_value`).
    origin: of a model that `save` wrote, what it was before; None for others.
    """

    tokenizer: PreTrainedTokenizerBase = field(kw_only=True)
    replayable: bool | None = field(default=None, repr=False)
    adds_value: bool | None = field(default=None, repr=False)
    origin: str | None = field(default=None, repr=False)

    def __post_init__(self):
        self.overlays.append(Ledger())

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "unnamed",
        side: Side = "decoder",
    ) -> "LanguageModel":
        """Make a LanguageModel of parts already in memory. The model is set to eval, its gradients are switched off.

        side: of an encoder-decoder; what each reads is said in sides.py.
        """
        architecture = architecture_of(model.config, name, side)
        if not tokenizer.is_fast:
            raise ModelError(f"{name}: its tokenizer is not a fast one, which finding the subject's tokens needs")
        if model.dtype == torch.float64 and not architecture.float64:
            raise ModelError(f"{name}: {model.config.model_type} models cannot be run in float64; use float32")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ModelError(f"{name}: its tokenizer has neither a padding nor an end-of-text token")
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        model = model.eval().requires_grad_(False)
        if architecture.side:
            tokenizer = sides.tokenizer_of(side, model, tokenizer)
            return cls(model, architecture, name, tokenizer=tokenizer, replayable=False)
        return cls(model, architecture, name, tokenizer=tokenizer)

    @property
    def title(self) -> str:
        """The name without the folder or the owner that it is in, for figures and tables."""
        return self.name.rstrip("/").split("/")[-1]

    @property
    def known_as(self) -> str:
        """The title under which defaults are looked up: hyper-parameters, and the text that comes with the model."""
        return self.origin or self.title

    @property
    def config(self):
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(0).dtype

    @property
    def n_layers(self) -> int:
        return len(self.model.get_submodule(self.architecture.blocks))

    @property
    def d_model(self) -> int:
        return self.oriented(self.weight_name(0)).shape[0]

    @property
    def d_mlp(self) -> int:
        return self.oriented(self.weight_name(0)).shape[1]

    @property
    def max_length(self) -> int:
        """The context: how many tokens the model can read. T5 sets no bound; its tokenizer may."""
        return getattr(self.config, "max_position_embeddings", self.tokenizer.model_max_length)

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

    @verb
    def save(self, folder: str | Path) -> None:
        """Writes the model as it is, edits included, with its tokenizer, for `load(folder)` or transformers.

        What it was before is noted in `nbkit.json`, so that it keeps its defaults. If there are edits in the weights
        they stand by themselves in `nbkit_edits.safetensors` beside it (`nbkit.load_edits`; of the unedited model, so
        they are not to be applied to this one).

        Whole or not at all: cut short, even by a kill, it leaves the old checkpoint or the new one for `load`.

        ModelError for a folder with anything but a checkpoint of the same kind, which is overwritten, and for weights
        that are NaN or infinite, which `load` would refuse. ResultsError if it cannot be written.
        """
        self.check_causal()
        folder = Path(folder)
        check_finite(self.model, self.name, "such a model is not loaded again")
        edits = [edit for _, _, edit in self.laid]
        try:
            saved.complete(folder)
            _check_folder(folder, self.model.config.model_type)
            # save_pretrained notes dtype and class in the configuration, which would change the hash: save_edits asks
            # for that inside, and is then told the remembered one.
            _ = self.base_hash
            with saved.writing(folder) as new, _as_it_is(self.model.config):
                self.model.save_pretrained(new)
                self.tokenizer.save_pretrained(new)
                (new / ORIGIN).write_text(json.dumps({"origin": self.known_as}) + "\n", encoding="utf-8")
                if edits:
                    save_edits(edits, new / saved.EDITS, self)
        except (OSError, SafetensorError) as error:
            raise ResultsError(f"cannot write the model to {folder}: {error}") from error

    def logits(self, batch: Batch, keep: torch.Tensor | int = 0) -> torch.Tensor:
        """One plain forward pass without a cache: logits (row, position, vocabulary).

        `keep`, a Boolean (row, position), asks for those positions only: (kept, vocabulary), row by row.
        """
        self.check_causal()
        return self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=keep,
        ).logits

    def read(self, batch: Batch) -> None:
        """One plain forward pass, for hooks to look into."""
        if self.architecture.side:
            sides.read(self.model, self.architecture.side, batch)
        else:
            self.logits(batch, keep=1)

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


def check_model(lm: object) -> LanguageModel:
    """The model as it is; ModelError for what is none, as a name or a model of transformers."""
    if not isinstance(lm, LanguageModel):
        raise ModelError(f"a LanguageModel is needed, as nbkit.load gives it, not {shown(lm)}")
    return lm


class _as_it_is(Guarded):
    """What is noted in a configuration inside the `with` is gone behind it."""

    def __init__(self, config):
        self.noted = vars(config)
        self.before = dict(self.noted)

    def end(self, error: BaseException | None) -> None:
        self.noted.clear()
        self.noted.update(self.before)


def architecture_of(config, name: str, side: Side = "decoder") -> Architecture:
    """The row of a configuration. ModelError says whether the model is of the wrong kind or only not in the table."""
    kind = config.model_type
    rows = ENCODER_DECODERS.get(kind) or ({"decoder": ARCHITECTURES[kind]} if kind in ARCHITECTURES else {})
    if isinstance(side, str) and side in rows:
        return rows[side]
    if rows:
        raise ModelError(f"{name} ({kind}) has no side {side!r}; it has {' and '.join(rows)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({kind}); edits are defined here for causal decoders")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ModelError(f"{name} is encoder-only ({kind}); edits are defined here for causal decoders")
    raise ModelError(f"{name} has the unknown architecture {kind!r}; known: {', '.join(ARCHITECTURES)}")


def check_finite(model: PreTrainedModel, name: str, therefore: str) -> None:
    for key, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ModelError(f"{name}: the weight {key} holds NaN or infinite values; {therefore}")


def _check_folder(folder: Path, model_type: str) -> None:
    """ModelError unless a checkpoint of this kind may be written there; hidden files do not matter."""
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        held = None
    if held != model_type:
        what = f"holds a model of another kind ({held})" if held else "is there already and holds no model"
        raise ModelError(f"{folder} {what}; save this {model_type} model to a new folder")
