"""How long edits take, and how long they would take without the fast engine: measured in one run, as tidy rows.

    work = workload("miniworld-gpt2", requests, nbkit.context_templates(lm), texts)
    rows = pd.concat([editing(work, sizes=[1, 8, 64]), screening(work, n=64)])
    ratios(rows)                                    # how many times faster than the plain loop, with the spread

Three paths do the same work:

| path         | how                                                                                               |
|--------------|---------------------------------------------------------------------------------------------------|
| plain        | the papers' formulae, one text at a time through the whole model: nbkit/plain, the   |
|              | oracles that the engine is tested against                         |
| whole passes | nbkit without its replay: the prompts of an edit in one batch, all layers, all tokens             |
| replay       | nbkit as it is                                                                                    |

A row is one measurement: what ("edit", "edit and evaluate", "screen", "second moment", "growth"), path, model, device,
dtype, threads, n (items asked for together), repeat, items (that the clock ran over), seconds_per_item (wall time, the
device's work done), peak_memory (bytes: of the process on a CPU, allocated by torch on a GPU), n_steps (of the search
for v*, mean). Times differ from run to run, so nothing of this is stored, and no stored result depends on it.
"""

import functools
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError
from nbkit.keys.moments import second_moments
from nbkit.methods import rome
from nbkit.methods.values import edits_at_once, value_job
from nbkit.methods.verbs import edit, hyper_parameters
from nbkit.models import replay
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import load
from nbkit.models.memory import free_memory
from nbkit.models.shapes import PRECISIONS, SHAPES, matmul_precision, random_model
from nbkit.plain import metrics as plain_metrics
from nbkit.plain import rome as plain_rome
from nbkit.records.requests import EditRequest
from nbkit.studies import metrics
from nbkit.studies.risk import collapse_risk

