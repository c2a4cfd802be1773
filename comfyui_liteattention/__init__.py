"""LiteAttention: video diffusion that skips the attention tiles that don't matter.

arXiv 2511.11062, rebuilt for ComfyUI and diffusers. Importing this package is cheap and touches
neither torch, a GPU nor a host application; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.diffusers import logging
    from .integrations.diffusers.api import disable, enable, enabled, summary
    from .integrations.diffusers.families import Family, register_family
    from .integrations.diffusers.handle import Handle
    from .report.takeaway import Report as RunReport
    from .settings import SAFEST, Settings

__all__ = [
    "SAFEST",
    "Family",
    "Handle",
    "RunReport",
    "Settings",
    "disable",
    "enable",
    "enabled",
    "logging",
    "register_family",
    "summary",
]
__version__ = "0.1.0"

#: Where each of these is: room, and name there.
_PLACES = {
    "SAFEST": ("settings", "SAFEST"),
    "Family": ("integrations.diffusers.families", "Family"),
    "Handle": ("integrations.diffusers.handle", "Handle"),
    "RunReport": ("report.takeaway", "Report"),
    "Settings": ("settings", "Settings"),
    "disable": ("integrations.diffusers.api", "disable"),
    "enable": ("integrations.diffusers.api", "enable"),
    "enabled": ("integrations.diffusers.api", "enabled"),
    "register_family": ("integrations.diffusers.families", "register_family"),
    "summary": ("integrations.diffusers.api", "summary"),
}


def __getattr__(name: str) -> Any:
    if name == "logging":
        return import_module(".integrations.diffusers.logging", __name__)
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, there = _PLACES[name]
    return getattr(import_module(f".{room}", __name__), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
