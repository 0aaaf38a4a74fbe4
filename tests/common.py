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


def reach_of(kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """How far apart its outermost taps lie; that much padding lets each of them meet every pixel."""
    height, width = (d * (side - 1) for side, d in zip(kernel, dilation))
    return height, width


def halves(sides: tuple[int, int]) -> tuple[int, int]:
    """Of a reach, or of an odd kernel: the padding that keeps the size at stride 1."""
    return sides[0] // 2, sides[1] // 2


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

    @property
    def reach(self) -> tuple[int, int]:
        return reach_of(self.kernel, self.dilation)

    @property
    def has_outputs(self) -> bool:
        """Whether its padded images are as large as its kernel."""
        return all(side + 2 * p > r for side, p, r in zip(self.size, self.padding, self.reach))

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


def magnitudes(tensors: tuple, grad_output: Tensor, **geometry) -> Results:
    """What rounding errors are measured by: the results with every product and summand taken as positive."""
    return run_float64(tuple(None if t is None else t.detach().abs() for t in tensors), grad_output.abs(), **geometry)


def assert_accurate(results: Results, exact: Results, magnitude: Results, slack: float = 1) -> None:
    """Asserts that each result is a sum in float32, or float64, that was rounded to its dtype once.

    With a `slack` above 1, `exact` may be what F.conv2d computes in the same dtype: it may keep sums in 16 bits.
    """
    for name, result, reference, size in zip(Results._fields, results, exact, magnitude):
        if reference is None:
            assert result is None, name
            continue
        assert result.shape == reference.shape, name
        dtype = torch.finfo(result.dtype)
        sum_error = 16 * min(dtype.eps, torch.finfo(torch.float32).eps)
        if dtype.bits == 16 and (slack > 1 or result.device.type == "cpu"):  # CPU tensors go to ATen's convolution
            sum_error = 2 * dtype.eps
        reference = reference.double()
        bound = slack * (sum_error * size + dtype.eps * (reference.abs() + dtype.smallest_normal))
        error = (result.double() - reference).abs()
        wrong = ~(error <= bound)  # NaN is wrong too
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} numbers are off, by up to {error.max():.3g}"


class Sample(NamedTuple):
    """A sample of PyTorch's own tests of F.conv2d, to be made depthwise."""

    size: tuple[int, ...]
    kernel: tuple[int, int]
    bias: bool
    arguments: dict[str, int | tuple[int, int] | str]

    def tensors(
        self, multiplier: int, dtype: torch.dtype, device: str, memory_format=torch.contiguous_format
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        filters = self.size[-3] * multiplier
        input = torch.randn(self.size).to(device, dtype)
        if input.dim() == 4:
            input = input.contiguous(memory_format=memory_format)
        weight = torch.randn(filters, 1, *self.kernel).to(device, dtype)
        return input, weight, torch.randn(filters).to(device, dtype) if self.bias else None

    def __str__(self) -> str:
        arguments = "_".join(f"{key}{value}" for key, value in self.arguments.items())
        return "x".join(map(str, self.size)) + f"_k{self.kernel}_{arguments}".replace(" ", "") + "_b" * self.bias


# Written down, since importing PyTorch's own takes seconds and changes global flags; test_conv2d.py compares the two.
# Each stands there batched and unbatched.
SAMPLES = [
    Sample(size[unbatched:], kernel, bias, arguments)
    for size, kernel, bias, arguments in [
        ((1, 3, 4, 4), (3, 3), True, {"stride": (2, 2), "padding": 2}),
        ((2, 4, 8, 8), (3, 3), True, {"stride": (3, 2), "padding": (2, 1), "dilation": (4, 4)}),
        ((1, 4, 5, 5), (2, 3), True, {"stride": 2, "padding": 1, "dilation": (2, 3)}),
        ((1, 4, 5, 5), (2, 3), True, {"stride": 2, "padding": 1, "dilation": (2, 3)}),
        ((1, 2, 4, 3), (3, 4), False, {"stride": 2, "padding": 1}),
        ((1, 4, 5, 5), (2, 3), True, {"stride": 2, "padding": "valid"}),
        ((1, 4, 5, 5), (2, 3), True, {"stride": 1, "padding": "same", "dilation": 3}),
        ((2, 4, 6, 6), (3, 3), True, {}),
        ((2, 4, 6, 6), (3, 3), True, {}),
        ((2, 4, 6, 6), (3, 3), False, {}),
        ((2, 4, 6, 6), (3, 3), True, {"stride": (3, 2)}),
        ((2, 4, 6, 6), (3, 3), True, {"padding": (1, 1)}),
        ((2, 4, 5, 5), (2, 2), True, {"dilation": (2, 2)}),
        ((2, 4, 6, 5), (3, 2), True, {}),
        ((1, 4, 5, 5), (3, 3), False, {}),
    ]
    for unbatched in (0, 1)
]
