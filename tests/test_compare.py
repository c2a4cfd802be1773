"""PSNR and SSIM against independent twins; what can't be compared; the picture."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from comfyui_liteattention.report import perceptual
from comfyui_liteattention.report.compare import (
    STRIP,
    compare,
    figures,
    problem,
    psnr,
    side_by_side,
    ssim,
    text_table,
)


def video(frames=3, height=40, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, height, width, 3, generator=generator)


def noisy(clean, amount, seed=1):
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return (clean + amount * noise).clamp(0, 1)


def waves():
    """Two smooth frames ``[48, 64, 3]``, the second one a little darker."""
    x, y = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    frame = torch.stack([0.5 + 0.4 * torch.sin(x * y / (90 + 40 * c)) for c in range(3)], -1)
    return frame, frame**1.2


def ssim_twin(a, b):
    """The same in float64 with scipy's filter, whose window of radius 5 is ours."""

    def blur(plane):
        return gaussian_filter(plane, 1.5, radius=5, axes=(0, 1))[5:-5, 5:-5]

    x, y = (t.numpy().astype(np.float64) for t in (a, b))
    mx, my = blur(x), blur(y)
    sx, sy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    upper = (2 * mx * my + c1) * (2 * sxy + c2)
    return (upper / ((mx**2 + my**2 + c1) * (sx + sy + c2))).mean()


@pytest.mark.parametrize("amount", [0.002, 0.05, 0.5])
def test_ssim_is_that_of_its_twin(amount):
    clean = video()[0]
    other = noisy(clean, amount)
    assert ssim(clean, other) == pytest.approx(ssim_twin(clean, other), abs=1e-5)


def test_ssim_of_several_frames_is_their_mean():
    clean = video()
    other = noisy(clean, 0.1)
    frames = [ssim(a, b) for a, b in zip(clean, other, strict=True)]
    assert ssim(clean, other) == pytest.approx(sum(frames) / 3, abs=1e-6)


def test_figures_are_those_of_scikit_image():
    """Made with scikit-image 0.26: gaussian_weights, sigma 1.5, no sample covariance."""
    a, b = waves()
    assert ssim(a, b) == pytest.approx(0.9820400337, abs=2e-6)
    assert psnr(a, b) == pytest.approx(26.2979353659, abs=1e-6)


def test_psnr_of_a_known_error():
    a = torch.full((2, 16, 16, 3), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a) == math.inf


def test_equal_batches_are_identical():
    closeness = compare(video(), video())
    assert closeness.psnr_all == math.inf
    assert closeness.ssim_mean == pytest.approx(1)
    text = text_table(closeness)
    assert text.startswith("PSNR identical, SSIM 1.0000 over 3 frames")
    assert "furthest" not in text
    assert json.loads(json.dumps(figures(closeness), allow_nan=False))["psnr_db"] is None


def test_the_whole_is_that_of_the_mean_error_and_the_worst_frame_is_named():
    clean = video()
    other = torch.cat([clean[:1], noisy(clean[1:2], 0.2), noisy(clean[2:], 0.01)])
    closeness = compare(clean, other)
    assert closeness.psnr[0] == math.inf
    assert closeness.psnr_all == pytest.approx(psnr(clean, other), abs=1e-6)
    assert closeness.worst == 1
    assert "furthest apart: frame 1" in text_table(closeness)
    assert "0       identical   1.0000" in text_table(closeness)


def test_alpha_and_values_outside_the_range_dont_count():
    clean = video()
    with_alpha = torch.cat([clean, torch.zeros(3, 40, 64, 1)], -1)
    bright = torch.where(clean > 0.9, clean + 3, clean)
    assert compare(clean, with_alpha).psnr_all == math.inf
    assert compare(bright.clamp(0, 1), bright).psnr_all == math.inf


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (video(4), "3 frames of 64 x 40, candidate 4 frames of 64 x 40"),
        (video(3, 40, 32), "candidate 3 frames of 32 x 40"),
        (video(3, 8, 64), "at least 11 pixels"),
        (video()[0], "batch of colour images"),
        (video()[..., :1], "batch of colour images"),
        (video()[:0], "batch of colour images"),
        (video().index_fill(0, torch.tensor([2]), math.nan), "frame 2 of candidate"),
    ],
)
def test_what_cant_be_compared_is_one_clear_error(candidate, says):
    assert says in problem(video(), candidate)
    with pytest.raises(ValueError, match="LiteAttention Compare: "):
        compare(video(), candidate)


def test_every_frame_is_announced():
    seen = []
    compare(video(), video(), on_frame=lambda: seen.append(1))
    assert len(seen) == 3


@pytest.fixture
def weights_at_hand(tmp_path, monkeypatch):
    """AlexNet's file as torchvision would have stored it, but with untrained weights."""
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), tmp_path / "checkpoints" / perceptual.WEIGHTS)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / perceptual.WEIGHTS


def test_lpips_where_it_is_at_hand(weights_at_hand):
    distance = perceptual.lpips_distance()
    assert distance is not None
    clean = video()
    near, far = noisy(clean, 0.01), noisy(clean, 0.3)
    assert compare(clean, clean, lpips=distance).lpips == (0, 0, 0)
    closeness = compare(clean, far, lpips=distance)
    assert 0 < compare(clean, near, lpips=distance).lpips_mean < closeness.lpips_mean
    assert f"LPIPS {closeness.lpips_mean:.4f} over 3 frames" in text_table(closeness)
    told = json.loads(json.dumps(figures(closeness)))
    assert told["lpips"] == closeness.lpips_mean
    assert [frame["lpips"] for frame in told["per_frame"]] == list(closeness.lpips)


def test_lpips_is_that_of_its_own_package(weights_at_hand):
    import lpips

    want = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    known = torch.load(weights_at_hand)
    for name, parameter in want.net.named_parameters():
        parameter.data = known["features." + name.split(".", 1)[1]]
    clean = video()[0]
    other = noisy(clean, 0.1)
    planes = [2 * x.permute(2, 0, 1)[None] - 1 for x in (clean, other)]
    distance = perceptual.lpips_distance()
    assert distance is not None
    assert distance(clean, other) == pytest.approx(float(want(*planes)), rel=1e-5)


def test_no_lpips_without_weights_or_with_damaged_ones(weights_at_hand, caplog):
    weights_at_hand.write_bytes(b"nothing to read")
    assert perceptual.lpips_distance() is None
    assert "no LPIPS" in caplog.text
    weights_at_hand.unlink()
    assert perceptual.lpips_distance() is None
    assert "LPIPS" not in text_table(compare(video(), video()))


def test_frames_too_small_for_lpips_go_without(weights_at_hand):
    small = video(2, 20, 64)
    assert compare(small, small, lpips=perceptual.lpips_distance()).lpips == ()


@pytest.mark.parametrize(("width", "zoom"), [(64, 4), (300, 1)])
def test_the_picture_is_both_frames_and_their_difference(width, zoom):
    a = video(2, 20, width)
    b = noisy(a, 0.02)
    picture = side_by_side(a, b, compare(a, b), 8)
    assert picture.shape == (2, 20 * zoom + STRIP, 3 * width * zoom, 3)
    panels = picture[:, STRIP::zoom, ::zoom].split(width, 2)
    assert torch.equal(panels[0], a)
    assert torch.equal(panels[1], b)
    assert torch.equal(panels[2], (8 * (a - b).abs()).clamp(max=1))
    assert picture[:, :STRIP].max() > 0.7  # letters
