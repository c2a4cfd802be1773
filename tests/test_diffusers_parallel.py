"""A pipeline whose transformer is spread over two processes (gloo, on the CPU).

This file is also the program of each of the two: it samples every case and writes down what came
out, so that the processes start only once.
"""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_wan import make_ltx, make_wan

import comfyui_liteattention as lite
from comfyui_liteattention import Settings
from comfyui_liteattention.backends import backend_for
from comfyui_liteattention.integrations.diffusers.calls import MIXED, Place, TransformerCall
from comfyui_liteattention.integrations.diffusers.parallel import declined
from comfyui_liteattention.integrations.diffusers.routes import Extra
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.tiles import TileShape
from comfyui_liteattention.token_order import VideoTokens, arrange, arrange_part

WORLD = 2
#: Seconds after which processes that wait for each other are terminated.
PATIENCE = 240

# So few steps that a steeper ramp would leave nothing to skip.
BOLD = {"threshold": -2.0, "ramp": 1.0, "min_tokens": 0, "audit": 16, "never_slower": False}
FULL = BOLD | {"warmup": 1.0}
BUDGET = {"budget": 0.003, "ramp": 1.0, "min_tokens": 0, "audit": 4, "never_slower": False}
#: What is sampled in each mode, by name.
CHOICES = {
    "full": FULL,
    "bold": BOLD,
    "raster": BOLD | {"order": "raster", "audit": 0},
    "budget": BUDGET,
}
MODES = {
    "ulysses": {"ulysses_degree": WORLD},
    "anything": {"ulysses_degree": WORLD, "ulysses_anything": True},
    "ring": {"ring_degree": WORLD},
}


def make_pipe(heads=2):
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(**parts, transformer=make_wan(0, heads, gain=6.0), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    """A video of 8 latent frames of 12 x 12 tokens: 18 tiles of 64."""
    generator = torch.Generator().manual_seed(0)
    text, negative = torch.randn(2, 1, 6, 16, generator=generator)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=192,
        width=192,
        num_frames=29,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        generator=generator,
    ).frames


@torch.no_grad()
def sample_ltx(model):
    """8 frames of 12 x 12 tokens; the text is split over the processes, too. (In diffusers 0.42 the
    pipeline, which gives a mask for the text, fails when the heads are.)"""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 6, 16, generator=generator)
    latent = torch.randn(1, 8 * 144, 8, generator=generator)
    for t in (1000.0, 750.0, 500.0, 250.0):
        size = {"num_frames": 8, "height": 12, "width": 12, "return_dict": False}
        latent = latent - 0.25 * model(latent, text, torch.tensor([t]), None, **size)[0]
    return latent


def hooks(model):
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    names = [name for registry in registries for name in registry.hooks]
    return [*names, *model._forward_hooks, *model._forward_pre_hooks]


def figures(session):
    """What a process knows of its last run."""
    report = session.report()
    skipped = [call for call in report.calls if call.computed < call.total]
    return {
        "computed": sum(call.computed for call in report.calls),
        "total": sum(call.total for call in report.calls),
        "skipped": len(skipped),
        "lost": report.lost_mass_mean,
        "reasons": report.reasons,
    }


def sample_with(pipe, choices, sample=sample):
    with lite.enabled(pipe, **choices) as session:
        return {"out": sample(pipe), **figures(session)}


# --- what each of the two processes does ---------------------------------------------------------


def split(target, **config):
    """Spread a transformer, or that of a pipeline, over the processes."""
    model = getattr(target, "transformer", target)
    # diffusers counts the devices, and finds none on a machine without cards.
    count, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 1
    model.enable_parallelism(config=ContextParallelConfig(**config))
    torch.accelerator.device_count = count
    return target


def work(rank):
    """All cases of one process, by name."""
    found = {}
    for mode, config in MODES.items():
        pipe = split(make_pipe(), **config)
        before = hooks(pipe.transformer)
        if mode != "ring":  # PyTorch's own attention gives diffusers' ring no log-sum-exp
            found[mode, "plain"] = {"out": sample(pipe)}
        for name, choices in CHOICES.items():
            found[mode, name] = sample_with(pipe, choices)
        assert hooks(pipe.transformer) == before
        assert not any(
            "lite" in name for name in _AttentionBackendRegistry._supports_context_parallel
        )
        assert all(type(b) is AttentionBackendName for b in _AttentionBackendRegistry._backends)
        if mode != "ring":
            found[mode, "disabled"] = {"out": sample(pipe)}
    # (An odd number of tokens can't be tried: gloo doesn't gather pieces of different lengths.)
    found["anything", "odd"] = sample_with(split(make_pipe(3), **MODES["anything"]), BOLD)
    for mode in ("ulysses", "ring"):
        found[mode, "one dense"] = one_dense(rank, mode)
        found[mode, "short"] = sample_with(split(make_pipe(), **MODES[mode]), {"threshold": -2.0})
    found["ring", "pinned"] = sample_with(
        split(make_pipe(), **MODES["ring"]), BOLD | {"dense_keys": ((0, 64),)}
    )
    found["ulysses", "timed"] = sample_with(
        split(make_pipe(), **MODES["ulysses"]), BOLD | {"never_slower": True}
    )
    found["ulysses", "late"] = split_late()
    found["ulysses", "gradients"] = gradients()
    ltx = split(make_ltx(), **MODES["ulysses"])
    found["ltx", "plain"] = {"out": sample_ltx(ltx)}
    found["ltx", "full"] = sample_with(ltx, FULL, sample_ltx)
    found["ltx", "bold"] = sample_with(ltx, BOLD | {"threshold": -1.0, "audit": 0}, sample_ltx)
    return found


