"""``conv2d``: the depthwise convolution as a function of tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd
from ._ops import DTYPES, dtype_complaint
from .options import is_fft_allowed

__all__ = ["conv2d"]

IntPair = int | Sequence[int]
Padding = IntPair | Literal["same", "valid"]


def pair(value: IntPair, name: str) -> tuple[int, ...]:
    """One int for both sides, or one for each: (height, width). The operators check the values."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:  # a module's: at once
        if -(2**63) <= value[0] < 2**63 and -(2**63) <= value[1] < 2**63:
            return value
    sides: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) == 1:
        sides = sides + sides
    if len(sides) != 2:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 2 values, but got {name}={list(sides)}"
        )
    if type(sides[0]) is not int or type(sides[1]) is not int:
        try:
            sides = _index(sides[0]), _index(sides[1])
        except TypeError:
            raise TypeError(f"conv2d(): argument '{name}' must be an int or two ints, but got {value!r}") from None
    if not (-(2**63) <= sides[0] < 2**63 and -(2**63) <= sides[1] < 2**63):
        error = ValueError if isinstance(value, int) else TypeError  # as F.conv2d
        raise error(f"conv2d(): argument '{name}' must fit in 64 bits, but got {value!r}")
    return sides


def _index(side: Any) -> Any:
    """What counts as an int: a NumPy integer, say, or a SymInt; no bool, be it Python's or NumPy's."""
    if isinstance(side, torch.SymInt):
        return side
    if isinstance(side, (bool, Tensor)) or getattr(getattr(side, "dtype", None), "kind", None) == "b":
        raise TypeError
    if not hasattr(side, "__index__"):  # asked first, for torch.compile
        raise TypeError
    return operator.index(side)


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What 'same' adds at (top, left) and at (bottom, right); the odd one goes to the end, as in F.conv2d."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
    begin = (total[0] // 2, total[1] // 2)
    return begin, (total[0] - begin[0], total[1] - begin[1])


_is_any_autocast_enabled, _is_dynamo_compiling = torch._C._is_any_autocast_enabled, torch.compiler.is_dynamo_compiling


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    if not tensor.is_meta:  # asked of meta, torch raises
        device_type = tensor.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _not_a_tensor(input: object, weight: object, bias: object) -> TypeError:
    """Of the first that is none."""
    values = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    name, value = next((name, value) for name, value in values.items() if not isinstance(value, Tensor))
    return TypeError(f"conv2d(): argument '{name}' must be Tensor, not {type(value).__name__}")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    *,
    allow_fft: bool | None = None,
) -> Tensor:
    r"""Depthwise 2-D convolution: ``F.conv2d(input, weight, bias, stride, padding, dilation, groups=C)``.

    Filter ``c * m + q`` is applied to channel ``c`` of the input, for ``q`` in ``range(m)``:

    .. math::
        y[n, cm + q, i, j] = b[cm + q] + \sum_{u, v} w[cm + q, 0, u, v] \,
        x[n, c, i s_h + u d_h - p_h, j s_w + v d_w - p_w]

    Args:
        input: (N, C, H, W), or (C, H, W) for a single image. Any strides; float32, float64, float16 or bfloat16 (on
            CUDA the last two are summed in float32).
        weight: (C * m, 1, kH, kW) with a channel multiplier m >= 1; dtype and device of ``input``.
        bias: (C * m,), or None; dtype and device of ``input``.
        stride: in input pixels; an int or (height, width), at least 1.
        padding: zeros on every side, in input pixels; an int or (height, width), at least 0, or ``'valid'`` (none), or
            ``'same'`` (as many as keep the size; stride 1 only).
        dilation: distance of neighbouring taps in input pixels; an int or (height, width), at least 1.
        allow_fft: whether Fourier transforms may serve the call and its gradients; None, as :class:`dwconv.allow_fft`
            around it says, which is no unless there is one. See below.

    Returns:
        (N, C * m, H_out, W_out), or without N if ``input`` has none, with
        ``H_out = (H + 2 * padding - dilation * (kH - 1) - 1) // stride + 1`` and W_out alike; in channels_last where
        ``input`` or ``weight`` is, contiguous else. Differentiable any number of times; every result is deterministic.

    Raises:
        TypeError: where an argument is of the wrong type.
        ValueError: where an int exceeds 64 bits.
        NotImplementedError: where the dtype of ``input`` is none of these.
        RuntimeError: where sizes, dtypes, devices or values do not fit; the message names the argument.

    Under autocast the tensors are cast as F.conv2d casts them.

    Where Fourier transforms are allowed, they serve large kernels in float32 on CUDA, in NCHW at stride and dilation 1,
    where they are estimated to be faster than products one by one; :func:`dwconv.explain` says where. Everything else
    is served as it is without them: other dtypes, CPU tensors. They are deterministic too, and differ in two ways. The
    error of a result is not relative to the products it is the sum of, but to the largest result: about 4e-7 of the
    largest in the same plane (of one image and filter, or of the filter's gradient), so that integers are not exact and
    small results beside large ones are not precise. And an Inf or NaN, or a number so large that sums over the whole
    plane overflow, spoils more than the results it is part of: up to all of the plane, if it is in a plane of the input
    or of the gradient, up to all planes of the filter if it is in the weight, and all of a filter's gradient. Other
    images, and other filters, never see it.
    """
    fft = is_fft_allowed(allow_fft)
    # Most eager calls need none of what follows.
    if not fft and not _is_dynamo_compiling():
        output = autograd.short_way(input, weight, bias, stride, padding, dilation)
        if output is not None:
            return output

    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        tensors = input, weight, bias
        if has_torch_function(tensors):  # what stands for a tensor, such as a proxy of torch.fx
            asked = {} if allow_fft is None else {"allow_fft": allow_fft}
            return handle_torch_function(conv2d, tensors, *tensors, stride, padding, dilation, **asked)
        raise _not_a_tensor(*tensors)

    if _is_any_autocast_enabled():
        autocast = _autocast_dtype(input)
        if autocast is not None:
            input = _cast(input, autocast)
            if not fft and not _is_dynamo_compiling():
                output = autograd.short_way(input, weight, bias, stride, padding, dilation)  # casts the weights itself
                if output is not None:
                    return output
            weight, bias = _cast(weight, autocast), bias if bias is None else _cast(bias, autocast)

    if input.dtype not in DTYPES:  # the operators say so too, but can only raise RuntimeError
        raise NotImplementedError(dtype_complaint(input, "input"))

    strides = pair(stride, "stride")
    dilations = pair(dilation, "dilation")
    batched = input.dim() != 3
    if not batched:
        input = input.unsqueeze(0)

    paddings: tuple[int, ...] = (0, 0)
    if not isinstance(padding, str):
        paddings = pair(padding, "padding")
    elif padding == "same":
        if strides != (1, 1):
            raise RuntimeError(
                f"padding='same' is not supported for strided convolutions, but got stride={list(strides)}"
            )
        if input.dim() == weight.dim() == 4:  # or else the operator complains of them as they are
            paddings, end = same_padding(weight.shape[2:], dilations)
            if paddings != end:  # one more at the end: pad that much, as F.conv2d does
                input = F.pad(input, (0, end[1] - paddings[1], 0, end[0] - paddings[0]))
    elif padding != "valid":
        raise RuntimeError(f"Invalid padding string: {padding!r}; expected 'same' or 'valid'")

    output = autograd.forward(input, weight, bias, strides, paddings, dilations, fft)
    return output if batched else output.squeeze(0)
