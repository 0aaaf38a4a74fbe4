"""Gradients of the operators, of any order, in reverse and forward mode, and their batching rules for torch.vmap.

The three operators are closed under differentiation. With g the gradient of the output and u, b those that grad_weight
and grad_bias themselves receive:

===========  ==============================  ========================================================
operator     computes                        its gradients
===========  ==============================  ========================================================
forward      y(x, w, bias)                   x: grad_input(g, w); w, bias: grad_weight(g, x)
grad_input   dx(g, w)                        g: forward(·, w);    w: grad_weight(g, ·)
grad_weight  dw, db(g, x)                    g: forward(x, u, b); x: grad_input(g, u)
===========  ==============================  ========================================================

Each is linear in either of its tensors, so that its tangent is the sum of itself with one of them replaced by that
one's tangent.

All of it is registered with the dispatcher, which finds its way through torch.func, torch.compile and the like; an
operator called by its name is differentiable too. ``short_way`` is for where nothing of the kind is going on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _ops

Pair = Sequence[int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation
Below = Callable[[], AbstractContextManager[Any]]  # in which a Function calls its operator

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_torch_func = torch._C._are_functorch_transforms_active
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode AD may be at work, so that only the dispatcher knows the way."""
    return _in_torch_func() or forward_ad._current_level >= 0


def _call(op: Callable[..., Any], *arguments: Any) -> Any:
    """An operator within a gradient or a tangent, which may be differentiated itself."""
    if _is_grad_enabled() or _is_transformed():
        return op(*arguments)
    with _below_autograd():
        return op(*arguments)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Function(_SingleLevelFunction):
    """A torch.autograd.Function less its own way through torch.func, since these have the dispatcher's.

    That way asks for a ``setup_context``, with which every call costs the host some 20 us more.
    """

    apply: ClassVar[Callable[..., Any]]
    _backward_cls: ClassVar[Any]  # of the nodes, whose `apply` the engine calls
    _compiled_autograd_key = Function._compiled_autograd_key


def _save(ctx: Any, a: Tensor, b: Tensor) -> None:
    """Keeps each of the two for the gradient of the other, and both for a tangent."""
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
    if _is_transformed():
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)


