"""diffusers: what ``enable`` returns, for watching LiteAttention and for ending it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from types import TracebackType
from typing import Any

from ...report.statistics import RunReport, in_short, saving, status_line
from ...report.table import text_table
from ...report.takeaway import Report
from ...settings import Settings, describe
from . import progress_bar
from .session import Session

NOT_ENABLED = "LiteAttention is not enabled"


class Handle:
    """LiteAttention on one pipeline or transformer, from ``enable`` on.

    At the end of ``with enable(pipe) as h:``, what was enabled before, if anything, is restored.
    """

    def __init__(self, session: Session, replaced: Sequence[Session] = ()) -> None:
        self._session = session
        self._replaced = tuple(replaced)

    @property
    def settings(self) -> Settings:
        return self._session.settings

    @property
    def declined(self) -> dict[str, str]:
        """Why some transformers stay dense altogether, by their names in the pipeline."""
        return self._session.declined

    @property
    def status(self) -> str:
        """One line: what the current or the last run did or, before the first, what is enabled."""
        report = self._session.report(maps=False)
        if report is not None:
            return status_line(report)
        if self._session.idle:
            dense = (f"{name} stays dense: {why}" for name, why in self.declined.items())
            return "; ".join(("LiteAttention does nothing here", *dense))
        if not self._session.attached:
            return NOT_ENABLED
        return f"LiteAttention enabled, no run yet; {describe(self.settings)}"

    def report(self) -> Report | None:
        """Figures of the current run, or of the last one; None before the first."""
        report = self._session.report()
        return None if report is None else Report.of(report)

    def summary(self, everything: bool = False) -> str:
        """The report as text, and why transformers stay dense. Unless ``everything`` is asked for,
        it lists only the layers that lose most and least, and steps in groups."""
        report = self._session.report(maps=False)
        lines = [self.status if report is None else text_table(report, everything)]
        if not self._session.idle:
            lines += [f"{name} stays dense: {why}" for name, why in self.declined.items()]
        return "\n".join(lines)

    def reset(self) -> None:
        """End the run and free its state; the next call of a transformer starts a new one.
        Pipelines do this by themselves; call it at the end of a loop of your own."""
        self._session.reset()

    def disable(self) -> None:
        """Take LiteAttention off; this object keeps the settings and the last report."""
        self._session.detach()

    def callback(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """For ``callback_on_step_end``: shows on the pipeline's progress bar how much has been
        skipped and saved so far."""
        report = self._session.report(maps=False)
        if report is not None:
            progress_bar.annotate(so_far(report))
        return callback_kwargs

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.replace_by(self._replaced)

    def __repr__(self) -> str:
        return f"<{self.status}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"


def so_far(report: RunReport) -> str:
    """A few words for the progress bar: ``41 % skipped, saved about 3.1 s``."""
    if report.stopped is not None:
        return f"switched off: {in_short(report.stopped)}"
    if not report.calls:
        return "nothing skipped: " + next(iter(report.reasons), "no call yet")
    saved = report.saved_seconds
    return f"{100 * (1 - report.computed_fraction):.0f} % skipped" + (
        "" if saved is None else f", {saving(saved)}"
    )
