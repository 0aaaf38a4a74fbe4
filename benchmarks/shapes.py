"""Times problems that nobody listed against PyTorch: drawn at random, the same ones for the same seed.

Sizes, kernels, strides, dilations, multipliers, dtypes and layouts are drawn as models have them, and as nobody would
choose them: odd channels, flat kernels, strides that leave rows out. Plans have to be right about these as well. Every
result is checked against float64 before it is timed, unless --alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import report
from cells import DTYPES, LAYOUTS, PASSES, Cell
from layers import add_alone, machine, timed

BYTES = (1 << 16, 1 << 27)  # of the tensors of a problem: neither a launch alone nor seconds of copies
MAX_FLOPS = 1e10  # PyTorch takes some 10 ms for these
CHANNELS = (3, 16, 24, 32, 40, 48, 64, 96, 112, 128, 144, 192, 240, 256, 320, 384, 480, 512, 576, 672, 768, 960)
KERNELS: dict[Callable[[random.Random], list[int]], int] = {  # rows and columns, and how often
    lambda draw: [draw.choice((1, 3, 3, 3, 5, 5, 7))] * 2: 10,
    lambda draw: [draw.randint(1, 7), draw.randint(1, 7)]: 4,
    lambda draw: draw.sample([1, draw.randint(3, 31)], 2): 2,
    lambda draw: [draw.randint(8, 31)] * 2: 3,
    lambda draw: [draw.randint(2, 31), draw.randint(2, 31)]: 2,
}


def _log_uniform(draw: random.Random, least: int, most: int) -> int:
    return round(least * (most / least) ** draw.random())


def _draw(draw: random.Random) -> Cell | None:
    """A problem, or None for one without outputs, too small or too large."""
    (draw_kernel,) = draw.choices(list(KERNELS), list(KERNELS.values()))
    kernel = draw_kernel(draw)
    height = _log_uniform(draw, 5, 512)
    width = height if draw.random() < 0.6 else _log_uniform(draw, 5, 512)
    channels = draw.choice(CHANNELS) if draw.random() < 0.7 else _log_uniform(draw, 1, 1000)
    (dilation,) = draw.choices((1, 2, 3), (17, 2, 1))
    (stride,) = draw.choices((1, 2, 3, 4), (12, 6, 1, 1))
    (multiplier,) = draw.choices((1, 2, 3), (17, 2, 1))
    reach = [dilation * (side - 1) for side in kernel]
    (padding,) = draw.choices(([r // 2 for r in reach], [0, 0], [draw.randint(0, r) for r in reach]), (14, 4, 2))
    cell = Cell(
        layer="",
        size=(_log_uniform(draw, 1, 128), channels, height, width),
        multiplier=multiplier,
        kernel=(kernel[0], kernel[1]),
        stride=stride,
        padding=(padding[0], padding[1]),
        dilation=dilation,
        dtype=draw.choices(DTYPES, (7, 4, 7, 2))[0],
        layout=draw.choice(list(LAYOUTS)),
        pass_name=draw.choice(PASSES),
    )
    possible = min(cell.output_size) > 0 and BYTES[0] <= cell.bytes <= BYTES[1]
    return cell if possible and cell.flops <= MAX_FLOPS else None


def _name(cell: Cell) -> str:
    """All of a problem, so that a line of results says what to time again."""
    sizes = [cell.size, cell.kernel, *([cell.padding] if any(cell.padding) else [])]
    text = [letter + "x".join(map(str, size)) for letter, size in zip(("", "k", "p"), sizes)]
    more = zip("sdm", (cell.stride, cell.dilation, cell.multiplier))
    return "-".join([*text, *(f"{letter}{value}" for letter, value in more if value > 1)])


def draw_cells(count: int, seed: int) -> Iterator[Cell]:
    """`count` problems, the same ones for the same seed."""
    draw = random.Random(seed)
    while count:
        cell = _draw(draw)
        if cell:
            count -= 1
            yield replace(cell, layer=_name(cell))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=200, help="of problems; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    add_alone(parser)
    parser.add_argument("--output", type=Path, help="write JSON here")


def main(args: argparse.Namespace) -> None:
    meta, results = machine(), []
    print(report.headline(meta))
    for result in timed(list(draw_cells(args.count, args.seed)), args.quick, args.alone):
        results.append(result)
        if args.output:  # what is measured stays, should the run be cut short
            report.write_json(args.output, {"meta": meta, "shapes": results})
    print(report.shapes_summary(results))
    if args.output:
        print(f"written: {args.output}")
