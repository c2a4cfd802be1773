"""One transformer in several pipelines, threads or roles; copies of it; runs that mix modes."""

import copy
import io
import pickle
import threading

import diffusers as d
import pytest
import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from tiny_pipeline import BOLD, call, make_pipe, run, texts
from tiny_wan import hooks_left, make_wan

import comfyui_liteattention as lite

pytestmark = pytest.mark.usefixtures("one_thread")


def in_threads(*tasks):
    """The results of these functions, called at once."""
    results = [None] * len(tasks)

    def work(index, task):
        try:
            results[index] = task()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def pair():
    """Two pipelines with schedulers of their own, and one transformer."""
    first, second = make_pipe(), make_pipe()
    second.register_modules(transformer=first.transformer)
    return first, second


@pytest.mark.parametrize("choices", [{}, BOLD], ids=["declined", "skipping"])
@pytest.mark.parametrize("on", ["transformer", "pipeline"])
def test_threads_share_a_transformer(pair, choices, on):
    """Each thread's video is the same as if it ran alone, bit for bit, skipping or dense."""
    first, second = pair
    plain = [run(pipe, seed, steps=6) for seed, pipe in enumerate(pair)]
    processors = [block.attn1.processor for block in first.transformer.blocks]
    handle = lite.enable(first.transformer if on == "transformer" else first, **choices)
    alone = [run(pipe, seed, steps=6) for seed, pipe in enumerate(pair)]
    assert choices != all(map(torch.equal, alone, plain))
    for _ in range(2):
        both = in_threads(lambda: run(first, 0, steps=6), lambda: run(second, 1, steps=6))
        assert all(map(torch.equal, both, alone))
        assert all(vars(processor) == {} for processor in processors)
    assert handle.report().active == bool(choices)


def test_a_thread_in_a_call_does_not_touch_the_processor():
    """While one thread is within self-attention, another finds the processor as it was."""
    model, (text,) = make_wan(), texts(1)
    seen = []
    lite.enable(model, **BOLD)
    attention = model.blocks[0].attn1
    for part in (attention.to_q, attention.to_out[0]):
        part.register_forward_hook(lambda *_: seen.append(attention.processor._attention_backend))
    call(model, text, 900)
    assert seen == [None, None]


def test_a_report_of_another_thread_can_be_seen(pair):
    handle = lite.enable(pair[0], **BOLD)
    reports = []

    def look(pipe, index, timestep, inputs):
        reports.extend(in_threads(handle.report))
        return inputs

    run(pair[0], callback_on_step_end=look)
    assert [len(report.step_seconds) for report in reports] == [1, 2, 3, 4]


def test_one_transformer_as_both_experts():
    pipe = make_pipe(boundary_ratio=0.8)
    pipe.register_modules(transformer_2=pipe.transformer)
    plain = run(pipe, steps=5)
    handle = lite.enable(pipe, **BOLD)
    assert not torch.equal(run(pipe, steps=5), plain)
    report = handle.report()
    assert len(report.calls) == 2 * 2 * 5 and {c.layer for c in report.calls} == {
        "blocks.0",
        "blocks.1",
    }
    lite.disable(pipe)
    assert torch.equal(run(pipe, steps=5), plain) and hooks_left(pipe.transformer) == []


def test_an_enable_that_fails_leaves_what_was_there(monkeypatch):
    pipe = make_pipe(transformer_2=make_wan(1), boundary_ratio=0.8)
    handle = lite.enable(pipe, budget=0.25)
    with pytest.raises(ValueError, match="the layers of transformer are 0 to 1"):
        lite.enable(pipe, budget=0.25, dense_layers=(99,))
    assert "budget=0.25" in lite.summary(pipe) and handle.status == lite.summary(pipe)

    def fail(*_, **__):
        raise RuntimeError("no hooks today")

    monkeypatch.setattr(pipe.transformer_2, "register_forward_hook", fail)
    lite.disable(pipe)
    with pytest.raises(RuntimeError, match="today"):
        lite.enable(pipe)
    assert hooks_left(pipe.transformer) == [] == hooks_left(pipe.transformer_2)
    assert lite.summary(pipe) == "LiteAttention is not enabled"


def change(pipe):
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.to_v.weight.mul_(-3.0)


def test_a_copy_has_weights_of_its_own_and_is_not_enabled():
    pipe = make_pipe()
    other = copy.deepcopy(pipe)
    change(other)
    theirs = run(other)
    handle = lite.enable(pipe, **BOLD)
    ours = run(pipe)
    twin = copy.deepcopy(pipe)
    change(twin)
    assert torch.equal(run(twin), theirs)
    assert lite.summary(twin) == "LiteAttention is not enabled"
    assert torch.equal(run(pipe), ours) and handle.report().active
    # It can be enabled, on its own, and then nothing is left.
    assert lite.enable(twin, **BOLD).status.startswith("LiteAttention enabled")
    assert not torch.equal(run(twin), theirs)
    lite.disable(twin)
    assert torch.equal(run(twin), theirs) and hooks_left(twin.transformer) == []
    lite.disable(pipe)
    assert hooks_left(pipe.transformer) == []


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "reload", [saved, lambda x: pickle.loads(pickle.dumps(x))], ids=["torch.save", "pickle"]
)
def test_an_enabled_transformer_can_be_saved(reload):
    pipe = make_pipe()
    plain = run(pipe)
    lite.enable(pipe, **BOLD)
    run(pipe)
    other = make_pipe()
    other.register_modules(transformer=reload(pipe.transformer))
    assert torch.equal(run(other), plain)
    lite.enable(other, **BOLD)
    lite.disable(other)
    assert hooks_left(other.transformer) == []


