"""The attention override that ComfyUI calls, directly or inside a graph of ``torch.compile``.

Everything that LiteAttention decides depends on the run, so none of it may become part of a
compiled graph. The graph contains one opaque operator instead, which decides whenever it runs. The
override is the same function in every run, so that one graph serves them all.
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
#: Keyword arguments that a call may have besides those of the operator, and still use it.
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
    """The name of the attention that is used where LiteAttention isn't."""
    user = options.get(OVERRIDE) or comfy_attention.optimized_attention
    while isinstance(user, partial):
        user = user.func
    named = user if hasattr(user, "__qualname__") else type(user)
    return f"{named.__module__}.{named.__qualname__}"


def is_ours(found: Any) -> bool:
    """Whether this attention override is LiteAttention's."""
    return isinstance(found, partial) and found.func is override


def override(previous: User | None, func: User, *arguments: Any, **named: Any) -> Tensor:
    """The override: calls that LiteAttention declines go unchanged to the override before ours, or
    to ComfyUI's ``func``."""
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
    """The override for newer versions of ComfyUI that pass ``q, k, v`` in containers, so that they
    can be freed early. Without it, ComfyUI would empty the containers before it calls
    :func:`override`."""
    if not torch.compiler.is_compiling():
        return answer(partial(_behind, previous), arguments, named)
    tensors = [container.take() for container in arguments[:3]]
    usual = comfy_attention.optimized_attention.__wrapped__
    return override(previous, usual, *tensors, *arguments[3:], **named)


def _behind(previous: User | None, *arguments: Any, **named: Any) -> Tensor:
    """Do a call that came in containers as ComfyUI would have done it without our override: with
    the one that was there before, if any."""
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
    """The call, made by a compiled graph. ``name``: ComfyUI's attention function in its place.

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
    """Whether a CUDA graph is being recorded, which would be replayed without asking us."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _operator() -> Any:
    """The operator. Its name contains a hash of this module's name, because a process may import
    the module twice (as ComfyUI's pack and as a package), and because the pack's module name is a
    path in any script, while torch accepts only ASCII."""
    name = f"liteattention_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}::attend"
    operator = torch.library.custom_op(name, _compiled_call, mutates_args=(), schema=SCHEMA)
    operator.register_fake(_shape)
    return operator


_compiled = _operator()
