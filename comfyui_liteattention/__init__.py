"""LiteAttention: video diffusion that skips the attention tiles that don't matter.

arXiv 2511.11062, rebuilt for ComfyUI and diffusers. Importing this package is cheap and touches
neither a GPU nor a host application; diffusers is imported when one of its four functions is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import SAFEST, Settings

if TYPE_CHECKING:
    from .integrations.diffusers.api import disable, enable, enabled, summary
    from .integrations.diffusers.handle import Handle
    from .report.statistics import RunReport

__all__ = ["SAFEST", "Handle", "RunReport", "Settings", "disable", "enable", "enabled", "summary"]
__version__ = "0.1.0"

_ELSEWHERE = {
    "Handle": "integrations.diffusers.handle",
    "RunReport": "report.statistics",
    "disable": "integrations.diffusers.api",
    "enable": "integrations.diffusers.api",
    "enabled": "integrations.diffusers.api",
    "summary": "integrations.diffusers.api",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ELSEWHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
