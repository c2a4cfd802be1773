"""What LiteAttention does to every family of video transformers that diffusers has."""

import diffusers as d
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_families import (
    MODELS,
    SAMPLED,
    WAN,
    cogvideox,
    cosmos,
    hunyuan_video,
    make_hunyuan,
    make_skyreels,
)
from tiny_sampling import GRID, RESET, STEPS, VIDEO, latent, texts

import comfyui_liteattention as lite
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.integrations.diffusers import session as diffusers_session
from comfyui_liteattention.integrations.diffusers.families import (
    FAMILIES,
    NOT_FOUND,
    self_attention,
    video_tokens,
)
from comfyui_liteattention.integrations.diffusers.masks import Padding, tail_padding
from comfyui_liteattention.integrations.diffusers.routes import ELSEWHERE
from comfyui_liteattention.integrations.diffusers.trajectory import Moment, Trajectory, noise_levels
from comfyui_liteattention.never_slower.rehearsal import forget_decisions
from comfyui_liteattention.run import NOT_FINITE, NOT_FINITE_AGAIN, TIMED
from comfyui_liteattention.tiles import TileShape
from comfyui_liteattention.token_order import VideoTokens

pytestmark = pytest.mark.usefixtures("one_thread")

TILE = 16
BOLD = {"threshold": -1.0, "ramp": 0.0, "min_tokens": 0, "audit": 0, "never_slower": False}
NOTHING = BOLD | {"threshold": -39.0}


class Recorder(ReferenceBackend):
    """Small tiles; keeps, of every call that skips, which rows came out other than dense, as they
    are listed in the map."""

    def __init__(self):
        super().__init__(TileShape(TILE, TILE))
        self.changed = []

    def forward(self, call, lists=None, criterion=None):
        result = super().forward(call, lists, criterion)
        if lists is not None:
            full = super().forward(call)
            changed = (result.out != full.out).any(-1).any(0).any(0)
            self.changed.append(changed if call.order is None else changed[call.order])
        return result


@pytest.fixture
def recorder(monkeypatch):
    backend = Recorder()
    monkeypatch.setattr(diffusers_session, "backend_for", lambda *_: backend)
    return backend


class Witness:
    """Repeats every call of self-attention densely: how far each row of the output is off.

    Joint attention returns video and text apart, so that the model says which is which. ``text``
    and ``video`` hold, per call, the largest difference among rows of their kind.
    """

    def __init__(self, made):
        self.given = made.given
        self.text, self.video = [], []
        family = FAMILIES[type(made.transformer).__name__]
        for name in self_attention(made.transformer, family):
            module = made.transformer.get_submodule(name)
            module.register_forward_hook(self._compare, with_kwargs=True)

    def _compare(self, module, args, kwargs, output):
        dense = module.forward._own
        pairs = zip(parts(output), parts(dense(*args, **kwargs)), strict=True)
        video, *text = ((a - b).abs().amax((0, 2)) for a, b in pairs)
        is_video = torch.ones(len(video), dtype=torch.bool)
        is_video[self.given] = False
        self.text.append(float(torch.cat([video[~is_video], *text, torch.zeros(1)]).max()))
        self.video.append(float(video[is_video].max()))


def parts(output):
    return [t for t in output if t is not None] if isinstance(output, tuple) else [output]


