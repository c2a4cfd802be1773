"""ComfyUI entry point. The package itself is ``comfyui_liteattention``."""

from __future__ import annotations

#: Help pages of the nodes: docs/<node>/<language>.md
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .comfyui_liteattention.nodes import LiteAttentionExtension

    return LiteAttentionExtension()