COUNTERFACT = 21_919  # requests in CounterFact, which results are extrapolated to
SAMPLE_SECONDS = 0.01  # between two looks at a process' memory
SETTING = ["model", "device", "dtype", "threads"]  # what two rows must share to be compared
AGAINST = {"screen": "edit"}  # what of the plain path a row is compared to, if not the same


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model, the requests it is edited with (taken in turn, from the first again when there are too few), and texts.

    hparams: of ROME, as in `nbkit.edit`. No second moment is used.
    """

    lm: LanguageModel
    requests: Sequence[EditRequest]
    context_templates: Sequence[str]
    texts: Sequence[str] = ()
    hparams: Mapping[str, Any] = field(default_factory=dict)

    def some(self, start: int, n: int) -> list[EditRequest]:
        """n requests from number `start` on."""
        return [self.requests[place % len(self.requests)] for place in range(start, start + n)]

    def edit(self, requests: Sequence[EditRequest]) -> list[Edit]:
        return edit(self.lm, requests, "rome", self.context_templates, progress=False, **self.hparams)

    def evaluate(self, requests: Sequence[EditRequest], edits: Sequence[Edit]) -> tuple[np.ndarray, pd.DataFrame]:
        """Perplexity of each edited model, and the metrics of each edit."""
        reference = metrics.neighborhood_tokens(self.lm, requests)
        perplexities = metrics.perplexity(self.lm, self.texts, edits=edits)
        return perplexities, metrics.edit_metrics(self.lm, requests, reference, edits=edits)

    def screen(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        own = {name: self.hparams[name] for name in ("layer", "key_mode") if name in self.hparams}
        return collapse_risk(self.lm, requests, context_templates=self.context_templates, **own)

    def edit_plainly(self, request: EditRequest) -> dict[str, Any]:
        """One edit by the plain loop, see plain/rome.py."""
        p = hyper_parameters(self.lm, "rome", **self.hparams)
        return plain_rome.rome(
            self.lm.model, self.lm.tokenizer, self.lm.projection(p.layer), request.prompt, request.subject,
            request.target_new, list(self.context_templates), key_mode=p.key_mode, lr=p.v_lr,
            steps=p.v_num_grad_steps, weight_decay=p.v_weight_decay, clamp=p.clamp_norm_factor,
            kl_factor=p.kl_factor, early_stop=p.early_stop_loss,
        )  # fmt: skip

    def evaluate_plainly(self, request: EditRequest, made: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        """The same as `evaluate`, of one edit, text by text: see plain/metrics.py."""
        loops, parts = plain_metrics, (self.lm.model, self.lm.tokenizer)
        layer = hyper_parameters(self.lm, "rome", **self.hparams).layer
        reference = loops.neighborhood_tokens(*parts, request)
        with applied(self.lm, Edit({self.lm.weight_name(layer): Dense(made["delta_W"])})):
            return loops.perplexity(*parts, list(self.texts)), loops.edit_metrics(*parts, request, reference)


def workload(
    name: str,
    requests: Sequence[EditRequest],
    context_templates: Sequence[str],
    texts: Sequence[str] = (),
    device: str = "auto",
    precision: str = "float32",
) -> Workload:
    """That of a shape with random weights, or of a model by any name that `nbkit.load` takes, at the layer it has.

    "NAME@LAYER" takes another layer. A random model's loss says nothing, so in a shape no search for v* stops early:
    each takes all of its steps.
    """
    whole, (name, _, layer) = name, name.partition("@")
    if name in SHAPES:
        lm = random_model(name, device, precision)
        hparams = {"layer": SHAPES[name].layer, "early_stop_loss": 0.0}
    else:
        lm, hparams = load(name, device, PRECISIONS[precision][0]), {}
    if layer:
        if not layer.isdecimal():
            raise MethodError(f"{whole!r}: behind the @ stands the number of a layer, not {layer!r}")
        lm.name, hparams = whole, {**hparams, "layer": int(layer)}
    return Workload(lm, requests, context_templates, texts, hparams)


@contextmanager
def whole_passes(lm: LanguageModel) -> Iterator[None]:
    """Within this `with`, the model is taken for one that cannot be replayed: all layers on all tokens."""
    before, lm.replayable = lm.replayable, False
    try:
        yield
    finally:
        lm.replayable = before


def editing(
    work: Workload, sizes: Sequence[int] = (1, 8, 64), repeats: int = 3, n_plain: int = 1, progress: bool = False
) -> pd.DataFrame:
    """Rows of "edit" and, where there are texts, "edit and evaluate", by all three paths, taken in turn in each repeat.

    sizes: how many edits are asked for together; how many of them share a batch is for memory to say. n_plain: edits
    that the plain loop and the whole passes (one edit at a time) make in a repeat. All paths of a repeat begin with the
    same request. What each does first is done once before, off the clock.
    """
    _warm_up(work)
    rows = []
    tasks = [("plain", 1), ("whole passes", 1), *(("replay", n) for n in sizes)]
    with tqdm(total=repeats * len(tasks), desc=work.lm.name, disable=not progress) as bar:
        for repeat in range(repeats):
            for path, n in tasks:
                rows += _edited(work, path, n, repeat, work.some(repeat * n_plain, n * -(-n_plain // n)))
                bar.update()
    return pd.DataFrame(rows)


def _warm_up(work: Workload) -> None:
    request = work.some(0, 1)
    made = work.edit(request)
    if work.texts:
        work.evaluate(request, made)
    plain_metrics.perplexity(work.lm.model, work.lm.tokenizer, [request[0].text])


def _edited(work: Workload, path: str, n: int, repeat: int, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    device, seconds, peaks, steps = work.lm.device, np.zeros(2), np.zeros(2), []
    with whole_passes(work.lm) if path == "whole passes" else nullcontext():
        for start in range(0, len(requests), n):
            some = requests[start : start + n]
            if path == "plain":
                found, *of_edit = measured(lambda some=some: work.edit_plainly(some[0]), device)
                evaluate, made = functools.partial(work.evaluate_plainly, some[0]), found
                steps.append(len(found["losses"]))
            else:
                found, *of_edit = measured(lambda some=some: work.edit(some), device)
                evaluate, made = functools.partial(work.evaluate, some), found
                steps += [len(one.info["losses"]) for one in found]
            of_rest = (0.0, 0)
            if work.texts:
                _, *of_rest = measured(lambda evaluate=evaluate, made=made: evaluate(made), device)
            seconds += of_edit[0], of_rest[0]
            peaks = np.maximum(peaks, [of_edit[1], of_rest[1]])
    about = {"n": n, "repeat": repeat, "items": len(requests), "n_steps": float(np.mean(steps))}
    rows = [_row(work.lm, "edit", path, seconds[0], peaks[0], **about)]
    if work.texts:
        rows.append(_row(work.lm, "edit and evaluate", path, seconds.sum(), peaks.max(), **about))
    return rows


def screening(work: Workload, n: int, repeats: int = 3) -> pd.DataFrame:
    """Rows of "screen": `collapse_risk` of n requests in one call."""
    work.screen(work.some(0, 1))
    rows = []
    for repeat in range(repeats):
        requests = work.some(repeat * n, n)
        _, seconds, peak = measured(lambda requests=requests: work.screen(requests), work.lm.device)
        rows.append(_row(work.lm, "screen", "replay", seconds, peak, n=n, repeat=repeat, items=n))
    return pd.DataFrame(rows)


def cost(lm: LanguageModel, requests: Sequence[EditRequest], **arguments: Any) -> dict[str, float]:
    """What independent edits cost, made together: seconds_per_edit, and extra_memory in bytes, the most held at once
    above what was held before.

    arguments: of `nbkit.edit`. One edit is made before the clock starts, so what is computed once a model is left out.
    """
    edit(lm, requests[:1], progress=False, **arguments)
    gc.collect()
    _, _, before = measured(lambda: None, lm.device)
    _, seconds, peak = measured(lambda: edit(lm, requests, progress=False, **arguments), lm.device)
    return {"seconds_per_edit": seconds / len(requests), "extra_memory": float(max(0, peak - before))}


def growth(work: Workload, n_requests: int, batch: int, progress: bool = False) -> pd.DataFrame:
    """Rows of "growth": requests edited, evaluated and dropped in batches, as a study does it; n counts those done.

    One row a batch. `growing` sums them up.
    """
    _warm_up(work)
    rows = []
    with tqdm(total=n_requests, desc=work.lm.name, unit="edit", disable=not progress) as bar:
        for start in range(0, n_requests, batch):
            requests = work.some(start, min(batch, n_requests - start))
            _, seconds, peak = measured(lambda some=requests: work.evaluate(some, work.edit(some)), work.lm.device)
            about = {"n": start + len(requests), "repeat": start // batch, "items": len(requests)}
            rows.append(_row(work.lm, "growth", "replay", seconds, peak, **about))
            bar.update(len(requests))
    return pd.DataFrame(rows)


def reading(lm: LanguageModel, texts: Sequence[str], n_tokens: int, layer: int, repeats: int = 3) -> pd.DataFrame:
    """Rows of "second moment", the items being tokens: of one layer, and of all in one pass; n is how many layers.

    All are as many as half of the free memory has room for: each holds a float64 matrix of (d_mlp, d_mlp).
    """
    most = max(1, int(free_memory(lm.device) / 2 / (8 * lm.d_mlp**2)))
    choices = {"one layer": [layer], "all layers": list(range(min(most, lm.n_layers)))}
    second_moments(lm, choices["all layers"], texts, min(n_tokens, 1000))
    rows = []
    for repeat in range(repeats):
        for path, layers in choices.items():
            read = functools.partial(second_moments, lm, layers, texts, n_tokens)
            _, seconds, peak = measured(read, lm.device)
            about = {"n": len(layers), "repeat": repeat, "items": n_tokens}
            rows.append(_row(lm, "second moment", path, seconds, peak, **about))
    return pd.DataFrame(rows)


def of_shape(
    shape: str,
    precision: str,
    requests: Sequence[EditRequest],
    context_templates: Sequence[str],
    texts: Sequence[str],
    moment_texts: Sequence[str],
    sizes: Sequence[int],
    repeats: int,
    n_requests: int,
    n_tokens: int,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """All rows of one random model in one precision, with columns `flops_per_edit` and `matmul_rate`; see `by_shape`.

    n_requests are screened, and are edited and evaluated in batches of the fastest of the sizes.
    """
    with matmul_precision(precision):
        work = workload(shape, requests, context_templates, texts, device, precision)
        lm = work.lm
        rows = [editing(work, sizes, repeats, progress=progress)]
        best = _fastest(rows[0])
        rows += [
            screening(work, n_requests, repeats),
            growth(work, n_requests, best, progress),
            reading(lm, moment_texts, n_tokens, SHAPES[shape].layer, repeats),
        ]
        flops, rate = flops_per_edit(work, best), matmul_rate(lm.device, lm.dtype)
    found = pd.concat(rows, ignore_index=True).assign(flops_per_edit=flops, matmul_rate=rate)
    del lm, work
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


# --- the clock -------------------------------------------------------------------------------------------------------


def measured(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What the function returns, the seconds it took until the device had done its work, and peak memory in bytes."""
    with _peak_memory(device) as peak:
        _synchronise(device)
        start = time.perf_counter()
        result = function()
        _synchronise(device)
        seconds = time.perf_counter() - start
    return result, seconds, peak[0]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list whose one number is, after the `with`, the most bytes in use within it."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, stop = psutil.Process(), threading.Event()

    def look() -> None:
        peak[0] = max(peak[0], process.memory_info().rss)

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        look()


