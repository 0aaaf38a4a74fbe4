"""What the benchmarks print and write: lines, tables, JSON, Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
PYTORCH = ("cudnn", "native")  # how the names of its contestants begin


def driver_version() -> str:
    """Of the NVIDIA driver, as the kernel module tells it."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word.replace(".", "").isdigit() and word.count(".") >= 1), "unknown")


def headline(meta: dict[str, Any]) -> str:
    return (
        f"{meta['gpu']}, driver {meta['driver']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, "
        f"copy {meta['copy_GBps']:.0f} GB/s, {meta['date']}\n"
    )


def identity(cell: Cell) -> tuple[str, str, str, str]:
    return cell["layer"], cell["dtype"], cell["layout"], cell["pass"]


def load(path: Path, key: str) -> dict[str, Any]:
    """A result file that holds `key`."""
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if key not in result:
        raise SystemExit(f"{path} holds {', '.join(result)}, but no {key}")
    return result


def earlier(path: Path | None, meta: dict[str, Any], key: str, older: bool = False) -> list[dict[str, Any]]:
    """What `path` holds already, if it was measured with the same GPU, torch and, unless `older`, sources.

    Where the sources differ, each result says which ones it speaks for.
    """
    if path is None or not path.exists():
        return []
    before = load(path, key)
    same = ("gpu", "torch") if older else ("gpu", "torch", "csrc_sha256")
    other = [name for name in same if before["meta"][name] != meta[name]]
    if other:
        raise SystemExit(f"{path} was measured with another {', '.join(other)}: choose another --output")
    source = before["meta"]["csrc_sha256"]
    if source != meta["csrc_sha256"]:
        for result in before[key]:
            result.setdefault("csrc_sha256", source)
    return before[key]


def older_sources(cells: Iterable[Cell]) -> str:
    """A sentence on the cells that were measured before the sources changed; nothing where there are none."""
    count = sum("csrc_sha256" in cell for cell in cells)
    return f" {count} cells were measured with earlier sources." if count else ""


