"""The gradients, of any order, and what autograd and autocast make of the operators."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from common import (
    DTYPES,
    FORMATS,
    SAMPLES,
    Case,
    Sample,
    assert_accurate,
    magnitudes,
    make_inputs,
    run,
    run_dwconv,
    run_float64,
    torch_conv2d,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dwconv

CASES = [
    Case(2, 2, (4, 5), (3, 3), padding=(1, 1)),
    Case(1, 2, (5, 4), (2, 3), (2, 1), (1, 2), multiplier=2, bias=False),
    Case(2, 2, (3, 6), (3, 2), (1, 2), (2, 0), (1, 3), multiplier=2),
    Case(2, 3, (4, 4), (2, 2), (3, 2), (2, 1), (2, 1), bias=False),
    Case(2, 1, (4, 3), (3, 1), padding=(1, 0), multiplier=3),
    Case(1, 2, (4, 20), (3, 5), (1, 10), bias=False),
]

SMALL = Case(2, 3, (6, 5), (3, 2), (1, 2), (1, 0), (2, 1), multiplier=2)


class Recorder(TorchDispatchMode):
    """Takes down the calls of dwconv's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dwconv":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [function._opname for function, _ in self.calls]


def leaves(
    case: Case, device: str, memory_format=torch.contiguous_format, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Input, weight and, where there is one, bias; each wants its gradient."""
    tensors = make_inputs(case, dtype, device, memory_format)
    return tuple(tensor.requires_grad_() for tensor in tensors if tensor is not None)


def draw_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape).to(tensor)


def assert_equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------- numerical gradients


@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(device: str, case: Case, memory_format: torch.memory_format, fast_mode: bool) -> None:
    tensors = leaves(case, device, memory_format)
    assert gradcheck(lambda *t: dwconv.conv2d(*t, **case.geometry), tensors, nondet_tol=0, fast_mode=fast_mode)


@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(device: str, case: Case, memory_format: torch.memory_format, fast_mode: bool) -> None:
    tensors = leaves(case, device, memory_format)
    assert gradgradcheck(lambda *t: dwconv.conv2d(*t, **case.geometry), tensors, nondet_tol=0, fast_mode=fast_mode)


def test_gradcheck_of_other_arguments(device: str) -> None:
    """Padding by name, a single image, and tensors that are views."""
    x, w, b = leaves(Case(2, 2, (5, 4), (2, 3), multiplier=2), device)
    functions: list[Callable[..., Tensor]] = [
        lambda x, w, b: dwconv.conv2d(x, w, b, padding="same", dilation=(1, 2)),
        lambda x, w, b: dwconv.conv2d(x[0], w, b, padding="same"),
        lambda x, w, b: dwconv.conv2d(x.mT, w[..., :2, :], b, padding=1),
        lambda x, w, b: dwconv.conv2d(x[:1].expand(3, 2, 5, 4), w[:1].expand(4, 1, 2, 3), b[1:2].expand(4)),
        lambda x, w, b: dwconv.conv2d(x, w, b, padding=1).sum((2, 3)),  # with an expanded gradient
        lambda x, w, b: dwconv.conv2d(dwconv.conv2d(x, w, b), w.repeat(2, 1, 1, 1)[..., 1:], None, padding=1),
    ]
    for function in functions:
        assert gradcheck(function, (x, w, b), nondet_tol=0)
        assert gradgradcheck(function, (x, w, b), nondet_tol=0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_third_order(device: str, case: Case, memory_format: torch.memory_format) -> None:
    def third(conv2d: Callable) -> tuple[Tensor, ...]:
        tensors = tuple(tensor.detach().requires_grad_() for tensor in originals)
        loss = conv2d(*tensors, **case.geometry).pow(3).sum()
        for _ in range(2):
            loss = sum(grad.pow(2).sum() for grad in torch.autograd.grad(loss, tensors, create_graph=True))
        return torch.autograd.grad(loss / loss.detach(), tensors)

    originals = leaves(case, device, memory_format)
    torch.testing.assert_close(third(dwconv.conv2d), third(torch_conv2d), rtol=1e-10, atol=1e-10)


def test_third_order_gradgradcheck(device: str) -> None:
    case = CASES[2]
    tensors = leaves(case, device)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = dwconv.conv2d(*tensors, **case.geometry)
        return torch.autograd.grad(output.pow(3).sum(), tensors, create_graph=True)

    assert gradgradcheck(gradients, tensors, nondet_tol=0, fast_mode=True)


# ---------------------------------------------------------------------------- who needs a gradient


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("wanted", [wanted for wanted in product([True, False], repeat=3) if any(wanted)], ids=str)
def test_only_some_need_a_gradient(device: str, wanted: tuple, memory_format: torch.memory_format) -> None:
    """The others get none, and no operator runs for them."""
    tensors = make_inputs(SMALL, torch.float64, device, memory_format)
    grad_output = draw_like(dwconv.conv2d(*tensors, **SMALL.geometry))
    expected = run_float64(tensors, grad_output, **SMALL.geometry)[1:]

    tensors = tuple(tensor.detach().requires_grad_(needs) for tensor, needs in zip(tensors, wanted))
    with Recorder() as recorder:
        dwconv.conv2d(*tensors, **SMALL.geometry).backward(grad_output)
    for tensor, needs, grad in zip(tensors, wanted, expected):
        assert (tensor.grad is not None) == needs
        if needs:
            torch.testing.assert_close(tensor.grad, grad)
    assert recorder.names == ["forward"] + ["grad_input"] * wanted[0] + ["grad_weight"] * wanted[1]


def test_second_order_of_some(device: str) -> None:
    """A gradient penalty on the input of a layer, with and without its parameters frozen."""
    for frozen in (False, True):
        penalties = []
        for conv2d in (dwconv.conv2d, torch_conv2d):
            torch.manual_seed(1)
            x, w, b = leaves(SMALL, device)
            w.requires_grad_(not frozen)
            output = conv2d(x, w, b, **SMALL.geometry).tanh()
            [grad] = torch.autograd.grad(output.sum(), x, create_graph=True)
            grad.norm().backward()
            assert (w.grad is None) == frozen
            penalties.append((x.grad, b.grad) + (() if frozen else (w.grad,)))
        torch.testing.assert_close(*penalties)


def test_no_graph_where_none_is_wanted(device: str) -> None:
    x, w, b = leaves(SMALL, device)
    expected = dwconv.conv2d(x, w, b, **SMALL.geometry)
    assert expected.requires_grad
    arguments = SMALL.stride, SMALL.padding, SMALL.dilation
    grad_output = draw_like(expected)

    def calls() -> list[Tensor]:
        return [
            dwconv.conv2d(x, w, b, *arguments),
            torch.ops.dwconv.forward(x, w, b, *arguments),
            torch.ops.dwconv.grad_input(grad_output, w, x.shape, *arguments, False),
            *torch.ops.dwconv.grad_weight(grad_output, x, SMALL.kernel, *arguments, True),
        ]

    with torch.no_grad():
        outputs = calls()
        assert not any(output.requires_grad or output.grad_fn or output.is_inference() for output in outputs)
        assert_equal(outputs[0], expected.detach())
    with torch.inference_mode():
        outputs = calls()
        assert all(output.is_inference() for output in outputs)
        assert_equal(outputs[0], expected.detach())
        with torch.inference_mode(False):
            assert dwconv.conv2d(x, w, b).requires_grad

    x, w, b = (tensor.detach() for tensor in (x, w, b))
    outputs = calls()
    assert not any(output.requires_grad or output.grad_fn for output in outputs)


@pytest.mark.parametrize("geometry", [{"padding": (600, 0)}, {"dilation": (1, 600)}, {"stride": (1, 600)}], ids=str)
def test_numbers_that_do_not_pack(device: str, geometry: dict) -> None:
    """A geometry of small numbers goes to the operators as one number, of large ones as it is."""
    tensors = make_inputs(Case(1, 2, (3, 700), (2, 2)), torch.float64, device)
    ours, theirs = (run(conv2d, tensors, torch.ones, **geometry) for conv2d in (dwconv.conv2d, torch_conv2d))
    torch.testing.assert_close(ours, theirs)


def test_backward_on_meta() -> None:
    x, w, b = (tensor.detach().to("meta").requires_grad_() for tensor in leaves(SMALL, "cpu"))
    output = dwconv.conv2d(x, w, b, **SMALL.geometry)
    assert output.shape == dwconv.conv2d(*leaves(SMALL, "cpu"), **SMALL.geometry).shape
    output.sum().backward()
    assert x.grad.shape == x.shape and w.grad.shape == w.shape and b.grad.shape == b.shape


# ---------------------------------------------------------------------------- the operators by name


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.bias], ids=str)
def test_operators_by_name(device: str, case: Case, memory_format: torch.memory_format) -> None:
    """torch.ops.dwconv.* are differentiable, and what they give is what F.conv2d and its gradients do."""
    x, w, b = leaves(case, device, memory_format)
    expected = torch_conv2d(x, w, b, **case.geometry)
    g = draw_like(expected).requires_grad_()
    expected_grads = torch.autograd.grad(expected, (x, w, b), g, create_graph=True)
    geometry = case.stride, case.padding, case.dilation
    channels_last = memory_format == torch.channels_last

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.ops.dwconv.forward(x, w, b, *geometry)

    def grad_input(g: Tensor, w: Tensor) -> Tensor:
        return torch.ops.dwconv.grad_input(g, w, x.shape, *geometry, channels_last)

    def grad_weight(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.dwconv.grad_weight(g, x, case.kernel, *geometry, True)

    for function, tensors, results in (
        (forward, (x, w, b), (expected,)),
        (grad_input, (g, w), expected_grads[:1]),
        (grad_weight, (g, x), expected_grads[1:]),
    ):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(output.requires_grad for output in outputs)
        torch.testing.assert_close(outputs, results)
        directions = [draw_like(result) for result in results]
        torch.testing.assert_close(
            torch.autograd.grad(outputs, tensors, directions),
            torch.autograd.grad(results, tensors, directions, retain_graph=True),
        )
        assert gradcheck(function, tensors, nondet_tol=0)
        assert gradgradcheck(function, tensors, nondet_tol=0)


def test_grad_weight_without_bias(device: str) -> None:
    x, w, _ = leaves(SMALL, device)
    g = draw_like(dwconv.conv2d(x, w, **SMALL.geometry)).requires_grad_()
    geometry = SMALL.stride, SMALL.padding, SMALL.dilation
    grad_weight, nothing = torch.ops.dwconv.grad_weight(g, x, SMALL.kernel, *geometry, False)
    assert grad_weight.requires_grad and not nothing.requires_grad and nothing.shape == (0,)
    assert_equal(grad_weight, torch.ops.dwconv.grad_weight(g, x, SMALL.kernel, *geometry, True)[0])


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(device: str, sample: Sample, multiplier: int) -> None:
    """On all calls that conv2d and its gradients make of PyTorch's own samples."""
    for memory_format in FORMATS:
        tensors = sample.tensors(multiplier, torch.float32, device, memory_format)
        with Recorder() as recorder:
            run_dwconv(tensors, torch.randn, **sample.arguments)
        assert recorder.names == ["forward", "grad_input", "grad_weight"]
        for operator, args in recorder.calls:
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            torch.library.opcheck(operator, args)


# ---------------------------------------------------------------------------- autograd's own ways


def test_twice_through_one_graph(device: str) -> None:
    x, w, b = leaves(SMALL, device)
    output = dwconv.conv2d(x, w, b, **SMALL.geometry)
    grad_output = draw_like(output)
    first = torch.autograd.grad(output, (x, w, b), grad_output, retain_graph=True)
    assert_equal(torch.autograd.grad(output, (x, w, b), grad_output), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, (x, w, b), grad_output)

    for _ in range(2):
        dwconv.conv2d(x, w, b, **SMALL.geometry).backward(grad_output)
    assert_equal((x.grad, w.grad, b.grad), tuple(2 * grad for grad in first))


def test_weight_used_twice(device: str) -> None:
    """Both uses count, as in tied layers."""
    x, w, _ = leaves(Case(2, 3, (6, 7), (3, 2)), device)
    grads = [
        torch.autograd.grad(conv2d(conv2d(x, w, padding=(1, 0)), w).pow(2).sum(), (x, w))
        for conv2d in (dwconv.conv2d, torch_conv2d)
    ]
    torch.testing.assert_close(*grads)


def test_hooks(device: str) -> None:
    x, w, b = leaves(SMALL, device)
    seen = []
    w.register_hook(lambda grad: 10 * grad)
    x.register_hook(lambda grad: seen.append(("x", grad.shape)))
    b.register_post_accumulate_grad_hook(lambda bias: seen.append(("b", bias.grad.shape)))
    output = dwconv.conv2d(x, w, b, **SMALL.geometry)
    output.register_hook(lambda grad: 2 * grad)
    grad_output = draw_like(output)
    output.backward(grad_output)
    expected = run_float64((x, w, b), 2 * grad_output, **SMALL.geometry)
    torch.testing.assert_close(x.grad, expected.grad_input)
    torch.testing.assert_close(w.grad, 10 * expected.grad_weight)
    torch.testing.assert_close(b.grad, expected.grad_bias)
    assert sorted(seen) == [("b", b.shape), ("x", x.shape)]


@pytest.mark.parametrize("changed", [0, 1])
def test_change_of_what_was_saved_is_noticed(device: str, changed: int) -> None:
    tensors = leaves(SMALL, device)
    output = dwconv.conv2d(*tensors, **SMALL.geometry)
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_saves_no_more_than_it_needs(device: str) -> None:
    """A frozen weight needs no input kept, and gradients of the parameters need no weight."""
    for wanted, kept in (((True, False, False), [1]), ((False, True, True), [0]), ((False, False, True), [])):
        tensors = leaves(SMALL, device)
        for tensor, needs in zip(tensors, wanted):
            tensor.requires_grad_(needs)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            dwconv.conv2d(*tensors, **SMALL.geometry)
        assert saved == [tensors[i].data_ptr() for i in kept]


def test_checkpoint_and_saved_tensor_hooks(device: str) -> None:
    x, w, b = leaves(SMALL, device)

    def f(x: Tensor) -> Tensor:
        return dwconv.conv2d(x, w, b, **SMALL.geometry).tanh()

    expected = torch.autograd.grad(f(x).sum(), (x, w, b))
    assert_equal(torch.autograd.grad(checkpoint(f, x, use_reentrant=False).sum(), (x, w, b)), expected)
    with torch.autograd.graph.save_on_cpu():
        output = f(x)
    assert_equal(torch.autograd.grad(output.sum(), (x, w, b)), expected)


# ---------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(8, 32, (56, 56), (3, 3), padding=(1, 1)),
        Case(8, 24, (28, 30), (7, 5), (2, 1), (3, 2), multiplier=2),
    ],
    ids=str,
)
def test_same_bits_every_time(device: str, case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    if device == "cpu":
        case = case._replace(batch=2, channels=3, size=(case.size[0] // 4, case.size[1] // 4))
    tensors = make_inputs(case, dtype, device, memory_format)
    grad_output = draw_like(dwconv.conv2d(*tensors, **case.geometry))
    first = run_dwconv(tensors, grad_output, **case.geometry)
    for _ in range(19):
        for again, result in zip(run_dwconv(tensors, grad_output, **case.geometry), first):
            assert torch.equal(again, result)


# ---------------------------------------------------------------------------- autocast

AUTOCAST = [
    pytest.param("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_autocast(device: str, low: torch.dtype, memory_format: torch.memory_format) -> None:
    """Computes in the 16-bit type and gives each tensor a gradient of its own dtype, as F.conv2d does."""
    for input_dtype, weight_dtype in product([torch.float32, low], repeat=2):
        x, w, b = make_inputs(SMALL, torch.float32, device, memory_format)
        tensors = x.to(input_dtype), w.to(weight_dtype), b

        def under_autocast(conv2d: Callable) -> Callable:
            def call(*tensors: Tensor, **geometry) -> Tensor:
                with torch.autocast(device, low):
                    return conv2d(*tensors, **geometry)

            return call

        ours = run(under_autocast(dwconv.conv2d), tensors, torch.randn, **SMALL.geometry)
        assert ours.output.dtype == low
        assert [grad.dtype for grad in ours[1:]] == [tensor.dtype for tensor in tensors]

        grad_output = draw_like(ours.output)
        ours = run(under_autocast(dwconv.conv2d), tensors, grad_output, **SMALL.geometry)
        theirs = run(under_autocast(torch_conv2d), tensors, grad_output, **SMALL.geometry)
        assert [result.dtype for result in ours] == [result.dtype for result in theirs]

        # The numbers are those of 16-bit tensors, gradients included.
        narrow = tuple(tensor.to(low) for tensor in tensors)
        exact = run_float64(narrow, grad_output, **SMALL.geometry)
        magnitude = magnitudes(narrow, grad_output, **SMALL.geometry)
        results = ours._make(result.to(low) for result in ours)
        assert_accurate(results, exact, magnitude)
        assert_accurate(results, theirs, magnitude, slack=4)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_autocast_of_weights(
    device: str, low: torch.dtype, memory_format: torch.memory_format, weight_dtype: torch.dtype
) -> None:
    """Where the operator casts the weights, it is as if they had been cast before, to the last bit and stride."""
    x, w, b = make_inputs(SMALL, torch.float32, device)
    x, w, b = x.to(low), w.to(weight_dtype).contiguous(memory_format=memory_format), b.to(weight_dtype)
    for weight in (w, w.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)):
        before = dwconv.conv2d(x, weight.to(low), b.to(low), **SMALL.geometry)
        with torch.autocast(device, low):
            under = dwconv.conv2d(x, weight, b, **SMALL.geometry)
        assert torch.equal(under, before) and under.dtype == low
        assert under.stride() == before.stride()


# Of few sums and of many: those of a gradient are added up in one step or in two.
CAST_GRADIENTS = [
    SMALL,
    Case(2, 16, (7, 7), (3, 3), padding=(1, 1), bias=False),
    Case(16, 32, (14, 14), (3, 3), padding=(1, 1)),
    Case(8, 24, (28, 28), (5, 5), (2, 2), padding=(2, 2), bias=False),
    Case(4, 8, (30, 31), (7, 7), padding=(3, 3)),
    Case(2, 8, (28, 28), (13, 13), padding=(6, 6), bias=False),
    Case(16, 8, (9, 10), (41, 31), padding=(20, 15)),  # half of the taps meet no image
    Case(2, 8, (20, 21), (5, 3), (3, 3), padding=(2, 0)),
    Case(16, 4, (90, 90), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("case", CAST_GRADIENTS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_autocast_of_gradients(device: str, low: torch.dtype, memory_format: torch.memory_format, case: Case) -> None:
    """Gradients of cast weights are those of weights that were cast before, to the last bit, in float32."""
    x, w, b = make_inputs(case, torch.float32, device, memory_format)
    tensors = [tensor.requires_grad_() for tensor in (x.to(low), w, b) if tensor is not None]
    with torch.autocast(device, low):
        output = dwconv.conv2d(*tensors, **case.geometry)
        grad_output = draw_like(output)
        again = dwconv.conv2d(tensors[0], *(tensor.to(low) for tensor in tensors[1:]), **case.geometry)
    under = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    twice = torch.autograd.grad(output, tensors, grad_output)
    before = torch.autograd.grad(again, tensors, grad_output)
    for tensor, *grads in zip(tensors, under, twice, before):
        assert all(grad.dtype == tensor.dtype and torch.equal(grad, grads[-1]) for grad in grads)


@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_autocast_leaves_float64_alone(device: str, low: torch.dtype) -> None:
    x, w, b = make_inputs(SMALL, torch.float64, device)
    with torch.autocast(device, low):
        assert torch_conv2d(x, w, b).dtype == torch.float64
        torch.testing.assert_close(dwconv.conv2d(x, w, b), torch_conv2d(x, w, b))
        with torch.autocast(device, enabled=False):
            assert dwconv.conv2d(x.float(), w.float(), b.float()).dtype == torch.float32
        for conv2d in (dwconv.conv2d, torch_conv2d):
            with pytest.raises(RuntimeError):
                conv2d(x, w.float(), b)


@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_second_order_under_autocast(device: str, low: torch.dtype) -> None:
    x, w, b = leaves(SMALL, device, dtype=torch.float32)
    with torch.autocast(device, low):
        output = dwconv.conv2d(x, w, b, **SMALL.geometry)
        [grad] = torch.autograd.grad(output.float().pow(2).sum(), x, create_graph=True)
    grad.pow(2).sum().backward()
    assert grad.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    assert x.grad.any() and w.grad.any() and b.grad.any()


@pytest.mark.parametrize(("device", "low"), AUTOCAST, ids=str)
def test_grad_scaler(device: str, low: torch.dtype) -> None:
    """Steps of automatic mixed precision are those of nn.Conv2d; one that overflows is left out."""
    layers = [
        dwconv.DepthwiseConv2d(6, 3, padding=1, bias=True, device=device),
        torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, device=device),
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = draw_like(torch.empty(4, 6, 9, 8, device=device))
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in layers]
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in layers]
    for factor, steps in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = [parameter.clone() for parameter in layers[0].parameters()]
        for layer, optimizer, scaler in zip(layers, optimizers, scalers):
            optimizer.zero_grad()
            with torch.autocast(device, low):
                loss = layer(x).float().square().mean() * factor
            scaler.scale(loss).backward()
            assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for old, ours, theirs in zip(before, *(layer.parameters() for layer in layers)):
            assert torch.equal(old, ours) is not steps
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    assert scalers[0].get_scale() == 512
