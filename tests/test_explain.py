"""explain resolves a call as conv2d does; which plan then serves it is for test_plans.py."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwconv import explain


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
