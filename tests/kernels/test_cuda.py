"""The loader of prebuilt kernels, without a GPU: what it would ask the driver to do."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_driver import FakeLibrary

from comfyui_liteattention.backends.base import Inputs, Skipped
from comfyui_liteattention.backends.gpu import driver, launches, prebuilt
from comfyui_liteattention.backends.gpu.archive import FORMAT, Prebuilt, PrebuiltError, parameters
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.driver import ArgumentBlock, Driver, DriverError
from comfyui_liteattention.backends.gpu.kernel_table import (
    ATTEND,
    KERNELS,
    TILE,
    VARIANTS,
    Method,
)
from comfyui_liteattention.backends.gpu.tile_map import TileMapKernels
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.tiles import make_lists, pack

CARD = torch.device("cuda", 0)


@pytest.fixture
def folder(tmp_path):
    """A folder of kernels that contain nothing but their own names."""
    archives = {}
    for archive, arch in (("sm_86", 86), ("ptx", 86)):
        suffix = ".ptx" if archive == "ptx" else ".cubin"
        kernels = {}
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w") as members:
            for kernel in KERNELS:
                image = f"{archive} {kernel.name}".encode()
                members.writestr(kernel.name + suffix, image)
                kernels[kernel.name] = {
                    "warps": 8,
                    "shared": 65536,
                    "sha256": hashlib.sha256(image).hexdigest(),
                }
        archives[archive] = {"arch": arch, "driver": 525, "kernels": kernels}
    manifest = {"format": FORMAT, "tile": [TILE.q, TILE.k], "parameters": parameters()}
    manifest["archives"] = archives
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def library(monkeypatch):
    """One card of compute capability 8.6, on whose stream 77 torch works."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = type("Stream", (), {"cuda_stream": 77})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return FakeLibrary()


def draw(b=1, h=2, lq=200, lk=330, d=64, dtype=torch.float16):
    return tuple(torch.randn(b, length, h, d).to(dtype).transpose(1, 2) for length in (lq, lk, lk))


def some_lists(q, k):
    mask = torch.ones(*q.shape[:2], *TILE.grid(q.shape[2], k.shape[2]), dtype=torch.bool)
    return make_lists(mask)


# ---- arguments ----------------------------------------------------------------------------------


def test_a_launch_reads_the_arguments_in_place(folder, library):
    q, k, v = draw()
    lists, order = some_lists(q, k), torch.randperm(200)
    call = launches.prepare(Inputs(q, k, v, 0.125, order), lists, "mass")
    prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)).launch(*call.launches, CARD)
    (launch,) = library.launches
    result = call.result
    want = {name: x.data_ptr() for name, x in zip("qkv", (q, k, v), strict=True)}
    want |= {"out": result.out.data_ptr(), "lse": result.lse.data_ptr()}
    want |= {"score": result.score.data_ptr()}
    want |= {"count": lists.count.data_ptr(), "index": lists.index.data_ptr()}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", result.out)):
        want |= dict(
            zip((f"{name}_batch", f"{name}_head", f"{name}_row"), tensor.stride(), strict=False)
        )
    want |= {"heads": 2, "lq": 200, "lk": 330, "tk": 6}
    want |= {"order": order.data_ptr(), "ordered": 200}
    want |= dict.fromkeys(("q_unit", "k_unit", "shift", "v_unit", "every"), 0)
    want |= dict.fromkeys(("first_audited", "audited", "queries"), 0)
    want |= {"full_out": call.full.out.data_ptr(), "full_lse": call.full.lse.data_ptr()}
    got = launch["arguments"]
    assert got.pop("scale_log2") == pytest.approx(0.125 * math.log2(math.e))
    assert got == want
    assert launch["trailing"] == [0, 0]
    assert launch["grid"] == (2, 2, 1) and launch["block"] == (256, 1, 1)
    assert (launch["shared"], launch["stream"], launch["context"]) == (65536, 77, 1000)
    assert library.attributes == [(8, 65536), (9, 100)] and library.contexts == []
    assert (
        library.images == [b"sm_86 d64_fp16_lists_mass"] and library.entry == ATTEND.name.encode()
    )


