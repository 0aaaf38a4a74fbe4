"""torch.func and forward-mode AD: every transform gives what it gives of F.conv2d, alone, nested, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from common import FORMATS, Case, make_inputs, torch_conv2d
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import dwconv

CASES = [
    Case(2, 3, (6, 5), (3, 2), (1, 2), (1, 0), (2, 1), multiplier=2),
    Case(1, 4, (5, 6), (3, 3), padding=(1, 1), bias=False),
    Case(3, 2, (4, 5), (2, 3), (2, 1), (0, 2)),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)

Function = Callable[..., Tensor]


def draw(case: Case, device: str, memory_format=torch.contiguous_format) -> tuple[Tensor, ...]:
    return tuple(t for t in make_inputs(case, torch.float64, device, memory_format) if t is not None)


def loss_of(conv2d: Function, case: Case) -> Function:
    """A scalar that is linear in nothing, so that derivatives of any order count."""
    return lambda *tensors: conv2d(*tensors, **case.geometry).sin().sum()


def all_of(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def directions(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in tensors)


def grads(conv2d: Function, case: Case, tensors: tuple) -> Any:
    return grad_and_value(loss_of(conv2d, case), all_of(tensors))(*tensors)


def vector_jacobian(conv2d: Function, case: Case, tensors: tuple) -> Any:
    output, pull = vjp(lambda *t: conv2d(*t, **case.geometry), *tensors)
    return output, pull(output.cos())


def jacobian_vector(conv2d: Function, case: Case, tensors: tuple) -> Any:
    return jvp(lambda *t: conv2d(*t, **case.geometry), tensors, directions(tensors))


def jacobian_vector_in_each(conv2d: Function, case: Case, tensors: tuple) -> Any:
    """One tensor moves at a time: the others have no tangent."""
    tangents = []
    for i, direction in enumerate(directions(tensors)):

        def f(tensor: Tensor, i: int = i) -> Tensor:
            return conv2d(*tensors[:i], tensor, *tensors[i + 1 :], **case.geometry)

        tangents.append(jvp(f, (tensors[i],), (direction,))[1])
    return tangents


def hessian_vector(conv2d: Function, case: Case, tensors: tuple) -> Any:
    """Forward over reverse."""
    return jvp(grad(loss_of(conv2d, case), all_of(tensors)), tensors, directions(tensors))


def hessian_vector_in_input(conv2d: Function, case: Case, tensors: tuple) -> Any:
    loss = loss_of(conv2d, case)
    return jvp(grad(lambda x: loss(x, *tensors[1:])), tensors[:1], directions(tensors[:1]))


def hessian_vector_in_reverse(conv2d: Function, case: Case, tensors: tuple) -> Any:
    """Reverse over reverse."""
    _, pull = vjp(grad(loss_of(conv2d, case), all_of(tensors)), *tensors)
    return pull(directions(tensors))


def grad_of_tangent(conv2d: Function, case: Case, tensors: tuple) -> Any:
    """Reverse over forward."""

    def f(*t: Tensor) -> Tensor:
        return jvp(loss_of(conv2d, case), t, directions(tensors))[1]

    return grad(f, all_of(tensors))(*tensors)


def third_order(conv2d: Function, case: Case, tensors: tuple) -> Any:
    def f(*t: Tensor) -> Tensor:
        return sum(g.square().sum() for g in grad(loss_of(conv2d, case), all_of(tensors))(*t))

    return jvp(grad(f, all_of(tensors)), tensors, directions(tensors))


def without_grad_inside(conv2d: Function, case: Case, tensors: tuple) -> Any:
    """torch.no_grad concerns the innermost transform alone."""

    def f(*t: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = conv2d(*t, **case.geometry)
        return (frozen * conv2d(*t, **case.geometry)).sum()

    return grad(lambda *t: sum(g.sum() for g in grad(f, all_of(tensors))(*t)), all_of(tensors))(*tensors)


TRANSFORMS = [
    grads,
    vector_jacobian,
    jacobian_vector,
    jacobian_vector_in_each,
    hessian_vector,
    hessian_vector_in_input,
    hessian_vector_in_reverse,
    grad_of_tangent,
    third_order,
    without_grad_inside,
]
transforms = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)


@cases
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@transforms
def test_transforms(device: str, transform: Function, memory_format: torch.memory_format, case: Case) -> None:
    tensors = draw(case, device, memory_format)
    torch.testing.assert_close(transform(dwconv.conv2d, case, tensors), transform(torch_conv2d, case, tensors))


@transforms
def test_transforms_compiled(device: str, transform: Function) -> None:
    """In one graph; PyTorch issue 193279 tells of operators whose gradients were silently wrong here."""
    case = CASES[0]
    tensors = draw(case, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: transform(dwconv.conv2d, case, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), transform(torch_conv2d, case, tensors))


def test_jacobians(device: str) -> None:
    case = Case(1, 2, (3, 4), (2, 2), (1, 2), (1, 1))
    tensors = draw(case, device)
    for jacobian in (jacrev, jacfwd, hessian):
        results = []
        for conv2d in (dwconv.conv2d, torch_conv2d):
            f = loss_of(conv2d, case) if jacobian is hessian else lambda *t: conv2d(*t, **case.geometry)
            results.append(jacobian(f, all_of(tensors))(*tensors))
        torch.testing.assert_close(*results)


def test_linearize(device: str) -> None:
    tensors = draw(CASES[0], device)
    results = []
    for conv2d in (dwconv.conv2d, torch_conv2d):
        output, push = linearize(lambda *t: conv2d(*t, **CASES[0].geometry), *tensors)
        results.append((output, push(*directions(tensors))))
    torch.testing.assert_close(*results)


# vmap


@cases
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 3, None), (None, None, 1), (-1, 2, None)])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_vmap(device: str, memory_format: torch.memory_format, in_dims: tuple, case: Case) -> None:
    """Of the output and all gradients, whichever tensors have the dimension, wherever it is."""
    tensors = draw(case, device, memory_format)
    in_dims = in_dims[: len(tensors)]
    if not any(dim is not None for dim in in_dims):
        return
    factors = torch.linspace(0.5, 2, 3).tolist()
    tensors = tuple(
        t if dim is None else torch.stack([factor * t for factor in factors], dim) for t, dim in zip(tensors, in_dims)
    )
    for transform in (lambda *t: dwconv.conv2d(*t, **case.geometry), lambda *t: grads(dwconv.conv2d, case, t)):
        got = vmap(transform, in_dims)(*tensors)
        each = [
            transform(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims)))
            for i in range(len(factors))
        ]
        torch.testing.assert_close(got, torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *each))


def test_vmap_has_rules_of_its_own(device: str, recwarn: pytest.WarningsRecorder) -> None:
    """No loop over the samples, of which PyTorch would warn."""
    x, w, b = draw(Case(5, 3, (6, 5), (3, 3)), device)
    calls = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal calls
            calls += function.namespace == "dwconv"
            return function(*args, **(kwargs or {}))

    with Count():
        vmap(grad(lambda x, w, b: dwconv.conv2d(x, w, b).sin().sum(), (0, 1, 2)), (0, None, None))(x, w, b)
    assert calls == 3 and not recwarn.list


def test_nested_vmap(device: str) -> None:
    x, w, b = draw(Case(6, 2, (5, 6), (3, 2), multiplier=2), device)
    x, w = x.unflatten(0, (2, 3)), torch.stack([w, -w, 2 * w])
    got = vmap(vmap(dwconv.conv2d, (0, None, None)), (1, 0, None))(x, w, b)
    expected = torch.stack([torch.stack([torch_conv2d(x[j, i], w[i], b) for j in range(2)]) for i in range(3)])
    torch.testing.assert_close(got, expected)


def test_vmap_of_empty_batch_and_single_images(device: str) -> None:
    x, w, b = draw(Case(4, 2, (5, 6), (3, 2)), device)
    torch.testing.assert_close(vmap(dwconv.conv2d, (0, None, None))(x, w, b), torch_conv2d(x, w, b))
    empty = vmap(dwconv.conv2d, (0, None, None))(x.new_empty(3, 0, 2, 5, 6), w, b)
    assert empty.shape == (3, 0, 2, 3, 5)


def test_batched_gradients_of_autograd(device: str) -> None:
    """is_grads_batched is vmap over the backward."""
    results = []
    tensors = [t.requires_grad_() for t in draw(CASES[0], device)]
    for conv2d in (dwconv.conv2d, torch_conv2d):
        output = conv2d(*tensors, **CASES[0].geometry)
        vectors = torch.stack([output.detach(), output.detach().cos()])
        results.append(torch.autograd.grad(output, tensors, vectors, is_grads_batched=True))
    torch.testing.assert_close(*results)


# Modules


def network(depthwise: type) -> nn.Sequential:
    torch.manual_seed(1)
    arguments = {"padding": 1, "bias": True}
    first = depthwise(3, 3, **arguments) if depthwise is dwconv.DepthwiseConv2d else None
    first = first or depthwise(3, 3, 3, groups=3, **arguments)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 30, 2)).double()


def test_per_sample_gradients(device: str) -> None:
    """As differential privacy takes them; their mean is the gradient of the batch."""
    x, y = torch.randn(4, 3, 6, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x, y = x.to(device), y.to(device)
    results = []
    for depthwise in (dwconv.DepthwiseConv2d, nn.Conv2d):
        model = network(depthwise).to(device)
        parameters = dict(model.named_parameters())

        def loss(parameters: dict, x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            return (functional_call(model, parameters, (x,)) - y).square().mean()

        per_sample = vmap(grad(loss), (None, 0, 0))(parameters, x[:, None], y[:, None])
        results.append(per_sample)
        (model(x) - y).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(per_sample[name].mean(0), parameter.grad)
    torch.testing.assert_close(*results)


def test_ensemble(device: str) -> None:
    """Models of one structure, run as one: vmap over the parameters."""
    models = [network(dwconv.DepthwiseConv2d).to(device).requires_grad_(False) for _ in range(3)]
    for i, model in enumerate(models):
        model[0].weight.mul_(i + 1)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, device=device)
    parameters, buffers = torch.func.stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([model(x) for model in models]))


# Forward mode without torch.func


@cases
def test_dual_numbers(device: str, case: Case) -> None:
    """The function and each operator, by whatever way they are reached, with and without a graph."""
    tensors = draw(case, device)
    for requires_grad in (False, True):
        results = []
        for conv2d in (dwconv.conv2d, torch_conv2d):
            leaves = [t.clone().requires_grad_(requires_grad) for t in tensors]
            with fwAD.dual_level():
                duals = [fwAD.make_dual(t, d) for t, d in zip(leaves, directions(tensors))]
                dual = conv2d(*duals, **case.geometry)
                output, tangent = fwAD.unpack_dual(dual)
                results.append((output, tangent))
                if requires_grad:
                    results[-1] += torch.autograd.grad(tangent.sin().sum(), leaves[:2], retain_graph=True)
                    grads = torch.autograd.grad(dual.sin().sum(), leaves)  # have tangents too
                    results[-1] += tuple(fwAD.unpack_dual(grad).tangent for grad in grads)
        torch.testing.assert_close(*results)


@cases
def test_forward_gradcheck(device: str, case: Case) -> None:
    tensors = tuple(t.requires_grad_() for t in draw(case, device))

    def f(*t: Tensor) -> Tensor:
        return dwconv.conv2d(*t, **case.geometry)

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True, **checks)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True, check_fwd_over_rev=True)


def test_dead_wrappers(device: str) -> None:
    """What vjp returns may be called after it has ended, also where its result is differentiated further."""
    case = CASES[0]
    tensors = draw(case, device)
    results = []
    for conv2d in (dwconv.conv2d, torch_conv2d):
        output, pull = vjp(lambda *t: conv2d(*t, **case.geometry), *tensors)
        cotangent = output.cos().requires_grad_()
        pulled = pull(cotangent)
        results.append((pulled, torch.autograd.grad(sum(p.sin().sum() for p in pulled), cotangent)))
    torch.testing.assert_close(*results)
