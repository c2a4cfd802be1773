"""LiteAttentionCompare: how close two videos are, in figures and side by side."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..report.compare import compare, figures, side_by_side, text_table
from ..report.perceptual import lpips_distance
from .schema import CATEGORY, schema


class LiteAttentionCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionCompare",
            display_name="LiteAttention Compare",
            category=CATEGORY,
            description="Compares two videos frame by frame: PSNR, SSIM, and where they differ.",
            search_aliases=["psnr", "ssim", "compare videos", "compare images", "difference"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "reference", tooltip="The frames to compare with: made without LiteAttention."
                ),
                io.Image.Input(
                    "candidate",
                    tooltip="The frames to judge: same seed, same size, made with LiteAttention.",
                ),
                io.Float.Input(
                    "amplify",
                    default=8.0,
                    min=1.0,
                    max=64.0,
                    step=1.0,
                    tooltip="How much the difference is brightened in the picture. The figures "
                    "don't depend on it.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison",
                    tooltip="Reference, candidate and their difference, side by side, every frame.",
                ),
                io.String.Output(display_name="text", tooltip="PSNR and SSIM of every frame."),
            ],
        )

    @classmethod
    def execute(cls, reference: Tensor, candidate: Tensor, amplify: float) -> io.NodeOutput:
        progress = comfy.utils.ProgressBar(len(reference))
        closeness = compare(
            reference, candidate, on_frame=lambda: progress.update(1), lpips=lpips_distance()
        )
        text = text_table(closeness)
        image = side_by_side(reference, candidate, closeness, amplify)
        # On the node: the frame in which they are furthest apart.
        worst = image[closeness.worst : closeness.worst + 1]
        shown = ui.PreviewImage(worst, cls=cls).as_dict()
        shown |= {"text": (text,), "compare": (figures(closeness),)}
        return io.NodeOutput(image, text, ui=shown)
