"""What the cells that miss their targets are limited by, as Nsight Compute (ncu) sees them.

Each kernel of each such cell of a result of layers runs once under ncu, with cold caches. A unit that is busy for most
of that time is the limit; where none is, the kernel waits, and the table says what its warps wait for.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from cells import LAYERS, Tensors, read_layers, with_dwconv

BUSY = 70  # per cent of its peak, from which on a unit limits a kernel
UNITS = {
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "FMA": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed",
    "tensor cores": "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_elapsed",
}
DURATION = "gpu__time_duration.sum"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
STALLED = "smsp__pcsamp_warps_issue_stalled_"
NO_WAIT = ("selected", "not_selected")  # samples of warps that issue, or could
STALLS = {
    "wait": "results of fixed latency",
    "long_scoreboard": "global memory",
    "short_scoreboard": "shared memory",
    "mio_throttle": "the queue of shared memory",
    "lg_throttle": "the queue of global memory",
    "barrier": "barriers",
    "math_pipe_throttle": "a busy pipe",
    "no_instructions": "instructions",
    "branch_resolving": "branches",
    "dispatch_stall": "dispatch, register banks",
    "imc_miss": "constants",
}
UNIT_OF_TIME = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
MARK = "cell: "  # begins the line that the profiled process prints before each cell


@dataclass(frozen=True)
class Kernel:
    """One launch, as ncu measured it."""

    name: str
    us: float
    busy: Mapping[str, float]  # unit -> per cent
    warps: float  # per cent of those a multiprocessor can hold
    stalls: Mapping[str, float]  # reason -> share of the samples

    @property
    def limiter(self) -> str:
        unit = max(self.busy, key=lambda unit: self.busy[unit])
        if self.busy[unit] >= BUSY:
            return unit
        if not any(self.stalls.values()):
            return "-"  # over before a sample was taken
        waits = sorted((reason for reason in self.stalls if reason not in NO_WAIT), key=lambda r: -self.stalls[r])
        return "latency: " + ", ".join(f"{STALLS.get(r, r)} {self.stalls[r]:.0%}" for r in waits[:2])


def short_name(signature: str) -> str:
    """`void dwconv::<unnamed>::name<<unnamed>::Tile<(int)3>>(Arguments)` -> `name`"""
    found = re.search(r"(\w+)[<(]", signature.replace("unnamed>::", ""))
    return found[1] if found else signature


def kernels(raw: str) -> list[Kernel]:
    """The launches in the CSV of ncu's page `raw`."""
    lines = list(csv.reader(io.StringIO(raw)))
    begin = next((i for i, line in enumerate(lines) if line[:1] == ["ID"]), None)
    if begin is None:
        return []
    names, units = lines[begin], lines[begin + 1]

    def number(text: str) -> float:
        return float(text.replace(",", "") or "nan")

    found = []
    for line in lines[begin + 2 :]:
        values = dict(zip(names, line))
        samples = {
            name.removeprefix(STALLED): number(value)
            for name, value in values.items()
            if name.startswith(STALLED) and not name.endswith("_not_issued")
        }
        total = sum(samples.values()) or 1
        found.append(
            Kernel(
                name=short_name(values["Kernel Name"]),
                us=number(values[DURATION]) * UNIT_OF_TIME[units[names.index(DURATION)]],
                busy={unit: number(values[metric]) for unit, metric in UNITS.items()},
                warps=number(values[WARPS]),
                stalls={reason: count / total for reason, count in samples.items()},
            )
        )
    return found


def launches(log: str) -> Iterator[str]:
    """The cell of every launch, in order, from what ncu and the process under it print."""
    cell = ""
    for line in log.splitlines():
        if line.startswith(MARK):
            cell = line.removeprefix(MARK)
        elif line.startswith('==PROF== Profiling "'):
            yield cell


def profile(cells: Iterable[report.Cell]) -> dict[str, list[Kernel]]:
    """Runs the cells of layers.csv, this file being the program, under ncu."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu not found: it comes with the CUDA toolkit and has to be on PATH")
    wanted = "\n".join(" ".join(report.identity(cell)) for cell in cells)
    metrics = ",".join((DURATION, WARPS, *UNITS.values(), "group:smsp__pcsamp_warp_stall_reasons"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "profile.ncu-rep")
        options = ["--profile-from-start", "off", "--clock-control", "none", "--metrics", metrics, "-o", str(file)]
        child = [sys.executable, __file__]
        run = subprocess.run(
            [ncu, *options, *child], input=wanted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run.returncode or not file.exists():
            raise SystemExit(f"ncu failed:\n{run.stdout[-2000:]}")
        page = subprocess.run([ncu, "-i", str(file), "--page", "raw", "--csv"], capture_output=True, text=True)
    found: dict[str, list[Kernel]] = {}
    order, measured = list(launches(run.stdout)), kernels(page.stdout)
    if len(order) != len(measured):
        raise SystemExit(f"ncu announced {len(order)} launches and reported {len(measured)}:\n{page.stderr[-2000:]}")
    for cell, kernel in zip(order, measured):
        found.setdefault(cell, []).append(kernel)
    return found


def run_marked(names: Iterable[str]) -> None:
    """In the process under ncu: every cell once, profiled, after a call that is not."""
    cells = {str(cell): cell for cell in read_layers(LAYERS)}
    profiler = torch.cuda.cudart()
    for name in names:
        cell = cells[name]
        tensors = Tensors.draw(cell, "cuda")
        with_dwconv(cell, tensors)
        torch.cuda.synchronize()
        print(f"{MARK}{name}", flush=True)
        profiler.cudaProfilerStart()
        with_dwconv(cell, tensors)
        torch.cuda.synchronize()
        profiler.cudaProfilerStop()
        del tensors


def table(cells: Iterable[report.Cell], found: Mapping[str, list[Kernel]]) -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for cell in cells:
            name = " ".join(report.identity(cell))
            head = (name, report.show(cell["us"], ".1f"), f"{cell['target_x_copy'] * cell['copy_us']:.1f}")
            for kernel in found.get(name, []):
                figures = (f"{value:.0f} %" for value in (*kernel.busy.values(), kernel.warps))
                yield (*head, kernel.name, f"{kernel.us:.1f}", *figures, kernel.limiter)
                head = ("", "", "")

    return report.table(("cell", "us", "target", "kernel", "us in ncu", *UNITS, "warps", "limited by"), rows())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="JSON written by layers, on a GPU like this one")
    parser.add_argument("--dtype", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path, help="write Markdown here")


def main(args: argparse.Namespace) -> None:
    result = report.load(args.results, "cells")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if result["meta"]["gpu"] != gpu:
        raise SystemExit(f"{args.results} was measured on {result['meta']['gpu']}, and here is {gpu}")
    missed = [c for c in result["cells"] if not report.meets_target(c) and c["dtype"] in (args.dtype or [c["dtype"]])]
    if not missed:
        print("no cell misses its target")
        return
    text = table(missed, profile(missed))
    print(text)
    if args.output:
        report.write_text(args.output, f"# {report.headline(result['meta'])}\n{__doc__}\n{text}\n")
        print(f"written: {args.output}")


if __name__ == "__main__":
    run_marked(sys.stdin.read().splitlines())
