"""What is timed is the same work on every path, and the arithmetic over the times. No test asserts a speed."""

import math
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import CONTEXT, D_MLP, D_MODEL, N_LAYERS
from torch.utils import benchmark

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError, ModelError
from nbkit.methods import values
from nbkit.models import shapes
from nbkit.models.memory import free_memory
from nbkit.plain import metrics as plain_metrics
from nbkit.records.requests import EditRequest
from nbkit.studies import speed
from nbkit.studies.metrics import edit_metrics, neighborhood_tokens, perplexity
from nbkit.studies.speed import Workload, operations, timing
from nbkit.studies.speed.meter import Meter

PARTS = ["backward", "matrix products", "attention", "softmax", "memory moves", "other operations", "outside torch"]
STEPS = {"layer": 1, "v_num_grad_steps": 3, "v_lr": 0.1}
ROW = ["what", "path", "model", "device", "dtype", "threads", "n", "repeat", "items", "seconds_per_item",
       "peak_memory", "n_steps"]  # fmt: skip


@pytest.fixture
def asked():
    """Requests with all, with some and with none of what metrics are measured by."""
    return [
        EditRequest("{} is located in", "Vouda", "Sennifar", "Krela", case_id=0,
                    paraphrase_prompts=("The river runs through", "You was born in"),
                    neighborhood_prompts=("The capital of Krela is", "Ann plays the"),
                    neighborhood_targets=("Sennifar", "drum song")),
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "the song", case_id=1,
                    paraphrase_prompts=("Because Ann plays",)),
        EditRequest("{} plays the", "Ann", "drum", "harp", case_id=2),
    ]  # fmt: skip


@pytest.fixture
def work(tiny, asked, contexts, texts):
    return Workload(tiny, asked, contexts, texts, STEPS)


def random_edit(lm):
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(lm.d_model, 1, generator=generator, dtype=torch.float64) * 0.1
    return Edit({lm.weight_name(1): LowRank(left, torch.randn(1, lm.d_mlp, generator=generator, dtype=torch.float64))})


# --- the plain loops --------------------------------------------------------------------------------------------------


def test_metrics_equal_the_plain_loops(lm, asked, texts, tolerance):
    parts, edits = (lm.model, lm.tokenizer), [random_edit(lm) for _ in asked]
    reference = neighborhood_tokens(lm, asked)
    by_hand = [plain_metrics.neighborhood_tokens(*parts, request) for request in asked]
    assert [list(map(list, reference[request])) for request in asked] == by_hand
    with applied(lm, edits[0]):
        expected = plain_metrics.perplexity(*parts, texts)
        rows = [plain_metrics.edit_metrics(*parts, *pair) for pair in zip(asked, by_hand, strict=True)]
        here = edit_metrics(lm, asked, reference)
        assert perplexity(lm, texts) == pytest.approx(expected, rel=10 * tolerance)
    found = edit_metrics(lm, asked, reference, edits=edits)
    for frame in (here, found):
        pd.testing.assert_frame_equal(
            frame[list(rows[0])], pd.DataFrame(rows), rtol=100 * tolerance, check_exact=False, check_dtype=False
        )
    assert found.drop(columns="case_id").columns.tolist() == sorted(rows[0], key=list(found.columns).index)
    np.testing.assert_allclose(perplexity(lm, texts, edits=edits), expected, rtol=100 * tolerance)


def test_the_plain_path_of_a_workload_does_what_the_engine_does(work):
    requests = work.some(0, 3)
    edits = work.edit(requests)
    perplexities, table = work.evaluate(requests, edits)
    plain = work.edit_plainly(requests)
    alone, rows = work.evaluate_plainly(requests, plain)
    assert len(plain) == len(alone) == len(rows) == 3
    for place, (one, other) in enumerate(zip(plain, edits, strict=True)):
        assert one.request == other.request == requests[place] and list(one.deltas) == list(other.deltas)
        deltas = [next(iter(edit.deltas.values())).dense() for edit in (one, other)]
        assert torch.allclose(*deltas, rtol=1e-8, atol=1e-12)
        assert len(one.info["losses"]) == len(other.info["losses"]) == 3
        assert alone[place] == pytest.approx(perplexities[place])
        for name, value in rows[place].items():
            assert value == pytest.approx(table[name][place], nan_ok=True), name


