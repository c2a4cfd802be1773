"""One report for transformers that took turns in one run, as the two experts of Wan 2.2 do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from .statistics import RunReport, tiles


def merged(reports: Sequence[RunReport]) -> RunReport:
    """The reports, of which there is at least one, as one."""
    seconds: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        seconds.update(report.step_seconds)  # type: ignore[arg-type]
        reasons.update(report.reasons)
    stopped = dict.fromkeys(report.stopped for report in reports if report.stopped is not None)
    return replace(
        reports[0],
        steps=max(report.steps for report in reports) or max(seconds, default=-1) + 1,
        seconds=max(report.seconds for report in reports),
        step_seconds=dict(seconds),
        calls=tuple(call for report in reports for call in report.calls),
        reasons=dict(reasons),
        maps=tuple(tile_map for report in reports for tile_map in report.maps),
        allowed=_allowed(reports),
        stopped="; ".join(stopped) or None,
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        dense_rate=_rate(reports),
        guidance=max(report.guidance for report in reports),  # which expects the larger error
        history=tuple(sorted((m for r in reports for m in r.history), key=lambda m: m.step)),
    )


def _allowed(reports: Sequence[RunReport]) -> tuple[float, ...]:
    """What each step was allowed to lose, from the report of the transformer that made it."""
    allowed: dict[int, float] = {}
    for report in reports:
        made = {call.step for call in report.calls}
        for step, share in enumerate(report.allowed):
            if step in made or step not in allowed:
                allowed[step] = share
    return tuple(allowed[step] for step in sorted(allowed))


def _rate(reports: Sequence[RunReport]) -> float | None:
    """Seconds per tile, averaged over the tiles of all transformers."""
    timed = [
        (report.dense_rate, tiles(call for call in report.calls if not call.waits)[1])
        for report in reports
        if report.dense_rate is not None
    ]
    total = sum(count for _, count in timed)
    if not total:
        return timed[0][0] if timed else None
    return sum(rate * count for rate, count in timed) / total
