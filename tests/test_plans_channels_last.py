"""Plans for channels_last: what marches down images, on CUDA cores, and what multiplies by band matrices, on tensor
cores; and their grad_weight. First what they claim, then each forced.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from common import Case, halves, reach_of
from exact import lay, output_size
from plans import (
    BAND,
    FAST,
    FLAT,
    HALF,
    LAST,
    MARCH,
    MATRIX,
    PASSES,
    TAPS_FIRST,
    TILES,
    Problem,
    check_layouts,
    meta,
    plan_of,
    plans_of,
    stays_large,
    tile_case,
)

# ---------------------------------------------------------------------------- claims


@pytest.mark.parametrize("name", PASSES)
def test_what_can_march(name: str) -> None:
    """Channels have to lie side by side in both arrays; rows, pixels and images may lie apart."""
    case, plain = Case(4, 8, (6, 8), (3, 3), padding=(1, 1)), meta((4, 8, 6, 8), memory_format=torch.channels_last)
    check_layouts(
        MARCH[name],
        name,
        case,
        plain,
        claimed=[
            lay(plain, LAST, offset=3),
            lay(plain, LAST, steps=(2, 1, 3, 2)),
            lay(plain, LAST, expanded=(0, 2)),
            lay(plain, (2, 3, 0, 1)),
            meta((4, 20, 6, 8), memory_format=torch.channels_last)[:, 5:13],
        ],
        refused=[
            lay(plain, LAST, steps=(1, 2, 1, 1)),
            lay(plain, LAST, expanded=(1,)),
            plain.contiguous(),
        ],
    )

    def marches(case: Case, dtype: torch.dtype = torch.float32) -> bool:
        return MARCH[name] in plans_of(name, case, dtype, torch.channels_last)

    most = {"forward": 8, "grad_input": 2, "grad_weight": 2}[name]
    assert marches(case._replace(multiplier=most)) and not marches(case._replace(multiplier=most + 1))
    for change in (
        {"kernel": (3, 5)},
        {"stride": (1, 2)},
        {"stride": (3, 3)},
        {"dilation": (2, 1)},
        {"padding": (3, 1)},
    ):
        assert not marches(case._replace(**change)), change
    assert not marches(case, torch.float64)
    # Rows of all images, and the bytes of one, are counted in 32 bits.
    for far in (Case(2**20, 8, (200, 8), (3, 3)), Case(1, 8, (8, 2**25), (3, 3)), Case(1, 2**24, (8, 8), (3, 3))):
        assert not marches(far), str(far)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PASSES[:2])
def test_toeplitz_channels_last_claims(name: str, dtype: torch.dtype) -> None:
    """Channels have to lie side by side; rows, pixels and images may lie apart, by multiples of 16 bytes."""
    case, plain = Case(4, 8, (20, 30), (5, 7), padding=(2, 3)), meta((4, 8, 20, 30), dtype, torch.channels_last)
    check_layouts(
        BAND,
        name,
        case,
        plain,
        claimed=[
            lay(plain, LAST, offset=3),
            lay(plain, LAST, steps=(2, 1, 3, 2)),
            lay(plain, LAST, expanded=(0, 2)),
            lay(plain, (2, 3, 0, 1)),
            meta((4, 24, 20, 30), dtype, torch.channels_last)[:, 5:13],
        ],
        refused=[
            meta((4, 20, 20, 30), dtype, torch.channels_last)[:, 5:13],
            lay(plain, LAST, steps=(1, 2, 1, 1)),
            lay(plain, LAST, expanded=(1,)),
            plain.contiguous(),
        ],
    )

    def claimed(case: Case, dtype: torch.dtype = dtype) -> bool:
        return BAND in plans_of(name, case, dtype, torch.channels_last)

    for kernel in (
        *((5, 5), (7, 7), (9, 9), (8, 3), (7, 9), (2, 2), (1, 9), (6, 1)),
        *((10, 7), (7, 10), (13, 17), (17, 13), (13, 1), (1, 18)),  # tall, or so with rows and columns exchanged
        *((5, 40), (40, 5), (2, 57), (57, 3)),  # wide
    ):
        assert claimed(case._replace(kernel=kernel, padding=reach_of(kernel))), kernel
    at_two = case._replace(kernel=(7, 7), stride=(2, 2), padding=(3, 6), multiplier=2)
    assert claimed(at_two)
    others = {"multiplier": 1}, {"multiplier": 3}, {"stride": (2, 1)}, {"kernel": (5, 7)}, {"padding": (7, 3)}
    for change in (*others, {"channels": 12}):
        assert not claimed(at_two._replace(**change)), change
    for size, kernel in (((14, 16), (27, 27)), ((7, 7), (40, 20)), ((16, 14), (15, 63))):  # planes that are small
        assert claimed(case._replace(size=size, kernel=kernel, padding=halves(kernel))), kernel
    for change in (
        {"kernel": (14, 14)},
        {"kernel": (6, 20)},
        {"kernel": (1, 11)},  # of a size that CUDA cores have
        {"kernel": (5, 58), "padding": (2, 29), "size": (60, 200)},
        {"kernel": (27, 27), "padding": (13, 13)},
        {"kernel": (3, 3)},  # bound by bytes without tensor cores, too
        {"kernel": (1, 1), "padding": (0, 0)},
        {"stride": (2, 2)},
        {"dilation": (2, 2)},
        {"padding": (5, 3)},
        {"padding": (2, 7)},
        {"multiplier": 2},
        {"channels": 12},
        {"batch": 0},
        {"batch": 2**24},
    ):
        assert not claimed(case._replace(**change)), change
    assert not claimed(case, torch.float32) and not claimed(case, torch.float64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_grad_weight_in_channels_last_on_tensor_cores(dtype: torch.dtype) -> None:
    case = Case(16, 64, (40, 40), (5, 5), padding=(2, 2))

    def serves(case: Case, memory_format: torch.memory_format = torch.channels_last) -> bool:
        return plan_of("grad_weight", case, dtype, memory_format) == MATRIX

    for kernel in ((7, 7), (7, 9), (9, 9), (4, 1), (6, 3), (3, 5), (2, 3), (1, 7), (3, 2)):
        small = case._replace(kernel=kernel, padding=halves(kernel))
        assert serves(small) and not serves(small, torch.contiguous_format), kernel
    # 3x3 on rows of up to 16 columns, if 16 bytes can be loaded at a time; 5x5 if they can.
    for width, channels, expected in ((16, 64, True), (17, 64, False), (16, 68, False)):
        assert serves(case._replace(size=(40, width), kernel=(3, 3), padding=(1, 1), channels=channels)) == expected
    for kernel, expected in (((5, 5), False), ((7, 7), True), ((4, 5), True), ((8, 5), False)):
        assert serves(case._replace(kernel=kernel, padding=halves(kernel), channels=68)) == expected
    for change in (
        {"kernel": (10, 5)},
        {"kernel": (5, 10)},
        {"stride": (2, 2)},
        {"dilation": (1, 2)},
        {"multiplier": 2},
        {"channels": 31},
        {"padding": (5, 2)},
        {"batch": 2**24},
    ):
        assert not serves(case._replace(**change)), change
    assert plan_of("grad_weight", case, torch.float32, torch.channels_last) == MARCH["grad_weight"]


# ---------------------------------------------------------------------------- every plan


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(9, 9), (7, 30), (31, 8), (28, 28)], ids=str)
@pytest.mark.parametrize("padding", [(4, 4), (0, 1), (8, 8)], ids=str)
def test_nine_by_nine_is_exact(size: tuple[int, int], padding: tuple[int, int]) -> None:
    for channels, multiplier in ((5, 1), (64, 1), (3, 2)):
        case = Case(3, channels, size, (9, 9), padding=padding, multiplier=multiplier)
        if case.has_outputs:
            Problem(case, torch.float32, torch.channels_last).check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", [*TILES, ((9, 9), 1, 1)], ids=str)
def test_marches_beside_infinities(tile: tuple, dtype: torch.dtype) -> None:
    """NaN where F.conv2d has it: of products, but not of what lies outside the image."""
    channels = ((3, 1), (16, 1), (8, 2), (40, 1), (35, 1))
    for (channels, multiplier), size in product(channels, ((12, 17), (7, 7), (9, 14))):
        problem = Problem(tile_case(tile, 2, channels, size, multiplier=multiplier), dtype, torch.channels_last)
        problem.spoil((0, 1, 3, 2), (1, 0, -1, -1))
        problem.spoil((0, 0, 0, 0), (-1, 0, -1, -1), of=["weight"])
        problem.check(BAND, MATRIX, *MARCH.values())


# ---------------------------------------------------------------------------- marches


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Any number of channels, images of every sort, pixels, rows and images apart, at any address."""
    kernel, _, dilation = tile
    sizes = [(7, 7), (1, 8), (14, 14), (13, 29), (28, 28), (31, 57), (9, 1), (113, 95), (40, 301), (301, 40)]
    for number, size in enumerate(sizes):
        for turn in range(6):
            channels = [3, 37, 64, 1, 130, 20, 304][(number + turn) % 7]
            case = tile_case(tile, 3, channels, size, multiplier=1 + (number + turn) % 2, bias=turn % 2 == 0)
            # The reach is the most padding that marches.
            case = case._replace(padding=[case.padding, (0, 0), case.reach][turn % 3])
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype, torch.channels_last)
            if turn == 1:
                problem.lay({"offset": 1}, {"offset": 8})
            elif turn == 2:
                problem.lay({"steps": (2, 1, 3, 2), "offset": 5}, weight=TAPS_FIRST)
            elif turn == 3:  # channels of more
                problem.lay(*[{"steps": (1, 1, 1, 3), "offset": 4}] * 2)
            forced = problem.check()
            if channels > 1:
                assert MARCH["forward"] in forced["output"], problem
                squares = kernel[0] == kernel[1] > 1 and dilation == 1
                sums = case.multiplier > 1 and (channels < 8 or not squares)
                assert (MARCH["grad_input"] in forced["grad_input"]) != sums, problem
                assert MARCH["grad_weight"] in forced["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_over_many_images_are_exact(tile: tuple, dtype: torch.dtype) -> None:
    """Blocks that take whole images, one after the other; rows that leave as one, and in slabs of channels."""
    for channels, batch, size in ((40, 1500, (7, 7)), (528, 300, (5, 9)), (1040, 3, (14, 30)), (4, 3, (40, 300))):
        for multiplier in (1, 2):
            case = tile_case(tile, batch, channels, size, multiplier=multiplier, bias=multiplier == 1)
            if case._replace(padding=(0, 0)).has_outputs:
                Problem(case, dtype, torch.channels_last).check(MARCH["forward"])


def check_march(case: Case, dtype: torch.dtype, offset: int = 0) -> None:
    """The output and the gradient of the input, whose sources begin so many elements behind an aligned address."""
    problem = Problem(case, dtype, torch.channels_last)
    problem.lay({"offset": offset}, {"offset": offset})
    forced = problem.check(MARCH["forward"])
    assert forced["output"] and forced["grad_input"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_marches_share_rows(dtype: torch.dtype) -> None:
    """Even shares, bands of images, and half of the rows in small shares where there is much to move."""
    for channels, batch, size in ((64, 2, (700, 520)), (144, 40, (56, 56)), (8, 3, (1000, 37)), (24, 1, (2, 3000))):
        check_march(tile_case(((3, 3), 1, 1), batch, channels, size), dtype)
    check_march(tile_case(((3, 3), 2, 1), 30, 96, (112, 112)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_of_rows_of_pixels_that_fit_no_units(tile: tuple, dtype: torch.dtype) -> None:
    """One channel a thread and two, all channels in a block and slabs of them, at any address."""
    images = (
        (37, (13, 41)),
        (38, (30, 8)),
        (130, (33, 6)),
        (395, (14, 12)),
        (413, (7, 9)),
        (565, (11, 19)),
        (1001, (5, 14)),
    )
    for number, (channels, size) in enumerate(images):
        case = tile_case(tile, 1, channels, size)
        for turn, padding in enumerate((case.padding, (0, 0), case.reach)):
            case = case._replace(batch=1 + (number + turn) % 3, padding=padding)
            if case.has_outputs:
                check_march(case, dtype, (number + 3 * turn) % 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_march_of_three_channels(dtype: torch.dtype) -> None:
    """Rows of whole words and others, more columns than a block has, and few."""
    for width in (1, 4, 7, 28, 60, 128, 132, 516, 1028, 1030):
        for padding in ((1, 1), (0, 0), (2, 1)):
            case = tile_case(((3, 3), 1, 1), 3, 3, (19, width), padding=padding, bias=width % 8 == 4)
            if case.has_outputs:
                check_march(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_march_of_many_rows_of_three_channels(dtype: torch.dtype) -> None:
    """Bands of every sort, whole and cut short, of blocks of every width; filters with Inf and NaN."""
    for batch, size in ((16, (512, 512)), (17, (271, 512)), (23, (402, 328)), (90, (101, 256)), (5, (1081, 1920))):
        case = tile_case(((3, 3), 1, 1), batch, 3, size, bias=batch % 2 == 1)
        check_march(case, dtype)
    for offset in range(1, 8):
        batch, size = ((17, (271, 512)), (23, (402, 328)), (90, (101, 256)))[offset % 3]
        check_march(tile_case(((3, 3), 1, 1), batch, 3, size), dtype, offset)
    problem = Problem(case, dtype, torch.channels_last)
    problem.spoil((0, 0, 0, 0), (2, 0, 1, 2), of=["weight"])
    assert problem.check(MARCH["forward"])["output"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_marches_of_arrays_that_begin_anywhere(tile: tuple, dtype: torch.dtype) -> None:
    """Arrays without gaps, a few elements behind 16 bytes: pixels that are whole units of 16 bytes, and others."""
    for number, channels in enumerate((24, 200, 37, 3, 600, 264)):
        for offsets in ((1, 1), (1, 0), (0, 3), (6, 2), (4, 8)):
            case = tile_case(tile, 3, channels, (13, 17 + number), multiplier=1 + (number + offsets[0]) % 2)
            problem = Problem(case, dtype, torch.channels_last)
            if offsets in [(6, 2), (1, 1)]:
                problem.spoil((1, 0, 0, 0), (0, -1, 3, -1), of=["input"])
                problem.spoil((1, 0, 5, 0), (2, -1, -1, -1), of=["grad_output"])
            problem.lay({"offset": offsets[0]}, {"offset": offsets[1]}, {"offset": offsets[1]})
            problem.check(*MARCH.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_marches_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    for case in (Case(16, 24, (56, 60), (3, 3), padding=(1, 1)), Case(5, 37, (40, 50), (5, 5), multiplier=2)):
        problem = Problem(case, dtype, torch.channels_last, make=torch.randn)
        assert all(problem.check_repeats(*MARCH.values(), repeats=300).values())


# ---------------------------------------------------------------------------- grad_weight


def check_sums(
    case: Case, plan: str, dtype: torch.dtype, spoilt: bool, offsets: tuple[int, int] = (0, 0), repeats: int = 21
) -> None:
    """Grad_weight by a plan that has to claim it, with Inf and NaN if `spoilt`, many times.

    Input and gradient begin so many elements behind an aligned address.
    """
    problem = Problem(case, dtype, torch.channels_last)
    for shift, name in enumerate(("input", "grad_output") if spoilt else ()):  # in other channels of each
        places = (0, shift, 0, 0), (1, 1 - shift, -1, -1), (0, -1 - shift, 0, -1), (-1, -2 + shift, 1, 0)
        problem.spoil(*places, of=[name], values=(torch.inf, torch.nan, torch.inf, torch.inf))
    problem.lay({"offset": offsets[0]}, {"offset": offsets[1]})
    assert problem.check(plan, repeats=repeats)["grad_weight"], problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_that_marches(spoilt: bool, dtype: torch.dtype) -> None:
    """Pixels that fit no 16 bytes, in splits of few rows and of several images; planes of which all rows are known."""
    for side, padding, batch, channels, size in (
        (5, (2, 2), 7, 37, (113, 95)),
        (5, (0, 3), 5, 6, (9, 30)),
        (5, (4, 1), 300, 37, (3, 17)),
        (5, (3, 0), 2, 130, (70, 14)),
        (7, (3, 3), 33, 520, (7, 7)),
        (7, (3, 3), 5, 40, (7, 7)),
        (7, (2, 3), 6, 40, (7, 7)),
    ):
        case = tile_case(((side, side), 1, 1), batch, channels, size, padding=padding)
        check_sums(case, MARCH["grad_weight"], dtype, spoilt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_march_grad_weight_of_pixels_that_begin_between_units(tile: tuple, dtype: torch.dtype) -> None:
    """Boxes of pixels and of slabs of channels, with a unit more of each, and rows; Inf and NaN in half of them."""
    images = ((5, 64, (41, 130)), (3, 144, (56, 56)), (2, 256, (33, 64)), (9, 960, (7, 7)), (4, 392, (14, 30)))
    small_pixels = ((3, 32, (20, 112)), (7, 8, (14, 31)), (5, 128, (11, 20)), (2, 24, (9, 300)))
    for number, (batch, channels, size) in enumerate(images + small_pixels):
        case = tile_case(tile, batch, channels, size, multiplier=2 if number == 4 else 1)
        if number % 3 == 2:
            case = case._replace(padding=case.reach)
        for offsets in ((1, 1), (6, 6), (3, 2) if number % 2 > 0 else (8, 5)):
            check_sums(case, MARCH["grad_weight"], dtype, number % 2 == 1, offsets, repeats=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_three_channels(spoilt: bool, dtype: torch.dtype) -> None:
    """Rows in bands of every sort: whole and cut short, several of a group, groups of every width; at any place."""
    tile, plan = ((3, 3), 1, 1), MARCH["grad_weight"]
    for batch, size in ((26, (90, 512)), (29, (101, 344)), (7, (333, 1000)), (3000, (9, 128)), (60, (97, 224))):
        check_sums(tile_case(tile, batch, 3, size), plan, dtype, spoilt)
    for offset, (batch, size) in enumerate(((29, (101, 344)), (7, (333, 1000)), (3000, (9, 128))), 1):
        for offsets in ((offset, offset), (offset + 4, offset + 4), (offset, 0)):
            check_sums(tile_case(tile, batch, 3, size), plan, dtype, spoilt, offsets, repeats=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_pairs(spoilt: bool, dtype: torch.dtype) -> None:
    """Two filters a channel at stride 2: rows of one span and of several, any padding, channels beyond a block's."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 9, 40, (56, 56)),
        ((7, 7), (0, 2), 13, 8, (33, 30)),
        ((7, 7), (2, 1), 16, 32, (15, 14)),
        ((5, 5), (2, 2), 3, 72, (29, 131)),
        ((5, 5), (4, 3), 40, 16, (11, 61)),
    ):
        case = tile_case((kernel, 2, 1), batch, channels, size, padding=padding, multiplier=2)
        check_sums(case, MARCH["grad_weight"], dtype, spoilt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_flat_grad_weight(spoilt: bool, dtype: torch.dtype) -> None:
    """Channels of less than a unit and as many as a block has threads, periods cut short, at any address."""
    images = (37, (141, 95)), (2, (430, 308)), (6, (307, 145)), (565, (23, 30)), (1001, (15, 27)), (21, (200, 230))
    for number, (channels, size) in enumerate(images):
        for offset in (0, 1, 3 + number):
            case = tile_case(((1, 1), 1, 1), 2 + (number + offset) % 3, channels, size)
            check_sums(case, FLAT, dtype, spoilt, (offset, offset), repeats=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_small_images(spoilt: bool, dtype: torch.dtype) -> None:
    """Images of up to 8 x 8, one group of them and many, few slabs of channels and more than multiprocessors."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 128, 96, (7, 7)),
        ((7, 5), (3, 2), 37, 40, (5, 6)),
        ((5, 7), (3, 3), 21, 32, (6, 8)),
        ((7, 7), (3, 3), 9, 64, (8, 8)),
        ((3, 3), (1, 1), 500, 32, (7, 7)),
        ((2, 3), (1, 1), 11, 4800, (4, 3)),
    ):
        case = Case(batch, channels, size, kernel, padding=padding)
        check_sums(case, MATRIX, dtype, spoilt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_grad_weight_of_arrays_that_begin_alike(spoilt: bool, dtype: torch.dtype) -> None:
    """Both as far behind 16 bytes, so that units carry channels of the pixel before; and one case where they do not."""
    for kernel, padding, batch, channels, size in (
        ((7, 7), (3, 3), 20, 96, (7, 7)),  # small images
        ((7, 5), (3, 2), 37, 40, (5, 6)),
        ((3, 3), (1, 1), 9, 136, (7, 7)),
        ((5, 7), (3, 3), 21, 32, (6, 8)),
        ((3, 3), (1, 1), 13, 72, (14, 14)),
        ((2, 3), (0, 2), 3, 192, (9, 30)),
        ((3, 3), (2, 1), 5, 64, (11, 16)),
        ((5, 5), (2, 2), 9, 40, (14, 28)),
        ((7, 7), (3, 3), 5, 96, (28, 28)),
        ((7, 9), (0, 8), 3, 32, (30, 31)),
        ((9, 9), (4, 4), 3, 40, (28, 28)),
        ((7, 7), (3, 3), 2, 64, (13, 131)),  # long rows
        ((2, 3), (1, 1), 3, 40, (9, 60)),
        ((7, 7), (3, 3), 9, 72, (19, 56)),
        ((5, 5), (2, 2), 21, 40, (11, 300)),
        ((9, 9), (4, 4), 13, 32, (10, 255)),
        ((7, 7), (3, 5), 15, 40, (11, 126)),
        ((3, 8), (1, 4), 40, 32, (7, 128)),
    ):
        case = Case(batch, channels, size, kernel, padding=padding)
        for offsets in ((1, 1), (5, 5), (4, 4), (7, 7), (3, 2)):
            check_sums(case, MATRIX, dtype, spoilt, offsets, repeats=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "kernel", [(9, 9), (7, 7), (5, 5), (3, 3), (8, 2), (7, 1), (1, 7), (6, 4), (2, 3), (4, 9), (3, 5)], ids=str
)
def test_grad_weight_in_channels_last_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Rows of one tile and of several, spans of columns, streams that begin and end anywhere, all paddings."""
    sizes = [(7, 7), (14, 14), (28, 28), (56, 56), (1, 1), (2, 9), (9, 2), (113, 15), (5, 130), (17, 34), (40, 300)]
    paddings = [(0, 0), halves(kernel), reach_of(kernel), (0, kernel[1] - 1)]
    for number, size in enumerate(sizes):
        for turn in range(5):
            channels, batch = [32, 96, 40, 37, 66][(number + turn) % 5], [1, 3, 33, 8][(number + turn) % 4]
            batch = min(batch, 1 + 12000 // (size[0] * size[1]))
            case = Case(batch, channels, size, kernel, padding=paddings[turn % 4])
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype, torch.channels_last)
            if turn == 1:
                problem.lay({"offset": 8}, {"steps": (1, 1, 2, 3)})
            elif turn == 2:
                problem.lay({"order": (2, 0, 3, 1), "steps": (2, 1, 1, 2), "offset": 5}, {"offset": 1})
            whole_units = channels % 8 == 0
            narrow = output_size(case)[3] <= 16 and whole_units
            pays = narrow if kernel == (3, 3) else whole_units if kernel == (5, 5) or kernel[0] > 7 else True
            assert (problem.check(MATRIX)["grad_weight"] == {MATRIX}) == pays, problem
            problem.bias = None
            problem.check(MATRIX)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("kernel", "size", "channels"), [(3, 14, 64), (5, 28, 40), (7, 28, 37), (7, 7, 96), (7, 56, 96), (9, 28, 64)]
)
def test_grad_weight_in_channels_last_repeats_bit_for_bit(
    kernel: int, size: int, channels: int, dtype: torch.dtype
) -> None:
    case = tile_case(((kernel, kernel), 1, 1), 16, channels, (size, size))
    problem = Problem(case, dtype, torch.channels_last, make=torch.randn)
    assert problem.check_repeats(MATRIX, repeats=300)["grad_weight"]


# ---------------------------------------------------------------------------- tensor cores


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (9, 9), (8, 3), (7, 9), (2, 3), (1, 9), (6, 1)], ids=str)
def test_toeplitz_channels_last_is_exact(kernel: tuple, dtype: torch.dtype) -> None:
    """Tiles of several images and of one, slabs and spans of all sorts, pixels, rows and images apart, any address."""
    sizes = [(7, 7), (1, 8), (14, 14), (13, 29), (28, 28), (31, 57), (9, 1), (56, 80), (40, 301), (301, 40)]
    for number, size in enumerate(sizes):
        for turn, padding in enumerate([halves(kernel), (0, 0), reach_of(kernel)]):
            channels = [8, 40, 64, 24, 136, 200][(number + turn) % 6]
            batch = [1, 3, 21, 8][(number + 2 * turn) % 4] if size[0] * size[1] < 1000 else 3
            case = Case(batch, channels, size, kernel, padding=padding, bias=turn % 2 == 0)
            if not case.has_outputs:
                continue
            problem, layout = Problem(case, dtype, torch.channels_last), (number + turn) % 4
            if layout == 1:
                problem.lay({"offset": 1}, {"offset": 4})
            elif layout == 2:
                problem.lay({"steps": (2, 1, 3, 2), "offset": 6}, weight=TAPS_FIRST)
            elif layout == 3:
                problem.lay({"order": (2, 3, 0, 1), "offset": 2}, {"order": (2, 0, 3, 1), "steps": (1, 1, 2, 1)})
            forced = problem.check()
            # Of an input whose rows are outermost the output is NCHW; one column meets one column of taps.
            if max(kernel) < 8 or stays_large(case):
                assert BAND in forced["grad_input"] and (BAND in forced["output"] or layout == 3), problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_toeplitz_channels_last_is_exact_at_stride_two(dtype: torch.dtype) -> None:
    """Two filters a channel: bands, spans and slabs of all sorts, at any address."""
    for number, size in enumerate([(7, 7), (8, 70), (9, 96), (56, 56), (33, 101), (113, 95), (70, 8), (20, 200)]):
        for turn in range(4):
            batch, channels = [1, 3, 40][turn % 3], [8, 40, 64, 136][(number + turn) % 4]
            side = [3, 0, 6][(number + turn) % 3]
            case = Case(batch, channels, size, (7, 7), (2, 2), (side, side), multiplier=2, bias=turn % 2 == 0)
            problem = Problem(case, dtype, torch.channels_last)
            if turn:
                problem.lay({"offset": [1, 2, 4][turn - 1]}, {"offset": turn})
            if turn == 3:  # columns of the weights apart, and rows side by side
                problem.lay(weight={"order": (0, 1, 3, 2)})
            forced = problem.check()
            assert BAND in forced["output"] & forced["grad_input"], problem


# Kernels that are tall, wide, or as large as images, and sizes for which they are served with a padding of half of
# them.
LARGE_BANDS = [
    ((13, 13), [(28, 28), (14, 14), (7, 8), (9, 150)]),
    ((10, 17), [(31, 57), (13, 29), (301, 40)]),
    ((17, 11), [(57, 31), (40, 301)]),
    ((12, 2), [(28, 20)]),
    ((5, 51), [(56, 56), (30, 57), (9, 230)]),
    ((51, 5), [(56, 56), (57, 30), (230, 9)]),
    ((3, 57), [(14, 28), (6, 113)]),
    ((40, 1), [(40, 9)]),
    ((27, 27), [(14, 14), (7, 7), (13, 16), (16, 9), (1, 14)]),
    ((21, 35), [(14, 14)]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kernel", "sizes"), LARGE_BANDS, ids=str)
def test_toeplitz_channels_last_is_exact_for_large_kernels(kernel: tuple, sizes: list, dtype: torch.dtype) -> None:
    for number, size in enumerate(sizes):
        for turn in range(4):
            channels, batch = [8, 40, 64, 24][(number + turn) % 4], [3, 17, 1, 8][(number + 2 * turn) % 4]
            padding = [halves(kernel), (0, 0), reach_of(kernel)][turn % 3]
            case = Case(batch, channels, size, kernel, padding=padding, bias=turn % 2 == 0)
            if not case.has_outputs:
                continue
            problem = Problem(case, dtype, torch.channels_last)
            if turn == 1:
                problem.lay({"offset": 1}, {"offset": 4})
            elif turn == 3:
                problem.lay({"steps": (2, 1, 3, 2), "offset": 8}, weight=TAPS_FIRST)
            forced = problem.check()
            assert BAND in forced["output"] & forced["grad_input"] or turn % 3 > 0, problem
            problem.spoil((0, 1, -1, 2 % size[1]), (-1, 2, 0, 0), of=["input"])
            problem.spoil((0, 3, 0, -1), of=["grad_output"])
            problem.check(BAND)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("side", [5, 7, 9, 13])
@pytest.mark.parametrize(
    ("batch", "size"),
    [(128, (7, 7)), (131, (7, 7)), (41, (14, 14)), (18, (28, 28)), (7, (20, 60)), (3, (9, 140))],
    ids=str,
)
def test_toeplitz_channels_last_shares_many_images(batch: int, size: tuple, side: int, dtype: torch.dtype) -> None:
    """Blocks that go from image to image, in whole groups of them and cut anywhere, the last group lacking some."""
    problem = Problem(tile_case(((side, side), 1, 1), batch, 1032, size), dtype, torch.channels_last)
    forced = problem.check(BAND)
    assert forced["output"] and forced["grad_input"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (9, 9), (13, 13), (5, 31), (27, 27)], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(9, 72, (14, 13)), (21, 8, (7, 8)), (5, 40, (6, 60)), (3, 32, (5, 150)), (1, 8, (1, 1))],
    ids=str,
)
def test_toeplitz_channels_last_of_arrays_that_begin_anywhere(
    batch: int, channels: int, size: tuple[int, int], kernel: tuple, dtype: torch.dtype
) -> None:
    """All places within 16 bytes, with gaps and without, and one image, or row, that stands for all."""
    case = Case(batch, channels, size, kernel, padding=halves(kernel))
    layouts: list[dict] = [{"offset": offset} for offset in range(1, 8)]
    layouts += [{"offset": 3, "steps": (2, 1, 1, 2)}, {"offset": 5, "expanded": (0,)}, {"offset": 1, "expanded": (2,)}]
    for layout in layouts if size == (14, 13) else layouts[::3]:
        problem = Problem(case, dtype, torch.channels_last)
        problem.lay(layout, layout)
        forced = problem.check(BAND)
        if size == (14, 13):
            assert forced["grad_input"] and (forced["output"] or "expanded" in layout), problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [(14, 14), (56, 60)], ids=str)
def test_toeplitz_channels_last_repeats_bit_for_bit(size: tuple, dtype: torch.dtype) -> None:
    kernels = ((5, 5), (7, 7), (9, 9), (13, 13), (5, 31), (31, 5), *(((27, 27),) if size[0] == 14 else ()))
    cases = [tile_case((kernel, 1, 1), 16, 200, size) for kernel in kernels]
    cases += [tile_case(((7, 7), 2, 1), 16, 72, size, multiplier=2)]
    for case in cases:
        problem = Problem(case, dtype, torch.channels_last, make=torch.randn)
        assert problem.check_repeats(BAND, repeats=300)["output"]
