"""What a run learns about a model: how loose the bounds on its losses are, by layer and phase.

The ratio of loss to bound is that of budget.py. Pure functions; profile.py keeps the results.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .budget import lost_per_bound

#: Parts of a run for which a layer's ratio is learned on its own.
PHASES = 5
#: No learned ratio is taken for less or more than this: a few samples may see next to nothing.
RATIOS = (2.0**-7, 8.0)


class Audit(NamedTuple):
    """One audited call: the part of the run done with it (0..1], and two means over rows."""

    layer: str
    position: float
    lost: float
    bound: float


def phase(position: float) -> int:
    """The part of the run, 0 to ``PHASES`` - 1, in which ``position`` (0..1] lies."""
    return min(max(math.ceil(position * PHASES - 1e-6) - 1, 0), PHASES - 1)


def learn(audits: Iterable[Audit]) -> dict[str, tuple[float, ...]]:
    """Loss over bound of each layer in each phase, ``[PHASES]``, over all conditionings.

    Few measurements count beside ``PRIOR``, as in a ledger. A phase without any, as the first one
    of a short run, takes the ratio of the next phase that has some, else of the one before.
    """
    sums: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0] * 3 for _ in range(PHASES)])
    for audit in audits:
        if audit.bound > 0:
            entry = sums[audit.layer][phase(audit.position)]
            for i, value in enumerate((audit.lost, audit.bound, 1.0)):
                entry[i] += value
    return {layer: _filled([_ratio(*entry) for entry in phases]) for layer, phases in sums.items()}


def _ratio(lost: float, bound: float, audits: float) -> float | None:
    if not audits:
        return None
    ledger = torch.tensor([0, lost, bound, audits], dtype=torch.float64, device="cpu")
    return min(max(float(lost_per_bound(ledger)), RATIOS[0]), RATIOS[1])


def _filled(ratios: list[float | None]) -> tuple[float, ...]:
    """Every phase with a ratio: its own, the next known one, or the last one."""
    filled: list[float] = []
    known = next(ratio for ratio in reversed(ratios) if ratio is not None)
    for ratio in reversed(ratios):
        known = known if ratio is None else ratio
        filled.insert(0, known)
    return tuple(filled)
