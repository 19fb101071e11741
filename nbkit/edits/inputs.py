"""What regularisers are told of the keys that a weight meets: second moments by the name of the weight.

C = nbkit.second_moment(lm, layer=3, texts=texts)
regularise(edit, lm, "select", keep=0.4, by="felt", second_moments={lm.weight_name(3): C})
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.editable import EditableModel
from nbkit.errors import MethodError
from nbkit.records.bounds import shown


def moment_of(second_moments: Mapping[str, Tensor] | None, name: str, lm: EditableModel) -> Float[Tensor, "d_in d_in"]:
    """C = E[k kᵀ] of the inputs k of a weight, in float64 on the model's device.

    second_moments: {weight name: C}; NumPy arrays will do. A bias, whose input is always 1, needs none. MethodError for
    a weight without one, and for one that is no finite matrix of the weight's d_in with a diagonal from 0 on.
    """
    width = lm.oriented(name).shape[1]
    if lm.model.get_parameter(name).dim() == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=lm.device)
    if not isinstance(second_moments, Mapping | None):
        raise MethodError(f"second_moments must be {{weight name: matrix}}, not {shown(second_moments)}")
    if second_moments is None or name not in second_moments:
        raise MethodError(
            f"what is felt of a change of {name} needs the second moment of its keys: give "
            f"second_moments={{{name!r}: C}}, with C of nbkit.second_moment"
        )
    try:
        moment = torch.as_tensor(second_moments[name]).to(lm.device, torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MethodError(f"the second moment of {name} is no matrix of numbers: {error}") from error
    if tuple(moment.shape) != (width, width):
        raise MethodError(f"the second moment of {name} must be {(width, width)}, not {tuple(moment.shape)}")
    if not moment.isfinite().all() or moment.diagonal().min() < 0:
        raise MethodError(f"the second moment of {name} holds NaN, infinite or, on its diagonal, negative values")
    return moment
