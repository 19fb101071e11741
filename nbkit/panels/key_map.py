"""The keys of one request among those of others, in the unedited model.

keys = KeyMap(lm, requests)
keys.frame(request, layer=1)             # for `plots.key_among_others`
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nbkit.edits.overlays import unedited
from nbkit.keys.geometry import MEAN, PLAIN, embed, key_vectors
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.requests import EditRequest

N_OTHERS = 150


class KeyMap:
    """Keeps the keys of the first `N_OTHERS` requests by layer, so that each further map is quick."""

    def __init__(self, lm: LanguageModel, requests: Sequence[EditRequest]):
        self.lm, self.requests = lm, list(requests[:N_OTHERS])
        self._known: dict[int, dict[str, np.ndarray]] = {}

    def frame(self, request: EditRequest, layer: int) -> pd.DataFrame | None:
        """k_u and k̄ of the request, the last one, and of the others, in the plane of a PCA; None without two others."""
        places = [place for place, one in enumerate(self.requests) if one != request]
        if len(places) < 2:
            return None
        with unedited(self.lm):
            if layer not in self._known:
                self._known[layer] = key_vectors(self.lm, self.requests, layer)
            this = key_vectors(self.lm, [request], layer)
        known = self._known[layer]
        vectors = {kind: np.concatenate([known[kind][places], this[kind]]) for kind in (PLAIN, MEAN)}
        shown = [*(self.requests[place] for place in places), request]
        return embed(vectors, [subject_kind(self.lm, one) for one in shown], "PCA")