def one_dense(rank, mode):
    """The first process goes on densely from the third step, without telling the other."""

    class Slow(Run):
        def begin_call(self, step):
            super().begin_call(step)
            if rank == 0 and step == 2:
                self._stop("too slow, just here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfyui_liteattention.integrations.diffusers.session.Run", Slow)
        return sample_with(split(make_pipe(), **MODES[mode]), BOLD)


def split_late():
    """Spread over the processes after LiteAttention was enabled."""
    pipe = make_pipe()
    session = lite.enable(pipe, **BOLD)
    split(pipe, **MODES["ulysses"])
    return {"out": sample(pipe), **figures(session)}


def gradients():
    """A call in training, which is diffusers' own affair."""
    model = split(make_pipe(), **MODES["ulysses"]).transformer
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 5, 16, 16, generator=generator)
    text = torch.randn(1, 6, 16, generator=generator)
    weight = model.blocks[0].attn1.to_v.weight
    found = []
    for on in (False, True):
        if on:
            session = lite.enable(model, **BOLD)
        out = model(latent, torch.tensor([500.0]), text, return_dict=False)[0]
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), weight)))
    return {"plain": found[0], "enabled": found[1], **figures(session)}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE / 2),
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# --- what came out -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found: one dictionary by (mode, case) of each."""
    folder = tmp_path_factory.mktemp("processes")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here / "tiny")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [(folder / f"{rank}.log").open("wb") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=logs[rank],
            stderr=logs[rank],
        )
        for rank in range(WORLD)
    ]
    try:
        end = time.monotonic() + PATIENCE
        codes = [process.wait(timeout=end - time.monotonic()) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["hangs"]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    texts = [(folder / f"{rank}.log").read_text() for rank in range(WORLD)]
    assert codes == [0] * WORLD, "\n".join(texts)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone():
    """The same in one process."""
    pipe = make_pipe()
    cases = {name: sample_with(pipe, choices) for name, choices in CHOICES.items()}
    return cases | {"plain": {"out": sample(pipe)}}


def error(a, b):
    return float((a["out"] - b["out"]).abs().max() / b["out"].abs().max())


ROUNDING = 1e-5
#: The largest difference allowed between several processes and one.
RULE = 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHOICES)
def test_all_processes_have_the_same_video(found, mode, name):
    first, second = (result[mode, name]["out"] for result in found)
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_with_nothing_to_skip_it_is_the_plain_video(found, alone, mode):
    for result in found:
        full = result[mode, "full"]
        assert error(full, alone["plain"]) < ROUNDING
        assert full["computed"] == full["total"] > 0
        assert "context" not in str(full["reasons"])
        if mode != "ring":
            assert error(full, result[mode, "plain"]) < ROUNDING


@pytest.mark.parametrize("mode", ["ulysses", "anything"])
@pytest.mark.parametrize("name", ["bold", "raster"])
def test_two_processes_skip_what_one_skips(found, alone, mode, name):
    """Each process skips in its own heads, and together they skip the same tiles."""
    one = alone[name]
    assert one["computed"] < 0.95 * one["total"]
    for result in found:
        assert error(result[mode, name], one) < ROUNDING
        assert result[mode, name]["skipped"] > 0
    for what in ("computed", "total"):
        assert sum(result[mode, name][what] for result in found) == one[what]


@pytest.mark.parametrize("name", ["bold", "raster"])
def test_ring_skips_and_stays_within_the_rule(found, alone, name):
    """Each process has its own rows: other tiles than one process has, at the same threshold."""
    one = alone[name]
    for result in found:
        ring = result["ring", name]
        assert ring["computed"] < 0.95 * ring["total"]
        assert error(ring, one) < RULE
        assert error(ring, alone["plain"]) < RULE
    assert sum(result["ring", name]["total"] for result in found) == one["total"]


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_is_held_in_every_process(found, alone, mode):
    for result in found:
        case = result[mode, "budget"]
        assert case["skipped"] > 0
        assert 0 < case["lost"] <= BUDGET["budget"]
        assert error(case, alone["plain"]) < RULE


def test_heads_that_do_not_divide_evenly(found):
    alone = sample_with(make_pipe(3), BOLD)
    for result in found:
        assert error(result["anything", "odd"], alone) < ROUNDING
        assert result["anything", "odd"]["skipped"] > 0
    assert sum(r["anything", "odd"]["computed"] for r in found) == alone["computed"]