@pytest.fixture(params=MODELS)
def made(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def hooks_left(model):
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    return [
        *model._forward_hooks,
        *model._forward_pre_hooks,
        *(name for registry in registries for name in registry.hooks),
        *(name for name in vars(model) if "lite" in name or name == RESET),
    ]


def named(streams):
    """Streams that are named by a prompt's fingerprint are just "text" here."""
    return {"text" + s[21:] if s.startswith("text-") else s for s in streams}


def test_with_nothing_to_skip_the_result_is_the_dense_one(made, recorder):
    plain = made.sample()
    assert torch.isfinite(plain).all()
    session = lite.enable(made.target, **NOTHING)
    torch.testing.assert_close(made.sample(), plain, rtol=1e-4, atol=1e-4)
    assert session.report().computed_fraction == 1


def test_only_video_tiles_are_skipped(made, recorder):
    """The halves of the video are negligible for each other."""
    session = lite.enable(made.target, **BOLD)
    witness = Witness(made)
    made.sample()
    report = session.report()
    assert report.active and report.computed_fraction < 0.9 and report.reasons == {}
    assert len({c.layer for c in report.calls}) == made.layers
    assert {c.tokens for c in report.calls} == made.kept
    assert named({c.stream for c in report.calls}) == made.streams
    steps = {c.step for c in report.calls}
    assert steps == set(range(len(steps))) and len(steps) >= STEPS
    assert len(report.calls) == made.layers * len(steps) * len(made.streams)
    assert max(witness.text) < 1e-5
    assert max(witness.video) > 1e-4
    for tile_map in report.maps:
        # What is not video is listed first: the longest text, or less.
        dense = made.dense - (max(made.kept) - tile_map.tokens)
        tiles = -(-dense // TILE)
        assert bool((tile_map.live[:tiles] == 1).all() and (tile_map.live[:, :tiles] == 1).all())
    fewest = made.dense - (max(made.kept) - min(made.kept))
    assert recorder.changed and any(rows.any() for rows in recorder.changed)
    assert not any(rows[:fewest].any() for rows in recorder.changed)


@pytest.mark.parametrize("made", SAMPLED, indirect=True)
def test_its_own_pipeline_samples_it_with_cfg(made, recorder):
    """Each conditioning begins with a dense step, and has a map of its own for the later ones."""
    assert isinstance(made.target, d.DiffusionPipeline)
    session = lite.enable(made.target, **BOLD)
    made.sample()
    report = session.report()
    maps = {(tile_map.layer, tile_map.stream) for tile_map in report.maps}
    assert len(maps) == made.layers * len(made.streams)
    assert all((call.computed == call.total) == (call.step == 0) for call in report.calls)


def test_a_second_run_gives_the_same_bits(made, recorder):
    """As shipped: with what the first run finds out by the clock."""
    forget_decisions()
    session = lite.enable(made.target, **BOLD | {"never_slower": True})
    first = made.sample()
    assert session._session._mine.trajectory is None  # the run's state went with it
    assert torch.equal(made.sample(), first)


def test_as_it_ships(made, recorder):
    """These videos are too short, and nothing of ours comes near them. Where they are long enough,
    the preset with all that belongs to it, its decision by the clock too, ends in a video."""
    forget_decisions()
    plain = made.sample()
    session = lite.enable(made.target)
    assert torch.equal(made.sample(), plain)
    assert list(session.report().reasons) == ["short sequence (fewer than 2048 tokens)"]
    session = lite.enable(made.target, min_tokens=0)
    video = made.sample()
    assert torch.isfinite(video).all() and video.shape == plain.shape
    report = session.report()
    assert report.settings.startswith("closeness=") and len(report.calls) >= 3
    assert report.reasons[TIMED] == 3


def test_disable_brings_the_plain_result_back(made, recorder):
    plain = made.sample()
    lite.enable(made.target, **BOLD)
    assert not torch.equal(made.sample(), plain)
    lite.disable(made.target)
    assert torch.equal(made.sample(), plain)
    assert hooks_left(made.transformer) == []
    assert "liteattention" not in map(str, _AttentionBackendRegistry._backends)


@torch.no_grad()
def call_hunyuan(model, kept, seed=0, t=500.0):
    """One call with prompts of ``kept[b]`` tokens, padded to 24."""
    text = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(seed))[: len(kept)]
    return model(
        latent(4).expand(len(kept), -1, -1, -1, -1),
        torch.full((len(kept),), t),
        text,
        torch.arange(24) < torch.tensor(kept)[:, None],
        torch.zeros(len(kept), 8),
        guidance=torch.full((len(kept),), 6000.0),
        return_dict=False,
    )[0]


class Broken(ReferenceBackend):
    """No result is finite."""

    def forward(self, call, lists=None, criterion=None):
        result = super().forward(call, lists, criterion)
        return result._replace(out=result.out * torch.nan)


@pytest.mark.parametrize("cached", [False, True])
def test_a_result_that_is_not_finite_is_never_passed_on(monkeypatch, cached):
    """The transformer is called again; one with a cache, which would remember, never sees it."""
    monkeypatch.setattr(diffusers_session, "backend_for", lambda *_: Broken())
    model = make_hunyuan()
    plain = [call_hunyuan(model, (20,), t=t) for t in (900.0, 600.0, 300.0)]
    monkeypatch.setattr(type(model), "is_cache_enabled", cached)
    session = lite.enable(model, **BOLD)
    found = [call_hunyuan(model, (20,), t=t) for t in (900.0, 600.0, 300.0)]
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert {NOT_FINITE, NOT_FINITE_AGAIN} <= session.report().reasons.keys()
    assert session.report().stopped == NOT_FINITE_AGAIN


def test_nor_is_the_last_one_of_a_run(recorder):
    """The state of the run goes with it."""

    def broken(*args, **kwargs):
        result = ReferenceBackend.forward(recorder, *args, **kwargs)
        last = session._session._mine.trajectory.complete
        return result._replace(out=result.out * torch.nan) if last else result

    torch.manual_seed(0)
    made = hunyuan_video()
    session = lite.enable(made.target, **BOLD)
    recorder.forward = broken
    assert torch.isfinite(made.sample()).all()
    assert session.report().reasons.keys() == {NOT_FINITE}


def test_a_loop_of_ones_own_with_the_settings_as_they_ship(recorder):
    """Nothing says how many steps there will be."""
    forget_decisions()
    model = make_hunyuan()
    session = lite.enable(model, min_tokens=0)
    for t in (900.0, 700.0, 500.0, 300.0):
        assert torch.isfinite(call_hunyuan(model, (20, 9), t=t)).all()
    # Rows with padding of their own are timed, too.
    assert any(call.waits for call in session.report().calls)


def test_prompts_of_different_lengths_in_one_batch(recorder):
    """Each row of the batch keeps its own tokens, and gives what it gives alone."""
    model = make_hunyuan()
    plain = call_hunyuan(model, (20, 9))
    session = lite.enable(model, **NOTHING)
    torch.testing.assert_close(call_hunyuan(model, (20, 9)), plain, rtol=1e-4, atol=1e-4)
    report = session.report()
    assert report.reasons == {}
    rows = {(c.stream[-5:], c.tokens) for c in report.calls}
    assert rows == {("row 0", VIDEO + 20), ("row 1", VIDEO + 9)}
    lite.enable(model, **BOLD)
    both = [call_hunyuan(model, (20, 9), t=t) for t in (900.0, 500.0)]
    lite.enable(model, **BOLD)
    alone = [call_hunyuan(model, (20,), t=t) for t in (900.0, 500.0)]
    for pair, one in zip(both, alone, strict=True):
        torch.testing.assert_close(pair[:1], one, rtol=1e-4, atol=1e-4)


def test_prompts_of_one_length_share_a_call(recorder):
    model = make_hunyuan()
    session = lite.enable(model, **NOTHING)
    call_hunyuan(model, (9, 9))
    assert [c.stream[-3:] for c in session.report().calls] == [" x2", " x2"]


def test_vace_without_references_pins_nothing():
    family = FAMILIES["WanVACETransformer3DModel"]
    model = d.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=12)
    control = latent(12)
    assert family.given({"control_hidden_states": control}, model.config) == 0
    control[:, 4:8, 1:] = 0  # no picture to change in later frames, but a mask that says so
    assert family.given({"control_hidden_states": control}, model.config) == 0
    assert family.given({}, model.config) == 0


