"""Tensors that lie in memory in any way: the numbers do not change, and nothing outside of a view is read or written.

What lies between and around the elements is NaN, so that a single read of it shows in a result.
"""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from pathlib import Path

import pytest
import torch
from common import DTYPES, FORMATS, Case, integers, make_inputs, run, torch_conv2d
from exact import arguments_of, check_exact, draw, lay, output_size
from torch import Tensor

import dwconv

CHANNELS_LAST_ORDER = (0, 2, 3, 1)

CASES = [
    Case(2, 3, (6, 8), (3, 3), padding=(1, 1)),  # rows of pairs
    Case(2, 3, (9, 7), (3, 3), padding=(2, 0), multiplier=2),
    Case(2, 4, (7, 9), (5, 4), (2, 1), (2, 3), bias=False),
    Case(3, 2, (11, 8), (2, 3), (1, 3), (0, 2), (3, 2), multiplier=3),
]


def in_layout(tensors: tuple, grad_output: Tensor, layout: Callable[[Tensor], Tensor]) -> tuple[tuple, Tensor]:
    """Input, weight and gradient as `layout` lays them; the bias with a stride."""
    input, weight, bias = tensors
    strided_bias = None if bias is None else lay(bias, steps=(3,), offset=1)
    return (layout(input), layout(weight), strided_bias), layout(grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), CHANNELS_LAST_ORDER], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_storage_offsets(device: str, case: Case, order: tuple, dtype: torch.dtype) -> None:
    """Tensors that begin anywhere in their buffers: vectors would not be aligned."""
    (input, weight, bias), grad_output = draw(case, dtype, device)
    for offset in range(1, 16):
        tensors = lay(input, order, offset=offset), lay(weight, offset=16 - offset), bias
        check_exact(tensors, lay(grad_output, order, offset=(3 * offset + 1) % 16), **case.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_permuted(device: str, order: tuple, dtype: torch.dtype) -> None:
    for case in CASES:
        check_exact(*in_layout(*draw(case, dtype, device), lambda t: lay(t, order)), **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [(1, 1, 1, 2), (1, 1, 2, 1), (1, 3, 1, 1), (2, 1, 1, 1), (3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), CHANNELS_LAST_ORDER, (1, 0, 3, 2)], ids=str)
def test_slices_with_steps(device: str, order: tuple, steps: tuple, dtype: torch.dtype) -> None:
    for case in CASES[:3]:
        check_exact(*in_layout(*draw(case, dtype, device), lambda t: lay(t, order, steps, 5)), **case.geometry)


@pytest.mark.parametrize("width", [8, 9, 32, 33])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_windows_of_larger_images(device: str, cut: int, width: int) -> None:
    """Rows that are longer in memory than in the tensor, by numbers that make vectors possible or not."""
    for dtype, padding in product([torch.float32, torch.float16], [(0, 0), (1, 1), (2, 3)]):
        case = Case(2, 3, (10, width), (3, 3), padding=padding)

        def window(tensor: Tensor, left: int = cut // 2) -> Tensor:
            n, c, h, w = tensor.shape
            wide = tensor.new_full((n, c, h + 2, w + cut), torch.nan)
            return wide[:, :, 1:-1, left : left + w].copy_(tensor)

        check_exact(*in_layout(*draw(case, dtype, device), window), **case.geometry)


@pytest.mark.parametrize("expanded", [dims for n in range(1, 5) for dims in combinations(range(4), n)], ids=str)
@pytest.mark.parametrize("which", ["input", "weight", "grad_output", "all"])
def test_expanded(device: str, which: str, expanded: tuple) -> None:
    """Strides of 0 along any of batch, channels, height and width."""
    for case, dtype in product(CASES[:3], [torch.float32, torch.float16]):
        (input, weight, bias), grad_output = draw(case, dtype, device)
        if which in ("input", "all"):
            input = lay(input, expanded=expanded)
        if which in ("weight", "all"):
            weight = lay(weight, expanded=expanded)
        if which in ("grad_output", "all"):
            grad_output = lay(grad_output, expanded=expanded)
        if bias is not None and which == "all":
            bias = lay(bias, expanded=(0,))
        check_exact((input, weight, bias), grad_output, **case.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 4, 5, 6), (3, 1, 5, 6), (3, 4, 1, 6), (3, 4, 5, 1), (3, 4, 1, 1), (1, 1, 1, 1)], ids=str
)
def test_sides_of_one(device: str, size: tuple, dtype: torch.dtype) -> None:
    """A side of 1 can have any stride."""
    case = Case(size[0], size[1], size[2:], (3, 3), padding=(1, 1))
    (input, weight, bias), grad_output = draw(case, dtype, device)
    for odd, order in product([0, 1, 7, 2**33], [(0, 1, 2, 3), CHANNELS_LAST_ORDER]):

        def oddly(tensor: Tensor) -> Tensor:
            view = lay(tensor, order, offset=2)
            strides = [odd if side == 1 else stride for side, stride in zip(view.shape, view.stride())]
            return view.as_strided(view.shape, strides)

        check_exact((oddly(input), weight, bias), oddly(grad_output), **case.geometry)


