"""How different versions of ComfyUI call an attention override, written down as doubles.

0.3.64 and 0.3.75 pass tensors; 0.33 holds them in single-owner containers and takes them out before
an override is called; 0.38 adds a per-layer ``preferred_attention`` that is popped before it. Each
double does what that version's ``wrap_attn`` does around a call, and no more.
"""

import contextvars
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from comfyui_liteattention.integrations.comfy.layers import LayerCalls, Names
from comfyui_liteattention.integrations.comfy.streams import Stream

HEADS, SIZE = 2, 64
COND, UNCOND = (Stream(kind, kind, None, "cpu") for kind in (0, 1))


def no_layers():
    """Of a model whose modules are not on the stack."""
    return LayerCalls(Names(), torch.nn.Module())


class Container:
    """0.33: a tensor with one owner; ``take`` empties it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def call_plain(override, func, q, k, v, **kwargs):
    return override(func, q, k, v, heads=HEADS, _inside_attn_wrapper=True, **kwargs)


def call_positional(override, func, q, k, v, **kwargs):
    return override(func, q, k, v, HEADS, None, _inside_attn_wrapper=True, **kwargs)


def call_containers(override, func, q, k, v, **kwargs):
    assert not hasattr(override, "container_function"), "it would be called without func"
    q, k, v = (Container(t).take() for t in (q, k, v))
    return call_plain(override, func, q, k, v, low_precision_attention=True, **kwargs)


def call_preferred(override, func, q, k, v, preferred_attention=None, **kwargs):
    return call_containers(override, func, q, k, v, enable_gqa=False, **kwargs)


VERSIONS = [call_plain, call_positional, call_containers, call_preferred]


@pytest.fixture
def setup(comfy):
    from comfyui_liteattention.backends import backend_for
    from comfyui_liteattention.integrations.comfy.calls import Forward
    from comfyui_liteattention.integrations.comfy.families import Form
    from comfyui_liteattention.integrations.comfy.hooks import override
    from comfyui_liteattention.run import Run
    from comfyui_liteattention.settings import Settings

    form = Form(frozenset({200}), None)
    run = Run(
        Settings(min_tokens=0, never_slower=False),
        backend_for(torch.device("cpu")),
        [1.0, 0.5, 0.0],
    )

    with Forward(run, run.locate(1.0), [COND], form, no_layers()).entered():
        yield run, partial(override, None)


def never(*args, **kwargs):
    raise AssertionError("this call should not have been declined")


def expected(q, k, v):
    split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    return attention(*split)


@pytest.mark.parametrize("call", VERSIONS)
def test_every_version_is_understood(setup, call):
    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    out = call(override, never, q, k, v, transformer_options={})
    torch.testing.assert_close(out, expected(q, k, v).transpose(1, 2).flatten(2))
    assert len(run.finish().calls) == 1


@pytest.mark.parametrize("call", VERSIONS)
@pytest.mark.parametrize("skip_output", [False, True])
def test_heads_may_be_split_already(setup, call, skip_output):
    _, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    flags = {"skip_reshape": True, "skip_output_reshape": skip_output}
    out = call(override, never, *split, transformer_options={}, **flags)
    want = expected(q, k, v)
    torch.testing.assert_close(out, want if skip_output else want.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"low_precision_attention": False}, "exact attention"),
        ({"enable_gqa": True}, "uneven heads"),
        ({"mask": torch.ones(200, 200)}, "a mask"),
    ],
)
def test_what_a_model_forbids_is_declined_untouched(setup, flags, reason):
    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    got = {}

    def func(*args, **kwargs):
        got.update(kwargs)
        return "dense"

    assert call_plain(override, func, q, k, v, transformer_options={}, **flags) == "dense"
    assert all(got[name] is value for name, value in flags.items())
    assert any(reason in r for r in run.finish().reasons)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_text_padding_is_left_out(comfy, split, rows):
    """Both conditionings hide the same text, or each its own; the answer is the masked one."""
    from comfyui_liteattention.backends import backend_for
    from comfyui_liteattention.integrations.comfy.calls import Forward
    from comfyui_liteattention.integrations.comfy.families import Form
    from comfyui_liteattention.integrations.comfy.hooks import override
    from comfyui_liteattention.run import Run
    from comfyui_liteattention.settings import Settings
    from comfyui_liteattention.token_order import VideoTokens

    settings = Settings(min_tokens=0, never_slower=False)
    run = Run(settings, backend_for(torch.device("cpu")), [1.0, 0.5, 0.0])
    form = Form(frozenset({200}), VideoTokens((4, 5, 8), 40))  # 40 tokens of text before it
    forward = Forward(run, run.locate(1.0), [COND, UNCOND], form, no_layers())
    mask = torch.zeros(rows, 1, 200)
    mask[0, :, 30:40] = mask[-1, :, 5:40] = torch.finfo(mask.dtype).min
    heads = torch.randn(3, 2, HEADS, 200, SIZE)
    want = attention(*heads, attn_mask=mask.unsqueeze(1))
    joined = heads.transpose(2, 3).flatten(3)
    asked = []

    def user(q, k, v, heads, mask=None, **kwargs):
        """For the rows that are hidden."""
        assert mask is None and kwargs["skip_reshape"] and kwargs["skip_output_reshape"]
        asked.append(q.shape[2])
        return attention(q, k, v)

    given = {"skip_reshape": split, "skip_output_reshape": split, "mask": mask}
    with forward.entered():
        q, k, v = heads if split else joined
        out = call_plain(partial(override, None), user, q, k, v, transformer_options={}, **given)
    torch.testing.assert_close(out, want if split else want.transpose(1, 2).flatten(2))
    assert asked == ([35] if rows == 1 else [10, 35])
    assert {(call.stream, call.tokens) for call in run.finish().calls} == {
        ("positive", 200 - asked[0]),
        ("negative", 200 - asked[-1]),
    }


def test_the_models_own_layer_index_is_used(setup):
    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    forward = {"block_index": 7, "block_type": "double"}
    for _ in range(2):  # a block with two self-attentions
        call_plain(override, never, q, k, v, transformer_options=forward)
    assert [c.layer for c in run.finish().calls] == ["double-7.0", "double-7.1"]


def test_a_call_of_another_length_is_declined(setup):
    run, override = setup
    q, k, v = torch.randn(3, 1, 199, HEADS * SIZE)
    assert call_plain(override, lambda *a, **k: "dense", q, k, v, transformer_options={}) == (
        "dense"
    )
    assert list(run.finish().reasons) == [
        "not the model's video attention (199 tokens; that has 200)"
    ]


def test_a_call_from_outside_a_model_call_goes_through(setup):
    from comfyui_liteattention.integrations.comfy.calls import current

    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    outside = contextvars.Context()
    assert outside.run(current.get) is None
    args = (call_plain, override, lambda *a, **k: "dense", q, k, v)
    assert outside.run(*args) == "dense"
    assert outside.run(lambda: call_plain(*args[1:], transformer_options={})) == "dense"
    assert not run.finish().calls
