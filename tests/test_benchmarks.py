"""The benchmarks, on tiny layers and models: every command runs, judges fairly and writes what it promises."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, csrc_sha256

BENCHMARKS = ROOT / "benchmarks"
META_KEYS = {"gpu", "driver", "torch", "cudnn", "csrc_sha256", "date", "copy_GBps"}
CELL_KEYS = {
    "layer", "dtype", "layout", "pass", "plan", "us", "copy_us", "target_x_copy", "pytorch_us", "pytorch_any_layout_us",
    "rms_error_ratio",
}  # fmt: skip
TABLE = """\
layer,N,C,multiplier,H,W,kH,kW,stride,pad_h,pad_w,dilation,dtype,layout,pass,target_x_copy
seed,3,4,1,9,7,3,3,1,1,1,1,float32,NCHW,forward,1e9
seed,3,4,1,9,7,3,3,1,1,1,1,float32,channels_last,forward,1e9
seed,3,4,1,9,7,3,3,1,1,1,1,bfloat16,NCHW,grad_weight,1e-9
large,2,3,2,11,8,9,9,2,4,4,1,float32,channels_last,grad_input,1.5
"""


def run(*arguments: object, status: int = 0) -> str:
    """What a command prints."""
    command = [sys.executable, BENCHMARKS / "run.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks") / "tiny.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture(scope="module")
def layers_json(table: Path) -> Path:
    path = table.with_name("layers.json")
    printed = run("layers", "--table", table, "--quick", "--output", path)
    assert "WRONG" not in printed
    return path


@pytest.fixture(scope="module")
def models_json(table: Path) -> Path:
    path = table.with_name("models.json")
    tiny = ("--models", "test_convnext", "--image-size", 32, "--batch", 2, "--quick")
    run("models", *tiny, "--dtype", "bfloat16", "--layout", "channels_last", "--output", path)
    return path


@pytest.fixture(scope="module")
def sweep_json(table: Path) -> Path:
    path = table.with_name("sweep.json")
    small = ("--sides", 14, "--largest", 7, "--images", 1, "--dtype", "float32", "--pass", "forward", "grad_weight")
    printed = run("sweep", *small, "--quick", "--output", path)
    assert "14x14-k7" in printed and "Cliffs: " in printed
    return path


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def test_help_of_all_commands():
    printed = run("--help")
    for command in (
        "layers",
        "models",
        "sweep",
        "shapes",
        "conditions",
        "overhead",
        "limiters",
        "compare",
        "plot",
        "readme",
    ):
        assert re.search(rf"^    {command}\s", printed, re.MULTILINE)


def test_layers_json(layers_json: Path):
    result = json.loads(layers_json.read_text())
    assert set(result) == {"meta", "cells"} and set(result["meta"]) == META_KEYS
    assert result["meta"]["csrc_sha256"] == csrc_sha256()
    assert result["meta"]["torch"] == torch.__version__
    assert len(result["cells"]) == 4
    for cell in result["cells"]:
        assert CELL_KEYS <= set(cell)
        assert cell["us"] > 0 and cell["copy_us"] > 0 and cell["pytorch_us"] > 0
        assert cell["relative_error"] < 0.01
    first, second, third, _ = result["cells"]
    assert first["pytorch_any_layout_us"] == min(first["pytorch_us"], second["pytorch_us"])
    assert third["pytorch_any_layout_us"] is None  # its other layout is not in the table
    text = layers_json.with_suffix(".md").read_text()
    assert "Geometric means" in text and "## Over target: " in text and "seed bfloat16 NCHW grad_weight" in text


def test_alone_times_no_one_else(table: Path, tmp_path: Path):
    run("layers", "--table", table, "--quick", "--alone", "--output", tmp_path / "alone.json")
    for cell in json.loads((tmp_path / "alone.json").read_text())["cells"]:
        assert cell["us"] > 0 and cell["copy_us"] > 0 and not cell["contestants_us"]
        assert cell["pytorch_us"] is cell["relative_error"] is cell["rms_error_ratio"] is None


def test_older_cells_are_kept_while_their_plan_serves(table: Path, layers_json: Path, tmp_path: Path):
    path, older = tmp_path / "layers.json", "0" * 64
    result = json.loads(layers_json.read_text())
    result["meta"]["csrc_sha256"] = older
    result["cells"][0]["plan"] = "a kernel of old"
    result["cells"][1]["plan"] = "direct"
    path.write_text(json.dumps(result))
    run("layers", "--table", table, "--quick", "--missing", "--keep-older", "--output", path)
    after = {(cell["dtype"], cell["layout"], cell["pass"]): cell for cell in json.loads(path.read_text())["cells"]}
    assert len(after) == 4
    measured = after["float32", "NCHW", "forward"]
    assert measured["plan"] == "aten" and "csrc_sha256" not in measured
    for key in (("float32", "channels_last", "forward"), ("bfloat16", "NCHW", "grad_weight")):
        assert after[key]["csrc_sha256"] == older
    assert "3 cells were measured with earlier sources." in path.with_suffix(".md").read_text()


def test_layers_of_a_file_are_kept_and_not_mixed(module, table: Path, layers_json: Path, tmp_path: Path):
    path = tmp_path / "layers.json"
    result = json.loads(layers_json.read_text())
    kept, lost = result["cells"][:3], result["cells"][3]
    path.write_text(json.dumps(result | {"cells": kept}))
    printed = run("layers", "--table", table, "--quick", "--missing", "--output", path)
    cells = json.loads(path.read_text())["cells"]
    assert cells[:3] == kept and len(cells) == 4 and cells[3]["layer"] == lost["layer"]
    assert "seed          float32" not in printed  # not timed again

    with pytest.raises(SystemExit, match="measured with another csrc_sha256"):
        module("report").earlier(path, result["meta"] | {"csrc_sha256": "another"}, "cells")
    kept = module("report").earlier(path, result["meta"] | {"csrc_sha256": "another"}, "cells", older=True)
    assert {cell["csrc_sha256"] for cell in kept} == {result["meta"]["csrc_sha256"]}
    assert module("report").older_sources(kept).startswith(f" {len(kept)} cells were measured with earlier sources")
    assert module("report").older_sources(result["cells"]) == ""


def test_wrong_contestants_are_shown_and_not_timed(module, table: Path, monkeypatch: pytest.MonkeyPatch):
    layers, report = module("layers"), module("report")
    cells = list(layers.read_layers(table))
    calls = []

    def off_in_one_number(cell, tensors):
        calls.append(cell)
        found = layers.with_torch(cell, tensors).clone()
        found[-1, -1, -1, -1] += found.abs().max()
        return found

    monkeypatch.setattr(layers, "with_dwconv", off_in_one_number)
    peer = "nan", lambda cell, tensors: off_in_one_number(cell, tensors) * torch.nan
    monkeypatch.setattr(layers.peers, "available", lambda cell: [peer])
    for cell in cells[:3]:
        calls.clear()
        result = layers.run_cell(cell, quick=True)
        assert len(calls) == 2
        assert result["us"] is None and result["contestants_us"]["nan"] is None and result["pytorch_us"] > 0
        layers.add_any_layout([result])
        assert "WRONG: dwconv, WRONG: nan" in report.cell_line(result)
        assert "## Wrong results, which are not timed: 1" in report.summary([result])
        json.dumps(result, allow_nan=False)


def test_one_wrong_number_among_many_is_wrong(module):
    layers, cells = module("layers"), module("cells")
    cell = cells.Cell("many", (4, 64, 64, 64), 1, (3, 3), 1, (1, 1), 1, "bfloat16", "NCHW", "forward", 1.0)
    tensors = cells.Tensors.draw(cell, "cpu")
    reference = layers.Reference(cell, tensors)
    found = cells.with_torch(cell, tensors)
    error, correct = reference.relative_error(found)
    assert correct
    found[3, 63, 63, 63] += 2
    more, correct = reference.relative_error(found)
    assert not correct and more < layers.TOLERANCE["bfloat16"]  # the norm alone would let it pass


def test_each_way_of_pytorch_gets_a_thread_of_its_own(module, table: Path, monkeypatch: pytest.MonkeyPatch):
    layers = module("layers")
    with_torch, thread, first_calls = layers.with_torch, threading.local(), []

    def recorded(cell, tensors):
        if not hasattr(thread, "known"):
            thread.known = True
            first_calls.append(torch.backends.cudnn.enabled)
        return with_torch(cell, tensors)

    recorded(cell := next(layers.read_layers(table)), layers.Tensors.draw(cell, layers.DEVICE))
    monkeypatch.setattr(layers, "with_torch", recorded)
    assert set(layers.run_cell(cell, quick=True)["contestants_us"]) == set(layers.PYTORCH)
    assert len(first_calls) == 1 + len(layers.PYTORCH)


class FakeDevice:
    """Its clock moves by what a call costs; it stands in for torch.cuda's events and graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.capturing, self.graphs = 0.0, None, []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.time - self.time) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.costs: list[float] = []
                device.graphs.append(self)

            def replay(self) -> None:
                device.now += sum(self.costs)

        @contextmanager
        def capture(graph: Graph):
            device.capturing = graph
            yield
            device.capturing = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)

    def call(self, cost: float) -> None:
        if self.capturing is None:
            self.now += cost
        else:
            self.capturing.costs.append(cost)


