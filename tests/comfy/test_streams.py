"""Who shares tiles with whom: passes of guidance, windows, packs that change one thing only."""

from functools import partial
from types import SimpleNamespace

import torch

from comfyui_liteattention.integrations.comfy.streams import Streams, names_of

CPU = torch.device("cpu")


def options(**others):
    now = dict(sigmas=torch.tensor([1.0]), cond_or_uncond=[0], uuids=["a"])
    return now | others


def evaluate(streams, *passes):
    """What one evaluation asks, pass by pass."""
    streams.evaluation()
    return [streams.of_call(options(**one), CPU)[0] for one in passes]


#: Core's and Lightricks' guiders, and one whose switch nobody outside can see.
GUIDED = [
    {},
    dict(stg_self_attn_blocks=frozenset({2, 5})),
    dict(a2v_cross_attn=False, v2a_cross_attn=False),
    dict(ptb_index=0, stg_indexes=[0, 2]),
    dict(run_vx=True, run_ax=False),
    dict(patches_replace=dict(dit={("double_block", 3): print})),
    {},
]


def test_every_pass_has_a_stream_of_its_own_in_every_step():
    streams = Streams()
    first = evaluate(streams, *GUIDED)
    assert len(set(first)) == len(GUIDED)
    assert evaluate(streams, *GUIDED) == first


def test_a_pass_that_is_left_out_shifts_no_other():
    streams = Streams()
    first = evaluate(streams, *GUIDED)
    kept = [0, 2, 4, 5]
    assert evaluate(streams, *(GUIDED[i] for i in kept)) == [first[i] for i in kept]


def test_samplers_that_ask_twice_at_one_sigma_ask_the_same_stream():
    streams = Streams()
    assert evaluate(streams, {}) == evaluate(streams, {})


def test_without_word_from_the_sampler_a_new_sigma_begins_an_evaluation():
    streams = Streams()
    first = [streams.of_call(options(sigmas=torch.tensor([s])), CPU)[0] for s in (1.0, 0.5)]
    assert first[0] == first[1]
    assert streams.of_call(options(sigmas=torch.tensor([0.5])), CPU)[0] != first[1]


def test_what_changes_from_step_to_step_is_no_other_stream():
    """Counters, floats, tensors, and functions that a pack makes anew for each step."""
    streams = Streams()

    def step(i):
        def patch(args):
            return args

        changing = dict(step=i, percent=i / 3, cache=torch.ones(1), held=SimpleNamespace(at=i))
        changing |= dict(patches=dict(attn1_patch=[patch, partial(patch, i)]))
        return evaluate(streams, changing | dict(block_index=i, grid_sizes=(i, 4, 8)))

    assert step(0) == step(1) == step(2)


def test_one_conditioning_twice_in_a_batch_is_two_streams():
    streams = Streams()
    streams.evaluation()
    both = streams.of_call(options(cond_or_uncond=[0, 0], uuids=["a", "a"]), CPU)
    assert len(set(both)) == 2


def test_parts_without_uuids_are_told_apart():
    """A pack that changes ``cond_or_uncond`` and leaves ``uuids`` as they were."""
    found = Streams().of_call(options(cond_or_uncond=[1, 0, 0]), CPU)
    assert len(set(found)) == 3


def test_names_of_streams():
    streams = Streams()
    plain, guided = evaluate(streams, {}, dict(ptb_index=0))
    assert str(plain) == "positive"
    assert str(guided) == "positive, guidance pass 1"
    assert str(plain._replace(part=3)) == "positive, part 4"
    window = SimpleNamespace(index_list=[4, 5, 6], dim=2)
    [windowed] = streams.of_call(options(context_window=window), CPU)
    assert str(windowed) == "positive 4-6"


def test_streams_are_called_what_the_guider_calls_them():
    """Some ask for each conditioning by itself, or for the negative one first."""
    conds = {"positive": [{"uuid": "p"}, {"uuid": "q"}], "negative": [{"uuid": "n"}]}
    streams = Streams(names_of(conds | {"middle": None}))
    passes = [dict(cond_or_uncond=[0], uuids=[uuid]) for uuid in "pqn"]
    assert [str(one) for one in evaluate(streams, *passes)] == ["positive", "positive", "negative"]
    both = dict(cond_or_uncond=[0, 1, 2], uuids=["n", "p", "?"])
    streams.evaluation()
    named = [str(one) for one in streams.of_call(options(**both), CPU)]
    assert named == ["negative", "positive", "conditioning 2"]
    assert names_of(None) == {}
