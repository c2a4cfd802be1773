"""ComfyUI: what is done with the attention calls of one call of a diffusion model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.base import Inputs
from ...eligibility import CROSS_ATTENTION, dense_reason
from ...run import Run
from ...schedule import Progress
from .families import Form, FormOrReason
from .masks import Kept, kept_tokens

log = logging.getLogger(__name__)

MASK = "a mask (regional prompt or padding)"

User = Callable[..., Tensor]


class Stream(NamedTuple):
    """What must never share tiles: conditionings, context windows, devices, and passes with other
    blocks (skip-layer guidance asks the same conditioning again, with fewer layers)."""

    kind: int
    uuid: Any
    window: tuple[int, ...] | None
    device: str
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = {0: "positive", 1: "negative"}.get(self.kind, f"conditioning {self.kind}")
        if self.window is not None:
            name += f" {self.window[0]}-{self.window[-1]}"
        return f"{name} with replaced blocks" if self.replaced else name


def streams_of(options: dict[str, Any], device: torch.device) -> list[Stream]:
    """One key per batch part."""
    context = options.get("context_window")
    window = None if context is None else tuple(context.index_list)
    kinds = options.get("cond_or_uncond") or [0]
    uuids = options.get("uuids") or range(len(kinds))
    replaced = tuple(sorted(map(str, options.get("patches_replace", {}).get("dit", ()))))
    return [
        Stream(kind, uuid, window, str(device), replaced)
        for kind, uuid in zip(kinds, uuids, strict=True)
    ]


class Forward:
    """One call of the diffusion model: of which run, at which step, for which streams, and how many
    layers so far. It is found through :data:`current`, in the thread of that call alone.

    ``previous``: the attention override that was there before ours.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        streams: Sequence[Any],
        form: FormOrReason,
        previous: User | None = None,
    ) -> None:
        self.run = run
        self.progress = progress
        self.streams = streams
        self.form = form
        self.previous = previous
        self._calls: Counter[str] = Counter()
        self._mask: tuple[Tensor, list[Kept] | None] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While this call of the model runs."""
        token = current.set(self)
        try:
            yield
        finally:
            current.reset(token)

    def decline(self, reason: str) -> None:
        """Count an attention call that stays dense."""
        if self.run.decline(reason) and reason != CROSS_ATTENTION:
            log.info("LiteAttention: calls stay dense: %s", reason)

    def next_layer(self, options: Mapping[str, Any]) -> str:
        """Name of the layer that attends now: the model's own index, and the order of calls.

        The order tells apart layers without an index, and several attentions of one block.
        """
        index = options.get("block_index")
        block = "" if index is None else f"{options.get('block_type', 'block')}-{index}."
        number = self._calls[block]
        self._calls[block] += 1
        return f"{block}{number}"

    def kept(self, mask: Tensor, batch: int, length: int) -> list[Kept] | None:
        """See :func:`kept_tokens`. Most models give all layers the same mask: it is looked into
        once."""
        if self._mask is None or self._mask[0] is not mask:
            settings = self.run.settings
            video = self.form.video if isinstance(self.form, Form) else None
            kept = None
            # What settings say about places in the sequence would be said about other places.
            if video is not None and not settings.dense_keys and not settings.dense_queries:
                kept = kept_tokens(mask, batch, length, video, len(self.streams))
            self._mask = mask, kept
        return self._mask[1]


current: ContextVar[Forward | None] = ContextVar("liteattention_forward", default=None)


def answer(
    user: User, q: Tensor, k: Tensor, v: Tensor, heads: int, passed: Mapping[str, Any]
) -> Tensor:
    """One attention call as ComfyUI makes it, with the arguments ``passed`` by name: ours, or that
    of the ``user``, who then gets everything untouched."""
    forward = current.get()
    if forward is None:
        return user(q, k, v, heads, **passed)
    split = (q, k, v)
    if not passed["skip_reshape"]:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in split)
    dense = cache(partial(user, *split, heads, **passed))
    out = _attend(forward, user, q, k, v, heads, passed, dense)
    if out is None:
        return dense()
    return out if passed["skip_output_reshape"] else out.transpose(1, 2).flatten(2)


def _attend(
    forward: Forward,
    user: User,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    passed: Mapping[str, Any],
    dense: User,
) -> Tensor | None:
    """Attention of ``q, k, v [B, H, L, D]``; None: the user has to do it, as ``dense`` does."""
    run, mask = forward.run, passed["mask"]
    reason = _ineligible(forward.form, passed)
    reason = reason or dense_reason(q, k, v, len(forward.streams), run.settings, run.backend)
    if reason is None and isinstance(forward.form, Form):
        reason = forward.form.misfit(q.shape[2])
    kept = None
    if reason is None and mask is not None:
        kept = forward.kept(mask, q.shape[0], q.shape[2])
        reason = MASK if kept is None else None
    if reason is not None:
        forward.decline(reason)
        return None
    assert isinstance(forward.form, Form)
    layer = forward.next_layer(passed.get("transformer_options") or {})
    scale = passed.get("scale") or q.shape[-1] ** -0.5
    streams, video = forward.streams, forward.form.video
    if kept is None:
        call = Inputs(q, k, v, scale)
        return run.attend(layer, streams, forward.progress, call, video, dense)
    unmasked = dict(passed, mask=None, skip_reshape=True, skip_output_reshape=True)

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return user(q, k, v, heads, **unmasked)

    return _attend_kept(forward, layer, kept, q, k, v, scale, dense, bare)


def _attend_kept(
    forward: Forward,
    layer: str,
    kept: list[Kept],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dense: User,
    bare: User,
) -> Tensor | None:
    """Attention to the tokens that count: of all streams at once where these are the same ones for
    all. ``bare`` is the user's attention without a mask."""
    groups: list[tuple[Any, ...]] = [(forward.streams, kept[0], q, k, v, dense)]
    if len(kept) > 1:
        chunks = (t.chunk(len(kept)) for t in (q, k, v))
        parts = zip(forward.streams, kept, *chunks, strict=True)
        groups = [([stream], *rest, None) for stream, *rest in parts]
    outs = []
    for streams, one, qs, ks, vs, timed in groups:
        hidden = qs[:, :, one.hidden]
        qs, ks, vs = (t[:, :, one.tokens] for t in (qs, ks, vs))
        progress = forward.progress
        call = Inputs(qs, ks, vs, scale)
        out = forward.run.attend(layer, streams, progress, call, one.video, timed)
        if out is None:
            return None
        if hidden.shape[2]:  # no token that counts ever sees what these get
            out = one.join(out, bare(hidden, ks, vs))
        outs.append(out)
    return torch.cat(outs)


def _ineligible(form: FormOrReason, passed: Mapping[str, Any]) -> str | None:
    """Why ComfyUI's own arguments rule this call out, or None."""
    if passed.get("enable_gqa"):
        return "grouped or uneven heads (q, k and v have different shapes)"
    if passed.get("low_precision_attention") is False:
        return "the model asks for exact attention here"
    return form if isinstance(form, str) else None
