"""python -m dwconv: what is installed, whether it computes rightly here, and how fast.

python -m dwconv                        the versions, a check against float64, a speed table; exits with 1 if anything
                                        is wrong
python -m dwconv explain N C H W K      which kernel serves a layer on CUDA, and why
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, conv2d, explain
from ._ops import BUILD
from .explain import PASSES

Record = dict[str, Any]  # of the JSON report

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("float32", "float16", "bfloat16")
RESULTS = ("forward", "grad_input", "grad_weight", "grad_bias")

# Largest error over largest value. float32: TF32 would be found out. 16 bits: one unit in the last place, twice what
# rounding can do.
TOLERANCES = {"float32": 5e-5, "float16": 1e-3, "bfloat16": 8e-3}

REBUILD = "pip install --no-cache-dir --force-reinstall ."


class Layer(NamedTuple):
    """A depthwise layer as it stands in a model."""

    name: str
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    padding: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1

    @property
    def geometry(self) -> tuple[int, tuple[int, int], int]:
        return self.stride, self.padding, self.dilation

    @property
    def output_size(self) -> tuple[int, ...]:
        return tuple(
            (size + 2 * padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, padding, kernel in zip(self.size, self.padding, self.kernel)
        )


LAYERS = (
    Layer("MobileNetV2", 32, (112, 112), (3, 3), (1, 1)),
    Layer("MobileNetV2, stride 2", 96, (112, 112), (3, 3), (1, 1), stride=2),
    Layer("MobileNetV2, last", 960, (7, 7), (3, 3), (1, 1)),
    Layer("EfficientNet", 480, (14, 14), (5, 5), (2, 2)),
    Layer("EfficientNet, stride 2", 672, (14, 14), (5, 5), (2, 2), stride=2),
    Layer("ConvNeXt", 96, (56, 56), (7, 7), (3, 3)),
    Layer("RepLKNet", 128, (56, 56), (31, 31), (15, 15)),
    Layer("InceptionNeXt, row", 24, (28, 28), (1, 11), (0, 5)),
    Layer("InceptionNeXt, column", 24, (28, 28), (11, 1), (5, 0)),
    Layer("odd sizes", 37, (113, 95), (5, 5), (2, 2)),
    Layer("dilation 2", 256, (64, 64), (3, 3), (2, 2), dilation=2),
    Layer("multiplier 2", 64, (56, 56), (3, 3), (1, 1), multiplier=2),
)
CHECK_BATCH = {"cpu": 2, "cuda": 8}
CPU_CHANNELS_SHARE = 8  # on the CPU an eighth of the channels, for the time it takes

TIMED = ("MobileNetV2", "MobileNetV2, stride 2", "EfficientNet", "ConvNeXt", "RepLKNet", "InceptionNeXt, row")
TIMED_AS = (("float32", "NCHW"), ("bfloat16", "channels_last"))
TIMED_BATCH = 64


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def joined(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


# ---------------------------------------------------------------------------------------------------- what is installed


def driver_version() -> str | None:
    """Of the NVIDIA driver, by NVML: /proc does not tell it in every container, nor under WSL."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return None


def about_gpu() -> Record | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "driver": driver_version(),
    }


def why_no_gpu() -> str:
    driver = driver_version()
    if torch.version.cuda is None and driver is not None:
        return f"none that torch can use: it is a build without CUDA (the NVIDIA driver is {driver})"
    if driver is not None:
        return f"none that torch can use (the NVIDIA driver is {driver})"
    return "none"


def has_code_for(capability: str, architectures: str) -> bool:
    """Whether a binary for `architectures`, in the words of TORCH_CUDA_ARCH_LIST, runs on a GPU."""
    major, minor = map(int, capability.split("."))
    for word in re.split(r"[;,\s]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", word)
        if not found:
            return True  # a name such as Hopper: the kernels will tell
        built = int(found[1]), int(found[2])
        newer_minor = built[0] == major and built[1] <= minor and found[3] != "a"
        newer = found[4] is not None and built <= (major, minor) and not found[3]
        if built == (major, minor) or newer_minor or newer:
            return True
    return False


def find_problems(gpu: Record | None) -> Iterator[str]:
    """What is wrong with the installation, each with its cure."""
    if BUILD["version"] != __version__:
        yield (
            f"dwconv {__version__} has a compiled part of version {BUILD['version']}: "
            "pip install --force-reinstall --no-deps dwconv"
        )
    if gpu is None:
        return
    if BUILD["cuda"] is None:
        yield (
            "dwconv was built without CUDA and cannot serve this GPU. Install a wheel built with CUDA, or build one "
            f"where the CUDA toolkit is found: DWCONV_CUDA=1 {REBUILD}"
        )
    elif not has_code_for(gpu["capability"], BUILD["cuda_architectures"]):
        yield (
            f"dwconv was built for the GPU architectures {BUILD['cuda_architectures']} and has no code for this GPU. "
            f"Build it where this GPU is: TORCH_CUDA_ARCH_LIST={gpu['capability']} DWCONV_CUDA=1 {REBUILD}"
        )


