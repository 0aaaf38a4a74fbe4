"""Times single layers against PyTorch, third-party kernels where installed, and a copy of the same bytes."""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import peers
import report
import torch
from cells import DTYPES, LAYERS, LAYOUTS, PASSES, Cell, Tensors, plan_of, read_layers, with_dwconv, with_torch
from timing import DEVICE, Time, measure, number_of_sets
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

# A wrong contestant is shown as wrong, not as fast. What counts, against float64, is the L2 norm of the error relative
# to that of the result, which no order of summing in float32 comes near, and, since a few wrong numbers among millions
# do not move that, the largest error of all relative to the root mean square.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.5e-2}
LARGEST_ERROR = 10  # times that
CHUNKS = 8  # float64 copies are made of so many parts, one at a time, to save memory


def torch_flags(enabled: bool, benchmark: bool, **more: Any) -> AbstractContextManager[Any]:
    more |= {"deterministic": False, "allow_tf32": False}
    return torch.backends.cudnn.flags(enabled=enabled, benchmark=benchmark, **more)


PYTORCH: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "cudnn": lambda: torch_flags(True, False),
    "cudnn_benchmark": lambda: torch_flags(True, True),
    "native": lambda: torch_flags(False, False),
}
if hasattr(torch.backends.cudnn, "depthwise_kernel"):  # cuDNN even where PyTorch would not take it
    PYTORCH["cudnn_forced"] = lambda: torch_flags(True, True, depthwise_kernel="cudnn")


def csrc_sha256() -> str:
    """The sources that a result speaks for, as in tests/gpu_report.json."""
    digest = hashlib.sha256()
    for path in sorted(glob("csrc/**/*", recursive=True, root_dir=ROOT)):
        if (ROOT / path).is_file():
            digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()


