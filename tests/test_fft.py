"""Fourier transforms: only where they are asked for, in all passes then, with errors of the size that is documented."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from common import Case, make_inputs, run, run_float64
from exact import draw, lay, output_size
from plans import claims, meta, plans_of, results_of_plans
from torch import Tensor, nn
from torch._dynamo.variables import misc as dynamo_variables
from torch.utils._python_dispatch import TorchDispatchMode

import dwconv

PLANS = {"forward": "fft", "grad_input": "fft", "grad_weight": "fft_grad_weight"}
CASE = Case(2, 3, (28, 28), (29, 29), padding=(14, 14))
ERROR = 1e-6  # of the largest number of a plane; documented are 4e-7

# Each length of transforms, whole planes and tiles of planes, rectangles, odd sides, images smaller than the kernel.
CASES = [
    CASE,
    Case(3, 2, (28, 28), (21, 21), padding=(10, 10)),
    Case(4, 3, (28, 28), (13, 13), padding=(6, 6)),
    Case(7, 2, (56, 56), (31, 31), padding=(15, 15)),
    Case(2, 2, (33, 31), (30, 31), padding=(15, 16)),
    Case(1, 3, (56, 56), (63, 63), padding=(31, 31)),
    Case(5, 1, (24, 23), (17, 19), padding=(8, 9)),
    Case(2, 2, (27, 28), (30, 20), padding=(20, 10)),
    Case(2, 3, (45, 31), (21, 39), padding=(20, 38)),
    Case(4, 1, (28, 30), (51, 47), padding=(25, 23), multiplier=3),
    Case(2, 2, (64, 60), (33, 29), padding=(16, 14), multiplier=2),
    Case(2, 1, (112, 112), (31, 31), padding=(15, 15)),
    Case(3, 1, (70, 131), (41, 23), padding=(0, 3)),
    Case(1, 2, (97, 96), (63, 62), padding=(31, 61)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_claims(name: str, case: Case) -> None:
    serves = name != "grad_input" or case.multiplier == 1
    assert (plans_of(name, case, allow_fft=True)[0] == PLANS[name]) == serves
    input, output = meta((case.batch, case.channels, *case.size)), meta(output_size(case))
    assert PLANS[name] not in claims(name, case, input, output), "not asked for"


@pytest.mark.parametrize("name", PLANS)
def test_does_not_claim(name: str) -> None:
    for change in (
        {"stride": (1, 2)},
        {"dilation": (2, 1), "padding": (28, 14)},
        {"padding": (29, 14)},
        {"kernel": (7, 7), "padding": (3, 3)},
        {"kernel": (51, 5), "padding": (25, 2)},
        {"size": (8, 8)},
        {"size": (14, 14), "kernel": (27, 27), "padding": (13, 13)},
        {"kernel": (97, 97), "padding": (48, 48), "size": (224, 224)},
        {"batch": 0},
        {"batch": 2**30},
    ):
        assert PLANS[name] not in plans_of(name, CASE._replace(**change), allow_fft=True), change
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert PLANS[name] not in plans_of(name, CASE, dtype, allow_fft=True)
    assert PLANS[name] not in plans_of(name, CASE, memory_format=torch.channels_last, allow_fft=True)
    plain = meta((2, 3, 28, 28))
    for odd, serves in (
        (lay(plain, offset=3), True),
        (lay(plain, (1, 0, 2, 3), (1, 1, 3, 1), 1), True),
        (lay(plain, expanded=(0,)), True),
        (lay(plain, steps=(1, 1, 1, 2)), False),
        (plain.mT, False),
    ):
        assert (PLANS[name] in claims(name, CASE, odd, plain, allow_fft=True)) == serves, odd.stride()
        assert (PLANS[name] in claims(name, CASE, plain, odd, allow_fft=True)) == serves, odd.stride()


# ---------------------------------------------------------------------------- asking for them


class Recorder(TorchDispatchMode):
    """The last argument of every operator of ours that is called: whether Fourier transforms are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dwconv":
            allowed = len(args) == len(func._schema.arguments) and args[-1]
            self.calls.append((func._schema.name.split("::")[1], allowed))
        return func(*args, **(kwargs or {}))

    @property
    def allowed(self) -> set[bool]:
        return {allowed for _, allowed in self.calls}


def tensors_of(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    input, weight, _ = make_inputs(Case(1, 2, (6, 6), (5, 5)), dtype, "cpu")
    return input.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)


def is_allowed(**asked: bool | None) -> bool:
    """What reaches the operator."""
    with Recorder() as recorder:
        dwconv.conv2d(*tensors_of(), **asked)
    return recorder.calls[0][1]


