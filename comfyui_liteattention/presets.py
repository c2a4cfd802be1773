"""Named settings for people who don't want to choose numbers."""

from __future__ import annotations

from .settings import Settings

PRESETS: dict[str, Settings] = {
    "Safe": Settings(budget=0.01),
    "Balanced": Settings(budget=0.03),
    "Fast": Settings(budget=0.1),
}
DEFAULT = "Balanced"


def preset(name: str) -> Settings:
    """Settings of a preset; ValueError names the choices."""
    if name not in PRESETS:
        raise ValueError(f"LiteAttention: no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
