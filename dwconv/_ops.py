"""The operators ``torch.ops.dwconv.{forward, grad_input, grad_weight}``: loading them, and what they do off a device.

Their schemas and their CPU and CUDA implementations come with the binary (csrc/library.cpp). Here are those for fake
tensors (torch.compile, export, meta), and those that tell which tensors are not served.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C

BUILD: dict[str, Any] = _C.build_info()
prepare_short_way, short_way, has_short_way_back = _C.prepare_short_way, _C.short_way, _C.has_short_way_back
unpack_geometry = _C.unpack_geometry

forward = torch.ops.dwconv.forward.default
grad_input = torch.ops.dwconv.grad_input.default
grad_weight = torch.ops.dwconv.grad_weight.default
forward_packed = torch.ops.dwconv.forward.packed
forward_packed_cast = torch.ops.dwconv.forward.packed_cast
backward_packed = torch.ops.dwconv.backward.packed
backward_packed_bias = torch.ops.dwconv.backward.packed_bias


DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16


def dtype_complaint(tensor: Tensor, name: str) -> str:
    return f"expected {name} to be of dtype float32, float64, float16 or bfloat16, but got {tensor.dtype}"


def is_channels_last(tensor: Tensor) -> bool:
    """As ATen sees it, which settles the ties of sizes 1 by the strides."""
    if type(tensor) is Tensor:  # not a fake one: what is contiguous in one way alone is told at a tenth of the cost
        contiguous = tensor.is_contiguous()
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        if contiguous != last and (contiguous or 1 not in tensor.shape):
            return last
    return bool(torch._prims_common.suggest_memory_format(tensor) == torch.channels_last)


def output_is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """F.conv2d's rule for the memory format of its output: that of an empty batch is contiguous."""
    return input.shape[0] != 0 and (is_channels_last(input) or is_channels_last(weight))


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _size(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


_check = torch._check


# The checks of csrc/conv2d.cpp in its own words, for fake tensors: their sizes may be symbolic.

_LARGEST = 2**31 - 1


def _check_tensor(tensor: Tensor, name: str) -> None:
    _check(tensor.dim() == 4, lambda: f"expected {name} to have 4 dimensions, but got {name} of size: {_size(tensor)}")
    _check(tensor.dtype in DTYPES, lambda: dtype_complaint(tensor, name))


def _check_same(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    _check(a.dtype == b.dtype, lambda: f"{a_name} ({a.dtype}) and {b_name} ({b.dtype}) should be of the same dtype")
    _check(
        a.device == b.device,
        lambda: f"{a_name} and {b_name} should be on the same device, but got {a.device} and {b.device}",
    )


def _check_pair(pair: Sequence[int], name: str, smallest: int, complaint: str) -> None:
    got = f"but got {name}={list(pair)}"
    _check(len(pair) == 2, lambda: f"expected {name} to be a single integer value or a list of 2 values, {got}")
    _check(min(pair) >= smallest, lambda: f"{complaint} is not supported, {got}")
    _check(max(pair) <= _LARGEST, lambda: f"{name} is too large: expected at most {_LARGEST}, {got}")


def _output_size(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """[N, C * m, H_out, W_out] for an input and a weight of these sizes."""
    _check(
        weight[1] == 1,
        lambda: (
            "expected weight of a depthwise convolution to be of size [C * multiplier, 1, kH, kW], "
            f"but got weight of size {list(weight)}"
        ),
    )
    for side in weight[2:]:
        _check(
            side > 0,
            lambda: f"expected weight to have a kernel of at least 1 x 1, but got weight of size {list(weight)}",
        )
    _check_pair(stride, "stride", 1, "non-positive stride")
    _check_pair(dilation, "dilation", 1, "non-positive dilation")
    _check_pair(padding, "padding", 0, "negative padding")
    _check(input[1] > 0, lambda: f"expected input to have at least one channel, but got input of size {list(input)}")
    for fits in (weight[0] > 0, weight[0] % input[1] == 0):
        _check(
            fits,
            lambda: (
                f"Given weight of size {list(weight)}, expected the {weight[0]} filters to be a positive multiple "
                f"of the channels of input, but got input of size {list(input)} with {input[1]} channels"
            ),
        )
    for side in input[2:]:
        _check(
            side > 0,
            lambda: f"expected input to have a non-empty height and width, but got input of size {list(input)}",
        )
    padded = [size + 2 * p for size, p in zip(input[2:], padding)]
    window = [d * (k - 1) + 1 for k, d in zip(weight[2:], dilation)]
    for p, w in zip(padded, window):
        _check(
            p >= w,
            lambda: (
                f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
                f"Kernel size: ({window[0]} x {window[1]}). Kernel size can't be greater than actual input size"
            ),
        )
    return [input[0], weight[0], *((p - w) // s + 1 for p, w, s in zip(padded, window, stride))]


def _check_is_output(grad_output: Tensor, size: Sequence[int]) -> None:
    for got, expected in zip(grad_output.shape, size):
        _check(
            got == expected,
            lambda: f"expected grad_output to be of size {size}, but got grad_output of size {_size(grad_output)}",
        )


@torch.library.register_fake("dwconv::forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    allow_fft: bool = False,
) -> Tensor:
    _check(
        input.dim() == 4,
        lambda: f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {_size(input)}",
    )
    _check_tensor(input, "input")
    _check_same(input, "Input", weight, "weight")
    _check_tensor(weight, "weight")
    size = _output_size(input.shape, weight.shape, stride, padding, dilation)
    if bias is not None:
        _check_same(input, "Input", bias, "bias")
        for fits in (bias.dim() == 1, bias.numel() == size[1]):
            _check(
                fits,
                lambda: (
                    f"Given weight of size {_size(weight)}, expected bias to be 1-dimensional with {size[1]} "
                    f"elements, but got bias of size {_size(bias)} instead"
                ),
            )
    return torch.empty(
        size,
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
    allow_fft: bool = False,
) -> Tensor:
    _check_tensor(grad_output, "grad_output")
    _check_same(grad_output, "grad_output", weight, "weight")
    _check_tensor(weight, "weight")
    _check(len(input_size) == 4, lambda: f"expected input_size to be [N, C, H, W], but got input_size={input_size}")
    _check_is_output(grad_output, _output_size(input_size, weight.shape, stride, padding, dilation))
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
    allow_fft: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_tensor(grad_output, "grad_output")
    _check_same(grad_output, "grad_output", input, "input")
    _check_tensor(input, "input")
    _check_pair(kernel_size, "kernel_size", 1, "an empty kernel")
    filters = grad_output.shape[1]
    weight_size = (filters, 1, *kernel_size)
    _check_is_output(grad_output, _output_size(input.shape, weight_size, stride, padding, dilation))
    return input.new_empty(weight_size), input.new_empty(filters if bias else 0)


# Tensors that no kernel serves.

_implementations = torch.library.Library("dwconv", "IMPL")


def _without_kernel(op: torch._ops.OpOverload[..., Any], *arguments: Any) -> NoReturn:
    got = [
        f"{argument.name} of {value.dtype}, {value.layout} on {value.device}"
        for argument, value in zip(op._schema.arguments, arguments)
        if isinstance(value, Tensor)
    ]
    raise NotImplementedError(f"dwconv serves dense (torch.strided) tensors on cpu and cuda, but got {'; '.join(got)}")


def _without_cuda(*_: Any) -> NoReturn:
    raise RuntimeError(
        "dwconv was built without CUDA and cannot serve CUDA tensors. Install a wheel built with CUDA, or build one "
        "where the CUDA toolkit is found: DWCONV_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps ."
    )


for _op in (forward, grad_input, grad_weight):
    _implementations.impl(_op, functools.partial(_without_kernel, _op), "CompositeExplicitAutograd")
    if BUILD["cuda"] is None:
        _implementations.impl(_op, _without_cuda, "CUDA")
