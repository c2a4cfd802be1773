"""The report of a run as text: a summary, a line per layer, a line per step, the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from .confidence import Interval, mean, of_layers, of_steps
from .statistics import (
    CallStats,
    RunReport,
    by,
    expectation,
    fraction,
    layer_labels,
    loss_intervals,
    lost_in,
    mean_lost,
    status_line,
)

LAYER, STEP = 12, 7  # widths of the first column, chosen so that the table of steps fits the node
#: Most lines for layers, and for steps, unless everything is asked for.
LAYERS, STEPS = 8, 10


def text_table(report: RunReport, everything: bool = True) -> str:
    """The report as plain text. Without ``everything`` it fits on a screen: of many layers it shows
    those that lose most and least, and many steps are grouped."""
    lines = [
        status_line(report),
        f"settings: {report.settings}",
        f"{report.tokens} tokens, {report.steps} steps"
        if report.calls
        else f"{report.steps} steps",
        *expectation(report),
        *report.notes,
    ]
    if report.calls:
        lines += _layers(report, everything)
        lines += _steps(report, everything)
    if report.reasons:
        lines += ["", "calls that stayed dense:"]
        lines += [f"  {count:>6} x {reason}" for reason, count in report.reasons.items()]
    return "\n".join(lines)


def _layers(report: RunReport, everything: bool) -> list[str]:
    cells = of_layers(loss_intervals(report))
    groups = by(report.calls, "layer")
    labels = dict(zip(groups, layer_labels(list(groups)), strict=True))
    shown = list(groups) if everything else chosen_layers(groups)
    width = max(LAYER, *(len(labels[name]) for name in shown))
    lines = ["", f"{'layer':<{width}} {_heading(bool(cells))}"]
    lines += [
        _row(f"{labels[name]:<{width}}", groups[name], cells.get(name), bool(cells))
        for name in shown
    ]
    left_out = len(groups) - len(shown)
    if left_out:
        lines.append(f"... and {left_out} layers between these: summary(pipe, everything=True)")
    return lines


def _steps(report: RunReport, everything: bool) -> list[str]:
    cells, dense = of_steps(loss_intervals(report)), report.dense_seconds
    groups = by(report.calls, "step")
    columns = f"{'step':<{STEP}} {_heading(bool(cells))} {'seconds':>8}"
    lines = ["", columns + (f" {'dense, est.':>12}" if dense else "")]
    for some in grouped(sorted(groups), len(groups) if everything else STEPS):
        label = f"{some[0] + 1}" if len(some) == 1 else f"{some[0] + 1}-{some[-1] + 1}"
        calls = [call for step in some for call in groups[step]]
        known = [cells[step] for step in some if step in cells]
        row = _row(f"{label:<{STEP}}", calls, mean(known) if known else None, bool(cells))
        for seconds, width in ((report.step_seconds, 8), (dense, 12)):
            found = [seconds[step] for step in some if step in seconds]
            row += f" {sum(found):{width}.2f}" if found else ""
        lines.append(row)
    return lines


def chosen_layers(groups: dict[str, list[CallStats]]) -> list[str]:
    """The layers that lose most and the two that lose least, in the order of execution; all layers
    if there are few. Where no loss was measured, those that compute most and least."""
    names = list(groups)
    if len(names) <= LAYERS:
        return names

    def loss(name: str) -> tuple[float, float]:
        return mean_lost(groups[name]) or 0.0, fraction(groups[name])

    ranked = sorted(names, key=loss, reverse=True)
    shown = {*ranked[: LAYERS - 2], *ranked[-2:]}
    return [name for name in names if name in shown]


def grouped(steps: Sequence[int], at_most: int) -> list[Sequence[int]]:
    """Steps in at most ``at_most`` groups of neighbours, of equal size except the last."""
    size = -(-len(steps) // at_most)
    return [steps[first : first + size] for first in range(0, len(steps), size)]


def _heading(measured: bool) -> str:
    return f"{'computed':>9} {'lost mass':>10}" + (f" {'95 %':>15}" if measured else "")


def _row(label: str, calls: list[CallStats], found: Interval | None, measured: bool) -> str:
    lost = lost_in(calls, found)
    row = f"{label} {fraction(calls):>9.1%} {'-' if lost is None else f'{lost:.3%}':>10}"
    if measured:
        row += f" {'-' if found is None else f'{found.low:.2%} - {found.high:.2%}':>15}"
    return row
