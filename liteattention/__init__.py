"""The distribution's name: ``import liteattention`` is ``import comfyui_liteattention``."""

from typing import TYPE_CHECKING, Any

import comfyui_liteattention

if TYPE_CHECKING:
    from comfyui_liteattention import (
        SAFEST,
        Family,
        Handle,
        RunReport,
        Settings,
        disable,
        enable,
        enabled,
        logging,
        register_family,
        summary,
    )

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
__version__ = comfyui_liteattention.__version__


def __getattr__(name: str) -> Any:
    return getattr(comfyui_liteattention, name)
