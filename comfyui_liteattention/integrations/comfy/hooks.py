"""The attention override that ComfyUI calls, as it is and inside a graph of ``torch.compile``.

Everything that LiteAttention decides depends on the run, so none of it may become a part of a
compiled graph. The graph holds one opaque operator instead, which asks when it runs. The override
is the same object in every run, so that one graph serves them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from torch import Tensor

from .calls import User, answer, asked, current

OVERRIDE = "optimized_attention_override"
#: What a call may say without ruling out the operator, beside what the operator takes.
GRAPHS_KNOW = {
    "attn_precision",
    "transformer_options",
    "_inside_attn_wrapper",
    "low_precision_attention",
}
RECORDED = "CUDA graphs replay what they recorded: use a torch.compile mode without them"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, bool skip_reshape, "
    "bool skip_output_reshape, str name) -> Tensor"
)


def install(options: dict[str, Any]) -> User | None:
    """Put the override into transformer options; returns the one that was there before."""
    previous = options.get(OVERRIDE)
    ours: Any = partial(override, previous)
    if hasattr(comfy_attention, "AttentionTensorContainer"):
        ours.container_function = partial(override_containers, previous)
    options[OVERRIDE] = ours
    return previous


def attention_in_use(options: Mapping[str, Any]) -> str:
    """The name of what attends where we don't."""
    user = options.get(OVERRIDE) or comfy_attention.optimized_attention
    while isinstance(user, partial):
        user = user.func
    named = user if hasattr(user, "__qualname__") else type(user)
    return f"{named.__module__}.{named.__qualname__}"


def is_ours(found: Any) -> bool:
    """Whether this attention override is LiteAttention's."""
    return isinstance(found, partial) and found.func is override


def override(previous: User | None, func: User, *arguments: Any, **named: Any) -> Tensor:
    """What LiteAttention declines goes, as it came, to whoever was there before."""
    user = func if previous is None else partial(previous, func)
    if not torch.compiler.is_compiling():
        return answer(user, arguments, named)
    call = asked(*arguments, **named)
    if (
        func.__module__ == comfy_attention.__name__
        and call.q.shape == call.k.shape == call.v.shape
        and call.others["attn_precision"] is None
        and named.get("low_precision_attention") is not False
        and GRAPHS_KNOW.issuperset(call.others)
    ):
        flags = call.skip_reshape, call.skip_output_reshape, func.__name__
        return _compiled(call.q, call.k, call.v, call.mask, call.heads, *flags)
    return user(*arguments, **named)


def override_containers(previous: User | None, *arguments: Any, **named: Any) -> Tensor:
    """What newer versions of ComfyUI call instead where ``q, k, v`` come in containers, so that
    whoever takes them owns them alone. Without this they would be emptied on the way to us."""
    if not torch.compiler.is_compiling():
        return answer(partial(_behind, previous), arguments, named)
    tensors = [container.take() for container in arguments[:3]]
    usual = comfy_attention.optimized_attention.__wrapped__
    return override(previous, usual, *tensors, *arguments[3:], **named)


def _behind(previous: User | None, *arguments: Any, **named: Any) -> Tensor:
    """Who does a call that came in containers, if not we: as ComfyUI decides, had it not found our
    override, but the one that was there before."""
    if previous is None:
        return comfy_attention.optimized_attention(*arguments, **named)
    contained = not isinstance(arguments[0], Tensor)
    if contained and hasattr(previous, "container_function"):
        return previous.container_function(*arguments, **named)
    if contained:
        arguments = (*(container.take() for container in arguments[:3]), *arguments[3:])
    return previous(comfy_attention.optimized_attention.__wrapped__, *arguments, **named)


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
    named = dict(mask=mask, attn_precision=None, _inside_attn_wrapper=True, **flags)
    if forward is not None and _being_recorded(q):
        forward.decline(RECORDED)
        return user(q, k, v, heads, **named)
    return answer(user, (q, k, v, heads), named, compiled=True).contiguous()


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
