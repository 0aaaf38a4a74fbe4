"""Adapters for third-party depthwise kernels, timed where the user has them installed.

dwconv2d                                github.com/ShqWW/dwconv2d: float32, stride 1, odd kernels of 5 or more
_depthwise_conv2d_implicit_gemm_C       MegEngine's CUTLASS example 19: float32 and float16, stride 1, same padding
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

from cells import Cell, Tensors
from torch import Tensor


@cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _serves_plain(cell: Cell) -> bool:
    return cell.layout == "NCHW" and cell.stride == cell.dilation == cell.multiplier == 1


def _shqww(cell: Cell, t: Tensors) -> Tensor:
    module = _module("dwconv2d")
    assert module is not None
    if cell.pass_name == "forward":
        return module.dwconv2d_fp32(t.input, t.weight, *cell.padding)
    if cell.pass_name == "grad_input":
        return module.dwconv2d_fp32_dgrad(t.grad_output, t.weight.flip(2, 3), *cell.padding)
    return module.dwconv2d_fp32_wgrad(t.input, t.grad_output, *cell.padding)


def _megengine(cell: Cell, t: Tensors) -> Tensor:
    module = _module("_depthwise_conv2d_implicit_gemm_C")
    suffix = {"float32": "fp32", "float16": "fp16"}[cell.dtype]
    if cell.pass_name == "forward":
        return getattr(module, f"forward_{suffix}")(t.input, t.weight)
    if cell.pass_name == "grad_input":
        return getattr(module, f"backward_data_{suffix}")(t.grad_output, t.weight)
    return getattr(module, f"backward_filter_{suffix}")(t.grad_output, t.input, t.weight)


def available(cell: Cell) -> Iterator[tuple[str, Callable[[Cell, Tensors], Tensor]]]:
    """Those that are installed and serve the cell."""
    if not _serves_plain(cell):
        return
    odd = all(side % 2 == 1 for side in cell.kernel)
    if cell.dtype == "float32" and odd and min(cell.kernel) >= 5 and _module("dwconv2d"):
        yield "shqww", _shqww
    same = odd and cell.padding == tuple(side // 2 for side in cell.kernel)
    if cell.dtype in ("float32", "float16") and same and _module("_depthwise_conv2d_implicit_gemm_C"):
        yield "megengine", _megengine