class DepthwiseConv2dFunction(_Function):
    """y = conv2d(input, weight, bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        allow_fft: bool,
        below: Below,
    ) -> Tensor:
        _save(ctx, input, weight)
        ctx.geometry, ctx.allow_fft = (stride, padding, dilation), allow_fft
        ctx.input_size, ctx.kernel_size = input.shape, weight.shape[2:]
        with below():
            output = _ops.forward(input, weight, bias, stride, padding, dilation, allow_fft)
        ctx.channels_last = _ops.is_channels_last(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        input, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_input = d_weight = d_bias = None
        if needs_input:
            d_input = _call(
                _ops.grad_input, grad_output, weight, ctx.input_size, *geometry, ctx.channels_last, ctx.allow_fft
            )
        if needs_weight:
            d_weight, d_bias = _call(
                _ops.grad_weight, grad_output, input, ctx.kernel_size, *geometry, needs_bias, ctx.allow_fft
            )
        elif needs_bias:
            d_bias = grad_output.sum((0, 2, 3))
        return d_input, d_weight, d_bias if needs_bias else None, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> Tensor | None:
        input, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        if input_t is None and weight_t is None:
            input_t = torch.zeros_like(input)
        return _sum(
            None if input_t is None else _call(_ops.forward, input_t, weight, bias_t, *geometry, ctx.allow_fft),
            None
            if weight_t is None
            else _call(_ops.forward, input, weight_t, bias_t if input_t is None else None, *geometry, ctx.allow_fft),
        )


class DepthwiseConv2dGradInput(_Function):
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
        allow_fft: bool,
        below: Below,
    ) -> Tensor:
        _save(ctx, grad_output, weight)
        ctx.geometry, ctx.allow_fft = (stride, padding, dilation), allow_fft
        ctx.input_size, ctx.kernel_size, ctx.channels_last = input_size, weight.shape[2:], channels_last
        with below():
            return _ops.grad_input(grad_output, weight, input_size, *ctx.geometry, channels_last, allow_fft)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grad_output, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        d_grad_output = d_weight = None
        if ctx.needs_input_grad[0]:
            d_grad_output = _call(_ops.forward, grad, weight, None, *geometry, ctx.allow_fft)
        if ctx.needs_input_grad[1]:
            d_weight, _ = _call(_ops.grad_weight, grad_output, grad, ctx.kernel_size, *geometry, False, ctx.allow_fft)
        return d_grad_output, d_weight, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_output_t: Tensor | None, weight_t: Tensor | None, *_: None) -> Tensor | None:
        grad_output, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        others = ctx.input_size, *geometry, ctx.channels_last, ctx.allow_fft
        return _sum(
            None if grad_output_t is None else _call(_ops.grad_input, grad_output_t, weight, *others),
            None if weight_t is None else _call(_ops.grad_input, grad_output, weight_t, *others),
        )


class DepthwiseConv2dGradWeight(_Function):
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
        allow_fft: bool,
        below: Below,
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, grad_output, input)
        ctx.geometry, ctx.allow_fft = (stride, padding, dilation), allow_fft
        ctx.kernel_size, ctx.bias = kernel_size, bias
        ctx.input_size, ctx.channels_last = input.shape, _ops.is_channels_last(input)
        with below():
            d_weight, d_bias = _ops.grad_weight(grad_output, input, kernel_size, *ctx.geometry, bias, allow_fft)
        if not bias:
            ctx.mark_non_differentiable(d_bias)
        return d_weight, d_bias

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_weight is None:
            if grad_bias is None:
                return (None,) * 9
            grad_weight = grad_bias.new_zeros(grad_bias.shape[0], 1, *ctx.kernel_size)
        grad_output, input = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        d_grad_output = d_input = None
        if ctx.needs_input_grad[0]:
            d_grad_output = _call(
                _ops.forward, input, grad_weight, grad_bias if ctx.bias else None, *geometry, ctx.allow_fft
            )
        if ctx.needs_input_grad[1]:
            d_input = _call(
                _ops.grad_input, grad_output, grad_weight, ctx.input_size, *geometry, ctx.channels_last, ctx.allow_fft
            )
        return d_grad_output, d_input, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_output_t: Tensor | None, input_t: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        d_weight = d_bias = None
        if grad_output_t is not None:
            d_weight, d_bias = _call(
                _ops.grad_weight, grad_output_t, input, ctx.kernel_size, *geometry, ctx.bias, ctx.allow_fft
            )
        elif ctx.bias:
            d_bias = grad_output.new_zeros(grad_output.shape[1])
        if input_t is not None:
            moved, _ = _call(_ops.grad_weight, grad_output, input_t, ctx.kernel_size, *geometry, False, ctx.allow_fft)
            d_weight = _sum(d_weight, moved)
        return d_weight, d_bias if ctx.bias else None


# ---------------------------------------------------------------------------- the short way
#
# An eager call on plain tensors goes to operators of fewer arguments: each costs the host some 0.3 us.

_forward_packed, _forward_packed_cast = _ops.forward_packed._op, _ops.forward_packed_cast._op
_backward_packed, _backward_packed_bias = _ops.backward_packed._op, _ops.backward_packed_bias._op
_has_short_way_back = _ops.has_short_way_back


def _unpack(packed: int) -> tuple[Geometry, bool]:
    """The geometry, and whether weight and bias are to be cast to the input's dtype, and their gradients back."""
    numbers, casts = _ops.unpack_geometry(packed)
    return (numbers[:2], numbers[2:4], numbers[4:]), casts


def _unpacked_forward(input: Tensor, weight: Tensor, bias: Tensor | None, packed: int) -> Tensor:
    geometry, casts = _unpack(packed)
    if casts:
        weight, bias = weight.to(input.dtype), bias if bias is None else bias.to(input.dtype)
    return _ops.forward(input, weight, bias, *geometry)


