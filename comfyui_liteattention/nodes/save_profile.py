"""LiteAttentionSaveProfile: keep what the last run learned."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..integrations.comfy import patch_of
from ..profile import learned_in
from ..profile_file import save
from .files import DEFAULT_NAME, check_name, check_replaceable, output_path
from .schema import CATEGORY, after_sampling, latent_output, schema
from .status import status_of

log = logging.getLogger(__name__)


class LiteAttentionSaveProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LiteAttentionSaveProfile",
            display_name="LiteAttention Save Profile",
            category=CATEGORY,
            description="Saves what LiteAttention learned about the model in the sampling run that "
            "made this latent, for LiteAttention Load Profile.",
            search_aliases=["save profile", "attention profile", "calibration"],
            is_output_node=True,
            inputs=[
                *after_sampling(),
                io.String.Input(
                    "file_name",
                    default=DEFAULT_NAME,
                    tooltip="Name of the file below ComfyUI's output folder. A profile of that "
                    "name is replaced.",
                ),
            ],
            outputs=[latent_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, latent: dict, file_name: str) -> io.NodeOutput:
        patch = patch_of(model)
        path = output_path(file_name)
        try:
            learned = learned_in(patch.last_report if patch else None)
        except ValueError as error:  # the video is made, and must not be lost for that
            text = str(error)
            log.warning(text)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(path)
            save(learned, path)
            text = f"LiteAttention: profile of {len(learned.layers)} layers saved: {path.name}"
        show = status_of(cls.hidden.unique_id)
        if show is not None:
            show(text)
        return io.NodeOutput(latent, ui={"text": (text,)})

    @classmethod
    def validate_inputs(cls, file_name: str | None) -> bool | str:
        return check_name(file_name, may_be_hub=False)