class Reference:
    """The pass in float64, for all images."""

    def __init__(self, cell: Cell, tensors: Tensors) -> None:
        images = range(0, cell.size[0], -(-cell.size[0] // CHUNKS))
        with torch_flags(False, False):
            parts = (with_torch(cell, tensors.double(slice(i, i + images.step))) for i in images)
            join = torch.cat if cell.pass_name != "grad_weight" else lambda parts: torch.stack(parts).sum(0)
            self.expected: Tensor = join(list(parts))
        self.norm = float(torch.linalg.vector_norm(self.expected))
        self.rms = self.norm / self.expected.numel() ** 0.5
        self.tolerance = TOLERANCE[cell.dtype]

    def relative_error(self, found: Tensor) -> tuple[float, bool]:
        """||found - expected|| / ||expected||, NaN where anything is; and whether that is what rounding explains."""
        norms, largest = [], []
        for part, expected in zip(found.chunk(CHUNKS), self.expected.chunk(CHUNKS)):
            difference = part.double() - expected
            norms.append(torch.linalg.vector_norm(difference))
            largest.append(difference.abs().max())
        error = float(torch.stack(norms).norm()) / self.norm
        off = float(torch.stack(largest).max()) / self.rms
        return error, error <= self.tolerance and off <= LARGEST_ERROR * self.tolerance


@dataclass(frozen=True)
class Entry:
    """What a contestant achieved; no time if its result was wrong."""

    error: float | None
    time: Time | None

    @property
    def us(self) -> float | None:
        return self.time.us if self.time else None


def copy_time(traffic: int, dtype: torch.dtype, sets: int, budget_us: float) -> Time:
    """y.copy_(x) where x and y together have as many bytes as `traffic`: the better of captured and not.

    A graph copies by a memcpy node, which is slower than the call for much data and faster for little.
    """
    half = max(1, traffic // 2 // dtype.itemsize)
    pairs = [
        (torch.randn(half, device=DEVICE).to(dtype), torch.empty(half, device=DEVICE, dtype=dtype)) for _ in range(sets)
    ]
    calls = [lambda x=x, y=y: y.copy_(x) for x, y in pairs]
    return min((measure(calls, budget_us, capturable) for capturable in (True, False)), key=lambda time: time.us)


def run_cell(cell: Cell, quick: bool, alone: bool = False) -> dict[str, Any]:
    """Times all contestants of a cell; `alone`, dwconv and the copy only, unchecked, in a fraction of the time."""
    budget_us = 8e3 if quick else 40e3
    sets = number_of_sets(cell.bytes)
    copy = copy_time(cell.bytes, cell.torch_dtype, sets, budget_us)
    draws = [Tensors.draw(cell, DEVICE) for _ in range(sets)]
    reference = None if alone else Reference(cell, draws[0])

    def contest(function: Callable[[Cell, Tensors], Tensor], capturable: bool = True) -> Entry:
        error, correct = reference.relative_error(function(cell, draws[0])) if reference else (None, True)
        calls = [lambda t=t: function(cell, t) for t in draws]
        return Entry(error, measure(calls, budget_us, capturable) if correct else None)

    ours = contest(with_dwconv)
    theirs = {}
    for name, flags in ({} if alone else PYTORCH).items():
        try:
            # PyTorch keeps cuDNN's choices per thread, whichever mode they were made in: in the same thread, benchmark
            # mode would take over what was chosen without it.
            with flags(), ThreadPoolExecutor(1) as thread:
                theirs[name] = thread.submit(contest, with_torch).result()
        except RuntimeError:  # cuDNN need not have a kernel where PyTorch would not ask it
            if name != "cudnn_forced":
                raise
    # Third parties may launch on the default stream, which no graph captures.
    available = () if alone else peers.available(cell)
    others = {name: contest(function, capturable=False) for name, function in available}
    return {
        "layer": cell.layer,
        "dtype": cell.dtype,
        "layout": cell.layout,
        "pass": cell.pass_name,
        "kind": cell.kind,
        "kernel": "x".join(map(str, cell.kernel)),
        "plan": plan_of(cell, draws[0]),
        "us": ours.us,
        "spread_us": ours.time and ours.time.spread,
        "copy_us": copy.us,
        "copy_spread_us": copy.spread,
        "target_x_copy": cell.target_x_copy,
        "pytorch_us": min((entry.us for entry in theirs.values() if entry.us), default=None),
        "pytorch_any_layout_us": None,  # known when both layouts are
        "contestants_us": {name: entry.us for name, entry in (theirs | others).items()},
        "relative_error": report.finite(ours.error),
        # Of PyTorch's ways, the one a user gets by default is what our error is held against.
        "rms_error_ratio": None if alone else report.finite(report.ratio(ours.error, theirs["cudnn"].error)),
        "bytes": cell.bytes,
        "flops": cell.flops,
    }


def add_any_layout(results: Iterable[dict[str, Any]]) -> None:
    """The best that PyTorch reaches in either layout, where both were timed."""
    times: dict[tuple[str, str, str], list[float | None]] = {}
    for cell in results:
        times.setdefault((cell["layer"], cell["dtype"], cell["pass"]), []).append(cell["pytorch_us"])
    for cell in results:
        both = times[cell["layer"], cell["dtype"], cell["pass"]]
        cell["pytorch_any_layout_us"] = min(filter(None, both), default=None) if len(both) == len(LAYOUTS) else None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    elements = 1 << (28 if DEVICE == "cuda" else 20)
    traffic = 2 * torch.float32.itemsize * elements
    copy = copy_time(traffic, torch.float32, 2, 40e3)
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none (CPU)",
        "driver": report.driver_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "csrc_sha256": csrc_sha256(),
        "date": datetime.date.today().isoformat(),
        "copy_GBps": round(traffic / copy.us / 1e3, 1),
    }


def release_memory() -> None:
    gc.collect()
    gc.freeze()  # what is left, of the imports most of all, lives on: the next collection need not look through it
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def timed(cells: Sequence[Cell], quick: bool, alone: bool = False) -> Iterator[dict[str, Any]]:
    """Runs cell after cell. A line is printed when the next result is asked for: until then one may add to the last."""
    print(report.CELL_HEADER)
    with tqdm(total=len(cells), unit="cell", dynamic_ncols=True, smoothing=0.1) as progress:
        for cell in cells:
            progress.set_postfix_str(str(cell))
            result = run_cell(cell, quick, alone)
            yield result
            progress.write(report.cell_line(result))
            progress.update()
            release_memory()


def add_selection(parser: argparse.ArgumentParser) -> None:
    """What `selected` reads."""
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="default: all of layers.csv")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument("--pass", nargs="+", choices=PASSES, dest="passes", help="default: all three")
    parser.add_argument("--table", type=Path, default=LAYERS, metavar="CSV", help="layers to time; default: layers.csv")


def add_alone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alone", action="store_true", help="time dwconv and the copy only, and check no result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    add_alone(parser)
    parser.add_argument("--output", type=Path, help="write JSON here, and Markdown beside it; cells it holds are kept")
    parser.add_argument(
        "--keep-older",
        action="store_true",
        help="also keep cells measured with other sources, marked so, unless another plan serves them by now",
    )
    parser.add_argument("--missing", action="store_true", help="only cells that --output does not hold yet")


def selected(args: argparse.Namespace) -> list[Cell]:
    cells = list(read_layers(args.table))
    unknown = set(args.layers or ()) - {cell.layer for cell in cells}
    if unknown:
        raise SystemExit(f"no such layer: {', '.join(sorted(unknown))}")
    return [
        cell
        for cell in cells
        if (not args.layers or cell.layer in args.layers)
        and (not args.dtype or cell.dtype in args.dtype)
        and (not args.layout or cell.layout in args.layout)
        and (not args.passes or cell.pass_name in args.passes)
    ]


def drop_outdated(results: dict[tuple[str, ...], dict[str, Any]], cells: Iterable[Cell]) -> None:
    """Drops results of other sources for cells that another plan serves by now."""
    for cell in cells:
        key = cell.layer, cell.dtype, cell.layout, cell.pass_name
        result = results.get(key, {})
        if "csrc_sha256" in result and result["plan"] not in ("aten", plan_of(cell, Tensors.draw(cell, "meta"))):
            del results[key]


def main(args: argparse.Namespace) -> None:
    cells = selected(args)
    meta = machine()
    results = {report.identity(cell): cell for cell in report.earlier(args.output, meta, "cells", args.keep_older)}
    drop_outdated(results, read_layers(args.table))
    if args.missing:
        cells = [c for c in cells if (c.layer, c.dtype, c.layout, c.pass_name) not in results]

    def write() -> None:
        if args.output:
            report.write_layers({"meta": meta, "cells": list(results.values())}, args.output)

    print(report.headline(meta))
    for result, following in zip(timed(cells, args.quick, args.alone), [*cells[1:], None]):
        results[report.identity(result)] = result
        add_any_layout(results.values())
        if following is not None and following.layer != result["layer"]:
            write()  # what is measured stays, should the run be cut short
    print(report.summary(list(results.values())))
    write()
    if args.output:
        print(f"written: {args.output}, {args.output.with_suffix('.md')}")
