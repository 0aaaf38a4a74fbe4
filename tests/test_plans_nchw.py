"""Plans for NCHW: small kernels that stream planes or march down them, on CUDA cores; those that multiply by band
matrices, on tensor cores; and their grad_weight. First what they claim, then each forced.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from common import Case, halves, reach_of
from exact import lay, output_size
from plans import (
    FAST,
    HALF,
    MARCH_NCHW,
    PASSES,
    STREAM,
    TAPS_FIRST,
    TILES,
    Problem,
    and_portable,
    check_layouts,
    claims,
    meta,
    plan_of,
    tile_case,
)

BANDS = and_portable("toeplitz_nchw")
SMALL_PLANES = and_portable("toeplitz_small_planes")
STREAM_SUMS = and_portable("stream_grad_weight_nchw")
BAND_SUMS = and_portable("toeplitz_grad_weight_nchw")
BATCH_SUMS = and_portable("batch_grad_weight_nchw")
MARCHES = {plan for name in MARCH_NCHW.values() for plan in and_portable(name)}

# ---------------------------------------------------------------------------- claims


@pytest.mark.parametrize("name", PASSES)
def test_what_can_stream(name: str) -> None:
    """Planes have to follow each other; images may lie apart by a multiple of 16 bytes."""
    case, plain = Case(4, 8, (6, 8), (3, 3), padding=(1, 1)), meta((4, 8, 6, 8))
    check_layouts(
        STREAM[name],
        name,
        case,
        plain,
        claimed=[
            lay(plain, offset=3),
            lay(plain, steps=(2, 1, 1, 1)),
            meta((4, 20, 6, 8))[:, 5:13],
        ],
        refused=[
            meta((4, 8, 12, 8))[:, :, :6],
            meta((4, 8, 6, 9))[..., :8],
            lay(plain, (1, 0, 2, 3)),
            lay(plain, expanded=(0,)),
            lay(plain, (0, 2, 3, 1)),
        ],
    )
    # Images of 7 x 7 floats, 8 channels: a multiple of 16 bytes; 9 channels: not.
    for channels, streams in ((8, True), (9, False)):
        case = Case(4, channels, (7, 7), (3, 3), padding=(1, 1))
        apart = meta((4, channels + 4, 7, 7))[:, :channels]
        assert (STREAM[name] in claims(name, case, apart, meta((4, channels, 7, 7)))) == streams


# Of 7x7 and 9x9 in float32: batch, channels, size; so much of it that warps march, in grad_weight for the sides of the
# kernel that are named.
SIZE_OF_LANES = (28, 28)  # of these, where lanes.cu has 9x9
PLANES = [
    (128, 64, SIZE_OF_LANES, ()),
    (512, 37, (14, 13), ()),
    (1200, 64, (8, 7), ()),
    (600, 40, (14, 15), ()),
    (640, 40, (15, 14), ()),
    (3, 3, (301, 1921), ()),
    (50, 96, (56, 56), (7, 9)),
    (32, 41, (113, 95), (7, 9)),
    (6, 5, (400, 1301), (7, 9)),
    (4, 9, (120, 1796), (7, 9)),
    (40, 16, (60, 236), (7, 9)),
]


@pytest.mark.parametrize(("batch", "channels", "size", "sides"), PLANES, ids=str)
def test_planes_to_march_down(batch: int, channels: int, size: tuple[int, int], sides: tuple[int, ...]) -> None:
    case = Case(batch, channels, size, (7, 7), padding=(3, 3))
    for name in PASSES:
        assert (plan_of(name, case) == MARCH_NCHW[name]) == (name != "grad_weight" or 7 in sides), name
    assert plan_of("forward", case._replace(batch=1, channels=2)) != "march_nchw"
    assert plan_of("forward", case._replace(multiplier=2)) != "march_nchw"
    assert plan_of("forward", case, torch.float16) != "march_nchw"
    nine = case._replace(kernel=(9, 9), padding=(4, 4))
    forward = size != SIZE_OF_LANES
    assert [plan_of(name, nine) == MARCH_NCHW[name] for name in PASSES] == [forward, forward, 9 in sides]


# Of 7x7 at stride 2: batch, channels, filters of each, size.
PLANES_OF_STRIDE_2 = [
    (64, 64, 2, (56, 56)),
    (300, 12, 1, (121, 117)),
    (96, 32, 4, (98, 56)),
    (70, 7, 1, (90, 450)),
]


@pytest.mark.parametrize(("batch", "channels", "multiplier", "size"), PLANES_OF_STRIDE_2, ids=str)
def test_planes_to_march_down_at_stride_2(batch: int, channels: int, multiplier: int, size: tuple[int, int]) -> None:
    case = Case(batch, channels, size, (7, 7), multiplier=multiplier, stride=(2, 2), padding=(3, 3))
    assert plan_of("grad_weight", case) == "march_grad_weight_nchw"
    assert plan_of("forward", case) == "march_nchw"
    assert plan_of("grad_input", case) != "march_nchw"
    assert plan_of("grad_weight", case._replace(batch=1, channels=2)) != "march_grad_weight_nchw"
    assert plan_of("grad_weight", case, torch.float16) != "march_grad_weight_nchw"


@pytest.mark.parametrize("name", PASSES[:2])
def test_planes_whose_bounds_are_known(name: str) -> None:
    """Those of 7 x 7 and 14 x 14 stream, if the kernel lies over the middle."""
    for side in (7, 14):
        case = Case(1024, 256, (side, side), (7, 7), padding=(3, 3))
        assert plan_of(name, case) == "stream_nchw"
        for change in ({"padding": (4, 3)}, {"padding": (4, 4)}, {"size": (side + 1, side)}):
            assert plan_of(name, case._replace(**change)) == "march_nchw", change
        assert plan_of(name, case._replace(kernel=(5, 5), padding=(2, 2))) == "stream_nchw"


# ---------------------------------------------------------------------------- streams


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_streams_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Planes of every sort: tiny and large, even and odd, whole in shared memory and in bands, at any address."""
    kernel, stride, _ = tile
    small = [(7, 7), (1, 8), (14, 14), (13, 29), (28, 28), (31, 57)]
    sizes = [*small, (56, 56), (61, 64), (39, 62), (113, 95), (64, 301), (200, 300), (24, 903)]
    for number, size in enumerate(sizes):
        for turn in range(4):
            batch, channels = (3, 7) if size[0] * size[1] > 2000 else (5, 40)
            case = tile_case(tile, batch, channels, size, multiplier=1 + (number + turn) % 2, bias=turn % 2 == 0)
            if turn > 0:  # the reach is the most padding that streams, and of a row or a column the only one here
                paddings = [case.padding, (0, 0), case.reach]
                case = case._replace(padding=paddings[(number + turn) % 3 if min(case.reach) > 0 else 2])
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype)
            if turn == 1:
                problem.lay({"offset": 1}, {"offset": 3})
            elif turn == 2:  # images apart
                problem.input = F.pad(problem.input, (0, 0, 0, 0, 0, 128), value=torch.nan)[:, :channels]
                problem.lay(weight=TAPS_FIRST)
            forced = problem.check()
            *_, height, width = output_size(case)
            if width >= 7 and turn != 2:
                assert and_portable("stream_nchw") <= forced["output"], problem
                assert "stream_grad_weight_nchw" in forced["grad_weight"], problem
                if min(kernel) >= 5 and stride == 1 and dtype != torch.float32 and height * width >= 784:
                    assert BAND_SUMS <= forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("side", [3, 5])
