"""torch.compile, torch.export and AOTInductor: one graph, no recompilation, the numbers of eager mode."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from common import FORMATS, Case, integers, make_inputs, run, run_dwconv
from torch import Tensor, nn
from torch.utils.cpp_extension import CUDA_HOME

import dwconv

formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # Compiled or not, the networks' other layers are to round alike.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Graphs:
    """A backend of torch.compile that counts its graphs and leaves them to eager mode."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def network(device: str, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 6, 1),
        dwconv.DepthwiseConv2d(6, 3, padding=1, bias=True),
        nn.SiLU(),
        dwconv.DepthwiseConv2d(6, (3, 2), stride=2, padding="valid", channel_multiplier=2),
        nn.SiLU(),
        dwconv.DepthwiseConv2d(12, 4, padding="same", padding_mode="circular"),
        nn.Conv2d(12, 2, 1),
    )
    return nn.Sequential(*layers).to(device, memory_format=memory_format)


def images(batch: int, device: str, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(batch, 3, 10, 9).to(device, memory_format=memory_format)


def train(model: nn.Module, input: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Output, gradient of the input and of every parameter."""
    input = input.detach().requires_grad_()
    with torch.autocast(input.device.type, autocast, enabled=autocast is not None):
        output = model(input)
    parameters = list(model.parameters())
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [input, *parameters])]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    """To rounding: other layers than ours may be computed in another way."""
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other)


@functools.cache
def why_not_inductor(device: str) -> str:
    """Empty where PyTorch finds the compilers that its default backend takes."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}"
    return ""


def skip_without_inductor(device: str) -> None:
    if why := why_not_inductor(device):
        pytest.skip(why)


# torch.compile


@formats
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device: str, dynamic: bool, memory_format: torch.memory_format) -> None:
    """One graph, forward and backward, with the numbers of eager mode; where shapes are dynamic, one for all."""
    graphs = Graphs()
    compiled = torch.compile(dwconv.conv2d, fullgraph=True, backend=graphs, dynamic=dynamic)
    # No two sides alike: torch.compile takes sides that are equal at first for one and the same.
    for batch, size in [(4, (9, 8))] + [(7, (10, 14)), (5, (17, 8))] * dynamic:
        case = Case(batch, 3, size, (3, 2), (2, 1), (1, 2), (1, 2), multiplier=2)
        # Sums of integers are exact: a compiled gradient may lie otherwise in memory, and be summed in another order.
        tensors = make_inputs(case, torch.float32, device, memory_format, integers)
        grad_output = integers(*dwconv.conv2d(*tensors, **case.geometry).shape).to(tensors[0])
        results = run(compiled, tensors, grad_output, **case.geometry)
        for result, expected in zip(results, run_dwconv(tensors, grad_output, **case.geometry)):
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            assert result.stride() == expected.stride()
    assert graphs.count == 1


@formats
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_model(device: str, dynamic: bool, memory_format: torch.memory_format) -> None:
    """Layers among others, in training and inference; with dynamic=True all batch sizes share a graph."""
    graphs = Graphs()
    model = network(device, memory_format)
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=dynamic)
    for batch in [4, 3, 7, 12] if dynamic else [4]:
        input = images(batch, device, memory_format)
        assert_same(train(compiled, input), train(model, input))
    assert graphs.count == 1
    with torch.inference_mode():
        for batch in [4, 3, 7, 12] if dynamic else [4]:
            input = images(batch, device, memory_format)
            result = compiled(input)
            torch.testing.assert_close(result, model(input))
            assert result.stride() == model(input).stride()
    assert graphs.count == 2


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_autocast(device: str, place: str) -> None:
    model = network(device)
    input = images(4, device)
    expected = train(model, input, torch.bfloat16)
    assert expected[0].dtype == torch.bfloat16
    if place == "outside":
        results = train(torch.compile(model, fullgraph=True, backend="aot_eager"), input, torch.bfloat16)
    else:

        class Inside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input: Tensor) -> Tensor:
                with torch.autocast(device, torch.bfloat16):
                    return self.model(input)

        results = train(torch.compile(Inside(), fullgraph=True, backend="aot_eager"), input)
    assert_same(results, expected)


