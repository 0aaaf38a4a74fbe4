"""Compares two results of `layers`, cell by cell: what got slower by more than the noise, or wrong.

What counts is the time as a multiple of the copy measured beside it, so that a machine in another state cancels. Noise
is the sum of the relative spreads of the four times, but at least 3 %. The exit status is 1 if a cell got slower or
wrong; cells that only one file holds are listed and do not count, unless a new one is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import report
from report import Cell, show

LEAST_NOISE = 0.03


def noise_of(cell: Cell) -> float:
    """The relative spreads of a cell's time and of its copy's."""
    return cell.get("spread_us", 0.0) / cell["us"] + cell.get("copy_spread_us", 0.0) / cell["copy_us"]


@dataclass(frozen=True)
class Change:
    """A cell of both files."""

    before: Cell
    after: Cell

    @property
    def ratio(self) -> float | None:
        """Of the times by their copies; above 1 is slower."""
        return report.ratio(report.x_copy(self.after), report.x_copy(self.before))

    @property
    def noise(self) -> float:
        """How much of the ratio says nothing. Only where both times are known."""
        return max(LEAST_NOISE, noise_of(self.before) + noise_of(self.after))

    @property
    def verdict(self) -> str:
        if self.after["us"] is None:
            return "WRONG" if self.before["us"] is not None else "still wrong"
        if self.ratio is None:
            return "no longer wrong"
        if self.ratio > 1 + self.noise:
            return "SLOWER"
        return "faster" if self.ratio < 1 / (1 + self.noise) else ""

    def row(self) -> Sequence[str]:
        plans = dict.fromkeys((self.before["plan"], self.after["plan"]))
        return (
            " ".join(report.identity(self.after)),
            " -> ".join(plans),
            *(show(cell["us"], ".1f") for cell in (self.before, self.after)),
            *(show(report.x_copy(cell)) for cell in (self.before, self.after)),
            show(self.ratio, ".3f"),
            show(self.noise, ".1%") if self.ratio else "-",
            self.verdict,
        )


HEADER = ("cell", "plan", "us before", "us after", "x copy before", "x copy after", "ratio", "noise", "verdict")


def listed(title: str, cells: Sequence[Cell]) -> str:
    return "\n".join((f"\n{title}: {len(cells)}", *(f"  {' '.join(report.identity(cell))}" for cell in cells)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="JSON written by layers")
    parser.add_argument("after", type=Path, help="likewise, later")
    parser.add_argument("--changed", action="store_true", help="leave out cells that are as fast as before")


def main(args: argparse.Namespace) -> None:
    files = [report.load(path, "cells") for path in (args.before, args.after)]
    before, after = ({report.identity(cell): cell for cell in file["cells"]} for file in files)
    for name, file in zip(("before", "after "), files):
        print(f"{name}: {report.headline(file['meta'])}", end="")
    if files[0]["meta"]["gpu"] != files[1]["meta"]["gpu"]:
        print("These are different GPUs: even multiples of a copy are not quite comparable.")

    changes = [Change(before[key], cell) for key, cell in after.items() if key in before]
    new = [cell for key, cell in after.items() if key not in before]
    missing = [cell for key, cell in before.items() if key not in after]
    changes.sort(key=lambda change: change.ratio or float("inf"), reverse=True)
    shown = [change for change in changes if change.verdict or not args.changed]
    if shown:
        print(f"\n{report.table(HEADER, (change.row() for change in shown))}")

    def count(*verdicts: str) -> int:
        return sum(change.verdict in verdicts for change in changes)

    mean = report.geometric_mean(change.ratio for change in changes)
    print(
        f"\n{len(changes)} cells: {count('SLOWER')} slower, {count('faster')} faster, {count('WRONG')} got wrong, "
        f"{count('still wrong')} still wrong; geometric mean of the ratios: {show(mean, '.3f')}"
    )
    if new:
        print(listed("New", new))
    if missing:
        print(listed("Missing", missing))
    wrong = [cell for cell in new if cell["us"] is None]
    if wrong:
        print(listed("New and WRONG", wrong))
    if count("SLOWER", "WRONG") or wrong:
        raise SystemExit(1)
