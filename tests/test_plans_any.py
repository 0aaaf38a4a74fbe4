"""Plans for any kernel, stride and dilation: windows, columns and walks, phases, and `generic`; and what float64 has.
First what they claim, then each forced.
"""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from common import FORMATS, Case, halves, reach_of
from exact import lay, output_size
from plans import (
    ALL,
    FAST,
    LAST,
    PASSES,
    TAPS_FIRST,
    WALK,
    WINDOWS,
    Problem,
    claims,
    meta,
    plan_of,
    plans_of,
    tile_case,
)

TAPS_APART = TAPS_FIRST | {"steps": (1, 2, 1, 1)}

# ---------------------------------------------------------------------------- claims


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_windows_claims(dtype: torch.dtype) -> None:
    """Any kernel in channels_last that nothing else takes."""
    last = torch.channels_last
    for case in (
        Case(2, 30, (40, 36), (3, 5), (3, 2), dilation=(2, 3)),
        Case(48, 215, (309, 8), (1, 3), (3, 3)),
        Case(9, 20, (30, 30), (21, 23), (3, 3), (10, 11), multiplier=3),
    ):
        for name in PASSES:
            assert (plan_of(name, case, dtype, last) == WINDOWS) == (name != "grad_weight"), (name, str(case))
    few_taps = Case(48, 215, (309, 8), (1, 2), (3, 3))
    assert [plan_of(name, few_taps, dtype, last) for name in ("forward", "grad_input")] == [WINDOWS] * 2
    assert plan_of("forward", Case(32, 1, (200, 178), (4, 7), (1, 2)), dtype, last) == "windows_nchw"
    assert plan_of("forward", Case(84, 90, (20, 20), (23, 23), padding=(11, 11)), torch.float64, last) == WINDOWS


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
    # Few taps that reach an output, at strides that are compiled.
    ((6, 12), (2, 3), (1, 1)),
    ((2, 7), (4, 4), (4, 3)),
    ((5, 2), (3, 2), (1, 1)),
]


def test_windows_of_planes_claims() -> None:
    for kernel, stride, dilation in WINDOWS_OF_PLANES:
        case = Case(2, 4, (80, 90), kernel, stride, (1, 2), dilation)
        for name, dtype in product(PASSES[:2], ALL):
            input, output = meta((2, 4, 80, 90), dtype), meta(output_size(case), dtype)
            assert "windows_nchw" in claims(name, case, input, output), (name, str(case))
            assert "windows_nchw" in claims(name, case, lay(input, steps=(1, 2, 1, 3)), lay(output, steps=(2, 1, 2, 1)))
            target = {"input" if name == "grad_input" else "output": torch.channels_last}
            input = input.contiguous(memory_format=target.get("input", torch.contiguous_format))
            output = output.contiguous(memory_format=target.get("output", torch.contiguous_format))
            assert "windows_nchw" not in claims(name, case, input, output), (name, str(case))


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_where_gradients_spread(dtype: torch.dtype) -> None:
    """At a stride windows go before what gathers, where a few taps reach an output of a plane that is not small."""
    case = Case(2, 8, (30, 31), (5, 4), (2, 2), (2, 1))
    for change, spreads in (
        ({}, True),
        ({"kernel": (8, 3)}, True),
        ({"stride": (4, 3)}, True),
        ({"kernel": (4, 4), "dilation": (2, 3)}, True),
        ({"kernel": (9, 3)}, False),
        ({"kernel": (9, 3), "stride": (4, 4)}, False),
        ({"stride": (5, 2)}, False),
        ({"stride": (1, 2)}, False),
        ({"dilation": (3, 1)}, False),
        ({"multiplier": 2}, False),
        ({"size": (7, 7)}, False),
    ):
        first = plans_of("grad_input", case._replace(**change), dtype)[0]
        assert (first == "windows_nchw") == spreads, (change, first)


def test_what_walks() -> None:
    """Channels have to lie side by side in both arrays; rows, pixels and images may lie anywhere."""
    case = Case(4, 8, (9, 8), (3, 2), (3, 1), (1, 5), (1, 2))
    input, output = meta((4, 8, 9, 8), torch.float64), meta(output_size(case), torch.float64)
    for steps, offset, expanded, walks in (
        ((1, 1, 1, 1), 0, (), True),
        ((1, 1, 1, 1), 3, (), True),
        ((2, 1, 3, 2), 0, (), True),
        ((1, 1, 1, 1), 0, (0, 2), True),
        ((1, 2, 1, 1), 0, (), False),
        ((1, 1, 1, 1), 0, (1,), False),
    ):
        odd = lay(input, LAST, steps, offset, expanded), lay(output, LAST, steps, offset, expanded)
        for pair in ((odd[0], lay(output, LAST)), (lay(input, LAST), odd[1])):
            assert (WALK in claims("grad_weight", case, *pair)) == walks, (steps, expanded)
    assert WALK not in claims("grad_weight", case, input, lay(output, LAST))
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
        (Case(1, 256, (7, 7), (24, 1), padding=(22, 0)), torch.float32, True),
        (Case(1, 64, (30, 30), (30, 11)), torch.float32, False),
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


