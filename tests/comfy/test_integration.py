"""The patch inside ComfyUI's own sampling code, in this process."""

import pytest
import torch

from comfyui_liteattention.settings import Settings
from demo.comfy_server import REPOSITORY, WEIGHTS
from demo.model import TEXT_TABLE
from demo.text import embed_prompts, load_table

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(threshold=-1.0, min_tokens=0, never_slower=False)
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def plain(comfy):
    """The shipped model as the loader node gives it."""
    return comfy.sd.load_diffusion_model(str(REPOSITORY / "demo" / "weights" / WEIGHTS))


@pytest.fixture
def patched(plain):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    return apply_patch(plain, SETTINGS)


@pytest.fixture
def generate(comfy):
    """Sample a small video of 640 tokens."""
    table = load_table(TEXT_TABLE)
    positive = [[embed_prompts(["red circle moving right"], table), {}]]
    negative = [[embed_prompts([""], table), {}]]

    def sample(model, steps=4, sampler="euler", seed=3, latent=None, positive=positive, **options):
        latent = torch.zeros(1, 16, 10, 16, 16) if latent is None else latent
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, 3.0, sampler, "simple", positive, negative, latent, **options
            )

    sample.positive = positive
    return sample


def report(model):
    from comfyui_liteattention.integrations.comfy.session import patch_of

    return patch_of(model).last_report


def streams_of(run_report):
    return {call.stream for call in run_report.calls}


@pytest.fixture
def separate(plain, monkeypatch):
    """Make ComfyUI believe that memory is too low for cond and uncond in one batch."""

    def only(decide):
        monkeypatch.setattr(
            plain.model, "memory_required", lambda shape, **_: 1e15 if decide(shape) else 0
        )

    return only