def _unpacked_forward_cast(input: Tensor, weight: Tensor, bias: Tensor | None, packed: int) -> tuple[Tensor, Tensor]:
    weight = weight.to(input.dtype)
    return _unpacked_forward(input, weight, bias, packed), weight


def _unpacked_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, packed: int, bias: bool = False
) -> tuple[Tensor, ...]:
    (geometry, casts), channels_last = _unpack(packed), _ops.output_is_channels_last(input, weight)
    if casts:
        weight = weight.to(input.dtype)  # autograd casts what follows to the dtypes of weight and bias
    d_input = _call(_ops.grad_input, grad_output, weight, input.shape, *geometry, channels_last)
    d_weight, d_bias = _call(_ops.grad_weight, grad_output, input, weight.shape[2:], *geometry, bias)
    return (d_input, d_weight, d_bias) if bias else (d_input, d_weight)


class DepthwiseConv2dPackedFunction(_Function):
    """DepthwiseConv2dFunction where input and weight need their gradients: one operator computes them all."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, packed: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.packed = packed
        return _forward_packed(input, weight, bias, packed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # input, weight, and the weight as it was cast
        needs_bias = ctx.needs_input_grad[2]
        if not _has_short_way_back(grad_output):
            gradients = _unpacked_backward(grad_output, saved[0], saved[1], ctx.packed, needs_bias)
        elif needs_bias:
            gradients = _backward_packed_bias(grad_output, saved[0], saved[-1], ctx.packed)
        else:
            gradients = _backward_packed(grad_output, saved[0], saved[-1], ctx.packed)
        return (*gradients, None) if needs_bias else (*gradients, None, None)


class DepthwiseConv2dPackedCastFunction(DepthwiseConv2dPackedFunction):
    """The same where autocast casts weight and bias: by the operators, once for both ways, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, packed: int) -> Tensor:
        output, cast = _forward_packed_cast(input, weight, bias, packed)
        ctx.save_for_backward(input, weight, cast)
        ctx.packed = packed
        return output


# At once: a node's own `apply` asks each time under which of two names a Function has its backward.
for _function in (DepthwiseConv2dPackedFunction, DepthwiseConv2dPackedCastFunction):
    _function._backward_cls.apply = _function.backward

# short_way(input, weight, bias, stride, padding, dilation) is the output, or None where something is unusual: a tensor,
# a number (packed_geometry.h has small ones only), a dtype, a rank, or the occasion; also where of input and weight one
# alone needs a gradient, or where autocast casts the input, or weights that are not of float32.
_ops.prepare_short_way(
    tensor_types=(Tensor, torch.nn.Parameter),
    dtypes=_ops.DTYPES,
    cast_dtype=torch.float32,
    occasions=(_in_torch_func, torch._C._len_torch_dispatch_stack),
    forward_ad=forward_ad,
    is_any_autocast_enabled=torch._C._is_any_autocast_enabled,
    is_autocast_enabled=torch.is_autocast_enabled,
    autocast_dtype=torch.get_autocast_dtype,
    is_grad_enabled=_is_grad_enabled,
    without_grad=_forward_packed,
    with_grad=DepthwiseConv2dPackedFunction.apply,
    with_grad_and_casts=DepthwiseConv2dPackedCastFunction.apply,
)
short_way = _ops.short_way


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    allow_fft: bool,
) -> Tensor:
    """(N, C, H, W) * (C·m, 1, kH, kW) -> (N, C·m, H_out, W_out)."""
    if allow_fft:
        return _ops.forward(input, weight, bias, stride, padding, dilation, allow_fft)
    output = None if _is_compiling() else short_way(input, weight, bias, stride, padding, dilation)
    return _ops.forward(input, weight, bias, stride, padding, dilation) if output is None else output


# ---------------------------------------------------------------------------- with the dispatcher


@contextmanager
def _below_level(grad: bool, forward_grad: bool) -> Iterator[None]:
    """``_below_autograd`` of one transform of torch.func. The ones around it differentiate too, if any does."""
    with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(forward_grad), _below_autograd():
        yield


