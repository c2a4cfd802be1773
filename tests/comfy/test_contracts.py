"""How different versions of ComfyUI call an attention override, written down as doubles.

0.3.64 and 0.3.75 pass tensors; 0.33 holds them in single-owner containers and takes them out before
an override is called; 0.38 adds a per-layer ``preferred_attention`` that is popped before it. Each
double does what that version's ``wrap_attn`` does around a call, and no more.
"""

import contextvars
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention as attention

from comfyui_liteattention.integrations.comfy.layers import LayerCalls, Names
from comfyui_liteattention.integrations.comfy.streams import Stream

HEADS, SIZE = 2, 64
COND, UNCOND = (Stream(kind, kind, None, "cpu") for kind in ("positive", "negative"))


def no_layers():
    """Of a model whose modules are not on the stack."""
    return LayerCalls(Names(), torch.nn.Module())


class Container:
    """0.33: a tensor with one owner; ``take`` empties it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "already taken"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def call_plain(override, func, q, k, v, **kwargs):
    return override(func, q, k, v, heads=HEADS, _inside_attn_wrapper=True, **kwargs)


def call_positional(override, func, q, k, v, **kwargs):
    return override(func, q, k, v, HEADS, None, _inside_attn_wrapper=True, **kwargs)


def call_containers(override, func, q, k, v, **kwargs):
    containers = [Container(t) for t in (q, k, v)]
    if hasattr(override, "container_function"):
        return override.container_function(*containers, heads=HEADS, **kwargs)
    q, k, v = (container.take() for container in containers)
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


@pytest.fixture
def usual(comfy, monkeypatch):
    """ComfyUI's own attention where calls come in containers: as in 0.33 and newer."""
    import comfy.ldm.modules.attention as host

    got = []

    def unwrapped(q, k, v, heads, **kwargs):
        got.append(("tensors", q, kwargs))
        return "dense"

    def wrapper(q, k, v, heads, mask=None, **kwargs):
        got.append(("containers", q, kwargs))
        return "dense"

    wrapper.__wrapped__ = unwrapped
    monkeypatch.setattr(host, "AttentionTensorContainer", Container, raising=False)
    monkeypatch.setattr(host, "optimized_attention", wrapper)
    return got


def installed(**options):
    from comfyui_liteattention.integrations.comfy.hooks import OVERRIDE, install

    install(options)
    return options[OVERRIDE]


def test_what_is_declined_goes_on_in_its_containers(setup, usual):
    """So that whoever takes them owns them alone, and may free them as it goes."""
    q, k, v = torch.randn(3, 1, 199, HEADS * SIZE)
    containers = [Container(t) for t in (q, k, v)]
    out = installed().container_function(*containers, HEADS, None, _inside_attn_wrapper=True)
    assert out == "dense"
    [(kind, given, kwargs)] = usual
    assert kind == "containers"
    assert given is containers[0]
    assert given.peek() is q
    assert kwargs == {"_inside_attn_wrapper": True}


def test_what_is_ours_empties_the_containers(setup, usual):
    run, _ = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    containers = [Container(t) for t in (q, k, v)]
    out = installed().container_function(*containers, HEADS, transformer_options={})
    torch.testing.assert_close(out, expected(q, k, v).transpose(1, 2).flatten(2))
    assert all(container.tensor is None for container in containers)
    assert not usual
    assert len(run.finish().calls) == 1