def about() -> Record:
    gpu = about_gpu()
    problems = list(find_problems(gpu))
    return {
        "ok": not problems,
        "problems": problems,
        "build": {"version": __version__, **{key: BUILD[key] for key in ("cuda", "cuda_architectures", "torch")}},
        "path": str(Path(__file__).resolve().parent),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": gpu,
        "device": "cuda" if gpu is not None and not problems else "cpu",
    }


def headline(report: Record) -> str:
    build, gpu = report["build"], report["gpu"]
    with_cuda = f"with CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "WITHOUT CUDA"
    lines = {
        "dwconv": f"{build['version']}, built {with_cuda}, against torch {build['torch']}; {report['path']}",
        "torch": f"{report['torch']['version']}, CUDA {report['torch']['cuda'] or 'none'}",
        "Python": f"{report['python']}, {report['platform']}",
        "GPU": why_no_gpu()
        if gpu is None
        else f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_GiB']} GiB, driver {gpu['driver'] or '?'}",
    }
    text = [f"{name:<8}{value}" for name, value in lines.items()]
    text += [f"\nWRONG: {problem}" for problem in report["problems"]]
    if report["device"] == "cpu":
        text.append("\nOnly the CPU path is checked, which is ATen's own convolution.")
    return "\n".join(text)


# ------------------------------------------------------------------------------------------------- whether it is right


class Tensors(NamedTuple):
    """A layer's numbers: fresh and random, outputs of order one."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    @classmethod
    def draw(cls, layer: Layer, batch: int, channels: int, device: str) -> Tensors:
        filters, generator = channels * layer.multiplier, torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        return cls(
            normal(batch, channels, *layer.size),
            normal(filters, 1, *layer.kernel) / math.prod(layer.kernel) ** 0.5,
            normal(filters),
            normal(batch, filters, *layer.output_size),
        )

    def to(self, dtype: torch.dtype, layout: torch.memory_format) -> Tensors:
        x, w, b, g = (tensor.to(dtype) for tensor in self)
        return Tensors(x.contiguous(memory_format=layout), w, b, g.contiguous(memory_format=layout))


def torch_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])


def output_and_gradients(function: Callable[..., Tensor], tensors: Tensors, layer: Layer) -> tuple[Tensor, ...]:
    """In the order of RESULTS."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    output = function(*leaves, *layer.geometry)
    return output.detach(), *torch.autograd.grad(output, leaves, tensors.grad_output)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest error over largest value: one wrong number among millions shows."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected).abs().max() / expected.abs().max())


def plans(tensors: Tensors, layer: Layer) -> dict[str, str]:
    if tensors.input.device.type == "cpu":  # explain() would say so too, after a second of imports
        return dict.fromkeys(PASSES, "aten")
    explanation = explain(*tensors[:3], *layer.geometry)
    return {name: getattr(explanation, name).plan for name in PASSES}