def test_a_launch_costs_the_host_less_than_25_microseconds(folder, library):
    """The best of many, beside a driver of Python functions, which cost more than the real ones."""
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    q, k, v = draw()
    (launch,) = launches.prepare(Inputs(q, k, v, 0.125), some_lists(q, k), "mass").launches
    launcher.launch(launch, CARD)
    for name in ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuLaunchKernel"):
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *driver._SIGNATURES[name])
        setattr(library, name, prototype(lambda *_: 0))
    seconds = []
    for _ in range(500):
        start = time.perf_counter()
        launcher.launch(launch, CARD)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 25e-6


def test_pointers_that_a_variant_ignores_are_null(folder, library):
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)).launch(*call.launches, CARD)
    got = library.launches[0]["arguments"]
    assert got["score"] == got["count"] == got["index"] == got["order"] == got["ordered"] == 0


def test_int8_launches_what_quantises_first(folder, library):
    q, k, v = draw(b=2, d=128)
    call = launches.prepare(
        Inputs(q, k, v, 0.125), some_lists(q, k), "mass", method=Method(int8=True, values="fp16")
    )
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    for launch in call.launches:
        launcher.launch(launch, CARD)
    keys, queries, peak, values, attend = (launch["arguments"] for launch in library.launches)
    entries = [launch["entry"] for launch in library.launches]
    assert entries == [
        *("quantise_keys", "quantise_queries", "peak_values", "scale_values", "attend_tiles")
    ]
    assert [x["grid"][:2] for x in library.launches] == [(6, 4), (4, 4), (6, 4), (6, 4), (2, 4)]
    assert library.images == [
        b"sm_86 d128_fp16_quantise_keys",
        b"sm_86 d128_fp16_quantise_queries",
        b"sm_86 d128_fp16_peak_values",
        b"sm_86 d128_fp16_scale_values_fp16",
        b"sm_86 d128_fp16_int8_fp16_lists_mass",
    ]
    assert (keys["k"], queries["q"], peak["v"]) == tuple(x.data_ptr() for x in (k, q, v))
    assert (attend["v"], attend["v_unit"]) == (values["values"], values["unit"])
    assert values["peak"] == peak["peak"] and values["v"] == v.data_ptr()
    assert (attend["q"], attend["k"]) == (queries["values"], keys["values"])
    assert (attend["q_unit"], attend["k_unit"]) == (queries["unit"], keys["unit"])
    assert attend["shift"] == queries["shift"] and keys["mean"] == queries["mean"]
    assert queries["scale"] == pytest.approx(0.125)
    assert [attend[f"q_{x}"] for x in ("batch", "head", "row")] == [2 * 200 * 128, 200 * 128, 128]
    assert [keys[f"k_{x}"] for x in ("batch", "head", "row")] == list(k.stride()[:3])


def test_a_card_without_a_mode_has_a_reason(folder, library):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    assert launcher.missing(CARD, "native") is launcher.missing(CARD, "int8") is None
    assert launcher.missing(CARD, "fp8") == "no prebuilt fp8 kernel for compute capability 8.6"
    backend = KernelBackend(launcher, "int8")
    assert backend.provide(CARD, 96, torch.float16) == "no int8 kernel for head_dim 96"


def test_an_audit_is_a_part_of_the_launch(folder, library):
    q, k, v = draw(lq=330)
    call = Inputs(q, k, v, 0.125, torch.randperm(330))
    made = launches.prepare(call, some_lists(q, k), "mass", audited=range(1, 3))
    prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)).launch(*made.launches, CARD)
    (launch,) = library.launches
    assert launch["grid"] == (3 + 2, 2, 1)
    want = {"first_audited": 1, "audited": 2, "queries": 202}
    want |= {"full_out": made.full.out.data_ptr(), "full_lse": made.full.lse.data_ptr()}
    assert want.items() <= launch["arguments"].items() and launch["arguments"]["every"]
    assert made.full.out.shape == (1, 2, 202, 64)
    with pytest.raises(ValueError, match="audit"):
        launches.prepare(call, None, "mass", audited=range(1, 3))


