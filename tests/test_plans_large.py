"""Plans for large kernels in 16 bits, on tensor cores, and their grad_weight; test_large_float32.py has float32.

First what they claim, then each forced.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import FORMATS, Case, halves, reach_of
from exact import arguments_of, lay, output_size
from plans import (
    HALF,
    LAST,
    PASSES,
    TAPS_FIRST,
    WALK,
    WINDOWS,
    Problem,
    check_layouts,
    general,
    meta,
    plan_of,
    plans_of,
    stays_large,
)

LARGE = "toeplitz_large"
OUTER, HANKEL = "outer_grad_weight", "hankel_grad_weight"

# ---------------------------------------------------------------------------- claims


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_large_kernels(name: str, dtype: torch.dtype) -> None:
    """Any size of kernel and image; rows, planes and images may lie apart, and channels side by side.

    But where few taps are to be multiplied not with a copy of the images, or with rows of an odd length.
    """
    for kernel in ((8, 3), (12, 12), (3, 10), (31, 31), (51, 5), (5, 51), (63, 63), (1, 18)):
        for size in ((64, 64), (113, 95), (7, 7), (9, 900)):
            for padding in (halves(kernel), reach_of(kernel)):
                case = Case(2, 4, size, kernel, padding=padding)
                widths = size[1], output_size(case)[3]
                for memory_format in FORMATS:
                    copies = memory_format == torch.channels_last
                    few = math.prod(kernel) <= 40 and (copies or any(width % 2 for width in widths))
                    found = plan_of(name, case, dtype, memory_format)
                    if few or not copies:
                        assert found == (general(name, memory_format) if few else LARGE), str(case)
                    many = case._replace(batch=2**18)
                    few_for_copies = copies and math.prod(kernel) <= 32
                    assert (LARGE in plans_of(name, many, dtype, memory_format)) != few_for_copies, str(many)
    for batch, expected in ((2, WINDOWS), (64, LARGE)):  # few products are done before copies of the images are there
        assert plan_of(name, Case(batch, 4, (64, 64), (12, 12)), dtype, torch.channels_last) == expected
    assert LARGE not in plans_of(name, Case(2, 4, (1, 1), (12, 12), padding=(6, 6)), dtype)  # of which one tap is left
    column = Case(64, 8, (64, 64), (25, 1), padding=(12, 0))  # of whose band matrices most is zeros
    assert plan_of(name, column, dtype) == "windows_nchw"
    case = Case(2, 4, (24, 24), (13, 13), padding=(6, 6))
    plain = meta((2, 4, 24, 24), dtype)
    check_layouts(
        LARGE,
        name,
        case,
        plain,
        claimed=[
            lay(plain, offset=3),
            lay(plain, steps=(2, 3, 2, 1)),
            lay(plain, (1, 0, 2, 3), (1, 1, 3, 1), 1),
            lay(plain, expanded=(0,)),
            lay(plain, LAST, (1, 1, 3, 2), 1),
        ],
        refused=[
            lay(plain, LAST, (1, 2, 1, 1)),
            lay(plain, steps=(1, 1, 1, 2)),
            plain.mT,
        ],
    )
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
        expected = LARGE if serves else "generic" if nothing_fits else "windows_nchw"
        assert plan_of(name, case._replace(**change), dtype) == expected, change
    assert plan_of(name, case._replace(batch=64), torch.float32) == "large_float32"
    assert plan_of(name, case, torch.float32) == plan_of(name, case, torch.float64) == "windows_nchw"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_hankel_grad_weight_claims(dtype: torch.dtype) -> None:
    """Any kernel at stride 1, in 16 bits; rows without gaps, which may lie anywhere."""
    plan, case = HANKEL, Case(4, 8, (56, 57), (31, 31), padding=(15, 15))
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
    check_layouts(
        plan,
        "grad_weight",
        case,
        plain,
        claimed=[
            lay(plain, offset=3),
            lay(plain, (1, 0, 2, 3), steps=(2, 1, 3, 1)),
            lay(plain, expanded=(0, 2)),
            meta((4, 20, 60, 64), dtype)[:, 5:13, 2:58, 3:60],
            lay(plain, LAST),
            meta((4, 20, 56, 60), dtype, torch.channels_last)[:, 5:13, :, :57],
        ],
        refused=[
            lay(plain, steps=(1, 1, 1, 2)),
            plain.mT.contiguous().mT,
            lay(plain, LAST, steps=(1, 2, 1, 1)),
        ],
    )
    far = Case(2**26, 8, (56, 57), (31, 31), padding=(15, 15))
    assert plan_of("grad_weight", far, dtype) == "generic"


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_outer_grad_weight_claims(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Few columns, or few rows of the kernel; of so many images that a multiplication has some of them."""
    case = Case(64, 32, (14, 14), (27, 27), padding=(13, 13))
    for change, plan in (
        ({}, OUTER),
        ({"size": (16, 7), "multiplier": 2}, OUTER),
        ({"batch": 8}, OUTER),
        ({"batch": 7}, HANKEL),
        ({"size": (17, 14)}, OUTER),
        ({"size": (17, 14), "batch": 8}, HANKEL),
        ({"padding": (14, 15)}, OUTER),  # a gradient of 16 x 18
        ({"size": (28, 28), "kernel": (29, 29), "padding": (14, 14), "batch": 12}, OUTER),
        ({"size": (28, 28), "kernel": (29, 29), "padding": (14, 14), "batch": 20}, HANKEL),
        ({"size": (33, 28), "kernel": (33, 29), "padding": (16, 14)}, HANKEL),  # 33 rows of the kernel
        ({"size": (32, 32), "kernel": (32, 3), "padding": (16, 1)}, OUTER),
        ({"size": (33, 33), "kernel": (31, 31), "padding": (15, 15)}, HANKEL),
        ({"size": (56, 56), "kernel": (5, 51), "padding": (2, 25)}, OUTER),
        ({"size": (200, 56), "kernel": (5, 51), "padding": (2, 25)}, OUTER),
        ({"size": (56, 57), "kernel": (5, 51), "padding": (2, 25)}, HANKEL),
        ({"size": (56, 56), "kernel": (11, 51), "padding": (5, 25)}, HANKEL),
    ):
        found = plans_of("grad_weight", case._replace(**change), dtype, memory_format)
        assert next(name for name in found if name != "columns_grad_weight") == plan, change
        assert plan_of("grad_weight", case._replace(**change), dtype, memory_format) == plan, change
    few = "columns_grad_weight" if memory_format == torch.contiguous_format else WALK
    assert plan_of("grad_weight", Case(7, 8, (14, 14), (7, 6), padding=(3, 3)), dtype, memory_format) == few
    # Rows and columns are exchanged, by the copies or by the kernel.
    for size, plan in (((56, 56), OUTER), ((57, 56), HANKEL)):
        tall = case._replace(size=size, kernel=(51, 5), padding=(25, 2))
        assert plan_of("grad_weight", tall, dtype, memory_format) == plan, size


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_kernels_of_few_columns(name: str, dtype: torch.dtype) -> None:
    """On many planes of 28 columns toeplitz_nchw has those with rows that its warps have registers for."""
    case = Case(64, 192, (28, 28), (11, 9), padding=(5, 4))
    assert plan_of(name, case, dtype) == LARGE
    for other in (case._replace(batch=8), case._replace(kernel=(9, 9), padding=(4, 4)), case._replace(size=(28, 30))):
        assert plan_of(name, other, dtype) == "toeplitz_nchw", str(other)


