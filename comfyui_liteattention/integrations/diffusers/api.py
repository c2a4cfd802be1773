"""diffusers: :func:`enable`, :func:`summary` and :func:`disable`, for a pipeline or a transformer.

``h = enable(pipe)`` returns the :class:`Session` that lives on the pipeline's transformers until
``disable(pipe)``. It gives every sampling run its own state and keeps the last run's report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ... import presets
from ...settings import Settings
from .session import Session, session_on

__all__ = ["Session", "disable", "enable", "enabled", "summary"]


def enable(
    target: Any,
    *,
    preset: str | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    **settings: Any,
) -> Session:
    """Let the self-attention of a pipeline, or of one transformer, skip negligible tiles.

    Give at most one of ``preset`` ("Safe", "Balanced", "Fast"; Balanced if there is nothing),
    ``threshold`` (log2, negative) and ``budget``: the fraction of the attention, 0..1, that may be
    lost; it is measured while the run goes on, and held. Other fields of
    :class:`Settings` by name. What was enabled here before is replaced.
    """
    transformers = _transformers(target)
    chosen = _settings(preset, threshold, budget, settings)
    disable(target)
    return Session(target, transformers, chosen)


def disable(target: Any) -> None:
    """Take LiteAttention off again; nothing of it stays. Fine to call where it isn't enabled."""
    for session in _sessions(target):
        session.disable()


def summary(target: Any) -> str:
    """What is enabled and what the last run did, or the run that is going on, as text."""
    return "\n".join(s.summary() for s in _sessions(target)) or "LiteAttention is not enabled"


@contextmanager
def enabled(target: Any, **choices: Any) -> Iterator[Session]:
    """``with enabled(pipe, threshold=-4):`` is :func:`enable`, and :func:`disable` at the end."""
    session = enable(target, **choices)
    try:
        yield session
    finally:
        session.disable()


def _transformers(target: Any) -> dict[str, nn.Module]:
    """The video transformers of a pipeline, by their names there, or one transformer."""
    if isinstance(target, nn.Module):
        return {"transformer": _uncompiled(target)}
    parts = getattr(target, "components", {})
    found = {
        name: _uncompiled(part)
        for name, part in parts.items()
        if name.startswith("transformer") and isinstance(part, nn.Module)
    }
    if not found:
        raise TypeError(
            f"LiteAttention: {type(target).__name__} has no transformer. Give a diffusers pipeline "
            "with one, or the transformer itself."
        )
    return found


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)


def _sessions(target: Any) -> list[Session]:
    """The sessions on a pipeline's transformers, each once."""
    found = (session_on(root) for root in _transformers(target).values())
    return list(dict.fromkeys(session for session in found if session is not None))


def _settings(
    name: str | None, threshold: float | None, budget: float | None, others: dict[str, Any]
) -> Settings:
    """The settings of one choice of how much to skip, with other fields replaced."""
    choices = {"preset": name, "threshold": threshold, "budget": budget}
    given = [choice for choice, value in choices.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"LiteAttention: {' and '.join(given)} exclude each other; give one.")
    known = [field.name for field in fields(Settings)]
    unknown = [key for key in others if key not in known]
    if unknown:
        raise TypeError(
            f"LiteAttention: no setting {', '.join(unknown)}; there are preset, budget, "
            f"{', '.join(known)}."
        )
    if budget is not None:
        return Settings(budget=budget, **others)
    if threshold is not None:
        return Settings(threshold=threshold, **others)
    return replace(presets.preset(name or presets.DEFAULT), **others)
