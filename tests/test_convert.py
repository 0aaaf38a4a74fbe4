"""convert: which layers it takes, what it leaves as it is, and that models compute as before."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import statistics
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from common import FORMATS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import dwconv
from dwconv import DepthwiseConv2d, convert, revert


def depthwise(channels: int = 8, kernel_size: int = 3, **arguments) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, groups=channels, **arguments)


class Block(nn.Module):
    """A residual depthwise-separable block whose layers lie in all kinds of containers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.depthwise = depthwise(channels, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleList([depthwise(channels, 5, padding=2), nn.Sequential(depthwise(channels, 1))])
        self.named = nn.ModuleDict({"pointwise": nn.Conv2d(channels, channels, 1)})

    def forward(self, input: Tensor) -> Tensor:
        output = self.norm(self.depthwise(input)).relu()
        return input + self.named["pointwise"](sum(branch(output) for branch in self.branches))


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), Block(), nn.ModuleDict({"block": Block()})["block"])


def taken(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is DepthwiseConv2d]


DEPTHWISE = [f"{block}.{name}" for block in (1, 2) for name in ("depthwise", "branches.0", "branches.1.0")]


# What it takes and what it keeps


def test_takes_every_depthwise_layer_in_place() -> None:
    model = Model()
    modules, parameters, buffers = (
        dict(model.named_modules()), dict(model.named_parameters()), dict(model.named_buffers())
    )  # fmt: skip
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert convert(model) is model
    assert taken(model) == DEPTHWISE
    for before, after in [
        (modules, dict(model.named_modules())),
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
    ]:
        assert list(before) == list(after)
        assert all(before[name] is after[name] for name in before)
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())


def test_logs_and_prints_nothing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dwconv"):
        convert(Model())
    assert [(record.name, record.levelno) for record in caplog.records] == [("dwconv", logging.INFO)]
    assert caplog.records[0].getMessage() == "Model: 6 of 9 convolutions are now computed by dwconv"
    assert capfd.readouterr() == ("", "")


def test_converting_twice(caplog: pytest.LogCaptureFixture) -> None:
    model = convert(Model())
    before = repr(model)
    with caplog.at_level(logging.INFO, logger="dwconv"):
        assert convert(model) is model
    assert repr(model) == before
    assert caplog.records[0].getMessage() == "Model: 0 of 9 convolutions are now computed by dwconv"


def test_a_convolution_itself() -> None:
    layer = depthwise()
    assert convert(layer) is layer and type(layer) is DepthwiseConv2d


