"""The plans for large kernels in float32: what they claim, and that they are exact on images of every sort.

Which small kernels they serve, too, is in test_plans.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from common import FORMATS, Case, halves, integers, make_inputs, reach_of, run_float64
from exact import arguments_of, draw, lay, output_size, wrong_numbers
from plans import TAPS_FIRST, Problem, general, plans_of, results_of_plans, stays_large
from test_nonfinite import reference, same, spoil
from torch import Tensor

PLANS = {"forward": "large_float32", "grad_input": "large_float32", "grad_weight": "large_float32_grad_weight"}

KERNELS = [
    (31, 31),
    (27, 27),
    (13, 13),
    (9, 9),
    (8, 8),
    (51, 5),
    (5, 51),
    (63, 63),
    (10, 12),
    (3, 17),
    (17, 1),
    (1, 63),
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_claims(name: str, kernel: tuple, memory_format: torch.memory_format) -> None:
    case = Case(32, 64, (130, 131), kernel, padding=halves(kernel))
    channels_last = memory_format == torch.channels_last
    marches = kernel == (9, 9) and not (name == "grad_weight" and channels_last)
    march = (
        "march_grad_weight_nchw" if name == "grad_weight" else f"march_{'channels_last' if channels_last else 'nchw'}"
    )
    flat = kernel == (17, 1) and (channels_last or name != "grad_weight")  # one column of few taps
    ahead = march if marches else general(name, memory_format) if flat else None
    expected = [ahead, PLANS[name]] if ahead else [PLANS[name]]
    for padding in (case.padding, case.reach):
        plans = plans_of(name, case._replace(padding=padding), memory_format=memory_format)
        assert plans[: len(expected)] == expected
    for change in (
        {"stride": (2, 2)},
        {"dilation": (1, 2)},
        {"padding": kernel},
        {"kernel": (64, 3), "padding": (32, 1)},
        {"size": (2**13 + 1, 8)},
        {"batch": 2**24},
    ):
        assert PLANS[name] not in plans_of(name, case._replace(**change)), change
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert PLANS[name] not in plans_of(name, case, dtype)
    multiplied = plans_of(name, case._replace(multiplier=3))
    assert (PLANS[name] in multiplied) == (name != "grad_input")


SIZES = [
    (56, 56),
    (28, 28),
    (14, 14),
    (7, 7),
    (1, 1),
    (13, 29),
    (20, 45),
    (64, 19),
    (5, 100),
    (40, 8),
    (9, 130),
    (1, 70),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_exact(kernel: tuple) -> None:
    """Any number of images, any padding, images smaller than the kernel and larger than a block, and any strides."""
    for number, size in enumerate(SIZES):
        for turn, order in enumerate([None, None, (0, 2, 3, 1), (1, 3, 2, 0)]):
            paddings = [halves(kernel), reach_of(kernel), (0, 0), tuple(k * 2 // 3 for k in kernel)]
            channels = 12 if turn == 2 else 3  # in channels_last, lanes of a warp lie on neighbouring channels
            batch, padding = [1, 3, 5, 33][(number + turn) % 4], paddings[(number + turn) % 4]
            case = Case(batch, channels, size, kernel, padding=padding)
            case = case._replace(multiplier=1 + (number + turn) % 2, bias=turn % 2 == 0)
            if not case.has_outputs:
                case = case._replace(padding=paddings[1])
            problem = Problem(case, torch.float32)
            if turn > 0:
                layout = {"order": order, "steps": [(1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 1, 1), (1, 1, 1, 3)][turn]}
                problem.lay(layout | {"offset": turn}, layout | {"offset": 1}, TAPS_FIRST)
            forced = problem.check()
            if stays_large(case):
                assert PLANS["forward"] in forced["output"], problem
                assert (PLANS["grad_input"] in forced["grad_input"]) == (case.multiplier == 1), problem
            assert PLANS["grad_weight"] in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kernel", [(13, 13), (29, 29), (9, 9), (51, 5), (5, 51)], ids=str)
def test_exact_on_whole_layers(kernel: tuple, memory_format: torch.memory_format) -> None:
    """As many images and channels as fill a GPU: blocks of columns serve where smaller problems are cut into strips."""
    channels, size = (256, (28, 28)) if max(kernel) < 40 else (128, (56, 56))
    case = Case(32, channels, size, kernel, padding=halves(kernel))
    Problem(case, torch.float32, memory_format).check()


# What lanes_grad_weight.cu is compiled for, with room at the edges, other paddings, and some filters idle.
LANES = [
    Case(14, 70, (27, 28), (9, 9), padding=(4, 4)),
    Case(15, 72, (29, 26), (13, 12), padding=(7, 6)),
    Case(8, 72, (28, 28), (29, 29), padding=(14, 14)),
    Case(7, 80, (30, 27), (9, 8), padding=(3, 4)),
    Case(30, 180, (28, 27), (9, 9), padding=(4, 4)),  # two blocks share a filter
    Case(16, 190, (28, 28), (9, 8), padding=(4, 3)),  # or, in channels_last, some take what others leave
    Case(60, 48, (15, 13), (25, 26), padding=(12, 13)),
    Case(64, 46, (14, 14), (27, 27), padding=(13, 13)),
    Case(23, 40, (14, 13), (9, 27), padding=(4, 12), multiplier=2),
    Case(64, 48, (14, 14), (27, 13), padding=(13, 6)),
    Case(62, 48, (14, 12), (31, 40), padding=(14, 21)),  # taps that meet no image
    Case(7, 72, (53, 55), (30, 30), padding=(15, 14)),
    Case(4, 72, (56, 56), (5, 51), padding=(2, 25)),
    Case(5, 72, (56, 54), (51, 5), padding=(25, 1)),
    Case(7, 72, (56, 54), (51, 5), padding=(25, 2)),
    Case(8, 72, (55, 56), (10, 4), padding=(5, 2)),
    Case(7, 72, (54, 56), (51, 5), padding=(25, 2)),
    Case(8, 36, (56, 56), (31, 9), padding=(15, 3), multiplier=2),
    Case(15, 72, (27, 28), (29, 13), padding=(14, 6)),
    Case(16, 72, (28, 28), (13, 4), padding=(6, 1)),
    Case(33, 48, (12, 14), (10, 9), padding=(5, 4)),
    Case(8, 68, (56, 55), (17, 18), padding=(8, 9)),
    Case(4, 68, (50, 52), (33, 35), padding=(16, 17)),
    Case(8, 68, (54, 56), (11, 13), padding=(5, 6)),
    Case(4, 72, (56, 54), (51, 9), padding=(25, 3)),
    Case(4, 72, (56, 56), (51, 5), padding=(25, 2)),  # whole rows, wherever they begin
    Case(7, 72, (55, 56), (31, 31), padding=(15, 15)),
    Case(4, 72, (56, 56), (37, 37), padding=(18, 18)),
    Case(4, 72, (29, 56), (20, 21), padding=(10, 10)),
    Case(14, 72, (29, 28), (13, 13), padding=(6, 6)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", LANES, ids=str)
def test_planes_as_wide_as_code_is_compiled_for(case: Case, memory_format: torch.memory_format) -> None:
    """Exact, wherever tensors begin, and NaN only where a tap meets one."""
    arguments = arguments_of(case)

    def sums(input: Tensor, grad_output: Tensor, plan: str = PLANS["grad_weight"]) -> tuple[Tensor, Tensor]:
        return torch.ops.dwconv.grad_weight.plan(grad_output, input, case.kernel, *arguments, True, plan)

    input, weight, bias = make_inputs(case._replace(bias=True), torch.float32, "cuda", make=integers)
    grad_output = integers(*output_size(case)).to(input)
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else None
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)
    for offsets in ((0, 0), (1, 1), (3, 2), (3, 1)):
        laid = tuple(lay(t, order, offset=offset) for t, offset in zip((input, grad_output), offsets))
        found = sums(*laid)
        assert wrong_numbers(found[0], exact.grad_weight) == 0, offsets
        assert wrong_numbers(found[1], exact.grad_bias) == 0, offsets
        assert all(torch.equal(a, b) for a, b in zip(found, sums(*laid)))
    for which, value in product((0, 1), (torch.nan, torch.inf)):
        spoiled = [input.contiguous(memory_format=memory_format), grad_output.contiguous(memory_format=memory_format)]
        spoiled[which] = spoiled[which].clone()
        spoiled[which][-1, 3, 0, -1] = value
        for found, expected in zip(sums(*spoiled), sums(*spoiled, plan="generic")):
            assert same(found, expected), (which, value)


# What lanes.cu is compiled for, likewise, of so many images and filters that every multiprocessor has some.
ROWS = [
    Case(15, 260, (27, 28), (9, 9), padding=(4, 4)),
    Case(63, 260, (27, 28), (9, 9), padding=(4, 4)),
    Case(15, 396, (24, 28), (9, 9), padding=(4, 4)),  # the last tasks are halves, boxes have rows in fours
    Case(24, 198, (28, 28), (9, 9), padding=(4, 4)),  # of which some have no images
    Case(60, 264, (15, 13), (25, 26), padding=(12, 13)),
    Case(64, 264, (14, 14), (27, 27), padding=(13, 13)),
    Case(32, 132, (28, 28), (9, 8), padding=(2, 4), multiplier=2),
    Case(16, 264, (29, 26), (13, 12), padding=(7, 6)),
    Case(30, 140, (28, 28), (29, 29), padding=(14, 14)),
    Case(8, 264, (53, 55), (30, 30), padding=(15, 14)),
    Case(7, 264, (56, 56), (5, 51), padding=(2, 25)),
    Case(15, 132, (56, 54), (51, 5), padding=(25, 2)),
    Case(8, 264, (55, 56), (10, 4), padding=(5, 2)),
    Case(8, 264, (56, 55), (12, 11), padding=(6, 4)),
    Case(8, 264, (54, 56), (15, 20), padding=(7, 10)),
    Case(8, 264, (56, 56), (33, 35), padding=(16, 17)),
    Case(64, 264, (14, 14), (9, 10), padding=(4, 5)),
]


# The same of lanes_channels_last.cu.
PIXELS = [
    Case(64, 520, (14, 14), (27, 27), padding=(13, 13)),
    Case(60, 390, (14, 13), (25, 26), padding=(12, 13)),
    Case(118, 260, (14, 13), (23, 27), padding=(9, 13)),
    Case(24, 516, (15, 13), (25, 26), padding=(12, 13)),
    Case(21, 260, (27, 28), (9, 9), padding=(4, 4)),
    Case(21, 264, (29, 26), (13, 12), padding=(7, 6)),
    Case(21, 256, (28, 28), (29, 29), padding=(14, 14)),
    Case(21, 140, (53, 55), (30, 30), padding=(15, 14)),
    Case(21, 144, (56, 56), (5, 51), padding=(2, 25)),
    Case(21, 140, (56, 54), (51, 5), padding=(25, 2)),
    Case(44, 264, (3, 28), (13, 13), padding=(12, 6)),
    Case(21, 144, (56, 55), (12, 11), padding=(6, 4)),
    Case(21, 140, (54, 56), (15, 20), padding=(7, 10)),
    Case(21, 140, (56, 56), (33, 35), padding=(16, 17)),
    Case(64, 520, (14, 14), (9, 10), padding=(4, 5)),
]
CASES = [(case, FORMATS[0]) for case in ROWS] + [(case, FORMATS[1]) for case in PIXELS]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "memory_format"), CASES, ids=str)
def test_rows_that_code_is_compiled_for(case: Case, memory_format: torch.memory_format) -> None:
    """Exact, wherever tensors begin, and NaN only where a tap meets one."""
    arguments, channels_last = arguments_of(case), memory_format == torch.channels_last

    def results(input: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor, plan: str | None = None) -> list:
        found = [torch.ops.dwconv.forward.plan(input, weight, bias, *arguments, plan or PLANS["forward"])]
        if case.multiplier == 1:
            of_input = torch.ops.dwconv.grad_input.plan
            name = plan or PLANS["grad_input"]
            found.append(of_input(grad_output, weight, input.shape, *arguments, channels_last, name))
        return found

    input, weight, bias = make_inputs(case._replace(bias=True), torch.float32, "cuda", make=integers)
    grad_output = integers(*output_size(case)).to(input)
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)
    order = (0, 2, 3, 1) if channels_last else None
    input, grad_output = (t.contiguous(memory_format=memory_format) for t in (input, grad_output))
    for offset in (0, 1, 3):
        laid = lay(input, order, offset=offset), weight, bias, lay(grad_output, order, offset=offset)
        found = results(*laid)
        for result, expected in zip(found, (exact.output, exact.grad_input)):
            assert wrong_numbers(result, expected) == 0, offset
        assert all(torch.equal(a, b) for a, b in zip(found, results(*laid)))
    for which, (value, offset) in product((0, 1, 3), ((torch.nan, 0), (torch.inf, 1))):
        spoiled = [t.clone() for t in (input, weight, bias, grad_output)]
        spoiled[which][-1, 0, 0, -1] = value
        spoiled[which][3, 0, -1, 0] = value
        expected = results(*spoiled, plan="generic")
        spoiled[0], spoiled[3] = (lay(t, order, offset=offset) for t in (spoiled[0], spoiled[3]))
        for result, own in zip(results(*spoiled), expected):
            assert same(result, own), (which, value)


NONFINITE = [
    Case(2, 8, (8, 9), (15, 15), padding=(7, 7)),
    Case(2, 8, (7, 6), (9, 12), padding=(8, 11)),
    Case(2, 8, (14, 13), (27, 27), padding=(13, 13)),
    Case(1, 16, (20, 21), (13, 11), padding=(12, 3)),
    Case(1, 16, (9, 40), (3, 17), padding=(2, 16), bias=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", NONFINITE, ids=str)
def test_beside_infinities(case: Case, value: float, memory_format: torch.memory_format) -> None:
    """NaN where F.conv2d has it: of products, but not of the zeros beside an image or a kernel."""
    for which in ("input", "weight", "grad_output"):
        tensors, grad_output = draw(case, torch.float32, "cuda", memory_format)
        if which == "weight":
            tensors[1].flatten(1)[:-1, 0] = value
            tensors[1].flatten(1)[1:, -1] = value
        else:
            spoil(tensors[0] if which == "input" else grad_output, value)
        expected = reference(tensors, grad_output, **case.geometry)._asdict()
        for name, plan, result in results_of_plans(case, tensors, grad_output, memory_format == torch.channels_last):
            assert same(result, expected[name]), f"{name} by {plan} with {value} in {which}"


@pytest.mark.gpu
def test_repeats_bit_for_bit() -> None:
    case = Case(8, 24, (56, 60), (31, 31), padding=(15, 15))
    problem = Problem(case, torch.float32, make=torch.randn)
    assert all(problem.check_repeats(*PLANS.values(), repeats=50).values())