def write_text(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def x_copy(cell: Cell) -> float | None:
    return ratio(cell["us"], cell["copy_us"])


def speedup(cell: Cell) -> float | None:
    """Over the best PyTorch in the same layout."""
    return ratio(cell["pytorch_us"], cell["us"])


def speedup_any_layout(cell: Cell) -> float | None:
    return ratio(cell["pytorch_any_layout_us"], cell["us"])


def gigabytes_per_second(cell: Cell) -> float | None:
    return ratio(cell["bytes"] / 1e3, cell["us"])


def teraflops(cell: Cell) -> float | None:
    """Useful ones: two operations for each tap that meets the image."""
    return ratio(cell["flops"] / 1e6, cell["us"])


def meets_target(cell: Cell) -> bool:
    times, target = x_copy(cell), cell["target_x_copy"]
    return times is not None and target is not None and times <= target


def show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


CELL_HEADER = (
    f"{'layer':<13} {'dtype':<9} {'layout':<13} {'pass':<11} {'plan':<14} {'us':>9} {'± us':>6} {'x copy':>7} "
    f"{'target':>6}    {'x torch':>7} {'any':>6} {'GB/s':>6} {'TFLOP/s':>8} {'error':>8}"
)


def wrong(cell: Cell) -> list[str]:
    """The contestants whose results were wrong, and which were therefore not timed."""
    return [name for name, us in {"dwconv": cell["us"], **cell["contestants_us"]}.items() if us is None]


def cell_line(cell: Cell) -> str:
    us = cell["us"]
    others = {name: us for name, us in cell["contestants_us"].items() if us and not name.startswith(PYTORCH)}
    notes = [f"{name} {us:.1f} us" for name, us in others.items()] + [f"WRONG: {name}" for name in wrong(cell)]
    return (
        f"{cell['layer']:<13} {cell['dtype']:<9} {cell['layout']:<13} {cell['pass']:<11} {cell['plan']:<14} "
        f"{show(us, '.1f'):>9} {show(cell['spread_us'], '.1f'):>6} {show(x_copy(cell)):>7} "
        f"{show(cell['target_x_copy']):>6} {'ok' if meets_target(cell) else '  '} "
        f"{show(speedup(cell)):>7} {show(speedup_any_layout(cell)):>6} {show(gigabytes_per_second(cell), '.0f'):>6} "
        f"{show(teraflops(cell), '.1f'):>8} {show(cell['relative_error'], '.1e'):>8}  {', '.join(notes)}"
    ).rstrip()


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def by_kind(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(f"{cell['kind']}, {cell['pass']}", []).append(cell)
    return dict(sorted(kinds.items()))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown that also reads well as plain text."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def means_table(cells: Sequence[Cell]) -> str:
    """Per class: how far from a copy, how far ahead of PyTorch, how many targets met."""
    return table(
        ("class", "cells", "x copy", "x F.conv2d, same layout", "x F.conv2d, any layout", "targets met"),
        (
            (
                kind,
                str(len(members)),
                show(geometric_mean(map(x_copy, members))),
                show(geometric_mean(map(speedup, members))),
                show(geometric_mean(map(speedup_any_layout, members))),
                f"{sum(map(meets_target, members))} of {len(members)}",
            )
            for kind, members in by_kind(cells).items()
        ),
    )


def cells_table(cells: Iterable[Cell]) -> str:
    return table(
        ("cell", "plan", "us", "x copy", "target", "x F.conv2d", "any layout", "GB/s", "TFLOP/s", "error"),
        (
            (
                " ".join(identity(cell)),
                cell["plan"],
                show(cell["us"], ".1f"),
                show(x_copy(cell)),
                show(cell["target_x_copy"]),
                show(speedup(cell)),
                show(speedup_any_layout(cell)),
                show(gigabytes_per_second(cell), ".0f"),
                show(teraflops(cell), ".1f"),
                show(cell["relative_error"], ".1e"),
            )
            for cell in cells
        ),
    )


def section(title: str, cells: Sequence[Cell], most: int | None = None) -> str:
    shown = cells[:most]
    more = f"\n... and {len(cells) - len(shown)} more" if len(shown) < len(cells) else ""
    return f"\n## {title}: {len(cells)}\n\n{cells_table(shown)}{more}" if cells else f"\n## {title}: none"


def wrong_section(cells: Sequence[Cell]) -> str:
    rows = [(" ".join(identity(cell)), ", ".join(wrong(cell))) for cell in cells if wrong(cell)]
    title = "\n## Wrong results, which are not timed"
    return f"{title}: {len(rows)}\n\n{table(('cell', 'contestants'), rows)}" if rows else f"{title}: none"


def summary(cells: Sequence[Cell], most: int | None = 20) -> str:
    def over_target(cell: Cell) -> float:
        times = x_copy(cell)
        return math.inf if times is None else times / cell["target_x_copy"]

    def sort(chosen: Iterable[Cell], key: Callable[[Cell], float], reverse: bool) -> list[Cell]:
        return sorted(chosen, key=key, reverse=reverse)

    worst = sort(cells, over_target, True)
    return "\n".join(
        (
            "\n## Geometric means\n",
            means_table(cells),
            wrong_section(cells),
            section("The ten farthest from their targets", worst[:10]),
            section("Over target", [cell for cell in worst if not meets_target(cell)], most),
            section(
                "Slower than PyTorch in the same layout",
                sort((c for c in cells if (speedup(c) or 1) < 1), lambda c: speedup(c) or 0, False),
                most,
            ),
        )
    )


def write_layers(result: dict[str, Any], path: Path) -> None:
    """JSON to `path`, and the summary with every cell as Markdown beside it."""
    write_json(path, result)
    text = f"# {headline(result['meta'])}{older_sources(result['cells'])}{summary(result['cells'], None)}\n"
    write_text(path.with_suffix(".md"), f"{text}\n## Every cell\n\n{cells_table(result['cells'])}\n")


def sweep_lines(cells: Iterable[Cell]) -> dict[tuple[str, str, str, str], list[Cell]]:
    """The cells of a sweep by plane, layout, dtype and pass, each with its kernels in ascending order."""
    lines: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell["kernel_size"]):
        lines.setdefault((cell["plane"], cell["layout"], cell["dtype"], cell["pass"]), []).append(cell)
    return lines


CLIFF = 1.2


def cliffs(line: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Pairs of neighbouring kernels in whose times there is a step that their sizes do not explain.

    Either the larger kernel costs more than CLIFF times what its useful operations explain, or it is cheaper by as
    much: then what served it would have served the smaller one better.
    """
    for smaller, larger in pairwise(cell for cell in line if cell["us"]):
        step = larger["us"] / smaller["us"]
        if step > CLIFF * max(larger["flops"] / smaller["flops"], 1) or step < 1 / CLIFF:
            yield smaller, larger


def sweep_summary(cells: Iterable[Cell]) -> str:
    lines = sweep_lines(cells)
    found = [(key, pair) for key, line in lines.items() for pair in cliffs(line)]
    rows = [(*key, *(f"{cell['kernel']}: {cell['us']:.1f} us, {cell['plan']}" for cell in pair)) for key, pair in found]
    slower = [cell for line in lines.values() for cell in line if (speedup(cell) or 1) < 1]
    means = [(*key, show(geometric_mean(map(speedup, line)), ".1f")) for key, line in lines.items()]
    header = ("plane", "layout", "dtype", "pass")
    return "\n".join(
        (
            f"\n## Geometric means\n\n{table((*header, 'x F.conv2d'), means)}",
            f"\n## Cliffs: {len(rows) or 'none'}",
            *([f"\n{table((*header, 'smaller', 'larger'), rows)}"] if rows else []),
            section("Slower than PyTorch in the same layout", slower, 20),
        )
    )


def shapes_summary(cells: Sequence[Cell]) -> str:
    """How far ahead of PyTorch, what is wrong, and all that is slower."""
    means = table(
        ("class", "cells", "x copy", "x F.conv2d"),
        (
            (
                kind,
                str(len(members)),
                show(geometric_mean(map(x_copy, members))),
                show(geometric_mean(map(speedup, members))),
            )
            for kind, members in by_kind(cells).items()
        ),
    )
    slower = sorted((c for c in cells if (speedup(c) or 1) < 1), key=lambda c: speedup(c) or 0)
    return "\n".join((f"\n## Geometric means\n\n{means}", wrong_section(cells), section("Slower than PyTorch", slower)))


def model_speedup(row: dict[str, Any]) -> float | None:
    return ratio(row["before"]["ms"], row["after"]["ms"])


def models_table(rows: Iterable[dict[str, Any]]) -> str:
    def figure(row: dict[str, Any], state: str, key: str, form: str) -> str:
        return show(row[state][key], form)

    return table(
        ("model", "mode", "dtype", "layout", "batch", "before, ms", "after, ms", "possible, ms", "faster",
         "depthwise before", "depthwise after", "images/s before", "images/s after", "MiB before", "MiB after"),
        (
            (
                *(row[key] for key in ("model", "mode", "dtype", "layout")),
                str(row["batch"]),
                figure(row, "before", "ms", ".2f"),
                figure(row, "after", "ms", ".2f"),
                show(row["possible_ms"]),
                show(model_speedup(row)),
                figure(row, "before", "depthwise_share", ".0%"),
                figure(row, "after", "depthwise_share", ".0%"),
                figure(row, "before", "images_per_s", ".0f"),
                figure(row, "after", "images_per_s", ".0f"),
                figure(row, "before", "peak_MiB", ".0f"),
                figure(row, "after", "peak_MiB", ".0f"),
            )
            for row in rows
        ),
    )  # fmt: skip


def models_summary(rows: Sequence[dict[str, Any]]) -> str:
    """Per mode, dtype and layout: how much faster the models became, and how much faster they could be."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["dtype"], row["layout"]), []).append(row)
    means = table(
        ("mode", "dtype", "layout", "models", "faster", "possible"),
        (
            (
                *key,
                str(len(members)),
                show(geometric_mean(map(model_speedup, members))),
                show(geometric_mean(ratio(row["before"]["ms"], row["possible_ms"]) for row in members)),
            )
            for key, members in groups.items()
        ),
    )
    return f"\n## Geometric means\n\n{means}"


def write_models(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    text = f"# {headline(result['meta'])}{models_summary(result['models'])}\n"
    write_text(path.with_suffix(".md"), f"{text}\n## Every model\n\n{models_table(result['models'])}\n")