@pytest.mark.parametrize("error", [200, 209, 218, 222])
def test_what_the_driver_refuses_says_which_driver_it_needs(folder, library, error):
    library.failing, library.error = "cuModuleLoadData", error
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    with pytest.raises(
        DriverError, match=f"error {error}.; sm_86 needs NVIDIA driver 525, here is 570"
    ):
        launcher.launch(*call.launches, CARD)


@pytest.mark.parametrize(
    ("cuda", "branch"),
    [
        (10020, 0),
        (11040, 470),
        (11080, 520),
        (12000, 525),
        (12070, 565),
        (12095, 575),
        (13000, 580),
    ],
)
def test_the_branch_of_a_driver(library, cuda, branch):
    library.cuda = cuda
    assert Driver(library).branch == branch


def test_a_driver_that_is_too_old_for_an_archive_is_told_what_it_takes(folder, library):
    library.cuda = 11080
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    assert launcher.missing(CARD, "native") == "needs NVIDIA driver 525 or newer, here is 520"


def test_of_two_archives_the_driver_chooses(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    older = manifest["archives"]["sm_86"]
    manifest["archives"] |= {"sm_86_newer": older | {"driver": 580}}
    path.write_text(json.dumps(manifest))
    found = [Prebuilt(folder).archive(86, driver) for driver in (525, 575, 580, 595)]
    assert found == ["sm_86", "sm_86", "sm_86_newer", "sm_86_newer"]


def test_the_tile_map_launches_its_kernels(folder, library):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    score = torch.zeros(1, 2, 3, 70)
    pinned = torch.zeros(3, 70, dtype=torch.bool)
    keep = TileMapKernels(lambda launch, device: launcher.launch(launch, CARD))
    bits = keep.next_live(None, score, -4.0, pinned)
    lists = keep.make_lists(bits, 70, alternate=True)
    ledger = torch.zeros(4, dtype=torch.float64)
    counts = keep.histogram(bits, score, pinned)
    choice = keep.choose(counts, 6, ledger, score[0, 0, 0, 0], 0.3, [torch.ones(161).double()], 0.1)
    mark, listed, counted, chosen = library.launches
    assert (mark["entry"], mark["grid"]) == ("mark_tiles", (6, 1, 1))
    want = {"live": 0, "score": score.data_ptr(), "pinned": pinned.data_ptr()}
    want |= {"following": bits.data_ptr(), "tq": 3, "tk": 70, "words": 3}
    assert want.items() <= mark["arguments"].items()
    assert library.images[1] == b"sm_86 list_tiles_1" and listed["entry"] == "list_tiles"
    want = {"live": bits.data_ptr(), "count": lists.count.data_ptr(), "tk": 70, "words": 3}
    assert want.items() <= listed["arguments"].items()
    assert (counted["entry"], counted["grid"]) == ("count_scores", (6, 1, 1))
    want = {"live": bits.data_ptr(), "score": score.data_ptr(), "counts": counts.data_ptr()}
    assert want.items() <= counted["arguments"].items()
    assert (chosen["entry"], chosen["grid"]) == ("choose_limit", (1, 1, 1))
    want = {"counts": counts.data_ptr(), "ledger": ledger.data_ptr(), "lost": score.data_ptr()}
    want |= {"limit": choice.limit.score.data_ptr(), "after": choice.ledger.data_ptr()}
    want |= {"all_back": choice.limit.all_back.data_ptr()}
    want |= {"query_tiles": 6, "audited": 1, "layers": 1}
    assert want.items() <= chosen["arguments"].items()
    assert chosen["arguments"]["together"] == pytest.approx(0.1)


def test_means_of_skipped_tiles_launch_their_kernel(folder, library):
    q, k, v = draw(lq=330)
    backend = KernelBackend(prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)))
    kept = launches.allocate(q, k, True, None)
    bits = pack(torch.ones(1, 2, *TILE.grid(330, 330), dtype=torch.bool))
    pooled, factor = pool(k, v, TILE.k), torch.ones(1, 2)
    backend.add_skipped(kept, Skipped(q, pooled, 0.125, bits), factor)
    (launched,) = library.launches
    want = {"q": q.data_ptr(), "keys": pooled.keys.data_ptr(), "values": pooled.values.data_ptr()}
    want |= {"out": kept.out.data_ptr(), "lse": kept.lse.data_ptr(), "live": bits.data_ptr()}
    want |= {"factor": factor.data_ptr(), "heads": 2, "lq": 330, "lk": 330, "tk": 6, "words": 1}
    assert want.items() <= launched["arguments"].items()
    assert launched["arguments"]["scale_log2"] == pytest.approx(0.125 * math.log2(math.e))
    assert (launched["entry"], launched["grid"]) == ("add_skipped", (3, 2, 1))
    assert library.images == [b"sm_86 d64_fp16_add_skipped"]


