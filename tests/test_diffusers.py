"""enable / summary / disable on real diffusers pipelines with tiny models."""

import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_pipeline import BOLD, TOKENS, call, make_pipe, run, texts
from tiny_wan import hooks_left, make_wan

import comfyui_liteattention as lite
from comfyui_liteattention import SAFEST
from comfyui_liteattention.budget.closeness import GUIDANCE
from comfyui_liteattention.integrations.diffusers.hooks import Context, Contexts
from comfyui_liteattention.integrations.diffusers.routes import LITE
from comfyui_liteattention.integrations.diffusers.session import _guidance
from comfyui_liteattention.presets import DEFAULT, PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe():
    return make_pipe()


def test_the_safest_threshold_is_plain_bit_for_bit(pipe):
    plain = run(pipe)
    with lite.enabled(pipe, threshold=SAFEST, min_tokens=0) as session:
        assert torch.equal(run(pipe), plain)
        assert "safest" in lite.summary(pipe)
    assert session.report().computed_fraction == 1


def test_a_bold_threshold_skips(pipe):
    plain = run(pipe)
    session = lite.enable(pipe, **BOLD)
    assert "no run yet" in lite.summary(pipe)
    # CPU offload replaces the transformer's forward after every run, so a wrapper would be lost.
    assert "forward" not in vars(pipe.transformer)
    out = run(pipe)
    report = session.report()
    assert report.computed_fraction < 0.9
    assert 0 < (out - plain).abs().max() < 0.1
    assert report.backend == "cpu" and report.tokens == TOKENS
    assert {c.layer for c in report.calls} == {"blocks.0", "blocks.1"}
    assert "LiteAttention active" in lite.summary(pipe)
    # Each conditioning has its own map.
    maps = {m.stream: m.live for m in report.maps if m.layer == "blocks.1"}
    assert set(maps) == {"cond", "uncond"} and not torch.equal(maps["cond"], maps["uncond"])


def test_steps_come_from_the_cache_context(pipe):
    session = lite.enable(pipe, threshold=-1, ramp=0, min_tokens=0, warmup=0.6, never_slower=False)
    run(pipe, steps=5)
    report = session.report()
    assert report.steps == 5 and sorted(report.step_seconds) == [0, 1, 2, 3, 4]
    skipped = {c.step for c in report.calls if c.computed < c.total}
    assert skipped == {4}  # steps 0 to 2 are 60 % of the run, step 3 is the first to mark tiles


def test_nothing_is_left_of_another_prompt(pipe):
    lite.enable(pipe, **BOLD)
    fresh = run(pipe, seed=1)
    run(pipe, seed=2)
    assert torch.equal(run(pipe, seed=1), fresh)


@pytest.mark.parametrize("step", [0, 2])
def test_nothing_is_left_of_a_run_that_failed(pipe, step):
    lite.enable(pipe, **BOLD)
    fresh = run(pipe)

    def fail(pipe, index, timestep, inputs):
        if index == step:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        run(pipe, seed=3, callback_on_step_end=fail)
    assert torch.equal(run(pipe), fresh)


def test_nothing_is_left_of_a_call_that_failed(pipe):
    lite.enable(pipe, **BOLD)
    fresh = run(pipe)
    calls = []

    def fail(module, args, output):
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    handle = pipe.transformer.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="memory"):
        run(pipe, seed=3)
    handle.remove()
    assert torch.equal(run(pipe), fresh)


def test_after_a_call_that_failed_all_is_fresh():
    """Even if only the exception shows that a new run has begun."""
    model, (text,) = make_wan(), texts(1)
    lite.enable(model, **BOLD)
    fresh = call(model, text, 500)
    model._reset_stateful_cache()
    call(model, text, 900)
    handle = model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model, text, 700)
    handle.remove()
    assert torch.equal(call(model, text, 500), fresh)


