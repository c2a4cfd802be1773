"""LiteAttention: video diffusion that skips the attention tiles that don't matter.

arXiv 2511.11062, rebuilt for ComfyUI and diffusers. Importing this package is cheap and touches
neither a GPU nor a host application; diffusers is imported when one of its four functions is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import SAFEST, Settings

if TYPE_CHECKING:
    from .integrations.diffusers.api import disable, enable, enabled, summary

__all__ = ["SAFEST", "Settings", "disable", "enable", "enabled", "summary"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("disable", "enable", "enabled", "summary"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations.diffusers import api as diffusers

    return getattr(diffusers, name)
