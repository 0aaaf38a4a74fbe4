"""Whole numbers, laid out in memory in any way, and results that have to be exact to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from common import Case, Results, integers, make_inputs, run, run_dwconv, run_float64, torch_conv2d
from torch import Tensor


def wrong_numbers(result: Tensor, exact: Tensor) -> int:
    """How many numbers of a result are not the exact ones, rounded to its dtype once. -0 is 0; NaN has to be NaN.

    The exact ones are whole, but an algorithm of float64 may have left something behind the point.
    """
    exact = exact.round().to(result)
    wrong = int((result != exact).sum())
    return wrong and wrong - int((result.isnan() & exact.isnan()).sum())


def assert_exact(results: Results, tensors: tuple, grad_output: Tensor, **geometry) -> None:
    """Asserts that results from whole numbers equal the exact ones, each rounded to its dtype once."""
    exact = run_float64(tensors, grad_output, **geometry)
    for i, (name, result, reference) in enumerate(zip(Results._fields, results, exact)):
        if reference is None:
            assert result is None, name
            continue
        like = (grad_output, *tensors)[i]
        assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device), name
        wrong = wrong_numbers(result, reference)
        if wrong and result.device.type == "cpu" and result.element_size() == 2:
            # Without AVX-512, ATen keeps sums of gradients in bfloat16. Its bits are what CPU tensors are promised.
            wrong = wrong_numbers(result, run(torch_conv2d, tensors, grad_output, **geometry)[i])
        assert not wrong, f"{name}: {wrong} of {result.numel()} numbers are wrong"


def check_exact(tensors: tuple, grad_output: Tensor, **geometry) -> Results:
    """Runs dwconv.conv2d and its gradients on whole numbers, and asserts that each result is exact."""
    results = run_dwconv(tensors, grad_output, **geometry)
    assert_exact(results, tensors, grad_output, **geometry)
    return results


def draw(
    case: Case,
    dtype: torch.dtype,
    device: str = "cuda",
    memory_format: torch.memory_format = torch.contiguous_format,
    make: Callable[..., Tensor] = integers,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """Input, weight and bias (or None) of whole numbers, and a gradient of the output."""
    tensors = make_inputs(case, dtype, device, memory_format, make)
    return tensors, make(*output_size(case)).to(device, dtype).contiguous(memory_format=memory_format)


def output_size(case: Case) -> tuple[int, int, int, int]:
    input = torch.empty(case.batch, case.channels, *case.size, device="meta")
    weight = torch.empty(case.filters, 1, *case.kernel, device="meta")
    return tuple(torch_conv2d(input, weight, **case.geometry).shape)


def lay(
    tensor: Tensor,
    order: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    offset: int = 0,
    expanded: Sequence[int] = (),
) -> Tensor:
    """The tensor's numbers in a buffer that is NaN between and around them.

    `order` names the dimensions as they lie in memory, outermost first; `steps` says how far apart the indices of each
    are, as slices with a step are; `offset` elements lie before the first. Of `expanded` dimensions, index 0 stands
    for all, with a stride of 0.
    """
    order = range(tensor.dim()) if order is None else order
    steps = [1] * tensor.dim() if steps is None else steps
    kept = tensor
    for d in expanded:
        kept = kept.narrow(d, 0, min(1, kept.shape[d]))
    room = [kept.shape[d] * steps[d] for d in order]
    buffer = tensor.new_full((offset + math.prod(room) + 16,), torch.nan)
    spaced = buffer[offset : offset + math.prod(room)].view(room)
    spaced = spaced.permute([list(order).index(d) for d in range(tensor.dim())])
    view = spaced[tuple(slice(None, None, step) for step in steps)].copy_(kept)
    return view.expand(tensor.shape)


def arguments_of(case: Case) -> tuple[tuple[int, int], ...]:
    """stride, padding and dilation, as the operators take them."""
    return case.stride, case.padding, case.dilation
