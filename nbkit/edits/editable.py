"""What an edit needs of a model: weights by name, the edits that lie in them, and a hash. No tokenizer, no text.

`models.LanguageModel` is one; all that edits do to a model goes through here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from nbkit.architectures import Architecture
from nbkit.edits.edit import Edit
from nbkit.edits.updates import Update
from nbkit.errors import ModelError


@dataclass(eq=False)
class Overlay:
    """Edits that lie in a model's weights, and the weights that they touch as they were below: one copy of each,
    however many edits are added."""

    edits: list[Edit] = field(default_factory=list)
    below: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class EditableModel:
    """A model with its row of the table of architectures.

    overlays: the edits that lie in the weights, lowest first; those of a `with` lie above those of `apply`.
    """

    model: PreTrainedModel
    architecture: Architecture
    name: str
    overlays: list[Overlay] = field(default_factory=list, repr=False)
    _hash: str | None = field(default=None, repr=False, init=False)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def n_applied(self) -> int:
        """How many edits are in the weights right now."""
        return sum(len(overlay.edits) for overlay in self.overlays)

    @property
    def hash(self) -> str:
        """sha256 over configuration and weights: names caches and result rows. Remembered while no edit is applied."""
        return _hash(self.model) if self.n_applied else self.base_hash

    @property
    def base_hash(self) -> str:
        """The hash of the unedited model, whatever edits are in the weights."""
        if self._hash is None:
            self._hash = _hash(self.model, self.unedited_weights)
        return self._hash

    @property
    def unedited_weights(self) -> dict[str, Tensor]:
        """{name: weight without any edit} of the weights that edits have changed, as stored."""
        return {name: weight for overlay in reversed(self.overlays) for name, weight in overlay.below.items()}

    def oriented(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """A weight as updates see it; a view, transposed where the architecture stores it so, a bias as one column."""
        weight = self.model.get_parameter(name)
        if weight.dim() == 1:
            return weight[:, None]
        return weight.T if self.architecture.transposed else weight

    def check_causal(self) -> None:
        """ModelError for a side of an encoder-decoder: keys are all that is defined for it."""
        if self.architecture.side:
            raise ModelError(
                f"{self.name} is an encoder-decoder ({self.model.config.model_type}), whose keys can be read; edits, "
                "and what is measured of them, are defined here for causal decoders"
            )

    def weight_of(self, name: str, delta: Update) -> Tensor:
        """The weight that an update is of, as stored; ModelError if there is none of that name and shape in memory."""
        self.check_causal()
        try:
            weight = self.model.get_parameter(name)
        except AttributeError as error:
            raise ModelError(f"the edit changes {name}, a weight that {self.name} does not have") from error
        if weight.is_meta:
            raise ModelError(
                f"{self.name}: {name} is offloaded (on the meta device), where an edit would never reach it"
            )
        if weight.dim() == 1 and not name.endswith(".bias"):
            raise ModelError(f"the edit changes {name} of {self.name}, a vector: edits are of matrices and of biases")
        shape = tuple(self.oriented(name).shape)
        if tuple(delta.shape) != shape:
            raise ModelError(
                f"the edit's update of {name} is {tuple(delta.shape)}, "
                f"the weight of {self.name} is {shape} (d_out, d_in)"
            )
        return weight

    @torch.no_grad()
    def add_update(self, name: str, delta: Update) -> None:
        """Adds an update to its weight, for good."""
        weight = self.oriented(name)
        update = delta.to(weight.device).dense()
        # Added in the wider of the two types and rounded once, which matters for a bfloat16 weight.
        wide = torch.promote_types(weight.dtype, update.dtype)
        weight.copy_(weight.to(wide) + update.to(wide))


def _hash(model: PreTrainedModel, instead: Mapping[str, Tensor] | None = None) -> str:
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
