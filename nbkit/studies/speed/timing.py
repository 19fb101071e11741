"""The measurements, each a function that returns its rows."""

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch

from nbkit.keys.moments import second_moments
from nbkit.methods.verbs import edit
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import free_memory
from nbkit.models.shapes import matmul_precision
from nbkit.records.bars import steps
from nbkit.records.requests import EditRequest
from nbkit.studies.speed.meter import Meter
from nbkit.studies.speed.operations import flops_per_edit, matmul_rate
from nbkit.studies.speed.tables import fastest
from nbkit.studies.speed.workloads import Workload, whole_passes


def editing(work: Workload, sizes: Sequence[int] = (1, 8, 64), repeats: int = 3, n_plain: int = 1) -> pd.DataFrame:
    """Rows of "edit" and, where there are texts, "edit and evaluate", by all three paths, taken in turn in each repeat.

    sizes: how many edits are asked for together; how many of them share a batch is for memory to say. n_plain: edits
    that the plain loop and the whole passes (one edit at a time) make in a repeat. All paths of a repeat begin with the
    same request. What is done once a model is done before, off the clock.
    """
    _edited(work, "replay", 1, 0, work.some(0, 1))
    rows = []
    ways = [("plain", 1), ("whole passes", 1), *(("replay", n) for n in sizes)]
    turns = [(repeat, *way) for repeat in range(repeats) for way in ways]
    for repeat, path, n in steps(turns, f"{work.lm.title}: edits against the clock", "measurement"):
        rows += _edited(work, path, n, repeat, work.some(repeat * n_plain, n * -(-n_plain // n)))
    return pd.DataFrame(rows)


def _edited(work: Workload, path: str, n: int, repeat: int, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    plainly = path == "plain"
    edit_some, evaluate = (work.edit_plainly, work.evaluate_plainly) if plainly else (work.edit, work.evaluate)
    of_edit, of_rest, n_steps = Meter(work.lm.device), Meter(work.lm.device), []
    with whole_passes(work.lm) if path == "whole passes" else nullcontext():
        for start in range(0, len(requests), n):
            some = requests[start : start + n]
            with of_edit:
                edits = edit_some(some)
            if work.texts:
                with of_rest:
                    evaluate(some, edits)
            n_steps += [len(made.info["losses"]) for made in edits]
    about = {"n": n, "repeat": repeat, "items": len(requests), "n_steps": float(np.mean(n_steps))}
    rows = [_row(work.lm, "edit", path, [of_edit], **about)]
    if work.texts:
        rows.append(_row(work.lm, "edit and evaluate", path, [of_edit, of_rest], **about))
    return rows


def screening(work: Workload, n: int, repeats: int = 3) -> pd.DataFrame:
    """Rows of "screen": `collapse_risk` of n requests in one call."""
    work.screen(work.some(0, 1))
    rows = []
    for repeat in steps(range(repeats), f"{work.lm.title}: screening against the clock", "repeat"):
        requests = work.some(repeat * n, n)
        with Meter(work.lm.device) as meter:
            work.screen(requests)
        rows.append(_row(work.lm, "screen", "replay", [meter], n=n, repeat=repeat, items=n))
    return pd.DataFrame(rows)


def growth(work: Workload, n_requests: int, batch: int) -> pd.DataFrame:
    """Rows of "growth": requests edited, evaluated and dropped in batches, as a study does it; n counts those done.

    One row a batch. `growing` sums them up.
    """
    _edited(work, "replay", 1, 0, work.some(0, 1))
    rows, starts = [], range(0, n_requests, batch)
    for repeat, start in enumerate(steps(starts, f"{work.lm.title}: growth of the cost", "batch")):
        requests = work.some(start, min(batch, n_requests - start))
        *_, whole = _edited(work, "replay", len(requests), repeat, requests)
        rows.append(whole | {"what": "growth", "n": start + len(requests)})
    return pd.DataFrame(rows)


def reading(lm: LanguageModel, texts: Sequence[str], n_tokens: int, layer: int, repeats: int = 3) -> pd.DataFrame:
    """Rows of "second moment", the items being tokens: of one layer, and of all in one pass; n is how many layers.

    All are as many as half of the free memory has room for: each holds a float64 matrix of (d_mlp, d_mlp).
    """
    most = max(1, int(free_memory(lm.device) / 2 / (8 * lm.d_mlp**2)))
    choices = {"one layer": [layer], "all layers": list(range(min(most, lm.n_layers)))}
    second_moments(lm, choices["all layers"], texts, min(n_tokens, 1000), progress=False)
    rows = []
    for repeat in steps(range(repeats), f"{lm.title}: second moments against the clock", "repeat"):
        for path, layers in choices.items():
            with Meter(lm.device) as meter:
                second_moments(lm, layers, texts, n_tokens, progress=False)
            rows.append(_row(lm, "second moment", path, [meter], n=len(layers), repeat=repeat, items=n_tokens))
    return pd.DataFrame(rows)


def of_shape(
    work: Workload,
    precision: str,
    moment_texts: Sequence[str],
    sizes: Sequence[int],
    repeats: int,
    n_requests: int,
    n_tokens: int,
) -> pd.DataFrame:
    """All rows of a model in one precision, with columns `flops_per_edit` and `matmul_rate`; see `by_shape`.

    n_requests are screened, and are edited and evaluated in batches of the fastest of the sizes.
    """
    lm = work.lm
    with matmul_precision(precision):
        rows = [editing(work, sizes, repeats)]
        best = fastest(rows[0])
        rows += [
            screening(work, n_requests, repeats),
            growth(work, n_requests, best),
            reading(lm, moment_texts, n_tokens, work.parameters.layer, repeats),
        ]
        flops, rate = flops_per_edit(work, best), matmul_rate(lm.device, lm.dtype)
    return pd.concat(rows, ignore_index=True).assign(flops_per_edit=flops, matmul_rate=rate)


def cost(lm: LanguageModel, requests: Sequence[EditRequest], **arguments: Any) -> dict[str, float]:
    """What independent edits cost, made together: seconds_per_edit, and extra_memory in bytes, the most held at once
    above what was held before.

    arguments: of `nbkit.edit`. One edit is made before the clock starts, so what is computed once a model is left out.
    """
    edit(lm, requests[:1], progress=False, **arguments)
    gc.collect()
    with Meter(lm.device) as meter:
        edit(lm, requests, progress=False, **arguments)
    return {"seconds_per_edit": meter.seconds / len(requests), "extra_memory": float(meter.extra_memory)}


def _row(
    lm: LanguageModel, what: str, path: str, meters: Sequence[Meter], n: int, repeat: int, items: int,
    n_steps: float = float("nan"),
) -> dict[str, Any]:  # fmt: skip
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    exact = lm.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "what": what, "path": path, "model": lm.name, "device": device,
        "dtype": str(lm.dtype).removeprefix("torch.") if exact else "tf32", "threads": torch.get_num_threads(),
        "n": n, "repeat": repeat, "items": items, "seconds_per_item": sum(meter.seconds for meter in meters) / items,
        "peak_memory": max(meter.peak_memory for meter in meters), "n_steps": n_steps,
    }  # fmt: skip
