"""Times kernels from 3x3 to 63x63 against PyTorch: cost should grow as it has to, without a cliff between plans.

A cliff is a step between two neighbouring sizes that the larger kernel's operations do not explain: see report.cliffs.
The planes are those of the large layers of layers.csv, 56x56 and 14x14, padded so that they keep their size.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import report
from cells import DTYPES, LAYOUTS, PASSES, Cell
from layers import add_alone, machine, timed

PLANES = {56: (32, 128), 14: (64, 512)}  # images and channels, by height and width


def sweep_cells(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(
            layer=f"{side}x{side}-k{kernel}",
            size=(args.images or PLANES[side][0], PLANES[side][1], side, side),
            multiplier=1,
            kernel=(kernel, kernel),
            stride=1,
            padding=(kernel // 2, kernel // 2),
            dilation=1,
            dtype=dtype,
            layout=layout,
            pass_name=pass_name,
        )
        for side, layout, dtype, pass_name, kernel in product(
            args.sides, args.layout, args.dtype, args.passes, range(3, args.largest + 1, args.step)
        )
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", nargs="+", type=int, choices=PLANES, default=list(PLANES), help="default: both")
    parser.add_argument("--largest", type=int, default=63, metavar="K", help="kernel; default: %(default)s")
    parser.add_argument("--step", type=int, default=2, help="even, from 3 on; default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: %(default)s"
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["NCHW"], help="default: %(default)s")
    parser.add_argument("--pass", nargs="+", choices=PASSES, default=PASSES, dest="passes", help="default: all three")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    add_alone(parser)
    parser.add_argument("--images", type=int, metavar="N", help="default: 32 of 56x56, 64 of 14x14")
    parser.add_argument("--output", type=Path, help="write JSON here; run.py plot draws it")


def main(args: argparse.Namespace) -> None:
    if args.step < 2 or args.step % 2:
        raise SystemExit(f"--step {args.step}: expected 2, 4, ..., since even kernels change the size of a plane")
    meta, cells = machine(), sweep_cells(args)
    results: list[dict[str, Any]] = []
    print(report.headline(meta))
    for result, cell in zip(timed(cells, args.quick, args.alone), cells):
        plane, kernel = f"{cell.size[2]}x{cell.size[3]}", cell.kernel[0]
        results.append(result | {"plane": plane, "kernel_size": kernel})
        if args.output:  # what is measured stays, should the run be cut short
            report.write_json(args.output, {"meta": meta, "sweep": results})
    print(report.sweep_summary(results))
    if args.output:
        print(f"written: {args.output}")