def test_disable_restores_everything(pipe):
    plain = run(pipe)
    lite.enable(make_pipe(), **BOLD)
    gc.collect()  # one that is dropped leaves nothing either, nor do those of other tests
    assert LITE not in _AttentionBackendRegistry._backends
    backends = dict(_AttentionBackendRegistry._backends)
    lite.enable(pipe, **BOLD)
    run(pipe)
    lite.disable(pipe)
    assert torch.equal(run(pipe), plain)
    assert hooks_left(pipe.transformer) == []
    assert _AttentionBackendRegistry._backends == backends
    assert all("_attention_backend" not in vars(b.attn1.processor) for b in pipe.transformer.blocks)
    lite.disable(pipe)  # twice is fine
    assert lite.summary(pipe) == "LiteAttention is not enabled"


def test_enable_twice_is_enable_once(pipe):
    lite.enable(pipe, threshold=-8, min_tokens=0)
    session = lite.enable(pipe.transformer, **BOLD)
    run(pipe)
    assert len(session.report().calls) == 2 * 2 * 4
    lite.disable(pipe)
    assert hooks_left(pipe.transformer) == []


def test_declined_calls_go_to_the_backend_that_the_user_chose(pipe):
    plain = run(pipe)
    native = AttentionBackendName.NATIVE
    processor = pipe.transformer.blocks[0].attn1.processor
    processor._attention_backend = native
    session = lite.enable(pipe, threshold=-1)  # 320 tokens are too few by default
    assert torch.equal(run(pipe), plain)
    assert list(session.report().reasons) == ["short sequence (fewer than 2048 tokens)"]
    lite.disable(pipe)
    assert processor._attention_backend is native


def test_masks_stay_dense(pipe):
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    mask[..., -50:] = False

    def add_mask(module, args):
        return (*args[:2], mask, *args[3:])

    for block in pipe.transformer.blocks:
        block.attn1.register_forward_pre_hook(add_mask)
    plain = run(pipe, steps=2)
    session = lite.enable(pipe, **BOLD)
    assert torch.equal(run(pipe, steps=2), plain)
    assert session.report().reasons == {"an attention mask": 8}


def test_training_stays_dense():
    model, (text,) = make_wan(), texts(1)
    latent = torch.randn(1, 4, 5, 16, 16)
    plain = model(latent, torch.tensor([500.0]), text, return_dict=False)[0]
    session = lite.enable(model, **BOLD)
    out = model(latent, torch.tensor([500.0]), text, return_dict=False)[0]
    assert torch.equal(out, plain)
    assert "gradients" in str(session.report().reasons)


def test_unknown_processors_stay_dense(pipe):
    class Other(type(pipe.transformer.blocks[0].attn1.processor)):
        pass

    pipe.transformer.blocks[0].attn1.processor = Other()
    session = lite.enable(pipe, **BOLD)
    run(pipe, steps=2)
    assert session.report().reasons == {"attention processor Other is not known": 4}


def test_two_pipelines_at_once(pipe):
    """The second one samples a whole video within the first one's run."""
    other = make_pipe(1)
    first, second = lite.enable(pipe, **BOLD), lite.enable(other, **BOLD)
    alone, other_alone = run(pipe), run(other, seed=1)
    nested = []

    def sample_other(pipe, index, timestep, inputs):
        nested.append(run(other, seed=1, steps=4))
        return inputs

    assert torch.equal(run(pipe, callback_on_step_end=sample_other), alone)
    assert all(torch.equal(video, other_alone) for video in nested)
    assert first.report().active and second.report().active
    lite.disable(pipe)
    assert torch.equal(run(other, seed=1), other_alone)


def test_other_hooks_stay_in_place(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    session = lite.enable(pipe, **BOLD)
    with_both = run(pipe)
    assert session.report().computed_fraction < 0.9
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), with_both)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    lite.disable(pipe)
    assert set(hooks_left(pipe.transformer)) == {"fbc_leader_block_hook", "fbc_block_hook"}


