"""How exact the results are on the layers of real networks: as exact as those of F.conv2d."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from common import FORMATS, Case, Results, make_inputs, run, run_dwconv, run_float64, torch_conv2d
from torch import Tensor

LAYERS = {
    "image, 3 channels": Case(4, 3, (512, 512), (3, 3), padding=(1, 1)),
    "feature map without padding": Case(2, 64, (512, 512), (3, 3)),
    "full HD": Case(1, 16, (1080, 1920), (3, 3), padding=(1, 1)),
    "MobileNetV2, 112": Case(16, 32, (112, 112), (3, 3), padding=(1, 1)),
    "MobileNetV2, stride 2": Case(16, 96, (112, 112), (3, 3), (2, 2), (1, 1)),
    "MobileNetV2, 7": Case(64, 960, (7, 7), (3, 3), padding=(1, 1)),
    "EfficientNet, 14": Case(32, 480, (14, 14), (5, 5), padding=(2, 2)),
    "EfficientNet, stride 2": Case(32, 672, (14, 14), (5, 5), (2, 2), (2, 2)),
    "ConvNeXt, 56": Case(16, 96, (56, 56), (7, 7), padding=(3, 3)),
    "ConvNeXt, 7": Case(64, 768, (7, 7), (7, 7), padding=(3, 3)),
    "RepLKNet, 31": Case(4, 128, (56, 56), (31, 31), padding=(15, 15)),
    "SLaK, 51 x 5": Case(8, 128, (56, 56), (51, 5), padding=(25, 2)),
    "InceptionNeXt, 1 x 11": Case(16, 96, (56, 56), (1, 11), padding=(0, 5)),
    "DeepLab, dilation 2": Case(8, 256, (64, 64), (3, 3), padding=(2, 2), dilation=(2, 2)),
    "multiplier 2": Case(8, 64, (56, 56), (7, 7), (2, 2), (3, 3), multiplier=2),
    "odd sides": Case(7, 37, (113, 95), (5, 5), padding=(2, 2)),
}

# By how much the error may exceed that of F.conv2d, which sums in float32 too. Rounding to 16 bits leaves no room.
WORST_RATIO = {torch.float32: 2, torch.float16: 1.01, torch.bfloat16: 1.01}


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", WORST_RATIO, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_error_on_a_layer(device: str, layer: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    case = LAYERS[layer]
    if device == "cpu":  # where ATen computes both; with fewer channels, oneDNN can hang in wide bfloat16 kernels
        height, width = case.size
        case = case._replace(batch=1, channels=min(case.channels, 32), size=(min(height, 17), min(width, 16)))
    draw = partial(torch.randn, device=device)
    tensors = make_inputs(case, dtype, device, memory_format, make=draw)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        grad_output = draw(torch_conv2d(*tensors, **case.geometry).shape).to(dtype)
        grad_output = grad_output.contiguous(memory_format=memory_format)
        theirs = run(torch_conv2d, tensors, grad_output, **case.geometry)
        exact = run_float64(tensors, grad_output, **case.geometry)
    ours = run_dwconv(tensors, grad_output, **case.geometry)

    for name, result, expected, reference in zip(Results._fields, ours, theirs, exact):
        error, their_error = rms(result - reference), rms(expected - reference)
        # An error of theirs that happens to be nearly none is no measure. Nor is, for the few sums of a bias, the last
        # bit or two of float32.
        bits = 2 if name == "grad_bias" and dtype == torch.float32 else 1e-3
        close_enough = bits * torch.finfo(dtype).eps * rms(reference)
        assert error <= WORST_RATIO[dtype] * their_error + close_enough, (
            f"{name}: the error is {error:.4g}, that of F.conv2d {their_error:.4g}"
        )


# Sums over few pixels, which F.conv2d shares out among many threads: where a kernel of ours has fewer, each of which
# sums more products, one after the other, its error would be up to twice as large.
SHORT_SUMS = {
    "phases of 52 x 52": Case(4, 480, (103, 103), (25, 25), (2, 2), (12, 12)),
    "rows of 88": Case(38, 256, (6, 88), (16, 16), padding=(7, 7)),
    "images of 56 x 56": Case(4, 132, (56, 56), (13, 13), padding=(6, 6)),
    "images of 28 x 28": Case(16, 132, (28, 28), (9, 9), padding=(4, 4)),
}
SHORT_SUMS_RATIO = 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHORT_SUMS)
def test_error_of_short_sums(name: str) -> None:
    """The weight's gradient of a large kernel in float32, of which the error is no larger than that of F.conv2d."""
    case = SHORT_SUMS[name]
    draw = partial(torch.randn, device="cuda")
    tensors = make_inputs(case, torch.float32, "cuda", make=draw)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        grad_output = draw(torch_conv2d(*tensors, **case.geometry).shape)
        theirs = run(torch_conv2d, tensors, grad_output, **case.geometry).grad_weight
    ours = run_dwconv(tensors, grad_output, **case.geometry).grad_weight
    exact = run_float64(tensors, grad_output, **case.geometry).grad_weight
    error, their_error = rms(ours - exact), rms(theirs - exact)
    assert error <= SHORT_SUMS_RATIO * their_error, f"the error is {error:.4g}, that of F.conv2d {their_error:.4g}"
