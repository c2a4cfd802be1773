"""LiteAttentionReport: what the last run skipped, what it lost, why something stayed dense."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..integrations.comfy.first_words import in_comfyui
from ..integrations.comfy.sampler_nodes import nearest
from ..integrations.comfy.session import Patch, patch_of
from ..report.animation import animation
from ..report.canvas import THEMES
from ..report.pictures import pictures
from ..report.statistics import RunReport, figures, node_line
from ..report.table import text_table
from .schema import CATEGORY, after_sampling, latent_output, schema


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
                *after_sampling(),
                io.Combo.Input(
                    "theme",
                    options=list(THEMES),
                    default=next(iter(THEMES)),
                    optional=True,
                    tooltip="Background of the pictures: dark or light.",
                ),
            ],
            outputs=[
                latent_output(),
                io.Image.Output(
                    display_name="map",
                    tooltip="Tile maps, one per layer: what was still computed at the end of the "
                    "run. Up to 12 maps on a picture.",
                ),
                io.String.Output(display_name="text", tooltip="The report as text."),
                io.Image.Output(
                    display_name="charts",
                    tooltip="Two pictures: what was computed by step and layer; computed tiles, "
                    "lost mass and seconds step by step.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, latent: dict, theme: str = "dark") -> io.NodeOutput:
        if theme not in THEMES:  # ComfyUI 0.3.75 does not validate this in API graphs
            theme = next(iter(THEMES))
        patch = patch_of(model)
        report = _report_of(patch, cls.hidden.dynprompt, cls.hidden.unique_id) if patch else None
        if patch is None:
            text = "LiteAttention inactive: this model has not been through a LiteAttention node."
        elif report is None:
            text = "LiteAttention: no run yet. Connect the sampler's output to 'latent'."
        else:
            text = text_table(report)
        maps, charts = pictures(report, theme, note=text.partition("\n")[0])
        drawn = [*charts, *maps] if report and report.calls else []
        shown = ui.PreviewImage(drawn, cls=cls).as_dict() if drawn else {}
        moving = animation(report, theme)
        if moving is not None:
            # Shown by our own script. Among the images it would not move, or, if they were marked
            # as animated, be the only one shown.
            shown["liteattention_animation"] = (_save(moving),)
        if report is not None:
            # For the LiteAttention node, which has nothing to say where all of this comes from
            # ComfyUI's cache.
            shown["liteattention_status"] = (in_comfyui(node_line(report)),)
        shown |= {"text": (text,), "report": (figures(report),) if report else ()}
        return io.NodeOutput(latent, maps, text, charts, ui=shown)


def _report_of(patch: Patch, graph: Any, node: str | None) -> RunReport | None:
    """The report of the run that made this node's latent, since several samplers may use one model.
    In a loop the sampler can't be found by following the graph; there the last run counts.
    """
    if graph is None or node is None:
        return patch.last_report
    sampler = nearest(graph, node, "latent", [one for one in patch.reports if one is not None])
    if sampler is not None:
        return patch.reports[sampler]
    original = graph.get_original_prompt()
    expanded = [report for one, report in patch.reports.items() if one not in original]
    return expanded[-1] if expanded else None


def _save(webp: bytes) -> ui.SavedResult:
    """Save into ComfyUI's temporary folder; returns the file in the form that ``ui`` expects."""
    name = f"liteattention_maps_{secrets.token_hex(8)}.webp"
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(webp)
    return ui.SavedResult(name, "", io.FolderType.temp)
