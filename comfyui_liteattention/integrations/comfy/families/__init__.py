"""Which models are supported: where the video tokens of a self-attention call lie.

All that a self-attention call shows is its length. What else is in the sequence (text, reference
images, guides) follows from the arguments of the model, so the exact length is known before the
model runs. A call of any other length is not the video's self-attention, and stays dense.

**A new model is added** in the file of its family: a function that gives the :class:`Form` of its
calls, and an entry in that file's ``FAMILY``.
"""

from __future__ import annotations

from math import prod
from typing import Any

from . import hunyuan, lightricks, minimax, others, wan
from .minimax import at_the_call
from .sequence import Family, Form, FormOrReason, ModelCall, grid_of

__all__ = ["FAMILIES", "Form", "FormOrReason", "ModelCall", "at_the_call", "describe_call"]

FAMILIES: Family = {
    **minimax.FAMILY,
    **lightricks.FAMILY,
    **wan.FAMILY,
    **hunyuan.FAMILY,
    **others.FAMILY,
}

#: Patch sizes that an unknown video model may use: 2 x 2 latent pixels to a token, or one.
USUAL_PATCHES = ((1, 2, 2), (1, 1, 1))


def describe_call(diffusion_model: Any, call: ModelCall) -> FormOrReason:
    """The form of the video's self-attention in one call of a ComfyUI diffusion model, or the
    reason why it stays dense."""
    kind = type(diffusion_model)
    describe = FAMILIES.get((kind.__module__, kind.__name__), _generic)
    try:
        return describe(diffusion_model, call)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"this version of {kind.__name__} is not understood ({error})"


def _generic(model: Any, call: ModelCall) -> FormOrReason:
    """The form for an unknown video model: only calls over the video and nothing else.

    Text or references in the sequence would make it longer than the video, and such calls stay
    dense. The order of the tokens is not known.
    """
    name = type(model).__name__
    if len(call.latent) != 5:
        return f"this model is not supported ({name})"
    own = getattr(model, "patch_size", None)
    patches = (own,) if isinstance(own, (tuple, list)) and len(own) == 3 else USUAL_PATCHES
    lengths = frozenset(prod(grid_of(call.latent, patch)) for patch in patches)
    note = f"generic mode: {name} is not known; only attention over the bare video is skipped"
    return Form(lengths, None, note, unknown=name)