def test_whole_passes_do_the_same_and_end_with_the_with(work, monkeypatch):
    requests = work.some(0, 2)
    expected = work.edit(requests)
    read = []
    monkeypatch.setattr("nbkit.models.replay.Replay", lambda *_, **__: read.append("replay"))
    with speed.whole_passes(work.lm):
        found = work.edit(requests)
        perplexities, _ = work.evaluate(requests, found)
    assert not read
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(*(next(iter(edit.deltas.values())).dense() for edit in (one, other)), rtol=1e-8)
    np.testing.assert_allclose(perplexities, work.evaluate(requests, expected)[0])
    with pytest.raises(AttributeError):
        work.edit(requests)
    assert read == ["replay"]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_requests_are_taken_in_turn(work):
    assert [request.case_id for request in work.some(2, 5)] == [2, 0, 1, 2, 0]


def test_every_path_has_a_row_per_repeat_and_size(work):
    frame = speed.editing(work, sizes=[1, 4], repeats=2, n_plain=2)
    assert frame.columns.tolist() == ROW
    counts = frame.groupby(["what", "path", "n", "items"]).size()
    for what in ("edit", "edit and evaluate"):
        assert counts[what].to_dict() == {
            ("plain", 1, 2): 2, ("replay", 1, 2): 2, ("replay", 4, 4): 2, ("whole passes", 1, 2): 2
        }  # fmt: skip
    assert (frame["seconds_per_item"] > 0).all() and (frame["n_steps"] == 3).all()
    assert set(frame["dtype"]) == {"float64"} and set(frame["device"]) == {"cpu"}
    assert set(frame["threads"]) == {torch.get_num_threads()}
    parts = frame.set_index(["what", "path", "n", "repeat"])["seconds_per_item"]
    assert (parts["edit and evaluate"] > parts["edit"]).all()


def test_without_texts_edits_alone_are_timed(tiny, asked, contexts):
    frame = speed.editing(Workload(tiny, asked, contexts, hparams=STEPS), sizes=[1], repeats=1)
    assert set(frame["what"]) == {"edit"}


def test_screening_growth_and_reading_count_what_they_did(work, tiny, texts, monkeypatch):
    screened = speed.screening(work, n=5, repeats=2)
    assert screened[["what", "n", "items", "repeat"]].values.tolist() == [["screen", 5, 5, 0], ["screen", 5, 5, 1]]
    grown = speed.growth(work, n_requests=5, batch=2)
    assert grown[["n", "items"]].values.tolist() == [[2, 2], [4, 2], [5, 1]]
    read = speed.reading(tiny, texts, n_tokens=40, layer=1, repeats=1)
    assert read[["path", "n", "items"]].values.tolist() == [["one layer", 1, 40], ["all layers", N_LAYERS, 40]]
    monkeypatch.setattr(timing, "free_memory", lambda device: 2 * 2 * 8 * D_MLP**2)
    read = speed.reading(tiny, texts, n_tokens=40, layer=1, repeats=1)
    assert read["n"].tolist() == [1, 2], "as many layers as half of the memory takes"
    for frame in (screened, grown, read):
        assert frame.columns.tolist() == ROW and (frame["peak_memory"] > 2**20).all()


def test_a_meter_adds_up_seconds_and_sees_the_peak_in_between():
    meter = Meter(torch.device("cpu"))
    with meter:
        held = torch.ones(2**25)  # 128 MiB, every page written
        assert held[:3].tolist() == [1.0] * 3
        del held
    seconds, peak, extra = meter.seconds, meter.peak_memory, meter.extra_memory
    assert seconds > 0 and peak > 2**27 and 2**26 < extra < peak
    with meter:
        time.sleep(0.02)
    assert meter.seconds >= seconds + 0.02
    assert meter.peak_memory == peak and meter.extra_memory == extra


