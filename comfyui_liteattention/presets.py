"""Named settings for people who don't want to choose numbers."""

from __future__ import annotations

from typing import Literal

from .settings import Settings

PresetName = Literal["Safe", "Balanced", "Fast", "safe", "balanced", "fast"]

PRESETS: dict[str, Settings] = {
    "Safe": Settings(closeness=50.0),
    "Balanced": Settings(closeness=42.0),
    "Fast": Settings(closeness=35.0),
}
DEFAULT = "Balanced"


def preset(name: str) -> Settings:
    """Settings of a preset, upper or lower case; ValueError names the choices."""
    found = {known.lower(): settings for known, settings in PRESETS.items()}
    if not isinstance(name, str) or name.lower() not in found:
        raise ValueError(f"LiteAttention: no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return found[name.lower()]
