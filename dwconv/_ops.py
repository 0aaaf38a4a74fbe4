"""The operators ``torch.ops.dwconv.{forward, grad_input, grad_weight}``: loading them, and what they do off a device.

Their schemas and their CPU and CUDA implementations come with the binary (csrc/library.cpp). Here are those for fake
tensors (torch.compile, export, meta) and, in a binary without CUDA, one that says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C

BUILD: dict[str, Any] = _C.build_info()

forward = torch.ops.dwconv.forward.default
grad_input = torch.ops.dwconv.grad_input.default
grad_weight = torch.ops.dwconv.grad_weight.default

if BUILD["cuda"] is not None and torch.version.cuda is None and torch.version.hip is None:
    warnings.warn(
        f"dwconv was built with CUDA {BUILD['cuda']}, but torch {torch.__version__} is a CPU build: CPU tensors work, "
        "CUDA tensors need a CUDA build of torch (https://pytorch.org/get-started/locally).",
        RuntimeWarning,
        stacklevel=3,
    )


def output_is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """F.conv2d's rule for the memory format of its output."""
    formats = (torch._prims_common.suggest_memory_format(input), torch._prims_common.suggest_memory_format(weight))
    return torch.channels_last in formats


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _check_same(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    torch._check(
        a.device == b.device,
        lambda: f"{a_name} and {b_name} should be on the same device, but got {a.device} and {b.device}",
    )
    torch._check(
        a.dtype == b.dtype,
        lambda: f"{a_name} ({a.dtype}) and {b_name} ({b.dtype}) should be of the same dtype",
    )


@torch.library.register_fake("dwconv::forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _check_same(input, "Input", weight, "weight")
    if bias is not None:
        _check_same(input, "Input", bias, "bias")
    shape = torch._meta_registrations.calc_conv_nd_return_shape(
        input, weight, stride, padding, dilation, False, input.shape[1]
    )
    return torch.empty(
        shape,
        dtype=input.dtype,
        device=input.device,
        memory_format=_memory_format(output_is_channels_last(input, weight)),
    )


@torch.library.register_fake("dwconv::grad_input")
def _(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    _check_same(grad_output, "grad_output", weight, "weight")
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=_memory_format(channels_last)
    )


@torch.library.register_fake("dwconv::grad_weight")
def _(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: bool,
) -> tuple[Tensor, Tensor]:
    _check_same(grad_output, "grad_output", input, "input")
    filters = grad_output.shape[1]
    return input.new_empty((filters, 1, *kernel_size)), input.new_empty(filters if bias else 0)


_implementations = torch.library.Library("dwconv", "IMPL")

if BUILD["cuda"] is None:

    def _without_cuda(*_: Any) -> NoReturn:
        raise RuntimeError(
            "dwconv was built without CUDA and cannot serve CUDA tensors. Install a wheel built with CUDA, or build "
            "one where the CUDA toolkit is found: DWCONV_CUDA=1 pip install --no-cache-dir --force-reinstall ."
        )

    for _name in ("forward", "grad_input", "grad_weight"):
        _implementations.impl(_name, _without_cuda, "CUDA")