def test_a_mask_over_video_stays_dense(recorder):
    """SkyReels' blocks of frames see only those before them."""
    torch.manual_seed(0)
    model, (text, _) = make_skyreels(num_frame_per_block=2), texts(1, 6, 16)
    with torch.no_grad():
        plain = model(latent(4), torch.tensor([500.0]), text, return_dict=False)[0]
        session = lite.enable(model, **BOLD)
        out = model(latent(4), torch.tensor([500.0]), text, return_dict=False)[0]
    assert torch.equal(out, plain)
    assert session.report().reasons == {"an attention mask": 2}


def test_a_backend_that_is_set_for_all_models_is_used(recorder):
    """Cosmos dispatches to it past its processors, so that nothing comes to us."""
    torch.manual_seed(0)
    made = cosmos()
    plain = made.sample()
    name = AttentionBackendName._NATIVE_MATH
    seen = []

    def other(query, key, value, **options):
        seen.append(query.shape)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)

    before = _AttentionBackendRegistry._backends[name]
    session = lite.enable(made.target, **BOLD)
    _AttentionBackendRegistry._backends[name] = other
    try:
        with d.attention_backend("_native_math"):
            out = made.sample()
    finally:
        _AttentionBackendRegistry._backends[name] = before
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    assert seen and session.report().reasons == {ELSEWHERE: 6}


def test_what_is_declined_is_left_to_pytorch(recorder):
    """Bit for bit, with nothing of ours around it afterwards."""
    torch.manual_seed(0)
    made = cogvideox()
    plain = made.sample()
    session = lite.enable(made.target, threshold=-1.0)  # too few tokens
    assert torch.equal(made.sample(), plain)
    assert list(session.report().reasons) == ["short sequence (fewer than 2048 tokens)"]
    assert torch.overrides._get_current_function_mode_stack() == []


