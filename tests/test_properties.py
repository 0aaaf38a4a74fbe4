"""Random problems, found and shrunk by hypothesis: every number is exact, whatever the shapes and the strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from common import DTYPES, Case, Results, integers, run_dwconv, run_float64
from exact import arguments_of, assert_exact, lay, output_size, wrong_numbers
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from plans import results_of_plans
from torch import Tensor

import dwconv

EXAMPLES = {"cpu": 1500, "cuda": 625}  # of one shard
SHARDS = [("cpu", 0)] + [pytest.param("cuda", shard, marks=pytest.mark.gpu) for shard in range(1, 9)]
ORDERS = [(0, 1, 2, 3), (0, 2, 3, 1)]  # contiguous, channels_last
WIDEST = 40  # kernel, in pixels


class Drawn(NamedTuple):
    """A problem but for its numbers, which come from a seed."""

    case: Case
    dtype: torch.dtype
    layouts: list[dict[str, Any]]  # of input, weight, bias and gradient, as arguments of `lay`
    numbers: int

    def tensors(self, device: str) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
        case = self.case
        torch.manual_seed(self.numbers)
        sizes = [(case.batch, case.channels, *case.size), (case.filters, 1, *case.kernel), (case.filters,)]
        input, weight, bias, grad_output = (
            lay(integers(*size).to(device, self.dtype), **layout)
            for size, layout in zip([*sizes, output_size(case)], self.layouts)
        )
        return (input, weight, bias if case.bias else None), grad_output


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> dict[str, Any]:
    """Mostly dense, in a usual format, at any address; sometimes permuted, with steps, or expanded."""
    layout: dict[str, Any] = {"offset": draw(st.integers(0, 15))}
    if dims == 4:
        usual = st.sampled_from(ORDERS)
        layout["order"] = draw(st.one_of(usual, usual, usual, st.permutations(range(4))))
    if draw(st.integers(0, 3)) == 3:
        layout["steps"] = draw(st.tuples(*[st.integers(1, 3)] * dims))
    if draw(st.integers(0, 5)) == 5:
        layout["expanded"] = draw(st.lists(st.integers(0, dims - 1), unique=True))
    return layout


@st.composite
def problems(draw: st.DrawFn, widest: int) -> Drawn:
    usual = draw(st.booleans())
    if usual:  # what the specialised kernels are for
        side = draw(st.sampled_from([1, 3, 3, 3, 5, 7]))
        kernel = draw(st.sampled_from([(side, side), (side, side), (side, side), (1, 11), (11, 1)]))
        strided = draw(st.integers(0, 3)) == 3
        stride, dilation = [((1, 1), (1, 1)), ((2, 2), (1, 1))][strided]
        if kernel == (3, 3) and draw(st.integers(0, 3)) == 3:
            dilation = (2, 2)
        padding = draw(st.tuples(*[st.integers(0, d * (k - 1)) for k, d in zip(kernel, dilation)]))
    else:
        kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        padding = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    size = tuple(draw(st.integers(side, max(side, widest))) for side in least)
    case = Case(
        draw(st.integers(0, 3)),
        draw(st.one_of(st.integers(1, 6), st.integers(31, 34))),
        size,
        kernel,
        stride,
        padding,
        dilation,
        draw(st.sampled_from([1, 1, 1, 2, 3, 4])),
        draw(st.booleans()),
    )
    four = st.builds(dict, offset=st.integers(0, 15)) if usual and draw(st.booleans()) else layouts(4)
    return Drawn(
        case,
        draw(st.sampled_from(DTYPES)),
        [draw(four), draw(four), draw(layouts(1)), draw(four)],
        draw(st.integers(0, 2**31)),
    )


def reproducible(examples: int, shard: int):
    """The same examples every time, and others in every shard."""

    def decorate(test):
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
        return seed(shard)(
            settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks)(test)
        )

    return decorate


@pytest.mark.parametrize(("device", "shard"), SHARDS)
def test_every_number_is_exact(device: str, shard: int) -> None:
    @reproducible(EXAMPLES[device], shard)
    @given(problems(WIDEST))
    def check(drawn: Drawn) -> None:
        tensors, grad_output = drawn.tensors(device)
        results = run_dwconv(tensors, grad_output, **drawn.case.geometry)
        assert_exact(results, tensors, grad_output, **drawn.case.geometry)

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(11, 15))
def test_every_plan_that_claims_is_exact(shard: int) -> None:
    taken = set()

    @reproducible(250, shard)
    @given(problems(WIDEST), st.booleans())
    def check(drawn: Drawn, channels_last: bool) -> None:
        case = drawn.case
        tensors, grad_output = drawn.tensors("cuda")
        exact = run_float64(tensors, grad_output, **case.geometry)._asdict()
        fields = set()
        for name, plan, result in results_of_plans(case, tensors, grad_output, channels_last):
            assert wrong_numbers(result, exact[name]) == 0, f"{name} by {plan}"
            fields.add(name)
            taken.add(plan)
        assert fields == {name for name in Results._fields if exact[name] is not None}

    check()
    assert {"generic", "direct", "direct_grad_weight", "stream_nchw", "stream_grad_weight_nchw"} <= taken


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 2**31), st.sampled_from([2**16, 2**31 - 1, 2**31, 2**32]))
STRIDES = st.tuples(*[st.one_of(st.integers(0, 100), st.integers(0, 2**40))] * 4)
PAIRS = st.tuples(*[st.one_of(st.integers(1, 4), st.integers(1, 2**31 - 1))] * 2)


@reproducible(2000, 0)
@given(
    name=st.sampled_from(["forward", "grad_input", "grad_weight"]),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 2**20),
    channels=st.one_of(st.integers(1, 5), st.integers(1, 2**20)),
    multiplier=st.sampled_from([1, 1, 1, 2, 7]),
    size=st.tuples(SIDES, SIDES),
    window=st.one_of(st.just(((3, 3), (1, 1), (1, 1))), st.tuples(PAIRS, PAIRS, PAIRS)),
    padding=st.tuples(*[st.one_of(st.integers(0, 4), st.integers(0, 2**31 - 1))] * 2),
    strides=st.tuples(STRIDES, STRIDES),
)
def test_generic_claims_everything(name, dtype, batch, channels, multiplier, size, window, padding, strides) -> None:
    """The table of plans knows an answer to every problem, however odd: it ends with the generic plan."""
    kernel, stride, dilation = window
    least = (max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding))
    size = tuple(max(side, bound) for side, bound in zip(size, least))
    case = Case(batch, channels, size, kernel, stride, padding, dilation, multiplier)
    found = dwconv._C.plans(
        name,
        str(dtype).removeprefix("torch."),
        (batch, channels, *size),
        strides[0],
        (case.filters, 1, *kernel),
        strides[1],
        *arguments_of(case),
    )
    plans = [plan for plan, _ in found]
    assert plans[-1] == "generic" and len(set(plans)) == len(plans)
    assert all(reason for _, reason in found)
