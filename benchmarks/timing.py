"""Device time of a call: cold L2, all contestants alike.

A call is captured many times into one CUDA graph, each time on its own set of tensors, together larger than L2, so that
no call finds its data there; the outputs are kept, so that they too are new memory each time. One replay divided by the
number of calls gives the time of one. Replays are queued one behind the other with an event between each two, so that
the host is ahead of the device and neither its part nor the latency of a launch is in the figure, which is the median.
Calls that take milliseconds, and those that cannot be captured, are queued in the same way without a graph.

Without a GPU the host's clock times each call: enough to exercise the benchmarks, not to judge by.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_SETS = 512
MEMORY_SHARE = 0.4  # of the device's memory, for all the sets
MIN_REPLAY_US = 500.0  # what lies between two replays, an event and a launch, is then less than 1 %
WARM_UP_US = 3e3  # of replays, for the clocks
LONG_US = 2e3  # from here on a graph resolves nothing more


@dataclass(frozen=True)
class Time:
    """Median device time of a call and half the distance of the quartiles, in microseconds."""

    us: float
    spread: float


def number_of_sets(bytes_per_call: int) -> int:
    """So many that their data is at least twice L2 and at least three, as far as memory goes."""
    if DEVICE == "cpu":
        return 2
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    wanted = min(MAX_SETS, max(3, -(-2 * properties.L2_cache_size // bytes_per_call)))
    fitting = int(MEMORY_SHARE * properties.total_memory) // (2 * bytes_per_call)
    return max(2, min(wanted, fitting))


def _host_us(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def _durations(runs: Iterable[Callable[[], Any]], kept: int = 1) -> list[float]:
    """Device times in microseconds of all runs but the first: while that one runs, the host gets ahead."""
    marks: list[torch.cuda.Event] = []
    results: deque[Any] = deque(maxlen=kept)
    for run in runs:
        results.append(run())
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    marks[-1].synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in pairwise(marks)]


def _summary(times: Sequence[float], calls: int = 1) -> Time:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3
    return Time(median / calls, (upper - lower) / 2 / calls)


def _capture(calls: Sequence[Callable[[], Any]], rounds: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of `rounds` times all calls, and what they return: its memory lives as long as that."""
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            results.extend(call() for call in calls)
    return graph, results


def measure(calls: Sequence[Callable[[], Any]], budget_us: float = 60e3, capturable: bool = True) -> Time:
    """Times `calls`, the same computation on two or more sets of tensors, in about `budget_us` of device time."""
    calls[0]()  # lazy initialisation, cuDNN's search
    if DEVICE == "cpu":
        return _summary([_host_us(call) for call in calls])
    first = min(_durations([calls[1], calls[0], calls[1]], len(calls)))
    if first > LONG_US:  # it may be the host that was held up
        first = min(first, *_durations([calls[1], calls[0], calls[1]], len(calls)))
    if first > LONG_US or not capturable:
        count = max(3, min(25, int(budget_us / first)))
        return _summary(_durations(islice(cycle(calls), count + 1), len(calls)))

    graph, results = _capture(calls, 1)
    total = min(_durations([graph.replay] * 3))
    rounds = math.ceil(MIN_REPLAY_US / total)
    if rounds > 1:
        del graph, results
        graph, results = _capture(calls, rounds)
        total *= rounds
    warm_up, replays = int(WARM_UP_US / total), max(3, min(25, int(budget_us / total)))
    return _summary(_durations([graph.replay] * (1 + warm_up + replays))[warm_up:], rounds * len(calls))
