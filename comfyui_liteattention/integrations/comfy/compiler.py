"""ComfyUI: staying out of the way of its compiler (0.35 and newer, NVIDIA cards).

That records what the blocks of a model allocate on the card, and gives them the same addresses at
each step. It takes all blocks for alike, and what a block allocates to be free when the block ends.
Ours keep a tile map from step to step, and what a call allocates depends on how much it skips: so
our calls allocate in a pause of the recording.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    from comfy import model_prefetch
except ImportError:  # an older ComfyUI, or a library that it needs is missing
    model_prefetch = None


def paused() -> AbstractContextManager[object]:
    """While our own work of one attention call is done, and nothing of ComfyUI's: pauses don't
    nest, and what is freed inside counts as kept."""
    pause = getattr(model_prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
