"""Inputs that every control node has: what is never skipped, and how the loss is measured."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..backends.modes import Wanted
from ..settings import Settings, parse_layers
from ..token_order import TokenOrder
from .schema import advanced

DEFAULTS = Settings()


def where_inputs(least_audit: int = 0) -> list[io.Input]:
    """The inputs, in the order of the widgets on the node. New ones have to go to the end and be
    optional, so that saved graphs still run."""
    return advanced(
        io.Float.Input(
            "warmup",
            default=DEFAULTS.warmup,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Fraction of the steps, from the start, that stay dense. The very first step "
            "always does.",
        ),
        io.String.Input(
            "dense_layers",
            default="",
            tooltip="Layers that never skip, counted from 0, such as: 0, 1, 38-39. Empty: all "
            "layers may skip.",
        ),
        io.Int.Input(
            "audit",
            default=DEFAULTS.audit,
            min=least_audit,
            max=1024,
            tooltip="One in this many query tiles is also computed in full, to measure what is "
            "lost. 64 costs 1.6 %. 0: nothing is measured (a budget needs it).",
        ),
        io.Int.Input(
            "min_tokens",
            default=DEFAULTS.min_tokens,
            min=0,
            max=1 << 20,
            tooltip="Sequences shorter than this stay dense: there is little to gain.",
        ),
        io.Combo.Input(
            "order",
            options=list(get_args(TokenOrder)),
            default=DEFAULTS.order,
            optional=True,
            tooltip="compact: every tile is a small block of the video (recommended). raster: "
            "tokens in the model's own order.",
        ),
        io.Boolean.Input(
            "never_slower",
            default=DEFAULTS.never_slower,
            optional=True,
            tooltip="Times your own attention, uses it as long as it is the faster one, and "
            "switches LiteAttention off for the run if it stays so.",
        ),
        io.Boolean.Input(
            "tail",
            default=DEFAULTS.tail,
            optional=True,
            tooltip="Skipped tiles still contribute their mean, as far as the audit finds that "
            "this helps: closer to the original, for a little more work.",
        ),
        io.Combo.Input(
            "qk",  # its id in saved graphs, from when it was about q and k alone
            display_name="mode",
            options=list(get_args(Wanted)),
            default=DEFAULTS.mode,
            optional=True,
            tooltip="How a graphics card multiplies. auto: as exact as your own attention, so 8 "
            "bits beside SageAttention. native: as precise as 16 bits. int8, fp8 (RTX 40, 50): "
            "meant to be faster, and less precise; no card has timed them yet.",
        ),
    )


def make_settings(dense_layers: str, qk: Wanted = DEFAULTS.mode, **values: Any) -> Settings:
    """Settings from the values of the widgets; ValueError says what is wrong."""
    return Settings(dense_layers=parse_layers(dense_layers), mode=qk, **values)


def problem(dense_layers: str) -> bool | str:
    """True, or what is wrong with the text; for ``validate_inputs``."""
    try:
        parse_layers(dense_layers)
    except ValueError as error:
        return str(error)
    return True
