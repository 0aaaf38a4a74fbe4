"""Draws the results: roofline.png, speedup.png, x_copy.png, with --models models.png, with --sweep sweep.png.

The peaks of the roofline are given, not measured: by default what a plain FMA kernel and mma.sync reach on an H100 or
H200. Depthwise convolution on tensor cores multiplies zeros too; useful operations are what is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import report
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from report import Cell

# Okabe and Ito's colours, which the colour-blind tell apart.
PASSES = {"forward": "#0072B2", "grad_input": "#E69F00", "grad_weight": "#009E73"}
LAYOUTS = {"NCHW": "o", "channels_last": "^"}
DTYPES = ("float32", "float16", "bfloat16", "float64")
SWEEP_COLOURS = {"float32": "#0072B2", "float16": "#CC79A7", "bfloat16": "#E69F00", "float64": "#009E73"}
MODES = {"train": "training step", "latency": "inference", "throughput": "inference"}
GREY, DARK, RED = "#9A9A9A", "#333333", "#D55E00"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 140,
}


def plain(value: float, _: int = 0) -> str:
    return f"{value:g}"


def log_axis(axes: Axes, which: str, decades: float = 2) -> None:
    """Logarithmic, with labels as people write numbers; only powers of ten where there are more `decades`."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 10**decades else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def present(cells: Iterable[dict[str, Any]], key: str, wanted: Iterable[str]) -> list[str]:
    found = {cell[key] for cell in cells}
    return [name for name in wanted if name in found]


def dot(colour: str, label: str, marker: str = "o", **more: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label, **more)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
    print(f"written: {path}")


def title(meta: dict[str, Any], text: str) -> str:
    return f"{text}\n{meta['gpu']}, torch {meta['torch']}, {meta['date']}"