@pytest.mark.parametrize("dtype", ALL, ids=str)
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
        (LAST, (1, 1, 1, 1), False),
        (LAST, (1, 2, 1, 1), True),
    ):
        assert (plan in claims("grad_weight", case, lay(input, order, steps), output)) == claimed, (order, steps)
        assert (plan in claims("grad_weight", case, input, lay(output, order, steps))) == claimed, (order, steps)


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


# ---------------------------------------------------------------------------- every plan


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
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
    problem = Problem(case, dtype, memory_format)
    problem.lay(weight=TAPS_APART)
    for spoilt in (False, True):
        if spoilt:
            problem.spoil((0, 1, 3, 0), of=["input"])
            problem.spoil((-1, -1, -1, -1), of=["grad_output"], values=[torch.nan])
            problem.spoil((2, 0, 0, 0), of=["weight"], values=[torch.nan])
        problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [((3, 3), 1, 1), ((5, 5), 2, 1), ((5, 5), 1, 1)], ids=str)
def test_the_same_sizes_in_other_layouts(tile: tuple, dtype: torch.dtype) -> None:
    """How a problem is cut is remembered: what that depends on has to be part of what it is remembered by."""
    problem = Problem(tile_case(tile, 3, 24, (40, 48)), dtype)
    problem.lay(weight=TAPS_FIRST)
    orders = [LAST, (3, 0, 2, 1), (0, 3, 2, 1), (2, 3, 0, 1), (0, 1, 2, 3), (1, 0, 2, 3)]
    for order, steps in product([*orders, *orders[::-1]], [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 1)]):
        problem.channels_last = order[-1] == 1
        problem.lay(*[{"order": order, "steps": steps}] * 2)
        problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
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
    problem = Problem(case, dtype)
    problem.lay({"order": LAST}, {"order": LAST})
    for weight in ({}, TAPS_FIRST, {"steps": (1, 2, 1, 3), "offset": 1}):
        problem.lay(weight=weight)
        assert all("generic" in plans for plans in problem.check().values()), problem


# ---------------------------------------------------------------------------- windows


def check_windows(problem: Problem) -> None:
    """Output and gradient of the input in channels_last, which have to be claimed."""
    forced = problem.check(WINDOWS)
    assert forced["output"] and forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("channels", [2, 3, 8, 20, 33, 120])
