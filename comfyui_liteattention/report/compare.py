"""How close two videos are: PSNR, SSIM, LPIPS where it is available, and where they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .canvas import THEMES, Canvas, fit
from .perceptual import SMALLEST, Distance

WINDOW, SIGMA = 11, 1.5  # of SSIM, as in its paper
C1, C2 = 0.01**2, 0.03**2
PANEL = 256  # pixels; narrower frames are enlarged, so that their labels can be read
STRIP = 36


@dataclass(frozen=True)
class Closeness:
    """Figures per frame; ``psnr`` in dB, infinite where the frames are equal. ``lpips`` is empty
    where it was not measured."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] = ()

    @property
    def psnr_all(self) -> float:
        """PSNR of the squared error averaged over all frames, so that some equal frames don't make
        it infinite."""
        return _decibels(sum(10 ** (-p / 10) for p in self.psnr) / len(self.psnr))

    @property
    def ssim_mean(self) -> float:
        return sum(self.ssim) / len(self.ssim)

    @property
    def lpips_mean(self) -> float | None:
        return sum(self.lpips) / len(self.lpips) if self.lpips else None

    @property
    def worst(self) -> int:
        """The frame with the lowest PSNR."""
        return min(range(len(self.psnr)), key=self.psnr.__getitem__)


def problem(reference: Tensor, candidate: Tensor) -> str | None:
    """Why two ``[N, H, W, C]`` batches can't be compared, or None."""
    for name, batch in (("reference", reference), ("candidate", candidate)):
        if batch.ndim != 4 or batch.shape[3] < 3 or not len(batch):
            return f"{name} must be a batch of colour images, not of shape {tuple(batch.shape)}"
        if min(batch.shape[1:3]) < WINDOW:
            return f"{name} must be at least {WINDOW} pixels wide and high, not {_size(batch)}"
    if reference.shape[:3] != candidate.shape[:3]:
        return (
            f"reference has {_size(reference)}, candidate {_size(candidate)}: both need the same "
            "number of frames and the same size"
        )
    for name, batch in (("reference", reference), ("candidate", candidate)):
        for i, frame in enumerate(batch):
            if not frame.isfinite().all():
                return f"frame {i} of {name} has values that are not finite (NaN or infinity)"
    return None


def compare(
    reference: Tensor,
    candidate: Tensor,
    on_frame: Callable[[], object] | None = None,
    lpips: Distance | None = None,
) -> Closeness:
    """Compare two ``[N, H, W, C]`` batches, 0..1. ValueError says why they can't be compared.

    ``on_frame`` is called after each frame. ``lpips``, if given, is measured in frames that are
    large enough for it.
    """
    if reason := problem(reference, candidate):
        raise ValueError(f"LiteAttention Compare: {reason}.")
    if min(reference.shape[1:3]) < SMALLEST:
        lpips = None
    figures: list[tuple[float, float]] = []
    distances: list[float] = []
    for a, b in zip(map(_rgb, reference), map(_rgb, candidate), strict=True):
        figures.append((psnr(a, b), ssim(a, b)))
        if lpips:
            distances.append(lpips(a, b))
        if on_frame:
            on_frame()
    psnrs, ssims = zip(*figures, strict=True)
    return Closeness(psnrs, ssims, tuple(distances))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..1, any shape; infinite for equal ones."""
    return _decibels(float((a.double() - b.double()).square().mean()))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of frames ``[..., H, W, C]``, 0..1: the mean over all.

    SSIM = (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2)), equation 13
    of Wang et al., "Image quality assessment", 2004, over Gaussian windows inside the frame.
    """
    x, y = (t.movedim(-1, -3).float().contiguous() for t in (a, b))  # [..., C, H, W]
    m_x, m_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    s_x, s_y, s_xy = xx - m_x * m_x, yy - m_y * m_y, xy - m_x * m_y
    contrast = (2 * s_xy + C2) / (s_x + s_y + C2)
    luminance = (2 * m_x * m_y + C1) / (m_x * m_x + m_y * m_y + C1)
    return float((luminance * contrast).mean(dtype=torch.float64))


