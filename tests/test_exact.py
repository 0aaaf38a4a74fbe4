"""Whole numbers in, exact numbers out, in every dtype and format: shapes that have caught others' depthwise kernels."""

from __future__ import annotations

import pytest
import torch
from common import DTYPES, FORMATS, Case, integers, make_inputs, torch_conv2d
from exact import check_exact

# The depthwise shapes of oneDNN's benchdnn: MobileNet and regressions.
ONEDNN = [
    Case(1, 32, (112, 112), (3, 3), padding=(1, 1)),
    Case(1, 64, (112, 112), (3, 3), (2, 2), (1, 1)),
    Case(1, 128, (56, 56), (3, 3), padding=(1, 1)),
    Case(1, 128, (56, 56), (3, 3), (2, 2), (1, 1)),
    Case(1, 256, (28, 28), (3, 3), padding=(1, 1)),
    Case(1, 256, (28, 28), (3, 3), (2, 2), (1, 1), bias=False),
    Case(2, 512, (14, 14), (3, 3), padding=(1, 1)),
    Case(2, 512, (14, 14), (3, 3), (2, 2), (1, 1)),
    Case(2, 1024, (7, 7), (3, 3), padding=(1, 1), bias=False),
    Case(1, 16, (202, 202), (1, 7), padding=(0, 3)),
    Case(1, 16, (202, 202), (1, 9), padding=(0, 4)),
    Case(1, 32, (202, 202), (7, 1), padding=(3, 0)),
    Case(1, 24, (202, 202), (9, 1), padding=(4, 0)),
    Case(1, 64, (201, 202), (1, 7), padding=(0, 3), bias=False),
    Case(1, 17, (201, 202), (1, 9), padding=(0, 4)),
    Case(1, 96, (102, 101), (7, 1), padding=(3, 1)),
    Case(1, 33, (202, 201), (9, 1), padding=(4, 1)),
    Case(1, 16, (16, 16), (3, 3), (2, 2), (2, 2)),
    Case(1, 16, (16, 16), (3, 3), (2, 2), (1, 1)),
    Case(1, 16, (15, 10), (6, 3), (2, 1), (3, 1)),
    Case(1, 16, (15, 10), (5, 3), (3, 1), (2, 1)),
    Case(1, 16, (15, 10), (7, 3), (5, 1), (3, 1)),
    Case(1, 16, (10, 15), (3, 1), (1, 2), (1, 0)),
    Case(1, 16, (14, 10), (5, 3), (5, 1), (1, 1)),
    Case(1, 16, (15, 10), (3, 3), (2, 1), (1, 1)),
    Case(1, 16, (14, 10), (2, 3), (2, 1), (1, 1)),
    Case(1, 7, (32, 32), (5, 5), padding=(2, 2)),  # tails of channels
    Case(1, 13, (10, 10), (3, 3), padding=(1, 1)),
    Case(1, 20, (10, 10), (3, 3), padding=(1, 1)),
    Case(1, 42, (10, 10), (3, 3), padding=(1, 1)),
    Case(1, 55, (10, 10), (3, 3), padding=(1, 1)),
    Case(1, 72, (10, 10), (3, 3), padding=(1, 1)),
    Case(1, 113, (1, 1), (3, 3), padding=(1, 1)),
    Case(1, 128, (56, 56), (2, 2), (2, 2)),
    Case(1, 32, (56, 56), (2, 2), padding=(1, 1)),
    Case(1, 32, (56, 56), (3, 3), padding=(2, 2)),
    Case(1, 32, (56, 56), (3, 3)),
    Case(1, 32, (56, 56), (4, 4), (2, 2), (3, 3)),
    Case(1, 32, (56, 56), (4, 4), padding=(2, 2)),
    Case(1, 32, (56, 56), (4, 4), padding=(1, 1)),
    Case(1, 32, (56, 56), (4, 4), (2, 2)),
    Case(1, 32, (56, 56), (4, 4), (2, 2), (1, 1)),
    Case(1, 128, (56, 56), (4, 4), (2, 2), (5, 5)),
    Case(2, 4, (6, 6), (3, 3)),
    Case(1, 16, (28, 28), (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case(1, 16, (28, 28), (3, 3), (2, 2), (4, 4), (4, 4)),
]

# Those of TensorFlow's depthwise_conv_op_test.
TENSORFLOW = [
    Case(4, 48, (5, 5), (1, 1), multiplier=2),
    Case(4, 84, (8, 8), (1, 3), padding=(0, 1)),
    Case(4, 48, (17, 17), (3, 1), padding=(1, 0), multiplier=4),
    Case(4, 8, (9, 27), (3, 3), padding=(1, 1)),
    Case(4, 7, (31, 31), (3, 3), padding=(1, 1)),
    Case(4, 7, (31, 31), (3, 3)),
    Case(4, 2, (35, 35), (5, 5), padding=(2, 2)),
    Case(4, 2, (147, 147), (3, 3), (3, 3), multiplier=8),
    Case(4, 2, (147, 147), (3, 3), (2, 2), multiplier=8),
    Case(1, 3, (299, 299), (2, 2), (2, 2), multiplier=8),
    Case(1, 3, (299, 299), (3, 2), (2, 2), (1, 3), multiplier=8),
    Case(2, 1, (183, 183), (5, 5), (2, 2), (2, 2), multiplier=2),
    Case(2, 1, (183, 183), (5, 5), (3, 3), (3, 1), multiplier=2),
    Case(5, 1, (29, 31), (5, 4), padding=(3, 1), dilation=(2, 3), multiplier=2),
    Case(4, 48, (5, 5), (3, 3), padding=(1, 1)),
    Case(1, 2, (8, 7), (8, 7), padding=(4, 3)),
    Case(2, 2, (4, 3), (3, 2), padding=(2, 1)),
    Case(2, 1, (5, 8), (4, 4), padding=(2, 2), multiplier=2),
    Case(4, 1, (5, 5), (2, 2), (2, 2), multiplier=2),
    Case(2, 2, (4, 4), (3, 1), padding=(1, 0), multiplier=2),
    Case(1, 2, (15, 15), (1, 3), padding=(0, 1)),
    Case(2, 1, (15, 16), (3, 3), (3, 3), multiplier=2),
    Case(2, 1, (5, 8), (4, 3), padding=(2, 2), dilation=(1, 2), multiplier=2),
    Case(1, 2, (3, 1), (2, 1), padding=(1, 0)),
    Case(2, 2, (2, 3), (2, 1), padding=(1, 0)),
    Case(2, 1, (2, 3), (2, 2)),
    Case(4, 2, (36, 36), (5, 5), (2, 2), (8, 8), (4, 4)),
    Case(1, 2, (148, 148), (4, 4), (2, 2), (3, 3), (2, 2), multiplier=8),
    Case(1, 3, (300, 300), (2, 2), dilation=(4, 4), multiplier=2),
]

# Kernels of today's networks, and sides around the widths that kernels work in.
OTHERS = [
    Case(2, 12, (14, 14), (7, 7), padding=(3, 3)),
    Case(2, 6, (28, 28), (13, 13), padding=(6, 6)),
    Case(1, 4, (28, 28), (31, 31), padding=(15, 15), bias=False),
    Case(1, 3, (40, 36), (51, 5), padding=(25, 2)),
    Case(1, 3, (36, 40), (5, 51), padding=(2, 25)),
    Case(24, 3, (28, 28), (13, 13), padding=(6, 6)),
    Case(15, 3, (56, 56), (51, 5), padding=(25, 2)),
    Case(15, 2, (56, 56), (5, 51), padding=(2, 25), multiplier=2),
    Case(1, 4, (20, 70), (1, 21), padding=(0, 10)),
    Case(1, 5, (33, 510), (3, 3), padding=(1, 1)),
    Case(2, 3, (31, 255), (3, 3), padding=(1, 1)),
    Case(1, 2, (257, 129), (3, 3), padding=(0, 2)),
    Case(3, 3, (63, 65), (3, 3), padding=(2, 1), multiplier=3),
    Case(1, 40, (8, 64), (3, 3), padding=(1, 1), bias=False),
    Case(2, 5, (1, 300), (3, 3), padding=(1, 1)),
    Case(2, 5, (300, 1), (3, 3), padding=(1, 1)),
    Case(9, 3, (17, 19), (5, 3), (1, 2), (2, 1), (2, 1), multiplier=2),
    Case(2, 3, (23, 29), (3, 3), (7, 11), (1, 1)),
    # In bfloat16 and channels_last, oneDNN 3.12 never returns from the first two, nor reads inside the others.
    Case(1, 16, (32, 32), (1, 15), padding=(0, 7), bias=False),
    Case(2, 5, (20, 40), (5, 31), padding=(2, 15)),
    Case(1, 16, (30, 36), (3, 3), dilation=(2, 2)),
    Case(1, 3, (30, 100), (3, 3), padding=(1, 1), dilation=(4, 4)),
    Case(1, 3, (70, 300), (2, 2), dilation=(4, 1), multiplier=2),
]

CASES = ONEDNN + TENSORFLOW + OTHERS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact(device: str, case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    tensors = make_inputs(case, dtype, device, memory_format, make=integers)
    output = torch_conv2d(*(None if t is None else t.to("meta") for t in tensors), **case.geometry)
    terms = output.numel() // case.filters
    assert 9 * terms < 2**24 and 9 * case.kernel[0] * case.kernel[1] * case.multiplier < 2**24, "sums may be inexact"
    grad_output = integers(*output.shape).to(device, dtype).contiguous(memory_format=memory_format)
    check_exact(tensors, grad_output, **case.geometry)


def test_there_is_no_case_twice() -> None:
    assert len(set(CASES)) == len(CASES) >= 70
