"""Whatever people make of a run of ComfyUI's sampler: sigmas that rise, a latent or a batch that
changes on the way, our node twice, one execution after another."""

from itertools import pairwise

import pytest
import tiny_comfy
import torch

from comfyui_liteattention.presets import PRESETS
from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread", "comfy")

EAGER = Settings(threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False)
WAN = tiny_comfy.find("Wan T2V")
SHAPE = (1, 16, 12, 8, 16)
TOKENS = 12 * 4 * 8
SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.25, 0.0])
STEPS = len(SIGMAS) - 1


@pytest.fixture(scope="module")
def plain(comfy):
    return tiny_comfy.make_patcher(WAN)


def patched(model, settings=EAGER):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    return apply_patch(model, settings)


def patch_of(model):
    from comfyui_liteattention.integrations.comfy import session

    return session.patch_of(model)


def report_of(model):
    return patch_of(model).last_report


def generate(model, sigmas=SIGMAS, change=None, guidance=3.0):
    """Euler's steps; ``change(i, x)`` makes what the sampler goes on with before step ``i``."""
    import comfy.sample
    import comfy.samplers

    def euler(ask, x, sigmas, extra_args=None, **_):
        for i, (now, then) in enumerate(pairwise(sigmas)):
            x = x if change is None else change(i, x)
            away = (x - ask(x, now * now.new_ones(len(x)), **extra_args)) / now
            x = x + away * (then - now)
        return x

    latent = torch.zeros(SHAPE)
    start = comfy.sample.prepare_noise(latent, 1)
    prompts = [tiny_comfy.conditioning(WAN, i) for i in range(2)]
    sampler = comfy.samplers.KSAMPLER(euler)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            *(model, start, guidance, sampler, sigmas, *prompts, latent), disable_pbar=True, seed=1
        )


def dense_steps(report):
    """Steps in which every call computed everything."""
    skipping = {c.step for c in report.calls if c.computed < c.total}
    return {c.step for c in report.calls} - skipping


def test_sigmas_that_rise(plain):
    """FlipSigmas turns a video back into noise: a run like any other, with its steps by index."""
    from comfy_extras.nodes_custom_sampler import FlipSigmas

    flipped = FlipSigmas.execute(SIGMAS).result[0]
    model = patched(plain)
    first = generate(model, flipped)
    report = report_of(model)
    assert [c.step for c in report.calls] == sorted([*range(STEPS)] * WAN.layers * 2)
    assert 0 in dense_steps(report) < set(range(STEPS))
    assert torch.equal(generate(model, flipped), first)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_allows_no_more_where_sigmas_rise(preset):
    from comfyui_liteattention.budget.closeness import allowed_losses

    falling, rising = SIGMAS.tolist(), SIGMAS.flip(0).tolist()
    closeness = PRESETS[preset].closeness
    assert sum(allowed_losses(closeness, rising)) <= sum(allowed_losses(closeness, falling))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_run_knows_the_strength_of_guidance(plain, guidance):
    model = patched(plain)
    generate(model, guidance=guidance)
    assert report_of(model).guidance == guidance


def test_guiders_of_another_kind_count_as_calibrated():
    import comfy.samplers

    from comfyui_liteattention.budget.closeness import GUIDANCE
    from comfyui_liteattention.integrations.comfy import session

    class TwoPrompts(comfy.samplers.CFGGuider):
        def __init__(self):
            self.cfg = 1.0  # unused: it has two others

        def predict_noise(self, *args, **kwargs):
            raise NotImplementedError

    assert session._guidance(TwoPrompts()) == session._guidance(object()) == GUIDANCE


def test_a_latent_that_grows_on_the_way(plain):
    """As packs do that begin small: at the new size a run begins anew, with all tiles."""

    def grow(i, x):
        return torch.nn.functional.interpolate(x, scale_factor=(1, 2, 1)) if i == 2 else x

    model = patched(plain)
    out = generate(model, change=grow)
    report = report_of(model)
    assert out.shape == (1, 16, 12, 16, 16) and out.isfinite().all()
    assert [c.tokens for c in report.calls] == [
        tokens
        for tokens, steps in ((TOKENS, 2), (2 * TOKENS, 3))
        for _ in range(steps * WAN.layers * 2)
    ]
    assert {0, 2} <= dense_steps(report) < set(range(STEPS))


def test_a_latent_of_another_type_on_the_way(plain):
    """The model casts it; the tiles stay."""
    model = patched(plain)
    usual = generate(model)
    alike = [c.computed for c in report_of(model).calls]
    out = generate(model, change=lambda i, x: x.double() if i == 2 else x)
    torch.testing.assert_close(out.float(), usual, rtol=1e-3, atol=1e-3)
    assert [c.computed for c in report_of(model).calls] == alike


def test_a_batch_that_changes_from_step_to_step(plain):
    """Two videos for two steps: theirs are tiles of their own, and the one's are kept."""

    def pair(i, x):
        return x.repeat(2, 1, 1, 1, 1) if i == 2 else x[:1] if i == 4 else x

    model = patched(plain)
    out = generate(model, change=pair)
    report = report_of(model)
    assert out.shape == SHAPE and out.isfinite().all()
    assert {0, 2} <= dense_steps(report) < set(range(STEPS))
    assert len(report.calls) == STEPS * WAN.layers * 2


def test_two_of_our_nodes_in_a_row(plain):
    """The last one counts, as if it were alone."""
    from comfyui_liteattention.nodes.patch import LiteAttentionPatch

    class Node(LiteAttentionPatch):
        hidden = type("Hidden", (), {"unique_id": None})

    first = Node.execute(plain, "Fast", Settings(threshold=-20.0, min_tokens=0)).result[0]
    both = Node.execute(first, "Balanced", EAGER).result[0]
    assert torch.equal(generate(both), generate(patched(plain)))
    assert report_of(both).active
    assert not patch_of(first).reports


def test_a_wrapper_that_is_there_twice(plain):
    """A pack that copies wrappers under a name of its own: one run, one report."""
    from comfy.patcher_extension import WrappersMP

    model = patched(plain)
    want, usual = generate(model), report_of(model)
    copied = model.clone()
    wrapper = patch_of(model).outer_sample
    copied.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "copied", wrapper)
    assert torch.equal(generate(copied), want)
    assert len(report_of(copied).calls) == len(usual.calls)
    assert len(patch_of(copied).reports) == 1


def test_one_execution_after_another(plain, monkeypatch):
    """In a loop a sampler runs under ever new names: each time alike, and few reports are kept."""
    from comfyui_liteattention.integrations.comfy import session

    model = patched(plain)
    want = generate(model)
    for i in range(session.KEPT + 2):
        monkeypatch.setattr(session, "sampling_node", lambda i=i: f"7.0.{i}")
        assert torch.equal(generate(model), want)
    kept = [*patch_of(model).reports]
    assert kept == [f"7.0.{i}" for i in range(2, session.KEPT + 2)]
    calls = [[c.computed for c in one.calls] for one in patch_of(model).reports.values()]
    assert all(one == calls[0] for one in calls)