def test_a_stream_does_not_see_another():
    """The conditional calls give the same whether or not unconditional calls lie between them."""
    model, (cond, uncond) = make_wan(), texts()
    lite.enable(model, **BOLD)
    for names in (("cond", "uncond"), (None, None)):
        alone = [call(model, cond, t, 0, names[0]) for t in (900, 600, 300)]
        model._reset_stateful_cache()
        between = []
        for t in (900, 600, 300):
            call(model, uncond, t, 0, names[1])
            between.append(call(model, cond, t, 0, names[0]))
        model._reset_stateful_cache()
        assert all(map(torch.equal, alone, between))


@pytest.mark.parametrize("context", ["cond", None])
def test_a_loop_without_a_pipeline(context):
    """Runs are told apart by the timestep; positions lag behind the true ones, never ahead."""
    model, (text,) = make_wan(), texts(1)
    session = lite.enable(model, **BOLD)
    times = (1000, 750, 500, 250)
    fresh = [call(model, text, t, 0, context) for t in times]
    assert session.report().steps == 4 and session.report().computed_fraction < 1
    call(model, text, 1000, 7, context)  # a run that ends after its first step
    assert all(map(torch.equal, fresh, [call(model, text, t, 0, context) for t in times]))
    session.reset()
    assert torch.equal(call(model, text, 750, 0, context), call(make_and_enable(), text, 750, 0))


@pytest.mark.parametrize("context", ["cond", None])
def test_a_loop_that_is_given_up_leaves_nothing(context):
    """Not even if the next run has the same prompt and begins at less noise (image to image)."""
    model, (text,) = make_wan(), texts(1)
    lite.enable(model, **BOLD)
    fresh = [call(model, text, t, 1, context) for t in (600, 300)]
    lite.enable(model, **BOLD)
    for t in (1000, 900, 800):
        call(model, text, t, 0, context)
    assert all(map(torch.equal, fresh, [call(model, text, t, 1, context) for t in (600, 300)]))


def make_and_enable():
    model = make_wan()
    lite.enable(model, **BOLD)
    return model


def test_batch_rows_have_their_own_maps():
    model, pair = make_wan(), texts()
    lite.enable(model, **BOLD)
    batched = [call(model, torch.cat(pair), t) for t in (900, 600, 300)]
    lite.enable(model, **BOLD)
    single = [torch.cat([call(model, text, t) for text in pair]) for t in (900, 600, 300)]
    for one, other in zip(batched, single, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_second_transformer_of_wan_2_2(pipe):
    pipe = make_pipe(transformer_2=make_wan(1), boundary_ratio=0.8)
    plain = run(pipe, steps=5)
    session = lite.enable(pipe, **BOLD, dense_layers=(0,))
    first = run(pipe, steps=5)
    report = session.report()
    assert report.steps == 5 and sorted(report.step_seconds) == list(range(5))
    by_layer = {c.layer: [] for c in report.calls}
    for c in report.calls:
        by_layer[c.layer].append(c)
    assert set(by_layer) == {f"transformer{n}.blocks.1" for n in ("", "_2")}
    for calls in by_layer.values():
        assert calls[0].computed == calls[0].total
        assert any(c.computed < c.total for c in calls)
    assert torch.equal(run(pipe, steps=5), first)
    lite.disable(pipe)
    assert torch.equal(run(pipe, steps=5), plain)
    assert hooks_left(pipe.transformer) == hooks_left(pipe.transformer_2) == []


def test_other_models_are_declined_with_a_reason():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=1, num_layers=1)
    session = lite.enable(model)
    assert "DiTTransformer2DModel is not supported yet" in lite.summary(model)
    assert session.report() is None
    lite.disable(model)
    assert hooks_left(model) == []


