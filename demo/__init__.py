"""The small video model of the demo: its training, its weights, its nodes for ComfyUI.

As a Python package (`demo`) it needs torch and, for training and sampling, diffusers. Inside
ComfyUI's custom_nodes folder, `comfy_entrypoint` adds the three demo nodes, and
`workflows` their templates: with the pack alone they would miss nodes and weights.
"""


async def comfy_entrypoint():
    """Called by ComfyUI alone, so that importing the package works without ComfyUI."""
    from .comfy_nodes import LiteAttentionDemoExtension

    return LiteAttentionDemoExtension()
