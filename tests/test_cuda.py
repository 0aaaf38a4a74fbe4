"""CUDA's own ways: graphs, streams, threads, processes, several GPUs."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from common import FORMATS
from torch import Tensor, nn

import dwconv

pytestmark = pytest.mark.gpu

formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])


def network(memory_format: torch.memory_format) -> nn.Sequential:
    """Small, large, strided and dilated kernels."""
    torch.manual_seed(1)
    layers = (
        dwconv.DepthwiseConv2d(8, 3, padding=1, bias=True),
        nn.SiLU(),
        dwconv.DepthwiseConv2d(8, 13, padding=6),
        nn.SiLU(),
        dwconv.DepthwiseConv2d(8, 5, stride=2, padding=2, channel_multiplier=2),
        nn.SiLU(),
        dwconv.DepthwiseConv2d(16, 3, dilation=(2, 3), bias=True),
    )
    return nn.Sequential(*layers).to("cuda", memory_format=memory_format)


def images(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(4, 8, 28, 28).to("cuda", memory_format=memory_format)


def results(model: nn.Module, input: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    input = input.detach().requires_grad_()
    output = model(input)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [input, *model.parameters()])]


def assert_equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@formats
def test_graph(memory_format: torch.memory_format) -> None:
    """A training step captured by hand; what 100 replays make of the parameters is what eager steps make of them."""
    model = network(memory_format)
    reference = copy.deepcopy(model)
    input = images(memory_format)
    fresh = [images(memory_format) for _ in range(4)]

    def stepper(model: nn.Module, input: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(input).square().mean().backward()
            optimizer.step()

        return step

    step = stepper(model, input)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = input.clone()
    for i in range(100):
        input.copy_(fresh[i % 4])
        graph.replay()

    input = captured
    step = stepper(reference, input)
    for _ in range(3):
        step()
    for i in range(100):
        input.copy_(fresh[i % 4])
        step()
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        assert parameter.isfinite().all()
        torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@formats
def test_gradients_share_memory(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """Partial sums of one gradient lie where the other is written afterwards: each is as it is alone, every time."""
    for batch, channels, size, kernel, stride in (
        (32, 48, 14, 3, 1),
        (16, 32, 28, 5, 2),
        (128, 192, 7, 3, 1),
        (16, 64, 56, 7, 1),
        (1, 512, 2, 3, 1),
        (8, 32, 28, 13, 1),
        (4, 16, 56, 31, 1),
        (4, 16, 20, 51, 1),
    ):
        x = torch.randn(batch, channels, size, size, dtype=dtype, device="cuda").to(memory_format=memory_format)
        weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype, device="cuda")
        tensors = [x.requires_grad_(), weight.requires_grad_()]
        geometry = [stride] * 2, [kernel // 2] * 2, [1, 1]
        output = dwconv.conv2d(*tensors, None, *geometry)
        grad_output = torch.randn_like(output)
        channels_last = memory_format == torch.channels_last
        alone = [
            torch.ops.dwconv.grad_input(grad_output, weight, x.shape, *geometry, channels_last).detach(),
            torch.ops.dwconv.grad_weight(grad_output, x, [kernel] * 2, *geometry, False)[0].detach(),
        ]
        for _ in range(3):
            got = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
            assert_equal(list(got), alone)


@formats
def test_side_stream(memory_format: torch.memory_format) -> None:
    """All work goes to the current stream: it waits there for what makes its input, however long that takes."""
    model = network(memory_format)
    fresh = images(memory_format)
    expected = results(model, fresh)
    input = torch.full_like(fresh, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        input.copy_(fresh)
        got = results(model, input)
    side.synchronize()
    assert_equal(got, expected)


@formats
def test_record_stream(memory_format: torch.memory_format) -> None:
    """Memory that a side stream still reads goes to nobody else, if recorded there; workspaces are its own."""
    model = network(memory_format)
    fresh = images(memory_format)
    expected = results(model, fresh)
    side = torch.cuda.Stream()
    for _ in range(5):
        input = fresh.clone(memory_format=torch.preserve_format)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # some 5 ms
            got = results(model, input)
            input.record_stream(side)
        del input
        others = [torch.full_like(fresh, float("nan")) for _ in range(20)]  # where the input was, were it free
        side.synchronize()
        assert_equal(got, expected)
        del others


def test_threads() -> None:
    """Eight at once, each on a stream of its own."""
    models = [network(memory_format) for memory_format in FORMATS] * 4
    inputs = [images(memory_format) for memory_format in FORMATS] * 4
    expected = [results(model, input) for model, input in zip(models, inputs)]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                got = results(models[i], inputs[i])
        stream.synchronize()
        assert_equal(got, expected[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_fork_after_import() -> None:
    """Importing dwconv, and calling it on CPU tensors, leaves CUDA to the children."""
    code = """
        import os, torch, dwconv
        dwconv.conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3))
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                y = dwconv.conv2d(torch.ones(1, 2, 5, 5, device="cuda"), torch.ones(2, 1, 3, 3, device="cuda"))
                os._exit(0 if (y == 9).all() else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(dwconv.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@formats
def test_other_gpu(memory_format: torch.memory_format) -> None:
    """Tensors on cuda:1 while cuda:0 is current, and stays so."""
    model, input = network(memory_format), images(memory_format)
    expected = results(model, input)
    with torch.cuda.device(0):
        got = results(copy.deepcopy(model).to("cuda:1"), input.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in got} == {1}
    assert_equal([tensor.cpu() for tensor in got], [tensor.cpu() for tensor in expected])


@pytest.mark.parametrize("name", ["mobilenetv2_100", "efficientnet_b0", "convnext_tiny"])
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "autocast"])
@formats
def test_peak_memory(name: str, low: torch.dtype | None, memory_format: torch.memory_format) -> None:
    """A training step asks for no more memory than with nn.Conv2d."""
    timm = pytest.importorskip("timm")
    images = torch.randn(8, 3, 96, 96, device="cuda").contiguous(memory_format=memory_format)

    def requested(which: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    peaks = []
    for convert in (False, True):
        gc.collect()
        held = requested("current")
        torch.manual_seed(0)
        model = timm.create_model(name).to("cuda", memory_format=memory_format)
        if convert:
            dwconv.convert(model)
        for _ in range(2):  # the first one makes the gradients
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", low, enabled=low is not None):
                loss = model(images).float().square().mean()
            loss.backward()
        peaks.append(requested("peak") - held)
        del model, loss
    assert 0 < peaks[1] <= peaks[0]
