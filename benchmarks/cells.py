"""A cell: one pass of one layer in one dtype and layout; its tensors, its contestants and its reference."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dwconv

LAYERS = Path(__file__).with_name("layers.csv")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "grad_input", "grad_weight")
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Cell:
    layer: str
    size: tuple[int, int, int, int]  # of the input: N, C, H, W
    multiplier: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    dilation: int
    dtype: str
    layout: str
    pass_name: str
    target_x_copy: float | None = None  # of the layers in layers.csv alone

    @property
    def channels(self) -> int:
        return self.size[1]

    @property
    def filters(self) -> int:
        return self.size[1] * self.multiplier

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return [self.stride] * 2, list(self.padding), [self.dilation] * 2

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        height, width = (
            (size + 2 * padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, padding, kernel in zip(self.size[2:], self.padding, self.kernel)
        )
        return self.size[0], self.filters, height, width

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def bytes(self) -> int:
        """Least traffic to and from memory: every input and every output element once."""
        elements = torch.Size(self.size).numel() + torch.Size(self.output_size).numel()
        return elements * self.torch_dtype.itemsize

    @cached_property
    def flops(self) -> int:
        """Useful operations: two for each tap that meets the image."""

        def met(size: int, out: int, kernel: int, padding: int) -> int:
            positions = (o * self.stride - padding + k * self.dilation for o in range(out) for k in range(kernel))
            return sum(0 <= position < size for position in positions)

        _, _, height, width = self.size
        n, f, out_height, out_width = self.output_size
        rows = met(height, out_height, self.kernel[0], self.padding[0])
        columns = met(width, out_width, self.kernel[1], self.padding[1])
        return 2 * n * f * rows * columns

    @property
    def kind(self) -> str:
        """The class that geometric means are taken over."""
        size = "large" if min(self.kernel) > 1 and max(self.kernel) > 7 else "small"
        return f"{size} kernels, {self.layout}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.layer} {self.dtype} {self.layout} {self.pass_name}"


def read_layers(path: Path = LAYERS) -> Iterator[Cell]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield Cell(
                layer=row["layer"],
                size=(int(row["N"]), int(row["C"]), int(row["H"]), int(row["W"])),
                multiplier=int(row["multiplier"]),
                kernel=(int(row["kH"]), int(row["kW"])),
                stride=int(row["stride"]),
                padding=(int(row["pad_h"]), int(row["pad_w"])),
                dilation=int(row["dilation"]),
                dtype=row["dtype"],
                layout=row["layout"],
                pass_name=row["pass"],
                target_x_copy=float(row["target_x_copy"]),
            )


@dataclass(frozen=True)
class Tensors:
    """What a pass reads: fresh random numbers."""

    input: Tensor
    weight: Tensor
    grad_output: Tensor

    @classmethod
    def draw(cls, cell: Cell, device: str) -> Tensors:
        def normal(*size: int, **format: Any) -> Tensor:
            return torch.randn(size, device=device).to(cell.torch_dtype).contiguous(**format)

        layout = {"memory_format": LAYOUTS[cell.layout]}
        # Kernels of unit sum of squares keep the outputs of order one.
        weight = normal(cell.filters, 1, *cell.kernel) / (cell.kernel[0] * cell.kernel[1]) ** 0.5
        return cls(normal(*cell.size, **layout), weight, normal(*cell.output_size, **layout))

    def double(self, images: slice) -> Tensors:
        """In float64, contiguous, where F.conv2d never goes through cuDNN; some images only."""
        return Tensors(
            self.input[images].double().contiguous(),
            self.weight.double(),
            self.grad_output[images].double().contiguous(),
        )


Contestant = Callable[[Cell, Tensors], Tensor]


def with_torch(cell: Cell, t: Tensors) -> Tensor:
    """The pass by PyTorch, whichever backend its flags select."""
    if cell.pass_name == "forward":
        return F.conv2d(t.input, t.weight, None, *cell.geometry, cell.channels)
    mask = [cell.pass_name == "grad_input", cell.pass_name == "grad_weight", False]
    gradients = torch.ops.aten.convolution_backward(
        t.grad_output, t.input, t.weight, None, *cell.geometry, False, [0, 0], cell.channels, mask
    )
    return gradients[mask.index(True)]


def with_dwconv(cell: Cell, t: Tensors, plan: str | None = None) -> Tensor:
    """The pass by dwconv, by the plan that it chooses or, on CUDA, by one that is named."""
    op = getattr(getattr(torch.ops.dwconv, cell.pass_name), "default" if plan is None else "plan")
    named = () if plan is None else (plan,)
    if cell.pass_name == "forward":
        return op(t.input, t.weight, None, *cell.geometry, *named)
    if cell.pass_name == "grad_input":
        return op(t.grad_output, t.weight, t.input.shape, *cell.geometry, cell.layout == "channels_last", *named)
    return op(t.grad_output, t.input, cell.kernel, *cell.geometry, False, *named)[0]


def plan_of(cell: Cell, t: Tensors) -> str:
    explanation = dwconv.explain(t.input, t.weight, None, *cell.geometry)
    return getattr(explanation, cell.pass_name).plan
