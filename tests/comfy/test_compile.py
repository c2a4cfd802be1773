"""torch.compile, the way ComfyUI's own node does it: one graph, with and without LiteAttention."""

import shutil
from dataclasses import replace

import pytest
import tiny_comfy
import torch
from torch._dynamo.utils import counters

from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(
    threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False
)
OVERRIDE = "optimized_attention_override"
WAN = tiny_comfy.find("Wan T2V")
WAN = replace(WAN, unet=WAN.unet | dict(num_layers=2), layers=2)  # each costs time to compile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plain(comfy):
    return tiny_comfy.make_patcher(WAN)


def compiled(model, backend="eager", **options):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model=model, backend=backend, **options)
    return model


def patched(model, settings=SETTINGS):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    return apply_patch(model, settings)


def report(model):
    from comfyui_liteattention.integrations.comfy.session import patch_of

    return patch_of(model).last_report


def tiles(model):
    return [(call.step, call.stream, call.computed) for call in report(model).calls]


def sample(model, **options):
    return tiny_comfy.sample(model, WAN, frames=4, **options)


@pytest.mark.parametrize("ours_first", [False, True])
def test_there_is_one_graph_and_the_result_is_the_same(plain, ours_first):
    bare = patched(plain)
    want = sample(bare)
    both = compiled(patched(plain)) if ours_first else patched(compiled(plain))
    for _ in range(3):
        torch.testing.assert_close(sample(both), want, rtol=1e-4, atol=1e-4)
        assert tiles(both) == tiles(bare)
        assert report(both).active and not report(both).notes
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("ours_first", [False, True])
def test_a_graph_made_while_bypassed_is_made_anew(plain, ours_first):
    """By ComfyUI's own node, whose graphs don't depend on transformer options from 0.33 on. The
    first step of a run is dense anyway; the second asks us, and so does every later run."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def by_node(model):
        return TorchCompileModel.execute(model, "eager").args[0]

    want = sample(patched(plain))
    dense = sample(by_node(plain))
    both = by_node(patched(plain)) if ours_first else patched(by_node(plain))
    sample(both)
    assert report(both).active
    assert not report(both).notes or "made anew" in report(both).notes[0]
    assert torch.equal(sample(by_node(plain)), dense)
    torch.testing.assert_close(sample(both), want, rtol=1e-4, atol=1e-4)
    assert not report(both).notes
    assert counters["stats"]["unique_graphs"] == 2


def test_text_padding_is_left_out(comfy):
    case = tiny_comfy.find("HunyuanVideo with padded text")
    extra = {"pooled_output": torch.zeros(1, 32), **case.conds}
    positive, negative = ([[tiny_comfy.noise(case.text, i), extra]] for i in range(2))
    bare = patched(tiny_comfy.make_patcher(case))
    both = compiled(bare)
    want, got = (
        tiny_comfy.sample(model, case, 4, cfg=1.0, prompts=(positive, negative))
        for model in (bare, both)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert {call.tokens for call in report(both).calls} == {4 * 96 + 7}
    assert tiles(both) == tiles(bare)
    assert report(both).active
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_blocks_skip_as_well(plain, backend):
    """Only the blocks are compiled, as some packs do; by inductor, too, into code for this CPU."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    bare = patched(plain)
    want = sample(bare)
    keys = [f"diffusion_model.blocks.{i}" for i in range(WAN.layers)]
    both = patched(compiled(plain, backend, keys=keys))
    torch.testing.assert_close(sample(both), want, rtol=1e-4, atol=1e-4)
    assert tiles(both) == tiles(bare)
    assert not counters["graph_break"]


def test_another_attention_stays_the_dense_path(plain):
    """It gets what we decline, from the operator as well."""
    seen = []

    def earlier(func, q, k, *args, **kwargs):
        seen.append(q.shape[1] == k.shape[1])
        return func(q, k, *args, **kwargs)

    model = plain.clone()
    model.model_options["transformer_options"][OVERRIDE] = torch.compiler.disable(earlier)
    dense = sample(model)
    everything = len(seen)
    seen.clear()
    assert torch.equal(sample(patched(compiled(model), Settings(min_tokens=100_000))), dense)
    assert len(seen) == everything


def test_what_a_cuda_graph_would_replay_stays_dense(plain, monkeypatch):
    from comfyui_liteattention.integrations.comfy import hooks

    want = sample(plain)
    monkeypatch.setattr(hooks, "_being_recorded", lambda q: True)
    model = patched(compiled(plain))
    torch.testing.assert_close(sample(model), want, rtol=1e-4, atol=1e-4)
    assert not report(model).calls
    assert hooks.RECORDED in report(model).reasons
