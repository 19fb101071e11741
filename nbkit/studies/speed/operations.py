"""How much arithmetic an edit is, how fast the device can do such, and in which operations the time goes."""

import dataclasses
import gc
import re
from collections.abc import Sequence

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from nbkit.studies.speed.meter import Meter
from nbkit.studies.speed.workloads import Workload

# part of the time: names of the operations that it is spent in, in them and in all that they call
PARTS = {
    "backward": r"autograd::engine::.*",
    "matrix products": r"aten::\w*mm",
    "attention": r"aten::\w*scaled_dot_product\w*",
    "softmax": r"aten::\w*softmax\w*",
    "memory moves": r"aten::(copy_|clone|cat|stack|fill_|embedding|gather|scatter\w*|\w*index\w*)",
}
OTHER = "other operations"
FEW_STEPS = 10  # of the search for v*


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a product of two square matrices, 2 size³ each: the median of a second. What a device can do at best.

    size: 8192 on a GPU, 1024 on a CPU, unless given.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    factors = {name: torch.randn(size, size, device=device).to(dtype) for name in ("left", "right")}
    product = Timer("left @ right", globals=factors, num_threads=torch.get_num_threads())
    return 2 * size**3 / product.blocked_autorange(min_run_time=1).median


def flops_per_edit(work: Workload, n: int) -> float:
    """Floating-point operations of one edit among n, as torch's FlopCounterMode counts them while they are done.

    It counts matrix products, forwards and backwards, padding included: 2 (rows · d_in · d_out) each.
    """
    requests = work.some(0, n)
    work.edit(requests[:1])  # the first edit of a model also tries whether it can be replayed
    with FlopCounterMode(display=False) as counter:
        work.edit(requests)
    return counter.get_total_flops() / n


def time_by_operation(work: Workload, n: int = 8) -> pd.DataFrame:
    """Where an edit's time goes, of the plain loop (one edit) and of replay (n edits), by torch's profiler.

    Columns: path, n, part, seconds_per_edit (the share of what an edit takes when no profiler runs), share.
    Parts, none of which contains another: "backward", all of the backward passes; and of all else, by what torch does,
    "matrix products" (of the blocks and the output head), "attention" (where the model leaves it to torch), "softmax"
    (over the vocabulary), "memory moves" (copies, indexing, filling), "other operations" (norms, activations, the loss,
    Adam, views); and "outside torch": tokenizing and Python, but also the profiler's own work, which the many small
    operations of the plain loop make much of, and on a GPU, of which the device's time is taken, its idle time.
    """
    work.edit(work.some(0, 1))
    # The plain loop's texts go one by one, its steps are alike, and each makes many thousand events: some will do.
    steps = {"v_num_grad_steps": min(FEW_STEPS, work.parameters.v_num_grad_steps)}
    few = dataclasses.replace(work, context_templates=work.context_templates[::10], hparams={**work.hparams, **steps})
    tasks = [
        ("plain", work.some(0, 1), work.edit_plainly, few.edit_plainly),
        ("replay", work.some(0, n), work.edit, work.edit),
    ]
    rows, device = [], work.lm.device
    for path, requests, edit, profiled in tasks:
        with Meter(device) as alone:
            edit(requests)
        with profile() as profiler, Meter(device) as observed:
            profiled(requests)
        spent = time_by_part(profiler.events(), on_gpu=device.type == "cuda")
        spent["outside torch"] = observed.seconds - sum(spent.values())
        del profiler
        gc.collect()  # its events, by the hundred thousand, which every later collection would go through
        for part, seconds in spent.items():
            about = {"path": path, "n": len(requests), "part": part}
            share = seconds / observed.seconds
            rows.append({**about, "seconds_per_edit": share * alone.seconds / len(requests), "share": share})
    return pd.DataFrame(rows)


def time_by_part(events: Sequence[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """The seconds of each part: what every operation spends itself, not in others that it calls."""
    spent = dict.fromkeys([*PARTS, OTHER], 0.0)
    outermost = [event for event in events if event.device_type == DeviceType.CPU and not event.cpu_parent]
    calls = [(event, OTHER) for event in outermost]
    while calls:
        event, part = calls.pop()
        if part == OTHER:
            part = next((name for name, names in PARTS.items() if re.fullmatch(names, event.name)), OTHER)
        spent[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
        calls += [(called, part) for called in event.cpu_children]
    return spent