@pytest.mark.parametrize("sets", [2, 3, 100])
@pytest.mark.parametrize("cost", [1.5, 40.0, 1900.0, 5000.0])
@pytest.mark.parametrize("capturable", [True, False])
def test_device_time(module, monkeypatch: pytest.MonkeyPatch, sets: int, cost: float, capturable: bool):
    timing = module("timing")
    device = FakeDevice(monkeypatch)
    monkeypatch.setattr(timing, "DEVICE", "cuda")
    time = timing.measure([lambda: device.call(cost)] * sets, 10e3, capturable)
    assert time.us == pytest.approx(cost) and time.spread == pytest.approx(0, abs=1e-6)
    assert bool(device.graphs) == (capturable and cost <= timing.LONG_US)
    if device.graphs:
        costs = device.graphs[-1].costs
        assert sum(costs) >= timing.MIN_REPLAY_US and len(costs) % sets == 0


def test_spread_is_that_of_the_quartiles(module):
    time = module("timing")._summary([1, 2, 3, 4, 100])
    assert (time.us, time.spread) == (3, 1)


def test_useful_operations_and_least_traffic(module):
    cell = module("cells").Cell("odd", (2, 3, 5, 4), 2, (3, 2), 2, (1, 0), 1, "float16", "NCHW", "forward", 1.0)
    x, weight = torch.ones(cell.size), torch.ones(cell.filters, 1, *cell.kernel)
    y = torch.nn.functional.conv2d(x, weight, None, *cell.geometry, cell.channels)
    assert cell.output_size == y.shape
    assert cell.flops == 2 * y.sum()
    assert cell.bytes == 2 * (x.numel() + y.numel())