def test_a_meter_ends_with_an_exception():
    threads = threading.active_count()
    with pytest.raises(KeyError), Meter(torch.device("cpu")) as meter:
        raise KeyError
    assert threading.active_count() == threads and meter.seconds > 0


def test_rows_name_the_precision(work):
    single, meter = work.lm, Meter(work.lm.device)
    single.model.float()
    with shapes.matmul_precision("tf32"):
        assert timing._row(single, "edit", "replay", [meter], n=1, repeat=0, items=1)["dtype"] == "tf32"
    assert timing._row(single, "edit", "replay", [meter], n=1, repeat=0, items=1)["dtype"] == "float32"
    assert torch.get_float32_matmul_precision() == "highest"


# --- arithmetic -------------------------------------------------------------------------------------------------------


def frame_of(*rows):
    """Rows of (what, path, n, repeat, seconds_per_item)."""
    frame = pd.DataFrame(rows, columns=["what", "path", "n", "repeat", "seconds_per_item"])
    return frame.assign(model="tiny", device="cpu", dtype="float32", threads=1, items=frame["n"], peak_memory=2**30)


def test_ratios_compare_within_a_repeat_and_setting():
    frame = frame_of(
        ("edit", "plain", 1, 0, 2.0), ("edit", "plain", 1, 1, 4.0), ("edit", "plain", 1, 2, 3.0),
        ("edit", "replay", 8, 0, 0.2), ("edit", "replay", 8, 1, 0.2), ("edit", "replay", 8, 2, 0.1),
        ("edit and evaluate", "plain", 1, 0, 3.0), ("edit and evaluate", "replay", 8, 0, 0.5),
        ("screen", "replay", 64, 0, 0.01), ("screen", "replay", 64, 1, 0.01),
        ("second moment", "all layers", 3, 0, 1e-5),
    )  # fmt: skip
    other = frame[:4].assign(model="other", seconds_per_item=1.0)
    table = speed.ratios(pd.concat([frame, other])).set_index(["model", "what", "path", "n"])
    assert list(table.index.get_level_values("what")) == ["edit", "edit and evaluate", "screen", "edit"]
    found = table.loc["tiny", "edit", "replay", 8]
    assert found[["repeats", "seconds_per_item"]].tolist() == [3, 0.2]
    np.testing.assert_allclose(found[["ratio", "low", "high"]].astype(float), [20, 10, 30])
    np.testing.assert_allclose(table.loc["tiny", "screen", "replay", 64]["ratio"], 300)
    assert table.loc["tiny", "edit and evaluate", "replay", 8]["ratio"] == 6
    assert table.loc["other", "edit", "replay", 8]["ratio"] == 1


def test_ratios_over_whole_passes_leave_the_plain_loop_out():
    frame = frame_of(
        ("edit", "plain", 1, 0, 9.0), ("edit", "whole passes", 1, 0, 2.0), ("edit", "whole passes", 1, 1, 3.0),
        ("edit", "replay", 8, 0, 0.5), ("edit", "replay", 8, 1, 0.5),
    )  # fmt: skip
    table = speed.ratios(frame, over="whole passes")
    assert table["path"].tolist() == ["replay"]
    np.testing.assert_allclose(table[["ratio", "low", "high"]].iloc[0].astype(float), [5, 4, 6])
    assert speed.ratios(frame)["path"].tolist() == ["whole passes", "replay"]


def test_growth_is_summed_over_requests():
    frame = frame_of(*(("growth", "replay", n, 0, seconds) for n, seconds in [(64, 1.0), (128, 2.0), (160, 4.0)]))
    frame["items"], frame["peak_memory"] = [64, 64, 32], [3, 2, 5]
    table = speed.growing(frame, at=[50, 100, 5000])
    assert table["n"].tolist() == [64, 128, 160]
    np.testing.assert_allclose(table["seconds_per_item"], [1.0, 1.5, 2.0])
    np.testing.assert_allclose(table["relative"], [1.0, 1.5, 2.0])
    np.testing.assert_allclose(table["batch_seconds"], [1.0, 2.0, 4.0])
    assert table["peak_memory"].tolist() == [3, 3, 5]