def test_whoever_takes_the_containers_owns_them_alone(comfy, usual, monkeypatch):
    """What MiniMax H3 hands over can be freed at once: while its own attention is timed, while it
    is still faster, and where a call is declined."""
    import comfy.ldm.modules.attention as host

    from comfyui_liteattention import run as run_module
    from comfyui_liteattention.backends import backend_for
    from comfyui_liteattention.integrations.comfy.calls import Forward
    from comfyui_liteattention.integrations.comfy.families import Form
    from comfyui_liteattention.never_slower.costs import Costs
    from comfyui_liteattention.settings import Settings

    alive = []

    def frees(*containers_and_heads, **named):
        *containers, _ = containers_and_heads
        tensors = [container.take() for container in containers]
        shape = tensors[0].shape
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        del tensors
        alive.append([storage for storage in storages if not storage.expired()])
        return torch.zeros(shape[0], shape[2], shape[1] * shape[3])

    def ask(tokens):
        """As its layers do: views of one buffer, and values of their own."""
        q, k, v = torch.randn(1, tokens, 3, HEADS, SIZE).transpose(1, 3).unbind(2)
        containers = [Container(q), Container(k), Container(v.clone())]
        del q, k, v
        return installed().container_function(*containers, HEADS, mask=None, skip_reshape=True)

    monkeypatch.setattr(host, "optimized_attention", frees)
    begins_later = Costs(1.26, 0.0, 0.5, 0.2)
    monkeypatch.setattr(run_module, "decided", lambda *_: begins_later)
    cpu = backend_for(torch.device("cpu"))
    run = run_module.Run(Settings(min_tokens=0), cpu, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    form = Form(frozenset({200}), None)
    with Forward(run, run.locate(1.0), [COND], form, no_layers()).entered():
        for tokens in (200, 200, 200, 200, 200, 199):
            ask(tokens)
    assert alive == [[]] * 6
    counted = run.finish().reasons
    assert (counted[run_module.TIMED], counted[run_module.WAITING]) == (3, 2)
    assert len(counted) == 3


@pytest.mark.parametrize("contained", [True, False])
def test_the_override_before_ours_gets_what_it_understands(setup, usual, contained):
    got = []

    def before(func, q, k, v, heads, **kwargs):
        got.append(("tensors", func, q))
        return "dense"

    def containers_before(q, k, v, heads, **kwargs):
        got.append(("containers", None, q))
        return "dense"

    if contained:
        before.container_function = containers_before
    ours = installed(optimized_attention_override=before)
    containers = [Container(t) for t in torch.randn(3, 1, 199, HEADS * SIZE)]
    assert ours.container_function(*containers, heads=HEADS) == "dense"
    [(kind, func, q)] = got
    assert kind == ("containers" if contained else "tensors")
    assert contained or (func is not None and torch.is_tensor(q))


def test_unknown_arguments_are_declined_untouched(setup):
    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    got = []

    def func(*args, **kwargs):
        got.append((args, kwargs))
        return "dense"

    assert override(func, q, k, v, HEADS, None, is_causal=True) == "dense"
    assert override(func, q, k, v, HEADS, None, None, False, False, "what") == "dense"
    assert got[0][1] == {"is_causal": True}
    assert got[1][0][3:] == (HEADS, None, None, False, False, "what")
    assert [r for r in run.finish().reasons if "does not know" in r]


def test_mixed_dtypes_are_declined(setup):
    run, override = setup
    q, k, v = torch.randn(3, 1, 200, HEADS * SIZE)
    out = call_plain(override, lambda *a, **k: "dense", q, k.bfloat16(), v.bfloat16())
    assert out == "dense"
    assert not run.finish().calls


def test_a_layer_whose_dtype_changes_on_the_way(setup):
    run, override = setup
    tensors = torch.randn(3, 1, 200, HEADS * SIZE)
    for given in (tensors, tensors.bfloat16(), tensors):
        out = call_plain(override, never, *given, transformer_options={})
        assert out.dtype == given.dtype
        want = expected(*given).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    assert len(run.finish().calls) == 3


def test_the_attention_that_a_checkpoint_asks_for_is_kept(comfy):
    """Newer versions drop it where there is an override, as long as it is ours alone."""
    from comfyui_liteattention.backends import backend_for
    from comfyui_liteattention.integrations.comfy.calls import Forward
    from comfyui_liteattention.integrations.comfy.hooks import override
    from comfyui_liteattention.run import Run
    from comfyui_liteattention.settings import Settings

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.comfy_attention = torch.nn.Module()
            self.comfy_attention.function = lambda *args, **kwargs: "the checkpoint's"

        def forward(self, x):
            return override(None, never, x, x, x, HEADS)

    model = torch.nn.Module()
    model.layer = Layer()
    run = Run(Settings(), backend_for(torch.device("cpu")), [1.0, 0.0])
    layers = LayerCalls(Names(), model)
    with Forward(run, run.locate(1.0), [COND], "unsupported", layers).entered():
        assert model.layer(torch.randn(1, 200, HEADS * SIZE)) == "the checkpoint's"


def test_the_layout_of_minimax_h3(comfy):
    """As ComfyUI 0.33 passes it on, and as newer versions show it with each call."""
    from types import SimpleNamespace

    from comfyui_liteattention.integrations.comfy.families import (
        ModelCall,
        at_the_call,
        describe_call,
    )
    from comfyui_liteattention.integrations.comfy.families.minimax import NO_LAYOUT

    kinds = [("text", 12), ("cond", 24), ("cond_audio", 10), ("audio", 74), ("video", 168)]
    starts = [sum(n for _, n in kinds[:i]) for i in range(len(kinds))]
    segments = [(a, a + n, kind) for a, (kind, n) in zip(starts, kinds, strict=True)]
    layout = SimpleNamespace(segments=segments, seq_len=288, signature=(12, 7, 8, 12, 37))
    model = type("MiniMaxH3Model", (), {"__module__": "comfy.ldm.minimax.model"})()
    latent = (1, 24, 7, 8, 11)  # rounded up to whole tokens
    form = describe_call(model, ModelCall(latent, 12, {"minimax_payload": {"layout": layout}}))
    assert form.lengths == {288}
    assert (form.video.grid, form.video.start, form.video.stop) == ((7, 4, 6), 120, 288)
    assert at_the_call({"minimax_h3_layout": layout}) == form
    assert at_the_call({}) is None
    for conds, shape in (
        ({}, latent),
        ({"minimax_payload": {"layout": layout}}, (1, 24, 2, 8, 12)),
    ):
        assert describe_call(model, ModelCall(shape, 12, conds)) == NO_LAYOUT


@pytest.mark.parametrize(("name", "wrong"), [("model", "text"), ("control", "text")])
def test_text_instead_of_a_connection_is_a_clear_error(comfy, name, wrong):
    from types import SimpleNamespace

    from comfyui_liteattention.nodes.patch import LiteAttentionPatch

    class Node(LiteAttentionPatch):
        hidden = SimpleNamespace(unique_id=None)

    inputs = {"model": SimpleNamespace(clone=None), "preset": "balanced", name: wrong}
    with pytest.raises(ValueError, match=f"connect '{name}'"):
        Node.execute(**inputs)
