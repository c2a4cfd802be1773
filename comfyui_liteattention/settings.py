"""What a user can choose, checked once and never changed afterwards."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from typing import TypedDict, get_args

from .backends.base import Criterion
from .backends.modes import Wanted
from .token_order import TokenOrder, TokenRanges

#: A threshold at or below this never skips a tile.
SAFEST = -40.0

MAX_LAYER = 999
#: Upper limit of ``audit``: even the longest videos have fewer query tiles than this.
RAREST_AUDIT = 4096

NOT_NEGATIVE = "must be negative (log2 units; more negative is safer, try -4)"
NO_FRACTION = "is a fraction of the run and must lie between 0 and 1"
EXAMPLES = {
    "closeness": "42",
    "budget": "0.03",
    "threshold": "-4",
    "ramp": "2",
    "warmup": "0.1",
    "audit": "64",
    "min_tokens": "2048",
}


@dataclass(frozen=True)
class Settings:
    """How much may be skipped, and what never is.

    closeness
        How close the video should come to the dense one of the same seed, at least, in dB of PSNR.
        The noise levels of the run then set what each step may lose (budget/closeness.py;
        calibrated on the demo's model); that loss is measured and held as with a budget.
        ``threshold`` and ``ramp`` are ignored. None: no such goal.
    budget
        How much of the attention may be lost, 0..1: the lost mass, averaged over the rows, layers
        and steps of a run, is measured while it runs and held at or below this; ``threshold`` is
        ignored. None: no budget.
    threshold
        log2, negative; more negative is safer. With the ``mass`` criterion a row of the attention
        matrix loses less than ``2**threshold`` of its softmax sum in the call in which its tiles
        are marked (each tile less than that divided by the number of key tiles). With the ``gap``
        criterion every probability in a skipped tile is below ``2**threshold`` times the largest
        of its row. ``SAFEST`` (-40) and below: nothing is ever skipped.
    criterion
        ``mass`` or ``gap``: the score that the threshold is compared with, defined in
        :class:`.backends.base.Attended`.
    ramp
        The threshold at position ``u`` (0..1] of the run is ``threshold + ramp * log2(u)``: strict
        at first, because early errors do the most damage. 0 switches the ramp off.
    warmup
        Fraction of the run, from its start, in which nothing is marked for skipping.
    dense_layers
        Layers, counted from 0 in the order of execution, that never skip.
    dense_keys, dense_queries
        Token ranges ``(start, end)``, end exclusive: key tokens that every query sees, and query
        tokens that see every key. Tiles that they touch only in part count as touched.
    order
        ``compact`` lists the video tokens so that every tile is a compact piece of the video, where
        the token grid is known; ``raster`` leaves them in the model's order.
    audit
        One in this many query tiles is also computed in full, another one at every call; the
        difference is the measured lost mass. 0 switches the audit off.
    tail
        Skipped tiles still contribute their mean (tail.py), as far as the audit finds that this
        helps; without an audit they don't.
    min_tokens
        Shorter sequences stay dense.
    never_slower
        Leave calls to the user's own attention as long as that is the faster one, and switch
        off for a run in which it stays so (never_slower/).
    mode
        How a graphics card multiplies: ``native``, as precisely as 16 bits do; ``int8``, queries
        and keys in 8 bits; ``fp8``, weights and values as well (RTX 40, 50). The later, the faster
        and the less precise. ``auto``: the fastest that is as exact as your own attention, native
        where that is in 16 bits. Where a mode isn't there, the next more exact one is taken; the
        CPU has native alone.
    """

    closeness: float | None = None
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
    mode: Wanted = "auto"

    def __post_init__(self) -> None:
        for name in ("dense_layers", "dense_keys", "dense_queries"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        for name, problem in _problems(self):
            raise ValueError(f"LiteAttention: {name}={getattr(self, name)!r}: {problem}.")

    @cached_property
    def skips(self) -> bool:
        """Whether these settings can skip anything at all."""
        return self.measured or self.threshold > SAFEST

    @cached_property
    def measured(self) -> bool:
        """Whether the threshold follows from what is lost, as it is measured."""
        return self.closeness is not None or self.budget is not None


class Options(TypedDict, total=False):
    """The fields of :class:`Settings` that are no goals (``closeness``, ``budget``, ``threshold``),
    as keyword arguments."""

    criterion: Criterion
    ramp: float
    warmup: float
    dense_layers: Sequence[int]
    dense_keys: Sequence[Sequence[int]]
    dense_queries: Sequence[Sequence[int]]
    order: TokenOrder
    audit: int
    tail: bool
    min_tokens: int
    never_slower: bool
    mode: Wanted
    qk: Wanted  # the name of mode before


def describe(settings: Settings) -> str:
    """The settings that differ from the defaults, as ``name=value, ...``; for logs and reports."""
    shown = [f.name for f in fields(settings) if getattr(settings, f.name) != f.default]
    main = next((name for name in ("closeness", "budget") if name in shown), "threshold")
    names = [main, *(name for name in shown if name not in ("closeness", "budget", "threshold"))]
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0, 1, 38-39"`` -> ``(0, 1, 38, 39)``; ValueError says what is wrong with the text.

    Chinese commas and long dashes do as well.
    """
    text = unicodedata.normalize("NFKC", text)  # full-width signs become usual ones
    layers: set[int] = set()
    for part in filter(None, (p.strip() for p in re.split("[,\u3001]", text))):
        ends = [end.strip() for end in re.split("[-~\u2013\u2014]", part)]
        if len(ends) > 2 or not all(end.isdecimal() and int(end) <= MAX_LAYER for end in ends):
            raise ValueError(
                f"dense_layers: {part!r} is neither a layer from 0 to {MAX_LAYER} nor a range of "
                "them. Write, for example: 0, 1, 38-39"
            )
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise ValueError(f"dense_layers: {part!r} runs backwards. Write: {last}-{first}")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _problems(s: Settings) -> Iterator[tuple[str, str]]:
    """What is wrong with each field; types first, since the rest compares numbers."""
    wrong = dict(_of_other_types(s))
    yield from wrong.items()
    checks: dict[str, Callable[[Settings], str | None]] = {
        "closeness": _closeness_problem,
        "budget": _budget_problem,
        "threshold": lambda s: None if s.threshold < 0 else NOT_NEGATIVE,
        "ramp": lambda s: None if 0 <= s.ramp <= 8 else "must lie between 0 (no ramp) and 8",
        "warmup": lambda s: None if 0 <= s.warmup <= 1 else NO_FRACTION,
        "audit": _audit_problem,
        "min_tokens": lambda s: "must be 0 or more" if s.min_tokens < 0 else None,
    }
    for name, check in checks.items():
        problem = None if name in wrong else check(s)
        if problem is not None:
            yield name, problem
    if s.measured and s.criterion != "mass":
        yield "criterion", "closeness and budget go by lost mass and need criterion='mass'"


def _of_other_types(s: Settings) -> Iterator[tuple[str, str]]:
    """Fields of a wrong type, and what to write instead."""
    for name in ("closeness", "budget", "threshold", "ramp", "warmup"):
        value = getattr(s, name)
        missing = value is None and name in ("closeness", "budget")
        if not missing and not _is_number(value):
            yield name, f"must be a number, for example {name}={EXAMPLES[name]}"
    for name in ("audit", "min_tokens"):
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool):
            yield name, f"must be a whole number, for example {name}={EXAMPLES[name]}"
    for name in ("tail", "never_slower"):
        if not isinstance(getattr(s, name), bool):
            yield name, "must be True or False"
    for name, kind in (("criterion", Criterion), ("order", TokenOrder), ("mode", Wanted)):
        if getattr(s, name) not in get_args(kind):
            yield name, f"must be one of {', '.join(get_args(kind))}"
    if not _are_layers(s.dense_layers):
        yield (
            "dense_layers",
            "must be layers counted from 0, for example dense_layers=(0, 1)",
        )
    for name in ("dense_keys", "dense_queries"):
        if not _are_ranges(getattr(s, name)):
            yield name, f"must be token ranges with 0 <= start < end, for example {name}=((0, 64),)"