def test_shapes_are_summed_up_by_formula():
    frame = frame_of(
        ("edit", "plain", 1, 0, 10.0), ("edit", "whole passes", 1, 0, 2.0), ("edit", "replay", 1, 0, 1.0),
        ("edit", "replay", 64, 0, 0.1), ("edit", "replay", 512, 0, 0.2), ("screen", "replay", 2000, 0, 0.001),
        ("growth", "replay", 64, 0, 0.3), ("second moment", "one layer", 1, 0, 1.0),
        ("second moment", "all layers", 3, 0, 1e-4),
    ).assign(flops_per_edit=2e12, matmul_rate=4e13)  # fmt: skip
    frame.loc[frame["what"] == "second moment", "peak_memory"] = 2**40
    (row,) = speed.by_shape(frame).to_dict("records")
    expected = {
        "model": "tiny", "dtype": "float32", "edits_per_second_plain": 0.1, "edits_per_second_whole": 0.5,
        "edits_per_second_replay": 10, "n": 64, "ratio": 100, "tflops_per_edit": 2, "matmul_tflops": 40,
        "matmul_fraction": 0.5, "peak_gib": 1, "tokens_per_second": 1e4, "moment_layers": 3,
        "screened_per_second": 1000, "screen_minutes": 21919 * 0.001 / 60, "edit_minutes": 21919 * 0.3 / 60,
    }  # fmt: skip
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_the_rate_of_products_is_two_size_cubed_over_the_median(monkeypatch):
    runs = benchmark.Measurement(number_per_run=2, raw_times=[1.0, 4.0, 2.0], task_spec=benchmark.TaskSpec("", ""))
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda *_, **__: runs)
    assert speed.matmul_rate(torch.device("cpu"), torch.float32, size=10) == 2 * 10**3 / 1.0


def test_the_rate_of_products_is_measured():
    assert 1e6 < speed.matmul_rate(torch.device("cpu"), torch.float64, size=100) < 1e15


def test_operations_grow_with_the_steps(tiny, asked, contexts):
    def flops(steps, n=2):
        hparams = {**STEPS, "v_num_grad_steps": steps}
        return speed.flops_per_edit(Workload(tiny, asked, contexts, hparams=hparams), n)

    one, two, three = (flops(steps) for steps in (1, 2, 3))
    assert 0 < one < two and three - two == pytest.approx(two - one)


def test_shares_are_of_the_whole_and_leave_no_trace(work):
    before = {name: parameter.clone() for name, parameter in work.lm.model.named_parameters()}
    frame = speed.time_by_operation(work, n=2)
    assert frame.groupby(["path", "n"])["share"].sum().to_dict() == pytest.approx({("plain", 1): 1, ("replay", 2): 1})
    shares = frame.set_index(["path", "part"])["share"]
    for path in ("plain", "replay"):
        assert shares[path].index.tolist() == PARTS and (shares[path] > 0).all()
    assert not torch.autograd._profiler_enabled()
    assert all(torch.equal(parameter, before[name]) for name, parameter in work.lm.model.named_parameters())


def test_an_operation_counts_where_it_is_called_from_and_once():
    """A small tree of calls: (name, microseconds in all, what it calls)."""

    def call(name, total, *called, kind=torch.autograd.DeviceType.CPU):
        own = total - sum(other.total for other in called)
        return SimpleNamespace(name=name, total=total, self_cpu_time_total=own, device_type=kind, cpu_parent=None,
                               cpu_children=called)  # fmt: skip

    calls = [
        call("aten::linear", 20, call("aten::t", 2), call("aten::addmm", 15, call("aten::copy_", 3))),
        call("aten::scaled_dot_product_attention", 30, call("aten::bmm", 20), call("aten::softmax", 5)),
        call("autograd::engine::evaluate_function: MmBackward0", 25, call("MmBackward0", 20, call("aten::mm", 18))),
        call("aten::log_softmax", 4), call("aten::index_select", 6), call("aten::gelu", 5),
        call("a kernel", 1000, kind=torch.autograd.DeviceType.CUDA),
    ]  # fmt: skip
    seconds = operations.time_by_part(calls, on_gpu=False)
    assert {part: round(spent * 1e6) for part, spent in seconds.items()} == {
        "backward": 25, "matrix products": 15, "attention": 30, "softmax": 4, "memory moves": 6, "other operations": 10
    }  # fmt: skip


