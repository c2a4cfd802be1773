"""Which mode a card's kernels use: as set, or as exact as the attention that the user has."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias, get_args

from .base import Mode
from .gpu.kernel_table import METHODS

#: ``auto``: see :func:`mode_for`.
Wanted = Literal["auto", "native", "int8", "fp8"]

#: Somebody's attention, in words.
Users: TypeAlias = str

SAGE = "SageAttention"
SAGE_FP16 = "SageAttention with values in 16 bits"
KITCHEN = "comfy-kitchen's INT8 attention"

#: Attention in 8 bits that a user may have, and the modes that are as exact, the fastest first. As
#: benchmarks/low_precision.py finds. comfy-kitchen's multiplies p and v in INT8, finer than FP8.
AS_EXACT: dict[Users, tuple[Mode, ...]] = {
    SAGE: ("fp8", "int8"),
    SAGE_FP16: ("int8",),
    KITCHEN: ("int8",),
}


class Chosen(NamedTuple):
    """A mode, and why this one, for the report; empty where it is what everybody gets."""

    mode: Mode = "native"
    why: str = ""


def recognise(name: str) -> Users | None:
    """A function or a backend by its name -> one of :data:`AS_EXACT`, or None."""
    name = name.lower()
    if re.search(r"(?<![a-z])sage", name):
        return SAGE_FP16 if "pv_fp16" in name else SAGE
    return KITCHEN if "kitchen" in name or "int8_attention" in name else None


def mode_for(wanted: Wanted, attention: str, capability: int | None) -> Chosen:
    """``attention``: what attends where we don't, by its name. ``capability``: of an NVIDIA card,
    major * 10 + minor, or None."""
    users = recognise(attention)
    if wanted != "auto":
        return Chosen(wanted, "" if wanted == "native" else "as set")
    found = fastest(users, capability) if users else None
    return Chosen(found, f"as exact as {users}") if found else Chosen()


def and_more_exact(chosen: Chosen) -> list[Chosen]:
    """What is chosen, then what to take in its place, the fastest first, up to ``native``."""
    modes: tuple[Mode, ...] = get_args(Mode)
    others = modes[: modes.index(chosen.mode)]
    return [chosen, *(Chosen(mode) for mode in reversed(others))]


def fastest(users: Users, capability: int | None) -> Mode | None:
    """The fastest mode of a card that is as exact as an attention of :data:`AS_EXACT`, or None."""
    return next((mode for mode in AS_EXACT[users] if capability in METHODS[mode]), None)
