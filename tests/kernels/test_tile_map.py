"""The kernels that keep the tile map, in the Triton interpreter, against their twins."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

from interpreted_kernel import interpret, why_not

from comfyui_liteattention.backends import tile_map as torch_tile_map
from comfyui_liteattention.backends.gpu.kernel_table import MAP_KERNELS
from comfyui_liteattention.backends.gpu.tile_map import TileMapKernels, TileMaps, failure, problem
from comfyui_liteattention.backends.tile_map import mark
from comfyui_liteattention.budget.allocation import Limit
from comfyui_liteattention.tiles import make_lists, pack, unpack

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
FUSED = TileMapKernels(lambda launch, device: interpret(launch))
SHAPES = [(1, 1, 1, 1), (1, 2, 3, 31), (2, 1, 2, 32), (1, 2, 2, 70), (1, 1, 3, 1500)]


def draw(shape, seed=0):
    """Scores with ties, as log2 shares are; live and pinned tiles."""
    random = torch.Generator().manual_seed(seed)
    score = -torch.randint(0, 20, shape, generator=random).float() / 2
    live = torch.rand(shape, generator=random) < 0.6
    return score, live, torch.rand(shape[2:], generator=random) < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("all_live", [False, True])
@pytest.mark.parametrize(
    "threshold", [-40.0, -5, -2.7, Limit(torch.tensor(-3.0), torch.tensor(False))], ids=str
)
def test_marking_matches_its_twin(shape, all_live, threshold):
    score, live, pinned = draw(shape)
    mask = None if all_live else live
    want = pack(mark(mask, score, threshold, pinned))
    got = FUSED.next_live(None if mask is None else pack(mask), score, threshold, pinned)
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["no number", "nothing visited", "equal", "all negligible"])
def test_marking_odd_scores_matches_its_twin(case):
    score, live, pinned = draw((1, 2, 3, 1100))
    if case == "no number":
        score[0, 0, 1, 1050] = score[0, 1, 2, 3] = math.nan
    if case == "nothing visited":
        score[0, 0, 1] = -math.inf
    if case == "equal":
        score.fill_(-1)
    threshold = 1.0 if case == "all negligible" else -3.0
    want = pack(mark(live, score, threshold, pinned))
    assert torch.equal(FUSED.next_live(pack(live), score, threshold, pinned), want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("kept", ["some", "all", "none"])
def test_lists_match_their_twin(shape, alternate, kept):
    _, live, _ = draw(shape)
    mask = {"some": live, "all": torch.ones_like(live), "none": torch.zeros_like(live)}[kept]
    got, want = FUSED.make_lists(pack(mask), shape[-1], alternate), make_lists(mask, alternate)
    assert torch.equal(got.count, want.count) and torch.equal(got.index, want.index)


def test_marked_bits_can_be_listed():
    score, live, pinned = draw((1, 2, 3, 70))
    bits = FUSED.next_live(pack(live), score, -4.0, pinned)
    got, want = FUSED.make_lists(bits, 70), make_lists(unpack(bits, 70))
    assert torch.equal(got.index, want.index)


def test_what_does_not_fit_is_refused():
    score, live, pinned = draw((1, 2, 3, 70))
    with pytest.raises(ValueError, match="don't fit scores"):
        FUSED.next_live(pack(live)[..., 1:], score, -4.0, pinned)
    with pytest.raises(ValueError, match="pinned"):
        FUSED.next_live(None, score, -4.0, pinned[:1])
    with pytest.raises(ValueError, match="aren't those of 100 key tiles"):
        FUSED.make_lists(pack(live), 100)


def close(got, want):
    return torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("all_live", [False, True])
@pytest.mark.parametrize("odd", [None, math.nan, -math.inf, 0.0, -60.0])
def test_counting_matches_its_twin(shape, all_live, odd):
    score, live, pinned = draw(shape)
    score -= torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if odd is not None:
        score[..., 0] = odd
    bits = None if all_live else pack(live)
    got, want = (x.histogram(bits, score, pinned) for x in (FUSED, torch_tile_map))
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("layers", [1, 2, 30])
@pytest.mark.parametrize("audited", [False, True])
@pytest.mark.parametrize("aim", [0.0, 1e-4, 0.01, 0.3, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_choices_match_their_twin(layers, audited, aim, seed):
    """Little and much lost so far, by this layer and by others; from nothing allowed to all."""
    score, live, pinned = draw((1, 2, 3, 70), seed)
    score -= torch.rand(score.shape, generator=torch.Generator().manual_seed(seed))
    counts = torch_tile_map.histogram(pack(live), score, pinned)
    random = torch.Generator().manual_seed(seed)
    factor = (0.0, 0.1, 1.0, 3.0)[seed]
    ledger = factor * aim * torch.rand(4, dtype=torch.float64, generator=random)
    lost = torch.rand((), generator=random) * aim if audited else None
    others = [
        factor * aim / 160 * torch.rand(161, dtype=torch.float64, generator=random)
        for _ in range(layers - 1)
    ]
    got, want = (
        x.choose(counts, 6, ledger, lost, 0.3, others, aim) for x in (FUSED, torch_tile_map)
    )
    for found, wanted in zip(got.limit, want.limit, strict=True):
        assert found.dtype == wanted.dtype and found.shape == () and torch.equal(found, wanted)
    assert close(got.ledger, want.ledger) and close(got.remaining, want.remaining)


@pytest.mark.parametrize("threshold", [-40.0, -3.0, 1.0])
def test_all_tiles_come_back(threshold):
    score, live, pinned = draw((1, 2, 3, 70))
    limit = Limit(torch.tensor(threshold), torch.tensor(True))
    want = torch_tile_map.next_live(pack(live), score, limit, pinned)
    assert torch.equal(FUSED.next_live(pack(live), score, limit, pinned), want)
    assert unpack(want, 70).all()


# ---- trust --------------------------------------------------------------------------------------


def test_the_self_test_passes_the_real_kernels():
    assert problem(FUSED, CPU) is None


def test_the_default_device_does_not_matter():
    """Scripts make the card torch's default device."""

    def launch(launch, device):
        with torch.device("cpu"):  # for the interpreter's own tensors
            interpret(launch)

    with torch.device("meta"):
        assert problem(TileMapKernels(launch), CPU) is None


