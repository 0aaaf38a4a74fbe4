"""explain says which plan each pass of a call takes, and resolves the call as conv2d does.

Which plan serves what is for test_plans.py.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from common import FORMATS, Case
from plans import PASSES, STREAM, meta, plans_of
from torch import Tensor

import dwconv
from dwconv import explain


def test_explain_says_what_each_pass_takes() -> None:
    explanation = explain(meta((16, 64, 512, 512), torch.float32), meta((64, 1, 3, 3), torch.float32), padding=1)
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
    explanation = explain(input, weight, **arguments)
    for name in PASSES:
        assert getattr(explanation, name).plan == plans_of(name, case, torch.float16, memory_format)[0]


def test_explain_of_one_image() -> None:
    weight = meta((4, 1, 3, 3), torch.float32)
    assert explain(meta((4, 9, 9), torch.float32), weight).forward.plan == "gather"


def test_explain_on_cpu_says_aten() -> None:
    explanation = explain(torch.empty(2, 4, 8, 8), torch.empty(4, 1, 3, 3))
    assert {getattr(explanation, name).plan for name in PASSES} == {"aten"}
    assert len(str(explanation).splitlines()) == len(PASSES)


@pytest.mark.gpu
def test_explain_on_cuda_is_that_of_meta() -> None:
    size, kernel = (2, 4, 8, 8), (4, 1, 3, 3)
    for memory_format in FORMATS:
        input = torch.empty(size, device="cuda").to(memory_format=memory_format)
        expected = explain(meta(size, torch.float32, memory_format), meta(kernel, torch.float32))
        assert explain(input, torch.empty(kernel, device="cuda")) == expected


def test_explain_computes_and_changes_nothing() -> None:
    input, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    before = input.clone(), weight.detach().clone()
    explain(input, weight)
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
        explain(input, weight, **arguments)
    with pytest.raises(error):
        dwconv.conv2d(input, weight, **arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast(device: str) -> None:
    mixed = torch.randn(1, 4, 9, 9, device=device), torch.randn(4, 1, 3, 3, device=device).bfloat16()
    narrow = tuple(tensor.bfloat16() for tensor in mixed)
    with pytest.raises(RuntimeError, match="should be of the same dtype"):
        explain(*mixed)
    with torch.autocast(device, torch.bfloat16):
        inside = explain(*mixed)
    assert inside == explain(*narrow)


@pytest.mark.parametrize("kernel", [(3, 3), (4, 3), (2, 2)])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT, lambda x: x[:, ::2]], ids=["whole", "mT", "slice"])
def test_same_padding(kernel: tuple[int, int], view) -> None:
    """An odd one is padded at the end before the operator sees the input, which then is another tensor."""
    input = view(torch.empty(2, 8, 9, 9, device="meta"))
    weight = torch.empty(input.shape[1], 1, *kernel, device="meta")
    odd = [(side - 1) % 2 for side in kernel]
    padded = F.pad(input, (0, odd[1], 0, odd[0])) if any(odd) else input
    begin = tuple((side - 1) // 2 for side in kernel)
    assert explain(input, weight, padding="same") == explain(padded, weight, padding=begin)


def test_leaves_no_mode_behind() -> None:
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    for stride in (1, 0):
        if stride:
            explain(torch.randn(1, 4, 9, 9), weight, stride=stride)
        else:
            with pytest.raises(RuntimeError):
                explain(torch.randn(1, 4, 9, 9), weight, stride=stride)
        assert torch.is_grad_enabled() and type(torch.ones(1)) is Tensor


def test_printed_as_a_table() -> None:
    lines = str(explain(torch.empty(1, 4, 9, 9, device="meta"), torch.empty(8, 1, 3, 3, device="meta"))).splitlines()
    assert [line.split()[0] for line in lines] == ["forward", "grad_input", "grad_weight"]
    starts = {re.match(r"\S+ +\S+ +", line).end() for line in lines}  # the reasons stand in one column
    assert len(starts) == 1
