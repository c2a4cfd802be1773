"""Statistics of a run -> numbers and a text table. Pictures are in ``pictures.py``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..budget.closeness import CALIBRATION, GUIDANCE, Expected, expected_closeness
from ..eligibility import CROSS_ATTENTION
from .confidence import Interval, Sample, intervals, of_layers, of_steps

if TYPE_CHECKING:
    from .map_history import StepMap


NOTHING = Interval(0.0, 0.0, 0.0)


class CallStats(NamedTuple):
    """One attention call of one stream. ``lost``: measured lost mass, None where nothing was
    audited. ``bound``: its upper bound, None without an audit or a budget. ``waits``: the user's
    own attention did the call, because it was still faster."""

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

    ``dense_rate``: seconds that the user's own attention takes per tile, None if it wasn't timed.
    ``history``: small maps of a few layers at each step but the first, which is dense.
    ``allowed``: lost mass that the budget or the closeness allows at each step, empty without one.
    ``stopped``: why the run went on densely from some point. ``notes``: further remarks for the
    user. ``levels``: noise levels at the beginning of each step and at the end, 0..1.
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
    guidance: float = GUIDANCE

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
        """Share of the tiles that were computed, audits included, 0..1, over the calls that
        LiteAttention computed and those that it left to the user's faster attention for now; 1.0
        without any. Calls that stayed dense for another reason don't count."""
        return fraction(self.calls)

    @property
    def attention_speedup(self) -> float | None:
        """How many times faster LiteAttention's calls were than the user's own attention would have
        been, estimated from calls of that; None where none was timed."""
        ours = [call for call in self.calls if not call.waits]
        taken = sum(call.seconds for call in ours)
        if self.dense_rate is None or taken == 0:
            return None
        return self.dense_rate * tiles(ours)[1] / taken

    @property
    def saved_seconds(self) -> float | None:
        """Seconds saved compared with a dense run, estimated in the same way."""
        return self.saved_in(self.calls)

    @property
    def dense_seconds(self) -> dict[int, float]:
        """Seconds that each step would have taken densely, estimated; empty where nothing was
        timed. Everything but attention is assumed to take the same time either way."""
        dense = {}
        for step, calls in sorted(by(self.calls, "step").items()):
            seconds, saved = self.step_seconds.get(step), self.saved_in(calls)
            if seconds is not None and saved is not None:
                # The step is timed less exactly than its calls, so this could be negative.
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
        """Closeness expected from the measured losses. None if nothing was lost or measured, or if
        the steps don't correspond to ``levels``."""
        losses = {step: mean_lost(calls) for step, calls in by(self.calls, "step").items()}
        steps = len(self.levels) - 1
        if steps < 1 or None in losses.values() or max(losses, default=0) >= steps:
            return None
        lost = [losses.get(step) or 0.0 for step in range(steps)]
        return expected_closeness(lost, self.levels, self.guidance)

    @property
    def lost_mass_mean(self) -> float | None:
        """Mean lost mass, estimated from the audits; dense calls lose nothing. None where it was
        not measured."""
        return mean_lost(self.calls)


def tiles(calls: Iterable[CallStats]) -> tuple[int, int]:
    """Tiles computed, and all tiles of the attention matrices."""
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
    """Share of the tiles that were computed, capped at 1, which audits could exceed."""
    computed, total = tiles(calls)
    return min(computed / total, 1.0) if total else 1.0


def mean_lost(calls: Iterable[CallStats]) -> float | None:
    """Mean lost mass of these calls. Those that computed every tile lose nothing; those that
    skipped tiles without an audit are assumed to lose what the audited ones do on average. None
    where calls skipped tiles and none of them was audited."""
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
        # Cross-attention is dense in every run, so it doesn't explain this one.
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
    """The same in few words, for the node, whose title says LiteAttention already."""
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
    """An estimate of the seconds saved, rounded to its precision."""
    if abs(seconds) < 0.05:
        return "nothing saved"
    amount = f"{abs(seconds):.1f} s" if abs(seconds) < 10 else f"{abs(seconds):.0f} s"
    return f"saved about {amount}" if seconds > 0 else f"cost about {amount}"


def _speedup(report: RunReport) -> str:
    """Speed-up and seconds saved, both estimated; empty where nothing was timed."""
    speedup, saved = report.attention_speedup, report.saved_seconds
    if speedup is None or saved is None:
        return ""
    return f"attention about {speedup:.2f}x as fast, {saving(saved)} (estimated), "


def _in_percent(report: RunReport) -> str:
    """What was lost of what is allowed, in few digits: ``2.1 of 3 %``."""
    lost = report.lost_mass_mean
    if lost is None:
        return "not measured"
    allowed = report.lost_mass_allowed
    return f"{percent(lost)} %" if allowed is None else f"{percent(lost)} of {percent(allowed)} %"


def expectation(report: RunReport) -> list[str]:
    """A line about the expected closeness, or none."""
    expected = report.expected
    if expected is None:
        return []
    return [
        f"expected closeness to the dense video: {expected.db:.0f} dB "
        f"({expected.low:.0f} to {expected.high:.0f}), {CALIBRATION}"
    ]


def percent(share: float) -> str:
    """A share 0..1 in percent, with two digits: ``36``, ``2.1``, ``0.63``, ``0``."""
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
    """What calls lost: the middle of the interval where there is one, the mean otherwise."""
    return mean_lost(calls) if interval is None else interval.lost


def _pair(calls: list[CallStats], interval: Interval | None) -> dict[str, Any]:
    return {
        "computed_fraction": fraction(calls),
        "lost_mass": lost_in(calls, interval),
        "lost_mass_95": None if interval is None else [interval.low, interval.high],
    }


def _dense(call: CallStats) -> bool:
    """Whether a call skipped nothing. (A call that skipped a few tiles may have computed as many as
    there are, counting its audit, so its loss is looked at too.)"""
    return call.computed >= call.total and not call.lost