def test_the_demo_model_skips():
    from demo.model import TEXT_TABLE, load_diffusers_model
    from demo.text import EXAMPLE, embed_prompts, load_table

    text, negative = embed_prompts([EXAMPLE, ""], load_table(TEXT_TABLE)).split(1)
    pipe = make_pipe()
    pipe.register_modules(transformer=load_diffusers_model())
    with lite.enabled(pipe, budget=0.25, min_tokens=0, audit=16, never_slower=False) as session:
        video = pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=128,
            width=128,
            num_frames=61,
            num_inference_steps=6,
            guidance_scale=2.5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames
    report = session.report()
    assert torch.isfinite(video).all()
    assert report.tokens == 16 * 8 * 8
    assert report.computed_fraction < 1
    assert report.guidance == 2.5
    assert 0 < report.lost_mass_mean < 0.25


def test_where_a_pipeline_says_how_strong_its_guidance_is():
    for guided, strength, known in ((True, 6.0, 6.0), (False, 6.0, 1.0), (True, 0.5, 1.0)):
        pipe = SimpleNamespace(do_classifier_free_guidance=guided, guidance_scale=strength)
        assert _guidance(pipe, "transformer") == known
    # An input of the model, or a transformer alone.
    unsaid = SimpleNamespace(guidance_scale=6.0), None
    assert [_guidance(pipe, "transformer") for pipe in unsaid] == [GUIDANCE] * 2


def test_the_second_transformer_of_wan_2_2_has_a_guidance_of_its_own():
    told = {"do_classifier_free_guidance": True, "guidance_scale": 3.0}
    for second, known in ((2.0, 2.0), (0.0, 1.0), (None, 3.0)):
        pipe = SimpleNamespace(**told, _guidance_scale_2=second)
        assert _guidance(pipe, "transformer") == 3.0
        assert _guidance(pipe, "transformer_2") == known
    pipe = make_pipe(transformer_2=make_wan(1), boundary_ratio=0.8)
    session = lite.enable(pipe, **BOLD)
    for second, larger in ((6.0, 6.0), (None, 3.0), (2.0, 3.0)):
        run(pipe, steps=5, guidance_scale_2=second)
        assert session.report().guidance == larger


@pytest.mark.parametrize(
    ("choices", "error", "says"),
    [
        ({"preset": "Safe", "budget": 0.1}, ValueError, "preset and budget exclude"),
        ({"preset": "Brave"}, ValueError, "Safe, Balanced, Fast"),
        ({"threshold": 3}, ValueError, "negative"),
        ({"budget": 10}, ValueError, "fraction"),
        ({"budget": 0.1, "criterion": "gap"}, ValueError, "criterion='mass'"),
        ({"treshold": -1}, TypeError, "no setting treshold"),
    ],
)
def test_choices_that_make_no_sense(pipe, choices, error, says):
    with pytest.raises(error, match=says):
        lite.enable(pipe, **choices)
    assert hooks_left(pipe.transformer) == []


def test_mode_goes_by_its_older_name_as_well(pipe):
    assert lite.enable(pipe, qk="int8").settings == lite.enable(pipe, mode="int8").settings
    with pytest.raises(ValueError, match="qk is the older name of mode"):
        lite.enable(pipe, qk="int8", mode="fp8")


def test_choices(pipe):
    assert lite.enable(pipe).settings == PRESETS[DEFAULT]
    assert lite.enable(pipe, preset="Safe", audit=8).settings.audit == 8
    assert lite.enable(pipe, budget=0.25).settings.budget == 0.25
    assert lite.enable(pipe, preset="fast").settings == PRESETS["Fast"]


def test_both_forms_of_a_cache_context_are_read():
    """In diffusers 0.40 it is only a name; in later versions an object."""
    contexts = Contexts()
    assert contexts.told() is None
    contexts.set_context("cond")
    assert contexts.told() == Context("cond")
    contexts.set_context(SimpleNamespace(name="cond", step_index=2, num_inference_steps=9))
    assert contexts.told() == Context("cond", 2, 9)
    contexts.reset()
    assert contexts.told() is None


def test_the_import_is_cheap():
    code = "import sys, comfyui_liteattention; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