# ---------------------------------------------------------------------------- output and grad_input

# Kernel, size, batch: planes of all sorts, smaller than the kernel and larger than a tile.
PLANES = [
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
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "size", "batch"), PLANES, ids=str)
def test_large_kernels_are_exact(kernel: tuple, size: tuple, batch: int, stride: int, dtype: torch.dtype) -> None:
    for turn in range(7):
        channels, multiplier = 5, 1 + turn % 3 // 2
        if turn > 4:  # whole vectors of channels
            channels, multiplier = [64, 24][turn - 5], turn - 4
        padding = [(0, 0), halves(kernel), reach_of(kernel), (0, kernel[1] // 3)][turn % 4]
        case = Case(batch, channels, size, kernel, (stride, stride), padding, multiplier=multiplier, bias=turn != 1)
        if not case.has_outputs:
            continue
        problem = Problem(case, dtype, FORMATS[turn > 2])
        if turn == 1:
            problem.lay({"offset": 3}, {"offset": 5}, TAPS_FIRST)
        elif turn == 2:
            problem.lay({"steps": (2, 1, 3, 1), "offset": 4}, {"order": (1, 0, 2, 3), "steps": (1, 2, 1, 1)})
        elif turn == 4:
            problem.lay({"steps": (1, 1, 2, 1), "offset": 1}, {"steps": (1, 1, 1, 3)})
        forced = problem.check()
        if math.prod(kernel) > 40 and (stride > 1 or stays_large(case)):  # with less to do other plans may be faster
            assert LARGE in forced["output"], problem
            assert (LARGE in forced["grad_input"]) == (stride == 1 and multiplier == 1), problem


# So many planes as wide as a warp's tiles that every slot of a block is filled more than once.
LARGE_PLANES = [
    ((13, 13), (28, 28), 64, 150),
    ((13, 13), (14, 20), 180, 300),
    ((9, 9), (28, 28), 61, 80),
    ((11, 9), (18, 24), 61, 420),  # an odd number of rows above
    ((29, 29), (28, 28), 61, 150),
    ((25, 31), (26, 20), 93, 200),  # three groups of images
    ((23, 17), (22, 24), 31, 300),
    ((29, 29), (27, 26), 33, 190),
    ((29, 29), (28, 28), 47, 150),
    ((37, 35), (28, 26), 31, 190),
    ((21, 25), (31, 32), 45, 160),
    ((19, 21), (28, 27), 45, 150),  # an odd number of columns
    ((15, 17), (9, 30), 93, 300),
    ((27, 27), (14, 14), 61, 280),
    ((15, 15), (14, 14), 31, 560),
    ((21, 31), (56, 52), 23, 140),
    ((35, 39), (52, 56), 23, 140),
    ((57, 51), (56, 56), 15, 100),
    ((5, 51), (56, 56), 23, 140),
    ((51, 5), (56, 56), 21, 140),
    ((50, 4), (51, 42), 12, 150),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kernel", "size", "batch", "channels"), LARGE_PLANES, ids=str)
def test_large_kernels_on_many_planes(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, and the same each time."""
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for offset in (0, 1, 2, 4, 7):
        problem = Problem(case, dtype)
        problem.lay({"offset": offset}, {"offset": offset})
        if offset > 0:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), (2, 0, 4, -1))
        assert problem.check(LARGE, repeats=3)["output"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "stride", "batch", "channels"),
    [
        ((21, 21), (27, 27), 1, 45, 152),  # whole planes
        ((9, 9), (13, 13), 1, 64, 130),  # many images together
        ((17, 17), (45, 45), 1, 3, 7),
        ((9, 11), (41, 45), 1, 30, 64),  # much to store
        ((9, 12), (37, 28), 1, 5, 3),  # of the output alone
        ((9, 13), (37, 41), 2, 5, 6),
        ((9, 8), (9, 9), 1, 40, 13),
    ],
    ids=str,
)
def test_large_kernels_on_rows_of_odd_length(
    kernel: tuple,
    size: tuple,
    stride: int,
    batch: int,
    channels: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    """Exact, NaN where F.conv2d has it: no tap meets what is behind a row."""
    case = Case(batch, channels, size, kernel, (stride, stride), halves(kernel))
    for offset in (0, 1):
        problem = Problem(case, dtype, memory_format)
        problem.lay({"offset": offset}, {"offset": offset})
        if offset > 0:
            problem.spoil((0, 1, 0, 5), (-1, -1, -1, -1))
            problem.spoil((1, 0, -1, -1), (2, 0, 0, 0), (-1, 0, 3, 0), of=["weight"])
        forced = problem.check(LARGE)
        assert forced["output"] and (stride > 1 or forced["grad_input"]), problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "batch", "channels"),
    [((29, 29), (28, 28), 61, 152), ((25, 31), (26, 30), 47, 200), ((21, 21), (27, 27), 61, 152)],
    ids=str,
)
def test_large_kernels_on_many_planes_in_channels_last(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Exact, NaN where F.conv2d has it, also where pixels lie apart; by the weights that the kernel before wrote."""
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for offset, beside in ((0, 0), (1, 8)):
        problem = Problem(case, dtype, torch.channels_last)
        for name in ("input", "grad_output"):
            tensor = getattr(problem, name)
            tensor = torch.cat((tensor, tensor[:, :beside]), 1)
            setattr(problem, name, lay(tensor, LAST, offset=offset)[:, :channels])
        if offset > 0:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), (3, 8, 0, 0))
        forced = problem.check(LARGE)
        assert forced["output"] and forced["grad_input"], problem
        arguments = *arguments_of(case), LARGE
        others = [problem.weight.roll(n, 0) for n in range(8)]
        expected = [torch.ops.dwconv.forward.plan(problem.input, w, problem.bias, *arguments) for w in others]
        weight = problem.weight.clone()
        for other, result in zip(others, expected):
            weight.copy_(other)
            again = torch.ops.dwconv.forward.plan(problem.input, weight, problem.bias, *arguments)
            assert torch.equal(again.nan_to_num(), result.nan_to_num()), problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
        problem = Problem(case, dtype)
        problem.lay({"offset": offset}, {"offset": offset})
        if spoilt:
            problem.spoil((0, 1, 1, 5), (-1, -1, -1, -1), (3, 2, 0, 0))
            problem.spoil((5, 0, kernel[0] // 2, 0), (-1, 0, 0, -1), of=["weight"])
        forced = problem.check(LARGE, repeats=3)
        assert forced["output"] and forced["grad_input"], problem


# ---------------------------------------------------------------------------- grad_weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "kernel", [(31, 31), (27, 29), (13, 9), (8, 8), (51, 5), (5, 51), (1, 63), (63, 2), (20, 40), (63, 63)], ids=str
)
def test_grad_weight_of_large_kernels_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Whole planes and pieces of them, one image and many, images side by side, odd widths, padding of all sizes."""
    sizes = [(56, 56), (28, 28), (14, 14), (7, 7), (1, 1), (57, 33), (112, 20), (3, 130), (140, 12), (224, 100)]
    for number, size in enumerate(sizes):
        for turn in range(4):
            batch = [1, 5, 37][(number + turn) % 3] if size[0] * size[1] < 4000 else 2
            padding = [(0, 0), halves(kernel), reach_of(kernel)][turn % 3]
            case = Case(batch, 3, size, kernel, padding=padding, multiplier=1 + number % 2, bias=turn != 1)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype, FORMATS[turn == 3])
            if turn == 1:
                problem.lay({"offset": 3}, {"order": (1, 0, 2, 3), "steps": (1, 2, 3, 1), "offset": 5})
            assert HANKEL in problem.check(".*grad_weight.*")["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
        problem = Problem(case._replace(multiplier=multiplier), dtype)
        if spoilt:
            problem.spoil((0, 1, 1, 5), (-1, -1, -1, -1), (3, 2, 0, 0))
        assert problem.check(OUTER, repeats=3)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for offset, multiplier in ((0, 1), (1, 2), (4, 1), (8, 1)):
        problem = Problem(case._replace(multiplier=multiplier, bias=offset != 8), dtype)
        problem.lay({"offset": offset}, {"offset": offset})
        if offset > 0:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1))
        assert problem.check(OUTER, HANKEL)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
        ((25, 9), (56, 56), 29, 3),  # one piece of a Hankel matrix
        ((10, 14), (45, 48), 27, 3),
        ((17, 17), (29, 29), 19, 3),  # rows of an odd length
        ((15, 13), (26, 21), 40, 3),
        ((11, 31), (30, 37), 29, 3),
    ],
    ids=str,
)
def test_grad_weight_of_planes_that_begin_anywhere(
    kernel: tuple, size: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Each array at a place of its own: exact, NaN where F.conv2d has it, whatever lies around them."""
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for input_offset, grad_offset in ((1, 1), (0, 7), (6, 0), (5, 2), (3, 4)):
        problem = Problem(case._replace(bias=input_offset != 5), dtype)
        problem.lay({"offset": input_offset}, {"offset": grad_offset})
        if input_offset > 4:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), (2, 0, 0, 0))
        assert problem.check(OUTER, HANKEL)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
        ((13, 13), (56, 56), (6, 6), 37, 5),  # 16 columns of the kernel
        ((9, 15), (43, 48), (4, 7), 5, 3),  # planes of 48 columns
        ((37, 12), (50, 48), (18, 5), 3, 70),
        ((31, 31), (48, 48), (15, 15), 9, 4),
        ((21, 17), (56, 56), (10, 8), 4, 139),
        ((40, 47), (24, 48), (39, 23), 2, 3),
        ((37, 50), (56, 56), (20, 23), 3, 66),  # in two pieces, side by side
        ((47, 47), (56, 56), (23, 23), 6, 5),
        ((52, 49), (55, 56), (26, 24), 5, 4),
        ((61, 61), (56, 56), (30, 30), 3, 2),
        ((63, 63), (56, 56), (31, 31), 5, 2),
        ((63, 19), (40, 56), (31, 9), 5, 2),  # in two, above each other
        ((12, 99), (20, 56), (6, 49), 5, 3),
        ((31, 31), (55, 55), (15, 15), 7, 5),  # rows that begin anywhere
        ((21, 9), (43, 41), (10, 4), 18, 3),
        ((25, 17), (56, 54), (12, 8), 5, 70),
        ((15, 13), (47, 47), (7, 6), 33, 3),
        ((19, 31), (40, 40), (9, 15), 5, 4),
        ((31, 13), (33, 34), (15, 6), 4, 3),
    ],
    ids=str,
)
def test_grad_weight_of_pairs_of_planes(
    kernel: tuple, size: tuple, padding: tuple, batch: int, channels: int, dtype: torch.dtype
) -> None:
    """Rows of up to 56 columns, two images side by side, also the last one of an odd number."""
    case = Case(batch, channels, size, kernel, padding=padding)
    for spoilt, multiplier in ((False, 2), (True, 1)):
        problem = Problem(case._replace(multiplier=multiplier), dtype)
        if spoilt:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), of=["input"])
            problem.spoil((-1, 0, 0, 0), (0, -1, 2, -1), of=["grad_output"])
        assert problem.check(HANKEL)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for turn in range(3):
        problem = Problem(case._replace(bias=turn != 1, multiplier=1 + turn % 2), dtype, FORMATS[turn == 2])
        problem.lay({"offset": turn}, {"offset": turn})
        if turn > 0:
            problem.spoil((0, 1, 3, -1), (-1, -1, -1, -1), (2, 0, 0, 0))
        assert problem.check(OUTER, HANKEL)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    for turn, (step, *offsets) in enumerate([(1, 0, 8), (2, 8, 8), (1, 1, 6), (2, 3, 8)]):
        problem = Problem(case._replace(bias=turn != 1), dtype, torch.channels_last)
        problem.lay({"steps": (step, 1, 1, 1), "offset": offsets[0]}, {"offset": offsets[1]})
        if turn > 0:
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), (-1, 2, 0, -1))
        assert problem.check(OUTER, HANKEL)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
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
        problem = Problem(case, dtype, memory_format, make=torch.randn)
        assert problem.check_repeats(".*grad_weight.*", repeats=100)["grad_weight"], problem
