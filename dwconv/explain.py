"""``explain``: which kernel a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _ops
from .functional import IntPair, Padding, pair, same_padding

__all__ = ["Explanation", "PlanChoice", "explain"]

PASSES = ("forward", "grad_input", "grad_weight")


class PlanChoice(NamedTuple):
    """A plan by name, and why it is taken."""

    plan: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What serves each pass of a call; printed as a table."""

    forward: PlanChoice
    grad_input: PlanChoice
    grad_weight: PlanChoice

    def __str__(self) -> str:
        rows = [(name, *getattr(self, name)) for name in PASSES]
        return "\n".join(f"{name:<12} {plan:<16} {reason}" for name, plan, reason in rows)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
) -> Explanation:
    """Says which plan serves :func:`dwconv.conv2d` with these arguments in each pass, and why. Computes nothing.

    Args: those of :func:`dwconv.conv2d`. Tensors on the device ``meta`` are explained as CUDA tensors, so that a layer
    can be looked up without a GPU. The gradient of the output is taken to lie in memory as the output does.

    Raises:
        RuntimeError, TypeError: as :func:`dwconv.conv2d`.

    Example:
        >>> x, w = torch.empty(16, 64, 512, 512, device="meta"), torch.empty(64, 1, 3, 3, device="meta")
        >>> print(explain(x, w))
    """
    if input.dim() == 3:
        input = input.unsqueeze(0)
    strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
    if padding == "same":
        paddings: tuple[int, ...] = same_padding(weight.shape[2:], dilations)[0]
    elif isinstance(padding, str):
        paddings = (0, 0)
    else:
        paddings = pair(padding, "padding")

    # On meta tensors, for the checks and for the output's strides.
    shapes = (tensor if tensor is None else tensor.to("meta") for tensor in (input, weight, bias))
    output = _ops.forward(*shapes, strides, paddings, dilations)

    if input.device.type == "cpu":
        choice = PlanChoice("aten", "CPU tensors go to ATen's own convolution (oneDNN)")
        return Explanation(choice, choice, choice)
    if _ops.BUILD["cuda"] is None and input.device.type != "meta":
        choice = PlanChoice("none", "this dwconv was built without CUDA")
        return Explanation(choice, choice, choice)
    dtype = str(input.dtype).removeprefix("torch.")
    choices = (
        _C.plans(
            name,
            dtype,
            tuple(input.shape),
            input.stride(),
            tuple(weight.shape),
            output.stride(),
            strides,
            paddings,
            dilations,
        )[0]
        for name in PASSES
    )
    return Explanation(*(PlanChoice(*choice) for choice in choices))
