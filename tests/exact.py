"""Whole numbers, laid out in memory in any way, and results that have to be exact to the last bit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from common import Case, Results, run, run_dwconv, run_float64, torch_conv2d
from torch import Tensor

import dwconv


def wrong_numbers(result: Tensor, exact: Tensor) -> int:
    """How many numbers of a result are not the exact ones, rounded to its dtype once. -0 is 0; NaN is wrong."""
    return int((result != exact.to(result)).sum())


def assert_exact(results: Results, tensors: tuple, grad_output: Tensor, **geometry) -> None:
    """Asserts that results from whole numbers equal the exact ones, each rounded to its dtype once."""
    exact = run_float64(tensors, grad_output, **geometry)
    for i, (name, result, reference) in enumerate(zip(Results._fields, results, exact)):
        if reference is None:
            assert result is None, name
            continue
        like = (grad_output, *tensors)[i]
        assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device), name
        wrong = wrong_numbers(result, reference.round())  # an algorithm of float64 may leave something behind the point
        if wrong and result.device.type == "cpu" and result.element_size() == 2:
            # Without AVX-512, ATen keeps sums of gradients in bfloat16. Its bits are what CPU tensors are promised.
            wrong = wrong_numbers(result, run(torch_conv2d, tensors, grad_output, **geometry)[i])
        assert not wrong, f"{name}: {wrong} of {result.numel()} numbers are wrong"


def check_exact(tensors: tuple, grad_output: Tensor, **geometry) -> Results:
    """Runs dwconv.conv2d and its gradients on whole numbers, and asserts that each result is exact."""
    results = run_dwconv(tensors, grad_output, **geometry)
    assert_exact(results, tensors, grad_output, **geometry)
    return results


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


def claims(name: str, case: Case, input: Tensor, output: Tensor, allow_fft: bool = False) -> list[str]:
    """The plans that claim a pass over tensors that lie in memory as these do; the first one is taken."""
    dtype = str(input.dtype).removeprefix("torch.")
    weight_size = case.filters, 1, *case.kernel
    found = dwconv._C.plans(
        name,
        dtype,
        tuple(input.shape),
        input.stride(),
        weight_size,
        output.stride(),
        *arguments_of(case),
        allow_fft=allow_fft,
    )
    return [plan for plan, _ in found]


def results_of_plans(
    case: Case,
    tensors: tuple,
    grad_output: Tensor,
    channels_last: bool = False,
    allow_fft: bool = False,
    named: str = "",
) -> Iterator[tuple[str, str, Tensor]]:
    """Everything that every plan computes where it claims to: a field of Results, a plan, and its result. CUDA only.

    `channels_last` is the memory format of the input's gradient. Only plans whose name has a match of `named`.
    """
    input, weight, bias = tensors
    ops, arguments = torch.ops.dwconv, arguments_of(case)

    def plans_of(name: str, input: Tensor, output: Tensor) -> list[str]:
        return [plan for plan in claims(name, case, input, output, allow_fft) if re.search(named, plan)]

    for plan in plans_of("forward", input, ops.forward(input, weight, bias, *arguments)):
        yield "output", plan, ops.forward.plan(input, weight, bias, *arguments, plan)
    grad_input = ops.grad_input(grad_output, weight, input.shape, *arguments, channels_last)
    for plan in plans_of("grad_input", grad_input, grad_output):
        args = grad_output, weight, input.shape, *arguments, channels_last, plan
        yield "grad_input", plan, ops.grad_input.plan(*args)
    apart = (input.data_ptr() - grad_output.data_ptr()) % 16 != 0
    for plan in plans_of("grad_weight", input, grad_output):
        args = grad_output, input, case.kernel, *arguments, bias is not None, plan
        if apart and plan == "flat_grad_weight_channels_last":  # `claims` knows strides, no addresses
            with pytest.raises(RuntimeError, match="does not serve this problem"):
                ops.grad_weight.plan(*args)
            continue
        grad_weight, grad_bias = ops.grad_weight.plan(*args)
        yield "grad_weight", plan, grad_weight
        if bias is not None:
            yield "grad_bias", plan, grad_bias