def _row(
    lm: LanguageModel, what: str, path: str, seconds: float, peak: float, n: int, repeat: int, items: int,
    n_steps: float = float("nan"),
) -> dict[str, Any]:  # fmt: skip
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    exact = lm.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "what": what, "path": path, "model": lm.name, "device": device,
        "dtype": str(lm.dtype).removeprefix("torch.") if exact else "tf32", "threads": torch.get_num_threads(),
        "n": n, "repeat": repeat, "items": items, "seconds_per_item": seconds / items, "peak_memory": int(peak),
        "n_steps": n_steps,
    }  # fmt: skip


# --- how much work it is, and where the time goes --------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 10) -> float:
    """FLOP/s of a product of two square matrices, 2 size³ each: the median of so many. What a device can do at best.

    size: 8192 on a GPU, 1024 on a CPU, unless given.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [measured(lambda: left @ right, device)[1] for _ in range(repeats + 2)]
    return 2 * size**3 / float(np.median(seconds[2:]))


def side_by_side(work: Workload, n: int) -> int:
    """How many of n edits asked for together share a batch, unless memory runs out: the others come after them."""
    jobs = [value_job(work.lm, request, work.context_templates) for request in work.some(0, n)]
    layer = hyper_parameters(work.lm, "rome", **work.hparams).layer
    return min(n, max(1, edits_at_once(work.lm, jobs, layer)))


def flops_per_edit(work: Workload, n: int) -> float:
    """Floating-point operations of one edit among n, as torch's FlopCounterMode counts them while they are done.

    It counts matrix products, forwards and backwards, padding included: 2 (rows · d_in · d_out) each.
    """
    requests = work.some(0, n)
    work.edit(requests[:1])  # the first edit of a model also tries whether it can be replayed
    with FlopCounterMode(display=False) as counter:
        work.edit(requests)
    return counter.get_total_flops() / n


def time_shares(work: Workload, n: int = 8) -> pd.DataFrame:
    """Where an edit's time goes, of the plain loop (one edit) and of replay (n edits).

    Columns: path, n, part, seconds_per_edit, share.
    Parts, none of which contains another: "tokenizing" (and, in replay, arranging rows); "first pass" (prefixes, keys,
    values, what attention reads later; the plain loop's keys are in "forward"); "forward", of the steps; "output head",
    its matrix product; "softmax"; "backward", of all of them; "rest" (loss, Adam, the closed form, bookkeeping).
    """
    work.edit(work.some(0, 1))
    requests = work.some(0, n)
    tasks = {
        ("plain", 1): lambda: work.edit_plainly(requests[0]),
        ("replay", n): lambda: work.edit(requests),
    }
    rows = []
    for (path, n_edits), run in tasks.items():
        with _stopwatch(_parts(work.lm), work.lm.device) as seconds:
            run()
        total = sum(seconds.values())
        for part in dict.fromkeys([name for name, *_ in _parts(work.lm)] + ["rest"]):
            about = {"path": path, "n": n_edits, "part": part}
            rows.append({**about, "seconds_per_edit": seconds[part] / n_edits, "share": seconds[part] / total})
    return pd.DataFrame(rows)


def _parts(lm: LanguageModel) -> list[tuple[str, Any, str]]:
    """Names of parts, each with a function whose time it is: the owner and the function's name there."""
    return [
        ("tokenizing", type(lm.tokenizer), "__call__"),
        ("tokenizing", rome, "value_job"),
        ("first pass", replay.Prefixes, "__init__"),
        ("first pass", replay.Replay, "__init__"),
        ("forward", replay.Replay, "logits"),
        ("forward", plain_rome, "run"),
        ("output head", lm.model.get_output_embeddings(), "forward"),
        ("softmax", torch.Tensor, "log_softmax"),
        ("backward", torch.Tensor, "backward"),
    ]


@contextmanager
def _stopwatch(parts: Sequence[tuple[str, Any, str]], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in each of the parts while the `with` lasts, less those of parts called from it; else "rest"."""
    seconds: dict[str, float] = defaultdict(float)
    running, since = ["rest"], [time.perf_counter()]

    def note() -> None:
        _synchronise(device)
        now = time.perf_counter()
        seconds[running[-1]] += now - since[0]
        since[0] = now

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            note()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                note()
                running.pop()

        return call

    with ExitStack() as stack:
        for name, owner, attribute in parts:
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        since[0] = time.perf_counter()
        yield seconds
        note()


# --- tables ----------------------------------------------------------------------------------------------------------


def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """How many times faster than the plain loop: one row per setting, what, path and n, of rows measured in one run.

    Compared are the measurements of the same repeat. Columns: repeats, seconds_per_item (median), ratio (median), low
    and high (least and largest).
    """
    frame = frame.assign(against=frame["what"].replace(AGAINST))
    baseline = frame[frame["path"] == "plain"].set_index([*SETTING, "what", "repeat"])["seconds_per_item"]
    baseline.index.names = [*SETTING, "against", "repeat"]
    others = frame[frame["path"] != "plain"].join(
        baseline.rename("plain_seconds"), on=[*SETTING, "against", "repeat"], how="inner"
    )
    others["ratio"] = others["plain_seconds"] / others["seconds_per_item"]
    by = others.groupby([*SETTING, "what", "path", "n"], sort=False)
    return by.agg(
        repeats=("ratio", "size"), seconds_per_item=("seconds_per_item", "median"), ratio=("ratio", "median"),
        low=("ratio", "min"), high=("ratio", "max"),
    ).reset_index()  # fmt: skip


def growing(frame: pd.DataFrame, at: Sequence[int] = (100, 200, 500, 1000, 2000, 5000)) -> pd.DataFrame:
    """Rows of `growth` summed up at the first batches that reach so many requests, and at the last.

    Columns: n, seconds_per_item (mean over the requests so far), relative (that, over the first row's), batch_seconds
    (the same of the batches since the row before), peak_memory (so far, bytes).
    """
    frame = frame.sort_values("n")
    seconds, items = (frame["seconds_per_item"] * frame["items"]).cumsum(), frame["items"].cumsum()
    n, last = frame["n"].to_numpy(), int(frame["n"].max())
    places = sorted({int(np.searchsorted(n, goal)) for goal in [*(goal for goal in at if goal <= last), last]})
    seconds, items = seconds.to_numpy()[places], items.to_numpy()[places]
    table = pd.DataFrame({"n": n[places], "seconds_per_item": seconds / items})
    table["relative"] = table["seconds_per_item"] / table["seconds_per_item"].iloc[0]
    table["batch_seconds"] = np.diff(seconds, prepend=0) / np.diff(items, prepend=0)
    table["peak_memory"] = frame["peak_memory"].cummax().to_numpy()[places]
    return table


def by_shape(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per model and precision from the rows of `of_shape`; medians over the repeats.

    Columns: edits_per_second_plain, _whole (whole passes), _replay (at the best n), n, ratio (replay to plain),
    tflops_per_edit, matmul_tflops (per second, measured), matmul_fraction (of that rate, which replay reaches),
    peak_gib (of all but second moments), tokens_per_second (second moments, of moment_layers at once),
    screened_per_second, and for the 21,919 requests of CounterFact, extrapolated: screen_minutes, edit_minutes (with
    evaluation).
    """
    rows = []
    for (model, dtype), group in frame.groupby(["model", "dtype"], sort=False):
        seconds = group.groupby(["what", "path", "n"])["seconds_per_item"].median()
        best = _fastest(group)
        alone, whole, together = (seconds["edit", *at] for at in (("plain", 1), ("whole passes", 1), ("replay", best)))
        flops, rate = group["flops_per_edit"].iloc[0], group["matmul_rate"].iloc[0]
        study = growing(group[group["what"] == "growth"])["seconds_per_item"].iloc[-1]
        screen, moments = float(seconds["screen"].iloc[0]), seconds["second moment", "all layers"]
        peak = group.loc[group["what"] != "second moment", "peak_memory"].max()
        rows.append({
            "model": model, "dtype": dtype, "edits_per_second_plain": 1 / alone, "edits_per_second_whole": 1 / whole,
            "edits_per_second_replay": 1 / together, "n": best, "ratio": alone / together,
            "tflops_per_edit": flops / 1e12, "matmul_tflops": rate / 1e12,
            "matmul_fraction": flops / together / rate, "peak_gib": peak / 2**30,
            "tokens_per_second": 1 / float(moments.iloc[0]), "moment_layers": int(moments.index[0]),
            "screened_per_second": 1 / screen, "screen_minutes": COUNTERFACT * screen / 60,
            "edit_minutes": COUNTERFACT * study / 60,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _fastest(frame: pd.DataFrame) -> int:
    """The number of edits asked for together at which replay needs the least time for each."""
    edits = frame[(frame["what"] == "edit") & (frame["path"] == "replay")]
    return int(edits.groupby("n")["seconds_per_item"].median().idxmin())