def test_an_audit_of_means_launches_its_kernel(folder, library):
    q, k, v = draw(lq=330)
    backend = KernelBackend(prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)))
    kept, order = launches.allocate(q, k, True, None), torch.randperm(330)
    full = launches.allocate(q[:, :, :202], k, True, None)  # of query tiles 1 and 2
    bits = pack(torch.ones(1, 2, *TILE.grid(330, 330), dtype=torch.bool))
    skipped = Skipped(q, pool(k, v, TILE.k), 0.125, bits, order)
    found = backend.audit_skipped(kept, skipped, full, range(1, 3))
    (launched,) = library.launches
    assert (launched["entry"], launched["grid"]) == ("audit_skipped", (2, 2, 1))
    want = {"out": kept.out.data_ptr(), "full_out": full.out.data_ptr(), "live": bits.data_ptr()}
    want |= {"full_row": full.out.stride(2), "order": order.data_ptr(), "ordered": 330}
    want |= {"first_tile": 1, "tq": 3, "queries": 202, "words": 1, "lq": 330, "lk": 330}
    assert want.items() <= launched["arguments"].items()
    assert found.agreement.shape == found.power.shape == (1, 2)


def test_every_thread_has_its_own_argument_memory():
    block = ArgumentBlock(["i32", "i64", "*fp32", "fp32"])
    seen = []
    barrier = threading.Barrier(2)

    def work():
        seen.append(block.fill([1, 2, 3, 4.0])[0])
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen[0] != seen[1]


def test_arguments_are_naturally_aligned():
    pointers = list(ArgumentBlock(["i32", "i64", "i32", "*fp32"]).fill([1, 2, 3, 4]))
    assert [p - pointers[0] for p in pointers] == [0, 8, 16, 24]


# ---- loading ------------------------------------------------------------------------------------


def test_a_kernel_is_loaded_once_however_many_threads_ask(folder, library):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda _: launcher._load(0, call.launches[0].kernel), range(16)))
    assert len(library.images) == 1 and all(k is kernels[0] for k in kernels)


def test_each_card_loads_into_its_own_context(folder, library):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    for number in (0, 1, 0):
        launcher.launch(*call.launches, torch.device("cuda", number))
    assert [x["context"] for x in library.launches] == [1000, 1001, 1000]
    assert library.calls.count("cuDevicePrimaryCtxRetain") == 2 and len(library.images) == 2


@pytest.mark.parametrize("failing", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_an_error_of_the_driver_says_which_and_leaves_no_context(folder, library, failing):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    library.failing = failing
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    with pytest.raises(DriverError, match=f"{failing}: no kernel image is available.*209"):
        launcher.launch(*call.launches, CARD)
    assert library.contexts == [] and library.capture == 0


@pytest.mark.parametrize("failing", ["cuModuleLoadData", "cuLaunchKernel"])
def test_a_full_card_is_what_it_is_to_torch(folder, library, failing):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    library.failing, library.error = failing, 2
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    with pytest.raises(torch.OutOfMemoryError, match=failing):
        launcher.launch(*call.launches, CARD)
    library.failing = None
    launcher.launch(*call.launches, CARD)


def test_a_hint_about_shared_memory_may_be_refused(folder, library, monkeypatch):
    def refuse(function, attribute, value):
        assert attribute != 9  # an error, to the driver

    monkeypatch.setattr(library, "_cuFuncSetAttribute", refuse)
    call = launches.prepare(Inputs(*draw(), 0.125), None, None)
    prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)).launch(*call.launches, CARD)
    assert len(library.launches) == 1


