"""Which plan serves what: the order of the table, over all families, and how a plan is asked for by name.

What a family can claim, and that its results are exact, is in a file of its own:

test_plans_little.py          scale, direct, gather: problems with little to do
test_plans_nchw.py            small kernels in NCHW
test_plans_channels_last.py   small kernels in channels_last
test_plans_large.py           large kernels in 16 bits (in float32: test_large_float32.py, test_fft.py)
test_plans_any.py             any kernel, stride and dilation
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product

import pytest
import sanitize
import torch
from common import FORMATS, Case
from conftest import ROOT
from exact import arguments_of, draw
from plans import (
    ALL,
    BAND,
    FAST,
    FLAT,
    HALF,
    MARCH,
    MARCH_NCHW,
    MATRIX,
    PASSES,
    STREAM,
    TILES,
    WALK,
    WINDOWS,
    claims,
    general,
    goes_direct,
    meta,
    plan_of,
    plans_of,
    serves,
    tile_case,
)

import dwconv

FIRST = Case(16, 64, (512, 512), (3, 3), padding=(1, 1))

# ---------------------------------------------------------------------------- small kernels


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_small_kernels_in_nchw(name: str, tile: tuple, dtype: torch.dtype) -> None:
    """In float32 CUDA cores, in 16 bits tensor cores where there is enough to multiply."""
    kernel, stride, dilation = tile
    square = kernel[0] == kernel[1] > 1
    area = math.prod(dilation * (side - 1) + 1 for side in kernel)
    # Of how many pixels planes have to be for tensor cores, ...
    if name == "grad_weight":
        least = 784 if square and kernel[0] >= 5 and stride == 1 else math.inf
    elif stride == 2:
        least = 512 if kernel[0] == 7 else math.inf
    else:
        least = math.inf if area == 1 else 196 if area >= 25 else 784 if square else 2048
    # ... and of how few columns, for rows of many images to be multiplied together.
    if name != "grad_weight":
        most = 16
    else:
        most = 0 if kernel[1] > 9 or (stride == 2 and kernel[0] < 5) else 128
    for size in ((512, 512), (7, 13), (113, 95), (20, 900)):
        case = tile_case(tile, 512, 64, size)
        # Rows of an odd number of columns are read element by element.
        multiplies = name != "grad_weight" or size[1] % 2 == 0 or (kernel[0] == 7 and stride == 1)
        pixels = math.prod(size) // (1 if name == "grad_input" else stride**2)
        if dtype == torch.float32:
            down_planes = kernel == (7, 7) and (stride == 1 or name != "grad_input") and size != (7, 13)
            same_banks = dilation == 2 and size[1] % 32 == 0 and name != "grad_weight"  # in which all rows would begin
            expected = (MARCH_NCHW if down_planes or same_banks else STREAM)[name]
        elif area > 1 and kernel[0] <= 7 and size[1] + stride // 2 <= most and multiplies:
            expected = "batch_grad_weight_nchw" if name == "grad_weight" else "toeplitz_small_planes"
        elif pixels >= least:
            expected = "toeplitz_grad_weight_nchw" if name == "grad_weight" else "toeplitz_nchw"
        else:
            expected = STREAM[name]
        assert plan_of(name, case, dtype) == serves(name, expected, case), str(case)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_small_kernels_in_channels_last(name: str, tile: tuple, dtype: torch.dtype) -> None:
    """In 16 bits from 5x5 on, tensor cores, for pixels of whole units of 16 bytes; for 1x1 of others, a plan."""
    (height, width), stride, _ = tile
    square = height == width >= 5 and stride == 1 and dtype != torch.float32 and name != "grad_weight"
    for channels in (64, 37, 3, 1000):
        for size in ((512, 512), (226, 190), (20, 9000)):
            case = tile_case(tile, 32, channels, size)
            expected = BAND if square and channels % 8 == 0 else MARCH[name]
            if name == "grad_weight" and dtype != torch.float32 and channels >= 32:
                if tile == TILES[3] or (tile == TILES[2] and channels % 8 == 0):
                    expected = MATRIX
            if name == "grad_weight" and tile == TILES[0] and channels in (37, 3):
                expected = FLAT
            assert plan_of(name, case, dtype, torch.channels_last) == serves(name, expected, case), str(case)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_tensor_cores(name: str, dtype: torch.dtype) -> None:
    """What nothing else is compiled for, unless images are small or there is no band matrix for the kernel."""
    for side, expected in ((14, "toeplitz_nchw"), (13, "stream_nchw")):
        assert plan_of(name, Case(7, 1024, (side, side), (7, 7), padding=(3, 3)), dtype) == expected
    for kernel in ((2, 3), (4, 4), (6, 9), (9, 9), (11, 5), (1, 2)):
        assert plan_of(name, Case(2, 4, (32, 32), kernel), dtype) == "toeplitz_nchw", kernel
        few = "toeplitz_large" if max(kernel) >= 8 else "windows_nchw"
        assert plan_of(name, Case(2, 4, (12, 10), kernel), dtype) == few, kernel
    for kernel, dilation, expected in (
        ((1, 17), (1, 1), "toeplitz_nchw"),
        ((2, 3), (3, 2), "toeplitz_nchw"),
        ((3, 3), (4, 4), "toeplitz_nchw"),
        ((1, 4), (7, 5), "toeplitz_nchw"),
        ((3, 3), (4, 5), "windows_nchw"),
        ((5, 5), (2, 2), "toeplitz_nchw"),
        ((7, 7), (2, 2), "windows_nchw"),
    ):
        assert plan_of(name, Case(2, 4, (40, 36), kernel, dilation=dilation), dtype) == expected, kernel
    # Large kernels on planes of few rows, where there are many images.
    for batch, channels, expected in (
        (64, 512, "toeplitz_large"),
        (31, 512, "toeplitz_nchw"),
        (64, 120, "toeplitz_nchw"),
    ):
        assert plan_of(name, Case(batch, channels, (14, 14), (9, 9), padding=(4, 4)), dtype) == expected, batch
    strided = Case(2, 4, (64, 64), (5, 3), (2, 2))
    assert plan_of(name, strided, dtype) == ("toeplitz_nchw" if name == "forward" else "windows_nchw")
    for side, expected in ((28, "toeplitz_nchw"), (27, "stream_nchw")):
        assert plan_of(name, Case(64, 192, (side, side), (3, 3), padding=(1, 1)), dtype) == expected


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_over_images(dtype: torch.dtype) -> None:
    """For grad_weight, unless CUDA cores are as fast: for one tap, 3x3 on medium planes, odd widths with few taps."""
    for side, size, stride, multiplies in (
        (1, (56, 56), 1, False),
        (3, (27, 28), 1, True),
        (3, (28, 28), 1, False),
        (3, (28, 56), 1, True),
        (5, (28, 28), 1, True),
        # odd widths
        (3, (7, 7), 1, True),
        (3, (9, 9), 1, False),
        (3, (16, 63), 1, True),  # planes of whole units
        (3, (17, 63), 1, False),
        (5, (27, 27), 1, False),
        (7, (27, 27), 1, True),
        (9, (33, 33), 1, True),
        (5, (14, 14), 2, True),
        (5, (16, 14), 2, False),
    ):
        case = Case(128, 768, size, (side, side), (stride, stride), padding=(side // 2, side // 2))
        assert (plan_of("grad_weight", case, dtype) == "batch_grad_weight_nchw") == multiplies, (side, size, stride)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_what_does_not_stream(name: str, dtype: torch.dtype) -> None:
    """Too few columns, too much padding, sums over filters whose planes are too large, views with gaps."""
    few = (20, 5) if name == "forward" else (20, 4)
    rows_of_many = dtype in HALF  # on tensor cores
    expected = "toeplitz_small_planes" if rows_of_many else "direct"
    assert plan_of(name, Case(256, 64, few, (3, 3), padding=(1, 1)), dtype) == expected
    assert plan_of(name, FIRST._replace(padding=(3, 1)), dtype) == "direct"
    whole = meta((16, 64, 512, 512), dtype)
    for gaps in (meta((16, 64, 512, 514), dtype)[..., 1:-1], meta((16, 64, 512, 1024), dtype)[..., ::2], whole.mT):
        assert claims(name, FIRST, gaps, whole)[0] == "direct"
        assert claims(name, FIRST, whole, gaps)[0] == "direct"


def test_nine_by_nine() -> None:
    """In float32 warps march down its planes, and in 16 bits its output and its input's gradient have tensor cores.

    Many planes that lanes.cu, lanes_channels_last.cu or lanes_grad_weight.cu are compiled for go there.
    """
    case = Case(64, 192, (28, 28), (9, 9), padding=(4, 4))
    for name, memory_format in product(PASSES[:2], FORMATS):
        assert plan_of(name, case, torch.float32, memory_format) == "large_float32"
        for dtype in HALF:
            band = BAND if memory_format == torch.channels_last else "toeplitz_nchw"
            assert plan_of(name, case, dtype, memory_format) == band
    for change, expected in (
        ({"size": (56, 56)}, "march_nchw"),
        ({"size": (36, 24)}, "march_nchw"),
        ({"batch": 2}, "large_float32"),
    ):
        assert plan_of("forward", case._replace(**change)) == expected, change
    for name, change in product(PASSES[:2], ({"batch": 8}, {"size": (28, 24)}, {"channels": 190}, {"padding": (5, 5)})):
        found = plan_of(name, case._replace(**change), memory_format=torch.channels_last)
        assert found == "march_channels_last", change
    assert plan_of("grad_input", case._replace(multiplier=2), memory_format=torch.channels_last) == WINDOWS
    for change, expected in (
        ({}, "large_float32_grad_weight"),
        ({"size": (14, 14)}, "large_float32_grad_weight"),
        ({"size": (56, 56)}, "march_grad_weight_nchw"),
        ({"size": (36, 24)}, "march_grad_weight_nchw"),
        ({"size": (300, 28)}, "march_grad_weight_nchw"),
    ):
        assert plan_of("grad_weight", case._replace(**change)) == expected, change


def test_multipliers() -> None:
    case = Case(16, 64, (56, 56), (3, 3), padding=(1, 1), multiplier=3)
    assert [plan_of(name, case) for name in PASSES] == [*STREAM.values()]
    # A gradient that is summed over filters takes whole planes at a time: here they are too large.
    large = FIRST._replace(multiplier=3)
    assert [plan_of(name, large) for name in PASSES] == ["stream_nchw", "direct", "stream_grad_weight_nchw"]


# ---------------------------------------------------------------------------- any kernel


@pytest.mark.parametrize("name", PASSES)
def test_small_kernels_without_a_plan_of_their_own(name: str) -> None:
    """They take those of large kernels where these pay: not in channels_last if there is little to multiply."""
    case, nchw, last = Case(16, 64, (56, 56), (3, 5), padding=(1, 2)), *FORMATS
    for kernel, dtype, memory_format, images, sums in (
        ((4, 6), torch.float32, nchw, "large_float32", "large_float32_grad_weight"),
        ((2, 3), torch.float32, nchw, "windows_nchw", "large_float32_grad_weight"),
        ((3, 5), torch.float32, last, WINDOWS, WALK),
        ((2, 3), torch.float32, last, WINDOWS, WALK),
        ((3, 5), torch.float16, nchw, "toeplitz_nchw", "batch_grad_weight_nchw"),
        ((8, 5), torch.float16, nchw, "toeplitz_large", "batch_grad_weight_nchw"),
        ((10, 5), torch.float16, nchw, "toeplitz_large", "hankel_grad_weight"),
        ((3, 5), torch.float16, last, BAND, MATRIX),
        ((2, 3), torch.float16, last, BAND, MATRIX),
    ):
        found = plan_of(name, case._replace(kernel=kernel), dtype, memory_format)
        assert found == (sums if name == "grad_weight" else images), (kernel, dtype, memory_format)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("change", "dtype", "memory_format"),
    [
        ({"kernel": (7, 7)}, torch.float64, torch.contiguous_format),
        ({"kernel": (7, 7)}, torch.float64, torch.channels_last),
        ({"kernel": (4, 4)}, torch.float64, torch.contiguous_format),
        ({"stride": (1, 2)}, torch.float16, torch.contiguous_format),
        ({"stride": (3, 3)}, torch.float32, torch.contiguous_format),
        ({"dilation": (2, 1)}, torch.float32, torch.contiguous_format),
    ],
    ids=str,
)
def test_general(name: str, change: dict, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    assert plan_of(name, FIRST._replace(**change), dtype, memory_format) == general(name, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_float64(tile: tuple, memory_format: torch.memory_format) -> None:
    """Small kernels go direct; grad_weight has no way but those for any kernel."""
    case = tile_case(tile, 4, 8, (40, 40))
    for name in PASSES:
        direct = name != "grad_weight" and goes_direct(name, case, torch.float64)
        otherwise = "direct" if direct else general(name, memory_format)
        expected = "scale" if direct and case.kernel == (1, 1) else otherwise
        assert plan_of(name, case, torch.float64, memory_format) == expected


def test_what_goes_by_columns() -> None:
    """What others have as well: little to multiply, few places of a tile on tensor cores, or a single column."""
    columns, hankel, float32 = "columns_grad_weight", "hankel_grad_weight", "large_float32_grad_weight"
    for case, dtype, expected in (
        (Case(2, 32, (17, 17), (1, 2)), torch.float16, columns),
        (Case(1, 128, (72, 72), (10, 10)), torch.float16, hankel),
        (Case(1, 128, (72, 72), (10, 10)), torch.float32, float32),
        (Case(9, 256, (45, 45), (6, 1), padding=(2, 0)), torch.bfloat16, columns),
        (Case(9, 256, (45, 45), (6, 1), padding=(2, 0)), torch.float32, columns),
        (Case(65, 240, (28, 13), (28, 1), padding=(13, 0)), torch.float32, float32),
        (Case(9, 256, (45, 45), (1, 6), padding=(0, 2)), torch.float32, float32),
        (Case(16, 240, (5, 12), (1, 20), padding=(0, 9)), torch.bfloat16, columns),
        (Case(64, 240, (14, 14), (1, 20), padding=(0, 9)), torch.bfloat16, "outer_grad_weight"),
        (Case(43, 96, (8, 15), (1, 1)), torch.float32, "stream_grad_weight_nchw"),
        (Case(68, 96, (6, 6), (1, 1)), torch.float32, columns),
        (Case(8, 96, (6, 6), (1, 1)), torch.float32, "direct_grad_weight"),
        (Case(27, 4, (127, 5), (5, 5), padding=(2, 2)), torch.float16, columns),
        (Case(54, 16, (127, 5), (5, 5), padding=(2, 2)), torch.float16, "batch_grad_weight_nchw"),
    ):
        assert plan_of("grad_weight", case, dtype) == expected, (str(case), dtype)


@pytest.mark.parametrize("name", PASSES[:2])
def test_32_bits_bound_offsets(name: str) -> None:
    assert plan_of(name, Case(1, 2, (260000, 2080), (3, 3), padding=(1, 1))) == "stream_nchw"
    assert plan_of(name, Case(1, 2, (260000, 2080), (3, 3), padding=(3, 3))) == "generic"
    assert plan_of(name, Case(1, 2, (250000, 2080), (3, 3), padding=(3, 3))) == "direct"
    assert plan_of(name, Case(10**6, 300, (100, 100), (3, 3), padding=(1, 1))) == "generic"
    assert plan_of(name, Case(10**4, 300, (100, 100), (3, 3), padding=(1, 1))) == "stream_nchw"
    assert plan_of(name, Case(1, 2, (46344, 46352), (3, 3), padding=(3, 1))) == "generic"
    assert plan_of(name, Case(1, 2**27 + 1, (8, 64), (3, 3), padding=(1, 1))) == "generic"
    assert plan_of(name, Case(1, 2, (2**31, 3), (3, 3), padding=(1, 1))) == "generic"
    assert plan_of(name, Case(1, 2, (3, 2**31), (3, 3), padding=(1, 1))) == "generic"
    assert plan_of(name, Case(1, 2, (8, 8), (3, 3), padding=(2**24, 1))) == "generic"
    case, plain = Case(2, 2, (8, 8), (3, 3), padding=(1, 1)), meta((2, 2, 8, 8))
    for channels, expected in ((2**20, "direct"), (2**24, "large_float32")):  # of which these are the first and another
        far = meta((2, channels, 8, 8))[:, :: channels // 2]
        assert claims(name, case, far, plain)[0] == expected


# ---------------------------------------------------------------------------- the table itself


def test_reasons() -> None:
    size, strides = (16, 64, 512, 512), (64 * 512 * 512, 512 * 512, 512, 1)
    found = dwconv._C.plans("forward", "float32", size, strides, (64, 1, 3, 3), strides, (1, 1), (1, 1), (1, 1))
    assert [plan for plan, _ in found] == [
        *("stream_nchw", "windows_nchw", "large_float32", "stream_nchw_portable", "generic")
    ]
    assert all(isinstance(reason, str) and reason for _, reason in found)


def test_sanitizer_watches_every_plan() -> None:
    found = {
        plan
        for case, dtype, memory_format in sanitize.RUNS
        for name in PASSES
        for plan in plans_of(name, case, dtype, memory_format, allow_fft=True)
    }
    assert found == set(re.findall(r'{PlanId::k\w+,\s*"(\w+)"', (ROOT / "csrc" / "plan.cpp").read_text()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pass_name": "backward"}, ValueError, "backward"),
        ({"dtype": "int32"}, ValueError, "int32"),
        ({"dtype": "torch.float32"}, ValueError, "torch.float32"),
        ({"stride": (0, 1)}, ValueError, "stride"),
        ({"dilation": (1, 0)}, ValueError, "dilation"),
        ({"padding": (0, -1)}, ValueError, "padding"),
        ({"input_size": (2, 4, 8, 0), "padding": (0, 2)}, ValueError, "sizes"),
        ({"weight_size": (4, 1, 0, 3)}, ValueError, "sizes"),
        ({"input_size": (-1, 4, 8, 8)}, ValueError, "batch"),
        ({"weight_size": (5, 1, 3, 3)}, ValueError, "multiple"),
        ({"weight_size": (2, 1, 3, 3)}, ValueError, "multiple"),
        ({"weight_size": (4, 1, 9, 3)}, ValueError, "empty"),
        ({"input_size": (4, 8, 8)}, TypeError, "incompatible"),
        ({"padding": 1}, TypeError, "incompatible"),
        ({"padding": (1, 1, 1)}, TypeError, "incompatible"),
        ({"dilation": (1.5, 1)}, TypeError, "incompatible"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "pass_name": "forward",
        "dtype": "float32",
        "input_size": (2, 4, 8, 8),
        "input_stride": (256, 64, 8, 1),
        "weight_size": (4, 1, 3, 3),
        "output_stride": (144, 36, 6, 1),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
    }
    assert dwconv._C.plans(*good.values())
    with pytest.raises(error, match=message):
        dwconv._C.plans(*(good | change).values())


# ---------------------------------------------------------------------------- plans forced by name


def calls(case: Case, dtype: torch.dtype, memory_format=torch.contiguous_format) -> dict[str, Callable[[str], object]]:
    """For each pass, a call that takes a plan by name."""
    (input, weight, bias), grad_output = draw(case, dtype, "cuda", memory_format)
    ops, arguments, last = torch.ops.dwconv, arguments_of(case), memory_format == torch.channels_last
    return {
        "forward": lambda plan: ops.forward.plan(input, weight, bias, *arguments, plan),
        "grad_input": lambda plan: ops.grad_input.plan(grad_output, weight, input.shape, *arguments, last, plan),
        "grad_weight": lambda plan: ops.grad_weight.plan(grad_output, input, case.kernel, *arguments, True, plan),
    }


@pytest.mark.gpu
def test_unknown_plan() -> None:
    for call in calls(Case(2, 4, (6, 8), (3, 3)), torch.float32).values():
        with pytest.raises(RuntimeError, match="no plan 'window'"):
            call("window")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, (9, 8), (3, 3), padding=(1, 1)),
        Case(2, 4, (9, 8), (3, 3), multiplier=2),
        Case(2, 4, (9, 8), (5, 5)),
        Case(2, 4, (9, 8), (3, 3), (2, 2)),
        Case(2, 4, (9, 8), (3, 3), dilation=(2, 2)),
    ],
    ids=str,
)
def test_forcing_a_plan(case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """It works where the table says that the plan claims, and is refused, by name, everywhere else."""
    claimed = {name: plans_of(name, case, dtype, memory_format) for name in PASSES}
    for name, call in calls(case, dtype, memory_format).items():
        for plan in (
            "toeplitz_nchw",
            "toeplitz_grad_weight_nchw",
            "toeplitz_small_planes",
            "batch_grad_weight_nchw",
            "stream_nchw",
            "stream_grad_weight_nchw_portable",
            MARCH_NCHW[name],
            MARCH_NCHW[name] + "_portable",
            "toeplitz_large",
            "direct",
            BAND,
            MARCH[name],
            MATRIX,
            "windows_nchw",
            "generic",
        ):
            if plan in claimed[name]:
                call(plan)
            else:
                with pytest.raises(RuntimeError, match=f"plan '{plan}' does not serve this problem"):
                    call(plan)


@pytest.mark.parametrize(
    ("name", "plan", "ahead", "dtype", "memory_format", "case"),
    [
        # Few outputs of a band matrix, or products of one row or column of taps.
        ("grad_input", MARCH["forward"], BAND, HALF[0], FORMATS[1], Case(3, 40, (45, 45), (5, 5))),
        ("forward", WINDOWS, BAND, HALF[0], FORMATS[1], Case(48, 768, (9, 9), (1, 27), padding=(0, 13))),
        ("forward", WINDOWS, "large_float32", torch.float32, FORMATS[1], Case(3, 256, (72, 72), (19, 1))),
        ("forward", "windows_nchw", "large_float32", torch.float32, FORMATS[0], Case(76, 67, (49, 32), (18, 1))),
        ("grad_weight", WALK, "outer_grad_weight", HALF[1], FORMATS[1], Case(38, 24, (227, 51), (1, 9))),
        ("grad_weight", WALK, "hankel_grad_weight", HALF[0], FORMATS[1], Case(10, 21, (161, 161), (1, 16))),
        ("grad_weight", WALK, "large_float32_grad_weight", torch.float32, FORMATS[1], Case(2, 80, (109, 109), (1, 17))),
        # Few products, for which images would be copied, and few small planes.
        ("forward", WINDOWS, "toeplitz_large", HALF[0], FORMATS[1], Case(84, 3, (8, 42), (30, 30), padding=(14, 14))),
        ("forward", WINDOWS, "large_float32", torch.float32, FORMATS[1], Case(4, 64, (17, 17), (13, 13))),
        ("forward", "windows_nchw", "large_float32", torch.float32, FORMATS[0], Case(45, 1, (24, 131), (18, 18))),
    ],
    ids=str,
)
def test_the_faster_of_two(
    name: str, plan: str, ahead: str, dtype: torch.dtype, memory_format: torch.memory_format, case: Case
) -> None:
    """A plan goes ahead of one for larger problems, which would serve as well, and does where there is more."""
    plans = plans_of(name, case, dtype, memory_format)
    assert plans.index(plan) < plans.index(ahead)


def test_phases_of_planes_take_longer() -> None:
    """Planes of channels that are no whole vectors: copies take longer than what is multiplied faster saves."""
    case = Case(19, 100, (62, 62), (5, 8), padding=(4, 7), dilation=(2, 2))
    assert "phases" not in plans_of("grad_input", case, torch.bfloat16, torch.channels_last)
    assert "phases" in plans_of("grad_input", case._replace(channels=104), torch.bfloat16, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_large_kernels_of_which_few_taps_meet_the_image(memory_format: torch.memory_format) -> None:
    """Of 10 x 31 dilated taps 6 x 5 meet an image of 6 x 6: those are a problem of its own."""
    case = Case(27, 816, (6, 6), (10, 31), padding=(9, 30), dilation=(2, 2))
    left = case._replace(kernel=(10, 5), padding=(9, 4))
    for name in PASSES[:2]:
        assert plans_of(name, case, memory_format=memory_format) == plans_of(name, left, memory_format=memory_format)