def text_table(closeness: Closeness) -> str:
    """A summary, and a line per frame."""
    worst = closeness.worst
    same = math.isinf(closeness.psnr_all)
    mean = closeness.lpips_mean
    summary = (
        f"PSNR {decibels(closeness.psnr_all)}, SSIM {closeness.ssim_mean:.4f}"
        + ("" if mean is None else f", LPIPS {mean:.4f}")
        + f" over {len(closeness.psnr)} frames"
    )
    lines = [summary]
    if not same:
        lines += [f"furthest apart: frame {worst}, {decibels(closeness.psnr[worst])}"]
    lines += ["", f"{'frame':<6} {'PSNR':>10} {'SSIM':>8}" + ("" if mean is None else "    LPIPS")]
    lines += [
        f"{i:<6} {decibels(p):>10} {s:>8.4f}" + "".join(f" {d:>8.4f}" for d in distance)
        for i, (p, s, *distance) in enumerate(_frames(closeness))
    ]
    return "\n".join(lines)


def figures(closeness: Closeness) -> dict[str, Any]:
    """JSON-ready data. JSON has no infinity, so the PSNR of identical frames is None."""
    mean = closeness.lpips_mean
    return {
        "psnr_db": _finite(closeness.psnr_all),
        "ssim": closeness.ssim_mean,
        **({} if mean is None else {"lpips": mean}),
        "worst_frame": closeness.worst,
        "per_frame": [
            dict(zip(("psnr_db", "ssim", "lpips"), (_finite(p), *rest), strict=False))
            for p, *rest in _frames(closeness)
        ],
    }


def decibels(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.2f} dB"


def side_by_side(
    reference: Tensor, candidate: Tensor, closeness: Closeness, amplify: float
) -> Tensor:
    """Reference, candidate and ``amplify`` times their absolute difference, ``[N, H', W', 3]``."""
    zoom = -(-PANEL // reference.shape[2])
    height, width = (zoom * side for side in reference.shape[1:3])
    out = torch.empty(len(reference), height + STRIP, 3 * width, 3, device=reference.device)
    for i, (a, b) in enumerate(zip(map(_rgb, reference), map(_rgb, candidate), strict=True)):
        ssim_text = f"SSIM {closeness.ssim[i]:.4f}"
        out[i, :STRIP] = _labels(
            width,
            f"reference, frame {i}",
            f"candidate: {decibels(closeness.psnr[i])}, {ssim_text}",
            f"difference x {amplify:g}",
        )
        row = torch.cat([a, b, ((a - b).abs() * amplify).clamp(max=1)], 1)
        out[i, STRIP:] = row.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return out


def _frames(closeness: Closeness) -> Iterable[tuple[float, ...]]:
    """PSNR, SSIM and, where measured, LPIPS of each frame."""
    columns = [closeness.psnr, closeness.ssim, *([closeness.lpips] if closeness.lpips else [])]
    return zip(*columns, strict=True)


def _labels(width: int, *texts: str) -> Tensor:
    """The strip with the panels' labels, ``[STRIP, panels * width, 3]``."""
    canvas = Canvas(THEMES["dark"], (width * len(texts), STRIP))
    size = min(fit(text, width - 16, 20) for text in texts)
    for i, text in enumerate(texts):
        canvas.text((i * width + width / 2, STRIP / 2), text, size, anchor="mm")
    return canvas.tensor()


def _blur(planes: Tensor) -> Tensor:
    """Gaussian mean over windows that lie inside: ``[..., H, W]`` -> ``[..., H-10, W-10]``."""
    reach = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    weight = torch.exp(-reach.square() / (2 * SIGMA**2))
    weight = weight / weight.sum()
    # As channels of one picture rather than as a batch: several times faster on a CPU.
    flat = planes.flatten(0, -3)[None]
    down = weight[None, None, :, None].expand(flat.shape[1], 1, WINDOW, 1)
    flat = conv2d(flat, down, groups=flat.shape[1])
    flat = conv2d(flat, down.transpose(2, 3), groups=flat.shape[1])
    return flat[0].unflatten(0, planes.shape[:-2])


def _rgb(frame: Tensor) -> Tensor:
    """``[H, W, C]`` -> ``[H, W, 3]`` within 0..1, as it is shown and saved."""
    return frame[..., :3].float().clamp(0, 1)


def _decibels(mse: float) -> float:
    return math.inf if mse == 0 else -10 * math.log10(mse)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _size(batch: Tensor) -> str:
    frames, height, width = batch.shape[:3]
    return f"{frames} frames of {width} x {height}"