def test_streams_of_wide_rows_are_exact(side: int, dtype: torch.dtype, finite: bool) -> None:
    """Rows of which few find room in shared memory, of every width within 16 bytes, and at any address."""
    sums = "stream_grad_weight_nchw" if dtype == torch.float32 else "toeplitz_grad_weight_nchw"
    for number, width in enumerate((1915, 1917, 1918, 1919, 1920, 2046)):
        case = tile_case(((side, side), 1, 1), 1 + number % 2, 2, (23 + number, width), bias=number % 2 == 0)
        problem = Problem(case, dtype)
        if number % 3 > 0:
            problem.lay({"offset": number}, {"offset": 2 * number + 1})
        if not finite:
            problem.spoil((0, 0, 0, 0), (-1, 1, -1, -1), (-1, 0, 9, 0))
        forced = problem.check(".*_nchw.*")
        assert "stream_nchw" in forced["output"] and sums in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [((3, 3), 2, 1), ((5, 5), 2, 1), ((7, 7), 2, 1)], ids=str)
def test_strides_of_every_width_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Of grad_input: last strips that overlap the ones before, and rows that lie at odd places."""
    for number, width in enumerate((13, 14, 15, 16, 27, 28, 29, 41, 55, 110, 111)):
        case = tile_case(tile, 2, 3, (30 + number, width), multiplier=1 + number % 3 // 2)
        if number % 4 == 3:
            case = case._replace(padding=(case.reach[0], 1))
        problem = Problem(case, dtype)
        problem.lay({"offset": number}, {"offset": 3 * number})
        problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_streams_with_much_to_do(dtype: torch.dtype) -> None:
    """So many chunks that blocks take them from a counter, call after call; whole planes, bands, images apart."""
    for tile, batch, channels, size in (
        (((3, 3), 1, 1), 61, 96, (56, 56)),
        (((3, 3), 1, 1), 16, 8, (513, 510)),
        (((3, 3), 2, 1), 30, 64, (112, 112)),
        (((5, 5), 1, 1), 200, 96, (28, 28)),
        (((3, 3), 1, 1), 61, 300, (28, 30)),
        (((7, 7), 1, 1), 128, 150, (30, 28)),
        (((7, 7), 1, 1), 300, 260, (14, 14)),
        (((7, 7), 1, 1), 900, 320, (7, 7)),
        (((1, 11), 1, 1), 61, 96, (56, 56)),
    ):
        problem = Problem(tile_case(tile, batch, channels, size), dtype)
        assert len(problem.check(".*_grad_weight_nchw.*")["grad_weight"]) >= 2, problem
        for layout in ({}, {"steps": (2, 1, 1, 1)}, {}):
            problem.lay(layout)
            forced = problem.check("(stream|toeplitz)_nchw.*")
            assert and_portable("stream_nchw") <= forced["output"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_bands_in_runs(dtype: torch.dtype) -> None:
    """Chunks of which each block takes some that follow each other: work for fewer blocks than there is room for."""
    for kernel, batch, channels, size in (
        ((7, 7), 2, 76, (173, 145)),
        ((6, 5), 2, 76, (173, 145)),
        ((4, 6), 2, 76, (173, 145)),
        ((7, 7), 1, 150, (175, 146)),
        ((3, 3), 2, 80, (230, 231)),
        ((5, 5), 1, 100, (300, 301)),
        ((3, 3), 1, 57, (501, 509)),
    ):
        problem = Problem(Case(batch, channels, size, kernel, padding=halves(kernel)), dtype)
        forced = problem.check("(stream|toeplitz)_nchw.*")
        assert "toeplitz_nchw" in forced["output"] & forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_sums_of_many_small_planes_are_exact(side: int, finite: bool) -> None:
    """Blocks that have some filters of all images, the last of them fewer than are added together; at any address."""
    for batch, channels, layout, offsets in (
        (128, 768, {}, (0, 0)),
        (33, 960, {}, (1, 1)),
        (45, 784, {"steps": (2, 1, 1, 1)}, (3, 0)),
        (50, 800, {"steps": (3, 1, 1, 1)}, (2, 1)),
        (95, 768, {}, (0, 3)),
    ):
        case = tile_case(((side, side), 1, 1), batch, channels, (7, 7), bias=batch != 50)
        problem = Problem(case, torch.float32)
        problem.lay(*(layout | {"offset": offset} for offset in offsets))
        if not finite:
            problem.spoil((0, 1, 0, 0), (1, 0, -1, -1), (-1, -1, 3, 0))
        assert problem.check(*STREAM_SUMS)["grad_weight"] == STREAM_SUMS, problem


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_grad_weight_of_3x3_by_words_is_exact(dtype: torch.dtype, finite: bool) -> None:
    """Rows of even and odd widths, and arrays that begin alike within a word and not, of tiles for a whole GPU."""
    sizes = [(6, 512, 510), (6, 500, 511), (6, 509, 504), (7, 801, 350), (3, 1000, 512)]
    for number, (batch, *size) in enumerate(sizes):
        for turn, (first, second) in enumerate([(0, 0), (1, 1), (1, 2), (3, 7)]):
            case = Case(batch, 5, tuple(size), (3, 3), padding=(1, 1), bias=(number + turn) % 2 == 0)
            problem = Problem(case._replace(multiplier=1 + turn // 2), dtype)
            problem.lay({"offset": first}, {"offset": second})
            if not finite:
                problem.spoil((0, 0, 0, 0), (-1, 1, -1, -1), (-1, 3, 9, 0))
            problem.check(*STREAM_SUMS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("plan", ["", "_portable"])
@pytest.mark.parametrize("family", ["stream", "toeplitz"])
def test_streams_repeat_bit_for_bit(family: str, plan: str, dtype: torch.dtype) -> None:
    if family == "toeplitz" and dtype == torch.float32:
        pytest.skip("tensor cores serve 16 bits")
    side = 3 if family == "stream" else 7
    problem = Problem(tile_case(((side, side), 1, 1), 16, 24, (56, 60)), dtype, make=torch.randn)
    plans = f"{family}_nchw{plan}", f"{family}_grad_weight_nchw{plan}"
    assert all(problem.check_repeats(*plans, repeats=300).values())


# ---------------------------------------------------------------------------- marches


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "channels", "multiplier", "size", "side", "stride", "plans"),
    [
        (batch, channels, 1, size, side, 1, [*PASSES[:2], *PASSES[2:] * (side in sides)])
        for batch, channels, size, sides in PLANES
        for side in (7, 9)
        if side == 7 or size != SIZE_OF_LANES
    ]
    + [(*planes, 7, 2, ["forward", "grad_weight"]) for planes in PLANES_OF_STRIDE_2],
    ids=str,
)
def test_marches_down_planes_are_exact(
    batch: int, channels: int, multiplier: int, size: tuple[int, int], side: int, stride: int, plans: list[str]
) -> None:
    """Any padding, addresses and images apart; what is not finite stays with the outputs that it reaches."""
    for turn in range(6):
        case = tile_case(((side, side), stride, 1), batch, channels, size, multiplier=multiplier, bias=turn % 2 == 0)
        case = case._replace(padding=[case.padding, (0, 0), case.reach][turn if turn < 3 else 0])
        if min(size) + 2 * min(case.padding) < 2 * side - 1:
            continue
        problem = Problem(case, torch.float32)
        if turn in (1, 4, 5):
            problem.lay({"offset": 1}, {"offset": 3})
        elif turn == 2:  # images apart
            problem.input = F.pad(problem.input, (0, 0, 0, 0, 0, 16), value=torch.nan)[:, :channels]
            problem.lay(weight=TAPS_FIRST)
        if turn in (3, 5):
            problem.spoil((0, 1, 3, 5), (1, 0, -1, -1))
            problem.spoil((0, 0, 0, 0), (-1, 0, -1, -1), of=["weight"])
        forced = problem.check(*MARCHES)
        for name in plans if turn == 0 else ():
            assert and_portable(MARCH_NCHW[name]) <= forced["output" if name == "forward" else name], problem


# ---------------------------------------------------------------------------- tensor cores


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "kernel", [(7, 7), (2, 3), (4, 6), (1, 9), (6, 1), (11, 5), (3, 4), (5, 4), (5, 9), (9, 9)], ids=str
)
def test_tensor_cores_are_exact(kernel: tuple, stride: int, dtype: torch.dtype) -> None:
    sizes = [(32, 32), (56, 56), (23, 45), (113, 95), (40, 301), (301, 40), (65, 17), (90, 520), (64, 64)]
    for number, size in enumerate(sizes):
        for turn, padding in enumerate([(0, 0), halves(kernel), reach_of(kernel)]):
            multiplier = 1 + (number + turn) % 2
            case = Case(3, 5, size, kernel, (stride, stride), padding, multiplier=multiplier, bias=turn != 1)
            problem = Problem(case, dtype)
            if turn == 1:
                problem.lay({"offset": 3}, {"offset": 5}, TAPS_FIRST)
            forced = problem.check()
            if math.prod(output_size(case)[2:]) >= 512 and (stride == 1 or kernel[0] in (3, 5, 7)):
                assert BANDS <= forced["output"], problem
            if stride == 2 and kernel == (7, 7) and multiplier == 1:
                assert BANDS <= forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (16, 16), (13, 14), (9, 11), (3, 4)], ids=str)
def test_small_planes_at_any_place(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Planes of few columns that begin anywhere within 16 bytes, with gaps between images and not."""
    kernels = [((3, 3), 1), ((5, 5), 1), ((7, 7), 1), ((3, 31), 1), ((3, 23), 1), ((3, 3), 2), ((5, 5), 2)]
    for number, ((kernel, stride), channels) in enumerate(product(kernels, (8, 21, 100))):
        problem = Problem(tile_case((kernel, stride, 1), (16, 19, 40)[number % 3], channels, size), dtype)
        for offset in range(8):
            steps = (1 + (number + offset) % 2, 1, 1, 1)
            problem.lay({"steps": steps, "offset": offset}, {"steps": steps, "offset": (3 * offset + number) % 8})
            forced = problem.check(*SMALL_PLANES)
            assert forced["output"] == forced["grad_input"] == SMALL_PLANES, problem


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(1, 17))
def test_small_planes_are_exact(width: int) -> None:
    """Planes of few columns and any number of rows, all kernels of up to 7 rows, images apart, at any address."""
    kernels = [((3, 3), 1), ((7, 7), 1), ((5, 5), 1), ((2, 4), 1), ((3, 3), 3), ((6, 9), 1), ((1, 16), 1), ((7, 1), 1)]
    for number, height in enumerate((1, 2, 5, 7, 8, 12, 14, 16, 33)):
        for turn in range(4):
            kernel, dilation = kernels[(number + 3 * turn + width) % len(kernels)]
            stride = 1 + (number + turn // 2 + width) % 2
            batch, channels = [8, 37, 16, 9][turn], [3, 16, 13, 5][(number + turn) % 4]
            case = tile_case((kernel, stride, dilation), batch, channels, (height, width), bias=turn % 2 == 0)
            reach = case.reach
            paddings = [case.padding, (0, 0), reach, (reach[0] + 9, reach[1] // 2)]
            case = case._replace(padding=paddings[(number + turn) % 4])
            if not case.has_outputs:
                continue
            problem = Problem(case, HALF[turn % 2])
            if turn == 1:
                problem.lay({"offset": 1}, {"offset": 3})
            elif turn == 2:  # images apart
                problem.lay({"steps": (3, 1, 1, 1), "offset": 5}, {"steps": (2, 1, 1, 1)}, TAPS_FIRST)
            forced = problem.check()
            # Taps that meet no pixel are left out, and then the kernel may be one of a single tap.
            if output_size(case)[3] * stride <= 16 and dilation < max(2, min(case.size)):
                assert SMALL_PLANES <= forced["output"] & forced["grad_input"], problem
            in_words = width % 2 == output_size(case)[3] % 2 == 0
            if reach[1] <= 8 and batch in (16, 37) and (stride == 1 or kernel != (3, 3)) and in_words:
                assert "batch_grad_weight_nchw" in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("side", [7, 14])
def test_small_square_planes_are_exact(side: int, dtype: torch.dtype) -> None:
    """Planes whose bounds are known, of kernels that leave their size: at even and odd places, parts of channels."""
    kernels = [((3, 3), 1), ((5, 5), 1), ((7, 7), 1), ((3, 3), 3), ((1, 7), 1), ((7, 1), 1), ((5, 31), 1), ((3, 7), 2)]
    layouts: list[dict] = [{}, {"offset": 2}, {"offset": 1}, {"steps": (2, 1, 1, 1)}]
    for number, (kernel, dilation) in enumerate(kernels):
        for turn, layout in enumerate(layouts):
            batch, channels = [16, 9, 37, 121][turn], [8, 21, 20, 1][(number + turn) % 4]
            case = tile_case((kernel, 1, dilation), batch, channels, (side, side), bias=number % 2 == 0)
            problem = Problem(case, dtype)
            problem.lay(layout, layout)
            forced = problem.check(*SMALL_PLANES)
            assert forced["output"] == forced["grad_input"] == SMALL_PLANES, problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("size", "stride"), [((7, 7), 1), ((14, 14), 1), ((14, 14), 2), ((9, 12), 1)], ids=str)
@pytest.mark.parametrize("side", [3, 7])
def test_small_planes_of_many_images(side: int, size: tuple, stride: int, dtype: torch.dtype) -> None:
    """Blocks that have several parts each, the last ones of fewer images and channels."""
    for batch, channels in ((121, 1030), (128, 768)):
        problem = Problem(tile_case(((side, side), stride, 1), batch, channels, size), dtype)
        forced = problem.check(*SMALL_PLANES)
        assert forced["output"] == forced["grad_input"] == SMALL_PLANES, problem


# ---------------------------------------------------------------------------- grad_weight on tensor cores


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_grad_weight_of_planes_cut_in_other_rows_is_exact(side: int, dtype: torch.dtype, finite: bool) -> None:
    """Long rows that are no whole 16 bytes, of planes that are, at any address; products around the ends of rows."""
    sizes = [(24, 1918), (40, 1026), (16, 1028), (48, 1917), (32, 1923), (28, 1024), (8, 1034)]
    if side > 3:
        sizes += [(24, 903), (64, 779), (72, 901)]  # of which a band may have more rows
    for number, size in enumerate(sizes):
        batch, channels = (1 + number % 2, 3) if size[1] > 1000 else (3, 7)
        for turn, offsets in enumerate([(0, 0), (8, 16), (3, 3), (5, 13), (2, 7)]):
            case = tile_case(((side, side), 1, 1), batch, channels, size, multiplier=1 + turn % 2, bias=number % 2 == 0)
            problem = Problem(case, dtype)
            problem.lay(*({"offset": offset} for offset in offsets))
            if not finite:
                problem.spoil((0, 0, 0, 0), (-1, 1, -1, -1), (-1, 2, 5, 0))
            assert problem.check(*BAND_SUMS)["grad_weight"] == BAND_SUMS, problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_grad_weight_of_long_rows_is_exact(side: int, dtype: torch.dtype) -> None:
    """Rows in 16 segments, the last of them empty or cut, of whole 16 bytes and not; at any address, too."""
    even = [(9, 256), (23, 264), (30, 512), (16, 1032), (14, 1048), (50, 1920)]
    sizes = [*even, (24, 258), (23, 511), (17, 1027), (31, 1919), (40, 1918), (33, 1916)]
    for number, size in enumerate(sizes):
        for turn, padding in enumerate([side // 2, side - 1, 0]):
            case = Case([3, 1, 2][turn], 3, size, (side, side), padding=(padding, side // 2))
            case = case._replace(multiplier=1 + (number + turn) % 2, bias=(number + turn) % 3 > 0)
            problem = Problem(case, dtype)
            if turn == 1:
                problem.lay({"offset": 1 + number}, {"offset": 9 + number})
            elif turn == 2 and number % 2 == 0:
                problem.lay({"offset": 8}, {"offset": 3})
            forced = problem.check()
            if math.prod(output_size(case)[2:]) >= 784 and (side > 3 or size[1] > 1000):
                assert "toeplitz_grad_weight_nchw" in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (9, 9), (2, 3), (4, 9), (8, 4), (7, 1), (1, 6)], ids=str)
def test_batch_grad_weight_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Whole planes of several channels and of one, bands of rows, any widths and strides, at any address."""
    sizes = (7, 7), (14, 14), (13, 29), (28, 28), (31, 57), (56, 56), (50, 95), (113, 64), (8, 6), (30, 22)
    for number, size in enumerate(sizes):
        for turn in range(4):
            stride, multiplier = 1 + (number + turn) % 2, [1, 1, 2, 3][(turn + number // 2) % 4]
            dilation = 3 if max(kernel) <= 3 and turn % 2 == 1 else 1
            batch, channels = ([16, 12, 37, 50][turn], [5, 8, 16, 3][turn]) if size[1] < 50 else (28, 3)
            case = tile_case((kernel, stride, dilation), batch, channels, size, multiplier=multiplier)
            case = case._replace(padding=[case.padding, (0, 0), case.reach][(number + turn) % 3], bias=turn % 2 == 0)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype)
            if turn == 1:
                problem.lay({"offset": 1}, {"offset": 3})
            elif turn == 2:  # images apart
                problem.lay({"steps": (3, 1, 1, 1), "offset": 5}, {"steps": (2, 1, 1, 1)})
            forced = problem.check()
            in_words = size[1] % 2 == output_size(case)[3] % 2 == 0
            is_fast = kernel == (3, 3) and dilation == 1 and size == (28, 28)  # on CUDA cores
            if (stride == 1 or (kernel != (3, 3) and kernel[0] < 8)) and in_words and not is_fast:
                assert BATCH_SUMS <= forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dilation"),
    [
        ((1, 1), 1),
        ((3, 3), 1),
        ((3, 3), 2),
        ((5, 5), 1),
        ((7, 7), 1),
        ((9, 9), 1),
        ((4, 3), 1),
        ((1, 11), 1),
        ((1, 7), 1),
        ((11, 1), 1),
        ((4, 1), 2),
    ],
    ids=str,
)
def test_batch_grad_weight_of_whole_units_is_exact(kernel: tuple, dilation: int, dtype: torch.dtype) -> None:
    """Rows of whole units, and small planes in images of them: bands, filters that end in a block, images apart."""
    small = (24, (7, 7)), (768, (7, 7)), (8, (5, 7)), (16, (3, 3))
    planes = (*small, (3, (9, 8)), (9, (15, 24)), (5, (22, 56)), (2, (57, 64)), (3, (8, 120)), (150, (14, 16)))
    for number, (channels, size) in enumerate(planes):
        for turn, layout in enumerate([{}, {"steps": (2, 1, 1, 1)}, {"offset": 8}, {"offset": 3}]):
            if turn == 3 and kernel in ((1, 1), (1, 11), (11, 1)):
                continue  # which the plan claims by where arrays begin
            case = tile_case((kernel, 1, dilation), [16, 37, 60, 28][turn], channels, size, bias=turn != 1)
            padding = case.padding[0] * (1 - turn % 2), case.padding[1]
            case = case._replace(padding=padding, multiplier=1 + (number + turn) % 3 // 2)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype)
            problem.lay(layout, layout)
            problem.check("batch_grad_weight_nchw")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "multiplier"),
    [
        # few columns: many filters
        ((14, 14), (3, 3), 1, 1, 1),
        ((14, 14), (5, 5), 1, 1, 1),
        ((14, 14), (7, 7), 1, 1, 1),
        ((14, 14), (3, 3), 1, 2, 1),
        ((14, 14), (3, 3), 1, 3, 1),
        ((14, 14), (1, 7), 1, 1, 1),
        ((14, 14), (7, 3), 1, 1, 1),
        ((7, 7), (3, 3), 1, 1, 1),
        ((7, 7), (7, 7), 1, 1, 1),
        # stride 2
        ((14, 14), (5, 5), 2, 1, 1),
        ((56, 56), (7, 7), 2, 1, 1),
        ((56, 56), (7, 7), 2, 1, 2),
        ((28, 56), (5, 5), 2, 1, 2),
        ((84, 56), (5, 7), 2, 1, 1),
        # whole units of 8 columns
        ((30, 56), (3, 3), 1, 1, 2),
        ((25, 64), (3, 3), 1, 2, 1),
        ((16, 112), (7, 7), 1, 1, 1),
        ((20, 56), (11, 1), 1, 1, 1),
        ((20, 56), (1, 11), 1, 1, 1),
        ((21, 56), (9, 9), 1, 1, 1),
        ((28, 48), (11, 1), 1, 1, 2),
        ((14, 56), (1, 11), 1, 1, 1),
        ((14, 112), (3, 3), 1, 1, 1),
        ((23, 96), (5, 3), 1, 1, 1),
        # an even number of columns
        ((20, 28), (3, 3), 1, 1, 1),
        ((28, 28), (7, 7), 1, 1, 1),
        ((15, 28), (5, 3), 1, 1, 1),
        ((45, 28), (9, 9), 1, 1, 1),
        ((28, 28), (9, 9), 1, 1, 2),
        ((24, 20), (7, 3), 1, 1, 1),
        ((30, 62), (3, 3), 1, 2, 1),
        ((17, 110), (3, 3), 1, 1, 1),
        ((32, 110), (3, 3), 1, 1, 1),
        ((16, 52), (3, 3), 1, 1, 1),
        ((40, 62), (3, 3), 1, 2, 1),
        ((16, 66), (3, 3), 1, 2, 2),
        # an odd number of columns
        ((15, 55), (6, 5), 1, 1, 2),
        ((8, 57), (3, 9), 1, 1, 1),
        ((19, 77), (7, 7), 1, 1, 1),
        ((16, 127), (3, 3), 1, 1, 1),
        ((24, 99), (5, 6), 1, 1, 1),
        ((16, 84), (9, 9), 1, 1, 1),
        ((24, 60), (5, 5), 1, 1, 1),
        ((24, 62), (5, 3), 1, 1, 1),
        ((14, 60), (9, 1), 1, 1, 1),
        ((24, 109), (3, 3), 1, 1, 2),
        ((8, 99), (3, 3), 1, 1, 1),
        ((24, 61), (3, 3), 1, 2, 1),
    ],
    ids=str,
)
def test_batch_grad_weight_of_rows_as_they_lie_is_exact(
    size: tuple, kernel: tuple, stride: int, dilation: int, multiplier: int, finite: bool, dtype: torch.dtype
) -> None:
    """Filters that end within a block, images that end within 16, that blocks share, or apart, at any address; NaN."""
    many = 680 if size[1] <= 14 else 70
    for batch, channels, layout, offsets in (
        (37, 8, {}, (0, 0)),
        (16, many, {"steps": (2, 1, 1, 1)}, (0, 0)),
        (400, 8, {}, (8, 8)),
        (37, 8, {}, (1, 1)),
        (28, 8, {}, (7, 2)),
        (28, 8, {}, (5, 5)),
        (37, 8, {"steps": (2, 1, 1, 1)}, (7, 7)),
        (16, many, {"steps": (2, 1, 1, 1)}, (4, 3)),
    ):
        case = tile_case((kernel, stride, dilation), batch, channels, size, multiplier=multiplier, bias=batch != 16)
        problem = Problem(case, dtype)
        problem.lay(*(layout | {"offset": offset} for offset in offsets))
        if not finite:
            problem.spoil((0, 1, 0, 0), (1, 0, -1, -1), (-1, 2, 3, 0))
        assert problem.check(*BATCH_SUMS)["grad_weight"] == BATCH_SUMS, problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_batch_grad_weight_of_rows_laid_apart_of_one_array_is_exact(dtype: torch.dtype) -> None:
    """The other one has zeros below its planes as well."""
    for size, side, padding in (((56, 56), 7, 6), ((56, 56), 5, 4), ((52, 60), 5, 0)):
        problem = Problem(Case(28, 8, size, (side, side), padding=(padding, padding)), dtype)
        assert problem.check(*BATCH_SUMS)["grad_weight"] == BATCH_SUMS, problem
