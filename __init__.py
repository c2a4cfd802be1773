"""ComfyUI entry point. The package itself is ``comfyui_liteattention``."""

from __future__ import annotations


async def comfy_entrypoint():
    from .comfyui_liteattention.nodes import LiteAttentionExtension

    return LiteAttentionExtension()
