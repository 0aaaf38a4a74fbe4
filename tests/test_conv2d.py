"""The numbers of dwconv.conv2d and of its gradients: by definition, and as F.conv2d gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    FORMATS,
    SAMPLES,
    Case,
    Results,
    Sample,
    assert_accurate,
    integers,
    magnitudes,
    make_inputs,
    run,
    run_dwconv,
    run_float64,
    torch_conv2d,
)
from torch import Tensor

import dwconv

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

channels_last = torch.channels_last

CASES = [
    Case(2, 3, (7, 9), (3, 3)),
    Case(2, 4, (8, 10), (3, 3), padding=(1, 1)),
    Case(1, 2, (6, 5), (3, 3), padding=(2, 0), multiplier=2, bias=False),
    Case(2, 3, (9, 20), (3, 3), padding=(0, 1), multiplier=3),
    Case(1, 33, (5, 6), (3, 3), padding=(1, 1)),  # channels beyond a warp
    Case(1, 2, (40, 70), (3, 3), padding=(1, 1)),  # more than a tile each way
    Case(2, 3, (9, 8), (3, 3), (2, 2), (1, 1)),
    Case(2, 3, (11, 8), (3, 5), (2, 1), (1, 2)),
    Case(1, 4, (10, 13), (5, 3), (1, 3), (2, 1), (2, 1), multiplier=2),
    Case(2, 2, (9, 12), (2, 4), (2, 3), (1, 0), (3, 2), multiplier=3, bias=False),
    Case(2, 3, (12, 14), (3, 3), (4, 6), (2, 3), (6, 4)),  # stride and dilation share a divisor
    Case(2, 5, (12, 7), (1, 7), padding=(0, 3)),
    Case(2, 5, (12, 7), (11, 1), padding=(5, 0)),
    Case(1, 3, (3, 300), (5, 5), padding=(2, 2)),
    Case(2, 2, (7, 6), (7, 6)),  # a single output
    Case(1, 3, (4, 3), (7, 5), padding=(3, 2)),  # kernel larger than the image
    Case(1, 3, (5, 6), (13, 11), padding=(6, 5), multiplier=2),
    Case(2, 3, (4, 5), (3, 3), padding=(5, 4)),  # padding larger than the kernel
    Case(2, 3, (5, 4), (2, 1), (3, 2), (4, 3)),
    Case(2, 3, (7, 8), (1, 1)),
    Case(2, 4, (1, 1), (1, 1), multiplier=2),
    Case(2, 4, (1, 1), (3, 3), padding=(1, 1)),
    Case(1, 4, (1, 6), (3, 2), padding=(1, 0)),
    Case(1, 1, (1, 1), (3, 3), (2, 2), (2, 2)),
    Case(3, 1, (6, 7), (3, 3), padding=(1, 1)),  # a single channel
    Case(3, 1, (6, 7), (3, 2), multiplier=4),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """F.conv2d without TF32, which it would take for float32 where it can."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def by_definition(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=(1, 1), padding=(0, 0), dilation=(1, 1)
) -> Tensor:
    """The sum that the docstring of dwconv.conv2d shows, tap by tap."""
    filters, _, kernel_h, kernel_w = weight.shape
    images = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    images = images.repeat_interleave(filters // input.shape[1], dim=1)
    height = (images.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (images.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    output = 0 if bias is None else bias[:, None, None]
    for u, v in product(range(kernel_h), range(kernel_w)):
        top, left = u * dilation[0], v * dilation[1]
        rows = slice(top, top + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(left, left + (width - 1) * stride[1] + 1, stride[1])
        output = output + weight[:, 0, u, v, None, None] * images[:, :, rows, columns]
    return output


def channel_by_channel(input: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry) -> Tensor:
    """One ordinary convolution for each channel."""
    m = weight.shape[0] // input.shape[1]
    channels = zip(input.split(1, dim=1), weight.split(m), [None] * len(weight) if bias is None else bias.split(m))
    return torch.cat([F.conv2d(*tensors, **geometry) for tensors in channels], dim=1)


def in_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """As contiguous(), but with the strides of the format even where sides of 1 let others pass for it."""
    return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


def strides_that_count(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def assert_format_of(output: Tensor, expected: Tensor) -> None:
    if output.numel() == 0 or (output.dtype == torch.float64 and output.is_cuda):
        return  # F.conv2d leaves channels_last in CUDA's float64
    assert strides_that_count(output) == strides_that_count(expected)


def check(
    tensors: tuple,
    grad_output: Tensor | Callable = torch.randn,
    definition: Callable = torch_conv2d,
    with_torch: bool = True,
    **arguments,
) -> Results:
    """Compares dwconv.conv2d with `definition` in float64 and, if `with_torch`, with F.conv2d in the same dtype."""
    if callable(grad_output):
        grad_output = grad_output(*torch_conv2d(*tensors, **arguments).shape).to(tensors[0])
    results = run_dwconv(tensors, grad_output, **arguments)
    for result, tensor in zip(results, (grad_output, *tensors)):
        assert tensor is None or (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    magnitude = magnitudes(tensors, grad_output, **arguments)
    double = tuple(None if tensor is None else tensor.double().contiguous() for tensor in tensors)
    assert_accurate(results, run(definition, double, grad_output.double().contiguous(), **arguments), magnitude)
    if with_torch:
        expected = run(torch_conv2d, tensors, grad_output, **arguments)
        assert_accurate(results, expected, magnitude, slack=4)  # F.conv2d may sum in another order, and round too
        assert_format_of(results.output, expected.output)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(device: str, case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    tensors = make_inputs(case, dtype, device, memory_format)
    check(tensors, definition=by_definition, **case.geometry)


# ---------------------------------------------------------------------------- PyTorch's own samples


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_pytorch_sample(device: str, sample: Sample, multiplier: int, dtype: torch.dtype) -> None:
    for memory_format in FORMATS:
        check(sample.tensors(multiplier, dtype, device, memory_format), **sample.arguments)


# Its import needs expecttest for nothing that is used here.
PRINT_SAMPLES = """
import json, sys, types, unittest
stand_in = types.ModuleType("expecttest")
stand_in.TestCase = unittest.TestCase
sys.modules.setdefault("expecttest", stand_in)
import torch
from torch.testing._internal.common_methods_invocations import op_db
[info] = [info for info in op_db if info.name == "nn.functional.conv2d"]
for sample in info.sample_inputs("cpu", torch.float32, requires_grad=False):
    weight, bias = sample.args
    arguments = {key: value for key, value in sample.kwargs.items() if key != "groups"}
    print(json.dumps([sample.input.shape, weight.shape[2:], bias is not None, arguments]))
"""


def test_samples_are_pytorchs() -> None:
    lines = subprocess.run([sys.executable, "-c", PRINT_SAMPLES], capture_output=True, text=True, check=True).stdout
    theirs = [json.loads(line) for line in lines.splitlines()]
    assert len(theirs) >= 30
    ours = json.loads(json.dumps(SAMPLES))
    assert [sample for sample in theirs if sample not in ours] == []


# ---------------------------------------------------------------------------- what PyTorch tests of depthwise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_equals_a_convolution_for_each_channel(device: str, multiplier: int, dtype: torch.dtype) -> None:
    for case in (
        Case(2, 2, (6, 6), (3, 3), multiplier=multiplier),
        Case(2, 5, (6, 9), (3, 2), (1, 2), (1, 0), (1, 3), multiplier=multiplier),
    ):
        check(make_inputs(case, dtype, device), definition=channel_by_channel, **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stride_beyond_the_kernel(device: str, dtype: torch.dtype) -> None:
    case = Case(2, 2, (4, 20), (3, 5), (1, 10), bias=False)
    results = check(make_inputs(case, dtype, device), definition=by_definition, **case.geometry)
    assert results.output.shape == (2, 2, 2, 2)
    assert not results.grad_input[..., 5:10].any()  # between two windows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("formats", list(product(FORMATS, repeat=3)), ids=str)
def test_integers_are_exact(device: str, formats: tuple, multiplier: int, dtype: torch.dtype) -> None:
    """In every combination of the formats of input, weight and gradient."""
    for case in (
        Case(2, 8, (4, 4), (3, 3), multiplier=multiplier),
        Case(4, 2, (8, 8), (2, 2), multiplier=multiplier),
        Case(1, 2, (8, 8), (4, 4), multiplier=multiplier, bias=False),
        Case(4, 1, (8, 8), (2, 2), multiplier=multiplier),
        Case(4, 2, (2, 8), (1, 1), multiplier=multiplier),
        Case(1, 4, (28, 30), (5, 3), (2, 1), (2, 1), (1, 2), multiplier=multiplier),
    ):
        input, weight, bias = make_inputs(case, dtype, device, make=integers)
        tensors = in_format(input, formats[0]), in_format(weight, formats[1]), bias
        output = dwconv.conv2d(*tensors, **case.geometry)
        grad_output = in_format(integers(*output.shape).to(output), formats[2])
        results = run_dwconv(tensors, grad_output, **case.geometry)
        for result, exact in zip(results, run_float64(tensors, grad_output, **case.geometry)):
            if exact is not None:
                torch.testing.assert_close(result, exact.to(dtype), rtol=0, atol=0)
        assert_format_of(results.output, torch_conv2d(*tensors, **case.geometry))


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of each row."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def window(tensor: Tensor) -> Tensor:
    """The inside of larger images."""
    return F.pad(tensor, (1, 2, 3, 1), value=torch.nan)[..., 3:-1, 1:-2]


def misaligned(tensor: Tensor) -> Tensor:
    """Contiguous, one element behind an aligned address."""
    flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


def some_channels(tensor: Tensor) -> Tensor:
    """Channels in the middle of a wider channels_last tensor."""
    wide = F.pad(tensor, (0, 0, 0, 0, 1, 2), value=torch.nan).contiguous(memory_format=channels_last)
    return wide[:, 1:-2]


# Equal numbers that lie differently in memory; what is not theirs around them is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: in_format(tensor, channels_last),
    "sliced": sliced,
    "window": window,
    "misaligned": misaligned,
    "some_channels": some_channels,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "channels_first": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda tensor: tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, grad_layout: str) -> None:
    """Any strides of input, weight, bias and gradient, with and without bias and stride."""
    lay_input, lay_grad = LAYOUTS[layout], LAYOUTS[grad_layout]
    for stride, bias, dtype in product([(1, 1), (2, 3)], [False, True], [torch.float32, torch.float16]):
        case = Case(2, 3, (8, 6), (3, 3), stride, (1, 1), multiplier=2, bias=bias)
        input, weight, b = make_inputs(case, dtype, device)
        tensors = lay_input(input), lay_grad(weight), sliced(b) if bias else None
        assert torch.equal(tensors[0], input) and torch.equal(tensors[1], weight)
        grad_output = lay_grad(torch.randn(2, 6, *torch_conv2d(*tensors, **case.geometry).shape[2:]).to(input))
        check(tensors, grad_output, with_torch=False, **case.geometry)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_of_a_plain_3x3(device: str, layout: str, dtype: torch.dtype) -> None:
    for width, padding in product([9, 10], [0, 1, 2, 3]):
        case = Case(2, 4, (11, width), (3, 3), padding=(padding, padding))
        input, weight, bias = make_inputs(case, dtype, device)
        grad_output = torch.randn(2, 4, 9 + 2 * padding, width - 2 + 2 * padding).to(input)
        tensors = LAYOUTS[layout](input), LAYOUTS[layout](weight), bias
        check(tensors, LAYOUTS[layout](grad_output), with_torch=False, **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5)], ids=str)
def test_expanded(device: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    """Tensors that read one place in memory many times."""
    case = Case(3, 4, (6, 8), kernel, padding=(1, 1))
    input, weight, bias = make_inputs(case, dtype, device)
    size = torch_conv2d(input, weight, bias, **case.geometry).shape
    grad_output = torch.randn(size).to(input)
    one = grad_output.new_tensor(0.75)
    for grad in (one.expand(size), grad_output[:1].expand(size), grad_output[:, :, :1].expand(size)):
        check((input, weight, bias), grad, with_torch=False, **case.geometry)
    for expanded in (input[:1], input[:, :1], input[..., :1], input[..., :1, :]):
        check((expanded.expand(input.shape), weight, bias), grad_output, with_torch=False, **case.geometry)
    expanded_weight, expanded_bias = weight[:1].expand(weight.shape), bias[:1].expand(bias.shape)
    check((input, expanded_weight, expanded_bias), grad_output, with_torch=False, **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((1, 4, 5, 6), (7, 30, 6, 1)),
        ((1, 4, 5, 6), (1, 1, 24, 4)),
        ((2, 1, 5, 6), (30, 7, 6, 1)),
        ((2, 1, 5, 6), (30, 1, 6, 1)),
        ((2, 1, 5, 6), (30, 0, 6, 1)),
        ((2, 4, 1, 6), (24, 6, 999, 1)),
        ((2, 4, 5, 1), (20, 5, 1, 77)),
        ((2, 4, 1, 1), (4, 1, 13, 17)),
        ((2, 4, 1, 1), (4, 1, 1, 1)),
        ((1, 1, 1, 1), (3, 5, 7, 11)),
        ((1, 1, 1, 1), (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_strides_of_sides_of_one(device: str, size: tuple, strides: tuple, dtype: torch.dtype) -> None:
    """Such strides mean nothing, and make contiguous and channels_last hard to tell apart."""

    def odd(tensor: Tensor, size: tuple) -> Tensor:
        order = sorted(range(4), key=lambda d: -strides[d] if size[d] > 1 else 0)
        packed = tensor.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        kept = [given if side == 1 else natural for given, side, natural in zip(strides, size, packed.stride())]
        return packed.as_strided(size, kept)

    for multiplier, padding in product([1, 2], [1, 2]):
        case = Case(size[0], size[1], size[2:], (3, 3), padding=(padding, padding), multiplier=multiplier)
        input, weight, bias = make_inputs(case, dtype, device)
        strided = odd(input, size)
        assert torch.equal(strided, input)
        assert strides_that_count(strided) == [s for s, side in zip(strides, size) if side > 1]
        grad_size = (size[0], case.filters, size[2] + 2 * padding - 2, size[3] + 2 * padding - 2)
        grad_output = odd(torch.randn(grad_size).to(input), grad_size)
        results = check((strided, weight, bias), grad_output, with_torch=False, **case.geometry)
        assert_format_of(results.output, torch_conv2d(strided, weight, bias, **case.geometry))


# ---------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (3, 2), (4, 6), (1, 1), (5, 1), (5, 10)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3), (2, 1)], ids=str)
def test_padding_by_name(device: str, padding: str, kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    for memory_format, multiplier in product(FORMATS, [1, 2]):
        case = Case(2, 3, (11, 29), kernel, multiplier=multiplier)
        tensors = make_inputs(case, torch.float32, device, memory_format)
        results = check(tensors, padding=padding, dilation=dilation)
        if padding == "same":
            assert results.output.shape[2:] == (11, 29)


def test_padding_by_name_with_stride(device: str) -> None:
    tensors = make_inputs(Case(2, 3, (9, 8), (4, 3)), torch.float32, device)
    check(tensors, padding="valid", stride=(3, 2))
    check(tensors, padding="same", stride=(1, 1))
    with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
        dwconv.conv2d(*tensors, padding="same", stride=(1, 2))


@pytest.mark.parametrize("form", [int, tuple, list, "one-element list", "one-element tuple", torch.Size], ids=str)
def test_forms_of_arguments(device: str, form: type | str) -> None:
    def formed(side: int) -> object:
        if form is int:
            return side
        if isinstance(form, str):
            return [side] if form.endswith("list") else (side,)
        return form((side, side))

    tensors = make_inputs(Case(2, 3, (12, 10), (3, 2), multiplier=2), torch.float32, device)
    expected = dwconv.conv2d(*tensors, stride=(3, 3), padding=(1, 1), dilation=(2, 2))
    by_name = {"stride": formed(3), "padding": formed(1), "dilation": formed(2)}
    assert torch.equal(dwconv.conv2d(*tensors, **by_name), expected)
    assert torch.equal(dwconv.conv2d(*tensors, formed(3), formed(1), formed(2)), expected)
    check(tensors, **by_name)


def test_height_goes_before_width(device: str) -> None:
    """On an image with a single 1, where the output shows which side is which."""
    input = torch.zeros(1, 1, 12, 12, device=device)
    input[..., 6, 6] = 1
    weight = torch.arange(1.0, 7.0, device=device).view(1, 1, 2, 3)
    for geometry in ({"dilation": (3, 2)}, {"stride": (3, 2)}, {"padding": (3, 2)}):
        output = dwconv.conv2d(input, weight, **geometry)
        assert torch.equal(output, by_definition(input, weight, **geometry))
    assert dwconv.conv2d(input, weight, stride=(5, 1)).shape[2:] == (3, 10)
    assert dwconv.conv2d(input, weight, padding=(5, 0)).shape[2:] == (21, 10)
    assert dwconv.conv2d(input, weight, dilation=(5, 1)).shape[2:] == (7, 10)


def test_multiplier_goes_channel_by_channel(device: str) -> None:
    """Filter c * m + q belongs to channel c."""
    input = torch.tensor([1.0, 10.0, 100.0], device=device).view(1, 3, 1, 1)
    weight = torch.arange(1.0, 7.0, device=device).view(6, 1, 1, 1)
    output, grad_input, grad_weight, _ = run_dwconv((input, weight, None), torch.ones(1, 6, 1, 1, device=device))
    assert output.flatten().tolist() == [1, 2, 30, 40, 500, 600]
    assert grad_input.flatten().tolist() == [3, 7, 11]
    assert grad_weight.flatten().tolist() == [1, 1, 10, 10, 100, 100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"], ids=str)
def test_unbatched(device: str, padding: tuple[int, int] | str, dtype: torch.dtype) -> None:
    input, weight, bias = make_inputs(Case(1, 3, (8, 9), (4, 3), multiplier=2), dtype, device)
    arguments = {"padding": padding, "dilation": (1, 2)}
    for image in (input[0], input.mT.contiguous().mT[0], input.contiguous(memory_format=channels_last)[0]):
        results = check((image, weight, bias), **arguments)
        batched = dwconv.conv2d(image[None], weight, bias, **arguments)
        assert results.output.dim() == 3 and torch.equal(results.output, batched[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_none(device: str, dtype: torch.dtype, memory_format: torch.memory_format, bias: bool) -> None:
    for kernel, padding in product([(3, 3), (5, 2)], [(1, 1), "same"]):
        tensors = make_inputs(Case(0, 4, (8, 6), kernel, multiplier=2, bias=bias), dtype, device, memory_format)
        results = check(tensors, padding=padding)
        assert results.output.shape[:2] == (0, 8) and results.grad_input.shape == (0, 4, 8, 6)
        assert not results.grad_weight.any() and (not bias or not results.grad_bias.any())


@pytest.mark.parametrize("formats", list(product(FORMATS, repeat=2)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_format_is_that_of_torch(device: str, dtype: torch.dtype, formats: tuple) -> None:
    for batch, channels, size, kernel, multiplier in product(
        [1, 2], [1, 4], [(6, 7), (3, 1), (1, 1)], [(1, 1), (3, 1), (3, 3)], [1, 2, 3]
    ):
        case = Case(batch, channels, size, kernel, padding=(1, 1), multiplier=multiplier)
        input, weight, bias = make_inputs(case, dtype, device)
        input, weight = in_format(input, formats[0]), in_format(weight, formats[1])
        results = run_dwconv((input, weight, bias), torch.randn, **case.geometry)
        if size != (1, 1):  # whose format is anyone's guess, and not the same guess in all of F.conv2d's backends
            assert_format_of(results.output, torch_conv2d(input, weight, bias, **case.geometry))
        if channels_last not in formats:
            assert results.output.is_contiguous() and results.grad_input.is_contiguous()
        elif size == (6, 7) and (formats[0] == channels_last or kernel == (3, 3)):
            assert results.output.is_contiguous(memory_format=channels_last)
            assert results.grad_input.is_contiguous(memory_format=channels_last)