def test_a_run_may_mix_inference_mode_and_no_grad():
    model, (text,) = make_wan(), texts(1)
    lite.enable(model, **BOLD)
    times = (900, 700, 500, 300)
    alone = [call(model, text, t) for t in times]
    lite.enable(model, **BOLD)
    for index, t in enumerate(times):
        with torch.inference_mode(index % 2 == 0):
            assert torch.equal(call(model, text, t), alone[index])
    lite.enable(model, budget=0.5, min_tokens=0, audit=4, never_slower=False)
    for index, t in enumerate(times):
        with torch.inference_mode(index % 2 == 1):
            call(model, text, t)


def test_state_is_gone_before_the_video_is_decoded():
    """In a loop of one's own, too, where a scheduler tells how many steps there are."""
    pipe = make_pipe()
    handle = lite.enable(pipe, **BOLD)
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:
        assert handle.report() is None or handle.report().maps
        for text in texts():
            call(pipe.transformer, text, float(t))
    assert handle._session._mine.trajectory.runs == {}
    report = handle.report()
    assert report.steps == 4 and len(report.calls) == 16 and report.active
    # One more call belongs to no run; it is dense, and changes no report.
    lite.enable(make_wan())
    call(pipe.transformer, texts()[0], float(t))
    assert len(handle.report().calls) == 16


def test_another_pass_of_a_step_has_tiles_of_its_own():
    """The same text and latent again, whether or not the passes differ in their arguments."""
    model, (text,) = make_wan(), texts(1)
    handle = lite.enable(model, **BOLD)
    times = (900, 600, 300)
    alone = [call(model, text, t) for t in times]
    lite.enable(model, **BOLD)
    config = d.LayerSkipConfig(indices=[1], fqn="blocks")
    for t, one in zip(times, alone, strict=True):
        assert torch.equal(call(model, text, t), one)
        assert torch.equal(call(model, text, t), one)
        d.hooks.apply_layer_skip(model, config)
        perturbed = call(model, text, t)
        model.blocks[1]._diffusers_hook.remove_hook("layer_skip_hook")
        assert not torch.equal(perturbed, one)
    handle = model._liteattention
    maps = {(m.layer, m.stream.partition(" ")[2]) for m in handle.report().maps}
    assert maps == {
        ("blocks.0", ""),
        ("blocks.1", ""),
        ("blocks.0", "pass 2"),
        ("blocks.1", "pass 2"),
        ("blocks.0", "pass 3"),
    }


def test_a_guider_of_a_modular_pipeline():
    """Skipped layers are a third pass of all steps but the first: one run, a map for each."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    blocks = WanBlocks()
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    pipe = blocks.init_pipeline()
    skip = d.hooks.LayerSkipConfig(indices=[1], fqn="blocks")
    pipe.update_components(
        transformer=make_wan(channels=16),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        guider=d.SkipLayerGuidance(
            guidance_scale=3.0,
            skip_layer_config=[skip],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
    )

    def sample():
        generator = torch.Generator().manual_seed(0)
        text, negative = torch.randn(2, 1, 6, 16, generator=generator)
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=4,
            generator=generator,
            output="latents",
        ).clone()

    plain = sample()
    handle = lite.enable(pipe, **BOLD)
    first = sample()
    report = handle.report()
    assert report.active and report.steps == 4 and len(report.calls) == 4 * (2 + 2) + 3
    assert all(c.computed == c.total for c in report.calls if c.step == 0)
    assert {c.stream.partition(" ")[2] for c in report.calls} == {"", "pass 2"}
    assert handle._session._mine.trajectory.runs == {}  # gone with the last step
    assert torch.equal(sample(), first) and not torch.equal(first, plain)
    lite.disable(pipe)
    assert torch.equal(sample(), plain)


def test_attention_that_is_perturbed_stays_as_it_is():
    """Perturbed-attention guidance replaces PyTorch's attention by the values in one pass."""
    model, (text,) = make_wan(), texts(1)

    def sample():
        for t in (900, 600, 300):
            yield call(model, text, t)
            with AttentionScoreSkipFunctionMode():
                yield call(model, text, t)

    plain = list(sample())
    handle = lite.enable(model, threshold=-39.0, ramp=0.0, min_tokens=0, never_slower=False)
    for one, other in zip(sample(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    reasons = handle.report().reasons
    assert reasons == {"AttentionScoreSkipFunctionMode steps in at PyTorch's own attention": 6}
