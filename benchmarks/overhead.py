"""Times the host's part of a call of dwconv.conv2d and of F.conv2d, on tensors so small that the device has no part.

The best of several rounds, in which the two take turns. On CUDA nothing is waited for inside the clock; between batches
of calls, outside it, the device catches up, so that its queue never fills and never holds the host back. On the CPU the
computation itself is part of the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from layers import machine
from timing import DEVICE
from torch import Tensor
from tqdm import tqdm

import dwconv

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "forward_grad": nullcontext,
    "forward_backward": nullcontext,
}
SIZE = (1, 32, 8, 8)
CALLS_AT_A_TIME = 200


def calls_of(mode: str) -> dict[str, Callable[[], object]]:
    """What is timed, by contestant."""
    x = torch.randn(SIZE, device=DEVICE)
    weight = torch.randn(SIZE[1], 1, 3, 3, device=DEVICE)
    grad_output = torch.randn(SIZE, device=DEVICE)
    if mode in ("forward_grad", "forward_backward"):
        x.requires_grad_()
        weight.requires_grad_()

    def with_dwconv() -> Tensor:
        return dwconv.conv2d(x, weight, None, 1, 1)

    def with_torch() -> Tensor:
        return F.conv2d(x, weight, None, 1, 1, 1, SIZE[1])

    if mode != "forward_backward":
        return {"dwconv": with_dwconv, "pytorch": with_torch}
    return {
        "dwconv": lambda: torch.autograd.grad(with_dwconv(), (x, weight), grad_output),
        "pytorch": lambda: torch.autograd.grad(with_torch(), (x, weight), grad_output),
    }


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Of the host, for one of so many calls."""
    total, left = 0.0, calls
    while left:
        batch = range(min(left, CALLS_AT_A_TIME))
        left -= len(batch)
        begin = time.perf_counter()
        for _ in batch:
            call()
        total += time.perf_counter() - begin
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return total / calls * 1e6


def run_mode(mode: str, calls: int, rounds: int) -> dict[str, Any]:
    contestants = calls_of(mode)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with MODES[mode]():
        for call in contestants.values():
            microseconds(call, min(calls, CALLS_AT_A_TIME))  # warm-up
        for _ in range(rounds):
            for name, call in contestants.items():
                times[name].append(microseconds(call, calls))
    return {"mode": mode, **{f"{name}_us": min(us) for name, us in times.items()}}


def difference(row: dict[str, Any]) -> float:
    return row["dwconv_us"] - row["pytorch_us"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=2000, help="in a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts; default: %(default)s")
    parser.add_argument("--output", type=Path, help="write JSON here")


def main(args: argparse.Namespace) -> None:
    meta = machine()
    with tqdm(MODES, unit="mode", dynamic_ncols=True) as progress:
        rows = [run_mode(mode, args.calls, args.rounds) for mode in progress]
    print(report.headline(meta))
    print(
        report.table(
            ("mode", "dwconv, us", "F.conv2d, us", "difference"),
            (
                (row["mode"], f"{row['dwconv_us']:.1f}", f"{row['pytorch_us']:.1f}", f"{difference(row):+.1f}")
                for row in rows
            ),
        )
    )
    if args.output:
        report.write_json(args.output, {"meta": meta, "rows": rows})
        print(f"\nwritten: {args.output}")