@pytest.mark.parametrize("width", [509, 510, 511, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_rows(device: str, dtype: torch.dtype, width: int) -> None:
    for padding in (0, 1, 2):
        case = Case(1, 3, (9, width), (3, 3), padding=(padding, padding))
        tensors, grad_output = draw(case, dtype, device)
        for cut in (0, 1, 2):
            inside = tensors[0][..., : width - cut]
            check_exact((inside, *tensors[1:]), grad_output[..., cut:], **case.geometry)


def storage_of(tensor: Tensor) -> Tensor:
    """All bytes of the buffer that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_input_is_modified(device: str, case: Case, memory_format: torch.memory_format) -> None:
    order = CHANNELS_LAST_ORDER if memory_format == torch.channels_last else None
    for dtype, steps in product(DTYPES, [(1, 1, 1, 1), (1, 2, 1, 2)]):
        tensors, grad_output = in_layout(*draw(case, dtype, device), lambda t: lay(t, order, steps, 4))
        given = [t for t in (*tensors, grad_output) if t is not None]
        before = [storage_of(t).clone() for t in given]
        check_exact(tensors, grad_output, **case.geometry)
        assert all(torch.equal(storage_of(t), bits) for t, bits in zip(given, before))


# ---------------------------------------------------------------------------- the layout of results


def strides_that_count(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def formats_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in the usual formats and in others, also where sides of 1 make them hard to tell apart."""
    n, c, h, w = tensor.shape
    yield tensor.contiguous()
    yield tensor.contiguous(memory_format=torch.channels_last)
    yield lay(tensor, CHANNELS_LAST_ORDER).as_strided(tensor.shape, (h * w * c, 1, w * c, c))
    yield lay(tensor, (2, 3, 0, 1))
    yield lay(tensor, (1, 0, 2, 3))
    if w > 1:  # of a 1x1 kernel, F.conv2d makes a copy first, whose strides say something else
        yield lay(tensor, CHANNELS_LAST_ORDER, (1, 1, 1, 2))
    yield lay(tensor, expanded=(0,))
    yield lay(tensor, CHANNELS_LAST_ORDER, expanded=(1,))


@pytest.mark.parametrize(
    "size",
    [(2, 4, 5, 6), (1, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (2, 4, 1, 6), (1, 1, 1, 1), (0, 4, 5, 6)],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_those_of_torch(device: str, dtype: torch.dtype, kernel: tuple, size: tuple) -> None:
    """The output's, and those of a leaf's gradient, for every combination of formats of input and weight."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("F.conv2d leaves channels_last in CUDA's float64")
    if device == "cuda" and size[0] == 0:
        pytest.skip("F.conv2d gives an empty output of the input's size the input's strides on CUDA, and only there")
    for multiplier in (1, 2):
        case = Case(size[0], size[1], size[2:], kernel, padding=(kernel[0] // 2, kernel[1] // 2), multiplier=multiplier)
        input, weight, _ = make_inputs(case, dtype, device, make=integers)
        for x, w in product(formats_of(input), formats_of(weight)):
            outputs, gradients = [], []
            for conv2d in (dwconv.conv2d, torch_conv2d):
                leaf = x.detach().requires_grad_()
                outputs.append(conv2d(leaf, w, **case.geometry))
                outputs[-1].sum().backward()
                gradients.append(leaf.grad)
            assert strides_that_count(outputs[0]) == strides_that_count(outputs[1]), (x.stride(), w.stride())
            assert strides_that_count(gradients[0]) == strides_that_count(gradients[1]), (x.stride(), w.stride())
            if device == "cpu":
                assert outputs[0].stride() == outputs[1].stride(), (x.stride(), w.stride())


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("input_format", FORMATS, ids=str)
def test_an_empty_batch_is_contiguous(
    device: str, input_format: torch.memory_format, weight_format: torch.memory_format
):
    for where in (device, "meta"):
        input = torch.empty(0, 4, 5, 6, device=where).to(memory_format=input_format)
        weight = torch.empty(8, 1, 3, 3, device=where).to(memory_format=weight_format)
        output = dwconv.conv2d(input, weight)
        assert output.stride() == torch_conv2d(input, weight).stride() == (96, 12, 4, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_gradients(device: str, dtype: torch.dtype) -> None:
    """Without a leaf's own wishes: grad_input lies as the output does, grad_weight is contiguous."""
    case = Case(2, 4, (5, 6), (3, 3), padding=(1, 1))
    input, weight, bias = make_inputs(case, dtype, device, make=integers)
    for input_format, weight_format, grad_format in product(FORMATS, repeat=3):
        tensors = input.to(memory_format=input_format), weight.to(memory_format=weight_format), bias
        grad_output = integers(*input.shape).to(input).contiguous(memory_format=grad_format)
        results = check_exact(tensors, grad_output, **case.geometry)
        expected = torch.channels_last if torch.channels_last in (input_format, weight_format) else FORMATS[0]
        assert results.output.is_contiguous(memory_format=expected)
        assert results.grad_input.is_contiguous(memory_format=expected)
        assert results.grad_weight.is_contiguous()


# ---------------------------------------------------------------------------- many and large


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(70000, 1, (3, 4), (3, 3), padding=(1, 1)),
        Case(35001, 2, (4, 3), (2, 3), (2, 1), (1, 1)),
        Case(1, 70000, (3, 4), (3, 3), padding=(1, 1)),
        Case(7, 10001, (4, 3), (3, 2), (1, 2), multiplier=2),
    ],
    ids=str,
)
def test_more_than_65535_planes(device: str, case: Case, memory_format: torch.memory_format) -> None:
    """More than a grid of CUDA has in its second and third dimension."""
    if device == "cpu" and case.channels > 100:
        case = case._replace(batch=70000 // 70, channels=70)  # ATen takes seconds for thousands of groups
    input, weight, bias = make_inputs(case, torch.float32, device, memory_format, make=integers)
    grad_output = integers(*output_size(case)).to(device).contiguous(memory_format=memory_format)
    check_exact((input, weight, bias), grad_output, **case.geometry)


@pytest.fixture
def much_memory() -> Iterator[None]:
    """20 GB of it, given back; of all processes that test on the GPU, one at a time has as much."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    with open(Path(tempfile.gettempdir()) / f"dwconv-much-memory-{os.getuid()}-{gpu}", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB of free GPU memory")
        yield
        gc.collect()
        torch.cuda.empty_cache()


def patches_of(height: int, width: int, side: int) -> list[tuple[slice, slice]]:
    """Squares at the corners of a plane and around its middle."""
    rows, columns = ((0, (size - side) // 2, size - side) for size in (height, width))
    return [(slice(y, y + side), slice(x, x + side)) for y, x in product(rows, columns)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "memory_format"),
    [
        (Case(1, 2, (32776, 32776), (3, 3), padding=(1, 1)), torch.contiguous_format),
        (Case(1, 2, (32776, 32776), (3, 3), padding=(1, 1)), torch.channels_last),
        (Case(1, 2, (32776, 32776), (5, 5), padding=(2, 2)), torch.contiguous_format),
        (Case(1, 1, (46344, 46352), (3, 3), padding=(1, 1)), torch.contiguous_format),  # one plane beyond 2^31
        (Case(3, 683, (1024, 1024), (3, 3), padding=(1, 1)), torch.contiguous_format),
        (Case(3, 683, (1024, 1024), (3, 3), padding=(1, 1)), torch.channels_last),
        (Case(3, 683, (1024, 1024), (5, 5), padding=(2, 2)), torch.contiguous_format),
    ],
    ids=str,
)
def test_more_than_2_to_the_31_elements(case: Case, memory_format: torch.memory_format, much_memory: None) -> None:
    """All zeros but for small squares far apart, so that a small convolution knows every number of the result."""
    side, rim = 12, 4  # zeros around a square, so that no window sees two of them, nor an edge that is none
    size = case.batch, case.channels, *case.size
    squares = patches_of(*case.size, side)
    images = sorted({0, case.batch // 2, case.batch - 1})

    def sparse() -> Tensor:
        tensor = torch.empty(size, dtype=torch.float16, device="cuda", memory_format=memory_format).zero_()
        assert tensor.numel() > 2**31
        for image, (rows, columns) in product(images, squares):
            tensor[image, :, rows, columns] = integers(case.channels, side, side).to(tensor)
        return tensor

    def around(tensor: Tensor, image: int, rows: slice, columns: slice) -> Tensor:
        """A square with its rim, as far as the image goes."""
        sides = (slice(max(s.start - rim, 0), s.stop + rim) for s in (rows, columns))
        return tensor[(slice(image, image + 1), slice(None), *sides)].double().contiguous()

    input, grad_output = sparse(), sparse()
    weight = integers(case.filters, 1, *case.kernel).to(input)
    arguments = arguments_of(case)
    output = torch.ops.dwconv.forward(input, weight, None, *arguments)
    grad_weight = torch.zeros_like(weight, dtype=torch.float64)
    nonzero, grad_nonzero = 0, 0

    def small(image: int, square: tuple[slice, slice]):
        x, g = around(input, image, *square), around(grad_output, image, *square)
        return run(torch_conv2d, (x, weight.double(), None), g, **case.geometry)

    for image, square in product(images, squares):
        expected = small(image, square)
        assert torch.equal(around(output, image, *square), expected.output.round())
        nonzero += int(expected.output.round().count_nonzero())
        grad_weight += expected.grad_weight.round()
    assert int(output.count_nonzero()) == nonzero > 0
    del output

    grad_input = torch.ops.dwconv.grad_input(
        grad_output, weight, size, *arguments, memory_format == torch.channels_last
    )
    for image, square in product(images, squares):
        expected = small(image, square)
        assert torch.equal(around(grad_input, image, *square), expected.grad_input.round())
        grad_nonzero += int(expected.grad_input.round().count_nonzero())
    assert int(grad_input.count_nonzero()) == grad_nonzero > 0
    del grad_input

    d_weight, d_bias = torch.ops.dwconv.grad_weight(grad_output, input, case.kernel, *arguments, True)
    assert torch.equal(d_weight, grad_weight.to(d_weight))
    assert torch.equal(d_bias, grad_output.sum((0, 2, 3), dtype=torch.float64).to(d_bias))


@pytest.mark.gpu
def test_more_than_2_to_the_31_weights(much_memory: None) -> None:
    """Autocast casts them first. Of an image of one pixel, each channel's output is the pixel times the middle tap."""
    channels, side = 541_200, 63
    weight = torch.zeros(channels, 1, side, side, device="cuda")
    assert weight.numel() > 2**31
    middle = integers(channels).to(weight)
    weight[:, 0, side // 2, side // 2] = middle
    pixel = integers(1, channels, 1, 1).to(weight)
    with torch.autocast("cuda", torch.float16):
        output = dwconv.conv2d(pixel, weight, padding=side // 2)
    assert output.dtype == torch.float16
    assert torch.equal(output.flatten(), (pixel.flatten() * middle).half())