@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_one_process_may_go_dense_alone(found, alone, mode):
    first, second = (result[mode, "one dense"] for result in found)
    assert torch.equal(first["out"], second["out"])
    assert "too slow, just here" in first["reasons"]
    assert "too slow, just here" not in second["reasons"]
    assert first["total"] < second["total"] and second["skipped"] > 0
    assert error(first, alone["plain"]) < RULE


def test_timing_and_late_parallelism(found, alone):
    for result in found:
        assert error(result["ulysses", "timed"], alone["plain"]) < RULE
        assert error(result["ulysses", "late"], alone["bold"]) < ROUNDING
        assert result["ulysses", "late"]["skipped"] > 0


@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_what_is_declined_is_dense(found, alone, mode):
    for result in found:
        short = result[mode, "short"]
        assert "short sequence" in str(short["reasons"]) and not short["total"]
        assert error(short, alone["plain"]) < ROUNDING


def test_ring_leaves_pinned_tokens_to_ulysses(found, alone):
    for result in found:
        assert "ring attention" in str(result["ring", "pinned"]["reasons"])
        assert error(result["ring", "pinned"], alone["plain"]) < ROUNDING


def test_training_is_left_to_diffusers(found):
    for result in found:
        case = result["ulysses", "gradients"]
        assert "gradients" in str(case["reasons"])
        for plain, enabled in zip(case["plain"], case["enabled"], strict=True):
            assert torch.equal(plain, enabled)


@pytest.mark.parametrize("mode", ["ulysses", "anything"])
def test_disable_leaves_nothing(found, mode):
    for result in found:
        assert torch.equal(result[mode, "disabled"]["out"], result[mode, "plain"]["out"])


def test_ltx_video(found):
    """Its plan splits the tokens at the start of the transformer, and the text with them."""
    alone = sample_with(make_ltx(), BOLD | {"threshold": -1.0, "audit": 0}, sample_ltx)
    for result in found:
        assert error(result["ltx", "full"], result["ltx", "plain"]) < ROUNDING
        assert error(result["ltx", "bold"], alone) < RULE
    assert sum(r["ltx", "bold"]["computed"] for r in found) == alone["computed"] < alone["total"]


# --- without processes ---------------------------------------------------------------------------


def config(**fields):
    return SimpleNamespace(context_parallel_config=ContextParallelConfig(**fields))


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "mask", "heads", "reason"),
    [
        ({"ulysses_degree": 2}, None, 4, None),
        ({"ulysses_degree": 2, "ulysses_anything": True}, None, 4, None),
        ({"ring_degree": 2}, None, 4, None),
        ({"ring_degree": 2, "ring_anything": True}, None, 4, "ring_anything"),
        ({"ring_degree": 2, "ulysses_degree": 2}, None, 4, "together"),
        ({"ring_degree": 2}, torch.ones(1, 8, dtype=torch.bool), 4, "mask"),
        ({"ulysses_degree": 2}, None, 2, "shapes"),
    ],
)
def test_what_is_left_to_diffusers_altogether(fields, mask, heads, reason):
    q, k = torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, heads, 16)
    found = declined(config(**fields), q, k, k, mask)
    assert found is None if reason is None else reason in found


def test_another_diffusers_is_left_alone(monkeypatch):
    monkeypatch.delattr("diffusers.models.attention_dispatch._templated_context_parallel_attention")
    q = torch.zeros(1, 8, 4, 16)
    with torch.no_grad():
        assert "not known" in declined(config(ulysses_degree=2), q, q, q, None)


def test_pieces_are_compact():
    grid, tile, device = (4, 12, 12), TileShape(64, 64), torch.device("cpu")
    whole = arrange(576, VideoTokens(grid), (), tile, device)
    assert torch.equal(arrange_part(grid, 0, 576, tile, device), whole)
    second = arrange_part(grid, 200, 300, tile, device)
    assert torch.equal(second.sort().values, torch.arange(300))
    tokens = second[:64] + 200
    rows = tokens % 144 // 12
    assert rows.max() - rows.min() < 11  # in the model's order a tile of 64 is half a frame wide


def test_text_among_the_pieces_is_declined():
    """Every process has a piece of the text and of the video, so the video isn't contiguous."""
    run = Run(Settings(**FULL), backend_for(torch.device("cpu")), ())
    place = Place(Progress(0, 0.5), "cond", torch.device("cpu"), "")
    q = torch.zeros(1, 2, 64, 32)
    with torch.no_grad():
        call = TransformerCall(run, place, lambda length: VideoTokens((3, 4, 4)), lambda: None)
        assert call.attend("blocks.0.attn", q, q, q, None, Extra(across=True)) is None
        assert list(run.report().reasons) == [MIXED]
        assert call.attend("blocks.0.attn", q, q, q, None, Extra()) is not None