def test_by_name_only() -> None:
    assert not is_allowed() and not is_allowed(allow_fft=None) and not is_allowed(allow_fft=False)
    assert is_allowed(allow_fft=True)
    with dwconv.allow_fft():
        assert is_allowed() and is_allowed(allow_fft=None) and not is_allowed(allow_fft=False)
        with dwconv.allow_fft(False):
            assert not is_allowed() and is_allowed(allow_fft=True)
        assert is_allowed()
    assert not is_allowed()


def test_ends_with_an_exception_and_serves_twice() -> None:
    block = dwconv.allow_fft()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), block:
            with block:
                assert is_allowed()
            assert is_allowed()
            raise ZeroDivisionError
        assert not is_allowed()


def test_of_a_thread() -> None:
    found = []
    with dwconv.allow_fft():
        thread = threading.Thread(target=lambda: found.append(is_allowed()))
        thread.start()
        thread.join()
    assert found == [False]


def test_of_a_task() -> None:
    async def with_block() -> bool:
        with dwconv.allow_fft():
            await asyncio.sleep(0)
            return is_allowed()

    async def both() -> list[bool]:
        async def without() -> bool:
            await asyncio.sleep(0)
            return is_allowed()

        return await asyncio.gather(with_block(), without(), with_block())

    assert asyncio.run(both()) == [True, False, True]


@pytest.mark.parametrize("wrong", [1, "yes", torch.tensor(True)], ids=str)
def test_errors(wrong: object) -> None:
    with pytest.raises(TypeError, match="'allow_fft' must be bool or None, not "):
        dwconv.conv2d(*tensors_of(), allow_fft=wrong)
    with pytest.raises(TypeError, match="'allow_fft' must be bool or None, not "):
        dwconv.explain(*tensors_of(), allow_fft=wrong)
    layer = dwconv.DepthwiseConv2d(2, 3)
    layer.allow_fft = wrong
    with pytest.raises(TypeError, match="'allow_fft' must be bool or None, not "):
        layer(tensors_of()[0])
    with pytest.raises(TypeError, match="'allowed' must be bool, not "):
        dwconv.allow_fft(wrong)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_are_computed_as_asked(needs: tuple[bool, bool]) -> None:
    """Of any order, and also after the block."""
    input, weight = (tensor.requires_grad_(need) for tensor, need in zip(tensors_of(), needs))
    wanted = [tensor for tensor in (input, weight) if tensor.requires_grad]
    with Recorder() as recorder:
        with dwconv.allow_fft():
            output = dwconv.conv2d(input, weight)
        first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)
    assert recorder.allowed == {True} and len(recorder.calls) >= 3
    with Recorder() as recorder:
        output = dwconv.conv2d(input, weight)
        with dwconv.allow_fft():
            torch.autograd.grad(output.sum(), wanted)
    assert recorder.allowed == {False}


def test_torch_func() -> None:
    input, weight = tensors_of()
    with Recorder() as recorder:
        with dwconv.allow_fft():
            torch.func.jvp(dwconv.conv2d, (input, weight), (input, weight))
            torch.func.vmap(dwconv.conv2d)(
                input[None].expand(3, -1, -1, -1, -1), weight[None].expand(3, -1, -1, -1, -1)
            )
            torch.func.grad(lambda x: dwconv.conv2d(x, weight).sum())(input)
    assert recorder.allowed == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_elsewhere_direct_serves(dtype: torch.dtype) -> None:
    """CPU tensors, and other dtypes, have the same bits either way."""
    case = Case(2, 3, (12, 11), (9, 9), padding=(4, 4))
    tensors, grad_output = make_inputs(case, dtype, "cpu"), torch.randn(output_size(case)).to(dtype)
    plain = run(dwconv.conv2d, tensors, grad_output, **case.geometry)
    asked = run(dwconv.conv2d, tensors, grad_output, **case.geometry, allow_fft=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, asked))


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert dwconv.conv2d(*tensors_of(), allow_fft=True).dtype == torch.bfloat16
        assert is_allowed(allow_fft=True)


