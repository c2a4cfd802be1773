"""ComfyUI's own *Model Sparse Attention* before or after our node: no call is of both, what it
leaves may be ours, and the report says so."""

import nodes_sparse_attention as sparse
import pytest
import tiny_comfy
import torch
from packaging.version import parse

from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread", "comfy")

EAGER = Settings(threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False)
NAME = "ComfyUI's Model Sparse Attention"
STEPS = 5
ALL = {"start_percent": 0.0, "min_tokens": 0}


@pytest.fixture(scope="module", params=["Wan T2V", "MiniMax H3"])
def setup(request, comfy):
    """``(case, MODEL)``"""
    case = tiny_comfy.find(request.param)
    if tiny_comfy.version() < parse(case.since):
        pytest.skip(f"{case.name} needs ComfyUI {case.since}")
    return case, tiny_comfy.make_patcher(case)


def generate(case, model):
    latent = None
    if "latent_shapes" in case.conds:
        from comfy.nested_tensor import NestedTensor

        latent = NestedTensor([torch.zeros(shape) for shape in case.conds["latent_shapes"]])
    out = tiny_comfy.sample(model, case, frames=4, steps=STEPS, latent=latent)
    return out.unbind()[0] if latent is not None else out


def both(model, order, **options):
    """``(MODEL, the sparse node's patch)``, our node before or after it."""
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    if order == "ours first":
        return sparse.apply_block_sparse_attention(apply_patch(model, EAGER), **options)
    model, patch = sparse.apply_block_sparse_attention(model, **options)
    return apply_patch(model, EAGER), patch


def report_of(model):
    from comfyui_liteattention.integrations.comfy.session import patch_of

    return patch_of(model).last_report


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_what_it_takes_it_takes(setup, order):
    case, plain = setup
    alone, _ = sparse.apply_block_sparse_attention(plain, **ALL)
    model, patch = both(plain, order, **ALL)
    assert torch.equal(generate(case, alone), generate(case, model))
    assert patch.taken == STEPS * case.layers * 2
    report = report_of(model)
    assert not report.calls
    assert f"{NAME} has taken the attention of this model" in report.reasons


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_what_it_leaves_is_ours_as_if_it_were_not_there(setup, order):
    from comfyui_liteattention.integrations.comfy.session import apply_patch

    case, plain = setup
    alone = apply_patch(plain, EAGER)
    model, patch = both(plain, order)  # too short for it
    assert torch.equal(generate(case, alone), generate(case, model))
    assert not patch.taken
    assert [c.computed for c in report_of(model).calls] == [
        c.computed for c in report_of(alone).calls
    ]
    assert f"{NAME} is asked first: LiteAttention gets what it leaves" in report_of(model).notes


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_each_call_is_one_of_the_two(setup, order):
    """The first steps and a block are left to us, as its settings have it."""
    case, plain = setup
    model, patch = both(plain, order, start_percent=0.5, min_tokens=0)
    out = generate(case, model)
    report = report_of(model)
    ours = [call.step for call in report.calls]
    assert len(ours) + patch.taken == STEPS * case.layers * 2
    first = 1 + max(ours)
    assert 0 < first < STEPS
    assert len(ours) == first * case.layers * 2  # these steps whole, and nothing of the others
    assert out.isfinite().all()
    assert any(NAME in note for note in report.notes)


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_blocks_that_it_leaves_skip(setup, order):
    case, plain = setup
    if tiny_comfy.version() < tiny_comfy.NEWER:
        pytest.skip("the blocks of this ComfyUI do not tell their numbers")
    model, patch = both(plain, order, **ALL, dense_blocks=[0, 1])
    generate(case, model)
    report = report_of(model)
    assert report.active
    assert {call.layer for call in report.calls} == {"0", "1"}
    assert len(report.calls) == STEPS * 2 * 2
    assert patch.taken == STEPS * (case.layers - 2) * 2