@pytest.mark.parametrize("broken", MAP_KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_is_part_of_the_self_test(broken):
    """One that leaves memory as it was is found, whichever it is."""
    tile_map = TileMapKernels(
        lambda launch, _: None if launch.kernel == broken else interpret(launch)
    )
    assert "self-test" in problem(tile_map, CPU)


@pytest.mark.parametrize("forgets", ["all are live", "to start over", "what comes back"])
def test_the_self_test_goes_where_a_run_begins_and_starts_over(forgets):
    class Forgetful(TileMapKernels):
        def next_live(self, live, score, limit, pinned):
            if forgets == "what comes back" and live is not None and limit.all_back:
                limit = -99.0
            return super().next_live(live, score, limit, pinned)

        def histogram(self, live, score, pinned):
            counts = super().histogram(live, score, pinned)
            return counts * 2 if forgets == "all are live" and live is None else counts

        def choose(self, *arguments):
            choice = super().choose(*arguments)
            if forgets == "to start over":
                choice.limit.all_back.zero_()
            return choice

    tile_map = Forgetful(lambda launch, _: interpret(launch))
    assert "self-test" in problem(tile_map, CPU)


def test_broken_kernels_are_found_and_named_once(caplog):
    launches = []
    maps = TileMaps(lambda launch, device: launches.append(launch))  # leaves what memory held
    assert maps.of(CPU) is None
    tested = len(launches)
    assert maps.of(CPU) is None and len(launches) == tested
    assert len(caplog.records) == 1 and "tile map" in caplog.text


def test_a_lack_of_memory_is_raised_and_is_no_verdict(monkeypatch):
    """The run ends in dense attention, and the next one tries again."""
    full = [True, True]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def launch(launch, device):
        if full:
            full.pop()
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        interpret(launch)

    maps = TileMaps(launch)
    with pytest.raises(torch.OutOfMemoryError):
        maps.of(CPU)
    assert maps.of(CPU) is not None


def test_an_error_is_a_reason():
    def fails(launch, device):
        raise OSError("no driver")

    assert "OSError: no driver" in failure(TileMapKernels(fails), CPU)
