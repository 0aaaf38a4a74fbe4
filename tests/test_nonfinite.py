"""NaN and Inf spread to the numbers that they take part in, and to no others; memory that nothing wrote is not read.

A zero of the padding takes part in nothing: Inf times that zero would be NaN where F.conv2d has a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, FORMATS, Case, Results, run, run_dwconv, torch_conv2d
from exact import draw, wrong_numbers
from plans import results_of_plans
from torch import Tensor

NONFINITE = [torch.nan, torch.inf, -torch.inf]

CASES = [
    Case(2, 8, (9, 10), (3, 3), padding=(1, 1)),
    Case(2, 8, (9, 11), (3, 3), padding=(1, 1)),
    Case(2, 8, (17, 12), (3, 3), bias=False),
    Case(2, 8, (5, 6), (3, 3), padding=(4, 3)),  # some windows lie in the padding
    Case(2, 8, (9, 8), (3, 3), padding=(2, 1), multiplier=2),
    Case(2, 8, (11, 12), (5, 4), (2, 3), (2, 1), bias=False),
    Case(2, 8, (12, 10), (3, 3), padding=(2, 2), dilation=(2, 3)),
    Case(1, 16, (8, 9), (7, 7), padding=(3, 3)),
    Case(1, 16, (24, 26), (7, 7), padding=(3, 3)),
    Case(1, 16, (33, 25), (4, 5), padding=(3, 1), multiplier=2),
    Case(1, 16, (20, 21), (13, 11), padding=(6, 5)),
    Case(2, 8, (9, 10), (12, 17), padding=(11, 8)),  # kernels larger than the image
    Case(1, 16, (23, 24), (9, 10), (2, 2), (4, 5)),
    Case(2, 8, (12, 9), (9, 17), padding=(8, 9), multiplier=2),
    Case(9, 4, (6, 7), (11, 9), padding=(5, 4)),
    Case(9, 4, (9, 7), (7, 7), padding=(3, 3)),
    Case(17, 4, (8, 16), (3, 5), padding=(1, 2)),
    Case(9, 4, (10, 13), (5, 5), padding=(3, 1)),
    Case(44, 2, (33, 28), (9, 11), padding=(4, 5)),
    Case(15, 2, (56, 56), (51, 5), padding=(25, 2)),
    Case(2, 8, (20, 22), (3, 3), padding=(3, 3), dilation=(3, 2)),
    Case(1, 16, (16, 40), (1, 11), padding=(0, 5)),
    Case(2, 8, (7, 7), (3, 3), padding=(1, 1)),
    Case(2, 8, (14, 14), (7, 7), padding=(3, 3), bias=False),
    Case(1, 16, (24, 26), (7, 7), (2, 2), (3, 3)),
    Case(2, 8, (31, 33), (7, 7), (2, 2), (2, 3), multiplier=2),
]


def by_taps(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=(1, 1), padding=(0, 0), dilation=(1, 1)
) -> Tensor:
    """The definition: for each tap a product with the part of the image that it meets. So are its gradients."""
    filters, _, *kernel = weight.shape
    images = input.unsqueeze(2).expand(-1, -1, filters // input.shape[1], -1, -1).flatten(1, 2)
    sides = list(zip(input.shape[2:], kernel, stride, padding, dilation))
    size = [(height + 2 * p - d * (k - 1) - 1) // s + 1 for height, k, s, p, d in sides]
    output = images.new_zeros(len(input), filters, *size)
    if bias is not None:
        output = output + bias[:, None, None]
    for taps in product(*map(range, kernel)):
        parts, rims = [], []
        for tap, outputs, (height, _, s, p, d) in zip(taps, size, sides):
            met = [i for i in range(outputs) if 0 <= i * s - p + tap * d < height]
            if not met:
                break
            parts.append(slice(met[0] * s - p + tap * d, met[-1] * s - p + tap * d + 1, s))
            rims.append((met[0], outputs - 1 - met[-1]))
        else:
            products = weight[(slice(None), 0, *taps, None, None)] * images[(..., *parts)]
            output = output + F.pad(products, (*rims[1], *rims[0]))
    return output


def reference(tensors: tuple, grad_output: Tensor, **geometry) -> Results:
    wide = tuple(None if t is None else t.detach().cpu().double() for t in tensors)
    return run(by_taps, wide, grad_output.cpu().double(), **geometry)


def same(result: Tensor | None, expected: Tensor | None) -> bool:
    """The same numbers, and NaN, Inf and -Inf at the same places."""
    if result is None or expected is None:
        return result is expected
    return result.shape == expected.shape and not wrong_numbers(result.cpu(), expected.cpu())


def check(case: Case, tensors: tuple, grad_output: Tensor, what: str) -> None:
    results = run_dwconv(tensors, grad_output, **case.geometry)
    expected = [reference(tensors, grad_output, **case.geometry)]
    if grad_output.device.type == "cpu":
        # Some kernels of ATen do multiply the padding; which it takes depends on the memory format.
        contiguous = tuple(None if t is None else t.contiguous() for t in tensors)
        expected.append(run(torch_conv2d, tensors, grad_output, **case.geometry))
        expected.append(run(torch_conv2d, contiguous, grad_output.contiguous(), **case.geometry))
    for name, result, *alternatives in zip(Results._fields, results, *expected):
        assert any(same(result, alternative) for alternative in alternatives), f"{name} in {what}"


def positions(height: int, width: int) -> list[tuple[int, int]]:
    """Corners, edges, next to edges, inside."""
    rows, columns = ((0, 1, size // 2, size - 2, size - 1) for size in (height, width))
    kinds = [(0, 0), (0, -1), (-1, 0), (-1, -1), (0, 2), (2, 0), (-1, 2), (2, -1), (1, 1), (-2, -2), (1, 2), (2, 2)]
    return [(rows[i], columns[j]) for i, j in kinds]


def spoil(images: Tensor, value: float) -> None:
    """One number of each plane, at every kind of position; some planes stay as they are."""
    spots = positions(*images.shape[2:])
    for plane in range(images.shape[0] * images.shape[1]):
        if plane < len(spots):
            images[(*divmod(plane, images.shape[1]), *spots[plane])] = value
    assert images.isfinite().all((2, 3)).any() and not images.isfinite().all()


def test_reference_is_that_of_torch() -> None:
    for case in CASES:
        tensors, grad_output = draw(case, torch.float64, "cpu")
        theirs = run(torch_conv2d, tensors, grad_output, **case.geometry)
        for name, ours, expected in zip(Results._fields, reference(tensors, grad_output, **case.geometry), theirs):
            assert same(ours, expected), (case, name)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("which", ["input", "grad_output"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_images(device: str, case: Case, memory_format: torch.memory_format, which: str, value: float) -> None:
    """In the input they reach output and grad_weight; in the gradient, all that is computed from it."""
    for dtype in DTYPES:
        tensors, grad_output = draw(case, dtype, device, memory_format)
        spoil(tensors[0] if which == "input" else grad_output, value)
        check(case, tensors, grad_output, str(dtype))


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights(device: str, case: Case, memory_format: torch.memory_format, value: float) -> None:
    """A weight reaches the outputs, and their gradients the inputs, for which its tap meets the image."""
    for dtype in DTYPES:
        (input, weight, bias), grad_output = draw(case, dtype, device, memory_format)
        flat = weight.flatten(1)
        for f in range(case.filters - 1):  # the last filter stays finite
            flat[f, f % flat.shape[1]] = value
        check(case, (input, weight, bias), grad_output, str(dtype))


@pytest.mark.parametrize("value", NONFINITE)
def test_bias(device: str, value: float) -> None:
    for case, dtype in product([case for case in CASES if case.bias], DTYPES):
        tensors, grad_output = draw(case, dtype, device)
        tensors[2][-1] = value
        check(case, tensors, grad_output, str(dtype))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_infinities_of_both_signs(device: str, memory_format: torch.memory_format) -> None:
    """Their sum is NaN, zero times them too; everything else stays Inf."""
    for case, dtype in product(CASES, DTYPES):
        tensors, grad_output = draw(case, dtype, device, memory_format)
        spoil(tensors[0], torch.inf)
        tensors[0][:, ::2, 1, 2] = -torch.inf
        check(case, tensors, grad_output, str(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_plan(case: Case, value: float, memory_format: torch.memory_format) -> None:
    """Not only the plan that is taken: each that claims a pass, with each of the tensors spoilt."""
    for dtype, which in product(DTYPES, ["input", "weight", "grad_output"]):
        tensors, grad_output = draw(case, dtype, "cuda", memory_format)
        if which == "weight":
            tensors[1].flatten(1)[:-1, 0] = value
            tensors[1].flatten(1)[1:, -1] = value
        else:
            spoil(tensors[0] if which == "input" else grad_output, value)
        expected = reference(tensors, grad_output, **case.geometry)._asdict()
        for name, plan, result in results_of_plans(case, tensors, grad_output, memory_format == torch.channels_last):
            assert same(result, expected[name]), f"{name} by {plan} in {dtype} with {value} in {which}"


# ---------------------------------------------------------------------------- uninitialised memory


@pytest.fixture
def nan_in_empty() -> Iterator[None]:
    """torch.empty gives NaN: a result, or a workspace, that is read without having been written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


