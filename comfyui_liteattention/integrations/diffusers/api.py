"""diffusers: :func:`enable`, :func:`summary` and :func:`disable`, for a pipeline or a transformer.

``h = enable(pipe)`` puts LiteAttention on the pipeline's transformers until ``disable(pipe)``. It
gives every sampling run its own state and keeps the last run's report.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ... import presets
from ...settings import Settings
from .handle import NOT_ENABLED, Handle
from .session import Session, session_on

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...presets import PresetName
    from ...settings import Options

__all__ = ["Handle", "disable", "enable", "enabled", "summary"]

log = logging.getLogger(__name__)


class UnknownSettingError(TypeError, ValueError):
    """There is no such setting. Both a TypeError, as for a wrong argument, and a ValueError."""


def enable(
    target: Any,
    *,
    preset: PresetName | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    closeness: float | None = None,
    **settings: Unpack[Options],
) -> Handle:
    """Let the self-attention of a pipeline, or of one transformer, skip negligible tiles.

    Give at most one of ``preset`` ("Safe", "Balanced" or "Fast"; Balanced without any),
    ``closeness`` (dB of PSNR to the dense video of the same seed, at least), ``budget`` (fraction
    of the attention, 0..1, that may be lost) and ``threshold`` (log2, negative). Unless a threshold
    is given, the loss is measured during the run and held. Other fields of :class:`Settings` are
    arguments, too. What was enabled here before is replaced; ``with enable(...):`` restores it.

    Raises ValueError for a wrong setting, and TypeError if ``target`` is neither a pipeline nor a
    transformer. In both cases nothing changes.
    """
    transformers = _transformers(target)
    choices = {"preset": preset, "closeness": closeness, "budget": budget, "threshold": threshold}
    given = {name: choice for name, choice in choices.items() if choice is not None}
    chosen = _settings(given, dict(settings))
    session = Session(target, transformers, chosen)
    if not transformers:
        session.decline(f"{type(target).__name__} has no transformer", "the pipeline")
    replaced = _sessions(transformers)
    session.replace(replaced)
    return Handle(session, replaced)


def enabled(
    target: Any,
    *,
    preset: PresetName | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    closeness: float | None = None,
    **settings: Unpack[Options],
) -> Handle:
    """``with enabled(pipe, threshold=-4):`` is :func:`enable` until the end of the block."""
    goals: Any = {"threshold": threshold, "budget": budget, "closeness": closeness}
    return enable(target, preset=preset, **goals, **settings)


def disable(target: Any) -> None:
    """Take LiteAttention off and leave nothing behind. Does nothing where it isn't enabled."""
    for session in _sessions(_found(target)):
        session.detach()


def summary(target: Any, everything: bool = False) -> str:
    """What is enabled, and what the current or the last run did, as text. Of many layers and steps
    only a selection is shown, unless ``everything`` is asked for."""
    sessions = _sessions(_found(target))
    return "\n".join(Handle(one).summary(everything) for one in sessions) or NOT_ENABLED


def _transformers(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by their names there, or one transformer; each once."""
    if not isinstance(target, nn.Module) and not isinstance(_components(target), dict):
        what = f"the class {target.__name__}" if isinstance(target, type) else repr(target)[:80]
        raise TypeError(
            f"LiteAttention: {what} is neither a diffusers pipeline nor a transformer. Give one "
            "that is loaded: lite.enable(pipe) or lite.enable(pipe.transformer)."
        )
    return _found(target)


def _found(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"transformer": _uncompiled(target)}
    parts = _components(target)
    found: dict[str, nn.Module] = {}
    for name, part in parts.items() if isinstance(parts, dict) else ():
        if name.startswith("transformer") and isinstance(part, nn.Module):
            root = _uncompiled(part)
            if all(root is not other for other in found.values()):
                found[name] = root
    return found


def _components(target: Any) -> Any:
    """The components of a pipeline; not a dict if ``target`` is a class or no pipeline."""
    return None if isinstance(target, type) else getattr(target, "components", None)


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)


def _sessions(transformers: dict[str, nn.Module]) -> list[Session]:
    """The sessions on these transformers, each once."""
    found = (session_on(root) for root in transformers.values())
    return list(dict.fromkeys(session for session in found if session is not None))


def _settings(choices: dict[str, Any], others: dict[str, Any]) -> Settings:
    """Settings from the one choice of how much to skip, and the other fields."""
    if len(choices) > 1:
        raise ValueError(f"LiteAttention: {' and '.join(choices)} exclude each other; give one.")
    if "qk" in others:
        if "mode" in others:
            raise ValueError("LiteAttention: qk is the older name of mode; give mode alone.")
        others["mode"] = others.pop("qk")
    known = [field.name for field in fields(Settings)]
    unknown = [key for key in others if key not in known]
    if unknown:
        raise UnknownSettingError(
            f"LiteAttention: no setting {', '.join(unknown)}; there are preset, {', '.join(known)}."
        )
    if choices and "preset" not in choices:
        return Settings(**choices, **others)
    return replace(presets.preset(choices.get("preset", presets.DEFAULT)), **others)
