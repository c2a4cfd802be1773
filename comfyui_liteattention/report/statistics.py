"""Statistics of a run -> numbers and a text table. Pictures are in ``pictures.py``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..budget.closeness import CALIBRATION, Expected, expected_closeness
from ..eligibility import CROSS_ATTENTION
from .confidence import Interval, Sample, intervals, of_layers, of_steps

if TYPE_CHECKING:
    from .map_history import StepMap


NOTHING = Interval(0.0, 0.0, 0.0)


class CallStats(NamedTuple):
    """One attention call of one stream; ``lost`` is None where nothing was audited, ``bound`` (at
    most that much was expected) where no budget was held either. ``waits``: the user's own
    attention did it, since it was the faster one yet."""

    step: int
    layer: str
    stream: str
    tokens: int
    computed: int
    total: int
    lost: float | None
    bound: float | None = None
    seconds: float = 0.0
    waits: bool = False


class MapStats(NamedTuple):
    """Share of heads in which a tile was live at the end of the run, ``live [Tq, Tk]`` 0..1."""

    layer: str
    stream: str
    tokens: int
    live: Tensor


@dataclass(frozen=True)
class RunReport:
    """What remains of a run.

    ``dense_rate``: seconds that the user's own attention takes for a tile of a call, None if it
    wasn't timed.
    ``history``: small maps of a few layers at each step but the first, which is dense.
    ``allowed``: lost mass that the budget or the closeness allows at each step, empty without one.
    ``stopped``: why the run went on densely from some point. ``notes``: what else people should
    know. ``levels``: noise at the beginning of each step and at the end, 0..1.
    """

    settings: str
    backend: str
    steps: int
    seconds: float
    step_seconds: dict[int, float]
    calls: tuple[CallStats, ...]
    reasons: dict[str, int]
    maps: tuple[MapStats, ...]
    allowed: tuple[float, ...] = ()
    stopped: str | None = None
    notes: tuple[str, ...] = ()
    dense_rate: float | None = None
    history: tuple[StepMap, ...] = ()
    levels: tuple[float, ...] = ()

    @property
    def active(self) -> bool:
        """Whether any tile was skipped."""
        return not all(map(_dense, self.calls))

    @property
    def tokens(self) -> int:
        """Length of the longest sequence that LiteAttention computed; 0 where it computed none."""
        return max((call.tokens for call in self.calls), default=0)

    @property
    def computed_fraction(self) -> float:
        """Tiles computed over all tiles of the calls that LiteAttention computed or that waited for
        it, 0..1, audits counted; 1.0 where there were none. What else was left to the user's own
        attention doesn't count."""
        return fraction(self.calls)

    @property
    def attention_speedup(self) -> float | None:
        """How many times faster the calls of LiteAttention were than the user's own would have
        been, estimated from some that these did; None where none was timed."""
        ours = [call for call in self.calls if not call.waits]
        taken = sum(call.seconds for call in ours)
        if self.dense_rate is None or taken == 0:
            return None
        return self.dense_rate * tiles(ours)[1] / taken

    @property
    def saved_seconds(self) -> float | None:
        """Seconds that the run took less than it would have taken densely, estimated likewise."""
        return self.saved_in(self.calls)

    @property
    def dense_seconds(self) -> dict[int, float]:
        """Seconds that each step would have taken densely, estimated; empty where nothing was
        timed. Attention alone is estimated: all else is taken to cost the same."""
        dense = {}
        for step, calls in sorted(by(self.calls, "step").items()):
            seconds, saved = self.step_seconds.get(step), self.saved_in(calls)
            if seconds is not None and saved is not None:
                # Not below 0, where a step was timed less exactly than its calls.
                dense[step] = max(seconds + saved, 0.0)
        return dense

    def saved_in(self, calls: Iterable[CallStats]) -> float | None:
        """Seconds of attention saved in some calls, estimated; negative where they cost more."""
        if self.dense_rate is None:
            return None
        ours = [call for call in calls if not call.waits]
        return self.dense_rate * tiles(ours)[1] - sum(call.seconds for call in ours)

    @property
    def lost_mass_allowed(self) -> float | None:
        """Mean lost mass that the budget allows over the run; None without a budget."""
        return sum(self.allowed) / len(self.allowed) if self.allowed else None

    @property
    def expected(self) -> Expected | None:
        """Closeness to be expected from what was measured, None where that is not known: nothing
        was lost, nothing measured, or the steps are not those of ``levels``."""
        losses = {step: mean_lost(calls) for step, calls in by(self.calls, "step").items()}
        steps = len(self.levels) - 1
        if steps < 1 or None in losses.values() or max(losses, default=0) >= steps:
            return None
        return expected_closeness([losses.get(step) or 0.0 for step in range(steps)], self.levels)

    @property
    def lost_mass_mean(self) -> float | None:
        """Mean lost mass, from what was audited; dense calls lose nothing. None where it was not
        measured."""
        return mean_lost(self.calls)


