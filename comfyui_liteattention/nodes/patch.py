"""LiteAttentionPatch: MODEL in, faster MODEL out."""

from __future__ import annotations

from comfy_api.latest import io

from ..integrations.comfy.session import apply_patch
from ..presets import DEFAULT, PRESETS
from ..presets import preset as settings_of
from ..settings import Settings
from .schema import CATEGORY, Control, schema
from .status import status_of


class LiteAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionPatch",
            display_name="LiteAttention",
            category=CATEGORY,
            description=(
                "Makes video sampling faster: attention tiles that did not matter at one step are "
                "skipped at the next ones. Anything it does not understand runs as before."
            ),
            search_aliases=[
                *("faster video", "sparse attention", "speed up video", "skip attention"),
                *("加速", "更快", "视频加速", "稀疏", "稀疏注意力"),
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The video model. Put this node last before the sampler; "
                    "LoRAs, SageAttention and others may come before it.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULT,
                    tooltip="How close the video comes to the one without LiteAttention, in dB of "
                    "PSNR, whatever the number of steps. Safe: 50 dB or more. Balanced: 42 or "
                    "more, start here. Fast: 35 or more. Calibrated on most videos of the demo's "
                    "small model; on other models, LiteAttention Compare measures it. "
                    "Ignored when a control is connected.",
                ),
                Control.Input(
                    "control",
                    optional=True,
                    tooltip="Optional: your own settings, from a LiteAttention Budget or Threshold "
                    "node. Replaces the preset.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with LiteAttention.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, preset: str, control: Settings | None = None
    ) -> io.NodeOutput:
        if not hasattr(model, "clone"):
            raise ValueError("LiteAttention: connect 'model' to a node that loads a model.")
        if not isinstance(control, Settings | None):
            raise ValueError(
                "LiteAttention: connect 'control' to a LiteAttention Budget or Threshold node, or "
                "leave it open."
            )
        show = status_of(cls.hidden.unique_id)
        return io.NodeOutput(apply_patch(model, control or settings_of(preset), show))
