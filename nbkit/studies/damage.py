"""How much of an edit ordinary text will feel, from the update alone: no text is read, whatever the method is.

    frame = damage(lm, edits)                    # one row an edit; sort by "felt_relative"

The output of an edited MLP projection moves by ΔW k at each key k. Over the keys of ordinary text that is √E‖ΔW k‖² =
‖ΔW C^½‖_F with their second moment C = E[k kᵀ], which is computed once for all edits of a model. What `collapse_risk`
foretells before an edit of ROME is computed, this says of any edit that is, before it is in the model.
`records/calibration.py` holds it to the perplexities that were measured.
"""

from collections.abc import Sequence

import pandas as pd

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit, as_edits
from nbkit.keys.felt import felt_of, moments_of_text, projections
from nbkit.keys.solving import SecondMomentLike
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import request_columns


@verb
def damage(
    lm: LanguageModel,
    edits: Edit | Sequence[Edit],
    second_moment: SecondMomentLike = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What ordinary text feels of each edit's update, as `nbkit.edit` made it of the model as it is now.

    Args:
        second_moment: C of the MLP projections that the edits change: {layer: matrix}, one matrix for whichever layer,
            or a SecondMoments; no forward pass then. None: that of the unedited model on its default text, computed
            once and cached. MethodError for a model without such a text, or a layer that is missing.
        progress: whether second moments that are computed here have a bar.

    The model is not changed. ModelError for an edit that does not fit it.

    Columns: case_id (as text), subject and subject_kind (of an edit of one request; missing for one of several),
    n_requests, method, update_norm ‖ΔW‖_F over all weights; over the MLP projections alone, in quadrature, felt
    √E‖ΔW k‖² and felt_relative, with each projection's part of it over √E‖W k‖² of that projection as it is in the
    model now; unmeasured, the names of the weights whose effect is in neither, because they are no MLP projection (""
    for none): biases, and in MEND's edits the matrices into the MLP. An edit without updates is felt as 0, one of such
    weights alone as NaN. What is NaN or infinite in an update makes norm and felt NaN or infinite.
    """
    edits = [edits] if isinstance(edits, Edit) else as_edits(edits)
    moments = moments_of_text(lm, second_moment, projections(lm, edits).values(), progress)
    rows = []
    for edit, felt in zip(edits, felt_of(lm, edits, moments), strict=True):
        about = dict.fromkeys(["case_id", "subject", "subject_kind"])
        if len(edit.requests) == 1:
            about = request_columns(lm, edit.request)
        measured = {"felt": felt.absolute, "felt_relative": felt.relative, "unmeasured": ", ".join(felt.unmeasured)}
        about |= {"n_requests": len(edit.requests), "method": edit.method, "update_norm": edit.norm()}
        rows.append({**about, **measured})
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = ["case_id", "subject", "subject_kind", "n_requests", "method", "update_norm", "felt", "felt_relative",
           "unmeasured"]  # fmt: skip