def check(layer: Layer, device: str, dtype: str, layout: str) -> Record:
    """The output and every gradient against float64."""
    batch = CHECK_BATCH[device]
    channels = layer.channels if device == "cuda" else max(1, layer.channels // CPU_CHANNELS_SHARE)
    record: Record = {
        "layer": layer.name,
        "input": [batch, channels, *layer.size],
        "kernel": list(layer.kernel),
        "stride": layer.stride,
        "padding": list(layer.padding),
        "dilation": layer.dilation,
        "multiplier": layer.multiplier,
        "dtype": dtype,
        "layout": layout,
        "plans": None,
        "errors": dict.fromkeys(RESULTS),  # None where not finite
        "tolerance": TOLERANCES[dtype],
        "message": None,
        "ok": False,
    }
    try:
        tensors = Tensors.draw(layer, batch, channels, device).to(getattr(torch, dtype), LAYOUTS[layout])
        record["plans"] = plans(tensors, layer)
        found = output_and_gradients(conv2d, tensors, layer)
        # Contiguous and in float64, F.conv2d never goes through cuDNN.
        exact = output_and_gradients(torch_conv2d, tensors.to(torch.float64, torch.contiguous_format), layer)
        errors = dict(zip(RESULTS, map(relative_error, found, exact)))
    except Exception as error:  # whatever it is, it belongs in the report
        return record | {"message": first_line(error)}
    record["errors"] = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    record["ok"] = all(error <= record["tolerance"] for error in errors.values())  # NaN is not
    return record


def dtypes_checked(device: str) -> tuple[str, ...]:
    return DTYPES if device == "cuda" else DTYPES[:1]


def check_header(device: str) -> str:
    return (
        "\nOutput and all gradients in both layouts against float64: largest error over largest value\n"
        f"{'layer':<23} {'input':<16} {'kernel':<7}" + "".join(f" {dtype:>9}" for dtype in dtypes_checked(device))
    )


def check_lines(records: Sequence[Record]) -> str:
    """A line for a layer, with the worst error of each dtype; below it, what is wrong."""
    errors: dict[str, list[float | None]] = {}
    details = []
    for record in records:
        errors.setdefault(record["dtype"], []).extend(record["errors"].values())
        where = f"    {record['dtype']} {record['layout']}"
        if record["message"]:
            details.append(f"{where}: {record['message']}")
            continue
        for name, error in record["errors"].items():
            if error is None or error > record["tolerance"]:
                value = "not finite" if error is None else f"{error:.1e}"
                plan = record["plans"]["grad_weight" if name == "grad_bias" else name]
                details.append(f"{where} {name}: {value} where {record['tolerance']:.0e} is allowed, by plan {plan}")
    line = f"{records[0]['layer']:<23} {joined(records[0]['input']):<16} {joined(records[0]['kernel']):<7}"
    for of_dtype in errors.values():
        finite = [error for error in of_dtype if error is not None]
        line += f" {max(finite):>9.1e}" if len(finite) == len(of_dtype) else f" {'-':>9}"
    line += "  ok" if all(record["ok"] for record in records) else "  WRONG"
    return "\n".join([line, *details])


# --------------------------------------------------------------------------------------------------- how fast it is


def device_us(call: Callable[[], Any]) -> float:
    """Median device time of a call, from graphs of several: the host's part does not count."""
    cuda: Any = torch.cuda  # its classes are untyped
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # lazy initialisation, the allocator, cuDNN's choice
            begin.record()
            call()
            end.record()
    end.synchronize()
    first_ms = max(begin.elapsed_time(end), 0.01)

    calls = max(1, min(20, int(2 / first_ms)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(max(3, min(15, int(60 / (first_ms * calls))))):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def time_layer(layer: Layer, dtype: str, layout: str) -> Record:
    record: Record = {
        "layer": layer.name,
        "input": [TIMED_BATCH, layer.channels, *layer.size],
        "kernel": list(layer.kernel),
        "dtype": dtype,
        "layout": layout,
        "dwconv_forward_us": None,
        "dwconv_training_us": None,
        "pytorch_forward_us": None,
        "pytorch_training_us": None,
        "message": None,
    }
    try:
        drawn = Tensors.draw(layer, TIMED_BATCH, layer.channels, "cuda")
        tensors = drawn.to(getattr(torch, dtype), LAYOUTS[layout])
        for name, function in (("dwconv", conv2d), ("pytorch", torch_conv2d)):
            with torch.no_grad():
                record[f"{name}_forward_us"] = device_us(lambda: function(*tensors[:3], *layer.geometry))
            record[f"{name}_training_us"] = device_us(lambda: output_and_gradients(function, tensors, layer))
    except Exception as error:
        record["message"] = first_line(error)
    return record


SPEED_HEADER = (
    f"\nDevice time in us, batch {TIMED_BATCH}, beside F.conv2d in the same layout with PyTorch's default settings\n"
    f"{'':<73}{'forward':^26} {'forward and backward':^26}\n"
    f"{'layer':<23} {'input':<16} {'kernel':<7} {'dtype, layout':<22}"
    + f" {'dwconv':>8} {'F.conv2d':>8} {'speedup':>8}"
    * 2
)


def speed_line(record: Record) -> str:
    line = f"{record['layer']:<23} {joined(record['input']):<16} {joined(record['kernel']):<7} "
    line += f"{record['dtype'] + ' ' + record['layout']:<22}"
    if record["message"]:
        return f"{line}  WRONG: {record['message']}"
    for what in ("forward", "training"):
        ours, theirs = record[f"dwconv_{what}_us"], record[f"pytorch_{what}_us"]
        line += f" {ours:>8.1f} {theirs:>8.1f} {theirs / ours:>7.2f}x"
    return line


# ----------------------------------------------------------------------------------------------------- the commands


def self_check(as_json: bool) -> int:
    say: Callable[..., None] = (lambda *_: None) if as_json else functools.partial(print, flush=True)
    report = about()
    say(headline(report))

    device = report["device"]
    say(check_header(device))
    report["checks"], report["speed"] = [], []
    for layer in LAYERS:
        records = [check(layer, device, dtype, layout) for dtype in dtypes_checked(device) for layout in LAYOUTS]
        say(check_lines(records))
        report["checks"] += records
    report["ok"] &= all(record["ok"] for record in report["checks"])

    if device == "cuda" and report["ok"]:  # how fast a wrong result comes is of no interest
        say(SPEED_HEADER)
        for layer in LAYERS:
            for dtype, layout in TIMED_AS if layer.name in TIMED else ():
                report["speed"].append(time_layer(layer, dtype, layout))
                say(speed_line(report["speed"][-1]))
        report["ok"] &= not any(record["message"] for record in report["speed"])

    if as_json:
        print(json.dumps(report, allow_nan=False))
    say("\nEverything is right." if report["ok"] else "\nSomething is WRONG: see above.")
    return 0 if report["ok"] else 1


def explain_layer(args: argparse.Namespace) -> int:
    """Raises what conv2d raises for sizes that do not fit together."""
    dtype = getattr(torch, args.dtype)
    x = torch.empty(args.N, args.C, args.H, args.W, dtype=dtype, device="meta", memory_format=LAYOUTS[args.layout])
    w = torch.empty(args.C * args.multiplier, 1, *args.K, dtype=dtype, device="meta")
    geometry = args.stride, args.padding, args.dilation
    explanation = explain(x, w, None, *geometry, allow_fft=args.allow_fft)
    output = torch_conv2d(x, w, None, *geometry).shape
    if args.json:
        choices = {name: getattr(explanation, name)._asdict() for name in PASSES}
        layer = {"input": x.shape, "weight": w.shape, "output": output, "stride": args.stride, "padding": args.padding}
        layer |= {"dilation": args.dilation, "dtype": args.dtype, "layout": args.layout}
        print(json.dumps({"built_with_cuda": BUILD["cuda"], "layer": layer, "plans": choices}))
        return 0
    padding = args.padding if isinstance(args.padding, str) else joined(args.padding)
    print(
        f"{joined(x.shape)} -> {joined(output)}, kernel {joined(args.K)}, stride {joined(args.stride)}, "
        f"padding {padding}, dilation {joined(args.dilation)}, multiplier {args.multiplier}, {args.dtype}, "
        f"{args.layout}\n{explanation}"
    )
    if BUILD["cuda"] is None:
        print("This dwconv was built without CUDA; a build with CUDA would take these.")
    return 0


def whole(text: str, least: int) -> int:
    if not re.fullmatch(r"-?\d+", text) or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, but got {text!r}")
    return int(text)


def positive(text: str) -> int:
    return whole(text, 1)


def two(text: str, least: int) -> tuple[int, int]:
    sides = [whole(side, least) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected one number, or HEIGHTxWIDTH, but got {text!r}")
    return sides[0], sides[-1]


def sides(text: str) -> tuple[int, int]:
    return two(text, 1)


def padding(text: str) -> tuple[int, int] | str:
    return text if text in ("same", "valid") else two(text, 0)


def make_parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser, and that of `explain`, which reports its errors."""
    parser = argparse.ArgumentParser(
        prog="python -m dwconv",
        description="Says what is installed, checks a dozen layers against float64 and times some against F.conv2d. "
        "Exits with 0 if everything is right, 1 if anything is wrong, 2 if the arguments are.",
    )
    json_help = "print one JSON object and nothing else"
    parser.add_argument("--json", action="store_true", help=json_help)
    commands = parser.add_subparsers(dest="command", metavar="command", title="other commands")
    layer = commands.add_parser(
        "explain",
        help="say which kernel serves a layer on CUDA, and why; needs no GPU",
        description="Says which kernel serves a layer on CUDA in each pass, and why. Needs no GPU. "
        "Two sides are written HEIGHTxWIDTH.",
    )
    for name, what in (("N", "batch"), ("C", "channels"), ("H", "height"), ("W", "width")):
        layer.add_argument(name, type=positive, help=f"{what} of the input")
    layer.add_argument("K", type=sides, help="kernel: one side, or two as in 3x5")
    layer.add_argument("--stride", type=sides, default=(1, 1), metavar="S", help="default: 1")
    layer.add_argument("--padding", type=padding, default=(0, 0), metavar="P", help="or same, or valid; default: 0")
    layer.add_argument("--dilation", type=sides, default=(1, 1), metavar="D", help="default: 1")
    layer.add_argument("--multiplier", type=positive, default=1, metavar="M", help="filters per channel; default: 1")
    layer.add_argument("--dtype", choices=(*DTYPES, "float64"), default="float32", help="default: float32")
    layer.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="default: NCHW")
    layer.add_argument("--allow-fft", action="store_true", help="let Fourier transforms serve")
    layer.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
    return parser, layer


def main(argv: Sequence[str] | None = None) -> int:
    parser, layer_parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        return self_check(args.json)
    try:
        return explain_layer(args)
    except RuntimeError as error:
        layer_parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