def test_models(models_json: Path):
    result = json.loads(models_json.read_text())
    assert set(result["meta"]) == META_KEYS
    rows = result["models"]
    assert [(row["mode"], row["batch"]) for row in rows] == [("train", 2), ("latency", 1), ("throughput", 2)]
    for row in rows:
        assert row["depthwise_layers"] > 0
        for state in ("before", "after"):
            figures = row[state]
            assert figures["ms"] > 0 and figures["images_per_s"] == pytest.approx(row["batch"] / figures["ms"] * 1e3)
            assert figures["depthwise_share"] == pytest.approx(figures["depthwise_ms"] / figures["ms"])
        rest = max(0, row["after"]["ms"] - row["after"]["depthwise_ms"])
        assert row["possible_ms"] == pytest.approx(rest + row["depthwise_copy_ms"])
        assert row["relative_difference"] < 0.1
    assert "## Every model" in models_json.with_suffix(".md").read_text()


def test_replknet_like(module):
    models = module("models")
    model = models.RepLKNetLike(widths=(4, 8, 8, 8), depths=(1, 1, 2, 1), classes=10)
    models.dwconv.convert(model)
    layers = models.layers_of(model, lambda: model(torch.randn(2, 3, 64, 64)))
    assert layers.total() == 2 + 5 + 3  # stem, stages, transitions
    assert sorted(layer.kernel[0] for layer in layers.elements()) == [3] * 5 + [13, 27, 27, 29, 31]
    assert {layer.size[2] for layer in layers if layer.kernel[0] > 3} == {16, 8, 4, 2}
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in models.RepLKNetLike().parameters())
    assert 75e6 < parameters < 82e6  # the paper: 79 million


def test_depthwise_layers_are_timed_as_the_model_runs_them(module):
    models = module("models")
    conv = models.dwconv.DepthwiseConv2d(4, (3, 5), padding="same", bias=True)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)[:, ::2]
    ((layer, count),) = models.layers_of(conv, lambda: conv(x)).items()
    assert count == 1 and layer.padding == (1, 2) and layer.input_stride == x.stride() and layer.bias
    tensors = torch.empty_strided(layer.size, layer.input_stride).copy_(x), conv.weight, conv.bias
    grad = torch.randn(layer.output_size)
    outputs = [f(layer, *tensors, grad) for f in (models.forward_torch, models.forward_dwconv)]
    torch.testing.assert_close(*outputs)
    theirs = models.backward_torch(layer, *tensors, grad)
    d_input, (d_weight, d_bias) = models.backward_dwconv(layer, *tensors, grad)
    torch.testing.assert_close((d_input, d_weight, d_bias), tuple(theirs))


