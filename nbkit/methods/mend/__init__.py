"""MEND: a small trained network turns the gradient of the wish into an edit of the last layers' MLP matrices.

What the network computes stands in `hypernetwork`, how it edits in `editing`, how it is trained in `training`.
Mitchell et al., Fast Model Editing at Scale.
"""

from nbkit.methods.mend.editing import MendParameters, mend_each, mend_files, mend_together

__all__ = ["MendParameters", "mend_each", "mend_files", "mend_together"]
