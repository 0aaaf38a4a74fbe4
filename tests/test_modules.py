"""DepthwiseConv2d is an nn.Conv2d in all but speed.

Where numbers are compared, they are small integers: every sum is exact in every dtype, so that the results must be
those of nn.Conv2d in float64 to the last bit, on every device.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from common import FORMATS, integers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import dwconv
from dwconv import DepthwiseConv2d

CHANNELS = 6

# What the constructor is given beside the channels.
LAYERS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "bias": True, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "bias": True},
    {"kernel_size": [5, 1], "padding": [2, 0], "dilation": (1, 2), "channel_multiplier": 2, "bias": True},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (4, 3), "padding": "same", "bias": True},
    {"kernel_size": 2, "padding": "valid", "stride": 2, "channel_multiplier": 3},
]
layers = pytest.mark.parametrize("arguments", LAYERS, ids=lambda arguments: "_".join(map(str, arguments.values())))


def conv2d_like(arguments: dict, channels: int = CHANNELS) -> nn.Conv2d:
    """The nn.Conv2d that a DepthwiseConv2d(channels, **arguments) is to equal."""
    arguments = {"bias": False, **arguments}
    multiplier = arguments.pop("channel_multiplier", 1)
    return nn.Conv2d(channels, channels * multiplier, groups=channels, **arguments)


def with_integers(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    return layer


class Step(NamedTuple):
    output: Tensor
    grad_input: Tensor
    grads: dict[str, Tensor]


def step(layer: nn.Module, input: Tensor, grad_output: Tensor | None = None) -> Step:
    input = input.detach().requires_grad_()
    layer.zero_grad()
    output = layer(input)
    output.backward(torch.ones_like(output) if grad_output is None else grad_output.to(output))
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return Step(output.detach(), input.grad, grads)


def assert_equal_steps(layer: nn.Module, reference: nn.Module, input: Tensor) -> None:
    """Output and gradients of `layer` equal those of `reference`, taken in float64, bit for bit."""
    reference = copy.deepcopy(reference).double()
    with torch.no_grad():
        grad_output = integers(*layer(input).shape)
    ours = step(layer, input, grad_output)
    theirs = step(reference, input.double().contiguous(), grad_output)
    assert torch.equal(ours.output.double(), theirs.output)
    assert torch.equal(ours.grad_input.double(), theirs.grad_input)
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        assert torch.equal(ours.grads[name].double(), grad), name


# Construction


def test_signature() -> None:
    parameters = inspect.signature(DepthwiseConv2d).parameters.values()
    assert [str(p).split(":")[0] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "in_channels", "kernel_size", "stride", "padding", "bias"
    ]  # fmt: skip
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == {
        "stride": 1, "padding": 0, "bias": False, "dilation": 1, "channel_multiplier": 1, "padding_mode": "zeros",
        "device": None, "dtype": None,
    }  # fmt: skip


@layers
def test_initial_weights_and_attributes(arguments: dict) -> None:
    torch.manual_seed(1)
    expected = conv2d_like(arguments)
    torch.manual_seed(1)
    layer = DepthwiseConv2d(CHANNELS, **arguments)

    assert isinstance(layer, nn.Conv2d)
    for name in [*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"]:
        ours, theirs = getattr(layer, name), getattr(expected, name)
        assert ours == theirs and type(ours) is type(theirs), name
    assert layer.channel_multiplier == expected.out_channels // expected.in_channels

    assert (layer.bias is None) == (expected.bias is None)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name


@layers
def test_positional_arguments(arguments: dict) -> None:
    first = {"kernel_size": 0, "stride": 1, "padding": 0, "bias": False, **arguments}
    positional = [first.pop(name) for name in ("kernel_size", "stride", "padding", "bias")]
    assert repr(DepthwiseConv2d(CHANNELS, *positional, **first)) == repr(DepthwiseConv2d(CHANNELS, **arguments))


def test_device_and_dtype(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True, device=device, dtype=torch.float64)
    for parameter in layer.parameters():
        assert parameter.device.type == device and parameter.dtype == torch.float64


@pytest.mark.parametrize("multiplier", [0, -1, 1.5, True, "2", None])
def test_bad_multiplier(multiplier: object) -> None:
    with pytest.raises(ValueError, match="channel_multiplier must be a positive int, but got"):
        DepthwiseConv2d(CHANNELS, 3, channel_multiplier=multiplier)


def test_bad_arguments_fail_as_in_conv2d() -> None:
    for arguments in [
        {"kernel_size": 3, "padding": "full"},
        {"kernel_size": 3, "padding": "same", "stride": 2},
        {"kernel_size": 3, "padding_mode": "mirror"},
    ]:
        with pytest.raises(ValueError) as expected:
            conv2d_like(arguments)
        with pytest.raises(ValueError) as got:
            DepthwiseConv2d(CHANNELS, **arguments)
        assert str(got.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="kernel_size"):
        DepthwiseConv2d(CHANNELS, (3, 3, 3))
    with pytest.raises(TypeError, match="kernel_size"):
        DepthwiseConv2d(CHANNELS, 3.0)
    with pytest.raises(ValueError):
        DepthwiseConv2d(0, 3)


@layers
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_repr(arguments: dict, padding_mode: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, **arguments, padding_mode=padding_mode)
    again = eval(repr(layer), {"DepthwiseConv2d": DepthwiseConv2d})
    for name in [*nn.Conv2d.__constants__, "channel_multiplier"]:
        assert getattr(again, name) == getattr(layer, name), name
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}


def test_repr_is_short() -> None:
    layer = DepthwiseConv2d(64, 3, padding=1)
    assert repr(layer) == "DepthwiseConv2d(64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)"


def test_reset_parameters() -> None:
    layer, expected = DepthwiseConv2d(CHANNELS, 3, bias=True), conv2d_like({"kernel_size": 3, "bias": True})
    for module in (layer, expected):
        torch.manual_seed(2)
        module.reset_parameters()
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.bias, expected.bias)


# Results


@layers
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_equals_conv2d(arguments: dict, memory_format: torch.memory_format, device: str) -> None:
    layer = with_integers(DepthwiseConv2d(CHANNELS, **arguments)).to(device, memory_format=memory_format)
    reference = conv2d_like(arguments).to(device)
    reference.load_state_dict(layer.state_dict(), strict=True)
    input = integers(2, CHANNELS, 9, 8).to(device, memory_format=memory_format)
    assert_equal_steps(layer, reference, input)
    assert layer(input).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": True},
        {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 3), "bias": True},
        {"kernel_size": (3, 2), "padding": (2, 1), "dilation": (2, 3), "channel_multiplier": 2},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
    ],
    ids=lambda arguments: "_".join(map(str, arguments.values())),
)
def test_padding_modes(padding_mode: str, arguments: dict, device: str) -> None:
    arguments = {**arguments, "padding_mode": padding_mode}
    layer = with_integers(DepthwiseConv2d(CHANNELS, **arguments)).to(device)
    reference = conv2d_like(arguments).to(device)
    reference.load_state_dict(layer.state_dict(), strict=True)
    assert_equal_steps(layer, reference, integers(2, CHANNELS, 9, 8).to(device))
    assert_equal_steps(layer, reference, integers(CHANNELS, 8, 9).to(device))


@layers
def test_unbatched(arguments: dict, device: str) -> None:
    layer = with_integers(DepthwiseConv2d(CHANNELS, **arguments)).to(device)
    reference = conv2d_like(arguments).to(device)
    reference.load_state_dict(layer.state_dict(), strict=True)
    input = integers(CHANNELS, 9, 8).to(device)
    assert_equal_steps(layer, reference, input)
    assert torch.equal(layer(input), layer(input[None])[0])


def test_empty_batch(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, padding=1, bias=True, device=device)
    result = step(layer, torch.empty(0, CHANNELS, 7, 7, device=device))
    assert result.output.shape == result.grad_input.shape == (0, CHANNELS, 7, 7)
    assert all(not grad.any() for grad in result.grads.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    arguments = {"kernel_size": 3, "padding": 1, "bias": True}
    layer = with_integers(DepthwiseConv2d(CHANNELS, **arguments, device=device, dtype=dtype))
    reference = conv2d_like({**arguments, "device": device, "dtype": dtype})
    reference.load_state_dict(layer.state_dict(), strict=True)
    input = integers(1, CHANNELS, 3, 4).to(device, dtype)  # so small that bfloat16 holds every sum
    result = step(layer, input)
    assert {t.dtype for t in (result.output, result.grad_input, *result.grads.values())} == {dtype}
    assert_equal_steps(layer, reference, input)


def test_half_and_float(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True, device=device)
    assert layer.half() is layer
    input = torch.randn(1, CHANNELS, 5, 5, device=device)
    assert layer(input.half()).dtype == torch.float16
    assert layer.float()(input).dtype == torch.float32


def test_to_channels_last(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True).to(device).to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    input = torch.randn(2, CHANNELS, 6, 6, device=device)
    expected = conv2d_like({"kernel_size": 3, "bias": True}).to(device, memory_format=torch.channels_last)
    ours, theirs = layer(input), expected(input)
    assert ours.stride() == theirs.stride()


# Training


@layers
def test_training_equals_conv2d(arguments: dict, device: str) -> None:
    """Three steps of SGD in float64 from the same seed, also by optimizers that look at the parameters."""
    losses: list[list[Tensor]] = []
    inputs = torch.randn(3, 2, CHANNELS, 9, 8, dtype=torch.float64)
    for make in (lambda: DepthwiseConv2d(CHANNELS, **arguments), lambda: conv2d_like(arguments)):
        torch.manual_seed(3)
        layer = make().to(device, torch.float64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        losses.append([])
        for input in inputs.to(device):
            loss = layer(input).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
        losses[-1].extend(p.detach().cpu() for p in layer.parameters())
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("input",), ("input", "bias"), ()])
def test_frozen(wanted: tuple[str, ...], device: str) -> None:
    layer = with_integers(DepthwiseConv2d(CHANNELS, 3, bias=True)).to(device)
    input = integers(2, CHANNELS, 7, 7).to(device)
    full = step(copy.deepcopy(layer), input)
    layer.requires_grad_(False)
    for name in set(wanted) - {"input"}:
        layer.get_parameter(name).requires_grad_()
    input.requires_grad_("input" in wanted)
    output = layer(input)
    assert torch.equal(output, full.output) and output.requires_grad == bool(wanted)
    if wanted:
        output.sum().backward()
    expected = {"input": full.grad_input, **full.grads}
    for name, tensor in {"input": input, "weight": layer.weight, "bias": layer.bias}.items():
        assert (tensor.grad is not None) == (name in wanted), name
        if name in wanted:
            assert torch.equal(tensor.grad, expected[name]), name


def test_double_backward(device: str) -> None:
    layer = DepthwiseConv2d(2, (2, 3), padding=1, bias=True, device=device, dtype=torch.float64)
    input = torch.randn(1, 2, 4, 4, device=device, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(input: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (input,))

    assert torch.autograd.gradgradcheck(call, (input, *parameters.values()))


# Keeping and loading


@layers
def test_state_dicts_load_both_ways(arguments: dict) -> None:
    layer, other = DepthwiseConv2d(CHANNELS, **arguments), conv2d_like(arguments)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    other.load_state_dict(layer.state_dict(), strict=True)
    third = DepthwiseConv2d(CHANNELS, **arguments)
    third.load_state_dict(other.state_dict(), strict=True)
    for name, parameter in third.named_parameters():
        assert torch.equal(parameter, before[name]), name


def _save_and_load(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), _save_and_load],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)  # fmt: skip
def test_copies(duplicate: object, device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, padding="same", bias=True, channel_multiplier=2).to(device).eval()
    again = duplicate(layer)
    assert type(again) is DepthwiseConv2d and repr(again) == repr(layer) and not again.training
    input = torch.randn(2, CHANNELS, 6, 6, device=device)
    assert torch.equal(again(input), layer(input))
    assert (again.weight is layer.weight) == (duplicate is copy.copy)


def test_weights_only_state_dict(tmp_path) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = conv2d_like({"kernel_size": 3, "bias": True})
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)


def test_meta_device_and_to_empty(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True, device="meta")
    with torch.device("meta"):
        assert DepthwiseConv2d(CHANNELS, 3).weight.is_meta
    assert layer.weight.is_meta and layer.weight.shape == (CHANNELS, 1, 3, 3)
    layer.to_empty(device=device)
    source = DepthwiseConv2d(CHANNELS, 3, bias=True).to(device)
    layer.load_state_dict(source.state_dict(), strict=True)
    input = torch.randn(1, CHANNELS, 5, 5, device=device)
    assert torch.equal(layer(input), source(input))


def test_forward_on_meta() -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, stride=2, device="meta")
    assert layer(torch.empty(2, CHANNELS, 9, 11, device="meta")).shape == (2, CHANNELS, 4, 5)


# What others do to an nn.Conv2d


@pytest.mark.parametrize("bias", [False, True])
def test_fuse_conv_bn(bias: bool, device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, stride=2, padding=1, bias=bias, device=device, dtype=torch.float64)
    norm = nn.BatchNorm2d(CHANNELS, device=device, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    model = nn.Sequential(layer, norm).eval()
    fused = fuse_conv_bn_eval(*model)
    input = torch.randn(2, CHANNELS, 9, 9, device=device, dtype=torch.float64)
    assert type(fused) is DepthwiseConv2d
    torch.testing.assert_close(fused(input), model(input))


def test_weight_norm(device: str) -> None:
    models = []
    for layer in (DepthwiseConv2d(CHANNELS, 3, bias=True), conv2d_like({"kernel_size": 3, "bias": True})):
        torch.manual_seed(4)
        layer.reset_parameters()
        layer = parametrizations.weight_norm(layer.to(device, torch.float64))
        layer.parametrizations.weight.original0.data.mul_(2)
        models.append(layer)
    assert isinstance(models[0], DepthwiseConv2d)
    input = torch.randn(2, CHANNELS, 6, 6, device=device, dtype=torch.float64)
    ours, theirs = (step(model, input) for model in models)
    torch.testing.assert_close(ours, theirs)
    parametrize.remove_parametrizations(models[0], "weight")
    assert type(models[0]) is DepthwiseConv2d
    torch.testing.assert_close(models[0](input), theirs.output)


def test_spectral_norm(device: str) -> None:
    models = []
    for layer in (DepthwiseConv2d(CHANNELS, 3, bias=True), conv2d_like({"kernel_size": 3, "bias": True})):
        torch.manual_seed(4)
        layer.reset_parameters()
        models.append(parametrizations.spectral_norm(layer.to(device, torch.float64)))
    input = torch.randn(2, CHANNELS, 6, 6, device=device, dtype=torch.float64)
    ours, theirs = (step(model, input) for model in models)
    torch.testing.assert_close(ours, theirs)
    assert torch.linalg.matrix_norm(models[0].eval().weight.flatten(1), 2) < 1.1


def test_averaged_model(device: str) -> None:
    """An exponential moving average keeps a copy of the layer, and follows its parameters."""
    layer = DepthwiseConv2d(CHANNELS, 3, bias=True, device=device)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(layer)
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    average.update_parameters(layer)
    assert type(average.module) is DepthwiseConv2d
    torch.testing.assert_close(average.module.weight, first + 0.25)
    input = torch.randn(1, CHANNELS, 5, 5, device=device)
    torch.testing.assert_close(average(input), layer(input) - 0.75 * input.unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5)))


@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "offload"])
def test_checkpoint_and_offload(way: str, device: str) -> None:
    """Activations computed again, or kept on the host, between forward and backward."""
    layers = (DepthwiseConv2d(CHANNELS, 3, padding=1), nn.SiLU(), DepthwiseConv2d(CHANNELS, 3, bias=True))
    model = nn.Sequential(*layers).to(device, torch.float64)
    input = torch.randn(2, CHANNELS, 6, 6, device=device, dtype=torch.float64)
    expected = step(model, input)

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input: Tensor) -> Tensor:
            if way == "offload":
                with torch.autograd.graph.save_on_cpu():
                    return self.model(input)
            return checkpoint(self.model, input, use_reentrant=way == "reentrant")

    result = step(Saving(), input)
    assert torch.equal(result.output, expected.output) and torch.equal(result.grad_input, expected.grad_input)
    torch.testing.assert_close(list(result.grads.values()), list(expected.grads.values()), rtol=0, atol=0)


def test_pruning(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3, padding=1, device=device)
    input = torch.randn(2, CHANNELS, 6, 6, device=device)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2
    result = step(layer, input)
    masked = layer.weight_orig.detach() * layer.weight_mask
    assert torch.equal(result.output, dwconv.conv2d(input, masked, padding=1))
    assert not result.grads["weight_orig"][layer.weight_mask == 0].any()
    prune.remove(layer, "weight")
    assert torch.equal(layer(input), result.output) and isinstance(layer.weight, nn.Parameter)


def test_hooks(device: str) -> None:
    layer = DepthwiseConv2d(CHANNELS, 3).to(device)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    step(layer, torch.randn(1, CHANNELS, 5, 5, device=device))
    assert seen == ["before", "after", "backward"]
