"""``DepthwiseConv2d``: the depthwise convolution as an nn.Conv2d."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import IntPair, Padding, conv2d, pair

__all__ = ["DepthwiseConv2d"]


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(C, C * m, kernel_size, stride, padding, dilation, groups=C, bias)``, faster.

    It is an nn.Conv2d: the same attributes, parameters, state_dict and, from the same seed, the same initial weights;
    what looks for an nn.Conv2d (pruning, fusing, counting) finds one. Its ``repr`` is the call that makes its like.

    Args:
        in_channels: C.
        kernel_size: an int or (height, width).
        stride: an int or (height, width), in input pixels.
        padding: an int or (height, width), in input pixels, or ``'same'`` or ``'valid'``.
        bias: whether to learn a bias.
        dilation: an int or (height, width), in input pixels.
        channel_multiplier: m, the number of filters for each channel; the output has C * m channels.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        device, dtype: of the parameters.

    Attributes:
        allow_fft: whether Fourier transforms may serve; None, the default, as :class:`dwconv.allow_fft` says. To be set
            at any time, of converted layers too; not part of the state_dict.

    Shape:
        input (N, C, H, W) or (C, H, W), output (N, C * m, H_out, W_out) or (C * m, H_out, W_out);
        weight (C * m, 1, kH, kW), bias (C * m,). See :func:`dwconv.conv2d` for the dtypes and the errors.

    Example:
        >>> layer = DepthwiseConv2d(64, 3, padding=1)
        >>> layer(torch.randn(16, 64, 56, 56)).shape
        torch.Size([16, 64, 56, 56])
    """

    # An attribute alone: the constructor's arguments are what convert finds in an nn.Conv2d.
    allow_fft: bool | None = None

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        bias: bool = False,
        *,
        dilation: IntPair = 1,
        channel_multiplier: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(channel_multiplier, bool) or not isinstance(channel_multiplier, int) or channel_multiplier < 1:
            raise ValueError(f"channel_multiplier must be a positive int, but got {channel_multiplier!r}")
        super().__init__(
            in_channels,
            in_channels * channel_multiplier,
            pair(kernel_size, "kernel_size"),  # type: ignore[arg-type]
            pair(stride, "stride"),  # type: ignore[arg-type]
            padding if isinstance(padding, str) else pair(padding, "padding"),  # type: ignore[arg-type]
            pair(dilation, "dilation"),  # type: ignore[arg-type]
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    @property
    def channel_multiplier(self) -> int:
        return self.out_channels // self.in_channels

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding: Padding = 0
        else:
            padding = self.padding  # type: ignore[assignment]
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, allow_fft=self.allow_fft)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        text += f", bias={self.bias is not None}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.channel_multiplier != 1:
            text += f", channel_multiplier={self.channel_multiplier}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text
