"""All plans, on problems as small as they claim, for NVIDIA's compute-sanitizer to watch. Results are compared with the
exact ones.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

(or initcheck, synccheck, and racecheck, for which it takes a build of its own: see README.md). Without the caching
allocator every tensor is an allocation of its own, so that nothing next to it can be touched unseen.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import product

import torch
from common import Case, integers, make_inputs, run_float64
from exact import output_size, wrong_numbers
from plans import results_of_plans

CASES = [
    Case(3, 8, (14, 14), (3, 3), padding=(1, 1)),
    Case(2, 5, (9, 13), (3, 3), padding=(1, 1)),
    Case(2, 3, (20, 21), (3, 3), (2, 2), (1, 1)),
    Case(2, 16, (28, 28), (5, 5), padding=(2, 2)),
    Case(17, 8, (7, 7), (5, 5), (2, 2), (2, 2)),
    Case(33, 16, (7, 7), (7, 7), padding=(3, 3)),
    Case(2, 16, (30, 32), (7, 7), padding=(3, 3)),
    Case(2, 8, (16, 18), (7, 7), (2, 2), (3, 3), multiplier=2),
    Case(2, 4, (12, 16), (3, 3), padding=(1, 1), multiplier=2),
    Case(2, 4, (16, 16), (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case(2, 8, (16, 24), (1, 11), padding=(0, 5)),
    Case(2, 8, (24, 16), (11, 1), padding=(5, 0)),
    Case(2, 8, (12, 10), (1, 1)),
    Case(2, 16, (15, 16), (9, 9), padding=(4, 4)),
    Case(17, 8, (14, 14), (13, 13), padding=(6, 6)),
    Case(2, 8, (27, 28), (21, 21), padding=(10, 10)),
    Case(4, 8, (24, 24), (5, 25), padding=(2, 12)),
    Case(4, 8, (24, 24), (25, 5), padding=(12, 2)),
    Case(17, 8, (14, 14), (27, 27), padding=(13, 13)),
    Case(16, 8, (14, 14), (3, 3), padding=(1, 1)),
    Case(2, 32, (12, 12), (5, 5), padding=(2, 2)),
]
RUNS = list(product(CASES, (torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)))
# float64 has ways of its own.
FLOAT64 = [Case(17, 3, (7, 7), (3, 3), padding=(1, 1)), Case(2, 5, (28, 28), (5, 5), (2, 2), (2, 2), multiplier=2)]
FLOAT64 += [Case(2, 3, (60, 61), (13, 13), padding=(6, 6))]
RUNS += list(product(FLOAT64, (torch.float64,), (torch.contiguous_format, torch.channels_last)))
# Kernels that march down planes claim no less than what every warp of a GPU has some rows of.
RUNS.append((Case(1, 4, (65600, 35), (7, 7), padding=(3, 3)), torch.float32, torch.contiguous_format))
RUNS.append((Case(1, 3, (33000, 56), (7, 7), (2, 2), (3, 3), multiplier=2), torch.float32, torch.contiguous_format))
# Pixels that are no whole units of 16 bytes: as many as 1x1 asks for, and more channels than a block has threads.
RUNS.append((Case(2, 37, (60, 121), (1, 1)), torch.bfloat16, torch.channels_last))
RUNS.append((Case(2, 450, (6, 9), (3, 3), padding=(1, 1)), torch.float32, torch.channels_last))
# Others take no fewer planes than all of its multiprocessors have some of.
MANY_PLANES = [
    (Case(16, 34, (56, 56), (51, 5), padding=(25, 2)), torch.bfloat16, torch.contiguous_format),
    (Case(16, 264, (28, 28), (29, 29), padding=(14, 14)), torch.bfloat16, torch.contiguous_format),
    (Case(4, 8, (56, 56), (31, 31), padding=(15, 15)), torch.bfloat16, torch.contiguous_format),
    (Case(32, 128, (14, 14), (27, 27), padding=(13, 13)), torch.bfloat16, torch.contiguous_format),
    (Case(16, 64, (28, 28), (13, 13), padding=(6, 6)), torch.bfloat16, torch.channels_last),
    (Case(16, 264, (28, 28), (9, 9), padding=(4, 4)), torch.float32, torch.contiguous_format),
    (Case(64, 128, (12, 28), (9, 9), padding=(4, 4)), torch.float32, torch.channels_last),
]
RUNS += MANY_PLANES
# Problems of phases have much to compute.
MUCH = (
    Case(8, 24, (41, 40), (15, 15), padding=(14, 14), dilation=(2, 2)),
    Case(8, 24, (81, 80), (21, 19), (3, 3), (9, 9)),
)
RUNS += product(MUCH, (torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("I", "N"), default=(0, 1), help="every N-th run, from I on"
    )
    parser.add_argument("--plan", default="", metavar="REGEX", help="only plans whose name has a match")
    args = parser.parse_args()
    ran: Counter[str] = Counter()
    wrong = 0
    for case, dtype, memory_format in RUNS[args.share[0] :: args.share[1]]:
        drawn = make_inputs(case, dtype, "cpu", memory_format, integers)
        grad = integers(*output_size(case)).to(dtype).contiguous(memory_format=memory_format)
        exact = run_float64(drawn, grad, **case.geometry)._asdict()
        tensors = tuple(tensor.cuda() for tensor in drawn)
        channels_last = memory_format == torch.channels_last
        for name, plan, result in results_of_plans(case, tensors, grad.cuda(), channels_last, True, args.plan):
            ran[plan] += 1
            result = result.round() if plan.startswith("fft") else result
            bad = wrong_numbers(result.cpu(), exact[name].round())
            wrong += bad > 0
            if bad:
                print(f"{plan}: {name} of {case}, {dtype}, {memory_format}: {bad} wrong numbers")
    torch.cuda.synchronize()
    print(f"{ran.total()} results of {len(ran)} plans, {wrong} of them wrong: {dict(sorted(ran.items()))}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
