"""What people combine with it, on tiny models in ComfyUI's own sampling code."""

import json
from dataclasses import replace

import pytest
import tiny_comfy
import torch
from safetensors.torch import load_file

from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(
    threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False
)
WAN = tiny_comfy.find("Wan T2V")
WAN = replace(WAN, unet=WAN.unet | dict(num_layers=2), layers=2)
FLUX = tiny_comfy.find("Flux")


@pytest.fixture(scope="module")
def plain(comfy):
    return tiny_comfy.make_patcher(WAN)


def patched(model):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    return apply_patch(model, SETTINGS)


def report(model):
    from comfyui_liteattention.integrations.comfy.session import patch_of

    return patch_of(model).last_report


def streams(model):
    return {call.stream for call in report(model).calls}


def sample(model, case=WAN, frames=4, **options):
    return tiny_comfy.sample(model, case, frames, **options)


def test_every_sampler(comfy, plain):
    """The same bits again, only steps that there are, and every layer asked every time."""
    model = patched(plain)
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        first = sample(model, frames=3, sampler=sampler)
        run = report(model)
        assert first.isfinite().all(), sampler
        assert run.active, sampler
        assert {call.step for call in run.calls} <= {0, 1, 2}, sampler
        assert len({call.layer for call in run.calls}) == WAN.layers
        assert len(run.calls) % (2 * WAN.layers) == 0
        assert torch.equal(sample(model, frames=3, sampler=sampler), first), sampler


def test_every_scheduler(comfy, plain):
    model = patched(plain)
    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        out = sample(model, steps=4, scheduler=scheduler)
        assert out.isfinite().all(), scheduler
        assert report(model).active, scheduler
        assert {call.step for call in report(model).calls} == {0, 1, 2, 3}, scheduler


def test_two_experts_are_two_runs(plain):
    """Wan 2.2: one model for the noisy steps, another for the rest."""
    high, low = patched(plain), patched(tiny_comfy.make_patcher(WAN))
    first = dict(start_step=0, last_step=3, force_full_denoise=False)
    second = dict(start_step=3, last_step=6, disable_noise=True)

    def both():
        half = sample(high, steps=6, **first)
        return half, sample(low, steps=6, latent=half, **second)

    half, whole = both()
    for model in (high, low):
        assert report(model).active
        dense = {call.step for call in report(model).calls if call.computed == call.total}
        assert 0 in dense
    sample(low, steps=6)
    for again, before in zip(both(), (half, whole), strict=True):
        assert torch.equal(again, before)


def test_weights_in_fp8(comfy):
    """Load Diffusion Model with ``fp8_e4m3fn``: ComfyUI computes in another type, as ever."""
    options = {"dtype": torch.float8_e4m3fn}
    plain = comfy.sd.load_diffusion_model(tiny_comfy.demo_weights(), model_options=options)
    weight = plain.model.diffusion_model.blocks[0].self_attn.q.weight
    assert weight.dtype == torch.float8_e4m3fn
    tiny_comfy.skips_and_stays_close(plain, SETTINGS)


