"""Times whole models before and after dwconv.convert: the training step, and inference at batch 1 and at batch 128.

A step is timed as its user sees it, by the host's clock until the device is done, with everything as PyTorch has it by
default. The model before and the model after take turns, step by step, so that what else keeps the host busy meets
both. The peak of memory is what is asked of the allocator, less what was there before the model; the allocator rounds
up, differently each time.

How much of a step is depthwise convolution comes from timing each depthwise layer that it runs, with the sizes and
strides it has there, on its own, with cold L2: at batch 1, where tensors stay in L2 from layer to layer, that is an
upper bound. What remains possible is the step after `convert` with a copy of the same bytes in place of every depthwise
pass.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import report
import timm
import torch
import torch.nn.functional as F
from cells import LAYOUTS
from layers import copy_time, machine, release_memory
from timing import DEVICE, measure, number_of_sets
from torch import Tensor, nn
from tqdm import tqdm

import dwconv

REPLKNET = "replknet_31b_like"
MODELS = (
    "mobilenetv2_100",
    "mobilenetv4_conv_medium",
    "efficientnet_b0",
    "convnext_tiny",
    "inception_next_tiny",
    "mixnet_l",
    "repvit_m1_1",
    "fastvit_t8",
    "starnet_s1",
    REPLKNET,
)
MODES = {"train": 128, "latency": 1, "throughput": 128}  # and their batches; the last two are inference
DTYPES = ("float32", "bfloat16")  # the second one by autocast
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the outputs before and after: layers of a model amplify rounding
LAYER_BUDGET_US = 15e3


class RepLKNetLike(nn.Module):
    """A stack with the widths, depths and kernels of RepLKNet-31B, in the form that its branches are merged to.

    Like it, not it: stem, stages of large-kernel and feed-forward blocks and transitions follow the paper (Ding et al.,
    2022); initialisation, stochastic depth and the small parallel kernels do not.
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 1024),
        depths: Sequence[int] = (2, 2, 18, 2),
        kernels: Sequence[int] = (31, 29, 27, 13),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        width = widths[0]
        self.stem = nn.Sequential(
            self.convolution(3, width, 3, stride=2),
            self.convolution(width, width, 3, groups=width),
            self.convolution(width, width, 1),
            self.convolution(width, width, 3, stride=2, groups=width),
        )
        stages: list[nn.Module] = []
        for next_width, depth, kernel in zip(widths, depths, kernels):
            if stages:
                stages += [
                    self.convolution(width, next_width, 1),
                    self.convolution(next_width, next_width, 3, stride=2, groups=next_width),
                ]
            width = next_width
            for _ in range(depth):
                stages += [self.large_kernel(width, kernel), self.feed_forward(width)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
        )

    @staticmethod
    def convolution(
        inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * activation)

    @classmethod
    def large_kernel(cls, width: int, kernel: int) -> nn.Module:
        return Residual(
            nn.BatchNorm2d(width),
            cls.convolution(width, width, 1),
            cls.convolution(width, width, kernel, groups=width),
            cls.convolution(width, width, 1, activation=False),
        )

    @classmethod
    def feed_forward(cls, width: int) -> nn.Module:
        return Residual(
            nn.BatchNorm2d(width),
            cls.convolution(width, 4 * width, 1, activation=False),
            nn.GELU(),
            cls.convolution(4 * width, width, 1, activation=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@dataclass(frozen=True)
class Setting:
    model: str
    mode: str
    dtype: str
    layout: str
    batch: int
    image_size: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.model, self.mode, self.dtype, self.layout

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == "bfloat16")


def create(name: str) -> nn.Module:
    return RepLKNetLike() if name == REPLKNET else timm.create_model(name)


def step_of(setting: Setting, model: nn.Module, images: Tensor) -> Callable[[], object]:
    """What is timed."""
    if setting.mode != "train":

        @torch.inference_mode()
        def infer() -> object:
            with setting.autocast():
                return model(images)

        return infer

    labels = torch.randint(1000, (setting.batch,), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return train


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def requested_bytes(which: str) -> int:
    """Of the device's memory, `current` or `peak`."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"] if DEVICE == "cuda" else 0


class Contestant:
    """A model, ready to be timed."""

    def __init__(self, setting: Setting, convert: bool) -> None:
        held = requested_bytes("current")
        torch.manual_seed(0)  # the same parameters and images for all
        with torch.device(DEVICE):
            model = create(setting.model).to(memory_format=LAYOUTS[setting.layout])
        if convert:
            dwconv.convert(model)
        images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=DEVICE)
        images = images.contiguous(memory_format=LAYOUTS[setting.layout])
        model.eval()
        with torch.inference_mode(), setting.autocast():
            self.output = model(images).double().clone()
        model.train(setting.mode == "train")
        self.step = step_of(setting, model, images)
        self.step()  # cuDNN's choices, lazy initialisation
        synchronize()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.step()
        synchronize()
        self.peak_MiB = (requested_bytes("peak") - held) / 2**20 if DEVICE == "cuda" else None
        self.layers = layers_of(model, self.step)
        self.times: list[float] = []

    def time_step(self) -> None:
        begin = time.perf_counter()
        self.step()
        synchronize()
        self.times.append(time.perf_counter() - begin)

    def figures(self, batch: int) -> dict[str, float | None]:
        lower, median, upper = statistics.quantiles(self.times, n=4, method="inclusive")
        return {
            "ms": median * 1e3,
            "spread_ms": (upper - lower) / 2 * 1e3,
            "peak_MiB": self.peak_MiB,
            "images_per_s": batch / median,
        }


def take_turns(contestants: Sequence[Contestant], budget_s: float) -> None:
    for contestant in contestants:  # the allocator's steady state
        contestant.step()
    synchronize()
    gc.collect()
    gc.disable()  # or it would meet one of them only
    try:
        begin = time.perf_counter()
        for i in range(200):
            if i >= 5 and time.perf_counter() - begin > budget_s:
                break
            for contestant in contestants:
                contestant.time_step()
    finally:
        gc.enable()


@dataclass(frozen=True)
class Layer:
    """A depthwise convolution as a model runs it."""

    size: tuple[int, ...]
    input_stride: tuple[int, ...]
    output_size: tuple[int, ...]
    output_stride: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)

    @property
    def traffic(self) -> int:
        return (torch.Size(self.size).numel() + torch.Size(self.output_size).numel()) * self.dtype.itemsize


def layers_of(model: nn.Module, step: Callable[[], object]) -> Counter[Layer]:
    """The layers that `convert` took, as often as a step runs them."""
    found: Counter[Layer] = Counter()

    def record(module: dwconv.DepthwiseConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        padding = module.padding
        if isinstance(padding, str):
            left, _, top, _ = module._reversed_padding_repeated_twice
            padding = top, left
        (x,) = inputs
        found[
            Layer(
                tuple(x.shape),
                x.stride(),
                tuple(output.shape),
                output.stride(),
                module.kernel_size,
                module.bias is not None,
                module.stride,
                padding,
                module.dilation,
                output.dtype,
            )  # fmt: skip
        ] += 1

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, dwconv.DepthwiseConv2d)]
    step()
    for hook in hooks:
        hook.remove()
    return found


def forward_torch(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> object:
    return F.conv2d(x, weight, bias, *layer.geometry, layer.size[1])


def backward_torch(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> object:
    bias_size = None if bias is None else [len(bias)]
    mask = [True, True, bias is not None]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_size, *layer.geometry, False, [0, 0], layer.size[1], mask
    )


def forward_dwconv(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> object:
    return torch.ops.dwconv.forward(x, weight, bias, *layer.geometry)


def backward_dwconv(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> object:
    channels_last = grad.is_contiguous(memory_format=torch.channels_last)
    return (
        torch.ops.dwconv.grad_input(grad, weight, x.shape, *layer.geometry, channels_last),
        torch.ops.dwconv.grad_weight(grad, x, layer.kernel, *layer.geometry, bias is not None),
    )


@cache
def layer_ms(layer: Layer, function: Callable[..., object]) -> float:
    def normal(size: Sequence[int], stride: Sequence[int]) -> Tensor:
        return torch.empty_strided(size, stride, dtype=layer.dtype, device=DEVICE).normal_()

    def draw() -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        filters = layer.output_size[1]
        weight = torch.randn(filters, 1, *layer.kernel, device=DEVICE).to(layer.dtype)
        bias = normal((filters,), (1,)) if layer.bias else None
        return normal(layer.size, layer.input_stride), weight, bias, normal(layer.output_size, layer.output_stride)

    draws = [draw() for _ in range(number_of_sets(layer.traffic))]
    return measure([lambda t=t: function(layer, *t) for t in draws], LAYER_BUDGET_US).us / 1e3


@cache
def layer_copy_ms(traffic: int, dtype: torch.dtype) -> float:
    return copy_time(traffic, dtype, number_of_sets(traffic), LAYER_BUDGET_US).us / 1e3


def run_setting(setting: Setting, quick: bool) -> dict[str, Any]:
    contestants = [Contestant(setting, convert) for convert in (False, True)]
    take_turns(contestants, 0.6 if quick else 3.0)
    before, after = (contestant.figures(setting.batch) for contestant in contestants)
    expected, found = (contestant.output for contestant in contestants)
    layers = contestants[1].layers
    del contestants
    release_memory()

    difference = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    if not difference <= TOLERANCE[setting.dtype]:
        after["ms"] = after["images_per_s"] = None  # wrong, not fast

    train = setting.mode == "train"
    ways = {"before": [forward_torch] + [backward_torch] * train, "after": [forward_dwconv] + [backward_dwconv] * train}
    for figures, functions in zip((before, after), ways.values()):
        total = sum(count * layer_ms(layer, function) for layer, count in layers.items() for function in functions)
        figures["depthwise_ms"] = total
        figures["depthwise_share"] = report.ratio(total, figures["ms"])
    passes = 3 if train else 1
    copy = sum(passes * count * layer_copy_ms(layer.traffic, layer.dtype) for layer, count in layers.items())
    return {
        "model": setting.model,
        "mode": setting.mode,
        "dtype": setting.dtype,
        "layout": setting.layout,
        "batch": setting.batch,
        "image_size": setting.image_size,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "depthwise_layers": layers.total(),
        "before": before,
        "after": after,
        "depthwise_copy_ms": copy,
        "possible_ms": after["ms"] and max(0.0, after["ms"] - after["depthwise_ms"]) + copy,
        "relative_difference": report.finite(difference),
    }


LINE_HEADER = (
    f"{'model':<24} {'mode':<10} {'dtype':<8} {'layout':<13} {'batch':>5}  {'before':>9} {'after':>9} {'possible':>9} "
    f"ms  {'faster':>6}  {'depthwise share':>15}  {'images/s':>8}  {'peak MiB':>15}"
)


def line(row: dict[str, Any]) -> str:
    def both(key: str, form: str) -> str:
        return " -> ".join(report.show(row[state][key], form) for state in ("before", "after"))

    wrong = "" if row["after"]["ms"] else f"  WRONG: differs by {report.show(row['relative_difference'], '.1e')}"
    return (
        f"{row['model']:<24} {row['mode']:<10} {row['dtype']:<8} {row['layout']:<13} {row['batch']:>5}  "
        f"{row['before']['ms']:>9.2f} {report.show(row['after']['ms']):>9} {report.show(row['possible_ms']):>9}   "
        f" {report.show(report.model_speedup(row)):>6}  {both('depthwise_share', '.0%'):>15}  "
        f"{report.show(row['after']['images_per_s'], '.0f'):>8}  {both('peak_MiB', '.0f'):>15}{wrong}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", metavar="NAME", default=MODELS, help="any of timm's; default: a choice")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--batch", type=int, metavar="N", help="other than 128, for training and throughput")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN search; takes minutes a model")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, help="write JSON here, and Markdown beside it; rows it holds are kept")
    parser.add_argument("--missing", action="store_true", help="only rows that --output does not hold yet")


def main(args: argparse.Namespace) -> None:
    unknown = [name for name in args.models if name != REPLKNET and not timm.is_model(name)]
    if unknown:
        raise SystemExit(f"timm has no model {', '.join(unknown)}")
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    meta = machine()
    key = ("model", "mode", "dtype", "layout")
    rows = {tuple(row[name] for name in key): row for row in report.earlier(args.output, meta, "models")}
    settings = [
        Setting(*choice, 1 if choice[1] == "latency" else args.batch or MODES[choice[1]], args.image_size)
        for choice in product(args.models, args.mode, args.dtype, args.layout)
    ]
    if args.missing:
        settings = [setting for setting in settings if setting.key not in rows]
    print(report.headline(meta))
    print(LINE_HEADER)
    with tqdm(settings, unit="model", dynamic_ncols=True) as progress:
        for setting in progress:
            progress.set_postfix_str(" ".join(setting.key))
            try:
                row = run_setting(setting, args.quick)
            except torch.OutOfMemoryError:
                progress.write(f"{' '.join(setting.key)}: not enough memory")
                continue
            finally:
                release_memory()
            rows[setting.key] = row
            progress.write(line(row))
            if args.output:
                report.write_models({"meta": meta, "models": list(rows.values())}, args.output)
    print(report.models_summary(list(rows.values())))
    if args.output:
        print(f"written: {args.output}, {args.output.with_suffix('.md')}")
