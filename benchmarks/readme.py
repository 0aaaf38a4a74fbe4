"""Writes the table of results into README.md, between two markers; --check only says whether it is up to date."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import report
from report import Cell, show

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
FIRST_CASE = "seed"
PASSES = ("forward", "grad_input", "grad_weight")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def order(kind: str) -> tuple[bool, str, int]:
    """Small kernels first, NCHW first, the most used dtype first."""
    size, layout, dtype = kind.split(", ")
    return size.startswith("large"), layout, DTYPES.index(dtype)


def classes_table(cells: Sequence[Cell]) -> str:
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(cell["kind"], []).append(cell)
    return report.table(
        ("class", "x F.conv2d", "x copy", "cells", "targets met"),
        (
            (
                kind,
                show(report.geometric_mean(map(report.speedup, kinds[kind])), ".1f"),
                show(report.geometric_mean(map(report.x_copy, kinds[kind]))),
                str(len(kinds[kind])),
                str(sum(map(report.meets_target, kinds[kind]))),
            )
            for kind in sorted(kinds, key=order)
        ),
    )


def first_case_table(cells: Sequence[Cell]) -> str:
    def figure(cell: Cell | None) -> str:
        if cell is None or cell["us"] is None:
            return "-"
        times = report.speedup(cell)
        return f"{cell['us']:.0f} us" + (f" ({times:.1f} x)" if times else "")

    found = {report.identity(cell): cell for cell in cells if cell["layer"] == FIRST_CASE}
    settings = sorted({key[1:3] for key in found}, key=lambda key: (key[1], DTYPES.index(key[0])))
    return report.table(
        ("layout", "dtype", *PASSES),
        (
            (layout, dtype, *(figure(found.get((FIRST_CASE, dtype, layout, name))) for name in PASSES))
            for dtype, layout in settings
        ),
    )


def beside_pytorch(cells: Sequence[Cell]) -> str:
    """A sentence on how many cells F.conv2d was timed beside; nothing where these are all."""
    count = sum(cell["pytorch_us"] is not None for cell in cells)
    return f" F.conv2d was timed beside {count} of the {len(cells)} cells." if count < len(cells) else ""


def parts(result: dict[str, Any]) -> Iterator[str]:
    meta, cells = result["meta"], result["cells"]
    yield (
        f"Measured on {meta['gpu']} with torch {meta['torch']}, {meta['date']}; a copy runs at {meta['copy_GBps']:.0f} "
        "GB/s. Geometric means over layers of real models, forward and both gradients: how many times faster than "
        "F.conv2d at its best in the same layout, and how many times slower than `y.copy_(x)` of the same bytes. Large "
        "kernels are those above 7x7, single rows and columns aside."
        f"{beside_pytorch(cells)}{report.older_sources(cells)}"
    )
    yield classes_table(cells)
    if any(cell["layer"] == FIRST_CASE for cell in cells):
        yield "The first case, 3x3 on x (16, 64, 512, 512), and how many times faster that is than F.conv2d:"
        yield first_case_table(cells)


def updated(text: str, result: dict[str, Any], path: Path) -> str:
    """README with the table of this result."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{path} needs one line {BEGIN} and one {END} after it")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + "\n\n".join((BEGIN, *parts(result), END)) + after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="JSON written by layers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md would change")
    parser.add_argument("--readme", type=Path, default=README, metavar="PATH", help="default: README.md")


def main(args: argparse.Namespace) -> None:
    text = args.readme.read_text()
    new = updated(text, report.load(args.results, "cells"), args.readme)
    if args.check and new != text:
        raise SystemExit(f"{args.readme} is out of date: python benchmarks/run.py readme {args.results}")
    if not args.check:
        report.write_text(args.readme, new)
        print(f"written: {args.readme}")