def test_little_shared_memory_needs_no_hint(library):
    Driver(library).load(0, b"", "attend_tiles", 4, 512)
    assert library.attributes == [(8, 512)]


@pytest.mark.parametrize(("platform", "name"), [("win32", "nvcuda.dll"), ("linux", "libcuda.so.1")])
def test_a_machine_without_driver_gets_a_reason(folder, library, monkeypatch, platform, name):
    def absent(asked):
        assert asked == name
        raise OSError("not found")

    monkeypatch.setattr(driver.sys, "platform", platform)
    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    assert "no NVIDIA driver" in prebuilt.PrebuiltLauncher(Prebuilt(folder)).missing(CARD, "native")


def test_an_old_driver_gets_a_reason(folder, library, monkeypatch):
    del library.cuThreadExchangeStreamCaptureMode
    monkeypatch.setattr(driver, "_open_library", lambda: library)
    reason = prebuilt.PrebuiltLauncher(Prebuilt(folder)).missing(CARD, "native")
    assert reason == "this NVIDIA driver is too old: it has no cuThreadExchangeStreamCaptureMode"


def test_only_cards_that_have_code_are_taken(folder, library, monkeypatch):
    launcher = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    assert launcher.missing(CARD, "native") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    other = prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library))
    assert other.missing(CARD, "native") == "no prebuilt kernel for compute capability 7.5"


@pytest.mark.parametrize(
    ("capability", "archive"), [(86, "sm_86"), (75, None), (80, None), (87, "ptx"), (130, "ptx")]
)
def test_choice_of_the_archive(folder, capability, archive):
    if archive is None:
        with pytest.raises(PrebuiltError, match="no prebuilt kernel for compute capability"):
            Prebuilt(folder).archive(capability, 580)
    else:
        assert Prebuilt(folder).archive(capability, 580) == archive


def test_changed_code_is_refused(folder):
    name = VARIANTS[0].name + ".cubin"
    with zipfile.ZipFile(folder / "sm_86.zip", "w") as members:
        members.writestr(name, b"something else")
    with pytest.raises(PrebuiltError, match="sha256"):
        Prebuilt(folder).read("sm_86", VARIANTS[0])
    with pytest.raises(PrebuiltError, match="missing"):
        Prebuilt(folder).read("sm_86", VARIANTS[1])


def test_a_damaged_archive_is_refused(folder):
    path = folder / "sm_86.zip"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PrebuiltError, match="missing"):
        Prebuilt(folder).read("sm_86", VARIANTS[0])


@pytest.mark.parametrize("key", ["format", "tile", "parameters"])
def test_a_manifest_of_another_version_is_refused(folder, key):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "other"}))
    with pytest.raises(PrebuiltError, match="another version"):
        Prebuilt(folder).archive(86, 580)


def test_no_manifest_is_a_reason_not_a_crash(tmp_path, library):
    assert "no readable manifest" in prebuilt.PrebuiltLauncher(
        Prebuilt(tmp_path), Driver(library)
    ).missing(CARD, "native")


# ---- backend ------------------------------------------------------------------------------------


def test_tensors_on_the_cpu_are_declined(folder, library):
    backend = KernelBackend(prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)))
    assert "q is on cpu, the kernel is for cuda" in backend.unsupported(*draw())


def test_a_kernel_that_computes_nonsense_is_not_trusted(folder, library, monkeypatch):
    """The stand-in leaves the outputs as they were: the self-test must notice, and only once."""
    backend = KernelBackend(prebuilt.PrebuiltLauncher(Prebuilt(folder), Driver(library)))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, target: _keep(self, target))
    first = backend.provide(CARD, 64, torch.float16)
    launches = len(library.launches)
    assert "self-test" in first and launches > 0
    assert backend.provide(CARD, 64, torch.float16) == first
    assert len(library.launches) == launches


_to = torch.Tensor.to


def _keep(tensor, target):
    """There is no card to move to."""
    return tensor if isinstance(target, torch.device) else _to(tensor, target)
