"""The attention override that ComfyUI calls, as it is and inside a graph of ``torch.compile``.

Everything that LiteAttention decides depends on the run, so none of it may become a part of a
compiled graph. The graph holds one opaque operator instead, which asks when it runs. The override
is the same object in every run, so that one graph serves them all.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from torch import Tensor

from .calls import User, answer, current

OVERRIDE = "optimized_attention_override"
#: What a call may say without ruling out the operator, beside what the operator takes.
UNDERSTOOD = {"transformer_options", "_inside_attn_wrapper", "low_precision_attention"}
RECORDED = "CUDA graphs replay what they recorded: use a torch.compile mode without them"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, bool skip_reshape, "
    "bool skip_output_reshape, str name) -> Tensor"
)


def install(options: dict[str, Any]) -> User | None:
    """Put the override into transformer options; returns the one that was there before."""
    previous = options.get(OVERRIDE)
    options[OVERRIDE] = partial(override, previous)
    return previous


def override(
    previous: User | None,
    func: User,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """What LiteAttention declines goes to whoever was there before."""
    user = func if previous is None else partial(previous, func)
    flags = dict(skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    passed = dict(kwargs, mask=mask, attn_precision=attn_precision, **flags)
    if not torch.compiler.is_compiling():
        return answer(user, q, k, v, heads, passed)
    if (
        func.__module__ == comfy_attention.__name__
        and q.shape == k.shape == v.shape
        and attn_precision is None
        and kwargs.get("low_precision_attention") is not False
        and UNDERSTOOD.issuperset(kwargs)
    ):
        return _compiled(q, k, v, mask, heads, skip_reshape, skip_output_reshape, func.__name__)
    return user(q, k, v, heads, **passed)


def _compiled_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    name: str,
) -> Tensor:
    """The call, made by a compiled graph. ``name``: ComfyUI's attention function behind it.

    The model's own layer index is not known here; layers are told apart by the order of calls.
    """
    forward = current.get()
    user = getattr(comfy_attention, name)
    if forward is not None and forward.previous is not None:
        user = partial(forward.previous, user)
    flags = dict(skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    passed = dict(mask=mask, attn_precision=None, _inside_attn_wrapper=True, **flags)
    if forward is not None and _being_recorded(q):
        forward.decline(RECORDED)
        return user(q, k, v, heads, **passed)
    return answer(user, q, k, v, heads, passed).contiguous()


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    name: str,
) -> Tensor:
    if skip_reshape:
        batch, _, length, size = q.shape
    else:
        batch, length = q.shape[:2]
        size = q.shape[2] // heads
    if skip_output_reshape:
        return q.new_empty(batch, heads, length, size)
    return q.new_empty(batch, length, heads * size)


def _being_recorded(q: Tensor) -> bool:
    """Whether a CUDA graph is made of what happens now, to be replayed without us."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _operator() -> Any:
    """Named after this module, of which one process may have two: ComfyUI's pack and a package. The
    pack's name is its path, in whatever script, and torch takes ASCII alone."""
    name = f"liteattention_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}::attend"
    operator = torch.library.custom_op(name, _compiled_call, mutates_args=(), schema=SCHEMA)
    operator.register_fake(_shape)
    return operator


_compiled = _operator()