def tiles(calls: Iterable[CallStats]) -> tuple[int, int]:
    """Tiles computed, and tiles of the matrices."""
    calls = tuple(calls)
    return sum(call.computed for call in calls), sum(call.total for call in calls)


def loss_intervals(report: RunReport) -> dict[tuple[str, int], Interval]:
    """What each (layer, step) loses, with 95 % confidence; empty without a budget. Calls that wait
    lose nothing."""
    found = intervals(
        Sample(call.layer, call.step, call.lost, call.bound)
        for call in report.calls
        if call.lost is not None and call.bound is not None
    )
    dense = {(call.layer, call.step): NOTHING for call in report.calls if call.waits}
    return dense | found if found else {}


def fraction(calls: Iterable[CallStats]) -> float:
    """Tiles computed over all tiles, 0..1. What audits compute again is no more than all."""
    computed, total = tiles(calls)
    return min(computed / total, 1.0) if total else 1.0


def mean_lost(calls: Iterable[CallStats]) -> float | None:
    """Mean lost mass of these calls. Those that computed every tile lose nothing; those that
    skipped and were not audited lose what the audited ones do, on average. None where calls
    skipped and none of them was audited: then it isn't known."""
    calls = tuple(calls)
    skipping = [call for call in calls if not _dense(call)]
    audited = [call.lost for call in skipping if call.lost is not None]
    if (skipping and not audited) or not calls:
        return None
    return sum(audited) / len(audited) * len(skipping) / len(calls) if audited else 0.0


def by(calls: Iterable[CallStats], field: str) -> dict:
    """Group calls by one of their fields, in order of first appearance."""
    groups: dict = defaultdict(list)
    for call in calls:
        groups[getattr(call, field)].append(call)
    return dict(groups)


def _nothing_skipped(report: RunReport) -> str:
    """The reason why no tile was skipped, where all went well."""
    if report.steps <= 1:
        return "a single step: the first one always computes everything"
    return "no tile was small enough to be skipped with these settings"


def status_line(report: RunReport) -> str:
    """One line for the log: active or not, and the reason for that."""
    if not report.active:
        # Cross-attention always stays dense: it explains nothing.
        reasons = [reason for reason in report.reasons if reason != CROSS_ATTENTION]
        why = "; ".join(reasons) or _nothing_skipped(report)
        return f"LiteAttention inactive: {why}"
    begin = f"switched off: {report.stopped}; until then" if report.stopped else "active:"
    return (
        f"LiteAttention {begin} {1 - report.computed_fraction:.0%} of the tiles skipped, "
        f"lost {_in_percent(report)}, {_speedup(report)}{report.seconds:.1f} s in all "
        f"({report.backend} backend)"
    )


def node_line(report: RunReport) -> str:
    """The same in few words, for the node that says LiteAttention already."""
    off = f"switched off: {in_short(report.stopped)}" if report.stopped else ""
    if not report.active:
        return off or status_line(report).removeprefix("LiteAttention ")
    parts = [f"{1 - report.computed_fraction:.0%} skipped", f"lost {_in_percent(report)}"]
    if report.expected is not None:
        parts.append(f"about {report.expected.db:.0f} dB")
    if report.attention_speedup is not None:
        parts.append(f"attention {report.attention_speedup:.2f}x")
    if report.saved_seconds is not None:
        parts.append(saving(report.saved_seconds))
    return (f"{off}; until then " if off else "") + ", ".join(parts)


def in_short(stopped: str) -> str:
    """Why a run went on densely, without the figures: there is little room on a node."""
    return stopped.partition(": ")[0]


