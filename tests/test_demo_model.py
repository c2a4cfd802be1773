"""The small model of the demo: its data, its training, its files, and what its attention shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from demo.coherence import random_model, record_middle, summarise
from demo.content import losses, maps_of_scene
from demo.convert import to_diffusers, to_original
from demo.detector import held_out_prompts, judge
from demo.latents import decode, encode
from demo.model import (
    LATENT_SHAPE,
    TEXT_TABLE,
    WEIGHTS,
    build_model,
    count_tokens,
    load_diffusers_model,
)
from demo.muon import orthogonalise
from demo.recorder import record_attention
from demo.sample import SampleConfig, sample
from demo.text import (
    EXAMPLE,
    GROUND_SLOT,
    INDEX,
    PAD,
    SLOTS,
    SLOTS_PER_CLAUSE,
    WORDS,
    PromptError,
    caption,
    embed_prompts,
    load_table,
    make_table,
    parse_prompt,
)
from demo.tile_stats import negligible, persistence, tile_scores
from demo.train import (
    FramePositions,
    Phase,
    TrainConfig,
    draw_frames,
    flow_loss,
    make_batch,
    make_optimisers,
    same_past,
    train_step,
)
from demo.videos import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    SHAPES,
    clip_times,
    draw_scene,
    held_out,
    render,
)


def scene_of(batch: int, seed: int = 0):
    return draw_scene(batch, torch.Generator().manual_seed(seed))


def prompt_of(row: list[int]) -> str:
    """Word indices of a caption -> a prompt that means the same."""
    words = [WORDS[index] for index in row]
    ground = words[GROUND_SLOT]
    named = " ".join(word for word in words[:GROUND_SLOT] if word != PAD)
    return named if ground == PAD else f"{named} over ground drifting {ground}"


def test_encode_reads_back_what_decode_drew():
    latent = torch.randn(2, 16, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    video = decode(latent)
    assert video.shape == (2, 3, 3, 8, 12)
    assert torch.allclose(encode(video), latent, atol=1e-4)
    # Where a block goes, not only a round trip: the luma of block (1, 2) of frame 1.
    latent[0, 0, 1, 1, 2] += 1
    changed = (decode(latent) - video).abs().amax((0, 1)) > 1e-6
    assert changed[1, 4:8, 8:12].all()
    assert changed.sum() == 16


def test_the_codec_keeps_edges_and_fills_its_channels():
    video = render(scene_of(8), clip_times(4))
    latent = encode(video)
    error = (decode(latent) - video).square().mean()
    assert -10 * torch.log10(error / 4) > 33  # dB
    deviation = latent.std((0, 2, 3, 4))
    assert latent.mean((0, 2, 3, 4)).abs().max() < 0.25
    assert 0.7 < deviation[0] < 1.3
    assert deviation.min() > 0.1


def test_conversion_is_a_renaming_in_both_directions():
    state = build_model(0).state_dict()
    original = to_original(state)
    assert len(original) == len(state)
    assert {"head.modulation", "head.head.weight", "patch_embedding.weight"} <= original.keys()
    assert original["text_embedding.0.weight"].shape == (256, 4096)
    assert "blocks.3.self_attn.norm_q.weight" in original
    back = to_diffusers(original)
    assert back.keys() == state.keys()
    assert all(back[key] is value for key, value in state.items())


def test_videos_depend_on_the_generator_alone():
    first, again = (render(scene_of(3), clip_times(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, render(scene_of(3, seed=1), clip_times(4)))
    assert first.shape == (3, 3, 4, 128, 128)
    assert first.abs().max() < 1.15


def test_training_never_draws_a_held_out_clause():
    scene = scene_of(4000)
    clauses = scene.colour, scene.shape, scene.direction
    assert not held_out(*clauses).any()
    assert len(torch.stack(clauses).flatten(1).unique(dim=1).T) == 256 - 32
    for prompt in held_out_prompts(40):
        words = [word for word in parse_prompt(prompt) if word != INDEX[PAD]]
        names = [WORDS[word] for word in words]
        kinds = [list(kind) for kind in (COLOURS, SHAPES, DIRECTIONS)]
        assert held_out(*(torch.tensor(k.index(n)) for k, n in zip(kinds, names, strict=False)))


@pytest.mark.parametrize("word", DIRECTIONS)
def test_shapes_move_where_the_caption_says(word: str):
    scene = draw_scene(1, torch.Generator().manual_seed(3), two_shapes=0.0)
    scene.direction[:] = list(DIRECTIONS).index(word)
    scene.colour[:] = list(COLOURS).index("white")
    scene.centre[:] = 64.0
    scene.skin[:] = 0.0
    scene.tints[:] = -1.0
    bright = render(scene, clip_times(3))[0].mean(0) + 1  # [F, H, W], 0 outside the shape
    axis = torch.arange(128).float()
    total = bright.sum((1, 2))
    x = (bright.sum(1) * axis).sum(-1) / total
    y = (bright.sum(2) * axis).sum(-1) / total
    moved = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    wanted = torch.tensor(DIRECTIONS[word]) * 2 * scene.speed[0, 0]
    assert torch.allclose(moved, wanted, atol=0.1)


def test_a_hidden_shape_comes_out_the_same():
    scene = draw_scene(1, torch.Generator().manual_seed(3), two_shapes=1.0)
    scene.centre[:] = 64.0  # they meet in the middle
    scene.direction[0] = torch.tensor([list(DIRECTIONS).index(d) for d in ("right", "left")])
    first = draw_scene(1, torch.Generator().manual_seed(3), two_shapes=0.0)
    first.centre[:], first.direction[:] = scene.centre, scene.direction
    alone, both = (render(s, torch.tensor([-9.0, 0.0, 9.0]))[0] for s in (first, scene))
    differs = (alone - both).abs().amax(0) > 1e-6  # where the second shape is
    columns = torch.arange(128).expand_as(differs)
    seen = [(int(columns[f][differs[f]].min()), int(columns[f][differs[f]].max())) for f in (0, 2)]
    assert seen[0][0] > 64 > seen[1][1]  # the second passes from right to left, over the first


def test_captions_read_back_as_prompts():
    for row in caption(scene_of(20)).tolist():
        assert parse_prompt(prompt_of(row)) == row


def test_the_detector_is_right_about_true_videos():
    scene = scene_of(24, seed=5)
    video = decode(encode(render(scene, clip_times(FRAMES))))
    grounds = 0
    for clip, row in zip(video, caption(scene).tolist(), strict=True):
        if row[0] != row[SLOTS_PER_CLAUSE]:  # two of a colour can't be told apart
            verdict = judge(clip, prompt_of(row))
            assert verdict.all_right
            assert verdict.ground is not False
            grounds += verdict.ground is not None
    assert grounds > 5


@pytest.mark.parametrize("place", range(3))
def test_the_detector_sees_a_wrong_word(place: int):
    scene = draw_scene(8, torch.Generator().manual_seed(2), two_shapes=0.0)
    video = decode(encode(render(scene, clip_times(FRAMES))))
    kinds = [list(kind) for kind in (COLOURS, SHAPES, DIRECTIONS)]
    for clip, row in zip(video, caption(scene).tolist(), strict=True):
        words = [WORDS[index] for index in row[:3]]
        kind = kinds[place]
        words[place] = kind[(kind.index(words[place]) + 1) % len(kind)]
        verdict = judge(clip, " ".join(words))
        found = (verdict.colours, verdict.shapes, verdict.directions)
        assert not found[place][0]


def test_fillers_do_not_change_a_prompt():
    assert parse_prompt("A red circle moving right, and the blue square moving UP.") == (
        parse_prompt("red circle right and blue square up")
    )


def test_empty_prompt_is_the_null_text():
    assert parse_prompt("  ") == [INDEX[PAD]] * SLOTS
    assert embed_prompts(["", EXAMPLE], make_table()).shape == (2, SLOTS, 4096)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("red hexagon moving up", "hexagon"),
        ("red circle", "direction"),
        ("red blue circle up", "one colour"),
        ("red circle up and", "and"),
        ("red circle up over ground", "over"),
        ("red circle up over blue ground left", "over"),
        (" and ".join(["red circle up"] * 3), "one or two"),
        ("pad", "pad"),
    ],
)
def test_prompt_errors_name_the_fault_and_the_vocabulary(prompt: str, named: str):
    with pytest.raises(PromptError, match=named) as error:
        parse_prompt(prompt)
    assert "magenta" in str(error.value)
    assert "down-left" in str(error.value)


def test_shipped_text_table_is_the_seeded_one():
    shipped, made = load_table(TEXT_TABLE), make_table()
    assert all(torch.equal(shipped[key], made[key]) for key in made)


def test_orthogonalise_flattens_the_singular_values():
    for shape in ((3, 16, 32), (3, 32, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.min() > 0.3
        assert values.max() < 1.3


TINY = TrainConfig(phases=(Phase(4, 4, 1, pixels=32),), warmup=1)


def train_briefly() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build_model(TINY.seed)
    model.rope = FramePositions(model.rope)
    optimisers, table = make_optimisers(model, TINY), make_table()
    losses = [train_step(model, optimisers, TINY, step, table) for step in range(4)]
    with torch.no_grad():
        losses.append(float(flow_loss(model, make_batch(TINY, 0, table))))
    return losses, model.state_dict()


def test_training_is_repeatable_and_learns():
    (losses, state), (again, state_again) = train_briefly(), train_briefly()
    assert losses == again
    assert all(torch.equal(value, state_again[key]) for key, value in state.items())
    assert losses[-1] < losses[0]


def test_a_batch_depends_on_its_step_alone():
    table = make_table()
    assert torch.equal(make_batch(TINY, 1, table).noise, make_batch(TINY, 1, table).noise)
    assert not torch.equal(make_batch(TINY, 0, table).noise, make_batch(TINY, 1, table).noise)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_frames_of_a_clip_are_evenly_spaced(count: int):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_frames(count, generator) for _ in range(200)])
    assert drawn.min() == 0
    assert drawn.max() == FRAMES - 1
    assert (drawn.diff(dim=1) == drawn.diff(dim=1)[:, :1]).all()
    assert (drawn.diff(dim=1) > 0).all()


def test_frames_keep_their_places_in_time():
    rope = build_model(0).rope
    clip = torch.zeros(1, 16, FRAMES, 4, 4)
    few = FramePositions(rope)
    few.frames = torch.tensor([3, 11])
    for table, whole in zip(few(clip[:, :, :2]), rope(clip), strict=True):
        assert torch.equal(table, whole.unflatten(1, (FRAMES, 4))[:, [3, 11]].flatten(1, 2))


def test_only_phases_to_come_may_change():
    begun, to_come = Phase(5, 1, 2), Phase(5, 1, 4, (1.0, 0.5))
    saved = json.dumps(asdict(TrainConfig(phases=(begun, to_come))))
    assert same_past(saved, TrainConfig(phases=(Phase(3, 1, 2), to_come)), 3)
    assert not same_past(saved, TrainConfig(phases=(Phase(3, 1, 2), to_come)), 4)
    assert not same_past(saved, TrainConfig(phases=(begun, Phase(4, 1, 4, (1.0, 0.5)))), 7)
    later = TrainConfig(phases=(begun, Phase(9, 1, 8), to_come))
    assert same_past(saved, later, 5)
    assert not same_past(saved, later, 6)
    assert not same_past(saved, TrainConfig(phases=(begun, to_come), seed=1), 5)


def test_phases_follow_each_other():
    config = TrainConfig()
    assert config.locate(0)[0] is config.phases[0]
    assert config.locate(config.total_steps - 1)[0] is config.phases[-1]
    assert count_tokens(LATENT_SHAPE) == 4096
    with pytest.raises(ValueError, match="beyond"):
        config.locate(config.total_steps)


def test_tile_scores_match_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(1, 2, n, 8, generator=generator) for n in (40, 56))
    scores = tile_scores(q, k, tile=16)  # ragged: 3 x 4 tiles
    s = q @ k.mT * 8**-0.5 * math.log2(math.e)
    p = torch.softmax(s * math.log(2), -1)
    for i in range(3):
        for j in range(4):
            rows, columns = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            gap = (s[..., rows, columns].amax(-1) - s[..., rows, :].amax(-1)).amax(-1)
            shares = p[..., rows, columns].sum(-1)
            assert torch.allclose(scores.gap[..., i, j], gap, atol=1e-4)
            assert torch.allclose(scores.mass[..., i, j], shares.amax(-1), atol=1e-5)
            assert torch.allclose(scores.mean[..., i, j], shares.mean(-1), atol=1e-5)


def test_persistence_counts_what_stays():
    now = torch.tensor([True, True, False, True])
    later = torch.tensor([True, False, True, True])
    assert persistence(now, later) == pytest.approx(2 / 3)
    assert math.isnan(persistence(torch.zeros(4, dtype=torch.bool), later))
    with pytest.raises(ValueError, match="either"):
        negligible(tile_scores(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)))


def test_losses_tell_content_from_places():
    def mass(*kept: int) -> torch.Tensor:  # [1 step, 1 layer, 1, 1 head, 2 x 2 tiles]
        tiles = torch.full((4,), 0.1)
        tiles[list(kept)] = 0.9
        return tiles.view(1, 1, 1, 1, 2, 2)

    alike = losses([mass(0, 3)] * 3)
    assert alike.own == pytest.approx(0.1)
    assert alike.ratio == pytest.approx(1.0)
    assert alike.table == pytest.approx(0.1)
    apart = losses([mass(0, 3), mass(1, 2)])
    assert apart.own == pytest.approx(0.1)
    assert apart.other == apart.table == pytest.approx(0.9)


def test_recorder_sees_what_attention_sees():
    from diffusers.models.transformers import transformer_wan

    model, seen, direct = random_model(), [], []
    plain = transformer_wan.dispatch_attention_fn

    def spy(query, key, value, **options):
        if query.shape == key.shape:
            direct.append((query.transpose(1, 2), key.transpose(1, 2)))
        return plain(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", spy)
        with record_attention(model, lambda layer, q, k: seen.append((q, k))):
            model(torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 8, 4096))
    assert len(seen) == len(direct) == 4
    for (q, k), (q0, k0) in zip(seen, direct, strict=True):
        assert torch.allclose(q, q0, atol=1e-5)
        assert torch.allclose(k, k0, atol=1e-5)


def test_sampling_is_repeatable_and_in_range():
    model, table = load_diffusers_model(), load_table(TEXT_TABLE)
    config = SampleConfig(prompt="red circle moving right", steps=6, shape=(16, 4, 16, 16))
    videos = [decode(sample(model, table, config)) for _ in range(2)]
    assert torch.equal(*videos)
    assert videos[0].isfinite().all()
    red, green, blue = videos[0][0].mean((1, 2, 3)).tolist()
    assert red > green
    assert red > blue


def test_a_held_out_prompt_comes_out_as_asked():
    model, table = load_diffusers_model(), load_table(TEXT_TABLE)
    prompt = next(p for p in held_out_prompts(40) if " and " in p and " over " in p)
    video = decode(sample(model, table, SampleConfig(prompt=prompt, steps=8)))
    verdict = judge(video[0], prompt)
    assert verdict.all_right
    assert verdict.ground


def test_content_decides_where_attention_goes():
    model, table = load_diffusers_model(), load_table(TEXT_TABLE)
    found = losses([maps_of_scene(model, table, seed) for seed in range(3)])
    assert found.other > 2 * found.own


def test_the_recorded_benchmark_says_so_of_40_prompts():
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "demo_model.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["scores"]["20"]["prompts"] >= 0.9
    assert all(lost["other"] >= 2 * lost["own"] for lost in found["content"].values())


@pytest.fixture(scope="module")
def middle_steps():
    """Scores of the two steps around the middle, at 4096 tokens, for the shipped weights."""
    return record_middle(load_diffusers_model(WEIGHTS), load_table(TEXT_TABLE), SampleConfig())


def test_shipped_attention_has_negligible_tiles_that_stay(middle_steps):
    found = summarise(middle_steps, {"gap": -5.0})
    assert found.middle >= 0.15
    assert found.persist_middle >= 0.90


def test_random_attention_has_none():
    steps = record_middle(random_model(), load_table(TEXT_TABLE), SampleConfig())
    assert summarise(steps, {"gap": -5.0}).middle < 0.01


def test_the_start_of_training_has_less_than_the_trained_model(middle_steps):
    config = TrainConfig()
    start = random_model(config.seed, config.gain, config.locality)
    steps = record_middle(start, load_table(TEXT_TABLE), SampleConfig())
    rule = {"gap": -5.0}
    assert summarise(steps, rule).middle < 0.15
    assert summarise(steps, rule).middle < summarise(middle_steps, rule).middle / 2
