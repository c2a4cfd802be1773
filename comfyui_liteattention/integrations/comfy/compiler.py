"""ComfyUI: keeping our allocations apart from its compiler's (0.35 and newer, NVIDIA cards).

The compiler records the allocations of a model's blocks on the card and reuses the same addresses
at each step. It assumes that all blocks allocate the same, and free it all before they end. Neither
is true of our calls: tile maps are kept from step to step, and what a call allocates depends on how
much it skips. So our calls pause the recording while they allocate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    from comfy import model_prefetch
except ImportError:  # an older ComfyUI, or a missing dependency of this module
    model_prefetch = None


def paused() -> AbstractContextManager[object]:
    """A pause of the recording for our own part of one attention call. Nothing of ComfyUI's may run
    inside: pauses don't nest, and memory freed inside still counts as in use."""
    pause = getattr(model_prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
