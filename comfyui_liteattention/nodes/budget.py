"""LiteAttentionBudget: how much of the attention may be lost."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .schema import CATEGORY, advanced, control_output, schema
from .where import DEFAULTS, make_settings, problem, where_inputs


class LiteAttentionBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionBudget",
            display_name="LiteAttention Budget",
            category=CATEGORY,
            description=(
                "Chooses how much of the attention LiteAttention may lose. The loss is measured "
                "while sampling and held at or below this."
            ),
            search_aliases=["error budget", "quality budget", "lost mass"],
            inputs=[
                io.Float.Input(
                    "budget",
                    default=0.03,
                    min=0.0005,
                    max=0.5,
                    step=0.0005,
                    round=0.0001,
                    tooltip="Fraction of the attention weight that may be lost, on average over "
                    "the run. 0.01: close to the original. 0.1: most skipped. Ignored if "
                    "closeness is not 0.",
                ),
                *advanced(
                    io.Float.Input(
                        "ramp",
                        default=DEFAULTS.ramp,
                        min=0.0,
                        max=8.0,
                        step=0.1,
                        tooltip="How much less of the budget the first steps get: early errors do "
                        "the most damage. 0: the same at every step.",
                    )
                ),
                *where_inputs(least_audit=1),  # what is lost has to be measured
                io.Float.Input(
                    "closeness",
                    default=0.0,
                    min=0.0,
                    max=80.0,
                    step=1.0,
                    optional=True,
                    tooltip="If not 0: how close the video should come to the one without "
                    "LiteAttention, in dB of PSNR, whatever the number of steps; budget and ramp "
                    "are ignored. The presets are 50, 42 and 35, calibrated on the demo's model.",
                ),
            ],
            outputs=[control_output()],
        )

    @classmethod
    def execute(cls, closeness: float = 0.0, **values: Any) -> io.NodeOutput:
        if closeness:
            values |= {"budget": None, "closeness": closeness}
        return io.NodeOutput(make_settings(**values))

    @classmethod
    def validate_inputs(cls, dense_layers: str) -> bool | str:
        return problem(dense_layers)
