"""The PTX runs, instruction by instruction, on a machine that checks every access.

A sample of what ``python -m tests.ptx_machine`` runs: every entry point and every section with the
shipped PTX, and attention as compiled for the other cards.
"""

from itertools import islice

import numpy as np
import pytest
import torch

from comfyui_liteattention.backends.gpu.kernel_table import KERNELS, Variant
from tests.ptx_machine import builds
from tests.ptx_machine.__main__ import SECTIONS
from tests.ptx_machine.card import SHIPPED, Card, MachinePrebuilt
from tests.ptx_machine.cases import Case, outcomes
from tests.ptx_machine.faults import exercise, must_be_noticed, noticed
from tests.ptx_machine.numbers import from_e4m3, to_e4m3

#: Every so many-th case of a section.
STEPS = {
    **{"attention": 17, "audits": 5, "shapes": 19, "many_heads": 5, "bases": 11},
    **{"quantised": 23, "scaled": 29, "tail": 13, "tile_maps": 11, "choices": 13, "selftests": 13},
    **{"refused": 5, "unaligned": 8, "padding": 17, "not_numbers": 31, "far": 13},
}
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
#: As compiled for cards whose code isn't shipped as PTX.
OTHERS = [(80, "d64_bf16_lists_mass"), (89, "d64_bf16_int8_e4m3_lists_mass")]
OTHERS += [(120, "d64_bf16_int8_fp16_dense_mass"), (90, "d64_bf16_int8_lists_mass")]
#: What has to run before them.
BEFORE = {89: ("peak_values", "scale_values_e4m3"), 120: ("peak_values", "scale_values_fp16")}
FAULTY = "d64_fp16_dense_plain"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped():
    return Card(SHIPPED)


def failures(card, cases):
    with card.there():
        return {name: problems for name, problems in outcomes(card, cases) if problems}


@pytest.mark.parametrize("section", SECTIONS)
def test_shipped_ptx(shipped, section):
    assert not failures(shipped, islice(SECTIONS[section](shipped), 0, None, STEPS[section]))


def test_every_entry_point_has_run(shipped):
    """After the sections above, with the same card."""
    ran = {BY_NAME[name].entry.name for name in shipped.library.ran}
    assert ran == {kernel.entry.name for kernel in KERNELS}


@pytest.fixture(scope="module")
def compiled():
    """All at once, since each takes some seconds."""
    companions = [
        (arch, f"d64_bf16_{what}")
        for arch in (89, 90, 120)
        for what in ("quantise_queries", "quantise_keys", *BEFORE.get(arch, ()))
    ]
    builds.prepare((arch, BY_NAME[name]) for arch, name in [*OTHERS, *companions])


@pytest.mark.parametrize(("arch", "name"), OTHERS)
def test_other_cards(compiled, arch, name):
    assert isinstance(BY_NAME[name], Variant)
    card = Card(arch)
    assert not failures(card, [Case(name, lambda: exercise(card, name))])
    assert name in card.library.ran


def test_planted_faults_are_noticed():
    text = MachinePrebuilt().read("ptx", BY_NAME[FAULTY]).image.decode()
    assert not noticed(FAULTY, lambda t: t + "\n").problems
    faults = must_be_noticed(text)
    missed = [what for what, edit in faults.items() if not noticed(FAULTY, edit).problems]
    assert not missed


def test_e4m3_is_torchs():
    """Every code, and numbers between all of them, ties among them."""
    code = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(code).view(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(from_e4m3(code), want.numpy())
    edges = np.unique(want.numpy()[np.isfinite(want.numpy())])
    between = np.concatenate([edges + (np.roll(edges, -1) - edges) * x for x in (0.25, 0.5, 0.75)])
    x = np.concatenate((edges, between[np.abs(between) < 448], [1e-9, -1e-9])).astype(np.float32)
    rounded = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(to_e4m3(x), rounded.numpy())
    np.testing.assert_array_equal(to_e4m3(np.float32([1e9, -np.inf, np.nan])), [0x7E, 0xFE, 0x7F])
