"""Plans as the tests see them: which of them claim a problem, and what each computes if it is forced by name.

The table is asked without a GPU, by tensors of the device "meta" and how they lie in memory. On a GPU, a `Problem` is
laid out and spoilt as a test wants it, and its `check` forces plans and compares each of their results with the exact
one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, product

import pytest
import torch
from common import Case, Results, halves, integers, reach_of, run_float64
from exact import arguments_of, draw, lay, output_size, wrong_numbers
from torch import Tensor

import dwconv

PASSES = ["forward", "grad_input", "grad_weight"]
HALF = [torch.float16, torch.bfloat16]  # what tensor cores serve
FAST = [torch.float32, *HALF]  # what specialised plans serve
ALL = [*FAST, torch.float64]
LAST = (0, 2, 3, 1)  # the order of dimensions in channels_last


# ---------------------------------------------------------------------------- names


def of_passes(images: str, sums: str) -> dict[str, str]:
    return {"forward": images, "grad_input": images, "grad_weight": sums}


# By pass, what serves small kernels ...
STREAM = of_passes("stream_nchw", "stream_grad_weight_nchw")
MARCH_NCHW = of_passes("march_nchw", "march_grad_weight_nchw")
MARCH = of_passes("march_channels_last", "march_grad_weight_channels_last")
# ... and what serves problems with little to do: any, or of small kernels. Most problems here stand for larger ones.
GATHER = of_passes("gather", "gather_grad_weight")
DIRECT = of_passes("direct", "direct_grad_weight")
# In channels_last tensor cores have
BAND = "toeplitz_channels_last"
MATRIX = "toeplitz_grad_weight_channels_last"
# and, of what nothing else serves there,
WINDOWS = "windows_channels_last"
WALK = "walk_grad_weight_channels_last"
FLAT = "flat_grad_weight_channels_last"  # of one tap, where pixels are no whole units


def and_portable(plan: str) -> set[str]:
    """A plan with code for one architecture, and the one that serves in its place on others."""
    return {plan, plan + "_portable"}


# ---------------------------------------------------------------------------- kernels and layouts

TAPS_FIRST = {"order": (2, 3, 0, 1)}  # a weight whose filters lie side by side

# Kernel, stride and dilation of what streams and marches.
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


def tile_case(tile: tuple, batch: int, channels: int, size: tuple[int, int], **more) -> Case:
    """With the padding that keeps the size at stride 1, unless there is another in `more`."""
    kernel, stride, dilation = tile
    padding = halves(reach_of(kernel, (dilation, dilation)))
    case = Case(batch, channels, size, kernel, (stride, stride), padding, (dilation, dilation))
    return case._replace(**more)


# ---------------------------------------------------------------------------- the table


def meta(size: tuple, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


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


def plans_of(
    name: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    allow_fft: bool = False,
) -> list[str]:
    """The plans that claim a pass over tensors without gaps."""
    input = meta((case.batch, case.channels, *case.size), dtype, memory_format)
    return claims(name, case, input, meta(output_size(case), dtype, memory_format), allow_fft)


def plan_of(name: str, case: Case, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format) -> str:
    """Of the problems of this sort that are not small."""
    return next(plan for plan in plans_of(name, case, dtype, memory_format) if plan != GATHER[name])


def general(name: str, memory_format: torch.memory_format) -> str:
    """What serves a problem that has no plan of its own."""
    if name == "grad_weight":
        return "columns_grad_weight" if memory_format == torch.contiguous_format else WALK
    return "windows_nchw" if memory_format == torch.contiguous_format else WINDOWS


def serves(name: str, plan: str, case: Case) -> str:
    """`plan`, unless the kernel has one tap alone: then that of such kernels, if 32 bits count all elements."""
    few = case.batch * case.channels * math.prod(case.size) <= 2**31 - 2**16
    return "scale" if case.kernel == (1, 1) and name != "grad_weight" and few else plan


def stays_large(case: Case) -> bool:
    """Whether a kernel with a side of 8 or more is sure of plans for large ones, at stride and dilation 1.

    Where half of its taps or more meet no image, what is left may be a small kernel, whose plans serve.
    """
    far = [max(min(k - size - p, p), 0) for k, size, p in zip(case.kernel, case.size, case.padding)]
    left = [k - 2 * n for k, n in zip(case.kernel, far)]
    return max(left) >= 8 or 2 * math.prod(left) > math.prod(case.kernel)


def goes_direct(name: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether this pass of a small kernel, not grad_weight, can: in float64 registers hold 25 weights."""
    few = math.prod(case.kernel) <= 25 and (name == "forward" or case.stride == (1, 1))
    return dtype != torch.float64 or few


def check_layouts(
    plan: str, name: str, case: Case, plain: Tensor, claimed: Sequence[Tensor], refused: Sequence[Tensor] = ()
) -> None:
    """That a plan claims arrays as they lie, or does not: of a kernel that keeps the size, as input and as output."""
    for expected, arrays in ((True, claimed), (False, refused)):
        for odd in arrays:
            assert (plan in claims(name, case, odd, plain)) == expected, odd.stride()
            assert (plan in claims(name, case, plain, odd)) == expected, odd.stride()


# ---------------------------------------------------------------------------- plans forced by name


