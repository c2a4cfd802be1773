"""LiteAttentionLoadProfile: start with what earlier runs learned."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..presets import DEFAULT, preset
from ..settings import Settings
from .files import DEFAULT_NAME, check_name, load_named, source_path
from .schema import CATEGORY, Control, control_output, schema


class LiteAttentionLoadProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionLoadProfile",
            display_name="LiteAttention Load Profile",
            category=CATEGORY,
            description="Lets LiteAttention start with what an earlier run of the same model "
            "learned, instead of learning it again.",
            search_aliases=["load profile", "attention profile", "calibration"],
            inputs=[
                io.String.Input(
                    "profile",
                    default=DEFAULT_NAME,
                    tooltip="A file in ComfyUI's output or input folder, as LiteAttention Save "
                    "Profile names it, or owner/repo@commit:file on the Hugging Face hub.",
                ),
                Control.Input(
                    "control",
                    optional=True,
                    tooltip="Optional: the settings to use it with, from a LiteAttention Budget "
                    f"node. Without: the preset {DEFAULT}.",
                ),
            ],
            outputs=[control_output()],
        )

    @classmethod
    def execute(cls, profile: str, control: Settings | None = None) -> io.NodeOutput:
        return io.NodeOutput(replace(control or preset(DEFAULT), profile=load_named(profile)))

    @classmethod
    def validate_inputs(cls, profile: str | None) -> bool | str:
        # Not whether the file is there: a run that is queued before this one may yet save it.
        return check_name(profile, may_be_hub=True)

    @classmethod
    def fingerprint_inputs(cls, profile: str, control: Settings | None = None) -> object:
        """A file that was saved anew is loaded anew."""
        path = source_path(profile)
        return path.stat().st_mtime_ns if path is not None and path.is_file() else None
