"""LiteAttentionReport: what the last run skipped, what it lost, why something stayed dense."""

from __future__ import annotations

from comfy_api.latest import io

from ..integrations.comfy import patch_of
from ..report import figures, text_table
from ..report_images import tile_map_image
from .schema import CATEGORY, schema


class LiteAttentionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionReport",
            display_name="LiteAttention Report",
            category=CATEGORY,
            description="Shows what LiteAttention did in the sampling run that made this latent.",
            search_aliases=["attention map", "sparsity report", "skipped tiles"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that came out of the LiteAttention node."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The sampler's output: makes the report wait for it. Passed on.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent, unchanged."),
                io.Image.Output(
                    display_name="map",
                    tooltip="Tile maps, one per layer: bright tiles were still computed at the "
                    "end of the run.",
                ),
                io.String.Output(display_name="text", tooltip="The report as text."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, latent: dict) -> io.NodeOutput:
        patch = patch_of(model)
        report = patch.last_report if patch else None
        if patch is None:
            text = "LiteAttention inactive: this model has not been through a LiteAttention node."
        elif report is None:
            text = "LiteAttention: no run yet. Connect the sampler's output to 'latent'."
        else:
            text = text_table(report)
        image = tile_map_image(report.maps if report else ())
        shown = {"text": (text,), "report": (figures(report),) if report else ()}
        return io.NodeOutput(latent, image, text, ui=shown)