def calls_of_plans(
    case: Case, tensors: tuple, grad_output: Tensor, channels_last: bool, allow_fft: bool = False, named: str = ""
) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """Each plan that claims a pass, and a call that forces it and gives fields of Results. CUDA only."""
    input, weight, bias = tensors
    ops, arguments = torch.ops.dwconv, arguments_of(case)

    def calls(name: str, call: Callable, input: Tensor, output: Tensor) -> Iterator:
        for plan in claims(name, case, input, output, allow_fft):
            if re.search(named, plan):
                yield plan, partial(call, plan)

    def forward(plan: str) -> dict[str, Tensor]:
        return {"output": ops.forward.plan(input, weight, bias, *arguments, plan)}

    def grad_input(plan: str) -> dict[str, Tensor]:
        args = grad_output, weight, input.shape, *arguments, channels_last, plan
        return {"grad_input": ops.grad_input.plan(*args)}

    def grad_weight(plan: str) -> dict[str, Tensor]:
        args = grad_output, input, case.kernel, *arguments, bias is not None, plan
        sums = dict(zip(("grad_weight", "grad_bias"), ops.grad_weight.plan(*args)))
        return sums if bias is not None else {"grad_weight": sums["grad_weight"]}

    yield from calls("forward", forward, input, ops.forward(input, weight, bias, *arguments))
    target = ops.grad_input(grad_output, weight, input.shape, *arguments, channels_last)
    yield from calls("grad_input", grad_input, target, grad_output)
    apart = (input.data_ptr() - grad_output.data_ptr()) % 16 != 0
    for plan, call in calls("grad_weight", grad_weight, input, grad_output):
        if apart and plan == FLAT:  # `claims` knows strides, no addresses
            with pytest.raises(RuntimeError, match="does not serve this problem"):
                call()
        else:
            yield plan, call


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
    for plan, call in calls_of_plans(case, tensors, grad_output, channels_last, allow_fft, named):
        for field, result in call().items():
            yield field, plan, result


class Problem:
    """A case with whole numbers on the GPU, and plans forced on it."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        make: Callable[..., Tensor] = integers,
    ) -> None:
        self.case = case
        self.channels_last = memory_format == torch.channels_last
        (self.input, self.weight, self.bias), self.grad_output = draw(case, dtype, "cuda", memory_format, make)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.weight, self.bias

    def __repr__(self) -> str:
        lie = {name: (t.storage_offset(), t.stride()) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return f"{self.case} in {self.input.dtype}; offsets and strides {lie}"

    def lay(self, input: dict | None = None, grad_output: dict | None = None, weight: dict | None = None) -> None:
        """Lays tensors out anew, by arguments of `lay`. The usual order is that of the problem's memory format."""
        order = {"order": LAST} if self.channels_last else {}
        self.input = self.input if input is None else lay(self.input, **order | input)
        self.grad_output = self.grad_output if grad_output is None else lay(self.grad_output, **order | grad_output)
        self.weight = self.weight if weight is None else lay(self.weight, **weight)
        if any("expanded" in (layout or ()) for layout in (input, grad_output, weight)):
            self.__dict__.pop("exact", None)

    def spoil(
        self,
        *places: tuple[int, ...],
        of: Sequence[str] = ("input", "grad_output"),
        values: Sequence[float] = (torch.inf, torch.nan, -torch.inf),
    ) -> None:
        """Puts a number that is not finite at each place, of each of these tensors."""
        assert len(places) <= len(values)
        for name, (place, value) in product(of, list(zip(places, values))):
            getattr(self, name)[place] = value
        self.__dict__.pop("exact", None)

    @cached_property
    def exact(self) -> dict[str, Tensor | None]:
        """What F.conv2d computes in float64, rounded once."""
        exact = run_float64(self.tensors, self.grad_output, **self.case.geometry)._asdict()
        return {field: None if t is None else t.round().to(self.input) for field, t in exact.items()}

    def calls(self, plans: Sequence[str]) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
        """Those of these plans, or of all, that claim a pass."""
        named = "|".join(f"^{plan}$" for plan in plans)
        return calls_of_plans(self.case, self.tensors, self.grad_output, self.channels_last, named=named)

    def check(self, *plans: str, repeats: int = 1) -> dict[str, set[str]]:
        """Forces plans of these names (regular expressions), or all, wherever they claim, and so many times each.

        Every result has to be exact, with NaN and Inf where F.conv2d has them. By field, the plans that were forced.
        """
        forced: dict[str, set[str]] = {field: set() for field in Results._fields}
        for plan, call in self.calls(plans):
            for field, result in chain.from_iterable(call().items() for _ in range(repeats)):
                wrong = wrong_numbers(result, self.exact[field])
                assert not wrong, f"{field} by {plan}: {wrong} of {result.numel()} numbers are wrong; {self}"
                forced[field].add(plan)
        return forced

    def check_repeats(self, *plans: str, repeats: int) -> dict[str, set[str]]:
        """Forces these plans so many times, on numbers of any sort: the same bits each time."""
        forced: dict[str, set[str]] = {field: set() for field in Results._fields}
        for plan, call in self.calls(plans):
            first = call()
            for field, again in chain.from_iterable(call().items() for _ in range(repeats)):
                assert torch.equal(first[field], again), f"{field} by {plan}; {self}"
                forced[field].add(plan)
        return forced
