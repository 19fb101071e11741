"""How long edits take, and how long they would take without the fast engine: measured in one run, as tidy rows.

    work = workload("miniworld-gpt2", requests, nbkit.context_templates(lm), texts)
    rows = pd.concat([editing(work, sizes=[1, 8, 64]), screening(work, n=64)])
    ratios(rows)                                    # how many times faster than the plain loop, with the spread

Three paths do the same work:

| path         | how                                                                                               |
|--------------|---------------------------------------------------------------------------------------------------|
| plain        | the papers' formulae, one text at a time through the whole model: nbkit/plain, which the engine   |
|              | is tested against                                                                                 |
| whole passes | nbkit without its replay: the prompts of an edit in one batch, all layers, all tokens             |
| replay       | nbkit as it is                                                                                    |

A row is one measurement: what ("edit", "edit and evaluate", "screen", "second moment", "growth"), path, model, device,
dtype, threads, n (items asked for together), repeat, items (that the clock ran over), seconds_per_item (wall time, the
device's work done), peak_memory (bytes: of the process on a CPU, allocated by torch on a GPU), n_steps (of the search
for v*, mean). Times differ from run to run, so nothing of this is stored, and no stored result depends on it.
"""

from nbkit.studies.speed.operations import flops_per_edit, matmul_rate, time_by_operation
from nbkit.studies.speed.tables import by_shape, growing, ratios
from nbkit.studies.speed.timing import cost, editing, growth, of_shape, reading, screening
from nbkit.studies.speed.workloads import Workload, edits_in_a_batch, whole_passes, workload

__all__ = [
    "Workload", "workload", "whole_passes", "edits_in_a_batch",
    "editing", "screening", "growth", "reading", "of_shape", "cost",
    "flops_per_edit", "matmul_rate", "time_by_operation",
    "ratios", "growing", "by_shape",
]  # fmt: skip