def _closeness_problem(s: Settings) -> str | None:
    if s.closeness is None:
        return None
    if s.budget is not None:
        return "excludes a budget; give one of them"
    return None if 20 <= s.closeness <= 80 else "is dB of PSNR to the dense video, 20 to 80; try 42"


def _budget_problem(s: Settings) -> str | None:
    if s.budget is None or 0 < s.budget < 1:
        return None
    return "is the fraction of the attention that may be lost; try 0.01"


def _audit_problem(s: Settings) -> str | None:
    if not 0 <= s.audit <= RAREST_AUDIT:
        return f"must be 0 (off) or the number of query tiles per audited one, up to {RAREST_AUDIT}"
    if s.audit == 0 and s.measured:
        goal = "closeness" if s.budget is None else "budget"
        return f"a {goal} needs the audit, which measures the loss; try 64"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_layers(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_LAYER for i in value
    )


def _are_ranges(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(one, tuple)
        and len(one) == 2
        and all(isinstance(end, int) for end in one)
        and 0 <= one[0] < one[1]
        for one in value
    )


def _tuples(value: object) -> object:
    """Lists as tuples, nested ones too, so that settings can be compared and hashed."""
    return tuple(_tuples(x) for x in value) if isinstance(value, (list, tuple, range)) else value
