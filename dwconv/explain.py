"""``explain``: which kernel a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import _C, _ops
from .functional import IntPair, Padding, conv2d
from .options import is_fft_allowed

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
        choices = {name: getattr(self, name) for name in PASSES}
        width = max(len(choice.plan) for choice in choices.values())
        return "\n".join(f"{name:<11}  {plan:<{width}}  {reason}" for name, (plan, reason) in choices.items())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the arguments that reach the operator and what it returns."""

    arguments: tuple[Any, ...]
    output: Tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is _ops.forward:
            self.arguments, self.output = args, output
        return output


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    *,
    allow_fft: bool | None = None,
) -> Explanation:
    """Says which plan serves :func:`dwconv.conv2d` with these arguments in each pass, and why. Computes nothing.

    Args: those of :func:`dwconv.conv2d`. Tensors on the device ``meta`` are explained as CUDA tensors, so that a layer
    can be looked up without a GPU, as one of compute capability 9.0 serves it. The gradient of the output is taken to
    lie in memory as the output does.

    Raises:
        RuntimeError, TypeError: as :func:`dwconv.conv2d`.

    Example:
        >>> x, w = torch.empty(16, 64, 512, 512, device="meta"), torch.empty(64, 1, 3, 3, device="meta")
        >>> explain(x, w).forward.plan
        'stream_nchw'
    """
    # conv2d itself, on tensors without numbers: what it makes of padding, autocast or a single image is what counts.
    mode = FakeTensorMode()

    def fake(tensor: Tensor | None) -> Tensor | None:
        if not isinstance(tensor, Tensor):
            return tensor  # conv2d says what is wrong
        meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, meta, torch.device("cuda") if tensor.is_meta else tensor.device)

    with torch.no_grad():
        fakes = fake(input), fake(weight), fake(bias)
        with mode, _Recorder() as recorder:  # type: ignore[no-untyped-call]
            conv2d(*fakes, stride, padding, dilation, allow_fft=allow_fft)  # type: ignore[arg-type]
    x, w, _, *geometry = recorder.arguments[:6]

    if x.device.type == "cpu":
        choice = PlanChoice("aten", "CPU tensors go to ATen's own convolution (oneDNN)")
        return Explanation(choice, choice, choice)
    if _ops.BUILD["cuda"] is None and not input.is_meta:
        choice = PlanChoice("none", "this dwconv was built without CUDA")
        return Explanation(choice, choice, choice)
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = tuple(x.shape), x.stride(), tuple(w.shape), recorder.output.stride()
    device = () if input.is_meta else _device(input.device)
    fft = is_fft_allowed(allow_fft)

    def choice_of(name: str) -> PlanChoice:
        return PlanChoice(*_C.plans(name, dtype, *sizes, *geometry, *device, allow_fft=fft)[0])  # type: ignore[misc]

    return Explanation(*map(choice_of, PASSES))


def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 is 9.0) and shared memory that a block may have, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