def test_steps_are_found_in_bfloat16():
    """Neighbours coincide, and are still one step after the other."""
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(50)
    told = scheduler.timesteps.bfloat16()
    assert len(set(told.tolist())) < 50
    trajectory, steps = None, []
    for t in told:
        levels = noise_levels(scheduler, float(t), t.dtype)
        now = Moment("cond", None, None, float(t), scheduler.timesteps, levels)
        if trajectory is None:
            trajectory = Trajectory(now)
        else:
            assert trajectory.continues("transformer", now)
        steps.append(trajectory.advance("transformer", now).progress.step)
    assert steps == list(range(50)) and trajectory.countdown() == range(50, -1, -1)


def test_noise_levels_in_the_form_that_a_model_is_told():
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas[1]
    for level in (scheduler.timesteps[1], sigma, sigma / (sigma + 1)):
        levels = noise_levels(scheduler, float(level), torch.float32)
        assert len(levels) == 4 and levels.index(float(level)) == 1
    assert noise_levels(scheduler, 123.0, torch.float32) == ()
    assert noise_levels(None, 1000.0, torch.float32) == ()


def padding_masks():
    """(mask for 2 rows of 6 tokens, what it is)."""
    keys = torch.arange(6) < torch.tensor([[4], [6]])
    pairs = keys[:, :, None] & keys[:, None]
    yield keys[:, None, None], Padding((4, 6), False)
    yield keys[:1, None, None], Padding((4, 4), False)
    yield pairs[:, None], Padding((4, 6), True)
    yield keys.flip(1)[:, None, None], None  # at the head
    yield pairs[:, None] & torch.ones(6, 6, dtype=torch.bool).tril(), None  # causal
    yield keys[:, None, None].float(), None
    yield keys[:, None, None] & False, None
    yield pairs[:, None, :3], None
    yield keys, None
    yield pairs[:, None].expand(2, 3, 6, 6), None


@pytest.mark.parametrize(("mask", "padding"), padding_masks())
def test_padding_masks(mask, padding):
    assert tail_padding(mask, 2, 6) == padding


@pytest.mark.parametrize("make", [hunyuan_video, cogvideox], ids=lambda make: make.__name__)
def test_compiled(make, recorder):
    """Both ways to our attention lie outside the compiled graph."""
    torch.manual_seed(0)
    made = make()
    session = lite.enable(made.target, **BOLD)
    eager = made.sample()
    made.transformer.compile(backend="eager")
    assert torch.equal(made.sample(), eager)
    assert session.report().active and session.report().reasons == {}


def test_a_sequence_too_short_for_its_video():
    family = FAMILIES["HunyuanVideoTransformer3DModel"]
    assert video_tokens(family, {}, GRID, VIDEO) == VideoTokens(GRID)
    assert video_tokens(family, {}, GRID, VIDEO - 1) == NOT_FOUND


@pytest.mark.parametrize("make", [hunyuan_video, cogvideox], ids=lambda make: make.__name__)
@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_on_the_same_modules(make, recorder, cache_first):
    """Pyramid Attention Broadcast leaves out calls. Each may come first, and go first."""
    torch.manual_seed(0)
    made = make()
    pipe, model = made.target, made.transformer
    plain = made.sample()

    def enable_cache():
        config = d.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        model.enable_cache(config)

    enable_cache()
    cached = made.sample()
    model.disable_cache()
    assert torch.equal(made.sample(), plain) and not torch.equal(cached, plain)

    if cache_first:
        enable_cache()
    session = lite.enable(pipe, **NOTHING)
    if not cache_first:
        enable_cache()
    torch.testing.assert_close(made.sample(), cached, rtol=1e-4, atol=1e-4)
    everything = made.layers * STEPS * len(made.streams)
    assert 0 < len(session.report().calls) < everything and session.report().reasons == {}
    if cache_first:
        model.disable_cache()
        torch.testing.assert_close(made.sample(), plain, rtol=1e-4, atol=1e-4)
        assert len(session.report().calls) == everything
        lite.disable(pipe)
    else:
        lite.disable(pipe)
        assert torch.equal(made.sample(), cached)
        model.disable_cache()
    assert torch.equal(made.sample(), plain)
    assert hooks_left(model) == []
