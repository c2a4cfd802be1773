"""What a user can choose, checked once and never changed afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import get_args

from .backends.base import Criterion, Qk
from .token_order import TokenOrder, TokenRanges

#: A threshold at or below this never skips a tile.
SAFEST = -40.0

MAX_LAYER = 999


@dataclass(frozen=True)
class Settings:
    """How much may be skipped, and where never.

    budget
        How much of the attention may be lost, 0..1: the lost mass, mean over the rows, layers and
        steps of a run, is measured while it runs and held at or below this. The threshold then
        follows from it, and ``threshold`` is ignored. None: no budget.
    threshold
        log2, negative; more negative is safer. With the ``mass`` criterion a row of the attention
        matrix loses less than ``2**threshold`` of its softmax sum in the call in which its tiles
        are marked (each tile less than that divided by the number of key tiles). With the ``gap``
        criterion every probability in a skipped tile is below ``2**threshold`` times the largest
        of its row. ``SAFEST`` (-40) and below: nothing is ever skipped.
    criterion
        ``mass`` or ``gap``: the score that the threshold is compared with (design: backends/base).
    ramp
        The threshold at position ``u`` (0..1] of the run is ``threshold + ramp * log2(u)``: strict
        at first, because errors made early travel furthest. 0 switches the ramp off.
    warmup
        Fraction of the run, from its start, in which nothing is marked for skipping.
    dense_layers
        Layers, counted from 0 in the order of execution, that never skip.
    dense_keys, dense_queries
        Token ranges ``(start, end)``, end exclusive: key tokens that every query sees, and query
        tokens that see every key. Tiles that they touch only in part count as touched.
    order
        ``compact`` lists the video tokens so that every tile is a compact piece of the video, where
        the model tells its grid; ``raster`` leaves them in the model's order.
    audit
        One in this many query tiles is also computed in full, another one at every call; the
        difference is the measured lost mass. 0 switches the audit off.
    tail
        Skipped tiles still contribute their mean (tail.py), as far as the audit finds that this
        helps; without an audit they don't.
    min_tokens
        Shorter sequences stay dense.
    never_slower
        Use the attention that would be used otherwise as long as it is the faster one, and switch
        off for a run in which it stays so (never_slower.py).
    qk
        How a graphics card multiplies queries and keys: ``native``, in their own dtype, or
        ``int8``, meant to be faster on some cards, and less precise. Where there is no INT8 kernel,
        and on the CPU, it is native all the same.
    """

    budget: float | None = None
    threshold: float = -0.3
    criterion: Criterion = "mass"
    ramp: float = 2.0
    warmup: float = 0.0
    dense_layers: tuple[int, ...] = ()
    dense_keys: TokenRanges = ()
    dense_queries: TokenRanges = ()
    order: TokenOrder = "compact"
    audit: int = 64
    tail: bool = True
    min_tokens: int = 2048
    never_slower: bool = True
    qk: Qk = "native"

    def __post_init__(self) -> None:
        for name, problem in _problems(self):
            raise ValueError(f"LiteAttention: {name}={getattr(self, name)!r}: {problem}.")

    @property
    def skips(self) -> bool:
        """Whether these settings can skip anything at all."""
        return self.budget is not None or self.threshold > SAFEST


def describe(settings: Settings) -> str:
    """The settings that differ from the defaults, as ``name=value, ...``; for logs and reports."""
    main = "threshold" if settings.budget is None else "budget"
    shown = [f.name for f in fields(settings) if getattr(settings, f.name) != f.default]
    names = [main, *(name for name in shown if name not in ("threshold", "budget"))]
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0, 1, 38-39"`` -> ``(0, 1, 38, 39)``; ValueError says what is wrong with the text."""
    layers: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isdecimal() and int(end) <= MAX_LAYER for end in ends):
            raise ValueError(
                f"dense_layers: {part!r} is neither a layer from 0 to {MAX_LAYER} nor a range of "
                "them. Write, for example: 0, 1, 38-39"
            )
        layers.update(range(int(ends[0]), int(ends[-1]) + 1))
    return tuple(sorted(layers))


def _problems(s: Settings):
    if s.budget is not None:
        if not 0 < s.budget < 1:
            yield "budget", "is the fraction of the attention that may be lost; try 0.01"
        if s.criterion != "mass":
            yield "criterion", "a budget is lost mass and needs criterion='mass'"
        if s.audit == 0:
            yield "audit", "a budget needs the audit, which measures the loss; try 64"
    if not (isinstance(s.threshold, (int, float)) and s.threshold < 0):
        yield "threshold", "must be negative (log2 units; more negative is safer, try -4)"
    if s.criterion not in get_args(Criterion):
        yield "criterion", f"must be one of {', '.join(get_args(Criterion))}"
    if s.order not in get_args(TokenOrder):
        yield "order", f"must be one of {', '.join(get_args(TokenOrder))}"
    if s.qk not in get_args(Qk):
        yield "qk", f"must be one of {', '.join(get_args(Qk))}"
    if not 0 <= s.ramp <= 8:
        yield "ramp", "must lie between 0 (no ramp) and 8"
    if not 0 <= s.warmup <= 1:
        yield "warmup", "is a fraction of the run and must lie between 0 and 1"
    if any(not isinstance(i, int) or i < 0 for i in s.dense_layers):
        yield "dense_layers", "must be layer numbers counted from 0"
    for name in ("dense_keys", "dense_queries"):
        if any(not 0 <= start < end for start, end in getattr(s, name)):
            yield name, "must be (start, end) token ranges with 0 <= start < end"
    if s.audit < 0:
        yield "audit", "must be 0 (off) or the number of query tiles per audited one"
    if s.min_tokens < 0 or not math.isfinite(s.min_tokens):
        yield "min_tokens", "must be a number of tokens, 0 or more"