def test_windows_are_exact(channels: int, dtype: torch.dtype) -> None:
    """Whatever kernel, stride, dilation and padding are, on tensors that lie anyhow but for their channels."""
    draw = random.Random(channels)
    for turn in range(60):
        kernel = draw.choice((1, 2, 3, 4, 5, 9, 30)), draw.choice((1, 2, 3, 5, 6, 23))
        stride, dilation = [(draw.randint(1, most), draw.randint(1, most)) for most in (4, 3)]
        reach = reach_of(kernel, dilation)
        padding = draw.randint(0, reach[0] + 1), draw.randint(0, reach[1] + 1)
        size = tuple(max(draw.randint(2, 40), r + 1 - 2 * p) for r, p in zip(reach, padding))
        multiplier = draw.choice((1, 1, 2, 3))
        case = Case(draw.randint(1, 3), channels, size, kernel, stride, padding, dilation, multiplier, turn % 2 == 0)
        layout = {"offset": draw.choice((0, 0, 1, 8)), "steps": (1, 1, draw.randint(1, 2), draw.randint(1, 2))}
        problem = Problem(case, dtype, torch.channels_last)
        problem.lay(layout, layout, draw.choice(({}, TAPS_FIRST, {"steps": (1, 2, 1, 3), "offset": 1})))
        check_windows(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
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
        Case(48, 215, (309, 8), (1, 2), (3, 3)),
    ],
    ids=str,
)
def test_windows_of_large_problems(case: Case, dtype: torch.dtype) -> None:
    """Vectors, rows, slices, pieces of a kernel, weights laid out anew, few taps: of each there is some problem."""
    check_windows(Problem(case, dtype, torch.channels_last))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_windows_beside_infinities(dtype: torch.dtype) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    for case in (
        Case(2, 8, (12, 13), (5, 4), (1, 1), (4, 3)),
        Case(2, 40, (14, 9), (7, 6), (2, 3), (6, 5), (2, 1)),
        Case(2, 3, (8, 11), (3, 9), (3, 2), (2, 8), (1, 2), multiplier=3),
        Case(2, 16, (8, 11), (13, 3), (1, 1), (12, 2), multiplier=2),
        Case(2, 16, (9, 9), (1, 1), (2, 2), (3, 1)),
        Case(2, 7, (12, 11), (2, 2), (2, 3), (2, 1)),
    ):
        problem = Problem(case, dtype, torch.channels_last)
        problem.spoil((0, 1, 1, 2), (1, 0, -1, -1), (1, 2, 0, 0))
        problem.spoil((0, 0, 0, 0), (-1, 0, -1, -1), (2, 0, -1, 0), of=["weight"])
        check_windows(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("window", WINDOWS_OF_PLANES, ids=str)
def test_windows_of_planes_are_exact(window: tuple, dtype: torch.dtype) -> None:
    """Few planes and many, whole ones and bands, rows too long for a tile, all padding, views; NaN where it belongs."""
    kernel, stride, dilation = window
    extent = [r + 1 for r in reach_of(kernel, dilation)]
    layouts: list[dict] = [
        {},
        {"offset": 1},
        {"steps": (1, 2, 2, 1), "offset": 3},
        {"order": (0, 1, 3, 2)},
        {"steps": (2, 1, 1, 2), "offset": 1},
    ]
    shapes = [(1, 2, 40, 50), (2, 3, 9, 13), (3, 50, 17, 7), (1, 2, 150, 90), (1, 1, 60, 9000), (40, 60, 12, 14)]
    for number, (batch, channels, *size) in enumerate(shapes):
        for turn, padding in enumerate([(0, 0), halves(extent), (extent[0] + 1, extent[1] - 1)]):
            multiplier = 1 + (number + turn) % 3
            case = Case(batch, channels, tuple(size), kernel, stride, padding, dilation, multiplier, bias=turn != 1)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype)
            if turn == 1 and number < 4:
                problem.spoil((-1, 0, 0, 0), of=["weight"])
                problem.spoil((0, 0, -1, size[1] // 2), of=["input"], values=[torch.nan])
                problem.spoil((-1, -1, 0, 0), of=["grad_output"])
            layout = layouts[(number + 2 * turn) % len(layouts)]
            problem.lay(layout, layout, TAPS_APART)
            forced = problem.check("windows_nchw")
            assert forced["output"] and forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_windows_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    for case in (
        Case(2, 3, (20, 20), (27, 27), (2, 2), (39, 39), (3, 3)),
        Case(8, 40, (40, 40), (9, 9), (2, 2), (4, 4)),
        Case(2, 8, (60, 70), (2, 2), (2, 2)),
    ):
        forced = Problem(case, dtype, make=torch.randn).check_repeats("windows_nchw", repeats=100)
        assert forced["output"] and forced["grad_input"], str(case)


# ---------------------------------------------------------------------------- columns and walks: grad_weight

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_columns_grad_weight(case: Case, dtype: torch.dtype) -> None:
    """Rows and columns side by side and apart: exact, NaN where F.conv2d has it, the same bits every time."""
    problem = Problem(case, dtype)
    for spoilt in (False, True):
        if spoilt:
            problem.spoil((-1, 0, -1, 0), (0, -1, 0, -1), of=["input"])
            problem.spoil((0, 0, 0, 0), (-1, -1, -1, -1), of=["grad_output"], values=(-torch.inf, torch.inf))
        for order, steps, offset in ((None, None, 0), ((1, 0, 2, 3), (2, 1, 2, 1), 1), (None, (1, 2, 1, 3), 2)):
            layout = {"order": order, "steps": steps}
            problem.lay(layout | {"offset": offset}, layout | {"offset": 3 * offset})
            assert problem.check("columns_grad_weight", repeats=3)["grad_weight"], problem


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
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    "kernel", [(1, 1), (2, 2), (1, 4), (3, 3), (5, 5), (7, 7), (1, 19), (16, 1), (11, 13), (5, 2)], ids=str
)
def test_walks_are_exact(kernel: tuple, dtype: torch.dtype, finite: bool) -> None:
    """Taps in streams of every step, in tiles that are not full; few channels and many; rows cut in pieces; views.

    Where images are small, some taps meet no pixel.
    """
    for number, (stride, dilation) in enumerate(WALKS):
        reach = reach_of(kernel, dilation)
        paddings = [halves(reach), (0, 0), (reach[0], reach[1] + 3)]
        images = (3, 2, (60, 61)), (2, 40, (31, 130)), (9, 67, (13, 20)), (72, 24, (6, 9))
        for turn, (batch, channels, size) in enumerate(images):
            padding, multiplier = paddings[(number + turn) % 3], 3 if (number + turn) % 5 == 2 else 1
            case = Case(batch, channels, size, kernel, stride, padding, dilation, multiplier, bias=turn != 1)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype, torch.channels_last)
            if number % 3 == 1:  # at any address, pixels and rows apart
                problem.lay({"steps": (1, 1, 2, 1), "offset": 1}, {"steps": (2, 1, 1, 3), "offset": 3})
            elif number % 3 == 2:  # vectors, where those of channels are whole
                problem.lay({"steps": (2, 1, 1, 1), "offset": 8}, {"steps": (1, 1, 3, 1), "offset": 8})
            if not finite:
                problem.spoil((0, 1, 0, 0), (-1, 0, -1, -1))
            assert problem.check(WALK, repeats=2)["grad_weight"], problem


