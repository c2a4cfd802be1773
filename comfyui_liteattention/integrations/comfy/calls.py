"""ComfyUI: handling the attention calls made during one call of a diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...attention import Part, split
from ...backends.base import Inputs
from ...eligibility import CROSS_ATTENTION, dense_reason
from ...never_slower.dense import Dense
from ...run import Run
from ...schedule import Progress
from .families import Form, FormOrReason, at_the_call
from .layers import LayerCalls
from .masks import Kept, kept_tokens
from .streams import Stream

log = logging.getLogger(__name__)

MASK = "a mask (regional prompt or padding)"
FOREIGN = "attention of another network beside the model, such as a ControlNet"
#: Keyword arguments that don't change what is computed, or that we handle.
UNDERSTOOD = {
    "attn_precision",
    "transformer_options",
    "_inside_attn_wrapper",
    "low_precision_attention",
    "preferred_attention",
    "scale",
    "enable_gqa",
}

User = Callable[..., Tensor]


class Asked(NamedTuple):
    """An attention call as ComfyUI makes it: ``q, k, v`` are tensors, or containers from which a
    tensor can be taken once."""

    q: Any
    k: Any
    v: Any
    heads: int
    mask: Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    others: Mapping[str, Any]

    def split(self) -> list[Tensor]:
        """``q, k, v [B, H, L, D]``, without taking them out of containers."""
        tensors = [t if isinstance(t, Tensor) else t.peek() for t in self[:3]]
        if self.skip_reshape:
            return tensors
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in tensors]

    def taken(self) -> None:
        """Empty the containers: ``q, k, v`` are not needed any more."""
        for tensor in self[:3]:
            if not isinstance(tensor, Tensor):
                tensor.take()

    def ineligible(self) -> str | None:
        """Why the arguments rule this call out, or None."""
        others = self.others
        if others.get("enable_gqa"):
            return "grouped or uneven heads (q, k and v have different shapes)"
        if others.get("low_precision_attention") is False:
            return "the model asks for exact attention here"
        unknown = [n for n in others if n not in UNDERSTOOD and others[n] not in (None, False)]
        if unknown:
            return f"arguments that LiteAttention does not know ({', '.join(unknown)})"
        return None


def asked(
    q: Any,
    k: Any,
    v: Any,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **others: Any,
) -> Asked:
    """The arguments of a ComfyUI attention function, whether given by position or by name."""
    others["attn_precision"] = attn_precision
    return Asked(q, k, v, heads, mask, skip_reshape, skip_output_reshape, others)


class Forward:
    """One call of the diffusion model: its run, step and streams, and which layers have asked for
    attention so far. Found through :data:`current`, only in the thread of that call.

    ``previous``: the attention override that was there before ours. ``asked``: whether any call of
    attention has reached us yet.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        streams: Sequence[Stream],
        form: FormOrReason,
        layers: LayerCalls,
        previous: User | None = None,
    ) -> None:
        self.run = run
        self.progress = progress
        self.streams = streams
        self.form = form
        self.layers = layers
        self.previous = previous
        self.asked = False
        self._mask: tuple[Tensor, list[Kept] | None] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the current call of the model."""
        token = current.set(self)
        try:
            yield
        finally:
            current.reset(token)

    def decline(self, reason: str) -> None:
        """Count an attention call that stays dense."""
        if self.run.decline(reason) and reason != CROSS_ATTENTION:
            log.info("LiteAttention: calls stay dense: %s", reason)

    def form_of(self, options: Mapping[str, Any]) -> FormOrReason:
        """The form of a call with these transformer options."""
        shown = None if isinstance(self.form, Form) else at_the_call(options)
        return self.form if shown is None else shown

    def kept(self, mask: Tensor, batch: int, length: int, form: Form) -> list[Kept] | None:
        """:func:`kept_tokens`, remembered, because most models give all layers the same mask."""
        if self._mask is None or self._mask[0] is not mask:
            settings, kept = self.run.settings, None
            # dense_keys and dense_queries are places in the whole sequence, not in what is kept.
            if form.video is not None and not settings.dense_keys and not settings.dense_queries:
                kept = kept_tokens(mask, batch, length, form.video, len(self.streams))
            self._mask = mask, kept
        return self._mask[1]


current: ContextVar[Forward | None] = ContextVar("liteattention_forward", default=None)


def answer(
    user: User, arguments: Sequence[Any], named: Mapping[str, Any], compiled: bool = False
) -> Tensor:
    """Do one attention call, or pass its arguments on unchanged to ``user``, the user's own
    attention."""
    forward = current.get()
    if forward is None:
        return user(*arguments, **named)
    forward.asked = True
    module = None if compiled else forward.layers.module()
    if forward.previous is None:  # any override, so ours too, hides a layer's preference
        user = _preferred(module) or user
    try:
        call = asked(*arguments, **named)
    except TypeError as error:
        forward.decline(f"arguments that LiteAttention does not know ({error})")
        return user(*arguments, **named)
    dense = Dense(partial(user, *arguments, **named))
    out = _attend(forward, module, call, user, dense)
    if out is None:
        return dense()
    call.taken()
    return out if call.skip_output_reshape else out.transpose(1, 2).flatten(2)


def _preferred(module: nn.Module | None) -> User | None:
    """The attention function that a checkpoint prefers for this layer (newer ComfyUI versions)."""
    return getattr(getattr(module, "comfy_attention", None), "function", None)


def _attend(
    forward: Forward, module: nn.Module | None, call: Asked, user: User, dense: Dense
) -> Tensor | None:
    """Attention ``[B, H, L, D]``. None: the caller has to call ``dense``, after this has returned,
    because the attention may free tensors that come in containers, to which ours still refer here.
    """
    run, options = forward.run, call.others.get("transformer_options") or {}
    form = forward.form_of(options)
    q, k, v = call.split()
    reason = form if isinstance(form, str) else call.ineligible()
    reason = reason or dense_reason(q, k, v, len(forward.streams), run.settings, run.backend)
    if reason is None and isinstance(form, Form):
        reason = form.misfit(q.shape[2])
    kept = None
    if reason is None and isinstance(form, Form) and call.mask is not None:
        kept = forward.kept(call.mask, q.shape[0], q.shape[2], form)
        reason = MASK if kept is None else None
    layer = None if reason else forward.layers.enter(module, options)
    if layer is None:
        forward.decline(reason or FOREIGN)
        return None
    assert isinstance(form, Form)
    streams = [stream._replace(part=layer.part) for stream in forward.streams]
    scale = call.others.get("scale") or q.shape[-1] ** -0.5
    if kept is None:
        inputs = Inputs(q, k, v, scale)
        return run.attend(layer.name, streams, forward.progress, inputs, form.video, dense)
    others = {n: value for n, value in call.others.items() if n != "attn_precision"}
    unmasked = dict(others, mask=None, skip_reshape=True, skip_output_reshape=True)

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return user(q, k, v, call.heads, **unmasked)

    return _attend_kept(forward, layer.name, streams, kept, (q, k, v), scale, dense, bare)


def _attend_kept(
    forward: Forward,
    layer: str,
    streams: Sequence[Stream],
    kept: list[Kept],
    qkv: Sequence[Tensor],
    scale: float,
    dense: Dense,
    bare: User,
) -> Tensor | None:
    """Attention to the tokens that the mask doesn't hide: ``kept`` for all streams, or for each.
    ``bare`` is the user's own attention without a mask."""
    shares = [streams] if len(kept) == 1 else [[stream] for stream in streams]
    parts: list[Part] = []
    groups = []
    chunks = (t.chunk(len(kept)) for t in qkv)
    for share, one, q, k, v in zip(shares, kept, *chunks, strict=True):
        q_seen, k_seen, v_seen = (t[:, :, one.tokens] for t in (q, k, v))
        seen = Inputs(q_seen, k_seen, v_seen, scale)
        groups.append((len(share), one, q[:, :, one.hidden], seen))
        parts += split(share, seen, one.video)
    found = forward.run.attend_parts(layer, forward.progress, parts, dense)
    if found is None:
        return None
    outs = iter(found)
    joined = []
    for count, one, hidden, seen in groups:
        out = torch.cat([next(outs) for _ in range(count)])
        if hidden.shape[2]:  # the hidden tokens' own rows, which no other token ever attends to
            out = one.join(out, bare(hidden, seen.k, seen.v))
        joined.append(out)
    return torch.cat(joined)
