"""``convert``: DepthwiseConv2d in place of every depthwise nn.Conv2d of a model; ``revert``: the way back."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import nn

from .modules import DepthwiseConv2d

__all__ = ["convert", "revert"]

logger = logging.getLogger("dwconv")

Model = TypeVar("Model", bound=nn.Module)

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _is_served(module: nn.Module) -> bool:
    # A subclass of nn.Conv2d has a forward of its own, which a change of class would drop; so has an instance whose
    # forward was replaced. A subclass of Tensor (quantised, sharded) may know nn.Conv2d's operator alone.
    if type(module) is not nn.Conv2d or "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    return weight.dtype in _DTYPES and module.groups == module.in_channels > 1


def _check_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be nn.Module, not {type(model).__name__}")


def convert(model: Model) -> Model:
    """Lets dwconv compute every depthwise nn.Conv2d of ``model``, in place, and returns ``model``.

    The layers stay the same objects with another class, :class:`dwconv.DepthwiseConv2d`: their parameters, buffers,
    names, hooks, mode, dtype and device are untouched, so that optimizers, checkpoints and references to them stay
    valid. Served are layers of exactly the class nn.Conv2d with ``groups == in_channels > 1`` and a plain weight of
    dtype float32, float64, float16 or bfloat16. All others are left alone: subclasses and layers whose ``forward`` was
    replaced, since they may compute something else (a parametrised layer is one), and quantised or sharded weights; so
    convert first, then parametrise, quantise or shard. How many were taken is logged to the logger ``dwconv`` at level
    INFO.

    Args:
        model: any nn.Module; it may be a convolution itself.

    Raises:
        TypeError: if ``model`` is not an nn.Module.
    """
    _check_module(model, "convert")
    served = [module for module in model.modules() if _is_served(module)]
    for module in served:
        module.__class__ = DepthwiseConv2d
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    logger.info("%s: %d of %d convolutions are now computed by dwconv", type(model).__name__, len(served), convolutions)
    return model


def revert(model: Model) -> Model:
    """Makes every DepthwiseConv2d of ``model`` an nn.Conv2d again, in place, and returns ``model``.

    For what looks for that very class rather than for an instance of it, such as TorchScript and eager-mode
    quantisation. Like :func:`convert` it changes the class of the layers and nothing else; subclasses of
    DepthwiseConv2d are left alone.

    Args:
        model: any nn.Module; it may be a DepthwiseConv2d itself.

    Raises:
        TypeError: if ``model`` is not an nn.Module.
    """
    _check_module(model, "revert")
    ours: list[nn.Module] = [module for module in model.modules() if type(module) is DepthwiseConv2d]
    for module in ours:
        module.__class__ = nn.Conv2d
    logger.info("%s: %d convolutions are no longer computed by dwconv", type(model).__name__, len(ours))
    return model
