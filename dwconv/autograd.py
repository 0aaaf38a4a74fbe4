"""Gradients of the operators, of any order.

The three operators are closed under differentiation. With g the gradient of the output and u, b those that grad_weight
and grad_bias themselves receive:

===========  ==============================  ========================================================
operator     computes                        its gradients
===========  ==============================  ========================================================
forward      y(x, w, bias)                   x: grad_input(g, w); w, bias: grad_weight(g, x)
grad_input   dx(g, w)                        g: forward(·, w);    w: grad_weight(g, ·)
grad_weight  dw, db(g, x)                    g: forward(x, u, b); x: grad_input(g, u)
===========  ==============================  ========================================================

``forward``, ``grad_input`` and ``grad_weight`` of this module take the cheapest way: the operator itself where nothing
needs a gradient, its Function else. The same Functions are registered with the dispatcher, so that an operator called
by its name is differentiable too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops

Pair = Sequence[int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation

_below_autograd = torch._C._AutoDispatchBelowAutograd


class DepthwiseConv2dFunction(Function):
    """y = conv2d(input, weight, bias)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.geometry = stride, padding, dilation
        ctx.input_size, ctx.kernel_size = input.shape, weight.shape[2:]
        with _below_autograd():
            output = _ops.forward(input, weight, bias, stride, padding, dilation)
        ctx.channels_last = _ops.is_channels_last(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_input = d_weight = d_bias = None
        if needs_input:
            d_input = grad_input(grad_output, weight, ctx.input_size, *geometry, ctx.channels_last)
        if needs_weight:
            d_weight, d_bias = grad_weight(grad_output, input, ctx.kernel_size, *geometry, needs_bias)
        elif needs_bias:
            d_bias = grad_output.sum((0, 2, 3))
        return d_input, d_weight, d_bias if needs_bias else None, None, None, None


class DepthwiseConv2dGradInput(Function):
    """The gradient of the input, given that of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        channels_last: bool,
    ) -> Tensor:
        needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_output if needs_weight else None, weight if needs_grad_output else None)
        ctx.geometry = stride, padding, dilation
        ctx.kernel_size = weight.shape[2:]
        with _below_autograd():
            return _ops.grad_input(grad_output, weight, input_size, stride, padding, dilation, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        d_grad_output = d_weight = None
        if ctx.needs_input_grad[0]:
            d_grad_output = forward(grad, weight, None, *geometry)
        if ctx.needs_input_grad[1]:
            d_weight, _ = grad_weight(grad_output, grad, ctx.kernel_size, *geometry, False)
        return d_grad_output, d_weight, None, None, None, None, None


class DepthwiseConv2dGradWeight(Function):
    """The gradients of the weight and, if ``bias``, of the bias, given that of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        bias: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_grad_output, needs_input = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_output if needs_input else None, input if needs_grad_output else None)
        ctx.geometry = stride, padding, dilation
        ctx.input_size, ctx.channels_last, ctx.bias = input.shape, _ops.is_channels_last(input), bias
        with _below_autograd():
            d_weight, d_bias = _ops.grad_weight(grad_output, input, kernel_size, stride, padding, dilation, bias)
        if not bias:
            ctx.mark_non_differentiable(d_bias)
        return d_weight, d_bias

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        d_grad_output = d_input = None
        if ctx.needs_input_grad[0]:
            d_grad_output = forward(input, grad_weight, grad_bias if ctx.bias else None, *geometry)
        if ctx.needs_input_grad[1]:
            d_input = grad_input(grad_output, grad_weight, ctx.input_size, *geometry, ctx.channels_last)
        return d_grad_output, d_input, None, None, None, None, None


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """(N, C, H, W) * (C·m, 1, kH, kW) -> (N, C·m, H_out, W_out)."""
    if torch.compiler.is_compiling():
        return _ops.forward(input, weight, bias, stride, padding, dilation)
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return DepthwiseConv2dFunction.apply(input, weight, bias, stride, padding, dilation)
    with _below_autograd():
        return _ops.forward(input, weight, bias, stride, padding, dilation)


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    channels_last: bool,
) -> Tensor:
    """(N, C·m, H_out, W_out) * (C·m, 1, kH, kW) -> (N, C, H, W), in channels_last or contiguous."""
    if torch.is_grad_enabled() and (grad_output.requires_grad or weight.requires_grad):
        return DepthwiseConv2dGradInput.apply(grad_output, weight, input_size, stride, padding, dilation, channels_last)
    with _below_autograd():
        return _ops.grad_input(grad_output, weight, input_size, stride, padding, dilation, channels_last)


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """(N, C·m, H_out, W_out) * (N, C, H, W) -> (C·m, 1, kH, kW), and (C·m,) if ``bias`` or else (0,)."""
    if torch.is_grad_enabled() and (grad_output.requires_grad or input.requires_grad):
        return DepthwiseConv2dGradWeight.apply(grad_output, input, kernel_size, stride, padding, dilation, bias)
    with _below_autograd():
        return _ops.grad_weight(grad_output, input, kernel_size, stride, padding, dilation, bias)


_registrations = torch.library.Library("dwconv", "IMPL")
_registrations.impl("forward", DepthwiseConv2dFunction.apply, "Autograd")
_registrations.impl("grad_input", DepthwiseConv2dGradInput.apply, "Autograd")
_registrations.impl("grad_weight", DepthwiseConv2dGradWeight.apply, "Autograd")