def test_compile() -> None:
    """What was compiled within a block does not serve without, nor the other way round."""
    compiled_for: list[bool] = []
    ran: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        calls = [node.args[6:] for node in graph.graph.nodes if "dwconv" in str(node.target)]
        if not calls:
            return graph
        compiled_for.append(calls == [(True,)])
        allowed = compiled_for[-1]

        def run_graph(*args: object) -> object:
            ran.append(allowed)
            return graph(*args)

        return run_graph

    tensors = tensors_of(requires_grad=True)
    asked = torch.compile(lambda x, w: dwconv.conv2d(x, w, allow_fft=True), backend=backend, fullgraph=True)
    output = asked(*tensors)
    assert ran == [True] and torch.equal(output, dwconv.conv2d(*tensors))
    compiled_for.clear(), ran.clear()

    in_one_graph = hasattr(dynamo_variables, "ContextVarVariable")  # not with torch 2.11
    compiled = torch.compile(dwconv.conv2d, backend=backend, fullgraph=in_one_graph)
    for _ in range(2):
        compiled(*tensors)
        with dwconv.allow_fft():
            compiled(*tensors)
    assert ran == [False, True, False, True]
    assert compiled_for == [False, True] or not in_one_graph


def test_export() -> None:
    class Model(nn.Module):
        def forward(self, input: Tensor, weight: Tensor) -> Tensor:
            return dwconv.conv2d(input, weight, allow_fft=True)

    program = torch.export.export(Model(), tensors_of())
    assert [n.args[6:] for n in program.graph.nodes if "dwconv" in str(n.target)] == [(True,)]


def test_operators() -> None:
    input, weight = tensors_of(requires_grad=True)
    torch.library.opcheck(dwconv._ops.forward, (input, weight, None, (1, 1), (0, 0), (1, 1), True))


def test_explain() -> None:
    input, weight = meta((8, 32, 28, 28)), meta((32, 1, 29, 29))
    direct = dwconv.explain(input, weight, padding=14)
    asked = dwconv.explain(input, weight, padding=14, allow_fft=True)
    assert direct.forward.plan == "large_float32" and direct == dwconv.explain(
        input, weight, padding=14, allow_fft=False
    )
    assert {name: getattr(asked, name).plan for name in PLANS} == PLANS
    with dwconv.allow_fft():
        assert dwconv.explain(input, weight, padding=14) == asked
        assert dwconv.explain(input, weight, padding=14, allow_fft=False) == direct


def test_explain_on_the_command_line(capsys: pytest.CaptureFixture) -> None:
    from dwconv.__main__ import main

    for option, plan in (([], "large_float32"), (["--allow-fft"], "fft")):
        assert main(["explain", "8", "32", "28", "28", "29", "--padding", "14", *option]) == 0
        assert f"\nforward      {plan} " in capsys.readouterr().out


def test_layer() -> None:
    def is_allowed(layer: nn.Module) -> bool:
        with Recorder() as recorder:
            layer(torch.randn(1, 4, 6, 6))
        return recorder.calls[0][1]

    plain, asked = dwconv.DepthwiseConv2d(4, 5), dwconv.DepthwiseConv2d(4, 5)
    asked.allow_fft = True
    assert not is_allowed(plain) and is_allowed(asked) and is_allowed(copy.deepcopy(asked))
    assert asked.state_dict().keys() == plain.state_dict().keys()
    with dwconv.allow_fft():
        assert is_allowed(plain)
        plain.allow_fft = False
        assert not is_allowed(plain)
    reflecting = dwconv.DepthwiseConv2d(4, 5, padding=2, padding_mode="reflect")
    reflecting.allow_fft = True
    assert is_allowed(reflecting)
    converted = dwconv.convert(nn.Conv2d(4, 4, 5, groups=4))
    assert not is_allowed(converted)
    converted.allow_fft = True
    assert is_allowed(converted)
    assert type(dwconv.revert(converted)) is nn.Conv2d and converted(torch.randn(1, 4, 6, 6)).shape == (1, 4, 2, 2)


# ---------------------------------------------------------------------------- on the GPU


