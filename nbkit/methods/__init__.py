"""The editing methods, one file each, and the verbs that run them."""

from nbkit.methods.verbs import METHODS, edit, edit_batch, edit_sequence, hyper_parameters

__all__ = ["METHODS", "edit", "edit_batch", "edit_sequence", "hyper_parameters"]
