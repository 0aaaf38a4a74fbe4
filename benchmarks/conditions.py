"""Times layers as they are, and under conditions that should cost next to nothing.

misaligned: every tensor begins one element behind a multiple of 16 bytes. narrower: images two columns narrower, per
byte, so that rows of 512 columns end nowhere in particular (from 64 columns on). portable: the plan as GPUs before
sm_90 run it, where it has such a way.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import layers
import report
import torch
from cells import Cell, Tensors, plan_of, with_dwconv
from timing import DEVICE, measure, number_of_sets
from torch import Tensor
from tqdm import tqdm

LIMITS = {"misaligned": 1.10, "narrower": 1.10, "portable": 1.15}  # times as long: what is listed at the end


def misaligned(tensor: Tensor) -> Tensor:
    """The same, of the same strides, one element off."""
    storage = torch.empty(tensor.numel() + 1, device=tensor.device, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def us(cell: Cell, quick: bool, plan: str | None = None, aligned: bool = True) -> float:
    draws = [Tensors.draw(cell, DEVICE) for _ in range(number_of_sets(cell.bytes))]
    if not aligned:
        draws = [Tensors(*map(misaligned, (t.input, t.weight, t.grad_output))) for t in draws]
    return measure([lambda t=t: with_dwconv(cell, t, plan) for t in draws], 8e3 if quick else 40e3).us


def run_cell(cell: Cell, quick: bool) -> dict[str, Any]:
    plan = plan_of(cell, Tensors.draw(cell, "meta"))
    plain = us(cell, quick)
    times: dict[str, float | None] = {
        "misaligned": us(cell, quick, aligned=False) / plain,
        "narrower": None,
        "portable": None,
    }
    if cell.size[3] >= 64:
        narrower = replace(cell, size=(*cell.size[:3], cell.size[3] - 2))
        times["narrower"] = us(narrower, quick) / narrower.bytes / (plain / cell.bytes)
    try:
        times["portable"] = us(cell, quick, f"{plan}_portable") / plain
    except RuntimeError as error:  # no such plan: one way serves all GPUs, or there is no GPU
        if "plan" not in str(error):
            raise
    key = {"layer": cell.layer, "dtype": cell.dtype, "layout": cell.layout, "pass": cell.pass_name}
    return key | {"plan": plan, "us": plain, "times": times}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layers.add_selection(parser)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, help="write JSON here")


def line(result: dict[str, Any]) -> str:
    times = " ".join(f"{report.show(value):>10}" for value in result["times"].values())
    return (
        f"{result['layer']:<13} {result['dtype']:<9} {result['layout']:<13} {result['pass']:<11} "
        f"{result['plan']:<36} {result['us']:9.1f} {times}"
    )


def summary(results: list[dict[str, Any]]) -> str:
    """For each condition how many cells stay within its limit, and which do not."""
    text = []
    for condition, limit in LIMITS.items():
        found = [(r["times"][condition], r) for r in results if r["times"][condition] is not None]
        beyond = sorted((pair for pair in found if pair[0] > limit), key=lambda pair: -pair[0])
        text.append(f"{condition}: {len(found) - len(beyond)} of {len(found)} cells take at most {limit} times as long")
        text.extend(f"  {time:.2f} {' '.join(report.identity(result))} {result['plan']}" for time, result in beyond)
    return "\n".join(text)


def main(args: argparse.Namespace) -> None:
    meta, results = layers.machine(), []
    print(report.headline(meta))
    columns = " ".join(f"{condition:>10}" for condition in LIMITS)
    print(f"{'layer':<13} {'dtype':<9} {'layout':<13} {'pass':<11} {'plan':<36} {'us':>9} {columns}")
    for cell in tqdm(layers.selected(args), unit="cell", dynamic_ncols=True):
        results.append(run_cell(cell, args.quick))
        tqdm.write(line(results[-1]))
        layers.release_memory()
    print(summary(results))
    if args.output:
        report.write_json(args.output, {"meta": meta, "conditions": results})
        print(f"written: {args.output}")
