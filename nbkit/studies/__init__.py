"""What edits did: metrics, task scores and risk, and studies that make rows of them, one file a study."""

from nbkit.studies.ablation import rome_ablation
from nbkit.studies.batches import batch_edits
from nbkit.studies.interventions import first_tokens_by_layer, hard_and_normal, intervened_edits
from nbkit.studies.protocols import protocol_edits
from nbkit.studies.sequential import sequential_edits
from nbkit.studies.single import single_edits
from nbkit.studies.surrogate import treated_perplexity, treated_scores
from nbkit.studies.treatment_pool import pool
from nbkit.studies.treatments import Treatment, edits_of

__all__ = [
    "Treatment",
    "batch_edits",
    "edits_of",
    "first_tokens_by_layer",
    "hard_and_normal",
    "intervened_edits",
    "pool",
    "protocol_edits",
    "rome_ablation",
    "sequential_edits",
    "single_edits",
    "treated_perplexity",
    "treated_scores",
]