SIZES = [
    *CASES,
    Case(1, 1, (1, 1), (1, 1)),
    Case(0, 3, (5, 6), (3, 3), padding=(1, 1)),
    Case(3, 33, (13, 17), (3, 3), padding=(1, 1)),
    Case(2, 40, (5, 3), (2, 3), (1, 2), (1, 1), multiplier=3),
    Case(1, 3, (4, 5), (2, 2), (3, 3)),  # some inputs are in no window
    Case(1, 3, (9, 9), (1, 1), (4, 5), (2, 2)),
    Case(2, 3, (40, 67), (3, 3), padding=(1, 1), bias=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_every_number_is_written(
    device: str, case: Case, memory_format: torch.memory_format, dtype: torch.dtype, nan_in_empty: None
) -> None:
    assert torch.empty(1, device=device).isnan().all()
    tensors, grad_output = draw(case, dtype, device, memory_format)
    for name, result in zip(Results._fields, run_dwconv(tensors, grad_output, **case.geometry)):
        assert result is None or not result.isnan().any(), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_every_plan_writes_every_number(
    case: Case, memory_format: torch.memory_format, dtype: torch.dtype, nan_in_empty: None
) -> None:
    tensors, grad_output = draw(case, dtype, "cuda", memory_format)
    for name, plan, result in results_of_plans(case, tensors, grad_output, memory_format == torch.channels_last):
        assert not result.isnan().any(), (name, plan)
