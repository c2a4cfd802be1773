"""ComfyUI's compiler (0.35 and newer) records what a block allocates: nothing of ours is in that.

A stand-in for it, which needs no card: it notes every storage that is made while a block runs, but
in a pause of the recording.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from packaging.version import parse
from tiny_comfy import CASES, find, make_patcher, sample, version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comfyui_liteattention.never_slower.rehearsal import forget_decisions
from comfyui_liteattention.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread", "comfy")

#: Some of the models whose blocks are recorded, and where their blocks are.
BLOCKS = {"Wan T2V": "blocks", "LTX-2": "transformer_blocks", "MiniMax H3": "blocks"}
NAMES = [name for name in BLOCKS if name in {case.name for case in CASES}]


class Compiler(TorchDispatchMode):
    """``blocks``: the sizes of what each block that ran has allocated, in order; ``kept``: how many
    of them were still there when it had returned something else."""

    def __init__(self):
        super().__init__()
        self.blocks = []
        self.kept = 0
        self.pauses = 0
        self._noted = None
        self._paused = False

    def watch(self, block):
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end)

    @contextmanager
    def pause(self, sync=False):
        assert not self._paused, "a pause inside a pause ends both"
        self._paused, self.pauses = True, self.pauses + 1
        before = self._alive()
        try:
            yield
        finally:
            assert self._alive() == before, "what is freed in a pause counts as kept"
            self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_number(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if self._noted is not None and not self._paused:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and _number(tensor) not in given:
                    storage = tensor.untyped_storage()
                    self._noted.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def _begin(self, block, args):
        self._noted = []

    def _end(self, block, args, out):
        noted, self._noted = self._noted, None
        returned = {_number(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.blocks.append([size for _, size in noted])
        self.kept += sum(not ref.expired() and ref.cdata not in returned for ref, _ in noted)

    def _alive(self):
        return sum(not ref.expired() for ref, _ in self._noted or ())


def _number(tensor):
    return tensor.untyped_storage()._cdata


def recorded(monkeypatch, name, settings=None, active=True):
    """A run of a model, as the compiler sees it."""
    from comfyui_liteattention.integrations.comfy import compiler as ours
    from comfyui_liteattention.integrations.comfy.session import apply_patch, patch_of

    case, compiler = find(name), Compiler()
    if version() < parse(case.since):
        pytest.skip(f"{name} needs ComfyUI {case.since}, this is {version()}")
    monkeypatch.setattr(ours, "model_prefetch", SimpleNamespace(pause_malloc_graph=compiler.pause))
    model = make_patcher(case)
    for block in getattr(model.model.diffusion_model, BLOCKS[name]):
        compiler.watch(block)
    if settings is not None:
        model = apply_patch(model, settings)
    latent = None
    if "latent_shapes" in case.conds:  # picture and sound
        from comfy.nested_tensor import NestedTensor

        latent = NestedTensor([torch.zeros(shape) for shape in case.conds["latent_shapes"]])
    with compiler:
        sample(model, case, steps=4, cfg=1.0, latent=latent)
    if settings is not None and active:
        assert any(one.live.min() < 1 for one in patch_of(model).last_report.maps)
    return compiler


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_ours_outlives_a_block_or_changes_from_step_to_step(monkeypatch, name):
    bold = Settings(budget=0.3, min_tokens=64, audit=4, never_slower=False)
    plain, patched = recorded(monkeypatch, name), recorded(monkeypatch, name, bold)
    assert plain.kept == 0
    assert patched.kept == 0
    assert patched.pauses > 0
    assert len(patched.blocks) == len(plain.blocks)
    # A model may do that on its own; we add nothing to it.
    assert changes(patched.blocks, 4) <= changes(plain.blocks, 4)


def changes(blocks, steps):
    """Allocations that have another size, or place in the order, than at the first step."""
    layers = len(blocks) // steps
    pairs = zip(blocks[layers:], blocks[:layers] * (steps - 1), strict=True)
    return sum(
        abs(len(now) - len(first)) + sum(a != b for a, b in zip(now, first, strict=False))
        for now, first in pairs
    )


@pytest.mark.parametrize("name", NAMES)
def test_nor_while_it_is_decided_who_is_faster(monkeypatch, name):
    forget_decisions()
    settings = Settings(threshold=-0.1, min_tokens=64, audit=4)
    assert recorded(monkeypatch, name, settings, active=False).kept == 0