def assert_agree(a, b, report_a, report_b):
    """Matrix products of another batch size round differently, so the bits of the model differ
    even when dense; the result and the tiles must agree."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    counts = [sorted((c.step, c.layer, c.computed) for c in r.calls) for r in (report_a, report_b)]
    for x, y in zip(*counts, strict=True):
        assert x[:2] == y[:2]
        assert abs(x[2] - y[2]) <= 4


def test_batched_and_separate_cfg_agree(patched, generate, separate):
    together, report_together = generate(patched), report(patched)
    separate(lambda shape: shape[0] > 1)
    apart = generate(patched)
    assert_agree(together, apart, report_together, report(patched))
    assert len(streams_of(report(patched))) == 2


def test_batching_may_change_in_the_middle_of_a_run(patched, generate, separate):
    together, report_together = generate(patched), report(patched)
    calls = []

    def every_third(shape):
        calls.append(shape)
        return shape[0] > 1 and len(calls) % 3 == 0

    separate(every_third)
    changing = generate(patched)
    assert_agree(together, changing, report_together, report(patched))


def test_a_batch_of_two_videos(patched, generate):
    generate(patched, latent=torch.zeros(2, 16, 10, 16, 16))
    assert report(patched).active
    assert len(streams_of(report(patched))) == 2


def test_layers_and_steps_are_told_apart(patched, generate):
    generate(patched)
    calls = report(patched).calls
    assert len(calls) == 4 * 4 * 2  # steps x layers x streams
    assert {c.step for c in calls} == {0, 1, 2, 3}
    assert len({c.layer for c in calls}) == 4


def test_split_sampling_is_two_runs(patched, generate):
    half = generate(patched, start_step=0, last_step=2, force_full_denoise=False)
    first = report(patched)
    generate(patched, start_step=2, last_step=4, latent=half, disable_noise=True)
    second = report(patched)
    assert first is not second
    for run in (first, second):
        dense = [c for c in run.calls if c.step == 0]
        assert dense
        assert all(c.computed == c.total for c in dense)


def test_applying_twice_is_applying_once(plain, patched, generate):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    twice = apply_patch(patched, SETTINGS)
    assert torch.equal(generate(patched), generate(twice))
    assert len(twice.wrappers["outer_sample"]["liteattention"]) == 1


def test_removing_leaves_the_model_as_it_was(plain, patched, generate):
    from comfyui_liteattention.integrations.comfy.session import remove_patch

    before = generate(plain)
    generate(patched)
    bare = remove_patch(patched)
    assert bare.model_options == plain.model_options
    assert not any(bare.wrappers.get("outer_sample", {}).values())
    assert torch.equal(generate(bare), before)
    assert torch.equal(generate(plain), before)


def test_a_run_leaves_nothing_in_the_model(plain, patched, generate):
    options = str(patched.model_options["transformer_options"])
    generate(patched)
    assert str(patched.model_options["transformer_options"]) == options
    assert OVERRIDE not in plain.model_options["transformer_options"]


@pytest.mark.parametrize("chains", [True, False])
def test_a_node_applied_afterwards_gets_what_we_decline(plain, patched, generate, chains):
    """Also when it overwrites the override slot without chaining, as some packs do."""
    seen = []

    def other(func, q, k, *args, **kwargs):
        seen.append(q.shape[1] == k.shape[1])
        return func(q, k, *args, **kwargs)

    after = patched.clone()
    slot = after.model_options["transformer_options"]
    previous = slot.get(OVERRIDE)
    slot[OVERRIDE] = other if not (chains and previous) else previous
    alone = generate(patched)
    assert torch.equal(generate(after), alone)
    assert report(after).active
    assert seen
    assert not any(seen)  # cross-attention only


def test_a_cancelled_run_leaves_no_state(comfy, plain, generate):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    shown = []
    patched = apply_patch(plain, SETTINGS, shown.append)
    whole = generate(patched)

    def cancel(step, *_):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        generate(patched, callback=cancel)
    assert {c.step for c in report(patched).calls} == {0, 1}
    assert shown[-1].startswith("interrupted after 2 of 4 steps; until then ")
    assert torch.equal(generate(patched), whole)


def test_two_patched_models_do_not_disturb_each_other(plain, patched, generate):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    other = apply_patch(plain, Settings(threshold=-6.0, min_tokens=0, never_slower=False))
    alone = generate(patched)
    generate(other, seed=8)
    assert torch.equal(generate(patched), alone)
    assert report(other).computed_fraction > report(patched).computed_fraction


def test_context_windows_have_streams_of_their_own(comfy, patched, generate):
    windows = patched.clone()
    windows.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=6,
        context_overlap=2,
        dim=2,
    )
    comfy.context_windows.create_prepare_sampling_wrapper(windows)
    generate(windows)
    assert len(streams_of(report(windows))) > 2


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [("heun", 7), ("dpm_2", 7), ("res_multistep", 4), ("euler_ancestral", 4), ("uni_pc", 4)],
)
def test_samplers_with_sigmas_of_their_own(patched, generate, sampler, calls):
    """They ask for a step twice, or between two steps; every layer is asked every time."""
    first = generate(patched, sampler=sampler)
    counted = report(patched).calls
    assert len(counted) == calls * 4 * 2  # model calls x layers x streams
    assert {c.step for c in counted} <= set(range(4))
    assert report(patched).active
    assert torch.equal(generate(patched, sampler=sampler), first)


@pytest.mark.parametrize("before", [True, False])
def test_easycache_may_leave_out_steps(comfy, plain, generate, before):
    """Whichever of the two was applied first."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    from comfyui_liteattention.integrations.comfy.session import apply_patch

    def cached(model):
        return EasyCacheNode.execute(model, 0.5, 0.15, 0.95, False).result[0]

    both = apply_patch(cached(plain), SETTINGS) if before else cached(apply_patch(plain, SETTINGS))
    generate(both, steps=8)
    run = report(both)
    steps = {c.step for c in run.calls}
    assert run.active
    assert {0, 7} <= steps < set(range(8))
    assert len(run.calls) == len(steps) * 4 * 2
    assert len({c.layer for c in run.calls}) == 4