@pytest.mark.parametrize("scheme", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantised_checkpoints(comfy, scheme):
    """Files that name a format and scales for each matrix, as ComfyUI's own QUANTIZATION.md has
    it."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if not hasattr(comfy.utils, "convert_old_quants"):
        pytest.skip("this ComfyUI is older")
    stored = QUANT_ALGOS[scheme]["storage_t"]
    largest = 127.0 if stored == torch.int8 else torch.finfo(stored).max
    weights, layers = {}, {}
    for name, tensor in load_file(tiny_comfy.demo_weights()).items():
        weights[name] = tensor
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and "blocks." in name and tensor.ndim == 2:
            scale = tensor.float().abs().max() / largest
            scaled = tensor.float() / scale
            weights[name] = (scaled.round() if stored == torch.int8 else scaled).to(stored)
            weights[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": scheme}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    weights, metadata = comfy.utils.convert_old_quants(weights, metadata=metadata)
    with torch.inference_mode():  # as nodes are run
        plain = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    weight = plain.model.diffusion_model.blocks[0].self_attn.q.weight
    assert isinstance(weight, QuantizedTensor)
    tiny_comfy.skips_and_stays_close(plain, SETTINGS)


def test_weights_that_stay_offloaded(comfy, plain, monkeypatch):
    """As with little video memory: most weights are cast when their layer runs."""
    model = patched(plain)
    want = sample(model)
    loaded = comfy.model_management.LoadedModel.model_load
    monkeypatch.setattr(
        comfy.model_management.LoadedModel,
        "model_load",
        lambda self, memory=0, **options: loaded(self, 0.1, **options),
    )
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), want)
    assert plain.model.model_lowvram
    assert report(model).active
    comfy.model_management.unload_all_models()


def test_controlnet(comfy):
    """What a ControlNet adds changes the picture, and nothing in the sequence."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, *_):
            tokens = tiny_comfy.noise((len(x_noisy), FLUX.video * 4, 128), 1)
            return {"input": [tokens], "output": [tokens]}

        def copy(self):
            return self

    model = patched(tiny_comfy.make_patcher(FLUX))
    (positive,), (negative,) = (tiny_comfy.conditioning(FLUX, i) for i in range(2))
    without = sample(model, FLUX, prompts=([positive], [negative]))
    control = {"control": Control(), "control_apply_to_uncond": True}
    positive = [positive[0], positive[1] | control]
    out = sample(model, FLUX, prompts=([positive], [negative]))
    assert report(model).active
    assert streams(model) == {"positive", "negative"}
    assert not torch.equal(out, without)


def test_vace(comfy):
    case = tiny_comfy.find("Wan VACE")
    model = patched(tiny_comfy.make_patcher(case))
    extra = dict(
        vace_frames=[torch.zeros(1, 32, 12, 8, 16)],
        vace_mask=[torch.ones(1, 64, 12, 8, 16)],
        vace_strength=[1.0],
    )
    prompts = [[[tiny_comfy.noise(case.text, i), extra]] for i in range(2)]
    sample(model, case, prompts=prompts)
    assert report(model).active
    assert len(report(model).calls) == 3 * 4 * 2  # steps, layers (two of control), streams


def test_prompts_for_areas(comfy):
    """An area is sampled as a smaller picture of its own."""
    model = patched(tiny_comfy.make_patcher(FLUX))
    (whole,), negative = (tiny_comfy.conditioning(FLUX, i) for i in range(2))
    area = [whole[0], whole[1] | {"area": (32, 24, 0, 0), "strength": 1.0}]
    sample(model, FLUX, prompts=([whole, area], negative))
    assert report(model).active
    assert {call.tokens for call in report(model).calls} == {12 + 4 * 96, 12 + 2 * 96}


def test_a_pack_that_wraps_the_models_function(plain):
    """The one slot that older caches take: they may also not ask the model at all."""
    asked = []

    def every_other(apply_model, arguments):
        asked.append(len(asked))
        if asked[-1] % 2:
            return arguments["input"] * 0
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = patched(plain)
    model.set_model_unet_function_wrapper(every_other)
    sample(model, steps=6)
    assert len(asked) == 6
    assert {call.step for call in report(model).calls} == {0, 2, 4}


def test_lazycache(plain):
    from comfy_extras.nodes_easycache import LazyCacheNode

    model = LazyCacheNode.execute(patched(plain), 5.0, 0.15, 0.95, False).result[0]
    sample(model, steps=8)
    steps = {call.step for call in report(model).calls}
    assert report(model).active
    assert 0 in steps < set(range(8))


def test_two_devices(comfy, monkeypatch):
    """ComfyUI's MultiGPU CFG Split: each conditioning on a device of its own, in a thread of its
    own. Both devices are this CPU."""
    pytest.importorskip("comfy.multigpu", reason="this ComfyUI is older")
    management = comfy.model_management
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices)
    monkeypatch.setattr(management, "set_torch_device", lambda device: None)
    plain = comfy.sd.load_diffusion_model(tiny_comfy.demo_weights())
    text = tiny_comfy.noise((2, 1, 8, 4096), 3)
    setup = dict(latent=torch.zeros(1, 16, 4, 16, 16), prompts=[[[text[0], {}]], [[text[1], {}]]])
    alone = patched(plain)
    want = sample(alone, **setup)
    split = comfy.multigpu.create_multigpu_deepclones(alone, 2)
    (other,) = split.get_additional_models_with_key("multigpu")
    assert other.load_device == devices[1]
    assert other.model is not split.model
    asked = []
    other.model.diffusion_model.register_forward_pre_hook(lambda *_: asked.append(1))
    torch.testing.assert_close(sample(split, **setup), want, rtol=1e-3, atol=1e-3)
    assert len(asked) == 3
    assert report(split).active
    assert len(streams(split)) == 2
    assert report(split).computed_fraction == report(alone).computed_fraction
