"""What is done with a model beside training it: counting, profiling, exporting to ONNX."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import dwconv


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_flops(device: str, multiplier: int, padding: int | str) -> None:
    """Those of F.conv2d in the forward; each gradient takes as many.

    F.conv2d's own count for the weight's gradient is too high by the number of groups.
    """
    arguments = {"padding": padding, "bias": True, "device": device}
    ours = dwconv.DepthwiseConv2d(6, (3, 4), channel_multiplier=multiplier, **arguments)
    theirs = nn.Conv2d(6, 6 * multiplier, (3, 4), groups=6, **arguments)
    input = torch.randn(2, 6, 9, 8, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as expected:
        output = theirs(input)
    with FlopCounterMode(display=False) as forward:
        assert ours(input).shape == output.shape
    assert forward.get_total_flops() == expected.get_total_flops() == 2 * output.numel() * 12
    with FlopCounterMode(display=False) as both:
        ours(input).sum().backward()
    assert both.get_total_flops() == 3 * forward.get_total_flops()
    with FlopCounterMode(display=False) as frozen:
        ours(input.detach()).sum().backward()
    assert frozen.get_total_flops() == 2 * forward.get_total_flops()


def test_flops_of_a_late_import(tmp_path: Path) -> None:
    """The counter may be imported after dwconv, or before it."""
    count = "with FlopCounterMode(display=False) as mode: dwconv.conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3))"
    imports = ["import dwconv", "from torch.utils.flop_counter import FlopCounterMode"]
    for order in (imports, imports[::-1]):
        code = "\n".join(["import torch", *order, count, "print(mode.get_total_flops())"])
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert int(done.stdout) == 2 * 18 * 9


def test_a_torch_that_does_not_take_what_it_is_told(tmp_path: Path) -> None:
    """Its own module is imported all the same."""
    code = """
import torch, warnings, dwconv
from dwconv import _integrations
def fail(): raise AttributeError("gone")
_integrations._TO_TELL["torch.utils.flop_counter"] = fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch.utils.flop_counter
print(torch.utils.flop_counter.FlopCounterMode.__name__, *[w.message for w in caught if "gone" in str(w.message)])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.startswith("FlopCounterMode dwconv: torch.utils.flop_counter of torch") and "gone" in said


def test_fx(device: str) -> None:
    """torch.fx records a call of conv2d; what it makes of a model computes the same, and so does its code."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        dwconv.DepthwiseConv2d(4, 3, padding="same", bias=True),
        dwconv.DepthwiseConv2d(4, (3, 2), stride=2, padding=1, padding_mode="reflect", channel_multiplier=2),
    ).to(device)
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_function" and node.target is dwconv.conv2d]
    assert len(calls) == 2 and "dwconv" in traced.code
    input = torch.randn(2, 3, 9, 8, device=device)
    results = []
    for function in (model, traced, pickle.loads(pickle.dumps(traced))):
        output = function(input)
        results.append((output, *torch.autograd.grad(output.sum(), function.parameters())))
    for result in results[1:]:
        torch.testing.assert_close(results[0], result)  # to rounding: a backward of PyTorch's padding adds in any order

    class Function(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return dwconv.conv2d(x, weight, padding=1).relu()

    x, weight = torch.randn(2, 4, 6, 5, device=device), torch.randn(4, 1, 3, 3, device=device)
    assert torch.equal(torch.fx.symbolic_trace(Function())(x, weight), Function()(x, weight))


def test_profiler(device: str) -> None:
    layer = dwconv.DepthwiseConv2d(6, 3, device=device)
    input = torch.randn(2, 6, 9, 8, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        layer(input).sum().backward()
    shapes = {event.key: event.input_shapes for event in profiled.key_averages(group_by_input_shape=True)}
    assert shapes["dwconv::forward"][:2] == [[2, 6, 9, 8], [6, 1, 3, 3]]
    assert shapes["dwconv::backward"][:3] == [[2, 6, 7, 6], [2, 6, 9, 8], [6, 1, 3, 3]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_onnx(dynamic: bool) -> None:
    """A standard Conv, with the numbers of the model."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    layers = (
        dwconv.DepthwiseConv2d(
            3, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), channel_multiplier=2, bias=True
        ),
        nn.ReLU(),
        dwconv.DepthwiseConv2d(6, 3),
        dwconv.DepthwiseConv2d(6, 4, padding="same"),
    )
    model = nn.Sequential(*layers).eval()
    input = torch.randn(2, 3, 8, 9)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.onnx.export(model, (input,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    proto = program.model_proto
    onnx.checker.check_model(proto)
    nodes = [(node.op_type, node.domain) for node in proto.graph.node]
    assert [name for name, domain in nodes if name == "Conv" and domain == ""] == ["Conv"] * 3
    assert {domain for _, domain in nodes} == {""}
    for batch in (2, 5) if dynamic else (2,):
        input = torch.randn(batch, 3, 8, 9)
        [output] = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: input.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(input).detach(), rtol=1e-4, atol=1e-5)
