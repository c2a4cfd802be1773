"""What the nodes' schemas share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "model/LiteAttention"
Control = io.Custom("LITEATTENTION_CONTROL")


def schema(**declared: Any) -> io.Schema:
    """An ``io.Schema``, without the fields that this version of ComfyUI does not know yet."""
    known = {f.name for f in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in declared.items() if name in known})
