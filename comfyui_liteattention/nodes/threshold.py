"""LiteAttentionThreshold: the settings in numbers, for those who want them."""

from __future__ import annotations

from comfy_api.latest import io

from ..settings import SAFEST, Settings, parse_layers
from .schema import CATEGORY, Control, schema

DEFAULTS = Settings()


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
                    default=DEFAULTS.threshold,
                    min=SAFEST,
                    max=-0.05,
                    step=0.05,
                    tooltip="log2 units; more negative is safer. With 'mass': no row of the "
                    "attention loses more than 2^threshold of its weight when tiles are marked. "
                    "-40 never skips.",
                ),
                io.Combo.Input(
                    "criterion",
                    options=["mass", "gap"],
                    default=DEFAULTS.criterion,
                    tooltip="mass: the share of the attention weight in a tile (recommended). "
                    "gap: the distance of its largest score from the row's maximum, as in the "
                    "paper; try -8.",
                ),
                io.Float.Input(
                    "ramp",
                    default=DEFAULTS.ramp,
                    min=0.0,
                    max=8.0,
                    step=0.1,
                    tooltip="How much stricter the first steps are: early errors travel furthest. "
                    "0: the same threshold at every step.",
                ),
                io.Float.Input(
                    "warmup",
                    default=DEFAULTS.warmup,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Fraction of the steps, from the start, that stay dense. The very "
                    "first step always does.",
                ),
                io.String.Input(
                    "dense_layers",
                    default="",
                    tooltip="Layers that never skip, counted from 0, such as: 0, 1, 38-39. "
                    "Empty: all layers may skip.",
                ),
                io.Int.Input(
                    "audit",
                    default=DEFAULTS.audit,
                    min=0,
                    max=1024,
                    tooltip="One in this many query tiles is also computed in full, to measure "
                    "what is lost. 64 costs 1.6 %. 0: nothing is measured.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=DEFAULTS.min_tokens,
                    min=0,
                    max=1 << 20,
                    tooltip="Sequences shorter than this stay dense: there is little to gain.",
                ),
            ],
            outputs=[
                Control.Output(
                    display_name="control",
                    tooltip="Connect it to the control input of a LiteAttention node.",
                )
            ],
        )

    @classmethod
    def execute(cls, dense_layers: str, **values) -> io.NodeOutput:
        return io.NodeOutput(Settings(dense_layers=parse_layers(dense_layers), **values))

    @classmethod
    def validate_inputs(cls, dense_layers: str) -> bool | str:
        try:
            parse_layers(dense_layers)
        except ValueError as error:
            return str(error)
        return True
