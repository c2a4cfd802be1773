"""Paired timing: two functions alternate, so that disturbances by other programs affect both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, minimum and maximum of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Paired(NamedTuple):
    """Seconds of both functions and of their ratio within a pair, ours / baseline."""

    baseline: Spread
    ours: Spread
    ratio: Spread


def time_once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_pairs(baseline: Callable[[], object], ours: Callable[[], object], repeats: int) -> Paired:
    """Both calls ``repeats`` times, in alternating order, after one untimed call of each.

    The ratio is the median of the pairs' ratios: slow drifts of the machine cancel in a pair.
    """
    calls = (baseline, ours)
    seconds: tuple[list[float], list[float]] = ([], [])
    for call in calls:
        call()
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            seconds[which].append(time_once(calls[which]))
    ratios = [o / b for b, o in zip(*seconds, strict=True)]
    return Paired(Spread.of(seconds[0]), Spread.of(seconds[1]), Spread.of(ratios))