def transformed(case: Case, tensors: tuple, grad_output: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the plans compute; each of them, unless it does not serve."""
    found = set()
    for name, plan, result in results_of_plans(case, tensors, grad_output, allow_fft=True):
        if plan in PLANS.values():
            found.add((name, plan))
            yield name, result
    assert {("output", "fft"), ("grad_weight", "fft_grad_weight")} <= found, str(case)
    assert (("grad_input", "fft") in found) == (case.multiplier == 1), str(case)


def error(name: str, result: Tensor, exact: Tensor, tensors: tuple, grad_output: Tensor) -> float:
    """Relative to the largest number of a plane; a bias's gradient is a plain sum."""
    difference = (result.double() - exact).abs()
    if name == "grad_bias":
        return float((difference / grad_output.abs().sum((0, 2, 3))).max())
    return float((difference.amax((2, 3)) / exact.abs().amax((2, 3))).max())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Case) -> None:
    for turn in range(4):
        changed = case._replace(bias=turn % 2 == 0, batch=[case.batch, 1, 13, 6][turn])
        input, weight, bias = make_inputs(changed, torch.float32, "cuda")
        grad_output = torch.randn(output_size(changed), device="cuda")
        if turn > 0:  # images that lie in memory in other ways
            order, steps = (
                [(0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3)][turn - 1],
                [(1, 1, 2, 1), (2, 1, 1, 1), (1, 1, 1, 1)],
            )
            input = lay(input, order, steps[turn - 1], offset=turn)
            grad_output = lay(grad_output, order, steps[turn - 1], offset=1)
            weight = lay(weight, (2, 3, 0, 1))
        exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
        for name, result in transformed(changed, (input, weight, bias), grad_output):
            off = error(name, result, exact[name], (input, weight, bias), grad_output)
            assert off < ERROR, (name, str(changed), off)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [Case(256, 8, (56, 56), (31, 31), padding=(15, 15)), Case(32, 300, (28, 28), (29, 29), padding=(14, 14))],
    ids=str,
)
def test_accuracy_on_whole_layers(case: Case) -> None:
    """More images and channels than a GPU takes at once, whose numbers are all positive: long sums."""
    input, weight, bias = make_inputs(case, torch.float32, "cuda", make=torch.rand)
    grad_output = torch.rand(output_size(case), device="cuda")
    exact = run_float64((input, weight, bias), grad_output, **case.geometry)._asdict()
    for name, result in transformed(case, (input, weight, bias), grad_output):
        assert error(name, result, exact[name], (input, weight, bias), grad_output) < ERROR, name


@pytest.mark.gpu
def test_serves_where_asked() -> None:
    """conv2d and its gradients are those of the plans, and without the permission those of other plans."""
    case = CASE._replace(batch=5)
    input, weight, bias = make_inputs(case, torch.float32, "cuda")
    grad_output = torch.randn(output_size(case), device="cuda")
    expected = dict(transformed(case, (input, weight, bias), grad_output))
    for asked in (True, False):
        with dwconv.allow_fft(asked):
            results = run(dwconv.conv2d, (input, weight, bias), grad_output, **case.geometry)._asdict()
        for name in ("output", "grad_input", "grad_weight"):
            assert torch.equal(results[name], expected[name]) == asked, name


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [CASE, Case(3, 2, (112, 100), (31, 31), padding=(15, 15))], ids=str)
def test_other_images_do_not_see_infinities(case: Case, value: float) -> None:
    """They spoil what they are part of, at most all of their plane, and no other plane: its bits stay the same."""
    tensors, grad_output = draw(case, torch.float32, "cuda", torch.contiguous_format)
    clean = dict(transformed(case, tensors, grad_output))
    for which in ("input", "weight", "grad_output"):
        dirty = [tensor.clone() if isinstance(tensor, Tensor) else None for tensor in (*tensors, grad_output)]
        spoilt = dirty[{"input": 0, "weight": 1, "grad_output": 3}[which]]
        spoilt[-1, -1, spoilt.shape[2] // 2, spoilt.shape[3] // 2] = value
        exact = run_float64(tuple(dirty[:3]), dirty[3], **case.geometry)._asdict()
        for name, result in transformed(case, tuple(dirty[:3]), dirty[3]):
            before, finite = clean[name], exact[name].isfinite()
            assert not (result.isfinite() & ~finite).any(), (name, which)
            planes = finite.all(-1).all(-1) if result.dim() == 4 else finite
            assert torch.equal(result[planes], before[planes]), (name, which)


@pytest.mark.gpu
def test_repeats_bit_for_bit() -> None:
    case = Case(9, 40, (56, 56), (31, 31), padding=(15, 15))
    tensors, grad_output = make_inputs(case, torch.float32, "cuda"), torch.randn(output_size(case), device="cuda")
    first = dict(transformed(case, tensors, grad_output))
    for _ in range(20):
        assert all(torch.equal(result, first[name]) for name, result in transformed(case, tensors, grad_output))


@pytest.mark.gpu
def test_beside_other_streams_and_in_graphs() -> None:
    tensors, grad_output = make_inputs(CASE, torch.float32, "cuda"), torch.randn(output_size(CASE), device="cuda")
    expected = run(dwconv.conv2d, tensors, grad_output, **CASE.geometry, allow_fft=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(dwconv.conv2d, tensors, grad_output, **CASE.geometry, allow_fft=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(dwconv.conv2d, tensors, grad_output, **CASE.geometry, allow_fft=True)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
