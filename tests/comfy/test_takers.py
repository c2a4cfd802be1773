"""Why a run ended without one call of ours; what is asked before us."""

from functools import partial
from types import SimpleNamespace

import pytest

CROSS = {"cross-attention (queries and keys have different lengths)": 9}


@pytest.fixture
def takers(comfy):
    from comfyui_liteattention.integrations.comfy import takers

    return takers


def function(module, qualname="patch"):
    def made(*args, **kwargs):
        raise AssertionError

    made.__module__, made.__qualname__ = module, qualname
    return made


KJ = function("/home/x/ComfyUI/custom_nodes/ComfyUI-KJNodes.nodes.minimax_nodes")
SPARSE = function("comfy_extras.nodes_sparse_attention", "SparseAttnPatch.install_override")


def patcher(**patches):
    return SimpleNamespace(
        object_patches={name.replace("__", "."): p for name, p in patches.items()}
    )


def test_a_forward_that_was_replaced(takers):
    model = patcher(diffusion_model__blocks__0__attn__forward=KJ)
    cause = takers.taker(model, {}, None)
    assert cause == "ComfyUI-KJNodes has put its own attention into this model"
    assert takers.explained(CROSS, cause) == {cause: 1} | CROSS


def test_cores_sparse_node(takers):
    replaced = dict(patches_replace=dict(dit={("double_block", 0): partial(SPARSE, 1)}))
    cause = takers.taker(patcher(), replaced, None)
    assert cause == "ComfyUI's Model Sparse Attention has taken the attention of this model"


def test_an_override_around_ours(takers):
    from comfyui_liteattention.integrations.comfy.hooks import OVERRIDE, install

    options = {}
    install(options)
    assert takers.asked_first(options) is None
    options[OVERRIDE] = function("custom_nodes.some_pack.nodes")
    first = takers.asked_first(options)
    assert first == "some_pack"
    assert "some_pack has taken" in takers.taker(patcher(), options, first)


def test_a_compiled_graph_of_a_run_before(takers):
    wrapped = dict(wrappers=dict(apply_model={"torch.compile": [print], "liteattention": [print]}))
    assert takers.taker(patcher(), wrapped, None) == takers.COMPILED


def test_without_a_trace_nothing_is_guessed(takers):
    assert takers.taker(patcher(model_sampling=KJ), {}, None) is None
    assert takers.explained(CROSS, None) == {takers.NEVER_ASKED: 1} | CROSS


def test_where_the_video_was_declined_the_reason_stands(takers):
    short = {"short sequence (fewer than 2048 tokens)": 3}
    assert takers.explained(short, "somebody") == short