def _apply(function: type[_Function], op: torch._ops.OpOverload[..., Any]) -> Callable[..., Any]:
    count = len(op._schema.arguments)

    def apply(*arguments: Any) -> Any:
        if len(arguments) < count:  # the dispatcher leaves allow_fft out where it is False
            arguments = *arguments, False
        if not _in_torch_func():
            return function.apply(*arguments, _below_autograd)
        modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return function.apply(*arguments, functools.partial(_below_level, *modes))

    return apply


_registrations = torch.library.Library("dwconv", "IMPL")
_registrations.impl("forward", _apply(DepthwiseConv2dFunction, _ops.forward), "Autograd")
_registrations.impl("grad_input", _apply(DepthwiseConv2dGradInput, _ops.grad_input), "Autograd")
_registrations.impl("grad_weight", _apply(DepthwiseConv2dGradWeight, _ops.grad_weight), "Autograd")
for _op, _unpacked in (
    (_ops.forward_packed, _unpacked_forward),
    (_ops.forward_packed_cast, _unpacked_forward_cast),
    (_ops.backward_packed, _unpacked_backward),
    (_ops.backward_packed_bias, functools.partial(_unpacked_backward, bias=True)),
):
    _registrations.impl(_op, torch.library.fallthrough_kernel, "Autograd")
    _registrations.impl(_op, _unpacked, "CompositeExplicitAutograd")  # neither on the CPU nor on CUDA


# ---------------------------------------------------------------------------- torch.vmap
#
# The dimension that vmap adds goes into the batch, or where each has filters of its own, into the channels.


def _merge(tensor: Tensor, batch_dim: int | None, batch_size: int, dim: int) -> Tensor:
    """Merges the dimension of vmap into `dim`, the outer of the two."""
    if batch_dim is None:
        tensor, batch_dim = tensor.expand(batch_size, *tensor.shape), 0
    return tensor.movedim(batch_dim, dim).flatten(dim, dim + 1)


def _merge_size(size: Sequence[int], batch_size: int, dim: int) -> list[int]:
    return [batch_size * side if d == dim else side for d, side in enumerate(size)]


def _split(tensor: Tensor, batch_size: int, dim: int) -> Tensor:
    return tensor.unflatten(dim, (batch_size, tensor.shape[dim] // batch_size))


@torch.library.register_vmap("dwconv::forward")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    allow_fft: bool = False,
) -> tuple[Tensor, int]:
    size = info.batch_size
    input_dim, weight_dim, bias_dim = in_dims[:3]
    dim = 0 if weight_dim is bias_dim is None else 1
    input = _merge(input, input_dim, size, dim)
    if dim == 1:
        weight = _merge(weight, weight_dim, size, 0)
        bias = None if bias is None else _merge(bias, bias_dim, size, 0)
    return _split(_ops.forward(input, weight, bias, stride, padding, dilation, allow_fft), size, dim), dim


@torch.library.register_vmap("dwconv::grad_input")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    channels_last: bool,
    allow_fft: bool = False,
) -> tuple[Tensor, int]:
    size = info.batch_size
    grad_output_dim, weight_dim = in_dims[:2]
    dim = 0 if weight_dim is None else 1
    grad_output = _merge(grad_output, grad_output_dim, size, dim)
    if dim == 1:
        weight = _merge(weight, weight_dim, size, 0)
    input_size = _merge_size(input_size, size, dim)
    grad = _ops.grad_input(grad_output, weight, input_size, stride, padding, dilation, channels_last, allow_fft)
    return _split(grad, size, dim), dim


@torch.library.register_vmap("dwconv::grad_weight")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    bias: bool,
    allow_fft: bool = False,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    grad_output_dim, input_dim = in_dims[:2]
    grad_output, input = _merge(grad_output, grad_output_dim, size, 1), _merge(input, input_dim, size, 1)
    grads = _ops.grad_weight(grad_output, input, kernel_size, stride, padding, dilation, bias, allow_fft)
    return (_split(grads[0], size, 0), _split(grads[1], size, 0)), (0, 0)
