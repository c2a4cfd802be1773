"""diffusers: handling the attention calls made during one call of a transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import Part
from ...backends.base import Inputs
from ...eligibility import CROSS_ATTENTION, dense_reason
from ...never_slower.dense import Dense
from ...run import Run
from ...schedule import Progress
from ...token_order import VideoTokens, arrange_part, put, take

# Before the other imports: it raises a clear error where diffusers is too old.
from .routes import Extra  # isort: split

from .masks import Padding, tail_padding
from .parallel import GRADIENTS

log = logging.getLogger(__name__)

MASK = "an attention mask"
MIXED = "several processes share a sequence that is not video alone"
PINNED = "ring attention with tokens that are never skipped (use Ulysses)"


class Place(NamedTuple):
    """Where a call happens: step and position, conditioning, device, and which transformer.
    ``cached``: the transformer uses a step cache, so that its calls can't be repeated."""

    progress: Progress
    stream: str
    device: torch.device
    prefix: str
    cached: bool = False


class TransformerCall:
    """One call of a transformer. ``video``, given a sequence length, says where the video lies in
    it, or why that is unknown; ``end`` is called when the transformer has returned."""

    def __init__(
        self,
        run: Run,
        place: Place,
        video: Callable[[int], VideoTokens | str | None],
        end: Callable[[], None],
    ) -> None:
        self._run = run
        self._place = place
        self._video = video
        self._end = end
        # Asked here, because checkpointed layers first run without gradients even in training.
        self._training = torch.is_grad_enabled()

    def attend(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, extra: Extra
    ) -> Tensor | None:
        """See :class:`.routes.Call`."""
        # State created in inference mode could not be updated outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            out = self._attend_if_eligible(layer, q, k, v, scale, extra)
            return None if out is None or (self._place.cached and not self._run.sound()) else out

    def _attend_if_eligible(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, extra: Extra
    ) -> Tensor | None:
        reason = extra.reason or self._ineligible(q)
        # With context parallelism, q may hold only this process's queries.
        whole = k if extra.across else q
        reason = reason or dense_reason(whole, k, v, 1, self._run.settings, self._run.backend)
        padding = None
        if reason is None and extra.mask is not None:
            padding = _padding(extra.mask, q)
            reason = MASK if padding is None else None
        if reason is not None:
            self.decline(reason)
            return None
        name = self._place.prefix + layer.rpartition(".")[0]
        stream = f"{self._place.stream} row {extra.row}" if extra.row else self._place.stream
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if extra.across:
            return self._across(name, stream, q, k, v, scale, extra)
        if padding is None:
            return self._attend(name, stream, q, k, v, scale, extra.dense)
        return self._padded(name, stream, Inputs(q, k, v, scale), padding, extra.dense)

    def decline(self, reason: str) -> None:
        """Count a call that stays dense."""
        if self._run.decline(reason) and reason != CROSS_ATTENTION:
            log.info("LiteAttention: calls stay dense: %s", reason)

    def end(self, seconds: float) -> bool:
        """The transformer returned; see :meth:`.Run.end_call`."""
        sound = self._run.end_call(self._place.progress.step, seconds)
        self._end()
        return sound

    def _attend(
        self,
        name: str,
        stream: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dense: Dense | None = None,
    ) -> Tensor | None:
        """Attention of all tokens to all tokens; ``dense`` does the call without us."""
        video = self._video(q.shape[2])
        if isinstance(video, str):
            self.decline(video)
            return None
        streams, progress = [_stream(stream, q.shape[0])], self._place.progress
        return self._run.attend(name, streams, progress, Inputs(q, k, v, scale), video, dense)

    def _across(
        self, name: str, stream: str, q: Tensor, k: Tensor, v: Tensor, scale: float, extra: Extra
    ) -> Tensor | None:
        """Attention of all tokens, or of the piece ``q [B, H, Lq, D]``, to all tokens of a sequence
        that is spread over processes. With text, each process has a piece of text and one of video,
        so the video would not be contiguous: such calls stay dense."""
        length = k.shape[2]
        video = self._video(length)
        if video is not None and (isinstance(video, str) or video.stop - video.start < length):
            self.decline(video if isinstance(video, str) else MIXED)
            return None
        if q.shape[2] == length:
            return self._attend(name, stream, q, k, v, scale, extra.dense)
        settings = self._run.settings
        if settings.dense_keys or settings.dense_queries:
            self.decline(PINNED)
            return None
        streams, progress = [_stream(stream, q.shape[0])], self._place.progress
        if video is None or settings.order == "raster":
            call = Inputs(q, k, v, scale)
            return self._run.attend(name, streams, progress, call, None, extra.dense)
        tile = self._run.backend.tile_shape(q.shape[3])
        rows = arrange_part(video.grid, extra.first, q.shape[2], tile, q.device)
        keys = arrange_part(video.grid, 0, length, tile, q.device)
        call = Inputs(take(q, rows), take(k, keys), take(v, keys), scale)
        out = self._run.attend(name, streams, progress, call, None, extra.dense)
        return None if out is None else put(out, rows)

    def _padded(
        self,
        name: str,
        stream: str,
        call: Inputs,
        padding: Padding,
        dense: Dense | None,
    ) -> Tensor | None:
        """Attention without the padding at the end of each batch row. If all rows have the same
        length, they form one part; otherwise each row is a part of its own."""
        batch = call.q.shape[0]
        alike = len(set(padding.kept)) == 1
        rows = [slice(0, batch)] if alike else [slice(i, i + 1) for i in range(batch)]
        parts = []
        for row, kept in zip(rows, padding.kept, strict=False):
            video = self._video(kept)
            if isinstance(video, str):
                self.decline(MASK)
                return None
            own = _stream(stream, batch) if alike else f"{stream} row {row.start}"
            q, k, v = (t[row, :, :kept] for t in call[:3])
            parts.append(Part(own, Inputs(q, k, v, call.scale), video))
        outs = self._run.attend_parts(name, self._place.progress, parts, dense)
        if outs is None:
            return None
        filled = [
            _fill(out, call.q[row, :, kept:], part.inputs, padding.blind)
            for row, kept, part, out in zip(rows, padding.kept, parts, outs, strict=False)
        ]
        return torch.cat(filled)

    def _ineligible(self, q: Tensor) -> str | None:
        if self._training:
            return GRADIENTS
        if q.device != self._place.device:
            return "the transformer is spread over several devices"
        return None


def _stream(name: str, batch: int) -> str:
    """The stream's name with the batch size: if a pipeline stops guiding in the middle of a run,
    the batch halves, and has to start over."""
    return name if batch == 1 else f"{name} x{batch}"


def _fill(out: Tensor, rest: Tensor, seen: Inputs, blind: bool) -> Tensor:
    """``out``, followed by the padding's own rows: what its queries ``rest`` get with the mask. No
    other token ever attends to them."""
    if not rest.shape[2]:
        return out
    if blind:
        return torch.cat([out, torch.zeros_like(rest)], dim=2)
    padded = F.scaled_dot_product_attention(rest, seen.k, seen.v, scale=seen.scale)
    return torch.cat([out, padded], dim=2)


def _padding(mask: object, q: Tensor) -> Padding | None:
    return tail_padding(mask, q.shape[0], q.shape[2]) if isinstance(mask, Tensor) else None
