"""LiteAttentionThreshold: the settings in numbers, for those who want them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..settings import SAFEST
from .schema import CATEGORY, advanced, control_output, schema
from .where import DEFAULTS, make_settings, problem, where_inputs


class LiteAttentionThreshold(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionThreshold",
            display_name="LiteAttention Threshold",
            category=CATEGORY,
            description="Chooses what LiteAttention may skip, by a threshold in log2 units.",
            search_aliases=["skip threshold", "attention threshold", "sparsity"],
            inputs=[
                io.Float.Input(
                    "threshold",
                    default=-2.0,
                    min=SAFEST,
                    max=-0.05,
                    step=0.05,
                    tooltip="log2 units; more negative is safer. With 'mass': no row of the "
                    "attention loses more than 2^threshold of its weight when tiles are marked, "
                    "and most lose far less. -1: half, -2: a quarter, -4: 6 %. -40 never skips.",
                ),
                io.Combo.Input(
                    "criterion",
                    options=["mass", "gap"],
                    default=DEFAULTS.criterion,
                    tooltip="mass: the share of the attention weight in a tile (recommended). "
                    "gap: the distance of its largest score from the row's maximum, as in the "
                    "paper; try -8.",
                ),
                *advanced(
                    io.Float.Input(
                        "ramp",
                        default=DEFAULTS.ramp,
                        min=0.0,
                        max=8.0,
                        step=0.1,
                        tooltip="How much stricter the first steps are: early errors do the "
                        "most damage. 0: the same threshold at every step.",
                    )
                ),
                *where_inputs(),
            ],
            outputs=[control_output()],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(make_settings(**values))

    @classmethod
    def validate_inputs(cls, dense_layers: str) -> bool | str:
        return problem(dense_layers)