def test_sweep(sweep_json: Path):
    result = json.loads(sweep_json.read_text())
    assert set(result) == {"meta", "sweep"} and set(result["meta"]) == META_KEYS
    found = [(cell["pass"], cell["kernel"], cell["relative_error"] < 1e-5) for cell in result["sweep"]]
    assert found == [(name, f"{k}x{k}", True) for name in ("forward", "grad_weight") for k in (3, 5, 7)]
    others = {(cell["plane"], cell["layout"], cell["dtype"]) for cell in result["sweep"]}
    assert others == {("14x14", "NCHW", "float32")}
    for step in (3, 0, -2):
        run("sweep", f"--step={step}", status=1)


def test_cliffs_of_a_sweep(module, sweep_json: Path):
    report = module("report")
    forward = json.loads(sweep_json.read_text())["sweep"][:3]

    def cells(*microseconds: float | None) -> list[dict[str, object]]:
        return [cell | {"us": us, "flops": cell["kernel_size"] ** 2} for cell, us in zip(forward, microseconds)]

    def steps(*microseconds: float | None) -> list[tuple[str, str]]:
        return [(smaller["kernel"], larger["kernel"]) for smaller, larger in report.cliffs(cells(*microseconds))]

    assert steps(10, 10, 10 * 49 / 25) == []  # what memory, or the operations, explain
    assert steps(10, 10 * 25 / 9 * 1.25, 35) == [("3x3", "5x5")]
    assert steps(10, 8, 8) == [("3x3", "5x5")]
    assert steps(10, None, 10 * 49 / 9 * 1.25) == [("3x3", "7x7")]  # what is wrong has no time
    assert "Cliffs: 1" in report.sweep_summary(cells(10, 8, 8)[::-1])
    assert "Cliffs: none" in report.sweep_summary(cells(10, 10, 10))


