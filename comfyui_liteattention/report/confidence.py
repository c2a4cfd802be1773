"""What a layer loses at a step, with an interval, from the audits around that step. Pure functions.

A single audit sees only a few rows. But the ratio of loss to bound (budget/ledger.py) changes
slowly from step to step, so a layer's audits at neighbouring steps are treated as samples of the
same ratio: their spread gives its standard error. Multiplied by the bound of the step, the ratio
and its error become a loss with an interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

#: Steps to each side whose audits count. With fewer, the interval is needlessly wide; with more,
#: the ratio has changed too much. ``benchmarks.budget`` counts how often the truth lies within.
REACH = 3
#: 97.5 % points of Student's t distribution with 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45)

K = TypeVar("K", bound=Hashable)


class Sample(NamedTuple):
    """What an audited call lost, and its bound: means over the audited rows."""

    layer: str
    step: int
    lost: float
    bound: float


class Interval(NamedTuple):
    """A mean lost mass, 0..1, and where it lies with 95 % confidence."""

    lost: float
    low: float
    high: float


def intervals(samples: Iterable[Sample]) -> dict[tuple[str, int], Interval]:
    """The interval of each (layer, step), over its conditionings; none where there are too few
    audits at neighbouring steps."""
    layers: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.bound > 0:
            layers[sample.layer][sample.step].append(sample)
    found = {}
    for layer, steps in layers.items():
        means = {step: _mean(group) for step, group in steps.items()}
        for step, (_, bound) in means.items():
            near = [mean for other, mean in means.items() if abs(other - step) <= REACH]
            if len(near) > 1:
                found[layer, step] = _interval(near, bound)
    return found


def mean(parts: Iterable[Interval]) -> Interval:
    """The mean of several losses, its interval as wide as if their errors were fully correlated."""
    parts = tuple(parts)
    return Interval(*(sum(values) / len(parts) for values in zip(*parts, strict=True)))


def of_layers(cells: Mapping[tuple[str, int], Interval]) -> dict[str, Interval]:
    """The mean over the steps of each layer."""
    return _means((layer, interval) for (layer, _), interval in cells.items())


def of_steps(cells: Mapping[tuple[str, int], Interval]) -> dict[int, Interval]:
    """The mean over the layers of each step."""
    return _means((step, interval) for (_, step), interval in cells.items())


def _means(parts: Iterable[tuple[K, Interval]]) -> dict[K, Interval]:
    groups: dict[K, list[Interval]] = defaultdict(list)
    for key, interval in parts:
        groups[key].append(interval)
    return {key: mean(group) for key, group in groups.items()}


def _mean(group: list[Sample]) -> tuple[float, float]:
    """Mean loss and bound. Conditionings audit the same rows, so together they are one sample."""
    return sum(s.lost for s in group) / len(group), sum(s.bound for s in group) / len(group)


def _interval(near: list[tuple[float, float]], bound: float) -> Interval:
    lost, bounds = (sum(values) for values in zip(*near, strict=True))
    ratio = lost / bounds
    # Relative deviations, because losses and their errors grow in the course of a run.
    squares = (
        sum((own_lost / own_bound / ratio - 1) ** 2 for own_lost, own_bound in near) if lost else 0
    )
    error = math.sqrt(squares / (len(near) - 1) / len(near)) * STUDENT[len(near) - 2]
    loss = ratio * bound
    return Interval(loss, max(0.0, loss * (1 - error)), min(1.0, loss * (1 + error)))
