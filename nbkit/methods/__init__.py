"""The editing methods, one file each, and the verbs that run them."""

from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.setups import setup
from nbkit.methods.table import METHODS
from nbkit.methods.value_norm import mean_value_norm
from nbkit.methods.verbs import edit, edit_batch, edit_sequence

__all__ = ["METHODS", "edit", "edit_batch", "edit_sequence", "hyper_parameters", "mean_value_norm", "setup"]