def test_shapes(module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shapes, path = module("shapes"), tmp_path / "shapes.json"
    monkeypatch.setattr(shapes, "BYTES", (1, 1 << 14))
    monkeypatch.setattr(shapes, "MAX_FLOPS", 1e6)
    shapes.main(argparse.Namespace(count=3, seed=0, quick=True, alone=False, output=path))
    result = json.loads(path.read_text())
    assert set(result) == {"meta", "shapes"} and set(result["meta"]) == META_KEYS
    assert [cell["layer"] for cell in result["shapes"]] == [cell.layer for cell in shapes.draw_cells(3, 0)]
    assert all(cell["us"] > 0 and cell["pytorch_us"] > 0 for cell in result["shapes"])
    assert "## Slower than PyTorch: " in capsys.readouterr().out


def test_drawn_shapes_are_valid_and_of_every_kind(module):
    shapes = module("shapes")
    cells = list(shapes.draw_cells(300, 7))
    assert cells == list(shapes.draw_cells(300, 7)) != list(shapes.draw_cells(300, 8))
    for cell in cells:
        assert min(cell.output_size) > 0 and shapes.BYTES[0] <= cell.bytes <= shapes.BYTES[1]
        assert cell.flops <= shapes.MAX_FLOPS
    for name in ("dtype", "layout", "pass_name", "stride", "dilation", "multiplier"):
        assert len({getattr(cell, name) for cell in cells}) > 1, name
    assert (
        {max(cell.kernel) > 7 for cell in cells}
        == {cell.kernel[0] == cell.kernel[1] for cell in cells}
        == {True, False}
    )
    named = next(cell for cell in cells if cell.stride > 1 and any(cell.padding))
    padding, stride = "x".join(map(str, named.padding)), named.stride
    assert named.layer.startswith("x".join(map(str, named.size))) and f"-p{padding}-s{stride}" in named.layer


def test_conditions(table: Path, tmp_path: Path):
    path = tmp_path / "conditions.json"
    printed = run("conditions", "--table", table, "--quick", "--output", path)
    result = json.loads(path.read_text())
    assert set(result["meta"]) == META_KEYS and len(result["conditions"]) == 4
    for cell in result["conditions"]:
        assert cell["us"] > 0 and cell["times"]["misaligned"] > 0
        assert cell["times"]["narrower"] is None  # its rows are short
    assert "of 4 cells take at most 1.1 times as long" in printed


def test_conditions_lists_what_is_beyond_the_limits(module):
    conditions = module("conditions")

    def cell(layer: str, **times: float | None) -> dict[str, object]:
        key = {"layer": layer, "dtype": "float32", "layout": "NCHW", "pass": "forward", "plan": "direct"}
        return key | {"times": {"misaligned": 1.0, "narrower": None, "portable": None} | times}

    cells = [cell("a"), cell("b", misaligned=1.11, portable=1.15), cell("c", misaligned=1.3, narrower=1.0)]
    assert conditions.summary(cells).splitlines() == [
        "misaligned: 1 of 3 cells take at most 1.1 times as long",
        "  1.30 c float32 NCHW forward direct",
        "  1.11 b float32 NCHW forward direct",
        "narrower: 1 of 1 cells take at most 1.1 times as long",
        "portable: 1 of 1 cells take at most 1.15 times as long",
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_misaligned_tensors_are_the_same(module, layout: torch.memory_format):
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    moved = module("conditions").misaligned(tensor)
    assert torch.equal(moved, tensor) and moved.stride() == tensor.stride() and moved.storage_offset() == 1


def test_overhead(tmp_path: Path):
    path = tmp_path / "overhead.json"
    run("overhead", "--calls", 10, "--rounds", 2, "--output", path)
    result = json.loads(path.read_text())
    assert set(result["meta"]) == META_KEYS
    assert [row["mode"] for row in result["rows"]] == ["inference_mode", "no_grad", "forward_grad", "forward_backward"]
    for row in result["rows"]:
        assert set(row) == {"mode", "dwconv_us", "pytorch_us"}
        assert row["dwconv_us"] > 0 and row["pytorch_us"] > 0


@pytest.fixture
def before(layers_json: Path, tmp_path: Path) -> Path:
    """A result with little noise."""
    result = json.loads(layers_json.read_text())
    for cell in result["cells"]:
        cell["spread_us"], cell["copy_spread_us"] = 0.01 * cell["us"], 0.005 * cell["copy_us"]
    path = tmp_path / "before.json"
    path.write_text(json.dumps(result))
    return path


def changed(path: Path, change) -> Path:
    result = json.loads(path.read_text())
    change(result["cells"])
    after = path.with_name("after.json")
    after.write_text(json.dumps(result))
    return after


def test_compare_finds_no_regression(before: Path):
    def another_machine(cells):
        for cell in cells:  # all of it is half as fast, and a little noisy
            cell["us"] *= 2.02
            cell["copy_us"] *= 2

    printed = run("compare", before, changed(before, another_machine))
    assert "4 cells: 0 slower, 0 faster, 0 got wrong" in printed
    assert "seed" not in run("compare", "--changed", before, before)


def test_compare_finds_regressions(before: Path):
    def slower(cells):
        cells[0]["us"] *= 1.1
        cells[1]["us"] /= 1.1

    printed = run("compare", before, changed(before, slower), status=1)
    assert "1 slower, 1 faster" in printed and "1.100" in printed

    def within_the_noise(cells):
        slower(cells)
        cells[0]["spread_us"] = 0.1 * cells[0]["us"]

    assert "0 slower" in run("compare", before, changed(before, within_the_noise))

    def wrong(cells):
        cells[2]["us"] = None

    assert "1 got wrong" in run("compare", before, changed(before, wrong), status=1)


def test_compare_lists_new_and_missing_cells(before: Path):
    def fewer(cells):
        del cells[0]

    after = changed(before, fewer)
    assert "Missing: 1\n  seed float32 NCHW forward" in run("compare", before, after)
    assert "New: 1\n  seed float32 NCHW forward" in run("compare", after, before)


def ncu_page(module: ModuleType, **values: str) -> str:
    """The page `raw` of ncu, as CSV, for one launch of 1,500 ns."""
    metrics = {
        module.DURATION: ("ns", "1,500"),
        module.WARPS: ("%", "25.5"),
        **{metric: ("%", "10") for metric in module.UNITS.values()},
        **{f"{module.STALLED}{reason}": ("warp", "10") for reason in ("selected", "not_selected", "wait", "barrier")},
        f"{module.STALLED}wait_not_issued": ("warp", "1000"),
    }
    metrics |= {name: (metrics[name][0], value) for name, value in values.items()}
    rows = (
        ["ID", "Kernel Name", *metrics],
        ["", "", *(unit for unit, _ in metrics.values())],
        ["0", "void dwconv::<unnamed>::stream<float, (int)3>(int)", *(value for _, value in metrics.values())],
    )
    return "==PROF== noise\n" + "\n".join(",".join(f'"{value}"' for value in row) for row in rows) + "\n"


def test_limiters_read_what_ncu_measured(module):
    limiters = module("limiters")
    (kernel,) = limiters.kernels(ncu_page(limiters, **{limiters.STALLED + "barrier": "70"}))
    assert kernel.name == "stream" and kernel.us == 1.5 and kernel.warps == 25.5
    assert kernel.stalls == {"selected": 0.1, "not_selected": 0.1, "wait": 0.1, "barrier": 0.7}
    assert kernel.limiter == "latency: barriers 70%, results of fixed latency 10%"
    (kernel,) = limiters.kernels(ncu_page(limiters, **{limiters.UNITS["memory"]: "91"}))
    assert kernel.limiter == "memory"
    assert limiters.kernels("==ERROR== nothing\n") == []
    assert limiters.short_name("add_partial_sums(const float *)") == "add_partial_sums"
    assert limiters.short_name("void dwconv::<unnamed>::march<unnamed>::Strips>(int)") == "march"
    assert limiters.short_name("void unnamed>::march<unnamed>::Tile<(int)14>>(unnamed>::Arguments)") == "march"


def test_limiters_know_the_cell_of_each_launch(module):
    limiters = module("limiters")
    log = 'cell: a\n==PROF== Profiling "f": 0%....100% - 6 passes\n==PROF== Profiling "g": 100% - 6 passes\ncell: b\n'
    assert list(limiters.launches(log + '==PROF== Profiling "f": 100% - 6 passes\n')) == ["a", "a", "b"]


def test_limiters_want_the_gpu_of_the_results(before: Path):
    result = json.loads(before.read_text())
    result["meta"]["gpu"] = "another"
    path = before.with_name("elsewhere.json")
    path.write_text(json.dumps(result))
    command = [sys.executable, BENCHMARKS / "run.py", "limiters", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "measured on another" in done.stderr

    result["meta"]["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    result["cells"] = [cell for cell in result["cells"] if cell["target_x_copy"] > 1e6]
    path.write_text(json.dumps(result))
    assert run("limiters", path) == "no cell misses its target\n"


def test_pictures(layers_json: Path, models_json: Path, sweep_json: Path, tmp_path: Path):
    def wrong(cells):
        cells[0]["us"] = None

    results = tmp_path / "results.json"
    shutil.copy(layers_json, results)
    further = ("--models", models_json, "--sweep", sweep_json)
    run("plot", changed(results, wrong), *further, "--output-dir", tmp_path / "pictures")
    pictures = {path.name: path for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {"roofline.png", "speedup.png", "x_copy.png", "models.png", "sweep.png"}
    for path in pictures.values():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_readme_round_trip(layers_json: Path, tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- speed table: begin -->\nold\n<!-- speed table: end -->\n\nThe rest.\n")
    run("readme", layers_json, "--readme", path, "--check", status=1)
    run("readme", layers_json, "--readme", path)
    run("readme", layers_json, "--readme", path, "--check")
    text = path.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("-->\n\nThe rest.\n") and "old" not in text
    assert "| small kernels, NCHW, float32 " in text and "| channels_last | float32 " in text
    assert "F.conv2d was timed beside" not in text

    def leave_out(cells):
        cells[0]["pytorch_us"] = None

    some = tmp_path / "some.json"
    shutil.copy(layers_json, some)
    run("readme", changed(some, leave_out), "--readme", path)
    count = len(json.loads(some.read_text())["cells"])
    assert f" F.conv2d was timed beside {count - 1} of the {count} cells." in path.read_text()
    path.write_text("no markers")
    run("readme", layers_json, "--readme", path, status=1)


def test_readme_shows_the_committed_results(module):
    readme = module("readme")
    results = {path: json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*.json")}
    of_layers = {path: result for path, result in results.items() if "cells" in result}
    text = readme.README.read_text()
    if not of_layers and readme.BEGIN not in text:
        pytest.skip("README.md has no table yet, and benchmarks/results no result")
    assert of_layers, "README.md has a place for the table, but benchmarks/results has no result of layers"
    assert any(readme.updated(text, result, readme.README) == text for result in of_layers.values()), (
        "README.md does not show what benchmarks/results holds: python benchmarks/run.py readme RESULT"
    )
