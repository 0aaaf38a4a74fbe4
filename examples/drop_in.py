"""DepthwiseConv2d in the place of nn.Conv2d: the same constructor, the same weights, the same results, less time.

    python examples/drop_in.py                                   (16, 64, 512, 512), kernel 3
    python examples/drop_in.py --kernel 3 7 --height 120 --width 200 --padding 1 3
    python examples/drop_in.py --separable --dtype bfloat16 --channels-last

Prints by how much the results differ and how long both take; exits with 1 where they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwconv import DepthwiseConv2d

IntPair = int | tuple[int, int]


class Model(nn.Module):
    """A depthwise convolution by nn.Conv2d: (N, C, H, W) -> (N, C, H_out, W_out)."""

    def __init__(
        self, in_channels: int, kernel_size: IntPair, stride: IntPair = 1, padding: IntPair = 0, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride=stride, padding=padding, groups=in_channels, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class ModelNew(nn.Module):
    """The same by DepthwiseConv2d."""

    def __init__(
        self, in_channels: int, kernel_size: IntPair, stride: IntPair = 1, padding: IntPair = 0, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv2d = DepthwiseConv2d(in_channels, kernel_size, stride=stride, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


batch_size, in_channels, height, width = 16, 64, 512, 512
kernel_size, stride, padding, bias = 3, 1, 0, False


def get_inputs() -> list[Tensor]:
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs() -> list[object]:
    return [in_channels, kernel_size, stride, padding, bias]


class Comparison(NamedTuple):
    """One tensor as both models compute it. Distances are the largest over all elements."""

    name: str
    difference: float  # between the two models
    error: float  # of the new model, from the same model in float64
    limit: float  # that the error may reach

    @property
    def is_equal(self) -> bool:
        return self.error <= self.limit  # False for NaN


def passes(model: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients: of the input, and of every parameter by its name."""
    x = x.detach().requires_grad_()
    output = model(x)
    wanted = {"x": x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(output, list(wanted.values()), grad_output.to(output.dtype))
    return {"output": output.detach(), **{f"grad of {name}": grad for name, grad in zip(wanted, gradients)}}


def rounding(model: nn.Module, name: str, grad_output: Tensor, dtype: torch.dtype) -> float:
    """What the rounding of `dtype` may do to a tensor, relative to its largest element.

    A result is rounded once to its dtype, and before that summed in (at least) float32. The rounding errors of a sum of
    n terms are independent, and add up to some sqrt(n) units in the last place.
    """
    parameter = name.removeprefix("grad of ")
    if parameter in dict(model.named_parameters()):
        terms = grad_output.numel() / grad_output.shape[1]  # one for each position of each image
    else:
        terms = max(p[0].numel() for p in model.parameters() if p.dim() == 4)
    accumulator = torch.promote_types(dtype, torch.float32)
    return 2 * torch.finfo(dtype).eps + 2 * terms**0.5 * torch.finfo(accumulator).eps


def compare(model: nn.Module, model_new: nn.Module, x: Tensor) -> list[Comparison]:
    """Output and all gradients of both models, against those of `model` in float64.

    `model_new` may err by rounding, or by twice as much as `model` does. Raises a RuntimeError where the outputs differ
    in size.
    """
    with torch.no_grad():
        output, size_new = model(x), model_new(x).shape
    if size_new != output.shape:
        raise RuntimeError(f"expected an output of size {tuple(output.shape)}, but got {tuple(size_new)}")
    grad_output = torch.empty_like(output).normal_(generator=torch.Generator(x.device).manual_seed(0))
    wide = copy.deepcopy(model).to(torch.float64, memory_format=torch.contiguous_format)
    exact = passes(wide, x.double().contiguous(), grad_output.double().contiguous())
    old, new = passes(model, x, grad_output), passes(model_new, x, grad_output)

    def distance(a: Tensor, b: Tensor) -> float:
        return (a.double() - b).abs().max().item()

    comparisons = []
    for name, expected in exact.items():
        error, error_old = distance(new[name], expected), distance(old[name], expected)
        scale = expected.abs().max().item()
        limit = max(scale * rounding(model, name, grad_output, x.dtype), 2 * error_old)
        comparisons.append(Comparison(name, distance(new[name], old[name]), error, limit))
    return comparisons


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def medians(calls: list[Callable[[], object]], device: torch.device, seconds: float = 0.5) -> list[float]:
    """The median milliseconds of each call, taken in turn for some `seconds` after a warm-up."""
    for _ in range(3):
        estimate = sum(milliseconds(call, device) for call in calls)
    rounds = max(5, min(100, int(1e3 * seconds / max(estimate, 1e-3))))
    found = [[milliseconds(call, device) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*found)]


def times(models: list[nn.Module], x: Tensor) -> dict[str, list[float]]:
    """Milliseconds of each model: forward alone, and forward and backward."""
    x = x.detach().requires_grad_()
    with torch.no_grad():
        grad_output = torch.ones_like(models[0](x))

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    def forward_and_backward(model: nn.Module) -> None:
        torch.autograd.grad(model(x), [x, *model.parameters()], grad_output)

    return {
        "forward": medians([partial(forward, model) for model in models], x.device),
        "forward + backward": medians([partial(forward_and_backward, model) for model in models], x.device),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()

    def pair(name: str, default: int) -> None:
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=[default], metavar=("SIZE", "WIDTH"),
            help=f"one number, or height and width (default {default})",
        )  # fmt: skip

    parser.add_argument("--batch", type=int, help=f"images (default {batch_size}, and 1 on the CPU)")
    parser.add_argument("--channels", type=int, default=in_channels)
    parser.add_argument("--height", type=int, default=height)
    parser.add_argument("--width", type=int, default=width)
    pair("kernel", kernel_size)
    pair("stride", stride)
    pair("padding", padding)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--separable", action="store_true", help="with a pointwise convolution (1x1) behind it")
    parser.add_argument("--dtype", choices=["float32", "float64", "float16", "bfloat16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if has_cuda else "cpu"))
    options = parser.parse_args(arguments)
    for name in ("kernel", "stride", "padding"):
        value = getattr(options, name)
        if len(value) > 2:
            parser.error(f"--{name} takes one number or two, but got {len(value)}")
        setattr(options, name, value[0] if len(value) == 1 else tuple(value))
    if options.batch is None:
        options.batch = batch_size if options.device.type == "cuda" else 1
        if options.device.type != "cuda":
            print(f"On the CPU: a batch of 1 instead of {batch_size} (--batch {batch_size} for all).")
    return options


def build(kind: type[nn.Module], options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)  # the same weights for both
    model = kind(options.channels, options.kernel, options.stride, options.padding, options.bias)
    if options.separable:
        model = nn.Sequential(model, nn.Conv2d(options.channels, options.channels, 1, bias=options.bias))
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    return model.to(options.device, getattr(torch, options.dtype), memory_format=memory_format)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model, model_new = build(Model, options), build(ModelNew, options)
    size = options.batch, options.channels, options.height, options.width
    x = torch.rand(size, device=options.device).to(next(model.parameters()).dtype)
    x = x.contiguous(memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)

    place = torch.cuda.get_device_name(x.device) if x.is_cuda else f"the CPU, {torch.get_num_threads()} threads"
    print(f"{size} {options.dtype}{' channels_last' * options.channels_last}, on {place}\n\n{model_new}\n")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # both in full float32
        comparisons = compare(model, model_new, x)
        milliseconds_of = times([model, model_new], x)

    width = max(len(comparison.name) for comparison in comparisons)
    print(f"{'largest':<{width}}  {'difference':>10}  {'error':>10}  {'limit':>10}")
    for c in comparisons:
        verdict = "" if c.is_equal else "  WRONG"
        print(f"{c.name:<{width}}  {c.difference:>10.2e}  {c.error:>10.2e}  {c.limit:>10.2e}{verdict}")
    print(f"\n{'milliseconds':<18}  {'nn.Conv2d':>9}  {'DepthwiseConv2d':>15}")
    for name, (before, after) in milliseconds_of.items():
        print(f"{name:<18}  {before:>9.3f}  {after:>15.3f}  {before / after:.2f} times as fast")

    if not all(comparison.is_equal for comparison in comparisons):
        print("\nThe results differ by more than rounding.", file=sys.stderr)
        return 1
    print("\nThe results are equal to rounding.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
