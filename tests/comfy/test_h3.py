"""MiniMax H3 in ComfyUI's own sampler, and what people combine with it."""

from types import MethodType

import pytest
import tiny_comfy
import torch
from packaging.version import parse
from torch.multiprocessing.reductions import StorageWeakRef

from comfyui_liteattention.never_slower.costs import Costs
from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = tiny_comfy.find("MiniMax H3")
LENGTH = CASE.before + CASE.video
EAGER = Settings(threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False)


@pytest.fixture(scope="module")
def plain(comfy):
    if tiny_comfy.version() < parse(CASE.since):
        pytest.skip(f"MiniMax H3 needs ComfyUI {CASE.since}")
    return tiny_comfy.make_patcher(CASE)


def latent():
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(shape) for shape in CASE.conds["latent_shapes"]])


def generate(model, settings=EAGER, **options):
    """The video and the sound, and the report."""
    from comfyui_liteattention.integrations.comfy.session import apply_patch, patch_of

    model = model if settings is None else apply_patch(model, settings)
    out = tiny_comfy.sample(model, CASE, latent=latent(), **options)
    patch = patch_of(model)
    return out.unbind(), patch and patch.last_report


def alike(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_conditionings_are_two_streams_of_all_layers(plain):
    _, report = generate(plain)
    assert report.active
    assert {(c.layer, c.stream) for c in report.calls} == {
        (layer, stream) for layer in "012" for stream in ("positive", "negative")
    }
    assert {c.tokens for c in report.calls} == {LENGTH}


def test_declined_calls_are_untouched_and_keep_their_containers(plain, monkeypatch):
    """A backend that takes containers gets them, as if we were not there."""
    from comfy.ldm.modules import attention

    taken = []

    def contained(q, k, v, *args, **kwargs):
        taken.append(q.peek().shape)
        return attention.optimized_attention.__wrapped__(
            *(container.take() for container in (q, k, v)), *args, **kwargs
        )

    dense, _ = generate(plain, settings=None)
    monkeypatch.setattr(attention.optimized_attention, "container_function", contained)
    same, _ = generate(plain, settings=None)
    without = len(taken)
    declined, report = generate(plain, Settings(min_tokens=10**6))
    assert alike(dense, same)
    assert alike(dense, declined)
    assert not report.calls
    assert without
    assert len(taken) == 2 * without


def test_the_users_attention_may_free_what_it_takes(plain, monkeypatch):
    """While it is timed, and while it is still faster: nothing of ours holds q, k, v then."""
    from comfy.ldm.modules import attention

    from comfyui_liteattention import run as run_module

    usual, alive = attention.optimized_attention.__wrapped__, []

    def frees(*arguments, **named):
        *containers, heads = arguments
        tensors = [container.take() for container in containers]
        out = usual(*tensors, heads, **named)
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        del tensors
        alive.append([storage for storage in storages if not storage.expired()])
        return out

    monkeypatch.setattr(attention.optimized_attention, "container_function", frees)
    monkeypatch.setattr(run_module, "decided", lambda *_: Costs(1.5, 0.0, 0.6, 0.3))
    _, report = generate(plain, Settings(min_tokens=0), steps=5)
    assert report.reasons[run_module.TIMED] == 3
    assert report.reasons[run_module.WAITING]
    assert len(alive) > 3
    assert not any(alive)


def test_a_few_heads_at_a_time(plain):
    """As KJNodes' node for little video memory asks: every slice of heads has tiles of its own."""
    from comfy.ldm.modules.attention import AttentionTensorContainer as Container
    from comfy.ldm.modules.attention import optimized_attention

    def sliced(attn, x, rope_freqs=None, transformer_options=None):
        q, k, v = (
            t.unflatten(-1, (attn.heads, attn.head_dim)) for t in attn.qkv_proj(x).chunk(3, -1)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)
        outs = []
        for head in range(attn.heads):
            parts = (Container(t[:, head : head + 1].transpose(0, 1)[None]) for t in (q, k, v))
            options = dict(skip_reshape=True, transformer_options=transformer_options)
            outs.append(optimized_attention(*parts, 1, mask=None, **options))
        return attn.out_proj(torch.cat(outs, -1).squeeze(0))

    model = plain.clone()
    for i, block in enumerate(plain.model.diffusion_model.blocks):
        name = f"diffusion_model.blocks.{i}.attn.forward"
        model.add_object_patch(name, MethodType(sliced, block.attn))
    _, report = generate(model)
    assert report.active
    assert {c.layer for c in report.calls} == {"0", "1", "2"}
    assert {c.stream for c in report.calls} == {
        f"{kind}{part}" for kind in ("positive", "negative") for part in ("", ", part 2")
    }


def test_a_mask_of_what_is_kept_changes_no_sequence(plain):
    mask = torch.ones(1, 1, 7, 8, 12)
    mask[..., :6] = 0
    _, report = generate(plain, noise_mask=mask)
    assert report.active
    assert {c.tokens for c in report.calls} == {LENGTH}
    assert len(report.calls) == 3 * 3 * 2


def test_newer_versions_show_index_and_layout_at_the_call(plain):
    """Written into the options by hand, as the newest model does; the payload's layout is gone."""
    from comfy.patcher_extension import WrappersMP

    def show(executor, x, timestep, context, options, **kwargs):
        options["minimax_h3_layout"] = shown[0]
        return executor(x, timestep, context, options, **kwargs)

    def lose(executor, *args, **kwargs):
        shown[:] = [kwargs["minimax_payload"]["layout"]]
        kwargs["minimax_payload"] = {**kwargs["minimax_payload"], "layout": None}
        return executor(*args, **kwargs)

    def indexed(args, extra, i):
        args["transformer_options"]["block_index"] = i
        return extra["original_block"](args)

    shown = []
    want, usual = generate(plain)
    model = plain.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lose)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", show)
    for i in range(3):
        patch = lambda args, extra, i=i: indexed(args, extra, i)  # noqa: E731
        model.set_model_patch_replace(patch, "dit", "double_block", i)
    got, report = generate(model)
    assert alike(want, got)
    assert [c.computed for c in report.calls] == [c.computed for c in usual.calls]


def test_without_a_layout_one_sentence_says_so(plain):
    from comfy.patcher_extension import WrappersMP

    def lose(executor, *args, **kwargs):
        kwargs["minimax_payload"] = {**kwargs["minimax_payload"], "layout": None}
        return executor(*args, **kwargs)

    dense, _ = generate(plain, settings=None)
    model = plain.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lose)
    out, report = generate(model)
    assert alike(dense, out)
    assert not report.calls
    assert any("without its layout" in reason for reason in report.reasons)