def test_no_more_edits_run_side_by_side_than_memory_takes(work, monkeypatch):
    assert speed.edits_in_a_batch(work, 3) == 3
    monkeypatch.setattr(values, "budget", lambda _device: 1)
    assert speed.edits_in_a_batch(work, 3) == 1


# --- models of a shape ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("gpt2-6x256", 5.59), ("gpt2-xl", 1557.6), ("gpt-j-6b", 6050.9), ("llama-2-7b", 6738.4), ("llama-3-8b", 8030.3)],
)
def test_shapes_have_the_published_numbers_of_parameters(shape, millions):
    assert shapes.n_parameters(shape) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_random_model_is_the_same_for_a_seed_and_has_its_shapes_name():
    lm, same, other = (shapes.random_model("gpt2-6x256", "cpu", seed=seed) for seed in (0, 0, 1))
    assert (lm.name, lm.n_layers, lm.d_model, lm.dtype) == ("gpt2-6x256", 6, 256, torch.float32)
    assert torch.equal(lm.weight(2), same.weight(2)) and not torch.equal(lm.weight(2), other.weight(2))
    assert shapes.random_model("gpt2-6x256", "cpu", "bfloat16").dtype == torch.bfloat16


def test_what_cannot_be_measured_is_refused_at_the_door(monkeypatch):
    with pytest.raises(ModelError, match="unknown shape 'gpt5'; known: gpt2-6x256"):
        shapes.check_shapes(["gpt2-6x256", "gpt5"], ["float32"], "cpu")
    with pytest.raises(ModelError, match="unknown precision 'float8'; known: float32"):
        shapes.check_shapes(["gpt2-6x256"], ["float8"], "cpu")
    monkeypatch.setattr(shapes, "free_memory", lambda device: min(free_memory(device), 2**34))
    with pytest.raises(ModelError, match="llama-3-8b in float32 takes 29.9 GiB .* choose bfloat16"):
        shapes.check_shapes(["llama-3-8b"], ["float32"], "cpu")


@pytest.mark.parametrize("precision", list(shapes.PRECISIONS))
def test_a_shape_is_measured_whole(precision, monkeypatch, asked, contexts, texts):
    sizes = {"n_layer": N_LAYERS, "n_embd": D_MODEL, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 3072}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape(transformers.GPT2Config, sizes, layer=1))
    work = speed.workload("tiny", asked, contexts, texts[:2], "cpu", precision)
    rows = speed.of_shape(work, precision, texts, sizes=[1, 2], repeats=1, n_requests=3, n_tokens=30)
    assert set(rows["what"]) == {"edit", "edit and evaluate", "screen", "growth", "second moment"}
    assert set(rows["dtype"]) == {precision}
    (summary,) = speed.by_shape(rows).to_dict("records")
    assert summary["model"] == "tiny" and all(math.isfinite(v) for v in summary.values() if not isinstance(v, str))
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_cost_of_a_method_is_per_edit(tiny, requests, contexts, monkeypatch):
    asked = {"method": "rome", "context_templates": contexts, "layer": 1, "v_num_grad_steps": 2}
    cost = speed.cost(tiny, requests, **asked)
    assert cost["seconds_per_edit"] > 0 and cost["extra_memory"] >= 0
    read = nullcontext(SimpleNamespace(seconds=6.0, extra_memory=30))
    monkeypatch.setattr(timing, "Meter", lambda device: read)
    assert speed.cost(tiny, requests, **asked) == {"seconds_per_edit": 2.0, "extra_memory": 30.0}


def test_a_workload_may_name_its_layer():
    work = speed.workload("gpt2-6x256@4", [], ["{}"], device="cpu")
    assert work.hparams["layer"] == 4 and work.lm.name == "gpt2-6x256@4"
    with pytest.raises(MethodError, match="behind the @ stands the number of a layer, not 'four'"):
        speed.workload("gpt2-6x256@four", [], ["{}"], device="cpu")
