"""Which kernel serves what: the table of plans, `explain`, and each plan forced by name."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import sanitize
import torch
from common import FORMATS, Case, integers, make_inputs, run_float64
from conftest import ROOT
from exact import arguments_of, claims, lay, output_size, results_of_plans, wrong_numbers
from torch import Tensor

import dwconv

PASSES = ["forward", "grad_input", "grad_weight"]
FAST = [torch.float32, torch.float16, torch.bfloat16]  # what specialised plans serve

FIRST = Case(16, 64, (512, 512), (3, 3), padding=(1, 1))


def meta(size: tuple, dtype: torch.dtype, memory_format=torch.contiguous_format) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


# What serves any problem with little to do; most problems here stand for larger ones.
GATHER = {"forward": "gather", "grad_input": "gather", "grad_weight": "gather_grad_weight"}


def plans_of(
    name: str, case: Case, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format
) -> list[str]:
    input = meta((case.batch, case.channels, *case.size), dtype, memory_format)
    return claims(name, case, input, meta(output_size(case), dtype, memory_format))


def plan_of(name: str, case: Case, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format) -> str:
    """Of the problems of this sort that are not small."""
    return next(plan for plan in plans_of(name, case, dtype, memory_format) if plan != GATHER[name])


# ---------------------------------------------------------------------------- the table


MARCH = {
    "forward": "march_channels_last",
    "grad_input": "march_channels_last",
    "grad_weight": "march_grad_weight_channels_last",
}
WALK = "walk_grad_weight_channels_last"  # what nothing else serves there
# What goes to tensor cores instead.
BAND = "toeplitz_channels_last"
MATRIX = "toeplitz_grad_weight_channels_last"
# What takes any kernel there, but for grad_weight.
WINDOWS = "windows_channels_last"
FLAT = "flat_grad_weight_channels_last"  # of one tap, where pixels are no whole units
STREAM = {"forward": "stream_nchw", "grad_input": "stream_nchw", "grad_weight": "stream_grad_weight_nchw"}
MARCH_NCHW = {"forward": "march_nchw", "grad_input": "march_nchw", "grad_weight": "march_grad_weight_nchw"}

# Kernel, stride and dilation of what streams.
TILES = [
    ((1, 1), 1, 1),
    ((3, 3), 1, 1),
    ((5, 5), 1, 1),
    ((7, 7), 1, 1),
    ((3, 3), 2, 1),
    ((5, 5), 2, 1),
    ((7, 7), 2, 1),
    ((3, 3), 1, 2),
    ((1, 11), 1, 1),
    ((11, 1), 1, 1),
]


def general(name: str, memory_format: torch.memory_format) -> str:
    """What serves a problem that has no plan of its own."""
    if name == "grad_weight":
        return "columns_grad_weight" if memory_format == torch.contiguous_format else WALK
    return "windows_nchw" if memory_format == torch.contiguous_format else WINDOWS


def serves(name: str, plan: str, case: Case) -> str:
    """`plan`, unless the kernel has one tap alone: then that of such kernels, if 32 bits count all elements."""
    few = case.batch * case.channels * math.prod(case.size) <= 2**31 - 2**16
    return "scale" if case.kernel == (1, 1) and name != "grad_weight" and few else plan


def tile_case(tile: tuple, batch: int, channels: int, size: tuple[int, int], **more) -> Case:
    """With the padding that keeps the size at stride 1, unless there is another in `more`."""
    kernel, stride, dilation = tile
    padding = tuple(dilation * (side - 1) // 2 for side in kernel)
    case = Case(batch, channels, size, kernel, (stride, stride), padding, (dilation, dilation))
    return case._replace(**more)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_small_kernels_in_nchw(name: str, tile: tuple, dtype: torch.dtype) -> None:
    kernel, stride, dilation = tile
    # Where 16 bits go to tensor cores: from which kernels on, and on planes of how many pixels.
    square = kernel[0] == kernel[1] > 1
    area = math.prod(dilation * (side - 1) + 1 for side in kernel)
    if name == "grad_weight":
        least = 784 if square and kernel[0] >= 5 and stride == 1 else None
    elif stride == 2:
        least = 512 if kernel[0] == 7 else None
    else:
        least = None if area == 1 else 196 if area >= 25 else 784 if square else 2048
    for size in ((512, 512), (7, 13), (113, 95), (20, 900)):
        pixels = size[0] * size[1] // (1 if name == "grad_input" else stride**2)
        strides = 1 if name == "grad_input" else 2
        marches = kernel == (7, 7) and stride <= strides and size != (7, 13)
        # Rows whose beginnings lie in the same banks of shared memory.
        marches |= dilation == 2 and size[1] % 32 == 0 and name != "grad_weight"
        marches &= dtype == torch.float32
        expected = MARCH_NCHW[name] if marches else STREAM[name]
        if dtype != torch.float32 and least is not None and pixels >= least:
            expected = expected.replace("stream", "toeplitz")
        # Where rows of many images are multiplied together.
        most = 16 if name != "grad_weight" else 0 if kernel[1] > 9 or (stride == 2 and kernel[0] < 5) else 128
        if dtype != torch.float32 and size[1] + stride // 2 <= most and area > 1 and kernel[0] <= 7:
            expected = "batch_grad_weight_nchw" if name == "grad_weight" else "toeplitz_small_planes"
        case = tile_case(tile, 512, 64, size)
        assert plan_of(name, case, dtype) == serves(name, expected, case), str(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_large_kernels(name: str, dtype: torch.dtype) -> None:
    """Any size of kernel and image; rows, planes and images may lie apart, and channels side by side.

    But where few taps are to be multiplied not with a copy of the images, or with rows of an odd length.
    """
    for kernel in ((8, 3), (12, 12), (3, 10), (31, 31), (51, 5), (5, 51), (63, 63), (1, 18)):
        for size in ((64, 64), (113, 95), (7, 7), (1, 1), (3, 900)):
            for padding in (tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel)):
                case = Case(2, 4, size, kernel, padding=padding)
                widths = size[1], output_size(case)[3]
                for memory_format in FORMATS:
                    copies = memory_format == torch.channels_last and max(widths) > 1
                    few = math.prod(kernel) <= 40 and (copies or any(width % 2 for width in widths))
                    expected = general(name, memory_format) if few else "toeplitz_large"
                    found = plan_of(name, case, dtype, memory_format)
                    assert found == expected or (few and size == (1, 1)), str(case)  # one pixel lies in either layout
                    many = case._replace(batch=2**18)
                    few_for_copies = copies and math.prod(kernel) <= 32
                    assert ("toeplitz_large" in plans_of(name, many, dtype, memory_format)) != few_for_copies, str(many)
    column = Case(64, 8, (64, 64), (25, 1), padding=(12, 0))  # of whose band matrices most is zeros
    assert plan_of(name, column, dtype) == "windows_nchw"
    case = Case(2, 4, (24, 24), (13, 13), padding=(6, 6))
    plain = meta((2, 4, 24, 24), dtype)
    for odd, serves in (
        (lay(plain, offset=3), True),
        (lay(plain, steps=(2, 3, 2, 1)), True),
        (lay(plain, (1, 0, 2, 3), (1, 1, 3, 1), 1), True),
        (lay(plain, expanded=(0,)), True),
        (lay(plain, (0, 2, 3, 1), (1, 1, 3, 2), 1), True),
        (lay(plain, (0, 2, 3, 1), (1, 2, 1, 1)), False),
        (lay(plain, steps=(1, 1, 1, 2)), False),
        (plain.mT, False),
    ):
        assert ("toeplitz_large" in claims(name, case, odd, plain)) == serves, odd.stride()
        assert ("toeplitz_large" in claims(name, case, plain, odd)) == serves, odd.stride()
    forward = name == "forward"
    for change, serves in (
        ({"stride": (2, 2)}, forward),
        ({"multiplier": 3}, forward),
        ({"stride": (1, 2)}, False),
        ({"stride": (3, 3)}, False),
        ({"dilation": (2, 1)}, False),
        ({"batch": 0}, False),
        ({"padding": (13, 6)}, False),
        ({"kernel": (400, 400), "padding": (200, 200)}, True),  # 47 x 47 taps meet the image
        ({"kernel": (400, 400), "padding": (200, 200), "size": (300, 300)}, False),  # they do not fit shared memory
        ({"size": (24, 2**25)}, False),
    ):
        nothing_fits = "batch" in change or "size" in change or max(change.get("kernel", (0, 0))) == 400
        expected = "toeplitz_large" if serves else "generic" if nothing_fits else "windows_nchw"
        assert plan_of(name, case._replace(**change), dtype) == expected, change
    assert plan_of(name, case, torch.float32) == "large_float32"
    assert plan_of(name, case, torch.float64) == "windows_nchw"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hankel_grad_weight_claims(dtype: torch.dtype) -> None:
    """Any kernel at stride 1, in 16 bits; rows without gaps, which may lie anywhere."""
    plan, case = "hankel_grad_weight", Case(4, 8, (56, 57), (31, 31), padding=(15, 15))
    for kernel in ((31, 31), (8, 8), (51, 5), (5, 51), (63, 63), (2, 8), (9, 1), (7, 6), (1, 2)):
        large = case._replace(kernel=kernel, padding=(kernel[0] // 2, kernel[1] - 1), multiplier=2)
        assert plan in plans_of("grad_weight", large, dtype), kernel
    for change in (
        {"padding": (31, 15)},
        {"padding": (15, 31)},
        {"stride": (2, 2)},
        {"stride": (1, 2)},
        {"dilation": (1, 2), "padding": (15, 30)},
    ):
        assert plan_of("grad_weight", case._replace(**change), dtype) in ("columns_grad_weight", "phases"), change
    assert plan_of("grad_weight", case) == "large_float32_grad_weight"
    assert plan_of("grad_weight", case, torch.float64) == "columns_grad_weight"
    plain = meta((4, 8, 56, 57), dtype)
    for odd, claimed in (
        (lay(plain, offset=3), True),
        (lay(plain, (1, 0, 2, 3), steps=(2, 1, 3, 1)), True),
        (lay(plain, expanded=(0, 2)), True),
        (meta((4, 20, 60, 64), dtype)[:, 5:13, 2:58, 3:60], True),
        (lay(plain, steps=(1, 1, 1, 2)), False),
        (plain.mT.contiguous().mT, False),
        (lay(plain, (0, 2, 3, 1)), True),
        (meta((4, 20, 56, 60), dtype, torch.channels_last)[:, 5:13, :, :57], True),
        (lay(plain, (0, 2, 3, 1), steps=(1, 2, 1, 1)), False),
    ):
        assert (plan in claims("grad_weight", case, odd, plain)) == claimed, odd.stride()
        assert (plan in claims("grad_weight", case, plain, odd)) == claimed, odd.stride()
    far = Case(2**26, 8, (56, 57), (31, 31), padding=(15, 15))
    assert plan_of("grad_weight", far, dtype) == "generic"


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outer_grad_weight_claims(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Few columns, or few rows of the kernel; of so many images that a multiplication has some of them."""
    case = Case(64, 32, (14, 14), (27, 27), padding=(13, 13))
    for change, plan in (
        ({}, "outer_grad_weight"),
        ({"size": (16, 7), "multiplier": 2}, "outer_grad_weight"),
        ({"batch": 8}, "outer_grad_weight"),
        ({"batch": 7}, "hankel_grad_weight"),
        ({"size": (17, 14)}, "outer_grad_weight"),
        ({"size": (17, 14), "batch": 8}, "hankel_grad_weight"),
        ({"padding": (14, 15)}, "outer_grad_weight"),  # a gradient of 16 x 18
        ({"size": (28, 28), "kernel": (29, 29), "padding": (14, 14), "batch": 12}, "outer_grad_weight"),
        ({"size": (28, 28), "kernel": (29, 29), "padding": (14, 14), "batch": 20}, "hankel_grad_weight"),
        ({"size": (33, 28), "kernel": (33, 29), "padding": (16, 14)}, "hankel_grad_weight"),  # 33 rows of the kernel
        ({"size": (32, 32), "kernel": (32, 3), "padding": (16, 1)}, "outer_grad_weight"),
        ({"size": (33, 33), "kernel": (31, 31), "padding": (15, 15)}, "hankel_grad_weight"),
        ({"size": (56, 56), "kernel": (5, 51), "padding": (2, 25)}, "outer_grad_weight"),
        ({"size": (200, 56), "kernel": (5, 51), "padding": (2, 25)}, "outer_grad_weight"),
        ({"size": (56, 57), "kernel": (5, 51), "padding": (2, 25)}, "hankel_grad_weight"),
        ({"size": (56, 56), "kernel": (11, 51), "padding": (5, 25)}, "hankel_grad_weight"),
    ):
        found = plans_of("grad_weight", case._replace(**change), dtype, memory_format)
        assert next(name for name in found if name != "columns_grad_weight") == plan, change
        assert plan_of("grad_weight", case._replace(**change), dtype, memory_format) == plan, change
    few = "columns_grad_weight" if memory_format == torch.contiguous_format else WALK
    assert plan_of("grad_weight", Case(7, 8, (14, 14), (7, 6), padding=(3, 3)), dtype, memory_format) == few
    # Rows and columns are exchanged, by the copies or by the kernel.
    for size, plan in (((56, 56), "outer_grad_weight"), ((57, 56), "hankel_grad_weight")):
        tall = case._replace(size=size, kernel=(51, 5), padding=(25, 2))
        assert plan_of("grad_weight", tall, dtype, memory_format) == plan, size


DIRECT = {"forward": "direct", "grad_input": "direct", "grad_weight": "direct_grad_weight"}


