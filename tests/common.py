"""What the tests share: cases, inputs and references."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dwconv

FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """A depthwise convolution, without its numbers."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    bias: bool = True

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def filters(self) -> int:
        return self.channels * self.multiplier

    def __str__(self) -> str:
        n, c, (h, w), (kh, kw), s, p, d, m, b = self
        return f"n{n}c{c}_{h}x{w}_k{kh}x{kw}_s{s[0]}x{s[1]}_p{p[0]}x{p[1]}_d{d[0]}x{d[1]}_m{m}" + "_b" * b


class Results(NamedTuple):
    """An output and the gradients that a gradient of it gives; `grad_bias` is None without a bias."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def torch_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry) -> Tensor:
    """What dwconv.conv2d stands for."""
    return F.conv2d(input, weight, bias, **geometry, groups=input.shape[-3])


def make_inputs(
    case: Case, dtype: torch.dtype, device: str, memory_format=torch.contiguous_format, make: Callable = torch.randn
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias (or None); `make(*size)` draws float numbers on the CPU."""
    input = make(case.batch, case.channels, *case.size).to(device, dtype).contiguous(memory_format=memory_format)
    weight = make(case.filters, 1, *case.kernel).to(device, dtype)
    bias = make(case.filters).to(device, dtype) if case.bias else None
    return input, weight, bias


def integers(*size: int) -> Tensor:
    """Whole numbers in [-3, 3]: sums of their products are exact in every dtype's accumulator."""
    return torch.randint(-3, 4, size).float()


def run(conv2d: Callable, tensors: tuple, grad_output: Tensor | Callable, **geometry) -> Results:
    """Output and gradients. `grad_output` is the output's gradient, or draws one of a given size on the CPU."""
    input, weight, bias = (None if t is None else t.detach().requires_grad_() for t in tensors)
    output = conv2d(input, weight, bias, **geometry)
    if callable(grad_output):
        grad_output = grad_output(*output.shape).to(output)
    wanted = [tensor for tensor in (input, weight, bias) if tensor is not None]
    grads = torch.autograd.grad(output, wanted, grad_output)
    return Results(output.detach(), grads[0], grads[1], grads[2] if bias is not None else None)


def run_float64(tensors: tuple, grad_output: Tensor, **geometry) -> Results:
    """The reference: F.conv2d in float64, contiguous, which never goes through cuDNN."""
    wide = tuple(None if t is None else t.detach().double().contiguous() for t in tensors)
    return run(torch_conv2d, wide, grad_output.double().contiguous(), **geometry)


def run_dwconv(tensors: tuple, grad_output: Tensor | Callable, **geometry) -> Results:
    return run(dwconv.conv2d, tensors, grad_output, **geometry)
