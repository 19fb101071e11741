"""Figures: each function draws one DataFrame on one matplotlib Axes and returns the Axes; only `save_figure` writes.

    with plots.paper_style():
        fig, ax = plt.subplots(figsize=(plots.COLUMN, 2.4))
        plots.perplexity_per_edit(frame, ax)
        plots.save_figure(fig, "01_perplexity_per_edit", "Perplexity after ...")

No torch is imported here: figures can be drawn from stored rows anywhere.
"""

from nbkit.plots.ablation import setting_shares
from nbkit.plots.captions import sources
from nbkit.plots.damage import areas_by_method, damage_calibration, guard_outcomes
from nbkit.plots.interventions import intervention_strips
from nbkit.plots.key_distributions import (
    embedding_scatter,
    key_among_others,
    norm_histogram,
    similarity_curves,
    similarity_histogram,
)
from nbkit.plots.key_moves import key_moves
from nbkit.plots.one_edit import (
    loss_curve,
    one_edit_panels,
    ratio_by_layer,
    success_by_layer,
    template_similarity,
    top_tokens,
)
from nbkit.plots.pareto import pareto_front
from nbkit.plots.risk import risk_distribution
from nbkit.plots.screening import screened_risk
from nbkit.plots.sequence_grids import perplexity_grid, share_grid, size_grid, survival_grid
from nbkit.plots.sequential_edits import sequence_step, sequential_curves, survival_curves
from nbkit.plots.single_edits import (
    ZSRE_SCORES,
    collapse_by_templates,
    collapse_share,
    denominators,
    method_scores,
    perplexity_by_method,
    perplexity_per_edit,
    perplexity_strips,
    risk_roc,
)
from nbkit.plots.style import (
    COLUMN,
    TWO_COLUMNS,
    label_panels,
    paper_style,
    save_figure,
    save_verdicts,
    shared_legend,
)
from nbkit.plots.surrogate import ability_vs_perplexity, perplexity_vs_task, perplexity_vs_tasks, rho_by_text
from nbkit.plots.task_curves import batch_grid, task_curve, task_curves, two_scorers
from nbkit.plots.throughput import cost_growth, seconds_per_edit, time_shares
from nbkit.plots.training import collapse_over, median_over, training_panels, value_over
from nbkit.plots.weights import weight_map, weight_maps, weights_above
