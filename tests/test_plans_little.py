"""Plans for problems with little to do: `scale` of one tap, `direct` of small kernels, `gather` of any. First what they
claim, then each forced.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import product

import pytest
import torch
from common import FORMATS, Case
from exact import lay, output_size
from plans import (
    ALL,
    DIRECT,
    FAST,
    GATHER,
    LAST,
    PASSES,
    TAPS_FIRST,
    TILES,
    Problem,
    claims,
    goes_direct,
    meta,
    plan_of,
    plans_of,
    serves,
    tile_case,
)
from torch import Tensor

# ---------------------------------------------------------------------------- claims


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_one_tap(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Arrays without gaps that lie alike, as many outputs as inputs; or gradients that lie anywhere, at a stride."""
    case, size = Case(16, 64, (56, 57), (1, 1), dilation=(2, 3)), (16, 64, 56, 57)
    plain = meta(size, dtype, memory_format)

    def scales(case: Case, input: Tensor = plain, output: Tensor | None = None) -> bool:
        output = meta(output_size(case), dtype, memory_format) if output is None else output
        return "scale" in claims(name, case, input, output)

    assert scales(case) == (name != "grad_weight")
    for change in ({"multiplier": 2}, {"padding": (0, 1)}, {"kernel": (1, 2)}):
        assert not scales(case._replace(**change)), change
    other = torch.channels_last if memory_format == torch.contiguous_format else torch.contiguous_format
    for odd in (meta(size, dtype, other), lay(plain, steps=(1, 1, 1, 2)), meta((16, 65, 56, 57), dtype)[:, 1:]):
        assert not scales(case, odd) and not scales(case, plain, odd), odd.stride()
        apart, backward = case._replace(stride=(2, 1)), name == "grad_input"
        assert scales(apart, plain, odd[:, :, ::2]) == backward, odd.stride()
        has_gaps = not any(odd.is_contiguous(memory_format=format) for format in FORMATS)
        assert scales(apart, odd) == (backward and not has_gaps), odd.stride()
    many = Case(2**15, 2**5, (2**5, 2**6), (1, 1))
    assert not scales(many, meta((2**15, 2**5, 2**5, 2**6), dtype, memory_format))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_little_to_do(name: str, tile: tuple, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for batch, channels, size in ((1, 960, (7, 7)), (1, 16, (7, 8)), (2, 3, (5, 6)), (1, 1, (2, 1))):
        case = tile_case(tile, batch, channels, size)
        assert plan_of(name, case, dtype, memory_format) == serves(name, DIRECT[name], case), str(case)
    assert plan_of(name, tile_case(tile, 64, 960, (14, 14)), dtype, memory_format) != DIRECT[name]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_gather_claims(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Any kernel with little to do, unless it is a small one that goes direct in vectors or strips."""
    case = Case(2, 8, (20, 21), (3, 5), padding=(1, 2))
    last = memory_format == torch.channels_last
    for change in (
        {},
        {"stride": (3, 1)},
        {"dilation": (2, 3)},
        {"padding": (4, 3)},
        {"multiplier": 3},
        {"kernel": (1, 17), "padding": (0, 8)},
        {"kernel": (9, 9)},
        {"kernel": (5, 4), "stride": (2, 2), "dilation": (3, 3)},
        {"size": (5, 200)},
    ):
        many_taps = change.get("kernel") == (9, 9)  # too many for float64, and where windows share pixels
        late = many_taps and (dtype == torch.float64 or (last and dtype != torch.float32)) and name != "grad_weight"
        found = plans_of(name, case._replace(**change), dtype, memory_format)[0]
        assert (found == GATHER[name]) != late, change
    few_taps = plans_of(name, case._replace(kernel=(2, 2), stride=(2, 2)), dtype, memory_format)
    windows = {"forward": "windows_channels_last" if last else "windows_nchw"}
    if not last:
        windows["grad_input"] = "windows_nchw"  # gradients that spread
    assert few_taps[:2] == [windows[name], GATHER[name]] if name in windows else few_taps[0] == GATHER[name]
    for change in ({"batch": 4096}, {"batch": 256, "kernel": (9, 9), "padding": (4, 4)}, {"batch": 0}):
        assert GATHER[name] not in plans_of(name, case._replace(**change), dtype, memory_format), change
    wide = case._replace(stride=(9, 1))
    assert (GATHER[name] in plans_of(name, wide, dtype, memory_format)) == (name != "grad_input")
    small = case._replace(kernel=(3, 3), padding=(1, 1))
    vectors = dtype != torch.float64 and last
    for change, direct in (
        ({}, vectors),
        ({"channels": 7}, False),
        ({"size": (20, 20), "channels": 7}, dtype != torch.float64 and not last),
        ({"stride": (2, 2)}, False),
    ):
        direct |= dtype != torch.float64 and name == "grad_weight" and not (last and change == {"stride": (2, 2)})
        expected = (DIRECT if direct else GATHER)[name]
        if change == {"stride": (2, 2)}:
            expected = windows.get(name, expected) if name == "grad_input" else expected
        assert plans_of(name, small._replace(**change), dtype, memory_format)[0] == expected, change


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_few_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Of 3x3, blocks of a cluster share a filter's gradients; of other kernels there are as many as a block sums."""
    one = Case(1, 32, (112, 112), (3, 3), padding=(1, 1))
    for case, expected in (
        (one, True),
        (one._replace(batch=2), False),
        (one._replace(batch=8, channels=64, size=(28, 28)), True),
        (one._replace(kernel=(5, 5), padding=(2, 2)), False),
        (one._replace(stride=(2, 2)), False),
        (one._replace(dilation=(2, 2), padding=(2, 2)), False),
    ):
        assert (plan_of("grad_weight", case, dtype, memory_format) == "direct_grad_weight") == expected, str(case)


# ---------------------------------------------------------------------------- one tap


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_one_tap_is_exact(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Units within a plane and across planes, images and the end of the arrays, at any address."""
    for number, size in enumerate([(1, 1), (1, 7), (3, 5), (7, 7), (16, 16), (31, 57), (64, 65)]):
        for channels in (1, 2, 3, 8, 24, 37, 100) + (8200,) * (size == (1, 7)):
            case = Case(1 + number % 3 * 2, channels, size, (1, 1), bias=channels % 2 == 0)
            problem = Problem(case, dtype, memory_format)
            if channels > 1 and channels != 8:
                problem.lay({"offset": number}, weight={"steps": (1 + number % 2, 1, 1, 1), "offset": 1})
            forced = problem.check()
            assert "scale" in forced["output"] & forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_one_tap_at_a_stride_is_exact(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Gradients with zeros between, in units and not, wherever they lie; a weight that is not finite meets no zero."""
    strides = [(2, 2), (3, 1), (1, 2), (4, 3), (50, 7)]
    planes = product([(1, 1), (1, 7), (3, 5), (8, 8), (31, 57), (64, 65)], (1, 2, 3, 8, 24, 37, 100))
    for number, (size, channels) in enumerate(planes):
        case = Case(1 + number % 3, channels, size, (1, 1), strides[number % 5], bias=False)
        problem = Problem(case, dtype, memory_format)
        problem.spoil((0, 0, 0, 0), of=["weight"], values=[torch.inf if channels > 2 else 2])
        steps = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2)][number % 3]
        for offset in (0, 1):
            weight = {"steps": (1 + offset, 1, 1, 1), "offset": offset}
            problem.lay(grad_output={"steps": steps, "offset": offset}, weight=weight)
            assert problem.check("scale")["grad_input"], problem


# ---------------------------------------------------------------------------- direct


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(1, 41))
def test_direct_on_every_size(width: int) -> None:
    """Every height and width up to 40, with every kernel, far more padding than it needs, and any strides."""
    layouts: list[dict] = [
        {},
        {"offset": 1},
        {"steps": (1, 1, 2, 1)},
        {"steps": (1, 2, 1, 2), "offset": 2},
        {"order": LAST},
        {"order": (1, 3, 2, 0), "steps": (1, 1, 3, 1), "offset": 3},
    ]
    for height in range(1, 41):
        turn = height + width
        dtype = ALL[(height + 2 * width) % 4]
        tile = TILES[(3 * height + width) % len(TILES)]
        padding = (turn % 9, (3 * height + width) % 7)
        case = tile_case(tile, 2, 2, (height, width), padding=padding, multiplier=1 + turn % 3, bias=turn % 2 == 0)
        if not case.has_outputs:
            continue
        problem = Problem(case, dtype)
        layout = layouts[height % len(layouts)]
        problem.lay(layout, layout, TAPS_FIRST)
        forced = problem.check()
        assert goes_direct("forward", case, dtype) == ("direct" in forced["output"]), problem
        assert goes_direct("grad_input", case, dtype) == ("direct" in forced["grad_input"]), problem
        if dtype != torch.float64 and problem.grad_output[:, 0].numel() <= 64:
            assert "direct_grad_weight" in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_direct_in_vectors(side: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Columns or channels in whole vectors and not, any padding, with and without gaps, at addresses of every sort."""
    last = memory_format == torch.channels_last
    planes = product((4, 6, 8, 16, 24, 40), [(7, 7), (5, 8), (8, 12), (14, 14), (9, 16), (13, 24), (16, 40)])
    for number, (channels, size) in enumerate(planes):
        padding = (number % side, side // 2 if number % 4 else number % 3)
        case = Case(1 + number % 3, channels, size, (side, side), padding=padding, bias=number % 8 < 4)
        if not case.has_outputs:
            continue
        problem = Problem(case, dtype, memory_format)
        steps = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2) if last else (1, 2, 1, 1)][number % 4]
        little = max(math.prod(output_size(case)), problem.input.numel()) * side**2 <= 4 << 20
        for offset, weight_offset in ((0, 0), (0, 1), (1, 1), (4, 2), (8, 3), (3, 0)):
            layout = {"steps": steps, "offset": offset}
            problem.lay(layout, layout, {"offset": weight_offset})
            forced = problem.check(*DIRECT.values())
            assert (forced["output"] and forced["grad_input"]) or not little, problem


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_direct_on_large_views(dtype: torch.dtype, tile: tuple) -> None:
    """Views with gaps, and enough of them that a thread computes several rows."""
    columns_apart, channels_apart = {"steps": (1, 1, 1, 2)}, {"order": LAST, "steps": (1, 2, 1, 1)}
    for size, layout in (((131, 160), columns_apart), ((97, 64), channels_apart)):
        case = tile_case(tile, 5, 24, size)
        problem = Problem(case, dtype)
        problem.lay(layout | {"offset": 1}, layout)
        forced = problem.check()
        assert goes_direct("forward", case, dtype) == ("direct" in forced["output"]), problem
        assert goes_direct("grad_input", case, dtype) == ("direct" in forced["grad_input"]), problem


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_direct_beside_infinities(tile: tuple, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    for channels, size in ((8, (9, 16)), (16, (7, 7)), (40, (12, 24)), (3, (8, 8)), (24, (6, 5))):
        problem = Problem(tile_case(tile, 2, channels, size), dtype, memory_format)
        problem.spoil((0, 1, 2, 2), (1, 0, -1, -1), (1, 2, 0, 0))
        problem.spoil((0, 0, 0, 0), (-1, 0, -1, -1), of=["weight"])
        for offset in (0, 1):
            problem.lay({"offset": offset}, {"offset": offset})
            problem.check(*DIRECT.values())


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_direct_grad_weight_in_clusters(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Filters of 1 to 12544 gradients, in pairs of channels and not; the same bits every time."""
    for number, (batch, channels, size) in enumerate(
        [
            (1, 32, (112, 112)),
            (8, 64, (28, 28)),
            (3, 7, (61, 53)),
            (1, 2, (225, 130)),
            (2, 40, (33, 30)),
            (70, 5, (3, 3)),
        ]
    ):
        for padding in ((1, 1), (0, 2)):
            problem = Problem(Case(batch, channels, size, (3, 3), padding=padding), dtype, memory_format)
            for offset in (0, 1):
                problem.lay({"offset": number * offset}, {"offset": offset})
                assert problem.check("direct_grad_weight", repeats=21)["grad_weight"], problem


# ---------------------------------------------------------------------------- gather


def draw_gather_case(draw: random.Random) -> Case | None:
    """Any kernel, stride, padding and dilation, different along both sides; none without outputs."""
    kernel = draw.choice([(1, 1), (3, 3), (draw.randint(1, 4),) * 2, (draw.randint(1, 9), draw.randint(1, 31))])
    side = [draw.choice((1, 1, 1, 2, 2, 3, 4, 5, 8)) for _ in range(2)], [draw.choice((1, 1, 2, 3)) for _ in range(2)]
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, side[1])]
    case = Case(
        draw.randint(1, 9),
        draw.choice((1, 2, 3, 7, 8, 24, 33, 40, 65)),
        (draw.randint(1, 40), draw.randint(1, 40)),
        kernel[:: draw.choice((1, -1))],
        (side[0][0], side[0][1]),
        (draw.randint(0, extent[0]), draw.randint(0, extent[1])),
        (side[1][0], side[1][1]),
        multiplier=draw.choice((1, 1, 2, 3)),
        bias=draw.random() < 0.5,
    )
    if not case.has_outputs:
        return None
    pixels = max(case.batch * case.filters * math.prod(case.size), math.prod(output_size(case)))
    return case if pixels * math.prod(case.kernel) <= 1 << 20 else None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_gather_is_exact(seed: int, dtype: torch.dtype) -> None:
    """Problems of every sort with little to do, on arrays that lie anyhow; some numbers are not finite."""
    draw, checked = random.Random(seed), Counter[str]()
    for number in range(60):
        case = draw_gather_case(draw)
        if case is None:
            continue
        problem = Problem(case, dtype)
        if number % 4 == 0 and case.channels > 1:  # else F.conv2d multiplies padding, too
            for tensor, value in product((problem.input, problem.weight, problem.grad_output), (torch.inf, torch.nan)):
                tensor.view(-1)[draw.randrange(tensor.numel())] = value
        problem.channels_last = draw.random() < 0.5
        steps = [draw.choice((1, 1, 2)) if draw.random() < 0.3 else 1 for _ in range(4)]
        problem.lay(
            {"steps": steps, "offset": draw.randrange(4)},
            weight={"order": draw.choice([(0, 1, 2, 3), (2, 3, 0, 1)]), "offset": draw.randrange(3)},
        )
        problem.lay(grad_output={"steps": steps, "offset": draw.randrange(4)})
        checked.update(field for field, plans in problem.check(*GATHER.values()).items() if plans)
    assert min(checked[field] for field in ("output", "grad_input", "grad_weight")) >= 20, checked
