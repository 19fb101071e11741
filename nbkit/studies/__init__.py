"""What edits did: metrics, task scores and risk, and studies that make rows of them, one file a study."""

from nbkit.studies.interventions import first_tokens_by_layer, hard_and_normal, intervened_edits
from nbkit.studies.ablation import rome_ablation
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.single import single_edits
from nbkit.studies.surrogate import spread, task_correlation

__all__ = [
    "first_tokens_by_layer",
    "hard_and_normal",
    "intervened_edits",
    "sequential_edits",
    "single_edits",
    "spread",
    "task_correlation",
]
__all__ = ["rome_ablation", "sequential_edits", "single_edits", "spread", "task_correlation"]