def test_skip_layer_guidance_has_a_stream_of_its_own(comfy, patched, generate):
    """It asks the same conditioning again, with a block less."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    guided = SkipLayerGuidanceDiT.execute(patched, 2.0, 0.0, 1.0, "1", "").result[0]
    generate(guided)
    by_stream = {
        stream: {c.layer for c in report(guided).calls if c.stream == stream}
        for stream in streams_of(report(guided))
    }
    assert {stream: len(layers) for stream, layers in by_stream.items()} == {
        "positive": 4,
        "negative": 4,
        "positive, guidance pass 1": 3,
    }


def test_prompts_for_regions_have_streams_of_their_own(patched, generate):
    half = torch.zeros(1, 16, 16)
    half[..., 8:] = 1
    [(prompt, _)] = generate.positive
    regions = [[prompt, {"mask": mask, "mask_strength": 1.0}] for mask in (half, 1 - half)]
    generate(patched, positive=regions)
    run = report(patched)
    assert run.active
    assert len(run.calls) == 4 * 4 * 3
    first = run.calls[0].layer
    assert sum(c.layer == first and c.step == 0 and c.computed == c.total for c in run.calls) == 3


def test_a_lora_changes_the_weights_and_nothing_else(plain, patched, generate):
    before = generate(patched)
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    weight = plain.model.state_dict()[key]
    lora = patched.clone()
    assert lora.add_patches({key: ("diff", (torch.randn(weight.shape) * 0.1,))}, 1.0)
    with_lora = generate(lora)
    assert report(lora).active
    assert not torch.equal(with_lora, before)
    assert torch.equal(generate(patched), before)


def test_models_may_be_switched_in_one_queue(comfy, patched, generate):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    first = generate(patched)
    weights = str(REPOSITORY / "demo" / "weights" / WEIGHTS)
    other = apply_patch(comfy.sd.load_diffusion_model(weights), SETTINGS)
    assert torch.equal(generate(other), first)
    comfy.model_management.unload_all_models()
    assert torch.equal(generate(patched), first)


def test_another_attention_stays_the_dense_path(plain, generate):
    """What an earlier node installed, SageAttention for example, gets every call we decline."""
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    seen = []

    def earlier(func, q, k, *args, **kwargs):
        seen.append(q.shape[1] == k.shape[1])
        return func(q, k, *args, **kwargs)

    model = plain.clone()
    model.model_options["transformer_options"][OVERRIDE] = earlier
    dense = generate(model)
    everything = len(seen)
    long = apply_patch(model, Settings(threshold=-1.0, min_tokens=100_000))
    seen.clear()
    assert torch.equal(generate(long), dense)
    assert len(seen) == everything
    assert any(seen)
    seen.clear()
    generate(apply_patch(model, SETTINGS))
    assert len(seen) == everything // 2  # cross-attention only
    assert not any(seen)


def test_a_run_switches_itself_off_where_the_users_attention_is_faster(
    plain, generate, monkeypatch
):
    """The user's own attention is asked once a call, whoever times it."""
    from comfyui_liteattention import run as run_module
    from comfyui_liteattention.integrations.comfy.session import apply_patch
    from comfyui_liteattention.never_slower.costs import Costs

    shown = []
    monkeypatch.setattr(run_module, "decided", lambda *_: Costs(3.0, 0.0, 0.9, 0.8))
    model = apply_patch(plain, Settings(min_tokens=0), shown.append)
    out = generate(model)
    assert report(model).stopped.startswith("your own attention is faster here")
    assert [call.waits for call in report(model).calls] == [True] * 3 * 2
    assert torch.equal(out, generate(plain))
    assert shown[-1] == "switched off: ComfyUI's attention is faster here"


def test_the_same_seed_gives_the_same_bits_from_the_first_run_on(plain, generate):
    """With the settings as they are, and the clock of this machine."""
    from comfyui_liteattention.integrations.comfy.session import apply_patch
    from comfyui_liteattention.never_slower.rehearsal import forget_decisions

    forget_decisions()
    model = apply_patch(plain, Settings(budget=0.1, min_tokens=0))
    first, *others = (generate(model) for _ in range(3))
    assert all(torch.equal(first, again) for again in others)


def test_a_step_whose_result_is_not_finite_is_done_again_without_us(plain, generate, monkeypatch):
    from comfyui_liteattention.backends.reference import ReferenceBackend
    from comfyui_liteattention.integrations.comfy import session
    from comfyui_liteattention.run import NOT_FINITE, NOT_FINITE_AGAIN

    class Broken(ReferenceBackend):
        def forward(self, *args, **kwargs):
            done = super().forward(*args, **kwargs)
            return done._replace(out=done.out * torch.nan)

    monkeypatch.setattr(session, "_backend", lambda *_: Broken())
    model = session.apply_patch(plain, SETTINGS)
    assert torch.equal(generate(model), generate(plain))
    assert report(model).stopped == NOT_FINITE_AGAIN
    assert report(model).reasons[NOT_FINITE] >= 1


def test_a_report_that_fails_costs_nobody_the_video(plain, generate, monkeypatch):
    from comfyui_liteattention import run as run_module
    from comfyui_liteattention.integrations.comfy import session

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    model = session.apply_patch(plain, SETTINGS)
    expected = generate(model)
    monkeypatch.setattr(run_module.Run, "report", full)
    monkeypatch.setattr(session, "node_line", full)
    assert torch.equal(generate(model), expected)
    assert "no room" in report(model).notes[0]


def test_the_line_on_the_node(plain, generate):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    shown = []
    generate(apply_patch(plain, SETTINGS, shown.append))
    assert shown[0].startswith("waiting for the model")
    assert shown[1].startswith("step 1/4 computes everything")
    assert [line.split(":")[0] for line in shown[2:-1]] == [f"step {i}/4" for i in (1, 2, 3, 4)]
    assert "% skipped, lost" in shown[-1]
