"""Which of several things are best where two values pull apart, both the larger the better. Needs no torch.

chosen = rows[front(rows["ability"], rows["reliability"])]
"""

from collections.abc import Sequence

import numpy as np


def front(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Whether each point is on the Pareto front: none other has more of one value and at least as much of the other.

    Points that are alike are on it together; one with a NaN never is.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    as_good = (x[None, :] >= x[:, None]) & (y[None, :] >= y[:, None])  # [i, j]: j beside i
    better = (x[None, :] > x[:, None]) | (y[None, :] > y[:, None])
    return ~(as_good & better).any(1) & ~np.isnan(x) & ~np.isnan(y)