# ---------------------------------------------------------------------------- phases

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
        problem = Problem(case, dtype, FORMATS[turn % 2])
        if turn == 2:
            apart = {"steps": (1, 2, 1, 1), "offset": 1}
            problem.lay(apart, {"order": (1, 0, 2, 3), "steps": (1, 1, 2, 1), "offset": 3})
            problem.spoil((0, 1, 3, 5), (-1, -1, -1, -1), (-1, 2, 0, -1))
        elif turn == 3:
            problem.lay({"steps": (2, 1, 1, 1), "offset": 3})
            problem.spoil((1, 0, 0, 0), (5, 0, 3, 4), (2, 0, -1, -1), of=["weight"])
        forced = any(problem.check("phases").values())
        taps = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(case.kernel, case.stride, case.dilation))
        assert forced == (dtype != torch.float32 or taps >= 49), problem  # float32 needs many taps of a phase


# ---------------------------------------------------------------------------- float64


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("kernel", [(5, 6), (7, 7), (9, 4), (13, 13), (31, 3)], ids=str)
def test_large_kernels_in_float64_are_exact(kernel: tuple, finite: bool) -> None:
    """Rows of a thread that all meet the image or not, or lie apart as those of the kernel do; any layout."""
    for number, (size, memory_format) in enumerate(product(((14, 14), (31, 13), (13, 35), (64, 70)), FORMATS)):
        for turn, dilation in enumerate(((1, 1), (2, 1), (3, 4))):
            reach = reach_of(kernel, dilation)
            padding = [halves(reach), (0, 0), reach, (reach[0] + 9, 0)][(number + turn) % 4]
            multiplier = 1 + (number + turn) % 3 // 2
            case = Case([3, 1, 8][turn], 5, size, kernel, (1, 1), padding, dilation, multiplier, bias=turn != 1)
            if not case.has_outputs:
                continue
            problem = Problem(case, torch.float64, memory_format)
            if turn == 2:  # images apart
                problem.lay({"steps": (3, 1, 1, 1), "offset": 1}, {"steps": (2, 1, 1, 1)})
            if not finite:
                problem.spoil((0, 0, 0, 0), (-1, 0, -1, -1), of=["input", "grad_output", "weight"])
            problem.channels_last = False  # as the input's gradient is always laid out here
            problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 5), (2, 1), (3, 3), (5, 4), (7, 7), (9, 2), (13, 13), (31, 3)], ids=str)
def test_grad_weight_in_float64_is_exact(kernel: tuple, finite: bool) -> None:
    """Columns of a kernel in several parts, strips of rows, rows that strides and dilation leave out; views."""
    ways = [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((2, 2), (2, 1)), ((1, 3), (3, 1))]  # stride, dilation
    for number, size in enumerate(((31, 13), (13, 35), (57, 33), (101, 20), (32, 64), (150, 17))):
        for turn, (stride, dilation) in enumerate(ways):
            reach, batch = reach_of(kernel, dilation), [3, 1, 8, 37][(number + turn) % 4]
            padding = [halves(reach), (0, 0), reach][(number + turn) % 3]
            multiplier = 1 + (number + turn) % 3 // 2
            case = Case(batch, 3, size, kernel, stride, padding, dilation, multiplier, bias=turn != 1)
            if not case.has_outputs:
                continue
            problem = Problem(case, torch.float64)
            if turn == 2:  # images apart
                problem.lay({"steps": (3, 1, 1, 1), "offset": 1}, {"steps": (2, 1, 1, 1)})
            if not finite:
                problem.spoil((0, 1, 0, 0), (-1, 0, -1, -1))
            problem.check()


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
    problem = Problem(case, torch.float64)
    for spoilt in (False, True):
        if spoilt:
            problem.spoil((-1, 0, -1, 0), (0, -1, 0, -1), of=["input"])
            problem.spoil((0, 0, 0, 0), (-1, -1, -1, -1), of=["grad_output"], values=(-torch.inf, torch.inf))
        for order, steps in ((LAST, (1, 1, 1, 1)), (LAST, (2, 1, 2, 1)), (None, (1, 2, 1, 2))):
            layout = {"order": order, "steps": steps}
            problem.lay(layout, layout | {"offset": 1})
            assert problem.check("generic", repeats=6)["grad_weight"], problem