def goes_direct(name: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether this pass of a small kernel, not grad_weight, can: in float64 registers hold 25 weights."""
    few = math.prod(case.kernel) <= 25 and (name == "forward" or case.stride == (1, 1))
    return dtype != torch.float64 or few


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_little_to_do(name: str, tile: tuple, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for batch, channels, size in ((1, 960, (7, 7)), (1, 16, (8, 8)), (2, 3, (5, 6)), (1, 1, (2, 1))):
        case = tile_case(tile, batch, channels, size)
        assert plan_of(name, case, dtype, memory_format) == serves(name, DIRECT[name], case), str(case)
    assert plan_of(name, tile_case(tile, 64, 960, (14, 14)), dtype, memory_format) != DIRECT[name]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_gather_claims(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Any kernel with little to do, unless it is a small one that goes direct in vectors or strips."""
    case = Case(2, 8, (20, 21), (3, 5), padding=(1, 2))
    for change in (
        {},
        {"stride": (3, 1)},
        {"dilation": (2, 3)},
        {"padding": (7, 40)},
        {"multiplier": 3},
        {"kernel": (1, 17), "padding": (0, 8)},
        {"kernel": (9, 9)},
        {"kernel": (2, 2), "stride": (2, 2)},
        {"size": (5, 300)},
    ):
        many_taps = change.get("kernel") == (9, 9)  # which take float64 too long
        found = plans_of(name, case._replace(**change), dtype, memory_format)[0]
        assert (found == GATHER[name]) != (many_taps and dtype == torch.float64 and name != "grad_weight"), change
    for change in ({"batch": 4096}, {"batch": 256, "kernel": (9, 9), "padding": (4, 4)}, {"batch": 0}):
        assert GATHER[name] not in plans_of(name, case._replace(**change), dtype, memory_format), change
    wide = case._replace(stride=(9, 1))
    assert (GATHER[name] in plans_of(name, wide, dtype, memory_format)) == (name != "grad_input")
    small = case._replace(kernel=(3, 3), padding=(1, 1))
    last = memory_format == torch.channels_last
    vectors = dtype != torch.float64 and last
    for change, direct in (
        ({}, vectors),
        ({"channels": 7}, False),
        ({"size": (20, 20), "channels": 7}, dtype != torch.float64 and not last),
        ({"stride": (2, 2)}, False),
    ):
        direct |= dtype != torch.float64 and name == "grad_weight" and not (last and change == {"stride": (2, 2)})
        found = plans_of(name, small._replace(**change), dtype, memory_format)[0]
        assert found == (DIRECT if direct else GATHER)[name], change


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_few_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Of 3x3, blocks of a cluster share a filter's gradients; of other kernels there are as many as a block sums."""
    one = Case(1, 32, (112, 112), (3, 3), padding=(1, 1))
    for case, expected in (
        (one, True),
        (one._replace(batch=2), False),
        (one._replace(batch=8, channels=64, size=(28, 28)), True),
        (one._replace(kernel=(5, 5), padding=(2, 2)), False),
        (one._replace(stride=(2, 2)), False),
        (one._replace(dilation=(2, 2), padding=(2, 2)), False),
    ):
        assert (plan_of("grad_weight", case, dtype, memory_format) == "direct_grad_weight") == expected, str(case)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_what_does_not_stream(name: str, dtype: torch.dtype) -> None:
    """Too few columns, too much padding, sums over filters whose planes are too large, views with gaps."""
    few = (20, 5) if name == "forward" else (20, 4)
    assert plan_of(name, Case(256, 64, few, (3, 3), padding=(1, 1)), dtype) == "direct"
    assert plan_of(name, FIRST._replace(padding=(3, 1)), dtype) == "direct"
    whole = meta((16, 64, 512, 512), dtype)
    for gaps in (meta((16, 64, 512, 514), dtype)[..., 1:-1], meta((16, 64, 512, 1024), dtype)[..., ::2], whole.mT):
        assert claims(name, FIRST, gaps, whole)[0] == "direct"
        assert claims(name, FIRST, whole, gaps)[0] == "direct"


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_toeplitz_channels_last_claims(name: str, dtype: torch.dtype) -> None:
    """Channels have to lie side by side; rows, pixels and images may lie apart, by multiples of 16 bytes."""
    case, order = Case(4, 8, (20, 30), (5, 7), padding=(2, 3)), (0, 2, 3, 1)
    plain = meta((4, 8, 20, 30), dtype, torch.channels_last)
    for odd, claimed in (
        (lay(plain, order, offset=3), True),
        (lay(plain, order, steps=(2, 1, 3, 2)), True),
        (lay(plain, order, expanded=(0, 2)), True),
        (lay(plain, (2, 3, 0, 1)), True),
        (meta((4, 24, 20, 30), dtype, torch.channels_last)[:, 5:13], True),
        (meta((4, 20, 20, 30), dtype, torch.channels_last)[:, 5:13], False),
        (lay(plain, order, steps=(1, 2, 1, 1)), False),
        (lay(plain, order, expanded=(1,)), False),
        (plain.contiguous(), False),
    ):
        assert (BAND in claims(name, case, odd, plain)) == claimed, odd.stride()
        assert (BAND in claims(name, case, plain, odd)) == claimed, odd.stride()

    def claimed(case: Case, dtype: torch.dtype = dtype) -> bool:
        input = meta((case.batch, case.channels, *case.size), dtype, torch.channels_last)
        return BAND in claims(name, case, input, meta(output_size(case), dtype, torch.channels_last))

    for kernel in (
        *((5, 5), (7, 7), (9, 9), (8, 3), (7, 9), (2, 2), (1, 9), (6, 1)),
        *((10, 7), (7, 10), (13, 17), (17, 13), (13, 1), (1, 18)),  # tall, or so with rows and columns exchanged
        *((5, 40), (40, 5), (2, 57), (57, 3)),  # wide
    ):
        assert claimed(case._replace(kernel=kernel, padding=tuple(k - 1 for k in kernel))), kernel
    at_two = case._replace(kernel=(7, 7), stride=(2, 2), padding=(3, 6), multiplier=2)
    assert claimed(at_two)
    others = {"multiplier": 1}, {"multiplier": 3}, {"stride": (2, 1)}, {"kernel": (5, 7)}, {"padding": (7, 3)}
    for change in (*others, {"channels": 12}):
        assert not claimed(at_two._replace(**change)), change
    for size, kernel in (((14, 16), (27, 27)), ((7, 7), (40, 20)), ((16, 14), (15, 63))):  # planes that are small
        assert claimed(case._replace(size=size, kernel=kernel, padding=tuple(k // 2 for k in kernel))), kernel
    for change in (
        {"kernel": (14, 14)},
        {"kernel": (6, 20)},
        {"kernel": (1, 11)},  # of a size that CUDA cores have
        {"kernel": (5, 58), "padding": (2, 29), "size": (60, 200)},
        {"kernel": (27, 27), "padding": (13, 13)},
        {"kernel": (3, 3)},  # bound by bytes without tensor cores, too
        {"kernel": (1, 1), "padding": (0, 0)},
        {"stride": (2, 2)},
        {"dilation": (2, 2)},
        {"padding": (5, 3)},
        {"padding": (2, 7)},
        {"multiplier": 2},
        {"channels": 12},
        {"batch": 0},
        {"batch": 2**24},
    ):
        assert not claimed(case._replace(**change)), change
    assert not claimed(case, torch.float32) and not claimed(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_weight_in_channels_last_on_tensor_cores(dtype: torch.dtype) -> None:
    case = Case(16, 64, (40, 40), (5, 5), padding=(2, 2))

    def serves(case: Case, channels_last: bool = True) -> bool:
        return plan_of("grad_weight", case, dtype, FORMATS[channels_last]) == MATRIX

    for kernel in ((7, 7), (7, 9), (9, 9), (4, 1), (6, 3), (3, 5), (2, 3), (1, 7), (3, 2)):
        small = case._replace(kernel=kernel, padding=tuple(side // 2 for side in kernel))
        assert serves(small) and not serves(small, False), kernel
    # 3x3 on rows of up to 16 columns, if 16 bytes can be loaded at a time; 5x5 if they can.
    for width, channels, expected in ((16, 64, True), (17, 64, False), (16, 68, False)):
        assert serves(case._replace(size=(40, width), kernel=(3, 3), padding=(1, 1), channels=channels)) == expected
    for kernel, expected in (((5, 5), False), ((7, 7), True), ((4, 5), True), ((8, 5), False)):
        padding = tuple(side // 2 for side in kernel)
        assert serves(case._replace(kernel=kernel, padding=padding, channels=68)) == expected
    for change in (
        {"kernel": (10, 5)},
        {"kernel": (5, 10)},
        {"stride": (2, 2)},
        {"dilation": (1, 2)},
        {"multiplier": 2},
        {"channels": 31},
        {"padding": (5, 2)},
        {"batch": 2**24},
    ):
        assert not serves(case._replace(**change)), change
    assert plan_of("grad_weight", case, torch.float32, torch.channels_last) == MARCH["grad_weight"]


@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_one_tap_on_rows_of_units(dtype: torch.dtype) -> None:
    """In 16 bits, from 48 to 64 columns, tensor cores sum over the images."""
    case = Case(128, 96, (56, 56), (1, 1))
    for width in (40, 48, 52, 64, 72):
        multiplies = dtype != torch.float32 and width in (48, 64)
        plan = "batch_grad_weight_nchw" if multiplies else STREAM["grad_weight"]
        assert plan_of("grad_weight", case._replace(size=(56, width)), dtype) == plan, width
    for change in ({"batch": 12}, {"multiplier": 2}):
        assert plan_of("grad_weight", case._replace(**change), dtype) == STREAM["grad_weight"], change


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_one_tap(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Arrays without gaps that lie alike, as many outputs as inputs; or gradients that lie anywhere, at a stride."""
    case, size = Case(16, 64, (56, 57), (1, 1), dilation=(2, 3)), (16, 64, 56, 57)
    plain = meta(size, dtype, memory_format)

    def scales(case: Case, input: Tensor = plain, output: Tensor | None = None) -> bool:
        output = meta(output_size(case), dtype, memory_format) if output is None else output
        return "scale" in claims(name, case, input, output)

    assert scales(case) == (name != "grad_weight")
    for change in ({"multiplier": 2}, {"padding": (0, 1)}, {"kernel": (1, 2)}):
        assert not scales(case._replace(**change)), change
    other = torch.channels_last if memory_format == torch.contiguous_format else torch.contiguous_format
    for odd in (meta(size, dtype, other), lay(plain, steps=(1, 1, 1, 2)), meta((16, 65, 56, 57), dtype)[:, 1:]):
        assert not scales(case, odd) and not scales(case, plain, odd), odd.stride()
        apart, backward = case._replace(stride=(2, 1)), name == "grad_input"
        assert scales(apart, plain, odd[:, :, ::2]) == backward, odd.stride()
        has_gaps = not any(odd.is_contiguous(memory_format=format) for format in FORMATS)
        assert scales(apart, odd) == (backward and not has_gaps), odd.stride()
    many = Case(2**15, 2**5, (2**5, 2**6), (1, 1))
    assert not scales(many, meta((2**15, 2**5, 2**5, 2**6), dtype, memory_format))


@pytest.mark.parametrize("name", PASSES)
def test_what_can_march(name: str) -> None:
    """Channels have to lie side by side in both arrays; rows, pixels and images may lie apart."""
    case, order = Case(4, 8, (6, 8), (3, 3), padding=(1, 1)), (0, 2, 3, 1)
    plain = meta((4, 8, 6, 8), torch.float32, torch.channels_last)
    for odd, marches in (
        (lay(plain, order, offset=3), True),
        (lay(plain, order, steps=(2, 1, 3, 2)), True),
        (lay(plain, order, expanded=(0, 2)), True),
        (lay(plain, (2, 3, 0, 1)), True),
        (meta((4, 20, 6, 8), torch.float32, torch.channels_last)[:, 5:13], True),
        (lay(plain, order, steps=(1, 2, 1, 1)), False),
        (lay(plain, order, expanded=(1,)), False),
        (plain.contiguous(), False),
    ):
        assert (MARCH[name] in claims(name, case, odd, plain)) == marches, odd.stride()
        assert (MARCH[name] in claims(name, case, plain, odd)) == marches, odd.stride()

    def marches(case: Case, dtype: torch.dtype = torch.float32) -> bool:
        input = meta((case.batch, case.channels, *case.size), dtype, torch.channels_last)
        return MARCH[name] in claims(name, case, input, meta(output_size(case), dtype, torch.channels_last))

    most = {"forward": 8, "grad_input": 2, "grad_weight": 2}[name]
    assert marches(case._replace(multiplier=most)) and not marches(case._replace(multiplier=most + 1))
    for change in (
        {"kernel": (3, 5)},
        {"stride": (1, 2)},
        {"stride": (3, 3)},
        {"dilation": (2, 1)},
        {"padding": (3, 1)},
    ):
        assert not marches(case._replace(**change)), change
    assert not marches(case, torch.float64)
    # Rows of all images, and the bytes of one, are counted in 32 bits.
    for far in (Case(2**20, 8, (200, 8), (3, 3)), Case(1, 8, (8, 2**25), (3, 3)), Case(1, 2**24, (8, 8), (3, 3))):
        assert not marches(far), str(far)


def test_nine_by_nine() -> None:
    """In float32 warps march down its planes, and in 16 bits its output and its input's gradient have tensor cores.

    Many planes that lanes.cu, lanes_channels_last.cu or lanes_grad_weight.cu are compiled for go there.
    """
    case = Case(64, 192, (28, 28), (9, 9), padding=(4, 4))
    for name, dtype, memory_format in product(PASSES[:2], FAST, FORMATS):
        last = memory_format == torch.channels_last
        if dtype == torch.float32:
            expected = "large_float32"
        else:
            expected = BAND if last else "toeplitz_nchw"
        assert plan_of(name, case, dtype, memory_format) == expected
    for change in ({"size": (56, 56)}, {"size": (36, 24)}):
        assert plan_of("forward", case._replace(**change)) == "march_nchw", change
    for name, change in product(PASSES[:2], ({"batch": 8}, {"size": (28, 24)}, {"channels": 190}, {"padding": (5, 5)})):
        assert plan_of(name, case._replace(**change), memory_format=FORMATS[1]) == "march_channels_last", change
    assert plan_of("grad_weight", case) == "large_float32_grad_weight"
    for change in ({"size": (56, 56)}, {"size": (36, 24)}, {"size": (300, 28)}):
        march = "march_grad_weight_nchw"
        assert plan_of("grad_weight", case._replace(**change)) == march, change
    assert plan_of("forward", case._replace(batch=2)) == "large_float32"
    assert plan_of("grad_weight", case._replace(size=(14, 14))) == "large_float32_grad_weight"
    assert plan_of("grad_input", case._replace(multiplier=2), memory_format=torch.channels_last) == WINDOWS


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(9, 9), (7, 30), (31, 8), (28, 28)], ids=str)
@pytest.mark.parametrize("padding", [(4, 4), (0, 1), (8, 8)], ids=str)
def test_nine_by_nine_is_exact(size: tuple[int, int], padding: tuple[int, int]) -> None:
    for channels, multiplier in ((5, 1), (64, 1), (3, 2)):
        case = Case(3, channels, size, (9, 9), padding=padding, multiplier=multiplier)
        if size[0] + 2 * padding[0] < 9 or size[1] + 2 * padding[1] < 9:
            continue
        tensors = make_inputs(case, torch.float32, "cuda", torch.channels_last, make=integers)
        grad_output = integers(*output_size(case)).cuda().contiguous(memory_format=torch.channels_last)
        exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
        for field, plan, result in results_of_plans(case, tensors, grad_output, channels_last=True):
            assert not wrong_numbers(result, exact[field].round()), (field, plan)


def test_multipliers() -> None:
    case = Case(16, 64, (56, 56), (3, 3), padding=(1, 1), multiplier=3)
    assert [plan_of(name, case) for name in PASSES] == [*STREAM.values()]
    # A gradient that is summed over filters takes whole planes at a time: here they are too large.
    large = FIRST._replace(multiplier=3)
    assert [plan_of(name, large) for name in PASSES] == ["stream_nchw", "direct", "stream_grad_weight_nchw"]


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


@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_windows_claims(dtype: torch.dtype) -> None:
    """Any kernel in channels_last that nothing else takes, unless generic has less to do."""
    last = torch.channels_last
    for case in (
        Case(2, 30, (40, 36), (3, 5), (3, 2), dilation=(2, 3)),
        Case(48, 215, (309, 8), (1, 3), (3, 3)),
        Case(9, 20, (30, 30), (21, 23), (3, 3), (10, 11), multiplier=3),
    ):
        for name in PASSES:
            assert (plan_of(name, case, dtype, last) == WINDOWS) == (name != "grad_weight"), (name, str(case))
    few_taps = Case(48, 215, (309, 8), (1, 2), (3, 3))
    assert plan_of("forward", few_taps, dtype, last) == "generic"
    assert plan_of("grad_input", few_taps, dtype, last) == WINDOWS
    assert plan_of("forward", Case(32, 1, (200, 178), (4, 7), (1, 2)), dtype, last) == "windows_nchw"
    assert plan_of("forward", Case(84, 90, (20, 20), (23, 23), padding=(11, 11)), torch.float64, last) == "generic"


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


def test_what_walks() -> None:
    """Channels have to lie side by side in both arrays; rows, pixels and images may lie anywhere."""
    case, order = Case(4, 8, (9, 8), (3, 2), (3, 1), (1, 5), (1, 2)), (0, 2, 3, 1)
    input, output = meta((4, 8, 9, 8), torch.float64), meta(output_size(case), torch.float64)
    for steps, offset, expanded, walks in (
        ((1, 1, 1, 1), 0, (), True),
        ((1, 1, 1, 1), 3, (), True),
        ((2, 1, 3, 2), 0, (), True),
        ((1, 1, 1, 1), 0, (0, 2), True),
        ((1, 2, 1, 1), 0, (), False),
        ((1, 1, 1, 1), 0, (1,), False),
    ):
        odd = lay(input, order, steps, offset, expanded), lay(output, order, steps, offset, expanded)
        for pair in ((odd[0], lay(output, order)), (lay(input, order), odd[1])):
            assert (WALK in claims("grad_weight", case, *pair)) == walks, (steps, expanded)
    assert WALK not in claims("grad_weight", case, input, lay(output, order))
    # Where others would serve, too: if there is little to do.
    for little, dtype, walks in (
        (Case(4, 24, (27, 27), (7, 7), (2, 2), (3, 3)), torch.float32, True),
        (Case(40, 24, (27, 27), (7, 7), (2, 2), (3, 3)), torch.float32, False),
        (Case(4, 768, (24, 24), (5, 5), (2, 2), (2, 2)), torch.float32, False),
        (Case(82, 24, (28, 28), (3, 3), (2, 2), (1, 1)), torch.float16, True),
        (Case(82, 40, (28, 28), (3, 3), (2, 2), (1, 1)), torch.float16, False),
        (Case(60, 96, (6, 6), (1, 1)), torch.float16, True),
        (Case(8, 112, (9, 9), (4, 2)), torch.float16, True),
        (Case(80, 112, (9, 9), (4, 2)), torch.float16, False),
        (Case(4, 16, (25, 89), (5, 5), padding=(1, 0), multiplier=3), torch.float16, True),
        (Case(2, 16, (90, 90), (25, 25)), torch.float16, False),
        (Case(8, 12, (8, 160), (4, 4)), torch.float32, True),
    ):
        claimed = plan_of("grad_weight", little, dtype, torch.channels_last)
        assert (claimed == WALK) == walks, (str(little), claimed)
    for change, walks in (
        ({"multiplier": 5}, True),
        ({"channels": 1, "multiplier": 5}, True),
        ({"channels": 1}, False),
        ({"batch": 0}, False),
        ({"batch": 2**22}, False),  # pixels, kernels and strides beyond what 32 bits count
        ({"size": (2**16, 2**15)}, False),
        ({"channels": 2**21, "kernel": (6, 6), "padding": (5, 5)}, False),
        ({"padding": (2**20, 5)}, False),
        ({"stride": (3, 2**20)}, False),
    ):
        assert (plan_of("grad_weight", case._replace(**change), torch.float64, FORMATS[1]) == WALK) == walks, change


@pytest.mark.parametrize("name", PASSES)
def test_small_kernels_without_a_plan_of_their_own(name: str) -> None:
    """They take those of large kernels where these pay: not in channels_last if there is little to multiply."""
    case = Case(16, 64, (56, 56), (3, 5), padding=(1, 2))
    backward = name == "grad_weight"
    for kernel, dtype, memory_format, expected in (
        ((4, 6), torch.float32, FORMATS[0], ("large_float32", "large_float32_grad_weight")),
        ((2, 3), torch.float32, FORMATS[0], ("windows_nchw", "large_float32_grad_weight")),
        ((3, 5), torch.float32, FORMATS[1], (WINDOWS, WALK)),
        ((2, 3), torch.float32, FORMATS[1], (WINDOWS, WALK)),
        ((3, 5), torch.float16, FORMATS[0], ("toeplitz_nchw", "batch_grad_weight_nchw")),
        ((8, 5), torch.float16, FORMATS[0], ("toeplitz_large", "batch_grad_weight_nchw")),
        ((10, 5), torch.float16, FORMATS[0], ("toeplitz_large", "hankel_grad_weight")),
        ((3, 5), torch.float16, FORMATS[1], (BAND, MATRIX)),
        ((2, 3), torch.float16, FORMATS[1], (BAND, MATRIX)),
    ):
        found = plan_of(name, case._replace(kernel=kernel), dtype, memory_format)
        assert found == expected[backward], (kernel, dtype, memory_format)


@pytest.mark.parametrize("name", PASSES)
def test_what_can_stream(name: str) -> None:
    """Planes have to follow each other; images may lie apart by a multiple of 16 bytes."""
    case = Case(4, 8, (6, 8), (3, 3), padding=(1, 1))
    plain = meta((4, 8, 6, 8), torch.float32)
    for odd, streams in (
        (lay(plain, offset=3), True),
        (lay(plain, steps=(2, 1, 1, 1)), True),
        (meta((4, 20, 6, 8), torch.float32)[:, 5:13], True),
        (meta((4, 8, 12, 8), torch.float32)[:, :, :6], False),
        (meta((4, 8, 6, 9), torch.float32)[..., :8], False),
        (lay(plain, (1, 0, 2, 3)), False),
        (lay(plain, expanded=(0,)), False),
        (lay(plain, (0, 2, 3, 1)), False),
    ):
        assert (STREAM[name] in claims(name, case, odd, plain)) == streams, odd.stride()
        assert (STREAM[name] in claims(name, case, plain, odd)) == streams, odd.stride()
    # Images of 7 x 7 floats, 8 channels: a multiple of 16 bytes; 9 channels: not.
    for channels, streams in ((8, True), (9, False)):
        case = Case(4, channels, (7, 7), (3, 3), padding=(1, 1))
        apart = meta((4, channels + 4, 7, 7), torch.float32)[:, :channels]
        plain = meta((4, channels, 7, 7), torch.float32)
        assert (STREAM[name] in claims(name, case, apart, plain)) == streams


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
    far = meta((2, 2**20, 8, 8), torch.float32)[:, :: 2**19]
    assert (
        claims(name, Case(2, 2, (8, 8), (3, 3), padding=(1, 1)), far, meta((2, 2, 8, 8), torch.float32))[0] == "direct"
    )
    far = meta((2, 2**24, 8, 8), torch.float32)[:, :: 2**23]
    case = Case(2, 2, (8, 8), (3, 3), padding=(1, 1))
    assert claims(name, case, far, meta((2, 2, 8, 8), torch.float32))[0] == "large_float32"


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
        for plan in claims(
            name,
            case,
            meta((case.batch, case.channels, *case.size), dtype, memory_format),
            meta(output_size(case), dtype, memory_format),
            allow_fft=True,
        )
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


# ---------------------------------------------------------------------------- explain


def test_explain_says_what_each_pass_takes() -> None:
    explanation = dwconv.explain(meta((16, 64, 512, 512), torch.float32), meta((64, 1, 3, 3), torch.float32), padding=1)
    assert [getattr(explanation, name).plan for name in PASSES] == [*STREAM.values()]
    lines = str(explanation).splitlines()
    assert len(lines) == len(PASSES)
    for name, line in zip(PASSES, lines):
        choice = getattr(explanation, name)
        assert line.startswith(name) and choice.plan in line and choice.reason in line


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"padding": "same"}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2}], ids=str
)
def test_explain_agrees_with_the_table(arguments: dict, memory_format: torch.memory_format) -> None:
    def pair(name: str, default: int) -> tuple[int, int]:
        value = arguments.get(name, default)
        return (1, 1) if value == "same" else value if isinstance(value, tuple) else (value, value)

    case = Case(2, 4, (12, 10), (3, 3), pair("stride", 1), pair("padding", 0), pair("dilation", 1))
    input, weight = meta((2, 4, 12, 10), torch.float16, memory_format), meta((4, 1, 3, 3), torch.float16)
    explanation = dwconv.explain(input, weight, **arguments)
    for name in PASSES:
        assert getattr(explanation, name).plan == plans_of(name, case, torch.float16, memory_format)[0]


def test_explain_of_one_image() -> None:
    weight = meta((4, 1, 3, 3), torch.float32)
    assert dwconv.explain(meta((4, 9, 9), torch.float32), weight).forward.plan == "gather"


def test_explain_on_cpu_says_aten() -> None:
    explanation = dwconv.explain(torch.empty(2, 4, 8, 8), torch.empty(4, 1, 3, 3))
    assert {getattr(explanation, name).plan for name in PASSES} == {"aten"}
    assert len(str(explanation).splitlines()) == len(PASSES)


@pytest.mark.gpu
def test_explain_on_cuda_is_that_of_meta() -> None:
    size, kernel = (2, 4, 8, 8), (4, 1, 3, 3)
    for memory_format in FORMATS:
        input = torch.empty(size, device="cuda").to(memory_format=memory_format)
        expected = dwconv.explain(meta(size, torch.float32, memory_format), meta(kernel, torch.float32))
        assert dwconv.explain(input, torch.empty(kernel, device="cuda")) == expected


def test_explain_computes_and_changes_nothing() -> None:
    input, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    before = input.clone(), weight.detach().clone()
    dwconv.explain(input, weight)
    assert torch.equal(input, before[0]) and torch.equal(weight, before[1]) and weight.grad is None


@pytest.mark.parametrize(
    ("size", "kernel", "arguments", "error"),
    [
        ((8, 8), (4, 1, 3, 3), {}, RuntimeError),
        ((2, 4, 8, 8), (5, 1, 3, 3), {}, RuntimeError),
        ((2, 4, 8, 8), (4, 2, 3, 3), {}, RuntimeError),
        ((2, 4, 2, 8), (4, 1, 3, 3), {}, RuntimeError),
        ((2, 4, 0, 8), (4, 1, 3, 3), {"padding": 2}, RuntimeError),
        ((2, 4, 8, 0), (4, 1, 3, 3), {"padding": 2}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"stride": 0}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"padding": -1}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"padding": "full"}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"padding": "same", "stride": 2}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"dilation": (1, 2, 3)}, RuntimeError),
        ((2, 4, 8, 8), (4, 1, 3, 3), {"stride": 1.5}, TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_explain_refuses_what_conv2d_refuses(
    where: str, size: tuple, kernel: tuple, arguments: dict, error: type[Exception]
) -> None:
    input, weight = torch.empty(size, device=where), torch.empty(kernel, device=where)
    with pytest.raises(error):
        dwconv.explain(input, weight, **arguments)
    with pytest.raises(error):
        dwconv.conv2d(input, weight, **arguments)


# ---------------------------------------------------------------------------- plans forced by name


def calls(case: Case, dtype: torch.dtype, memory_format=torch.contiguous_format) -> dict[str, Callable[[str], object]]:
    """For each pass, a call that takes a plan by name."""
    input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, make=integers)
    grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
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
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
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
    input = meta((case.batch, case.channels, *case.size), dtype, memory_format)
    output = meta(output_size(case), dtype, memory_format)
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
            if plan in claims(name, case, input, output):
                call(plan)
            else:
                with pytest.raises(RuntimeError, match=f"plan '{plan}' does not serve this problem"):
                    call(plan)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_one_tap_is_exact(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Units within a plane and across planes, images and the end of the arrays, at any address."""
    for number, size in enumerate([(1, 1), (1, 7), (3, 5), (7, 7), (16, 16), (31, 57), (64, 65)]):
        for channels in (1, 2, 3, 8, 24, 37, 100) + (8200,) * (size == (1, 7)):
            case = Case(1 + number % 3 * 2, channels, size, (1, 1), bias=channels % 2 == 0)
            input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
            order = (0, 1, 2, 3) if memory_format == torch.contiguous_format else (0, 2, 3, 1)
            if channels > 1 and channels != 8:
                input, weight = lay(input, order, offset=number), lay(weight, steps=(1 + number % 2, 1, 1, 1), offset=1)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            last = memory_format == torch.channels_last
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, last):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            assert {("output", "scale"), ("grad_input", "scale")} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_one_tap_at_a_stride_is_exact(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Gradients with zeros between, in units and not, wherever they lie; a weight that is not finite meets no zero."""
    last = memory_format == torch.channels_last
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    strides = [(2, 2), (3, 1), (1, 2), (4, 3), (50, 7)]
    for number, (size, channels) in enumerate(
        product([(1, 1), (1, 7), (3, 5), (8, 8), (31, 57), (64, 65)], (1, 2, 3, 8, 24, 37, 100))
    ):
        case = Case(1 + number % 3, channels, size, (1, 1), strides[number % 5], bias=False)
        input, weight, _ = make_inputs(case, dtype, "cuda", memory_format, integers)
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
        weight[0] = torch.inf if channels > 2 else 2
        steps = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2)][number % 3]
        for offset in (0, 1):
            tensors = input, lay(weight, steps=(1 + offset, 1, 1, 1), offset=offset), None
            exact = run_float64((input, weight, None), grad_output, **case.geometry).grad_input
            args = lay(grad_output, order, steps, offset), tensors[1], input.shape, *arguments_of(case), last, "scale"
            result = torch.ops.dwconv.grad_input.plan(*args)
            found, expected = (t.nan_to_num(nan=12345.0) for t in (result, exact.to(result)))
            assert torch.equal(found, expected), (str(case), steps, offset)


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(1, 41))
def test_direct_on_every_size(width: int) -> None:
    """Every height and width up to 40, with every kernel, far more padding than it needs, and any strides."""
    for height in range(1, 41):
        turn = height + width
        dtype = [*FAST, torch.float64][(height + 2 * width) % 4]
        tile = TILES[(3 * height + width) % len(TILES)]
        padding = (turn % 9, (3 * height + width) % 7)
        case = tile_case(tile, 2, 2, (height, width), padding=padding, multiplier=1 + turn % 3, bias=turn % 2 == 0)
        extent = [d * (k - 1) + 1 for k, d in zip(case.kernel, case.dilation)]
        if any(side + 2 * p < e for side, p, e in zip(case.size, padding, extent)):
            continue
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        layouts: list[Callable[[Tensor], Tensor]] = [
            lambda t: t,
            lambda t: lay(t, offset=1),
            lambda t: lay(t, steps=(1, 1, 2, 1)),
            lambda t: lay(t, steps=(1, 2, 1, 2), offset=2),
            lambda t: lay(t, (0, 2, 3, 1)),
            lambda t: lay(t, (1, 3, 2, 0), (1, 1, 3, 1), 3),
        ]
        layout = layouts[height % len(layouts)]
        tensors, grad_output = (layout(input), lay(weight, (2, 3, 0, 1)), bias), layout(grad_output)
        exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, tensors, grad_output):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), tensors[0].stride())
            forced.add((name, plan))
        assert goes_direct("forward", case, dtype) == (("output", "direct") in forced), str(case)
        assert goes_direct("grad_input", case, dtype) == (("grad_input", "direct") in forced), str(case)
        if dtype != torch.float64 and grad_output[:, 0].numel() <= 64:
            assert ("grad_weight", "direct_grad_weight") in forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (16, 16), (13, 14), (9, 11), (3, 4)], ids=str)
def test_small_planes_at_any_place(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Planes of few columns that begin anywhere within 16 bytes, with gaps between images and not."""
    kernels = [((3, 3), 1), ((5, 5), 1), ((7, 7), 1), ((3, 31), 1), ((3, 23), 1), ((3, 3), 2), ((5, 5), 2)]
    for number, ((kernel, stride), channels) in enumerate(product(kernels, (8, 21, 100))):
        padding = (kernel[0] // 2, kernel[1] // 2)
        case = Case((16, 19, 40)[number % 3], channels, size, kernel, (stride, stride), padding)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        for offset in range(8):
            steps = (1 + (number + offset) % 2, 1, 1, 1)
            tensors = lay(input, steps=steps, offset=offset), weight, bias
            places = lay(grad_output, steps=steps, offset=(3 * offset + number) % 8)
            forced = set()
            for name, plan, result in results_of_plans(case, tensors, places):
                if plan.startswith("toeplitz_small_planes"):
                    assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), steps, offset)
                    forced.add((name, plan))
            assert len(forced) == 4, str(case)


def direct_results(case: Case, tensors: tuple, grad_output: Tensor, last: bool) -> Iterator[tuple[str, Tensor]]:
    """What the direct plans compute, of problems with little to do."""
    input, weight, bias = tensors
    ops, arguments = torch.ops.dwconv, arguments_of(case)
    if "direct" in claims("forward", case, input, grad_output):
        yield "output", ops.forward.plan(input, weight, bias, *arguments, "direct")
    if "direct" in claims("grad_input", case, torch.empty_like(input), grad_output):
        yield "grad_input", ops.grad_input.plan(grad_output, weight, input.shape, *arguments, last, "direct")
    if "direct_grad_weight" in claims("grad_weight", case, input, grad_output):
        args = grad_output, input, case.kernel, *arguments, True, "direct_grad_weight"
        yield from zip(("grad_weight", "grad_bias"), ops.grad_weight.plan(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_direct_in_vectors(side: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Columns or channels in whole vectors and not, any padding, with and without gaps, at addresses of every sort."""
    last = memory_format == torch.channels_last
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    for number, (channels, size) in enumerate(
        product((4, 6, 8, 16, 24, 40), [(7, 7), (5, 8), (8, 12), (14, 14), (9, 16), (13, 24), (16, 40)])
    ):
        padding = (number % side, side // 2 if number % 4 else number % 3)
        case = Case(1 + number % 3, channels, size, (side, side), padding=padding, bias=number % 2 == 0)
        if min(output_size(case)) < 1:
            continue
        input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, integers)
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        steps = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2) if last else (1, 2, 1, 1)][number % 4]
        little = max(math.prod(output_size(case)), input.numel()) * side**2 <= 4 << 20
        for offset, weight_offset in ((0, 0), (0, 1), (1, 1), (4, 2), (8, 3)):
            tensors = lay(input, order, steps, offset), lay(weight, offset=weight_offset), bias
            forced = set()
            for name, result in direct_results(case, tensors, lay(grad_output, order, steps, offset), last):
                if exact[name] is not None:
                    assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case), steps, offset)
                forced.add(name)
            assert {"output", "grad_input"} <= forced or not little, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 6, (40, 40), (5, 5), padding=(2, 2)),
        Case(2, 40, (61, 50), (13, 13), padding=(6, 5)),
        Case(3, 5, (50, 41), (9, 7), (2, 2), (4, 3), multiplier=3),
        Case(3, 33, (40, 41), (3, 11), (1, 2), (5, 9), (3, 2)),
    ],
    ids=str,
)
def test_generic_in_channels_last(case: Case, dtype: torch.dtype) -> None:
    """So many pixels that the weights are laid out anew, whatever their strides."""
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
    for laid in (weight, lay(weight, (2, 3, 0, 1)), lay(weight, steps=(1, 2, 1, 3), offset=1)):
        results = list(results_of_plans(case, (input, laid, bias), grad_output))
        checked = [name for name, plan, _ in results if plan == "generic"]
        assert {"output", "grad_input", "grad_weight", "grad_bias"} <= set(checked), checked
        for name, plan, result in results:
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, laid.stride())


def windows_results(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor | None], grad_output: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Output and gradient of the input by windows_channels_last, which has to claim them."""
    input, weight, bias = tensors
    arguments = arguments_of(case)
    yield "output", torch.ops.dwconv.forward.plan(input, weight, bias, *arguments, WINDOWS)
    args = grad_output, weight, input.shape, *arguments, True, WINDOWS
    yield "grad_input", torch.ops.dwconv.grad_input.plan(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [2, 3, 8, 20, 33, 120])
def test_windows_are_exact(channels: int, dtype: torch.dtype) -> None:
    """Whatever kernel, stride, dilation and padding are, on tensors that lie anyhow but for their channels."""
    draw = random.Random(channels)
    for turn in range(60):
        kernel = draw.choice((1, 2, 3, 4, 5, 9, 30)), draw.choice((1, 2, 3, 5, 6, 23))
        stride, dilation = [(draw.randint(1, most), draw.randint(1, most)) for most in (4, 3)]
        reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
        padding = draw.randint(0, reach[0] + 1), draw.randint(0, reach[1] + 1)
        size = tuple(max(draw.randint(2, 40), r + 1 - 2 * p) for r, p in zip(reach, padding))
        multiplier = draw.choice((1, 1, 2, 3))
        case = Case(draw.randint(1, 3), channels, size, kernel, stride, padding, dilation, multiplier, turn % 2 == 0)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        offset, steps = draw.choice((0, 0, 1, 8)), (1, 1, draw.randint(1, 2), draw.randint(1, 2))
        tensors = (
            lay(input, (0, 2, 3, 1), steps, offset),
            draw.choice((weight, lay(weight, (2, 3, 0, 1)), lay(weight, steps=(1, 2, 1, 3), offset=1))),
            bias,
        )
        grad_output = lay(grad_output, (0, 2, 3, 1), steps, offset)
        for name, result in windows_results(case, tensors, grad_output):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case), offset, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 64, (200, 160), (3, 5), (3, 3), (2, 2)),
        Case(9, 40, (131, 97), (1, 1), (2, 2)),
        Case(16, 48, (70, 60), (11, 13), (2, 2), (5, 6)),
        Case(1, 512, (44, 44), (31, 29), (2, 2), (15, 14)),
        Case(8, 24, (6, 300), (29, 29), (2, 2), (14, 14)),
        Case(3, 33, (61, 50), (27, 23), padding=(13, 11)),
        Case(4, 32, (90, 80), (7, 7), (2, 2), (6, 6), (3, 3), multiplier=2),
        Case(3, 20, (160, 150), (2, 4), (1, 1), (1, 0), (2, 1), multiplier=2),
        Case(2, 30, (64, 64), (13, 14), (4, 4), (6, 6), multiplier=3),
    ],
    ids=str,
)
def test_windows_of_large_problems(case: Case, dtype: torch.dtype) -> None:
    """Vectors, rows, slices, pieces of a kernel, weights laid out anew: of each there is some problem."""
    tensors = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(tensors[0]).contiguous(memory_format=torch.channels_last)
    exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
    for name, result in windows_results(case, tensors, grad_output):
        assert wrong_numbers(result, exact[name].round()) == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_windows_beside_infinities(dtype: torch.dtype) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    for case in (
        Case(2, 8, (12, 13), (5, 4), (1, 1), (4, 3)),
        Case(2, 40, (14, 9), (7, 6), (2, 3), (6, 5), (2, 1)),
        Case(2, 3, (8, 11), (3, 9), (3, 2), (2, 8), (1, 2), multiplier=3),
        Case(2, 16, (8, 11), (13, 3), (1, 1), (12, 2), multiplier=2),
        Case(2, 16, (9, 9), (1, 1), (2, 2), (3, 1)),
    ):
        input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
        for tensor in (input, grad_output):
            tensor[0, 1, 1, 2], tensor[1, 0, -1, -1], tensor[1, 2, 0, 0] = torch.inf, torch.nan, -torch.inf
        weight[0, 0, 0, 0], weight[-1, 0, -1, -1], weight[2, 0, -1, 0] = -torch.inf, torch.nan, torch.inf
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        for name, result in windows_results(case, (input, weight, bias), grad_output):
            assert torch.equal(result.nan_to_num(nan=12345.0), exact[name].to(result).nan_to_num(nan=12345.0)), (
                name,
                str(case),
            )


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_direct_grad_weight_in_clusters(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Filters of 1 to 12544 gradients, in pairs of channels and not; the same bits every time."""
    last = memory_format == torch.channels_last
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    for number, (batch, channels, size) in enumerate(
        [
            (1, 32, (112, 112)),
            (8, 64, (28, 28)),
            (3, 7, (61, 53)),
            (1, 2, (225, 130)),
            (2, 40, (33, 30)),
            (70, 5, (3, 3)),
        ]
    ):
        for padding in ((1, 1), (0, 2)):
            case = Case(batch, channels, size, (3, 3), padding=padding)
            input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for offset in (0, 1):
                args = lay(grad_output, order, offset=offset), lay(input, order, offset=number * offset)
                call = *args, case.kernel, *arguments_of(case), True, "direct_grad_weight"
                first = torch.ops.dwconv.grad_weight.plan(*call)
                for name, result in zip(("grad_weight", "grad_bias"), first):
                    assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case), offset)
                for _ in range(20):
                    assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.dwconv.grad_weight.plan(*call)))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_direct_beside_infinities(tile: tuple, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    for channels, size in ((8, (9, 16)), (16, (7, 7)), (40, (12, 24)), (3, (8, 8))):
        case = tile_case(tile, 2, channels, size)
        input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, integers)
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
        for tensor in (input, grad_output):
            tensor[0, 1, 3, 2], tensor[1, 0, -1, -1], tensor[1, 2, 0, 0] = torch.inf, torch.nan, -torch.inf
        weight[0, 0, 0, 0], weight[-1, 0, -1, -1] = -torch.inf, torch.nan
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        last = memory_format == torch.channels_last
        for name, result in direct_results(case, (input, weight, bias), grad_output, last):
            assert torch.equal(result.nan_to_num(nan=12345.0), exact[name].to(result).nan_to_num(nan=12345.0)), name


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_direct_on_large_views(dtype: torch.dtype, tile: tuple) -> None:
    """Views with gaps, and enough of them that a thread computes several rows."""
    for size, order, steps in (((131, 160), (0, 1, 2, 3), (1, 1, 1, 2)), ((97, 64), (0, 2, 3, 1), (1, 2, 1, 1))):
        case = tile_case(tile, 5, 24, size)
        tensors = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = lay(integers(*output_size(case)).to(tensors[0]), order, steps=steps)
        tensors = lay(tensors[0], order, steps=steps, offset=1), *tensors[1:]
        exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, tensors, grad_output):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), order)
            forced.add((name, plan))
        assert goes_direct("forward", case, dtype) == (("output", "direct") in forced), str(case)
        assert goes_direct("grad_input", case, dtype) == (("grad_input", "direct") in forced), str(case)


def gather_results(case: Case, tensors: tuple, grad_output: Tensor, last: bool) -> Iterator[tuple[str, Tensor]]:
    """What the plans gather compute where they claim to. `last`: whether the input's gradient is in channels_last."""
    input, weight, bias = tensors
    ops, arguments = torch.ops.dwconv, arguments_of(case)
    if "gather" in claims("forward", case, input, ops.forward(input, weight, bias, *arguments)):
        yield "output", ops.forward.plan(input, weight, bias, *arguments, "gather")
    grad_input = ops.grad_input(grad_output, weight, input.shape, *arguments, last)
    if "gather" in claims("grad_input", case, grad_input, grad_output):
        yield "grad_input", ops.grad_input.plan(grad_output, weight, input.shape, *arguments, last, "gather")
    if "gather_grad_weight" in claims("grad_weight", case, input, grad_output):
        args = grad_output, input, case.kernel, *arguments, bias is not None, "gather_grad_weight"
        yield from zip(("grad_weight", "grad_bias"), ops.grad_weight.plan(*args))


def draw_gather_case(draw: random.Random) -> Case | None:
    """Any kernel, stride, padding and dilation, different along both sides; none without outputs."""
    kernel = draw.choice([(1, 1), (3, 3), (draw.randint(1, 4),) * 2, (draw.randint(1, 9), draw.randint(1, 31))])
    side = [draw.choice((1, 1, 1, 2, 2, 3, 4, 5, 8)) for _ in range(2)], [draw.choice((1, 1, 2, 3)) for _ in range(2)]
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, side[1])]
    case = Case(
        draw.randint(1, 9),
        draw.choice((1, 2, 3, 7, 8, 24, 33, 40, 65)),
        (draw.randint(1, 40), draw.randint(1, 40)),
        kernel[:: draw.choice((1, -1))],
        (side[0][0], side[0][1]),
        (draw.randint(0, extent[0]), draw.randint(0, extent[1])),
        (side[1][0], side[1][1]),
        multiplier=draw.choice((1, 1, 2, 3)),
        bias=draw.random() < 0.5,
    )
    reach = [d * (k - 1) + 1 for k, d in zip(case.kernel, case.dilation)]
    if any(size + 2 * p < r for size, p, r in zip(case.size, case.padding, reach)):
        return None
    pixels = max(case.batch * case.filters * math.prod(case.size), math.prod(output_size(case)))
    return case if pixels * math.prod(case.kernel) <= 1 << 20 else None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_gather_is_exact(seed: int, dtype: torch.dtype) -> None:
    """Problems of every sort with little to do, on arrays that lie anyhow; some numbers are not finite."""
    draw, checked = random.Random(seed), Counter()
    for number in range(60):
        case = draw_gather_case(draw)
        if case is None:
            continue
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if number % 4 == 0 and case.channels > 1:  # else F.conv2d multiplies padding, too
            for tensor, value in product((input, weight, grad_output), (torch.inf, torch.nan)):
                tensor.view(-1)[draw.randrange(tensor.numel())] = value
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        last = draw.random() < 0.5
        order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
        steps = [draw.choice((1, 1, 2)) if draw.random() < 0.3 else 1 for _ in range(4)]
        tensors = (
            lay(input, order, steps, draw.randrange(4)),
            lay(weight, draw.choice([(0, 1, 2, 3), (2, 3, 0, 1)]), offset=draw.randrange(3)),
            bias,
        )
        for name, result in gather_results(case, tensors, lay(grad_output, order, steps, draw.randrange(4)), last):
            checked[name] += 1
            if exact[name] is not None:
                found, expected = (t.nan_to_num(nan=12345.0) for t in (result, exact[name].round().to(result)))
                assert torch.equal(found, expected), (name, str(case), last, steps)
    assert min(checked[name] for name in ("output", "grad_input", "grad_weight")) >= 20, checked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_streams_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Planes of every sort: tiny and large, even and odd, whole in shared memory and in bands, at any address."""
    kernel, stride, dilation = tile
    sizes = [
        (7, 7),
        (1, 8),
        (14, 14),
        (13, 29),
        (28, 28),
        (31, 57),
        (56, 56),
        (61, 64),
        (39, 62),
        (113, 95),
        (64, 301),
        (200, 300),
        (24, 903),
    ]
    for number, size in enumerate(sizes):
        for turn in range(4):
            batch, channels = (3, 7) if size[0] * size[1] > 2000 else (5, 40)
            reach = tuple(dilation * (side - 1) for side in kernel)  # the most padding that streams
            case = tile_case(tile, batch, channels, size, multiplier=1 + (number + turn) % 2, bias=turn % 2 == 0)
            if turn > 0 and min(reach) > 0:
                case = case._replace(padding=[case.padding, (0, 0), reach][(number + turn) % 3])
            elif turn > 0:  # a row or a column
                case = case._replace(padding=reach)
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, case.padding, reach)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1:
                input, grad_output = lay(input, offset=1), lay(grad_output, offset=3)
            elif turn == 2:  # images apart
                apart = 8 * 16
                input = torch.nn.functional.pad(input, (0, 0, 0, 0, 0, apart), value=torch.nan)[:, :channels]
                weight = lay(weight, (2, 3, 0, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            if output_size(case)[3] >= 7 and turn != 2:
                assert {("output", "stream_nchw"), ("output", "stream_nchw_portable")} <= forced, str(case)
                assert ("grad_weight", "stream_grad_weight_nchw") in forced, str(case)
                *_, height, width = output_size(case)
                if min(kernel) >= 5 and stride == 1 and dtype != torch.float32 and height * width >= 784:
                    plans = {"toeplitz_grad_weight_nchw", "toeplitz_grad_weight_nchw_portable"}
                    assert {("grad_weight", plan) for plan in plans} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("side", [3, 5])
def test_streams_of_wide_rows_are_exact(side: int, dtype: torch.dtype, finite: bool) -> None:
    """Rows of which few find room in shared memory, of every width within 16 bytes, and at any address."""
    for number, width in enumerate((1915, 1917, 1918, 1919, 1920, 2046)):
        tile = (side, side), 1, 1
        case = tile_case(tile, 1 + number % 2, 2, (23 + number, width), bias=number % 2 == 0)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if number % 3 > 0:
            input, grad_output = lay(input, offset=number), lay(grad_output, offset=2 * number + 1)
        if not finite:
            for tensor in (input, grad_output):
                tensor[0, 0, 0, 0], tensor[-1, 1, -1, -1], tensor[-1, 0, 9, 0] = torch.inf, torch.nan, -torch.inf
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
            if "_nchw" in plan:
                wanted = exact[name].round().to(result).nan_to_num(nan=12345.0)
                assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case), input.stride())
                forced.add(plan)
        sums = "stream_grad_weight_nchw" if dtype == torch.float32 else "toeplitz_grad_weight_nchw"
        assert {"stream_nchw", sums} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [((3, 3), 2, 1), ((5, 5), 2, 1), ((7, 7), 2, 1)], ids=str)
def test_strides_of_every_width_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Of grad_input: last strips that overlap the ones before, and rows that lie at odd places."""
    for number, width in enumerate((13, 14, 15, 16, 27, 28, 29, 41, 55, 110, 111)):
        kernel, stride, dilation = tile
        case = tile_case(tile, 2, 3, (30 + number, width), multiplier=1 + number % 3 // 2)
        if number % 4 == 3:
            case = case._replace(padding=(kernel[0] - 1, 1))
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, offset=number), lay(grad_output, offset=3 * number)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_streams_with_much_to_do(dtype: torch.dtype) -> None:
    """So many chunks that blocks take them from a counter, call after call; whole planes, bands, images apart."""
    for tile, batch, channels, size in (
        (((3, 3), 1, 1), 61, 96, (56, 56)),
        (((3, 3), 1, 1), 16, 8, (513, 510)),
        (((3, 3), 2, 1), 30, 64, (112, 112)),
        (((5, 5), 1, 1), 200, 96, (28, 28)),
        (((3, 3), 1, 1), 61, 300, (28, 30)),
        (((7, 7), 1, 1), 128, 150, (30, 28)),
        (((7, 7), 1, 1), 300, 260, (14, 14)),
        (((7, 7), 1, 1), 900, 320, (7, 7)),
        (((1, 11), 1, 1), 61, 96, (56, 56)),
    ):
        case = tile_case(tile, batch, channels, size)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)
        ops, arguments = torch.ops.dwconv, arguments_of(case)
        apart = lay(input, steps=(2, 1, 1, 1))
        for plan in ("stream_nchw", "stream_nchw_portable", "toeplitz_nchw", "toeplitz_nchw_portable"):
            for tensor in (input, apart, input):
                if plan in claims("forward", case, tensor, grad_output):
                    result = ops.forward.plan(tensor, weight, bias, *arguments, plan)
                    assert wrong_numbers(result, exact.output.round()) == 0, (plan, str(case), tensor.stride())
                else:
                    assert plan.startswith("toeplitz")
            if plan in claims("grad_input", case, input, grad_output):
                result = ops.grad_input.plan(grad_output, weight, input.shape, *arguments, False, plan)
                assert wrong_numbers(result, exact.grad_input.round()) == 0, (plan, str(case))
        sums = 0
        for plan in claims("grad_weight", case, input, grad_output):
            if "_nchw" in plan:
                result = ops.grad_weight.plan(grad_output, input, case.kernel, *arguments, case.bias, plan)[0]
                assert wrong_numbers(result, exact.grad_weight.round()) == 0, (plan, str(case))
                sums += 1
        assert sums >= 2, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_sums_of_many_small_planes_are_exact(side: int, finite: bool) -> None:
    """Blocks that have some filters of all images, the last of them fewer than are added together; at any address."""
    for batch, channels, layout, offsets in (
        (128, 768, {}, (0, 0)),
        (33, 960, {}, (1, 1)),
        (45, 784, {"steps": (2, 1, 1, 1)}, (3, 0)),
        (50, 800, {"steps": (3, 1, 1, 1)}, (2, 1)),
        (95, 768, {}, (0, 3)),
    ):
        case = Case(batch, channels, (7, 7), (side, side), padding=(side // 2, side // 2), bias=batch != 50)
        input, weight, bias = make_inputs(case, torch.float32, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = (lay(t, offset=o, **layout) for t, o in zip((input, grad_output), offsets))
        if not finite:
            for tensor in (input, grad_output):
                tensor[0, 1, 0, 0], tensor[1, 0, -1, -1], tensor[-1, -1, 3, 0] = torch.inf, torch.nan, -torch.inf
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
            if plan.startswith("stream_grad_weight_nchw"):
                wanted = exact[name].round().to(result).nan_to_num(nan=12345.0)
                assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case))
                forced.add(plan)
        assert forced == {"stream_grad_weight_nchw", "stream_grad_weight_nchw_portable"}, str(case)


# Of 7x7 and 9x9 in float32: batch, channels, size; so much of it that warps march, in grad_weight for the sides of the
# kernel that are named.
SIZE_OF_LANES = (28, 28)  # of these, where lanes.cu has 9x9
PLANES = [
    (128, 64, SIZE_OF_LANES, ()),
    (512, 37, (14, 13), ()),
    (1200, 64, (8, 7), ()),
    (600, 40, (14, 15), ()),
    (640, 40, (15, 14), ()),
    (3, 3, (301, 1921), ()),
    (50, 96, (56, 56), (7, 9)),
    (32, 41, (113, 95), (7, 9)),
    (6, 5, (400, 1301), (7, 9)),
    (4, 9, (120, 1796), (7, 9)),
    (40, 16, (60, 236), (7, 9)),
]


@pytest.mark.parametrize(("batch", "channels", "size", "sides"), PLANES, ids=str)
def test_planes_to_march_down(batch: int, channels: int, size: tuple[int, int], sides: tuple[int, ...]) -> None:
    case = Case(batch, channels, size, (7, 7), padding=(3, 3))
    for name in PASSES:
        assert (plan_of(name, case) == MARCH_NCHW[name]) == (name != "grad_weight" or 7 in sides), name
    assert plan_of("forward", case._replace(batch=1, channels=2)) != "march_nchw"
    assert plan_of("forward", case._replace(multiplier=2)) != "march_nchw"
    assert plan_of("forward", case, torch.float16) != "march_nchw"
    nine = case._replace(kernel=(9, 9), padding=(4, 4))
    forward = size != SIZE_OF_LANES
    assert [plan_of(name, nine) == MARCH_NCHW[name] for name in PASSES] == [forward, forward, 9 in sides]


# Of 7x7 at stride 2: batch, channels, filters of each, size.
PLANES_OF_STRIDE_2 = [
    (64, 64, 2, (56, 56)),
    (300, 12, 1, (121, 117)),
    (96, 32, 4, (98, 56)),
    (70, 7, 1, (90, 450)),
]


@pytest.mark.parametrize(("batch", "channels", "multiplier", "size"), PLANES_OF_STRIDE_2, ids=str)
def test_planes_to_march_down_at_stride_2(batch: int, channels: int, multiplier: int, size: tuple[int, int]) -> None:
    case = Case(batch, channels, size, (7, 7), multiplier=multiplier, stride=(2, 2), padding=(3, 3))
    assert plan_of("grad_weight", case) == "march_grad_weight_nchw"
    assert plan_of("forward", case) == "march_nchw"
    assert plan_of("grad_input", case) != "march_nchw"
    assert plan_of("grad_weight", case._replace(batch=1, channels=2)) != "march_grad_weight_nchw"
    assert plan_of("grad_weight", case, torch.float16) != "march_grad_weight_nchw"


@pytest.mark.parametrize("name", PASSES[:2])
def test_planes_whose_bounds_are_known(name: str) -> None:
    """Those of 7 x 7 and 14 x 14 stream, if the kernel lies over the middle."""
    for side in (7, 14):
        case = Case(1024, 256, (side, side), (7, 7), padding=(3, 3))
        assert plan_of(name, case) == "stream_nchw"
        for change in ({"padding": (4, 3)}, {"padding": (4, 4)}, {"size": (side + 1, side)}):
            assert plan_of(name, case._replace(**change)) == "march_nchw", change
        assert plan_of(name, case._replace(kernel=(5, 5), padding=(2, 2))) == "stream_nchw"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "channels", "multiplier", "size", "side", "stride", "plans"),
    [
        (batch, channels, 1, size, side, 1, [*PASSES[:2], *PASSES[2:] * (side in sides)])
        for batch, channels, size, sides in PLANES
        for side in (7, 9)
        if side == 7 or size != SIZE_OF_LANES
    ]
    + [(*planes, 7, 2, ["forward", "grad_weight"]) for planes in PLANES_OF_STRIDE_2],
    ids=str,
)
def test_marches_down_planes_are_exact(
    batch: int, channels: int, multiplier: int, size: tuple[int, int], side: int, stride: int, plans: list[str]
) -> None:
    """Any padding, addresses and images apart; what is not finite stays with the outputs that it reaches."""
    for turn in range(6):
        padding = [(side // 2, side // 2), (0, 0), (side - 1, side - 1)][turn if turn < 3 else 0]
        if min(size) + 2 * min(padding) < 2 * side - 1:
            continue
        case = Case(
            batch,
            channels,
            size,
            (side, side),
            multiplier=multiplier,
            stride=(stride, stride),
            padding=padding,
            bias=turn % 2 == 0,
        )
        input, filters, bias = make_inputs(case, torch.float32, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if turn in (1, 4, 5):
            input, grad_output = lay(input, offset=1), lay(grad_output, offset=3)
        elif turn == 2:
            input = torch.nn.functional.pad(input, (0, 0, 0, 0, 0, 16), value=torch.nan)[:, :channels]
            filters = lay(filters, (2, 3, 0, 1))
        if turn in (3, 5):
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[1, 0, -1, -1] = torch.inf, torch.nan
            filters[0, 0, 0, 0], filters[-1, 0, -1, -1] = -torch.inf, torch.nan
        exact = run_float64((input, filters, bias), grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (input, filters, bias), grad_output):
            if plan.removesuffix("_portable") not in MARCH_NCHW.values():
                continue
            wanted = exact[name].round().to(result)
            assert torch.equal(result.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0)), (name, plan, str(case))
            forced.add((name, plan))
        if turn == 0:
            named = [("output" if name == "forward" else name, MARCH_NCHW[name]) for name in plans]
            assert {(name, plan + end) for name, plan in named for end in ("", "_portable")} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(1, 17))
def test_small_planes_are_exact(width: int) -> None:
    """Planes of few columns and any number of rows, all kernels of up to 7 rows, images apart, at any address."""
    kernels = [((3, 3), 1), ((7, 7), 1), ((5, 5), 1), ((2, 4), 1), ((3, 3), 3), ((6, 9), 1), ((1, 16), 1), ((7, 1), 1)]
    for number, height in enumerate((1, 2, 5, 7, 8, 12, 14, 16, 33)):
        for turn in range(4):
            kernel, dilation = kernels[(number + 3 * turn + width) % len(kernels)]
            reach = tuple(dilation * (side - 1) for side in kernel)
            padding = [tuple(r // 2 for r in reach), (0, 0), reach, (reach[0] + 9, reach[1] // 2)][(number + turn) % 4]
            stride = 1 + (number + turn // 2 + width) % 2
            case = Case(
                [8, 37, 16, 9][turn], [3, 16, 13, 5][(number + turn) % 4], (height, width), kernel, (stride, stride)
            )._replace(padding=padding, dilation=(dilation, dilation), bias=turn % 2 == 0)
            if any(side + 2 * p < r + 1 for side, p, r in zip(case.size, padding, reach)):
                continue
            input, weight, bias = make_inputs(case, FAST[1 + turn % 2], "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1:
                input, grad_output = lay(input, offset=1), lay(grad_output, offset=3)
            elif turn == 2:  # images apart
                input, grad_output = lay(input, steps=(3, 1, 1, 1), offset=5), lay(grad_output, steps=(2, 1, 1, 1))
                weight = lay(weight, (2, 3, 0, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            # Taps that meet no pixel are left out, and then the kernel may be one of a single tap.
            if output_size(case)[3] * stride <= 16 and dilation < max(2, min(case.size)):
                plans = {"toeplitz_small_planes", "toeplitz_small_planes_portable"}
                assert {(name, plan) for name in ("output", "grad_input") for plan in plans} <= forced, str(case)
            if dilation * (kernel[1] - 1) <= 8 and case.batch in (16, 37) and (stride == 1 or kernel != (3, 3)):
                assert ("grad_weight", "batch_grad_weight_nchw") in forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize("side", [7, 14])
def test_small_square_planes_are_exact(side: int, dtype: torch.dtype) -> None:
    """Planes whose bounds are known, of kernels that leave their size: at even and odd places, parts of channels."""
    kernels = [((3, 3), 1), ((5, 5), 1), ((7, 7), 1), ((3, 3), 3), ((1, 7), 1), ((7, 1), 1), ((5, 31), 1), ((3, 7), 2)]
    layouts: list[dict] = [{}, {"offset": 2}, {"offset": 1}, {"steps": (2, 1, 1, 1)}]
    for number, (kernel, dilation) in enumerate(kernels):
        for turn, layout in enumerate(layouts):
            padding = tuple(dilation * (k - 1) // 2 for k in kernel)
            case = Case([16, 9, 37, 121][turn], [8, 21, 20, 1][(number + turn) % 4], (side, side), kernel)
            case = case._replace(padding=padding, dilation=(dilation, dilation), bias=number % 2 == 0)
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            input, grad_output = lay(input, **layout), lay(integers(*output_size(case)).to(input), **layout)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)
            for plan in ("toeplitz_small_planes", "toeplitz_small_planes_portable"):
                output = torch.ops.dwconv.forward.plan(input, weight, bias, *arguments_of(case), plan)
                assert wrong_numbers(output, exact.output.round()) == 0, (plan, str(case), layout)
                grad_input = torch.ops.dwconv.grad_input.plan(
                    grad_output, weight, input.shape, *arguments_of(case), False, plan
                )
                assert wrong_numbers(grad_input, exact.grad_input.round()) == 0, (plan, str(case), layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize(("size", "stride"), [((7, 7), 1), ((14, 14), 1), ((14, 14), 2), ((9, 12), 1)], ids=str)
@pytest.mark.parametrize("side", [3, 7])
def test_small_planes_of_many_images(side: int, size: tuple, stride: int, dtype: torch.dtype) -> None:
    """Blocks that have several parts each, the last ones of fewer images and channels."""
    for batch, channels in ((121, 1030), (128, 768)):
        case = Case(batch, channels, size, (side, side), (stride, stride), padding=(side // 2, side // 2))
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)
        ops, arguments = torch.ops.dwconv, arguments_of(case)
        for plan in ("toeplitz_small_planes", "toeplitz_small_planes_portable"):
            output = ops.forward.plan(input, weight, bias, *arguments, plan)
            grad_input = ops.grad_input.plan(grad_output, weight, input.shape, *arguments, False, plan)
            assert wrong_numbers(output, exact.output.round()) == 0, plan
            assert wrong_numbers(grad_input, exact.grad_input.round()) == 0, plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (9, 9), (2, 3), (4, 9), (8, 4), (7, 1), (1, 6)], ids=str)
def test_batch_grad_weight_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Whole planes of several channels and of one, bands of rows, any widths and strides, at any address."""
    sizes = (7, 7), (14, 14), (13, 29), (28, 28), (31, 57), (56, 56), (50, 95), (113, 64), (8, 6), (30, 22)
    for number, size in enumerate(sizes):
        for turn in range(4):
            stride, multiplier, dilation = 1 + (number + turn) % 2, [1, 1, 2, 3][(turn + number // 2) % 4], 1
            if max(kernel) <= 3 and turn % 2 == 1:
                dilation = 3
            reach = tuple(dilation * (side - 1) for side in kernel)
            padding = [tuple(r // 2 for r in reach), (0, 0), reach][(number + turn) % 3]
            batch, channels = ([16, 12, 37, 50][turn], [5, 8, 16, 3][turn]) if size[1] < 50 else (28, 3)
            case = Case(batch, channels, size, kernel, (stride, stride), padding, (dilation, dilation), multiplier)
            case = case._replace(bias=turn % 2 == 0)
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, padding, reach)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1:
                input, grad_output = lay(input, offset=1), lay(grad_output, offset=3)
            elif turn == 2:  # images apart
                input, grad_output = lay(input, steps=(3, 1, 1, 1), offset=5), lay(grad_output, steps=(2, 1, 1, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            if stride == 1 or (kernel != (3, 3) and kernel[0] < 8):
                plans = {"batch_grad_weight_nchw", "batch_grad_weight_nchw_portable"}
                assert {("grad_weight", plan) for plan in plans} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dilation"),
    [
        ((1, 1), 1),
        ((3, 3), 1),
        ((3, 3), 2),
        ((5, 5), 1),
        ((7, 7), 1),
        ((9, 9), 1),
        ((4, 3), 1),
        ((1, 11), 1),
        ((1, 7), 1),
        ((11, 1), 1),
        ((4, 1), 2),
    ],
    ids=str,
)
def test_batch_grad_weight_of_whole_units_is_exact(kernel: tuple, dilation: int, dtype: torch.dtype) -> None:
    """Rows of whole units, and small planes in images of them: bands, filters that end in a block, images apart."""
    planes = (
        (24, (7, 7)),
        (768, (7, 7)),
        (8, (5, 7)),
        (16, (3, 3)),
        (3, (9, 8)),
        (9, (15, 24)),
        (5, (22, 56)),
        (2, (57, 64)),
    )
    for number, (channels, size) in enumerate((*planes, (3, (8, 120)), (150, (14, 16)))):
        for turn, layout in enumerate([{}, {"steps": (2, 1, 1, 1)}, {"offset": 8}, {"offset": 3}]):
            if turn == 3 and kernel in ((1, 1), (1, 11), (11, 1)):
                continue  # which the plan claims by where arrays begin
            padding = tuple(dilation * (k - 1) // 2 for k in kernel)
            case = Case(
                [16, 37, 60, 28][turn], channels, size, kernel, padding=(padding[0] * (1 - turn % 2), padding[1])
            )
            case = case._replace(dilation=(dilation, dilation), multiplier=1 + (number + turn) % 3 // 2, bias=turn != 1)
            if any(side + 2 * p < dilation * (k - 1) + 1 for side, p, k in zip(size, case.padding, kernel)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            input, grad_output = lay(input, **layout), lay(integers(*output_size(case)).to(input), **layout)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                if plan == "batch_grad_weight_nchw":
                    assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case), layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "multiplier"),
    [
        ((14, 14), (3, 3), 1, 1, 1),
        ((14, 14), (5, 5), 1, 1, 1),
        ((14, 14), (7, 7), 1, 1, 1),
        ((14, 14), (3, 3), 1, 2, 1),
        ((14, 14), (3, 3), 1, 3, 1),
        ((14, 14), (1, 7), 1, 1, 1),
        ((14, 14), (7, 3), 1, 1, 1),
        ((14, 14), (5, 5), 2, 1, 1),
        ((56, 56), (7, 7), 2, 1, 1),
        ((56, 56), (7, 7), 2, 1, 2),
        ((28, 56), (5, 5), 2, 1, 2),
        ((84, 56), (5, 7), 2, 1, 1),
        ((28, 28), (3, 3), 1, 1, 1),
        ((28, 28), (7, 7), 1, 1, 1),
        ((15, 28), (5, 3), 1, 1, 1),
        ((45, 28), (9, 9), 1, 1, 1),
        ((7, 7), (3, 3), 1, 1, 1),
        ((7, 7), (7, 7), 1, 1, 1),
        ((30, 56), (3, 3), 1, 1, 2),
        ((25, 64), (3, 3), 1, 2, 1),
        ((16, 112), (7, 7), 1, 1, 1),
        ((20, 56), (11, 1), 1, 1, 1),
        ((20, 56), (1, 11), 1, 1, 1),
        ((21, 56), (9, 9), 1, 1, 1),
        ((28, 48), (11, 1), 1, 1, 2),
        ((14, 56), (1, 11), 1, 1, 1),
        ((14, 112), (3, 3), 1, 1, 1),
        ((23, 96), (5, 3), 1, 1, 1),
        ((28, 28), (9, 9), 1, 1, 2),
        ((24, 20), (7, 3), 1, 1, 1),
        ((30, 62), (3, 3), 1, 2, 1),
        ((17, 110), (3, 3), 1, 1, 1),
        ((15, 55), (2, 5), 1, 1, 2),
        ((8, 57), (3, 9), 1, 1, 1),
        ((19, 77), (7, 7), 1, 1, 1),
        ((16, 127), (3, 3), 1, 1, 1),
        ((24, 99), (5, 5), 1, 1, 1),
        ((16, 83), (9, 9), 1, 1, 1),
        ((32, 110), (3, 3), 1, 1, 1),
        ((24, 109), (3, 3), 1, 1, 2),
        ((16, 52), (3, 3), 1, 1, 1),
        ((8, 99), (3, 3), 1, 1, 1),
        ((40, 62), (3, 3), 1, 2, 1),
        ((24, 61), (3, 3), 1, 2, 1),
        ((16, 66), (3, 3), 1, 2, 2),
    ],
    ids=str,
)
def test_batch_grad_weight_of_rows_as_they_lie_is_exact(
    size: tuple, kernel: tuple, stride: int, dilation: int, multiplier: int, finite: bool, dtype: torch.dtype
) -> None:
    """Filters that end within a block, images that end within 16, that blocks share, or apart, at any address; NaN."""
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    many = 680 if size[1] <= 14 else 70
    for batch, channels, layout, offsets in (
        (37, 8, {}, (0, 0)),
        (16, many, {"steps": (2, 1, 1, 1)}, (0, 0)),
        (400, 8, {}, (8, 8)),
        (37, 8, {}, (1, 1)),
        (28, 8, {}, (7, 2)),
        (28, 8, {}, (5, 5)),
        (37, 8, {"steps": (2, 1, 1, 1)}, (7, 7)),
        (16, many, {"steps": (2, 1, 1, 1)}, (4, 3)),
    ):
        case = Case(batch, channels, size, kernel, (stride, stride), padding, (dilation, dilation), multiplier)
        case = case._replace(bias=batch != 16)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = (lay(t, offset=o, **layout) for t, o in zip((input, grad_output), offsets))
        if not finite:
            for tensor in (input, grad_output):
                tensor[0, 1, 0, 0], tensor[1, 0, -1, -1], tensor[-1, 2, 3, 0] = torch.inf, torch.nan, -torch.inf
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
            if plan.startswith("batch_grad_weight_nchw"):
                wanted = exact[name].round().to(result)
                assert torch.equal(result.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0)), (plan, str(case))
                forced.add(plan)
        assert forced == {"batch_grad_weight_nchw", "batch_grad_weight_nchw_portable"}, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 5), (2, 1), (3, 3), (5, 4), (7, 7), (9, 2), (13, 13), (31, 3)], ids=str)
def test_grad_weight_in_float64_is_exact(kernel: tuple, finite: bool) -> None:
    """Columns of a kernel in several parts, strips of rows, rows that strides and dilation leave out; views."""
    for number, size in enumerate(((31, 13), (13, 35), (57, 33), (101, 20), (32, 64), (150, 17))):
        for turn, (stride, dilation) in enumerate(
            (((1, 1), (1, 1)), ((2, 1), (1, 2)), ((2, 2), (2, 1)), ((1, 3), (3, 1)))
        ):
            reach = tuple(d * (side - 1) for side, d in zip(kernel, dilation))
            padding = [tuple(r // 2 for r in reach), (0, 0), reach][(number + turn) % 3]
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, padding, reach)):
                continue
            case = Case([3, 1, 8, 37][(number + turn) % 4], 3, size, kernel, stride, padding, dilation)
            case = case._replace(multiplier=1 + (number + turn) % 3 // 2, bias=turn != 1)
            input, weight, bias = make_inputs(case, torch.float64, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 2:  # images apart
                input, grad_output = lay(input, steps=(3, 1, 1, 1), offset=1), lay(grad_output, steps=(2, 1, 1, 1))
            if not finite:
                for tensor in (input, grad_output):
                    tensor[0, 1, 0, 0], tensor[-1, 0, -1, -1] = torch.inf, torch.nan
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                wanted = exact[name].round().nan_to_num(nan=12345.0)
                assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("kernel", [(5, 6), (7, 7), (9, 4), (13, 13), (31, 3)], ids=str)
def test_large_kernels_in_float64_are_exact(kernel: tuple, finite: bool) -> None:
    """Rows of a thread that all meet the image or not, or lie apart as those of the kernel do; any layout."""
    for number, (size, memory_format) in enumerate(product(((14, 14), (31, 13), (13, 35), (64, 70)), FORMATS)):
        for turn, dilation in enumerate(((1, 1), (2, 1), (3, 4))):
            reach = tuple(d * (side - 1) for side, d in zip(kernel, dilation))
            padding = [tuple(r // 2 for r in reach), (0, 0), reach, (reach[0] + 9, 0)][(number + turn) % 4]
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, padding, reach)):
                continue
            multiplier = 1 + (number + turn) % 3 // 2
            case = Case([3, 1, 8][turn], 5, size, kernel, (1, 1), padding, dilation, multiplier, bias=turn != 1)
            input, weight, bias = make_inputs(case, torch.float64, "cuda", memory_format, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
            if turn == 2:  # images apart
                order = (0, 2, 3, 1) if memory_format == torch.channels_last else None
                input, grad_output = lay(input, order, (3, 1, 1, 1), 1), lay(grad_output, order, (2, 1, 1, 1))
            if not finite:
                for tensor in (input, grad_output, weight):
                    tensor[0, 0, 0, 0], tensor[-1, 0, -1, -1] = torch.inf, torch.nan
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                if name in ("output", "grad_input"):
                    wanted = exact[name].round().nan_to_num(nan=12345.0)
                    assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case))


# Every tile, cut in every way: rows of the kernel that lie in one another's way, far apart and not, padding beyond the
# kernel, few gradients and many, rows and columns that no tap of a tile meets, splits.
COLUMNS = [
    Case(3, 5, (29, 31), (5, 5), (2, 2), (2, 2), multiplier=2),
    Case(2, 7, (6, 6), (1, 1), (2, 2)),
    Case(2, 3, (175, 66), (1, 1), (2, 3), (4, 1)),
    Case(5, 2, (150, 160), (1, 1), (3, 1)),
    Case(70, 3, (4, 5), (1, 1)),
    Case(2, 3, (40, 41), (1, 7), (1, 2), (0, 5), (3, 3), multiplier=3),
    Case(3, 2, (101, 19), (16, 1), (2, 2), (7, 0)),
    Case(2, 3, (33, 40), (2, 25), (1, 3), (1, 12), (2, 1)),
    Case(2, 3, (50, 41), (3, 3), (1, 1), (9, 4), (9, 4)),
    Case(2, 2, (9, 700), (3, 3), padding=(1, 1)),
    Case(1, 3, (400, 300), (3, 3), (2, 2), (1, 1)),
    Case(3, 2, (113, 90), (5, 5), (3, 3), (4, 4), (2, 2)),
    Case(2, 4, (9, 9), (17, 17), (2, 2), (16, 16), (2, 2), multiplier=2),
    Case(2, 3, (18, 18), (28, 28), (1, 1), (40, 40), (3, 3)),
    Case(4, 3, (30, 23), (9, 9), (4, 4), (11, 3), (6, 1)),
    Case(5, 3, (60, 60), (4, 17), (1, 1), (3, 16), (2, 2)),
    Case(4, 5, (51, 140), (3, 6), (3, 3), (1, 2)),
    Case(3, 5, (47, 33), (3, 3), (3, 4), (7, 1), (2, 1), multiplier=2),
    Case(2, 6, (30, 61), (6, 2), (7, 1), (4, 4), (3, 5)),
    Case(1, 2, (3, 4), (3, 4)),
    Case(2, 100, (7, 9), (2, 5), (2, 2), (1, 4), (2, 2), bias=False),
]


@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_columns_grad_weight_claims(dtype: torch.dtype) -> None:
    """Columns that lie side by side or apart, and not channels; what 32 bits count."""
    plan, case = "columns_grad_weight", Case(4, 6, (20, 30), (3, 4), (2, 3), (7, 1), (3, 1))
    for change, claimed in (
        ({}, True),
        ({"batch": 0}, False),
        ({"batch": 2**23}, False),
        ({"size": (2**26 - 1, 5), "batch": 1}, True),
        ({"size": (2**26, 5)}, False),
        ({"size": (20, 2**26)}, False),
        ({"padding": (7, 2**26)}, False),
        ({"padding": (2**12, 2**13)}, True),
        ({"stride": (2**21, 1)}, False),
        ({"dilation": (5, 2**20), "stride": (2, 4), "size": (20, 2**23)}, False),
        ({"channels": 2**25}, False),
    ):
        assert (plan_of("grad_weight", case._replace(**change), dtype) == plan) == claimed, change
    input, output = meta((4, 6, 20, 30), dtype), meta(output_size(case), dtype)
    for order, steps, claimed in (
        (None, (2, 1, 3, 1), True),
        ((1, 0, 2, 3), (1, 1, 1, 2), True),
        ((0, 1, 3, 2), (1, 1, 1, 1), True),
        ((0, 2, 3, 1), (1, 1, 1, 1), False),
        ((0, 2, 3, 1), (1, 2, 1, 1), True),
    ):
        assert (plan in claims("grad_weight", case, lay(input, order, steps), output)) == claimed, (order, steps)
        assert (plan in claims("grad_weight", case, input, lay(output, order, steps))) == claimed, (order, steps)


def test_what_goes_by_columns() -> None:
    """What kernels for any size have: little to multiply, few places of a tile on tensor cores, or a single column."""
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
    ):
        assert plan_of("grad_weight", case, dtype) == expected, (str(case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_columns_grad_weight(case: Case, dtype: torch.dtype) -> None:
    """Rows and columns side by side and apart: exact, NaN where F.conv2d has it, the same bits every time."""
    plan = "columns_grad_weight"
    for spoilt in (False, True):
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if spoilt:
            input[-1, 0, -1, 0], input[0, -1, 0, -1] = torch.inf, torch.nan
            grad_output[0, 0, 0, 0], grad_output[-1, -1, -1, -1] = -torch.inf, torch.inf
        for order, steps, offset in ((None, None, 0), ((1, 0, 2, 3), (2, 1, 2, 1), 1), (None, (1, 2, 1, 3), 2)):
            tensors = lay(input, order, steps, offset), weight, bias
            count = compare_plans(case, tensors, lay(grad_output, order, steps, 3 * offset), plan, repeats=3)
            assert count == 3 * (1 + case.bias)


WALKS = [  # stride, dilation
    ((1, 1), (1, 1)),
    ((2, 2), (1, 1)),
    ((1, 1), (2, 3)),
    ((3, 4), (1, 1)),
    ((2, 3), (3, 2)),
    ((4, 2), (6, 4)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kernel", [(1, 1), (2, 2), (1, 4), (3, 3), (5, 5), (7, 7), (1, 19), (16, 1), (11, 13), (5, 2)], ids=str
)
def test_walks_are_exact(kernel: tuple, dtype: torch.dtype, finite: bool) -> None:
    """Taps in streams of every step, in tiles that are not full; few channels and many; rows cut in pieces; views.

    Where images are small, some taps meet no pixel.
    """
    order = 0, 2, 3, 1
    for number, (stride, dilation) in enumerate(WALKS):
        images = (3, 2, (60, 61)), (2, 40, (31, 130)), (9, 67, (13, 20)), (72, 24, (6, 9))
        for turn, (batch, channels, size) in enumerate(images):
            reach = tuple(d * (side - 1) for side, d in zip(kernel, dilation))
            padding = [tuple(r // 2 for r in reach), (0, 0), (reach[0], reach[1] + 3)][(number + turn) % 3]
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, padding, reach)):
                continue
            multiplier = 3 if (number + turn) % 5 == 2 else 1
            case = Case(batch, channels, size, kernel, stride, padding, dilation, multiplier, bias=turn != 1)
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            if number % 3 == 1:  # at any address, pixels and rows apart
                input, grad_output = lay(input, order, (1, 1, 2, 1), 1), lay(grad_output, order, (2, 1, 1, 3), 3)
            elif number % 3 == 2:  # vectors, where those of channels are whole
                input, grad_output = lay(input, order, (2, 1, 1, 1), 8), lay(grad_output, order, (1, 1, 3, 1), 8)
            if not finite:
                for tensor in (input, grad_output):
                    tensor[0, 1, 0, 0], tensor[-1, 0, -1, -1] = torch.inf, torch.nan
            assert WALK in claims("grad_weight", case, input, grad_output), str(case)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)
            call = grad_output, input, kernel, *arguments_of(case), bias is not None, WALK
            results = torch.ops.dwconv.grad_weight.plan(*call)
            again = torch.ops.dwconv.grad_weight.plan(*call)
            for result, repeated, wanted in zip(results, again, (exact.grad_weight, exact.grad_bias)):
                if wanted is None:
                    continue
                wanted = wanted.round().to(dtype).nan_to_num(nan=12345.0)
                assert torch.equal(result.nan_to_num(nan=12345.0), wanted), str(case)
                assert torch.equal(repeated.nan_to_num(nan=12345.0), wanted), str(case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 6, (56, 56), (3, 3), padding=(1, 1)),
        Case(3, 5, (29, 31), (5, 5), (2, 2), (2, 2), multiplier=2),
        Case(2, 4, (28, 28), (7, 7), padding=(3, 5)),  # fewer tiles of 1x9 taps than of 3x3
        Case(2, 3, (14, 14), (13, 13), padding=(6, 6)),
        Case(2, 3, (33, 40), (2, 25), (1, 3), (1, 12), (2, 1)),
        Case(2, 3, (50, 41), (3, 3), (1, 1), (9, 4), (9, 4)),
        Case(70, 3, (4, 5), (1, 1)),
        Case(2, 2, (9, 700), (3, 3), padding=(1, 1)),
        Case(1, 2, (3, 4), (3, 4)),
    ],
    ids=str,
)
def test_grad_weight_in_float64_of_columns_apart(case: Case) -> None:
    """Channels side by side, or nothing: exact, NaN where F.conv2d has it, the same bits every time."""
    input, weight, bias = make_inputs(case, torch.float64, "cuda", make=integers)
    grad_output = integers(*output_size(case)).to(input)
    call = case.kernel, *arguments_of(case), True, "generic"
    for finite in (True, False):
        if not finite:
            input[-1, 0, -1, 0], input[0, -1, 0, -1] = torch.inf, torch.nan
            grad_output[0, 0, 0, 0], grad_output[-1, -1, -1, -1] = -torch.inf, torch.inf
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)
        for order, steps in (((0, 2, 3, 1), (1, 1, 1, 1)), ((0, 2, 3, 1), (2, 1, 2, 1)), (None, (1, 2, 1, 2))):
            args = lay(grad_output, order, steps, 1), lay(input, order, steps)
            results = torch.ops.dwconv.grad_weight.plan(*args, *call)
            for result, expected in zip(results, (exact.grad_weight, exact.grad_bias)):
                assert torch.equal(result.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0)), (steps, finite)
            for again in (torch.ops.dwconv.grad_weight.plan(*args, *call) for _ in range(5)):
                assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, again))


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_grad_weight_of_planes_cut_in_other_rows_is_exact(side: int, dtype: torch.dtype, finite: bool) -> None:
    """Long rows that are no whole 16 bytes, of planes that are, at any address; products around the ends of rows."""
    sizes = [(24, 1918), (40, 1026), (16, 1028), (48, 1917), (32, 1923), (28, 1024), (8, 1034)]
    if side > 3:
        sizes += [(24, 903), (64, 779), (72, 901)]  # of which a band may have more rows
    for number, size in enumerate(sizes):
        batch, channels = (1 + number % 2, 3) if size[1] > 1000 else (3, 7)
        for turn, offsets in enumerate([(0, 0), (8, 16), (3, 3), (5, 13), (2, 7)]):
            case = Case(batch, channels, size, (side, side), padding=(side // 2, side // 2), bias=number % 2 == 0)
            case = case._replace(multiplier=1 + turn % 2)
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            input, grad_output = (lay(t, offset=o) for t, o in zip((input, grad_output), offsets))
            if not finite:
                for tensor in (input, grad_output):
                    tensor[0, 0, 0, 0], tensor[-1, 1, -1, -1], tensor[-1, 2, 5, 0] = torch.inf, torch.nan, -torch.inf
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                if plan.startswith("toeplitz_grad_weight_nchw"):
                    wanted = exact[name].round().to(result).nan_to_num(nan=12345.0)
                    assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case), offsets)
                    forced.add(plan)
            assert forced == {"toeplitz_grad_weight_nchw", "toeplitz_grad_weight_nchw_portable"}, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
def test_grad_weight_of_3x3_by_words_is_exact(dtype: torch.dtype, finite: bool) -> None:
    """Rows of even and odd widths, and arrays that begin alike within a word and not, of tiles for a whole GPU."""
    sizes = [(6, 512, 510), (6, 500, 511), (6, 509, 504), (7, 801, 350), (3, 1000, 512)]
    for number, (batch, height, width) in enumerate(sizes):
        for turn, (first, second) in enumerate([(0, 0), (1, 1), (1, 2), (3, 7)]):
            case = Case(batch, 5, (height, width), (3, 3), padding=(1, 1), bias=(number + turn) % 2 == 0)
            case = case._replace(multiplier=1 + turn // 2)
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            input, grad_output = lay(input, offset=first), lay(grad_output, offset=second)
            if not finite:
                for tensor in (input, grad_output):
                    tensor[0, 0, 0, 0], tensor[-1, 1, -1, -1], tensor[-1, 3, 9, 0] = torch.inf, torch.nan, -torch.inf
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                if plan.startswith("stream_grad_weight_nchw"):
                    wanted = exact[name].round().to(result).nan_to_num(nan=12345.0)
                    assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, plan, str(case), first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_grad_weight_of_long_rows_is_exact(side: int, dtype: torch.dtype) -> None:
    """Rows in 16 segments, the last of them empty or cut, of whole 16 bytes and not; at any address, too."""
    even = [(9, 256), (23, 264), (30, 512), (16, 1032), (14, 1048), (50, 1920)]
    sizes = [*even, (24, 258), (23, 511), (17, 1027), (31, 1919), (40, 1918), (33, 1916)]
    for number, size in enumerate(sizes):
        for turn, padding in enumerate([side // 2, side - 1, 0]):
            case = Case([3, 1, 2][turn], 3, size, (side, side), padding=(padding, side // 2))
            case = case._replace(multiplier=1 + (number + turn) % 2, bias=(number + turn) % 3 > 0)
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1:
                input, grad_output = lay(input, offset=1 + number), lay(grad_output, offset=9 + number)
            elif turn == 2 and number % 2 == 0:
                input, grad_output = lay(input, offset=8), lay(grad_output, offset=3)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            if math.prod(output_size(case)[2:]) >= 784 and (side > 3 or size[1] > 1000):
                assert ("grad_weight", "toeplitz_grad_weight_nchw") in forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_over_many_images_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Blocks that take whole images, one after the other; rows that leave as one, and in slabs of channels."""
    kernel, stride, dilation = tile
    for channels, batch, size in ((40, 1500, (7, 7)), (528, 300, (5, 9)), (1040, 3, (14, 30)), (4, 3, (40, 300))):
        for multiplier in (1, 2):
            if any(side < dilation * (k - 1) + 1 for side, k in zip(size, kernel)):
                continue
            case = tile_case(tile, batch, channels, size, multiplier=multiplier, bias=multiplier == 1)
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                if plan == "march_channels_last":
                    assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case))


def check_march(case: Case, dtype: torch.dtype, offset: int = 0) -> None:
    """March_channels_last against float64, where it can march: the output and the gradient of the input.

    Their sources begin so many elements behind an aligned address.
    """
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(input)
    input, grad_output = (lay(t, (0, 2, 3, 1), offset=offset) for t in (input, grad_output))
    tensors = input, weight, bias
    exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
    marched = set()
    for name, plan, result in results_of_plans(case, tensors, grad_output, True):
        if plan == "march_channels_last":
            assert wrong_numbers(result, exact[name].round()) == 0, (name, str(case))
            marched.add(name)
    assert marched == {"output", "grad_input"}, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_marches_share_rows(dtype: torch.dtype) -> None:
    """Even shares, bands of images, and half of the rows in small shares where there is much to move."""
    for channels, batch, size in ((64, 2, (700, 520)), (144, 40, (56, 56)), (8, 3, (1000, 37)), (24, 1, (2, 3000))):
        check_march(tile_case(((3, 3), 1, 1), batch, channels, size), dtype)
    check_march(tile_case(((3, 3), 2, 1), 30, 96, (112, 112)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_of_rows_of_pixels_that_fit_no_units(tile: tuple, dtype: torch.dtype) -> None:
    """One channel a thread and two, all channels in a block and slabs of them, at any address."""
    sizes = (
        (37, (13, 41)),
        (38, (30, 8)),
        (130, (33, 6)),
        (395, (14, 12)),
        (413, (7, 9)),
        (565, (11, 19)),
        (1001, (5, 14)),
    )
    for number, (channels, size) in enumerate(sizes):
        kernel, _, dilation = tile
        reach = [dilation * (side - 1) for side in kernel]
        for turn, padding in enumerate(([r // 2 for r in reach], [0, 0], reach)):
            if all(side + 2 * p > r for side, p, r in zip(size, padding, reach)):
                case = tile_case(tile, 1 + (number + turn) % 3, channels, size, padding=tuple(padding))
                check_march(case, dtype, (number + 3 * turn) % 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_march_of_three_channels(dtype: torch.dtype) -> None:
    """Rows of whole words and others, more columns than a block has, and few."""
    for width in (1, 4, 7, 28, 60, 128, 132, 516, 1028, 1030):
        for padding in ((1, 1), (0, 0), (2, 1)):
            if width + 2 * padding[1] >= 3:
                case = tile_case(((3, 3), 1, 1), 3, 3, (19, width), bias=width % 8 == 4)
                check_march(case._replace(padding=padding), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_march_of_many_rows_of_three_channels(dtype: torch.dtype) -> None:
    """Bands of every sort, whole and cut short, of blocks of every width; filters with Inf and NaN."""
    for batch, size in ((16, (512, 512)), (17, (271, 512)), (23, (402, 328)), (90, (101, 256)), (5, (1081, 1920))):
        case = tile_case(((3, 3), 1, 1), batch, 3, size, bias=batch % 2 == 1)
        check_march(case, dtype)
    for offset in range(1, 8):
        batch, size = ((17, (271, 512)), (23, (402, 328)), (90, (101, 256)))[offset % 3]
        check_march(tile_case(((3, 3), 1, 1), batch, 3, size), dtype, offset)
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    weight[0, 0, 0, 0], weight[2, 0, 1, 2] = torch.inf, torch.nan
    call = input, weight, bias, *arguments_of(case)
    first, right = (torch.ops.dwconv.forward.plan(*call, plan) for plan in (MARCH["forward"], "generic"))
    assert torch.equal(first.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_of_arrays_that_begin_anywhere(tile: tuple, dtype: torch.dtype) -> None:
    """Arrays without gaps, a few elements behind 16 bytes: pixels that are whole units of 16 bytes, and others."""
    for number, channels in enumerate((24, 200, 37, 3, 600)):
        for offsets in ((1, 1), (1, 0), (0, 3), (6, 2), (4, 8)):
            case = tile_case(tile, 3, channels, (13, 17 + number), multiplier=1 + (number + offsets[0]) % 2)
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input)
            if offsets in [(6, 2), (1, 1)]:
                input[1, 0, 0, 0], grad_output[2, -1, -1, -1] = torch.inf, torch.nan
                input[0, -1, 3, -1], grad_output[1, 0, 5, 0] = torch.nan, torch.inf
            order = 0, 2, 3, 1
            input, grad_output = (lay(t, order, offset=o) for t, o in zip((input, grad_output), offsets))
            weight = lay(weight, offset=offsets[1])
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                if plan in MARCH.values():
                    wanted = exact[name].round().to(result).nan_to_num(nan=12345.0)
                    assert torch.equal(result.nan_to_num(nan=12345.0), wanted), (name, str(case), offsets)


def check_grad_weight(
    case: Case, plan: str, dtype: torch.dtype, spoilt: bool, offsets: tuple[int, int] = (0, 0), repeats: int = 20
) -> None:
    """Grad_weight of channels_last arrays by a plan against float64, with Inf and NaN if `spoilt`, many times.

    Input and gradient begin so many elements behind an aligned address.
    """
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
    if spoilt:
        for number, tensor in enumerate((input, grad_output)):
            tensor[0, number, 0, 0], tensor[1, 1 - number, -1, -1] = torch.inf, torch.nan
            tensor[0, -1 - number, 0, -1] = tensor[-1, -2 + number, 1, 0] = torch.inf
    input, grad_output = (lay(t, (0, 2, 3, 1), offset=o) for t, o in zip((input, grad_output), offsets))
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)
    call = grad_output, input, case.kernel, *arguments_of(case), True, plan
    first = torch.ops.dwconv.grad_weight.plan(*call)
    for result, right in zip(first, (exact.grad_weight, exact.grad_bias)):
        right = right.round().to(result).nan_to_num(nan=12345.0)
        assert torch.equal(result.nan_to_num(nan=12345.0), right), str(case)
    for _ in range(repeats):
        for a, b in zip(first, torch.ops.dwconv.grad_weight.plan(*call)):
            assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_flat_grad_weight(spoilt: bool, dtype: torch.dtype) -> None:
    """Channels of less than a unit and as many as a block has threads, periods cut short, at any address."""
    sizes = (37, (141, 95)), (2, (430, 308)), (6, (307, 145)), (565, (23, 30)), (1001, (15, 27)), (21, (200, 230))
    for number, (channels, size) in enumerate(sizes):
        for offset in (0, 1, 3 + number):
            case = tile_case(((1, 1), 1, 1), 2 + (number + offset) % 3, channels, size)
            check_grad_weight(case, FLAT, dtype, spoilt, (offset, offset), repeats=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_three_channels(spoilt: bool, dtype: torch.dtype) -> None:
    """Rows in bands of every sort: whole and cut short, several of a group, groups of every width; at any place."""
    for batch, size in ((26, (90, 512)), (29, (101, 344)), (7, (333, 1000)), (3000, (9, 128)), (60, (97, 224))):
        check_grad_weight(tile_case(((3, 3), 1, 1), batch, 3, size), MARCH["grad_weight"], dtype, spoilt)
    for offset, (batch, size) in enumerate(((29, (101, 344)), (7, (333, 1000)), (3000, (9, 128))), 1):
        for offsets in ((offset, offset), (offset + 4, offset + 4), (offset, 0)):
            check_grad_weight(
                tile_case(((3, 3), 1, 1), batch, 3, size), MARCH["grad_weight"], dtype, spoilt, offsets, repeats=2
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_pairs(spoilt: bool, dtype: torch.dtype) -> None:
    """Two filters a channel at stride 2: rows of one span and of several, any padding, channels beyond a block's."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 9, 40, (56, 56)),
        ((7, 7), (0, 2), 13, 8, (33, 30)),
        ((7, 7), (2, 1), 16, 32, (15, 14)),
        ((5, 5), (2, 2), 3, 72, (29, 131)),
        ((5, 5), (4, 3), 40, 16, (11, 61)),
    ):
        case = tile_case((kernel, 2, 1), batch, channels, size, multiplier=2)
        check_grad_weight(case._replace(padding=padding), MARCH["grad_weight"], dtype, spoilt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_small_images(spoilt: bool, dtype: torch.dtype) -> None:
    """Images of up to 8 x 8, one group of them and many, few slabs of channels and more than multiprocessors."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 128, 96, (7, 7)),
        ((7, 5), (3, 2), 37, 40, (5, 6)),
        ((5, 7), (3, 3), 21, 32, (6, 8)),
        ((7, 7), (3, 3), 9, 64, (8, 8)),
        ((3, 3), (1, 1), 500, 32, (7, 7)),
        ((2, 3), (1, 1), 11, 4800, (4, 3)),
    ):
        case = tile_case((kernel, 1, 1), batch, channels, size)
        check_grad_weight(case._replace(padding=padding), MATRIX, dtype, spoilt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_arrays_that_begin_alike(spoilt: bool, dtype: torch.dtype) -> None:
    """Both as far behind 16 bytes, so that units carry channels of the pixel before; and one case where they do not."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 20, 96, (7, 7)),
        ((7, 5), (3, 2), 37, 40, (5, 6)),
        ((3, 3), (1, 1), 9, 136, (7, 7)),
        ((5, 7), (3, 3), 21, 32, (6, 8)),
        ((3, 3), (1, 1), 13, 72, (14, 14)),
        ((2, 3), (0, 2), 3, 192, (9, 30)),
        ((3, 3), (2, 1), 5, 64, (11, 16)),
        ((5, 5), (2, 2), 9, 40, (14, 28)),
        ((7, 7), (3, 3), 5, 96, (28, 28)),
        ((7, 9), (0, 8), 3, 32, (30, 31)),
        ((9, 9), (4, 4), 3, 40, (28, 28)),
        ((7, 7), (3, 3), 2, 64, (13, 131)),
        ((2, 3), (1, 1), 3, 40, (9, 60)),
        ((7, 7), (3, 3), 9, 72, (19, 56)),
        ((5, 5), (2, 2), 21, 40, (11, 300)),
        ((9, 9), (4, 4), 13, 32, (10, 255)),
        ((7, 7), (3, 5), 15, 40, (11, 126)),
        ((3, 8), (1, 4), 40, 32, (7, 128)),
    ):
        case = tile_case((kernel, 1, 1), batch, channels, size)._replace(padding=padding)
        for offsets in ((1, 1), (5, 5), (4, 4), (7, 7), (3, 2)):
            check_grad_weight(case, MATRIX, dtype, spoilt, offsets, repeats=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_march_grad_weight_of_pixels_that_begin_between_units(tile: tuple, dtype: torch.dtype) -> None:
    """Boxes of pixels and of slabs of channels, with a unit more of each, and rows; Inf and NaN in half of them."""
    cases = ((5, 64, (41, 130)), (3, 144, (56, 56)), (2, 256, (33, 64)), (9, 960, (7, 7)), (4, 392, (14, 30)))
    small_pixels = ((3, 32, (20, 112)), (7, 8, (14, 31)), (5, 128, (11, 20)), (2, 24, (9, 300)))
    for number, (batch, channels, size) in enumerate(cases + small_pixels):
        case = tile_case(tile, batch, channels, size, multiplier=2 if number == 4 else 1)
        for offsets in ((1, 1), (6, 6), (3, 2) if number % 2 > 0 else (8, 5)):
            check_grad_weight(case, MARCH["grad_weight"], dtype, number % 2 == 1, offsets, repeats=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Any number of channels, images of every sort, pixels, rows and images apart, at any address."""
    kernel, stride, dilation = tile
    sizes = [(7, 7), (1, 8), (14, 14), (13, 29), (28, 28), (31, 57), (9, 1), (113, 95), (40, 301), (301, 40)]
    for number, size in enumerate(sizes):
        for turn in range(6):
            channels = [3, 37, 64, 1, 130, 20, 304][(number + turn) % 7]
            reach = tuple(dilation * (side - 1) for side in kernel)  # the most padding that marches
            case = tile_case(tile, 3, channels, size, multiplier=1 + (number + turn) % 2, bias=turn % 2 == 0)
            case = case._replace(padding=[case.padding, (0, 0), reach][turn % 3])
            if any(side + 2 * p < r + 1 for side, p, r in zip(size, case.padding, reach)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            order = 0, 2, 3, 1
            if turn == 1:
                input, grad_output = lay(input, order, offset=1), lay(grad_output, order, offset=8)
            elif turn == 2:
                input, weight = lay(input, order, (2, 1, 3, 2), 5), lay(weight, (2, 3, 0, 1))
            elif turn == 3:  # channels of more
                input, grad_output = (lay(t, order, (1, 1, 1, 3), 4) for t in (input, grad_output))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            if channels > 1:
                assert ("output", "march_channels_last") in forced, str(case)
                squares = kernel[0] == kernel[1] > 1 and dilation == 1
                sums = case.multiplier > 1 and not squares
                assert (("grad_input", "march_channels_last") in forced) != sums, str(case)
                assert ("grad_weight", MARCH["grad_weight"]) in forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (9, 9), (8, 3), (7, 9), (2, 3), (1, 9), (6, 1)], ids=str)
def test_toeplitz_channels_last_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Tiles of several images and of one, slabs and spans of all sorts, pixels, rows and images apart, any address."""
    sizes = [(7, 7), (1, 8), (14, 14), (13, 29), (28, 28), (31, 57), (9, 1), (56, 80), (40, 301), (301, 40)]
    for number, size in enumerate(sizes):
        for turn in range(3):
            channels = [8, 40, 64, 24, 136, 200][(number + turn) % 6]
            batch = [1, 3, 21, 8][(number + 2 * turn) % 4] if size[0] * size[1] < 1000 else 3
            padding = [tuple(k // 2 for k in kernel), (0, 0), tuple(k - 1 for k in kernel)][turn % 3]
            case = Case(batch, channels, size, kernel, padding=padding, bias=turn % 2 == 0)
            if any(side + 2 * p < k for side, p, k in zip(size, padding, kernel)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            order, layout = (0, 2, 3, 1), (number + turn) % 4
            if layout == 1:
                input, grad_output = lay(input, order, offset=1), lay(grad_output, order, offset=4)
            elif layout == 2:
                input, weight = lay(input, order, (2, 1, 3, 2), 6), lay(weight, (2, 3, 0, 1))
            elif layout == 3:
                input, grad_output = lay(input, (2, 3, 0, 1), offset=2), lay(grad_output, (2, 0, 3, 1), (1, 1, 2, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            # Of an input whose rows are outermost the output is NCHW.
            expected = {("grad_input", BAND)} if layout == 3 else {("output", BAND), ("grad_input", BAND)}
            assert expected <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_toeplitz_channels_last_is_exact_at_stride_two(dtype: torch.dtype) -> None:
    """Two filters a channel: bands, spans and slabs of all sorts, at any address."""
    order = (0, 2, 3, 1)
    for number, size in enumerate([(7, 7), (8, 70), (9, 96), (56, 56), (33, 101), (113, 95), (70, 8), (20, 200)]):
        for turn in range(4):
            batch, channels = [1, 3, 40][turn % 3], [8, 40, 64, 136][(number + turn) % 4]
            side = [3, 0, 6][(number + turn) % 3]
            case = Case(batch, channels, size, (7, 7), (2, 2), (side, side), multiplier=2, bias=turn % 2 == 0)
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            if turn:
                input, grad_output = lay(input, order, offset=[1, 2, 4][turn - 1]), lay(grad_output, order, offset=turn)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            assert {("output", BAND), ("grad_input", BAND)} <= forced, str(case)


# Kernels that are tall, wide, or as large as images, and sizes for which they are served with a padding of half of
# them.
LARGE_BANDS = [
    ((13, 13), [(28, 28), (14, 14), (7, 8), (9, 150)]),
    ((10, 17), [(31, 57), (13, 29), (301, 40)]),
    ((17, 11), [(57, 31), (40, 301)]),
    ((12, 2), [(28, 20)]),
    ((5, 51), [(56, 56), (30, 57), (9, 230)]),
    ((51, 5), [(56, 56), (57, 30), (230, 9)]),
    ((3, 57), [(14, 28), (6, 113)]),
    ((40, 1), [(40, 9)]),
    ((27, 27), [(14, 14), (7, 7), (13, 16), (16, 9), (1, 14)]),
    ((21, 35), [(14, 14)]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "sizes"), LARGE_BANDS, ids=str)
def test_toeplitz_channels_last_is_exact_for_large_kernels(kernel: tuple, sizes: list, dtype: torch.dtype) -> None:
    for number, size in enumerate(sizes):
        for turn in range(4):
            channels, batch = [8, 40, 64, 24][(number + turn) % 4], [3, 17, 1, 8][(number + 2 * turn) % 4]
            padding = [tuple(k // 2 for k in kernel), (0, 0), tuple(k - 1 for k in kernel)][turn % 3]
            case = Case(batch, channels, size, kernel, padding=padding, bias=turn % 2 == 0)
            if any(side + 2 * p < k for side, p, k in zip(size, padding, kernel)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            order = (0, 2, 3, 1)
            if turn == 1:
                input, grad_output = lay(input, order, offset=1), lay(grad_output, order, offset=4)
            elif turn == 3:
                input, weight = lay(input, order, (2, 1, 3, 2), 8), lay(weight, (2, 3, 0, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            if turn % 3 == 0:
                assert {("output", BAND), ("grad_input", BAND)} <= forced, str(case)
            input[0, 1, -1, 2 % size[1]], input[-1, 2, 0, 0], grad_output[0, 3, 0, -1] = (
                torch.inf,
                torch.nan,
                -torch.inf,
            )
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
                if plan == BAND:
                    assert torch.equal(result.nan_to_num(nan=999.0), exact[name].to(result).nan_to_num(nan=999.0)), str(
                        case
                    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [5, 7, 9, 13])
@pytest.mark.parametrize(
    ("batch", "size"),
    [(128, (7, 7)), (131, (7, 7)), (41, (14, 14)), (18, (28, 28)), (7, (20, 60)), (3, (9, 140))],
    ids=str,
)
def test_toeplitz_channels_last_shares_many_images(batch: int, size: tuple, side: int, dtype: torch.dtype) -> None:
    """Blocks that go from image to image, in whole groups of them and cut anywhere, the last group lacking some."""
    case = Case(batch, 1032, size, (side, side), padding=(side // 2, side // 2))
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)
    ops, arguments = torch.ops.dwconv, arguments_of(case)
    output = ops.forward.plan(input, weight, bias, *arguments, BAND)
    grad_input = ops.grad_input.plan(grad_output, weight, input.shape, *arguments, True, BAND)
    assert wrong_numbers(output, exact.output.round()) == 0
    assert wrong_numbers(grad_input, exact.grad_input.round()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (9, 9), (13, 13), (5, 31), (27, 27)], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(9, 72, (14, 13)), (21, 8, (7, 8)), (5, 40, (6, 60)), (3, 32, (5, 150)), (1, 8, (1, 1))],
    ids=str,
)
def test_toeplitz_channels_last_of_arrays_that_begin_anywhere(
    batch: int, channels: int, size: tuple[int, int], kernel: tuple, dtype: torch.dtype
) -> None:
    """All places within 16 bytes, with gaps and without, and one image, or row, that stands for all."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
    grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
    layouts: list[dict] = [{"offset": offset} for offset in range(1, 8)]
    layouts += [{"offset": 3, "steps": (2, 1, 1, 2)}, {"offset": 5, "expanded": (0,)}, {"offset": 1, "expanded": (2,)}]
    for layout in layouts if size == (14, 13) else layouts[::3]:
        laid, grad = (lay(t, (0, 2, 3, 1), **layout) for t in (input, grad_output))
        exact = run_float64((laid, weight, bias), grad, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (laid, weight, bias), grad, True):
            if plan == BAND:
                assert wrong_numbers(result, exact[name].round()) == 0, (name, layout)
                forced.add(name)
        if size == (14, 13):
            assert "grad_input" in forced and ("output" in forced or "expanded" in layout), layout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [((3, 3), 1, 1), ((5, 5), 2, 1), ((5, 5), 1, 1)], ids=str)
def test_the_same_sizes_in_other_layouts(tile: tuple, dtype: torch.dtype) -> None:
    """How a problem is cut is remembered: what that depends on has to be part of what it is remembered by."""
    case = tile_case(tile, 3, 24, (40, 48))
    input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
    grad_output = integers(*output_size(case)).to(input)
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
    orders = [(0, 2, 3, 1), (3, 0, 2, 1), (0, 3, 2, 1), (2, 3, 0, 1), (0, 1, 2, 3), (1, 0, 2, 3)]
    for order, steps in product([*orders, *orders[::-1]], [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 1)]):
        tensors = lay(input, order, steps), lay(weight, (2, 3, 0, 1)), bias
        for name, plan, result in results_of_plans(case, tensors, lay(grad_output, order, steps), order[-1] == 1):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, order, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [*TILES, ((9, 9), 1, 1)], ids=str)
def test_marches_beside_infinities(tile: tuple, dtype: torch.dtype) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    for (channels, multiplier), size in product(
        ((3, 1), (16, 1), (8, 2), (40, 1), (35, 1)), ((12, 17), (7, 7), (9, 14))
    ):
        case = tile_case(tile, 2, channels, size, multiplier=multiplier)
        input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
        for tensor in (input, grad_output):
            tensor[0, 1, 3, 2], tensor[1, 0, -1, -1] = torch.inf, torch.nan
        weight[0, 0, 0, 0], weight[-1, 0, -1, -1] = -torch.inf, torch.nan
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, True):
            if plan in (BAND, MATRIX, *MARCH.values()):
                assert torch.equal(result.nan_to_num(nan=12345.0), exact[name].to(result).nan_to_num(nan=12345.0)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(7, 7), (2, 3), (4, 6), (1, 9), (6, 1), (11, 5), (3, 4), (5, 4), (5, 9)], ids=str)
def test_tensor_cores_are_exact(kernel: tuple, stride: int, dtype: torch.dtype) -> None:
    sizes = [(32, 32), (56, 56), (23, 45), (113, 95), (40, 301), (301, 40), (65, 17), (90, 520), (64, 64)]
    for number, size in enumerate(sizes):
        for turn in range(3):
            case = Case(3, 5, size, kernel, (stride, stride), multiplier=1 + (number + turn) % 2, bias=turn != 1)
            case = case._replace(padding=[(0, 0), tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel)][turn])
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1:
                input, grad_output, weight = lay(input, offset=3), lay(grad_output, offset=5), lay(weight, (2, 3, 0, 1))
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
            forced = set()
            for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output):
                assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
                forced.add((name, plan))
            *_, height, width = output_size(case)
            plans = {"toeplitz_nchw", "toeplitz_nchw_portable"}
            if height * width >= 512 and (stride == 1 or kernel[0] in (3, 5, 7)):
                assert {("output", plan) for plan in plans} <= forced, str(case)
            if stride == 2 and kernel == (7, 7) and case.multiplier == 1:
                assert {("grad_input", plan) for plan in plans} <= forced, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel", [(9, 9), (7, 7), (5, 5), (3, 3), (8, 2), (7, 1), (1, 7), (6, 4), (2, 3), (4, 9), (3, 5)], ids=str
)
def test_grad_weight_in_channels_last_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Rows of one tile and of several, spans of columns, streams that begin and end anywhere, all paddings."""
    sizes = [(7, 7), (14, 14), (28, 28), (56, 56), (1, 1), (2, 9), (9, 2), (113, 15), (5, 130), (17, 34), (40, 300)]
    for number, size in enumerate(sizes):
        for turn in range(5):
            channels, batch = [32, 96, 40, 37, 66][(number + turn) % 5], [1, 3, 33, 8][(number + turn) % 4]
            padding = [(0, 0), tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel), (0, kernel[1] - 1)]
            padding = padding[turn % 4]
            case = Case(min(batch, 1 + 12000 // (size[0] * size[1])), channels, size, kernel, padding=padding)
            if any(side + 2 * p < k for side, p, k in zip(size, padding, kernel)):
                continue
            input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last, integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=torch.channels_last)
            order = 0, 2, 3, 1
            if turn == 1:
                input, grad_output = lay(input, order, offset=8), lay(grad_output, order, (1, 1, 2, 3))
            elif turn == 2:
                input, grad_output = lay(input, (2, 0, 3, 1), (2, 1, 1, 2), 5), lay(grad_output, order, offset=1)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)
            found = claims("grad_weight", case, input, grad_output)
            whole_units = channels % 8 == 0
            narrow = output_size(case)[3] <= 16 and whole_units
            pays = narrow if kernel == (3, 3) else whole_units if kernel == (5, 5) or kernel[0] > 7 else True
            assert (MATRIX in found) == pays, str(case)
            if MATRIX not in found:
                continue
            for with_bias in (True, False):
                args = grad_output, input, kernel, *arguments_of(case), with_bias, MATRIX
                grad_weight, grad_bias = torch.ops.dwconv.grad_weight.plan(*args)
                assert wrong_numbers(grad_weight, exact.grad_weight.round()) == 0, str(case)
                if with_bias:
                    assert wrong_numbers(grad_bias, exact.grad_bias.round()) == 0, str(case)


LARGE = [
    ((9, 9), (28, 28), 64),
    ((13, 13), (28, 28), 17),
    ((27, 27), (14, 14), 33),
    ((31, 31), (56, 56), 8),
    ((51, 5), (56, 56), 5),
    ((5, 51), (56, 56), 3),
    ((51, 5), (56, 55), 13),
    ((5, 51), (53, 56), 29),
    ((29, 29), (28, 28), 12),
    ((8, 10), (7, 7), 40),
    ((31, 31), (7, 7), 5),
    ((14, 1), (33, 21), 2),
    ((1, 17), (9, 113), 4),
    ((63, 63), (64, 90), 1),
    ((21, 16), (224, 224), 1),
    ((9, 33), (40, 1030), 1),
    ((33, 9), (300, 5), 2),
    ((12, 12), (1, 1), 3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "size", "batch"), LARGE, ids=str)
def test_large_kernels_are_exact(kernel: tuple, size: tuple, batch: int, stride: int, dtype: torch.dtype) -> None:
    for turn in range(7):
        case = Case(batch, 5, size, kernel, (stride, stride), multiplier=1 + turn % 3 // 2, bias=turn != 1)
        if turn > 4:  # whole vectors of channels
            case = case._replace(channels=[64, 24][turn - 5], multiplier=turn - 4)
        padding = [(0, 0), tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel), (0, kernel[1] // 3)]
        case = case._replace(padding=padding[turn % 4])
        if any(side + 2 * p < k for side, k, p in zip(size, kernel, case.padding)):
            continue
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if turn == 1:
            input, grad_output, weight = lay(input, offset=3), lay(grad_output, offset=5), lay(weight, (2, 3, 0, 1))
        elif turn == 2:
            input, grad_output = lay(input, steps=(2, 1, 3, 1), offset=4), lay(grad_output, (1, 0, 2, 3), (1, 2, 1, 1))
        elif turn == 3 or turn > 4:
            input, grad_output = (t.contiguous(memory_format=torch.channels_last) for t in (input, grad_output))
        elif turn == 4:
            input, grad_output = lay(input, (0, 2, 3, 1), (1, 1, 2, 1), 1), lay(grad_output, (0, 2, 3, 1), (1, 1, 1, 3))
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        forced = set()
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, turn > 2):
            assert wrong_numbers(result, exact[name].round()) == 0, (name, plan, str(case), input.stride())
            forced.add((name, plan))
        if math.prod(kernel) <= 40:  # with so little to do other plans may be faster
            continue
        assert ("output", "toeplitz_large") in forced, str(case)
        assert (("grad_input", "toeplitz_large") in forced) == (stride == 1 and case.multiplier == 1), str(case)


def compare_plans(
    case: Case, tensors: tuple, grad_output: Tensor, *plans: str, repeats: int = 1, channels_last: bool = False
) -> int:
    """How many results of these plans there are: all of them exact, and NaN where F.conv2d has it."""
    exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
    compared = 0
    for _ in range(repeats):
        for name, plan, result in results_of_plans(case, tensors, grad_output, channels_last):
            if plan in plans:
                expected = exact[name].to(result).nan_to_num(nan=12345.0)
                assert torch.equal(result.nan_to_num(nan=12345.0), expected), (name, plan, str(case))
                compared += 1
    return compared


# So many planes as wide as a warp's tiles that every slot of a block is filled more than once.
LARGE_PLANES = [
    ((13, 13), (28, 28), 64, 150),
    ((13, 13), (14, 20), 180, 300),
    ((11, 9), (18, 24), 61, 420),  # an odd number of rows above
    ((29, 29), (28, 28), 61, 150),
    ((25, 31), (26, 20), 93, 200),  # three groups of images
    ((23, 17), (22, 24), 31, 300),
    ((29, 29), (27, 26), 33, 190),
    ((29, 29), (28, 28), 47, 150),
    ((37, 35), (28, 26), 31, 190),
    ((21, 25), (31, 32), 45, 160),
    ((15, 17), (9, 30), 93, 300),
    ((27, 27), (14, 14), 61, 280),
    ((21, 31), (56, 52), 23, 140),
    ((35, 39), (52, 56), 23, 140),
    ((57, 51), (56, 56), 15, 100),
    ((5, 51), (56, 56), 23, 140),
    ((51, 5), (56, 56), 21, 140),
    ((50, 4), (51, 42), 12, 150),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "size", "batch", "channels"), LARGE_PLANES, ids=str)
def test_large_kernels_on_many_planes(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, and the same each time."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    for offset in (0, 1, 2, 4, 7):
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, offset=offset), lay(grad_output, offset=offset)
        if offset > 0:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, -1, -1, -1] = torch.inf, torch.nan
        assert compare_plans(case, (input, weight, bias), grad_output, "toeplitz_large", repeats=3) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"), [((29, 29), (28, 28), 61, 152), ((25, 31), (26, 30), 47, 200)], ids=str
)
def test_large_kernels_on_many_planes_in_channels_last(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, also where pixels lie apart; by the weights that the kernel before wrote."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    for offset, beside in ((0, 0), (1, 8)):
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if beside > 0:
            input, grad_output = (torch.cat((t, t[:, :beside]), 1) for t in (input, grad_output))
        input, grad_output = (lay(t, (0, 2, 3, 1), offset=offset)[:, :channels] for t in (input, grad_output))
        if offset > 0:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, -1, -1, -1], tensor[3, 8, 0, 0] = torch.inf, torch.nan, -torch.inf
        tensors = input, weight, bias
        assert compare_plans(case, tensors, grad_output, "toeplitz_large", channels_last=True) == 2
        arguments = *arguments_of(case), "toeplitz_large"
        others = [weight.roll(n, 0) for n in range(8)]
        expected = [torch.ops.dwconv.forward.plan(input, other, bias, *arguments) for other in others]
        weight = weight.clone()
        for other, result in zip(others, expected):
            weight.copy_(other)
            again = torch.ops.dwconv.forward.plan(input, weight, bias, *arguments)
            assert torch.equal(again.nan_to_num(), result.nan_to_num()), str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "padding", "batch", "channels"),
    [
        ((27, 27), (14, 14), (13, 13), 64, 140),
        ((27, 27), (14, 14), (13, 13), 33, 280),
        ((9, 13), (12, 14), (4, 6), 40, 135),  # the last plane is alone
        ((31, 29), (14, 10), (15, 14), 130, 70),  # three groups of images, of which the last has two
        ((63, 17), (14, 14), (31, 8), 200, 301),  # blocks go through several filters of several groups
        ((9, 9), (14, 14), (0, 0), 64, 140),
        ((9, 9), (16, 12), (3, 4), 50, 140),
        ((8, 10), (6, 8), (7, 9), 64, 150),  # more rows and columns than the image has
        ((5, 31), (2, 16), (2, 15), 100, 150),
    ],
    ids=str,
)
def test_large_kernels_on_small_planes_of_many_images(
    kernel: tuple, size: tuple, padding: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, and the same each time."""
    case = Case(batch, channels, size, kernel, padding=padding)
    for spoilt, offset in ((False, 0), (True, 0), (False, 1), (True, 2), (True, 7)):
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, offset=offset), lay(grad_output, offset=offset)
        if spoilt:
            for tensor in (input, grad_output):
                tensor[0, 1, 1, 5], tensor[-1, -1, -1, -1], tensor[3, 2, 0, 0] = torch.inf, torch.nan, -torch.inf
            weight[5, 0, kernel[0] // 2, 0], weight[-1, 0, 0, -1] = torch.inf, torch.nan
        assert compare_plans(case, (input, weight, bias), grad_output, "toeplitz_large", repeats=3) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "padding", "batch", "channels"),
    [
        ((27, 27), (14, 14), (13, 13), 64, 140),
        ((27, 27), (14, 14), (13, 13), 48, 3),  # the last plane is alone
        ((27, 27), (14, 14), (13, 13), 90, 3),
        ((9, 11), (12, 14), (8, 2), 31, 70),
        ((15, 13), (13, 16), (7, 6), 400, 4),  # an odd number of rows
        ((9, 9), (14, 14), (3, 4), 16, 35),  # a gradient of fewer rows
        ((31, 63), (16, 10), (15, 31), 32, 10),
        ((29, 29), (28, 28), (14, 14), 32, 70),
        ((13, 13), (28, 28), (6, 6), 64, 140),
        ((9, 9), (28, 28), (4, 4), 90, 3),  # images are divided where a stage ends
        ((13, 17), (24, 28), (6, 8), 29, 5),
        ((27, 9), (28, 32), (13, 4), 48, 3),
        ((9, 31), (20, 28), (0, 15), 32, 9),
    ],
    ids=str,
)
def test_grad_weight_of_planes_of_few_columns(
    kernel: tuple, size: tuple, padding: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, and the same each time."""
    case = Case(batch, channels, size, kernel, padding=padding)
    for spoilt, multiplier in ((False, 2), (False, 1), (True, 1)):
        case = case._replace(multiplier=multiplier)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if spoilt:
            for tensor in (input, grad_output):
                tensor[0, 1, 1, 5], tensor[-1, -1, -1, -1], tensor[3, 2, 0, 0] = torch.inf, torch.nan, -torch.inf
        assert compare_plans(case, (input, weight, bias), grad_output, "outer_grad_weight", repeats=3) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"),
    [
        ((31, 31), (56, 56), 5, 131),
        ((29, 33), (56, 56), 33, 2),
        ((27, 27), (14, 14), 37, 140),
        ((13, 21), (13, 12), 35, 16),
        ((13, 13), (28, 28), 40, 134),
        ((29, 29), (28, 28), 29, 70),
        ((31, 55), (28, 28), 18, 5),
        ((27, 23), (18, 14), 70, 134),
        ((51, 5), (56, 56), 29, 134),
        ((33, 4), (40, 48), 16, 3),
    ],
    ids=str,
)
def test_grad_weight_of_whole_planes(kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype) -> None:
    """From shared memory as they are, or as copies where they begin anywhere: exact, NaN where F.conv2d has it."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    for offset, multiplier in ((0, 1), (1, 2), (4, 1), (8, 1)):
        case = case._replace(multiplier=multiplier, bias=offset != 8)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, offset=offset), lay(grad_output, offset=offset)
        if offset > 0:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, -1, -1, -1] = torch.inf, torch.nan
        assert compare_plans(case, (input, weight, bias), grad_output, "outer_grad_weight", "hankel_grad_weight") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"),
    [
        ((13, 13), (28, 28), 40, 6),
        ((29, 29), (28, 28), 46, 70),
        ((9, 25), (12, 28), 45, 3),
        ((27, 27), (14, 14), 70, 136),
        ((15, 13), (12, 14), 33, 2),  # planes of whole pieces
        ((13, 17), (26, 14), 40, 2),
        ((51, 5), (56, 56), 27, 6),
        ((33, 4), (40, 48), 30, 3),
        ((5, 51), (56, 56), 27, 6),
        ((7, 31), (72, 48), 29, 3),  # planes in parts
        ((31, 31), (56, 56), 15, 6),
        ((25, 29), (42, 56), 9, 5),
    ],
    ids=str,
)
def test_grad_weight_of_planes_that_begin_anywhere(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Each array at a place of its own: exact, NaN where F.conv2d has it, whatever lies around them."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    for input_offset, grad_offset in ((1, 1), (0, 7), (6, 0), (5, 2), (3, 4)):
        case = case._replace(bias=input_offset != 5)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, offset=input_offset), lay(grad_output, offset=grad_offset)
        if input_offset > 4:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, -1, -1, -1], tensor[2, 0, 0, 0] = torch.inf, torch.nan, -torch.inf
        assert compare_plans(case, (input, weight, bias), grad_output, "outer_grad_weight", "hankel_grad_weight") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "padding", "batch", "channels"),
    [
        ((11, 11), (56, 56), (5, 5), 33, 3),
        ((16, 17), (20, 56), (0, 8), 6, 3),  # few rows of the gradient
        ((17, 23), (56, 48), (8, 11), 5, 135),
        ((31, 31), (56, 56), (15, 15), 64, 2),
        ((25, 29), (42, 56), (12, 14), 9, 137),  # by warpgroups
        ((32, 17), (30, 40), (31, 12), 4, 4),  # narrower than the gradient, and lower
        ((20, 25), (64, 56), (3, 8), 3, 2),  # wider
        ((33, 33), (56, 56), (16, 16), 7, 4),
        ((17, 32), (56, 56), (8, 15), 65, 2),
        ((21, 17), (56, 56), (10, 8), 4, 139),
        ((40, 47), (24, 48), (39, 23), 2, 3),
        ((37, 50), (56, 56), (20, 23), 3, 66),  # in two pieces, side by side
        ((47, 47), (56, 56), (23, 23), 6, 5),
        ((52, 49), (55, 56), (26, 24), 5, 4),
        ((61, 61), (56, 56), (30, 30), 3, 2),
        ((63, 63), (56, 56), (31, 31), 5, 2),
        ((63, 19), (40, 56), (31, 9), 5, 2),  # in two, above each other
        ((12, 99), (20, 56), (6, 49), 5, 3),
    ],
    ids=str,
)
def test_grad_weight_of_pairs_of_planes(
    kernel: tuple, size: tuple, padding: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Rows of up to 56 columns, two images side by side, also the last one of an odd number."""
    case = Case(batch, channels, size, kernel, padding=padding)
    for spoilt, multiplier in ((False, 2), (True, 1)):
        case = case._replace(multiplier=multiplier)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        if spoilt:
            input[0, 1, 3, 5], input[-1, -1, -1, -1] = torch.inf, torch.nan
            grad_output[-1, 0, 0, 0], grad_output[0, -1, 2, -1] = torch.inf, torch.nan
        assert compare_plans(case, (input, weight, bias), grad_output, "hankel_grad_weight") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 24, (14, 14), (63, 63), padding=(31, 31)),
        Case(37, 40, (14, 14), (31, 29), padding=(15, 14)),
        Case(3, 16, (12, 15), (27, 60), padding=(20, 44)),  # on one side alone are they wanted
        Case(2, 16, (7, 9), (21, 33), padding=(13, 20), multiplier=2),
        Case(4, 24, (20, 1), (13, 9), padding=(6, 4)),
        Case(3, 16, (13, 14), (3, 3), padding=(24, 24), dilation=(24, 24)),
        Case(3, 16, (9, 11), (5, 7), padding=(12, 8), dilation=(7, 4)),
    ],
    ids=str,
)
def test_taps_too_far_from_all_pixels(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """They are left out: exact, zero where a gradient is one of theirs, NaN where F.conv2d has it, in any layout."""
    for spoilt in (False, True):
        input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, make=integers)
        weight = lay(weight, (2, 3, 0, 1), (1, 2, 1, 1))
        grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
        if spoilt:
            input[0, 1, 3, 0], grad_output[-1, -1, -1, -1], weight[2, 0, 0, 0] = torch.inf, torch.nan, torch.nan
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        channels_last = memory_format == torch.channels_last
        for name, plan, result in results_of_plans(case, (input, weight, bias), grad_output, channels_last):
            expected = exact[name].to(result).nan_to_num(nan=12345.0)
            assert torch.equal(result.nan_to_num(nan=12345.0), expected), (name, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"),
    [
        ((31, 31), (57, 57), 5, 40),
        ((1, 7), (37, 37), 4, 110),
        ((21, 20), (31, 39), 14, 35),  # gradients of even rows
        ((12, 9), (40, 13), 40, 30),  # images side by side
        ((16, 18), (9, 301), 11, 20),
    ],
    ids=str,
)
def test_grad_weight_of_many_rows_of_odd_length(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """As copies whose rows begin with 16 bytes: exact, NaN where F.conv2d has it."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    for turn in range(3):
        case = case._replace(bias=turn != 1, multiplier=1 + turn % 2)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        order = (0, 2, 3, 1) if turn == 2 else None
        input, grad_output = lay(input, order, offset=turn), lay(grad_output, order, offset=turn)
        if turn > 0:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, -1], tensor[-1, -1, -1, -1], tensor[2, 0, 0, 0] = torch.inf, torch.nan, -torch.inf
        assert compare_plans(case, (input, weight, bias), grad_output, "outer_grad_weight", "hankel_grad_weight") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel", [(31, 31), (27, 29), (13, 9), (8, 8), (51, 5), (5, 51), (1, 63), (63, 2), (20, 40), (63, 63)], ids=str
)
def test_grad_weight_of_large_kernels_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Whole planes and pieces of them, one image and many, images side by side, odd widths, padding of all sizes."""
    sizes = [(56, 56), (28, 28), (14, 14), (7, 7), (1, 1), (57, 33), (112, 20), (3, 130), (140, 12), (224, 100)]
    for number, size in enumerate(sizes):
        for turn in range(4):
            batch = [1, 5, 37][(number + turn) % 3] if size[0] * size[1] < 4000 else 2
            padding = [(0, 0), tuple(k // 2 for k in kernel), tuple(k - 1 for k in kernel)][turn % 3]
            if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel)):
                continue
            case = Case(batch, 3, size, kernel, padding=padding, multiplier=1 + number % 2, bias=turn != 1)
            memory_format = torch.channels_last if turn == 3 else torch.contiguous_format
            input, weight, bias = make_inputs(case, dtype, "cuda", memory_format, make=integers)
            grad_output = integers(*output_size(case)).to(input).contiguous(memory_format=memory_format)
            if turn == 1:
                input, grad_output = lay(input, offset=3), lay(grad_output, (1, 0, 2, 3), (1, 2, 3, 1), offset=5)
            exact = run_float64((input, weight, bias), grad_output, **case.geometry)
            found = claims("grad_weight", case, input, grad_output)
            assert "hankel_grad_weight" in found, str(case)
            for plan in found[:-1]:
                args = grad_output, input, kernel, *arguments_of(case), bias is not None, plan
                grad_weight, grad_bias = torch.ops.dwconv.grad_weight.plan(*args)
                assert wrong_numbers(grad_weight, exact.grad_weight.round()) == 0, (plan, str(case))
                assert bias is None or wrong_numbers(grad_bias, exact.grad_bias.round()) == 0, (plan, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"),
    [
        ((13, 13), (28, 28), 23, 264),
        ((9, 15), (45, 25), 16, 16),
        ((16, 14), (30, 19), 37, 24),
        ((11, 12), (140, 32), 12, 40),
        ((15, 16), (20, 17), 70, 32),
        ((13, 13), (28, 28), 12, 2120),
        ((5, 51), (56, 56), 16, 136),
        ((51, 5), (56, 56), 33, 40),
        ((29, 29), (28, 28), 32, 40),
        ((27, 27), (14, 14), 37, 44),
        ((27, 27), (14, 14), 37, 40),
        ((13, 15), (10, 13), 35, 72),
        ((15, 15), (28, 28), 35, 72),
        ((11, 11), (56, 56), 13, 136),  # spans of columns
        ((16, 9), (60, 23), 27, 72),
        ((14, 12), (30, 83), 25, 72),
    ],
    ids=str,
)
def test_grad_weight_of_large_kernels_in_channels_last(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """As they lie, beside each other or apart, from anywhere on: exact, NaN where F.conv2d has it."""
    case = Case(batch, channels, size, kernel, padding=tuple(k // 2 for k in kernel))
    order = (0, 2, 3, 1)
    for turn, (step, *offsets) in enumerate([(1, 0, 8), (2, 8, 8), (1, 1, 6), (2, 3, 8)]):
        case = case._replace(bias=turn != 1)
        input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
        grad_output = integers(*output_size(case)).to(input)
        input, grad_output = lay(input, order, (step, 1, 1, 1), offsets[0]), lay(grad_output, order, offset=offsets[1])
        if turn > 0:
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, 2, 0, -1], tensor[-1, -1, -1, -1] = torch.inf, -torch.inf, torch.nan
        plans = "outer_grad_weight", "hankel_grad_weight"
        assert compare_plans(case, (input, weight, bias), grad_output, *plans) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_weight_of_large_kernels_repeats_bit_for_bit(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for case in (
        Case(16, 24, (56, 56), (31, 31), padding=(15, 15)),
        Case(16, 24, (14, 14), (27, 27), padding=(13, 13)),
        Case(48, 24, (28, 28), (13, 13), padding=(6, 6)),
        Case(32, 136, (28, 28), (29, 29), padding=(14, 14)),
        Case(48, 24, (56, 56), (51, 5), padding=(25, 2)),
        Case(2, 8, (224, 224), (13, 13), padding=(6, 6)),
    ):
        input, _, _ = make_inputs(case, dtype, "cuda", memory_format)
        grad_output = torch.randn(output_size(case), device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        for plan in claims("grad_weight", case, input, grad_output)[:-1]:
            args = grad_output, input, case.kernel, *arguments_of(case), True, plan
            first = torch.ops.dwconv.grad_weight.plan(*args)
            for _ in range(100):
                assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.dwconv.grad_weight.plan(*args))), plan


# Strides and dilations, with and without a common divisor, on images that leave some phases smaller than others.
PHASES = [
    Case(6, 40, (45, 62), (13, 12), padding=(12, 11), dilation=(2, 2)),
    Case(3, 32, (64, 64), (15, 15), padding=(20, 21), dilation=(3, 3), bias=False),
    Case(1, 128, (80, 81), (11, 13), padding=(10, 6), dilation=(2, 1)),
    Case(3, 24, (59, 70), (13, 13), padding=(12, 6), dilation=(2, 2), multiplier=2),
    Case(8, 48, (61, 58), (17, 14), (2, 2), (8, 6)),
    Case(16, 64, (90, 85), (15, 14), (3, 3), (14, 12), (2, 2)),
    Case(4, 48, (90, 88), (15, 14), (2, 2), (13, 14), (2, 2)),
    Case(40, 64, (60, 90), (12, 13), (4, 2), (11, 18), (2, 3), bias=False),
    Case(12, 64, (64, 64), (9, 15), (2, 1), (4, 14), (1, 2)),
    Case(16, 48, (72, 76), (24, 32), (3, 4), multiplier=2),
    Case(16, 48, (21, 30), (14, 14), padding=(52, 39), dilation=(4, 3)),
    Case(3, 45, (90, 84), (14, 14), padding=(13, 13), dilation=(2, 2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("case", PHASES, ids=str)
def test_phases_are_exact(case: Case, dtype: torch.dtype) -> None:
    """In any layout, with NaN where F.conv2d has it."""
    for turn in range(4):
        channels_last = turn % 2 > 0
        tensors = make_inputs(case, dtype, "cuda", FORMATS[channels_last], make=integers)
        grad_output = integers(*output_size(case)).to(tensors[0]).contiguous(memory_format=FORMATS[channels_last])
        input, weight, bias = tensors
        if turn == 2:
            input, grad_output = (
                lay(input, steps=(1, 2, 1, 1), offset=1),
                lay(grad_output, (1, 0, 2, 3), (1, 1, 2, 1), 3),
            )
            for tensor in (input, grad_output):
                tensor[0, 1, 3, 5], tensor[-1, 2, 0, -1], tensor[-1, -1, -1, -1] = torch.inf, -torch.inf, torch.nan
        elif turn == 3:
            input = lay(input, (0, 2, 3, 1), (2, 1, 1, 1), 3)
            weight[1, 0, 0, 0], weight[2, 0, -1, -1], weight[5, 0, 3, 4] = torch.inf, -torch.inf, torch.nan
        compared = compare_plans(case, (input, weight, bias), grad_output, "phases", channels_last=channels_last)
        taps = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(case.kernel, case.stride, case.dilation))
        assert (compared > 0) == (dtype != torch.float32 or taps >= 49), str(case)  # float32 needs many taps of a phase


def test_what_makes_phases() -> None:
    """Those that other plans serve without a stride and a dilation, where there is much to compute."""
    case = Case(8, 64, (64, 64), (15, 15), padding=(14, 14), dilation=(2, 2))
    for dtype, memory_format, name in product(FAST, FORMATS, PASSES):
        assert plan_of(name, case, dtype, memory_format) == "phases"
        assert plan_of(name, case._replace(batch=0), dtype, memory_format) == "generic"
    for name in PASSES:
        assert "phases" not in plans_of(name, case, torch.float64)
        assert "phases" not in plans_of(name, case._replace(size=(9, 9), batch=1, channels=1))
        assert "phases" not in plans_of(name, case._replace(size=(2**21, 64), batch=1, channels=1))
        assert "phases" not in plans_of(name, case._replace(kernel=(5, 5), padding=(4, 4)))  # in float32
    assert "phases" not in plans_of("forward", case._replace(stride=(3, 3), dilation=(1, 1)), torch.bfloat16)
    assert "phases" not in plans_of("grad_input", case._replace(multiplier=2), torch.bfloat16)


# Kernels, strides and dilations that nothing is compiled for.
WINDOWS_OF_PLANES = [
    ((3, 3), (3, 3), (1, 1)),
    ((5, 4), (2, 3), (1, 2)),
    ((7, 7), (4, 4), (2, 2)),
    ((2, 9), (3, 1), (1, 3)),
    ((31, 1), (2, 2), (1, 1)),
    ((1, 25), (3, 3), (1, 1)),
    ((14, 15), (2, 2), (1, 1)),
    ((17, 27), (1, 1), (3, 2)),
    ((4, 4), (4, 6), (6, 4)),
    ((1, 1), (2, 3), (1, 1)),
    ((2, 3), (9, 5), (1, 1)),  # rows and columns that nothing meets
    ((12, 11), (1, 1), (1, 1)),
]


def test_windows_of_planes_claims() -> None:
    for kernel, stride, dilation in WINDOWS_OF_PLANES:
        case = Case(2, 4, (80, 90), kernel, stride, (1, 2), dilation)
        for name, dtype in product(PASSES[:2], [*FAST, torch.float64]):
            input, output = meta((2, 4, 80, 90), dtype), meta(output_size(case), dtype)
            assert "windows_nchw" in claims(name, case, input, output), (name, str(case))
            assert "windows_nchw" in claims(name, case, lay(input, steps=(1, 2, 1, 3)), lay(output, steps=(2, 1, 2, 1)))
            target = {"input" if name == "grad_input" else "output": torch.channels_last}
            input = input.contiguous(memory_format=target.get("input", torch.contiguous_format))
            output = output.contiguous(memory_format=target.get("output", torch.contiguous_format))
            assert "windows_nchw" not in claims(name, case, input, output), (name, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("window", WINDOWS_OF_PLANES, ids=str)
def test_windows_of_planes_are_exact(window: tuple, dtype: torch.dtype) -> None:
    """Few planes and many, whole ones and bands, rows too long for a tile, all padding, views; NaN where it belongs."""
    kernel, stride, dilation = window
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    shapes = [(1, 2, 40, 50), (2, 3, 9, 13), (3, 50, 17, 7), (1, 2, 150, 90), (1, 1, 60, 9000), (40, 60, 12, 14)]
    for number, (batch, channels, *size) in enumerate(shapes):
        for turn, padding in enumerate([(0, 0), (extent[0] // 2, extent[1] // 2), (extent[0] + 1, extent[1] - 1)]):
            if any(side + 2 * p < e for side, p, e in zip(size, padding, extent)):
                continue
            multiplier, bias = 1 + (number + turn) % 3, turn != 1
            case = Case(batch, channels, tuple(size), kernel, stride, padding, dilation, multiplier, bias)
            input, weight, bias = make_inputs(case, dtype, "cuda", make=integers)
            grad_output = integers(*output_size(case)).to(input)
            if turn == 1 and number < 4:
                weight[-1, 0, 0, 0] = torch.inf
                input[0, 0, -1, size[1] // 2], grad_output[-1, -1, 0, 0] = torch.nan, -torch.inf
            layouts = [
                lambda t: t,
                lambda t: lay(t, offset=1),
                lambda t: lay(t, steps=(1, 2, 2, 1), offset=3),
                lambda t: lay(t, (0, 1, 3, 2)),
                lambda t: lay(t, steps=(2, 1, 1, 2), offset=1),
            ]
            layout = layouts[(number + 2 * turn) % len(layouts)]
            tensors, grad_output = (layout(input), lay(weight, (2, 3, 0, 1), (1, 2, 1, 1)), bias), layout(grad_output)
            found = sum(
                "windows_nchw" in claims(*arguments)
                for arguments in (
                    ("forward", case, tensors[0], torch.empty_like(grad_output).contiguous()),
                    ("grad_input", case, torch.empty_like(input), grad_output),
                )
            )
            assert found == 2 or (dtype == torch.float64 and stride == (1, 1)), str(case)
            assert compare_plans(case, tensors, grad_output, "windows_nchw") == found, str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
def test_windows_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    for case in (
        Case(2, 3, (20, 20), (27, 27), (2, 2), (39, 39), (3, 3)),
        Case(8, 40, (40, 40), (9, 9), (2, 2), (4, 4)),
        Case(2, 8, (60, 70), (2, 2), (2, 2)),
    ):
        input, weight, bias = make_inputs(case, dtype, "cuda")
        grad_output = torch.randn(output_size(case), device="cuda", dtype=dtype)
        ops, arguments = torch.ops.dwconv, arguments_of(case)

        def results() -> list[Tensor]:
            return [
                ops.forward.plan(input, weight, bias, *arguments, "windows_nchw"),
                ops.grad_input.plan(grad_output, weight, input.shape, *arguments, False, "windows_nchw"),
            ]

        first = results()
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first, results()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("plan", ["", "_portable"])
@pytest.mark.parametrize("family", ["stream", "toeplitz"])
def test_streams_repeat_bit_for_bit(family: str, plan: str, dtype: torch.dtype) -> None:
    if family == "toeplitz" and dtype == torch.float32:
        pytest.skip("tensor cores serve 16 bits")
    side = 3 if family == "stream" else 7
    case = Case(16, 24, (56, 60), (side, side), padding=(side // 2, side // 2))
    input, weight, bias = make_inputs(case, dtype, "cuda")
    grad_output = torch.randn(output_size(case), device="cuda", dtype=dtype)
    ops, arguments = torch.ops.dwconv, arguments_of(case)

    def results() -> list[Tensor]:
        return [
            ops.forward.plan(input, weight, bias, *arguments, f"{family}_nchw{plan}"),
            ops.grad_input.plan(grad_output, weight, input.shape, *arguments, False, f"{family}_nchw{plan}"),
            *ops.grad_weight.plan(
                grad_output, input, case.kernel, *arguments, True, f"{family}_grad_weight_nchw{plan}"
            ),
        ]

    first = results()
    for _ in range(300):
        assert all(torch.equal(a, b) for a, b in zip(first, results()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_marches_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    for case in (Case(16, 24, (56, 60), (3, 3), padding=(1, 1)), Case(5, 37, (40, 50), (5, 5), multiplier=2)):
        input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last)
        grad_output = torch.randn(output_size(case), device="cuda", dtype=dtype)
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        ops, arguments = torch.ops.dwconv, arguments_of(case)

        def results() -> list[Tensor]:
            return [
                ops.forward.plan(input, weight, bias, *arguments, MARCH["forward"]),
                ops.grad_input.plan(grad_output, weight, input.shape, *arguments, True, MARCH["grad_input"]),
                *ops.grad_weight.plan(grad_output, input, case.kernel, *arguments, True, MARCH["grad_weight"]),
            ]

        first = results()
        for _ in range(300):
            assert all(torch.equal(a, b) for a, b in zip(first, results()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(14, 14), (56, 60)], ids=str)
def test_toeplitz_channels_last_repeats_bit_for_bit(size: tuple, dtype: torch.dtype) -> None:
    kernels = ((5, 5), (7, 7), (9, 9), (13, 13), (5, 31), (31, 5), *(((27, 27),) if size[0] == 14 else ()))
    cases = [Case(16, 200, size, kernel, padding=tuple(k // 2 for k in kernel)) for kernel in kernels]
    cases += [Case(16, 72, size, (7, 7), stride=(2, 2), padding=(3, 3), multiplier=2)]
    for case in cases:
        input, weight, bias = make_inputs(case, dtype, "cuda", torch.channels_last)
        first = torch.ops.dwconv.forward.plan(input, weight, bias, *arguments_of(case), BAND)
        for _ in range(300):
            again = torch.ops.dwconv.forward.plan(input, weight, bias, *arguments_of(case), BAND)
            assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "channels"), [(3, 14, 64), (5, 28, 40), (7, 28, 37), (7, 7, 96), (7, 56, 96), (9, 28, 64)]
)
def test_grad_weight_in_channels_last_repeats_bit_for_bit(
    kernel: int, size: int, channels: int, dtype: torch.dtype
) -> None:
    case = Case(16, channels, (size, size), (kernel, kernel), padding=(kernel // 2, kernel // 2))
    input, _, _ = make_inputs(case, dtype, "cuda", torch.channels_last)
    grad_output = torch.randn_like(input)
    args = grad_output, input, case.kernel, *arguments_of(case), True, MATRIX
    first = torch.ops.dwconv.grad_weight.plan(*args)
    for _ in range(300):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.dwconv.grad_weight.plan(*args)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_that_marches(spoilt: bool, dtype: torch.dtype) -> None:
    """Pixels that fit no 16 bytes, in splits of few rows and of several images; planes of which all rows are known."""
    for side, padding, batch, channels, size in (
        (5, (2, 2), 7, 37, (113, 95)),
        (5, (0, 3), 5, 6, (9, 30)),
        (5, (4, 1), 300, 37, (3, 17)),
        (5, (3, 0), 2, 130, (70, 14)),
        (7, (3, 3), 33, 520, (7, 7)),
        (7, (3, 3), 5, 40, (7, 7)),
        (7, (2, 3), 6, 40, (7, 7)),
    ):
        case = tile_case(((side, side), 1, 1), batch, channels, size)._replace(padding=padding)
        check_grad_weight(case, MARCH["grad_weight"], dtype, spoilt)