def test_shared_layer_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = depthwise(padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    input = torch.randn(1, 8, 6, 6)
    expected = model(input)
    with caplog.at_level(logging.INFO, logger="dwconv"):
        convert(model)
    assert model[0] is model[2] is layer and type(layer) is DepthwiseConv2d
    assert "1 of 1" in caplog.text
    assert torch.equal(model(input), expected)


def test_model_without_convolutions(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dwconv"):
        convert(nn.ReLU())
    assert "0 of 0" in caplog.text


@pytest.mark.parametrize("function", [convert, revert])
@pytest.mark.parametrize("model", [None, torch.ones(1), nn.Conv2d, [depthwise()]], ids=lambda m: type(m).__name__)
def test_not_a_module(model: object, function: Callable) -> None:
    said = rf"{function.__name__}\(\): argument 'model' must be nn.Module, not {type(model).__name__}"
    with pytest.raises(TypeError, match=said):
        function(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_converted_layer_equals_a_new_one(bias: bool, multiplier: int) -> None:
    arguments = {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "bias": bias}
    layer = nn.Conv2d(4, 4 * multiplier, groups=4, padding_mode="circular", **arguments)
    new = DepthwiseConv2d(4, **arguments, channel_multiplier=multiplier, padding_mode="circular")
    convert(layer)
    assert repr(layer) == repr(new)
    assert layer.__dict__.keys() == new.__dict__.keys()
    assert type(pickle.loads(pickle.dumps(layer))) is DepthwiseConv2d


@pytest.mark.parametrize("training", [False, True])
def test_mode_and_requires_grad(training: bool) -> None:
    model = Model().train(training)
    model[1].depthwise.train(not training)
    model[1].requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    convert(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_device_dtype_and_memory_format(dtype: torch.dtype, device: str) -> None:
    model = convert(Model().to(device, dtype, memory_format=torch.channels_last))
    assert taken(model) == DEPTHWISE
    for parameter in model.parameters():
        assert parameter.device.type == device and parameter.dtype == dtype
    assert model[1].branches[0].weight.is_contiguous(memory_format=torch.channels_last)
    output = model.eval()(torch.randn(2, 3, 8, 8, device=device, dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()


def test_meta_model() -> None:
    with torch.device("meta"):
        model = convert(Model())
    assert taken(model) == DEPTHWISE and model[1].depthwise.weight.is_meta


def test_hooks_still_run(device: str) -> None:
    layer = depthwise()
    seen: list[str] = []

    def hook(name: str):
        return lambda *_: seen.append(name)

    layer.register_forward_pre_hook(hook("forward_pre"))
    layer.register_forward_hook(hook("forward"))
    layer.register_full_backward_pre_hook(hook("backward_pre"))
    layer.register_full_backward_hook(hook("backward"))
    layer.register_state_dict_pre_hook(hook("state_dict_pre"))
    layer.register_state_dict_post_hook(hook("state_dict_post"))
    layer.register_load_state_dict_pre_hook(hook("load_state_dict_pre"))
    layer.register_load_state_dict_post_hook(hook("load_state_dict_post"))
    layer.weight.register_hook(hook("weight"))

    model = convert(nn.Sequential(nn.Conv2d(3, 8, 1), layer)).to(device)
    model(torch.randn(1, 3, 5, 5, device=device)).sum().backward()
    assert sorted(seen) == sorted(["forward_pre", "forward", "backward_pre", "backward", "weight"])
    seen.clear()
    model.load_state_dict(model.state_dict())
    assert seen == ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_keep_working(optimizer: type[torch.optim.Optimizer], device: str) -> None:
    """A model converted in the midst of its training goes on as the original does."""
    torch.manual_seed(1)
    model = Model().to(device, torch.float64)
    inputs = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64).to(device)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
        for input in inputs:
            optimizer.zero_grad()
            model(input).square().mean().backward()
            optimizer.step()

    steps = optimizer(model.parameters(), lr=0.01)
    train(model, steps, inputs[:2])
    original, original_steps = copy.deepcopy((model, steps))
    before = [parameter.detach().clone() for parameter in model.parameters()]

    train(convert(model), steps, inputs[2:])
    train(original, original_steps, inputs[2:])
    assert taken(model) and not taken(original)
    for parameter, expected, old in zip(model.parameters(), original.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)
        assert not torch.equal(parameter, old)


def test_checkpoints_load_both_ways() -> None:
    original, converted = Model(), convert(Model())
    converted.load_state_dict(original.state_dict(), strict=True)
    Model().load_state_dict(converted.state_dict(), strict=True)
    input = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted.eval()(input), original.eval()(input))


def test_inside_a_compiled_model(device: str) -> None:
    model = Model().to(device, torch.float64).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64)
    expected = compiled(input)
    convert(compiled)
    assert taken(model) == DEPTHWISE
    torch.testing.assert_close(compiled(input), expected)


# What it leaves alone


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Renamed(nn.Conv2d):
    pass


def _replaced(name: str) -> nn.Conv2d:
    layer = depthwise()
    replaced = getattr(layer, name)
    setattr(layer, name, lambda *arguments: 2 * replaced(*arguments))
    return layer


def _with_tensor_subclass() -> nn.Conv2d:
    layer = depthwise()
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    return layer


def _without_weight() -> nn.Conv2d:
    layer = depthwise()
    del layer.weight
    return layer


LEFT_ALONE = {
    "groups == 1": lambda: nn.Conv2d(8, 8, 3),
    "one channel": lambda: nn.Conv2d(1, 4, 3, groups=1),
    "groups < C": lambda: nn.Conv2d(8, 8, 3, groups=4),
    "conv1d": lambda: nn.Conv1d(8, 8, 3, groups=8),
    "conv3d": lambda: nn.Conv3d(8, 8, 3, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
    "lazy": lambda: nn.LazyConv2d(8, 3, groups=8),
    "complex": lambda: depthwise(dtype=torch.complex64),
    "float8": lambda: depthwise().to(torch.float8_e4m3fn),
    "own forward": lambda: Scaled(8, 8, 3, groups=8),
    "own _conv_forward": lambda: Standardised(8, 8, 3, groups=8),
    "own class": lambda: Renamed(8, 8, 3, groups=8),
    "timm's Conv2dSame": lambda: timm.layers.Conv2dSame(8, 8, 3, groups=8),
    "replaced forward": lambda: _replaced("forward"),
    "replaced _conv_forward": lambda: _replaced("_conv_forward"),
    "parametrised": lambda: parametrizations.weight_norm(depthwise()),
    "tensor subclass": _with_tensor_subclass,
    "without weight": _without_weight,
    "quantised": lambda: torch.ao.nn.quantized.Conv2d(8, 8, 3, groups=8),
    "quantisation-aware": lambda: torch.ao.nn.qat.Conv2d(
        8, 8, 3, groups=8, qconfig=torch.ao.quantization.get_default_qat_qconfig()
    ),
    "scripted": lambda: torch.jit.script(depthwise()),
    "already ours": lambda: DepthwiseConv2d(8, 3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(make, caplog: pytest.LogCaptureFixture) -> None:
    layer = make()
    kind, values = type(layer), dict(layer.__dict__)
    with caplog.at_level(logging.INFO, logger="dwconv"):
        convert(layer)
        convert(nn.Sequential(layer))
    assert type(layer) is kind
    assert layer.__dict__ == values
    assert all(": 0 of" in record.getMessage() for record in caplog.records) and len(caplog.records) == 2


@pytest.mark.parametrize("name", ["own forward", "replaced forward", "parametrised"])
def test_results_of_layers_left_alone(name: str) -> None:
    layer = LEFT_ALONE[name]()
    input = torch.randn(2, 8, 6, 6)
    expected = layer(input)
    convert(nn.Sequential(layer))
    assert torch.equal(layer(input), expected)


def test_lazy_layer_is_taken_once_it_is_a_conv2d() -> None:
    model = convert(nn.Sequential(nn.LazyConv2d(8, 3, groups=8)))
    input = torch.randn(1, 8, 5, 5)
    expected = model(input)
    assert type(model[0]) is nn.Conv2d
    convert(model)
    assert type(model[0]) is DepthwiseConv2d
    assert torch.equal(model(input), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [lambda layer: prune.random_unstructured(layer, "weight", 0.5), torch.nn.utils.weight_norm],
    ids=["pruned", "weight_norm"],
)
def test_weights_that_a_hook_computes(change) -> None:
    """Such a layer is a plain nn.Conv2d whose weight is set before each forward."""
    layers = []
    for _ in range(2):  # a weight that is not a leaf cannot be deep-copied
        torch.manual_seed(1)
        layers.append(change(depthwise(padding=1)))
    input = torch.randn(2, 8, 6, 6)
    assert type(convert(layers[0])) is DepthwiseConv2d
    for step in range(2):
        results = []
        for module in layers:
            module.zero_grad()
            output = module(input)
            output.square().sum().backward()
            results.append([output.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.01 * parameter.grad
        torch.testing.assert_close(*results, msg=lambda text: f"step {step}: {text}")


# Real models

ZOO = {"mobilenetv2_100": 17, "efficientnet_b0": 16, "convnext_tiny": 18, "inception_next_tiny": 54, "mixnet_l": 59}

SMALL, LARGE = (2, 3, 64, 64), (4, 3, 96, 96)  # normalising over a small batch enlarges every rounding error

Results = dict[str, Tensor]


@functools.cache
def zoo_model(name: str) -> nn.Module:
    """With smooth activations: where rounding moves a value across the kink of a ReLU, gradients jump."""
    torch.manual_seed(0)
    smooth = {} if "next" in name else {"act_layer": nn.SiLU}
    return timm.create_model(name, pretrained=False, num_classes=10, **smooth)


@functools.cache
def zoo_inputs(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator), torch.randn(size[0], 10, generator=generator)


def run_model(
    model: nn.Module,
    size: tuple[int, ...],
    training: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Results:
    """Output, parameter gradients and buffers after one pass, in float64 on the CPU."""
    model.train(training)
    like = next(model.parameters())
    images, grad_output = (tensor.to(like.device, like.dtype) for tensor in zoo_inputs(size))
    torch.manual_seed(2)  # for what drops at random
    output = model(images.contiguous(memory_format=memory_format))
    output.backward(grad_output)
    results = {"output": output.detach()}
    results |= {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    results |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: tensor.double().cpu() for name, tensor in results.items()}


@functools.cache
def reference(name: str, training: bool) -> Results:
    return run_model(copy.deepcopy(zoo_model(name)).double(), LARGE, training)


def distances(results: Results, expected: Results) -> dict[str, float]:
    assert results.keys() == expected.keys()
    return {name: (results[name] - tensor).norm().item() for name, tensor in expected.items()}


def assert_as_exact(ours: Results, theirs: Results, exact: Results) -> None:
    """Our errors are of the size of theirs.

    Two runs that round differently differ by chance, and deep models with normalisation enlarge it: in the median of
    all tensors, errors of twice the size are beyond chance, in a single tensor those of ten times the size. A wrong or
    a missing tap, or products in TF32, enlarge them a hundredfold.
    """
    errors, limits = distances(ours, exact), distances(theirs, exact)
    for name, error in errors.items():
        floor = 1e-6 * exact[name].norm().item()
        assert error <= 10 * limits[name] + floor, f"{name}: error {error:.3g}, theirs {limits[name]:.3g}"
    assert statistics.median(errors[name] / limit for name, limit in limits.items() if limit) <= 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", ZOO)
def test_timm_models(name: str, memory_format: torch.memory_format, training: bool, device: str) -> None:
    original = copy.deepcopy(zoo_model(name)).to(device, memory_format=memory_format)
    converted = convert(copy.deepcopy(original))
    assert len(taken(converted)) == ZOO[name]
    assert not any(type(m) is nn.Conv2d and m.groups == m.in_channels > 1 for m in converted.modules())

    size = SMALL if device == "cpu" else LARGE
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, theirs = (run_model(model, size, training, memory_format) for model in (converted, original))
    if device == "cpu":  # the same routines of ATen
        for key, distance in distances(ours, theirs).items():
            assert distance <= 1e-5 * theirs[key].norm(), key
    else:
        assert_as_exact(ours, theirs, reference(name, training))


def test_assert_as_exact_tells_wrong_from_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of the test above: it passes another order of summation and fails coarse products."""

    def by_taps(narrow: bool):
        def conv2d(input, weight, bias, stride, padding, dilation, allow_fft) -> Tensor:
            # As a sum over the taps, of products that have 10 bits of mantissa if narrow.
            (top, left), (kh, kw) = padding, weight.shape[2:]
            padded = F.pad(input, (left, left, top, top))
            rounded = (lambda t: t + (t.half().float() - t).detach()) if narrow else (lambda t: t)
            rows = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
            columns = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
            output = 0
            for i in reversed(range(kh)):
                for j in reversed(range(kw)):
                    y, x = i * dilation[0], j * dilation[1]
                    window = padded[:, :, y :: stride[0], x :: stride[1]][:, :, :rows, :columns]
                    output = output + rounded(window) * rounded(weight[:, 0, i, j, None, None])
            return output if bias is None else output + bias[:, None, None]

        return conv2d

    name = "mobilenetv2_100"
    for training in (False, True):
        exact = reference(name, training)
        theirs = run_model(copy.deepcopy(zoo_model(name)), LARGE, training)
        for narrow in (False, True):
            monkeypatch.setattr("dwconv.modules.conv2d", by_taps(narrow))
            ours = run_model(convert(copy.deepcopy(zoo_model(name))), LARGE, training)
            if narrow:
                with pytest.raises(AssertionError, match="theirs"):
                    assert_as_exact(ours, theirs, exact)
            else:
                assert_as_exact(ours, theirs, exact)


def test_revert(caplog: pytest.LogCaptureFixture) -> None:
    """The same layers, of the class that they had; those that were made as DepthwiseConv2d, too."""
    model = Model()
    expected = [(name, type(module)) for name, module in model.named_modules()]
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "dwconv"):
        assert revert(convert(model)) is model
    assert f"{len(DEPTHWISE)} convolutions are no longer" in caplog.text
    assert [(name, type(module)) for name, module in model.named_modules()] == expected
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))

    layer = DepthwiseConv2d(4, (3, 2), 2, (1, 0), True, dilation=2, channel_multiplier=2, padding_mode="circular")
    input = torch.randn(2, 4, 9, 8)
    ours, theirs = layer(input), revert(layer)(input)
    assert type(layer) is nn.Conv2d
    torch.testing.assert_close(theirs, ours)

    class Mine(DepthwiseConv2d):
        pass

    assert type(revert(Mine(4, 3))) is Mine


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_looks_for_the_very_class_finds_it_after_revert() -> None:
    model = revert(convert(nn.Sequential(depthwise(padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()))
    input = torch.randn(2, 8, 6, 5)
    expected = model(input)
    torch.testing.assert_close(torch.jit.script(model)(input), expected)
    quantization = pytest.importorskip("torch.ao.quantization")
    fused = quantization.fuse_modules(model, [["0", "1", "2"]])
    assert type(fused[0]).__name__ == "ConvReLU2d"
    torch.testing.assert_close(fused(input), expected)
    if "x86" in torch.backends.quantized.supported_engines:
        quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (input,))
        prepared(input)
        quantised = quantize_fx.convert_fx(prepared)
        assert isinstance(getattr(quantised, "0"), torch.ao.nn.intrinsic.quantized.ConvReLU2d)
        assert (quantised(input) - expected).abs().max() < 0.1 * expected.abs().max()


def test_is_exported() -> None:
    assert dwconv.convert is convert and dwconv.revert is revert