@pytest.mark.slow
@formats
def test_inductor(device: str, memory_format: torch.memory_format) -> None:
    """The backend that users have, from tensors to its own code and back.

    In float64, since it may choose another layout for the other layers, and with it another order of summing.
    """
    skip_without_inductor(device)
    model = network(device, memory_format).double()
    input = images(4, device, memory_format).double()
    compiled = torch.compile(model, fullgraph=True)
    assert_same(train(compiled, input), train(model, input))
    with torch.no_grad():
        torch.testing.assert_close(compiled(input), model(input))


@pytest.mark.gpu
@formats
def test_reduce_overhead(memory_format: torch.memory_format) -> None:
    """Forward and backward as CUDA graphs."""
    skip_without_inductor("cuda")
    model = network("cuda", memory_format)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the first calls warm up and record
        input = images(4, "cuda", memory_format)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([result.clone() for result in train(compiled, input)], train(model, input))


def test_double_backward_fails_clearly(device: str) -> None:
    """PyTorch's own limit."""
    model = network(device)
    input = images(2, device).requires_grad_()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(input)
    [grad] = torch.autograd.grad(output.sin().sum(), input, create_graph=True)
    with pytest.raises(
        RuntimeError, match="torch.compile with aot_autograd does not currently support double backward"
    ):
        grad.sum().backward()


def test_compiled_autograd(device: str) -> None:
    """The backward of an eager forward, compiled."""
    model = network(device)
    input = images(2, device)
    expected = train(model, input)[2:]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        model(input).square().sum().backward()
    assert_same([parameter.grad for parameter in model.parameters()], expected)


# torch.export and AOTInductor


def exported(model: nn.Module, device: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (images(4, device),), dynamic_shapes=({0: batch},))


def test_export(device: str) -> None:
    """The operators stay whole, for every batch size, also after saving and loading."""
    model = network(device)
    program = exported(model, device)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("dwconv.forward.default") == 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for again in (program, torch.export.load(file)):
        for batch in (2, 9):
            input = images(batch, device)
            torch.testing.assert_close(again.module()(input), model(input))


def test_export_for_training(device: str) -> None:
    model = network(device)
    trained = exported(copy.deepcopy(model), device).module()
    input = images(3, device)
    assert_same(train(trained, input), train(model, input))


@functools.cache
def why_not_aot_inductor(device: str, folder: Path) -> str:
    """Empty where a package of PyTorch's own layers can be loaded, which may take the process with it if not."""
    code = """
        import sys, torch
        device, path = sys.argv[1:]
        program = torch.export.export(torch.nn.SiLU(), (torch.ones(2, device=device),))
        torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))
    """
    command = [sys.executable, "-c", dedent(code), device, str(folder / "silu.pt2")]
    done = subprocess.run(command, capture_output=True)
    return f"AOTInductor does not work here: loading nn.SiLU exits with {done.returncode}" if done.returncode else ""


@pytest.mark.slow
def test_aot_inductor(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that runs without Python: it finds the operators by name."""
    skip_without_inductor(device)
    monkeypatch.setenv("CI", "1")  # then Inductor insists that what has a decomposition is decomposed
    if device == "cuda" and CUDA_HOME is None:
        pytest.skip("no CUDA toolkit")
    if device == "cuda" and (why := why_not_aot_inductor(device, tmp_path)):
        pytest.skip(why)
    model = network(device).requires_grad_(False)
    path = torch._inductor.aoti_compile_and_package(exported(model, device), package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for batch in (2, 9):
        input = images(batch, device)
        torch.testing.assert_close(package(input), model(input))