def saving(seconds: float) -> str:
    """An estimate of the seconds saved, in as many digits as one can believe."""
    if abs(seconds) < 0.05:
        return "nothing saved"
    amount = f"{abs(seconds):.1f} s" if abs(seconds) < 10 else f"{abs(seconds):.0f} s"
    return f"saved about {amount}" if seconds > 0 else f"cost about {amount}"


def _speedup(report: RunReport) -> str:
    """Both estimates, or nothing where nothing was timed."""
    speedup, saved = report.attention_speedup, report.saved_seconds
    if speedup is None or saved is None:
        return ""
    return f"attention about {speedup:.2f}x as fast, {saving(saved)} (estimated), "


def _in_percent(report: RunReport) -> str:
    """What was lost of what is allowed, in as few digits as say something: ``2.1 of 3 %``."""
    lost = report.lost_mass_mean
    if lost is None:
        return "not measured"
    allowed = report.lost_mass_allowed
    return f"{percent(lost)} %" if allowed is None else f"{percent(lost)} of {percent(allowed)} %"


def expectation(report: RunReport) -> list[str]:
    """A line on the closeness, or none."""
    expected = report.expected
    if expected is None:
        return []
    return [
        f"expected closeness to the dense video: {expected.db:.0f} dB "
        f"({expected.low:.0f} to {expected.high:.0f}), {CALIBRATION}"
    ]


def percent(share: float) -> str:
    """Of 0..1, in two digits: ``36``, ``2.1``, ``0.63``, ``0``."""
    return f"{100 * share:.2g}" if share < 0.995 else "100"


def short_names(names: Sequence[str]) -> list[str]:
    """The number that tells the layers apart, where one does: ``blocks.12.attn1`` -> ``12``.
    Otherwise kind and number, where these do: ``double-3.0`` -> ``double 3``."""
    numbers = list(zip(*(re.findall(r"\d+", name) for name in names), strict=False))
    telling = [column for column in numbers if len(set(column)) == len(set(names))]
    if telling:
        return list(telling[0])
    kinds = [re.fullmatch(r"(\w+)-(\d+)\.0", name) for name in names]
    return [
        " ".join(kind.groups()) if kind else name for kind, name in zip(kinds, names, strict=True)
    ]


def layer_labels(names: Sequence[str]) -> list[str]:
    """``layer 12``, or the whole name where no number tells the layers apart."""
    return [f"layer {n}" if n.isdecimal() else n for n in short_names(names)]


def figures(report: RunReport) -> dict[str, Any]:
    """The report as plain JSON data."""
    dense = report.dense_seconds
    cells = loss_intervals(report)
    layers, steps = of_layers(cells), of_steps(cells)
    return {
        "active": report.active,
        "status": status_line(report),
        "settings": report.settings,
        "backend": report.backend,
        "tokens": report.tokens,
        "steps": report.steps,
        "seconds": report.seconds,
        "computed_fraction": report.computed_fraction,
        "lost_mass_mean": report.lost_mass_mean,
        "attention_speedup": report.attention_speedup,
        "saved_seconds": report.saved_seconds,
        "lost_mass_allowed": report.lost_mass_allowed,
        "predicted_db": None if report.expected is None else report.expected.db,
        "predicted_db_range": None if report.expected is None else list(report.expected[1:]),
        "per_layer": {k: _pair(v, layers.get(k)) for k, v in by(report.calls, "layer").items()},
        "per_step": [
            _pair(v, steps.get(k))
            | {"step": k + 1, "seconds": report.step_seconds.get(k), "dense_seconds": dense.get(k)}
            for k, v in sorted(by(report.calls, "step").items())
        ],
        "reasons": report.reasons,
        "notes": list(report.notes),
    }


def lost_in(calls: Iterable[CallStats], interval: Interval | None) -> float | None:
    """What calls lost: the interval's own estimate where there is one, which it holds."""
    return mean_lost(calls) if interval is None else interval.lost


def _pair(calls: list[CallStats], interval: Interval | None) -> dict[str, Any]:
    return {
        "computed_fraction": fraction(calls),
        "lost_mass": lost_in(calls, interval),
        "lost_mass_95": None if interval is None else [interval.low, interval.high],
    }


def _dense(call: CallStats) -> bool:
    """Whether a call skipped nothing. (With its audit one that skipped may have computed as many
    tiles as there are; it lost something.)"""
    return call.computed >= call.total and not call.lost