def roofline(meta: dict[str, Any], cells: Sequence[Cell], peaks: dict[str, float], path: Path) -> None:
    """Useful TFLOP/s over useful operations per byte, against what memory and arithmetic units allow."""
    dtypes = present(cells, "dtype", DTYPES)
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 5.6), sharey=True, squeeze=False)
    intensities = [cell["flops"] / cell["bytes"] for cell in cells]
    x = np.geomspace(min(intensities) / 1.6, max(intensities) * 1.6, 200)
    for axes, dtype in zip(panels[0], dtypes):
        memory = x * meta["copy_GBps"] / 1e3
        axes.plot(x, memory, color=DARK, linewidth=1.4)
        axes.fill_between(x, memory, 1e9, color="#F3F3F3", linewidth=0)
        for label, peak in peaks.items():
            if label.startswith("fp32") or dtype in ("float16", "bfloat16"):
                axes.axhline(peak, color=DARK, linewidth=1.1, linestyle="--")
                note = f"{label}, {peak:g} TFLOP/s"
                axes.annotate(note, (x[0], peak), (4, 4), textcoords="offset points", fontsize=10)
        chosen = [cell for cell in cells if cell["dtype"] == dtype]
        for cell in chosen:
            intensity = cell["flops"] / cell["bytes"]
            if cell["pytorch_us"]:
                theirs = cell["flops"] / 1e6 / cell["pytorch_us"]
                axes.plot(intensity, theirs, LAYOUTS[cell["layout"]], color=GREY, markersize=3.5, alpha=0.6, zorder=2)
            if cell["us"]:
                axes.plot(
                    intensity, report.teraflops(cell), LAYOUTS[cell["layout"]], color=PASSES[cell["pass"]],
                    markersize=6.5, markeredgecolor="white", markeredgewidth=0.5, zorder=3,
                )  # fmt: skip
        for kernel, intensity in kernel_labels(chosen):
            axes.annotate(
                kernel, (intensity, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, ha="center", va="bottom", fontsize=9.5, color="#666666",
            )  # fmt: skip
        axes.set_xlim(x[0], x[-1])
        log_axis(axes, "x", decades=4)
        log_axis(axes, "y")
        axes.set_title(dtype)
        axes.set_xlabel("useful FLOP per byte of input and output")
    ours = [cell["flops"] / 1e6 / us for cell in cells for us in (cell["us"], cell["pytorch_us"]) if us]
    panels[0, 0].set_ylim(min(ours) / 5, max(*peaks.values(), *ours) * 1.8)
    panels[0, 0].set_ylabel("useful TFLOP/s")
    handles = [dot(PASSES[name], name) for name in present(cells, "pass", PASSES)]
    handles += [dot(DARK, name, marker, fillstyle="none") for name, marker in LAYOUTS.items()]
    handles += [dot(GREY, "F.conv2d at its best", markersize=4), Line2D([], [], color=DARK, label=copy_label(meta))]
    figure.suptitle(title(meta, "Every layer on the roofline"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 * len(dtypes))
    save(figure, path)


def kernel_labels(cells: Sequence[Cell]) -> list[tuple[str, float]]:
    """Kernel sizes and their median intensities, as far as they do not collide; square ones first."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        found.setdefault(cell["kernel"], []).append(cell["flops"] / cell["bytes"])
    labels: list[tuple[str, float]] = []
    for kernel, intensities in sorted(found.items(), key=lambda item: len(set(item[0].split("x")))):
        where = median(intensities)
        if all(max(where, other) / min(where, other) > 1.25 for _, other in labels):
            labels.append((kernel, where))
    return labels


def copy_label(meta: dict[str, Any]) -> str:
    return f"copy, {meta['copy_GBps'] / 1e3:.2f} TB/s"


def speedups(meta: dict[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Geometric means over F.conv2d per class: bars in the same layout, marks against its better layout."""
    sizes = sorted({cell["kind"].split(",")[0] for cell in cells}, reverse=True)
    rows = [(layout, dtype) for layout in LAYOUTS for dtype in present(cells, "dtype", DTYPES)]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(6.6 * len(sizes), 1.2 + 0.95 * len(rows)), sharey=True, squeeze=False
    )
    for axes, size in zip(panels[0], sizes):
        for i, (layout, dtype) in enumerate(rows):
            for j, (name, colour) in enumerate(PASSES.items()):
                members = [
                    cell
                    for cell in cells
                    if (cell["layout"], cell["dtype"], cell["pass"]) == (layout, dtype, name)
                    and cell["kind"].startswith(size)
                ]
                same = report.geometric_mean(map(report.speedup, members))
                either = report.geometric_mean(map(report.speedup_any_layout, members))
                if same is None:
                    continue
                y = i + (j - 1) * 0.27
                axes.barh(y, same - 1, left=1, height=0.24, color=colour)
                beside = either if either is not None and same < either < 1.2 * same else same  # not under the mark
                axes.annotate(
                    f"{same:.1f}", (max(beside, 1), y), (5, 0), textcoords="offset points", va="center", fontsize=9.5
                )
                if either is not None:
                    mark = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
                    axes.plot(either, y, "D", color="black", **mark)
        axes.axvline(1, color=DARK, linewidth=1)
        log_axis(axes, "x")
        axes.set_title(size)
        axes.set_xlabel("times faster than F.conv2d, geometric mean")
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
    panels[0, 0].set_yticks(range(len(rows)), [f"{layout}\n{dtype}" for layout, dtype in rows])
    panels[0, 0].invert_yaxis()
    handles = [Patch(color=PASSES[name], label=name) for name in present(cells, "pass", PASSES)]
    handles.append(dot("black", "over F.conv2d in its better layout", "D", markersize=5))
    figure.suptitle(title(meta, "Speedup over F.conv2d in the same layout"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def multiples_of_copy(meta: dict[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Per layer, the time as a multiple of a copy, and the target."""
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    columns = list(product(present(cells, "dtype", DTYPES), present(cells, "layout", LAYOUTS)))
    figure, panels = plt.subplots(
        1, len(columns), figsize=(1.6 + 2.2 * len(columns), 2.2 + 0.33 * len(layers)), sharey=True, sharex=True,
        squeeze=False,
    )  # fmt: skip
    for axes, (dtype, layout) in zip(panels[0], columns):
        for i in range(0, len(layers), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        axes.axvline(1, color=DARK, linewidth=1, zorder=1)
        for cell in cells:
            if (cell["dtype"], cell["layout"]) != (dtype, layout):
                continue
            y = layers.index(cell["layer"]) + (list(PASSES).index(cell["pass"]) - 1) * 0.27
            colour = PASSES[cell["pass"]]
            axes.plot(cell["target_x_copy"], y, "|", color=colour, markersize=8, markeredgewidth=1.6, zorder=2)
            times = report.x_copy(cell)
            if times is None:
                axes.plot(cell["target_x_copy"], y, "X", color=RED, markersize=8, zorder=4)
            else:
                filled = colour if report.meets_target(cell) else "white"
                mark = {"markersize": 5, "markeredgecolor": colour, "markeredgewidth": 1.4}
                axes.plot(times, y, "o", color=filled, zorder=3, **mark)
        log_axis(axes, "x")
        axes.set_title(f"{dtype}\n{layout}")
        axes.set_xlabel("x copy")
        axes.grid(axis="y", visible=False)
    panels[0, 0].set_yticks(range(len(layers)), layers)
    panels[0, 0].set_ylim(len(layers) - 0.4, -0.6)
    handles = [dot(PASSES[name], name) for name in present(cells, "pass", PASSES)]
    handles.append(dot("white", "over target", markeredgecolor=DARK, markeredgewidth=1.4))
    handles.append(dot(DARK, "target", "|", markersize=9, markeredgewidth=1.6))
    if any(cell["us"] is None for cell in cells):
        handles.append(dot(RED, "wrong result", "X", markersize=8))
    figure.suptitle(title(meta, "Time of every layer as a multiple of y.copy_(x) of the same bytes"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def model_times(meta: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """After and possible as shares of before: a line per model, a panel per mode, dtype and layout."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    modes = present(rows, "mode", MODES)
    columns = list(product(present(rows, "dtype", DTYPES), present(rows, "layout", LAYOUTS)))
    figure, panels = plt.subplots(
        len(modes), len(columns), figsize=(2.2 + 3.7 * len(columns), 1.4 + (0.9 + 0.3 * len(models)) * len(modes)),
        sharey=True, squeeze=False,
    )  # fmt: skip
    shares = [row["after"]["ms"] / row["before"]["ms"] for row in rows if row["after"]["ms"]]
    for mode, line in zip(modes, panels):
        for axes, (dtype, layout) in zip(line, columns):
            chosen = [row for row in rows if (row["mode"], row["dtype"], row["layout"]) == (mode, dtype, layout)]
            for row in chosen:
                y, before, after = models.index(row["model"]), row["before"]["ms"], row["after"]["ms"]
                axes.barh(y, 100, height=0.66, color="#DDDDDD", zorder=1)
                if after is None:
                    axes.plot(100, y, "X", color=RED, markersize=9, zorder=3)
                else:
                    axes.barh(y, 100 * after / before, height=0.66, color=PASSES["forward"], zorder=2)
                    possible = 100 * row["possible_ms"] / before
                    axes.plot([possible] * 2, [y - 0.4, y + 0.4], color=PASSES["grad_input"], linewidth=2.5, zorder=3)
                axes.annotate(
                    f"{milliseconds(before)} \N{RIGHTWARDS ARROW} {milliseconds(after)}", (1, y), (4, 0),
                    xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=10,
                    annotation_clip=False,
                )  # fmt: skip
            batches = " or ".join(map(str, sorted({row["batch"] for row in chosen})))
            axes.set_title(f"{MODES[mode]}, batch {batches}\n{dtype}, {layout}")
            axes.set_xlim(0, 100 * max([1, *shares]))
            axes.grid(axis="y", visible=False)
        line[0].set_yticks(range(len(models)), models)
    for axes in panels[-1]:
        axes.set_xlabel("% of the time before")
    panels[0, 0].set_ylim(len(models) - 0.4, -0.6)
    handles = [
        Patch(color="#DDDDDD", label="before"),
        Patch(color=PASSES["forward"], label="after dwconv.convert"),
        Line2D([], [], color=PASSES["grad_input"], linewidth=2.5, label="with every depthwise pass as fast as a copy"),
    ]
    figure.suptitle(title(meta, "Whole models: milliseconds before and after"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def sweep(meta: dict[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Time over kernel size, ours and PyTorch's, a row per plane and layout; a tick where the plan changes."""
    lines = report.sweep_lines(cells)
    rows = list(dict.fromkeys((plane, layout) for plane, layout, _, _ in lines))
    passes = present(cells, "pass", PASSES)
    figure, panels = plt.subplots(
        len(rows), len(passes), figsize=(1 + 4.6 * len(passes), 1.4 + 3.6 * len(rows)), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for (plane, layout, dtype, name), line in lines.items():
        axes = panels[rows.index((plane, layout)), passes.index(name)]
        for key, style in {"us": "-", "pytorch_us": "--", "copy_us": ":"}.items():
            timed = [cell for cell in line if cell[key]]
            sizes, times = [cell["kernel_size"] for cell in timed], [cell[key] for cell in timed]
            axes.plot(sizes, times, style, color=SWEEP_COLOURS[dtype], linewidth=1.8 if key == "us" else 1.2)
        changes = [new for old, new in pairwise(line) if new["us"] and new["plan"] != old["plan"]]
        where, times = [cell["kernel_size"] for cell in changes], [cell["us"] for cell in changes]
        axes.plot(where, times, "|", color=SWEEP_COLOURS[dtype], markersize=11, markeredgewidth=1.6)
        axes.set_title(f"{plane}, {layout}, {name}")
    for axes in panels.flat:
        log_axis(axes, "y")
    for axes in panels[-1]:
        axes.set_xlabel("K, of a K x K kernel")
    for axes in panels[:, 0]:
        axes.set_ylabel("microseconds")
    handles = [Line2D([], [], color=SWEEP_COLOURS[name], label=name) for name in present(cells, "dtype", DTYPES)]
    handles += [
        Line2D([], [], color=DARK, linestyle=style, label=label)
        for style, label in (("-", "dwconv"), ("--", "F.conv2d at its best"), (":", "copy"))
    ]
    handles.append(dot(DARK, "another plan from here on", "|", markersize=11, markeredgewidth=1.6))
    figure.suptitle(title(meta, "Cost of a kernel by its size"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def milliseconds(value: float | None) -> str:
    return "wrong" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="JSON written by layers")
    parser.add_argument("--models", type=Path, metavar="JSON", help="written by models")
    parser.add_argument("--sweep", type=Path, metavar="JSON", help="written by sweep")
    parser.add_argument("--output-dir", type=Path, default=Path("."), metavar="DIR", help="default: here")
    parser.add_argument("--fp32-tflops", type=float, default=60, metavar="TFLOPS", help="peak; default: %(default)s")
    parser.add_argument("--tensor-tflops", type=float, default=640, metavar="TFLOPS", help="peak; default: %(default)s")


def main(args: argparse.Namespace) -> None:
    result = report.load(args.results, "cells")
    meta, cells = result["meta"], result["cells"]
    peaks = {"fp32 FMA": args.fp32_tflops, "tensor cores": args.tensor_tflops}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        roofline(meta, cells, peaks, args.output_dir / "roofline.png")
        speedups(meta, cells, args.output_dir / "speedup.png")
        multiples_of_copy(meta, cells, args.output_dir / "x_copy.png")
        if args.models:
            models = report.load(args.models, "models")
            model_times(models["meta"], models["models"], args.output_dir / "models.png")
        if args.sweep:
            swept = report.load(args.sweep, "sweep")
            sweep(swept["meta"], swept["sweep"], args.output_dir / "sweep.png")
