"""The small model of the demo: its data, its training, its files, and what its attention shows."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from demo.coherence import random_model, record_middle, summarise
from demo.convert import to_diffusers, to_original
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
    INDEX,
    PAD,
    SLOTS,
    WORDS,
    PromptError,
    caption,
    embed_prompts,
    load_table,
    make_table,
    parse_prompt,
)
from demo.tile_stats import negligible, persistence, tile_scores
from demo.train import Phase, TrainConfig, make_batch, make_optimisers, train_step
from demo.videos import COLOURS, DIRECTIONS, draw_scene, render


def scene_of(batch: int, seed: int = 0, pixels: int = 64):
    return draw_scene(batch, pixels, pixels, torch.Generator().manual_seed(seed))


def test_decode_is_the_exact_inverse_of_encode():
    video = torch.rand(2, 3, 3, 8, 12) * 2 - 1
    latent = encode(video)
    assert latent.shape == (2, 16, 3, 4, 6)
    assert torch.equal(decode(latent), video)
    # Position check, not only a round trip: red of pixel (row 1, column 0) of block (2, 3).
    assert torch.equal(latent[0, 2, 1, 2, 3], video[0, 0, 1, 5, 6])


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
    first, again = (render(scene_of(3), 4, 64, 64) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, render(scene_of(3, seed=1), 4, 64, 64))
    assert first.shape == (3, 3, 4, 64, 64)
    assert first.abs().max() <= 1


@pytest.mark.parametrize("word", DIRECTIONS)
def test_shapes_move_where_the_caption_says(word: str):
    scene = draw_scene(1, 64, 64, torch.Generator().manual_seed(3), two_shapes=0.0)
    scene.direction[:] = list(DIRECTIONS).index(word)
    scene.colour[:] = list(COLOURS).index("white")
    scene.centre[:] = 32.0
    scene.ground[:] = -1.0
    bright = render(scene, 3, 64, 64)[0].mean(0) + 1  # [F, H, W], 0 outside the shape
    axis = torch.arange(64).float()
    total = bright.sum((1, 2))
    x = (bright.sum(1) * axis).sum(-1) / total
    y = (bright.sum(2) * axis).sum(-1) / total
    moved = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    wanted = torch.tensor(DIRECTIONS[word]) * 2 * scene.speed[0, 0]
    assert torch.allclose(moved, wanted, atol=0.1)


def test_captions_read_back_as_prompts():
    for row in caption(scene_of(20)).tolist():
        words = [WORDS[index] for index in row if index != INDEX[PAD]]
        assert parse_prompt(" ".join(words)) == row


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


TINY = TrainConfig(phases=(Phase(3, 2, 2, 16, 0.5),), warmup=1)


def train_briefly() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build_model(TINY.seed)
    optimisers, table = make_optimisers(model, TINY), make_table()
    losses = [train_step(model, optimisers, TINY, step, table) for step in range(3)]
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
            mass = p[..., rows, columns].sum(-1).amax(-1)
            assert torch.allclose(scores.gap[..., i, j], gap, atol=1e-4)
            assert torch.allclose(scores.mass[..., i, j], mass, atol=1e-5)


def test_persistence_counts_what_stays():
    now = torch.tensor([True, True, False, True])
    later = torch.tensor([True, False, True, True])
    assert persistence(now, later) == pytest.approx(2 / 3)
    assert math.isnan(persistence(torch.zeros(4, dtype=torch.bool), later))
    with pytest.raises(ValueError, match="either"):
        negligible(tile_scores(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)))


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
