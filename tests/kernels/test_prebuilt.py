"""The kernels that are shipped: complete, small, reproducible, and compiled as intended."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_liteattention.backends.gpu.archive import FOLDER, Prebuilt, recipe
from comfyui_liteattention.backends.gpu.kernel_table import (
    ARCHIVES,
    KERNELS,
    PTX_ARCH,
    TRAILING_POINTERS,
    VARIANTS,
    Archive,
    Kernel,
)

ROOT = Path(__file__).parents[2]
MANIFEST = Prebuilt().manifest
RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
LARGEST = 24 * 2**20
#: Of matrices, in 16 bits and in INT8.
INSTRUCTIONS = {
    "sm_90": ("HGMMA", "IGMMA"),
    **dict.fromkeys(("sm_100", "sm_103"), ("UTCHMMA", "UTCIMMA")),
}

has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton isn't installed: nothing to compile or disassemble with",
)


def run(script: str, *arguments: object) -> str:
    """A script of kernels/, in a process of its own where triton doesn't interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "kernels" / script, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def built_for(arch: int) -> list[Kernel]:
    return [kernel for kernel in KERNELS if kernel.config(arch) is not None]


def source_of(name: str) -> Archive:
    return Archive(PTX_ARCH) if name == "ptx" else ARCHIVES[name]


def test_every_variant_is_there_and_untampered():
    assert set(MANIFEST["archives"]) == {*ARCHIVES, "ptx"}
    for archive, contents in MANIFEST["archives"].items():
        kernels = built_for(contents["arch"])
        assert set(contents["kernels"]) == {kernel.name for kernel in kernels}
        for kernel in kernels:
            Prebuilt().read(archive, kernel)


def test_built_from_this_source():
    for name, contents in MANIFEST["archives"].items():
        for kernel in built_for(contents["arch"]):
            built = contents["kernels"][kernel.name]["recipe"]
            assert built == recipe(kernel, source_of(name)), (
                f"{kernel.name} is made otherwise now: run kernels/build.py"
            )


def test_the_manifest_names_the_driver_that_an_archive_needs():
    """By what the code itself says: bytes 7 and 8 of an ELF file, the version in PTX."""
    for name, contents in MANIFEST["archives"].items():
        for kernel in built_for(contents["arch"]):
            image = Prebuilt().read(name, kernel).image
            if name == "ptx":
                assert b".version 8.0\n" in image and contents["driver"] == 525
            else:
                newer = contents["kernels"][kernel.name]["ptxas"].startswith("13.")
                assert newer == ARCHIVES[name].newer_assembler
                # From Blackwell on both assemblers write the newer kind.
                kind = (0x41, 8) if newer or contents["arch"] >= 100 else (0x33, 7)
                assert (image[7], image[8]) == kind, name
                first = {100: 570, 103: 575, 120: 570}.get(contents["arch"], 525)
                assert contents["driver"] == (580 if newer else first), name


def test_small_enough_to_ship():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= LARGEST


def test_no_trace_of_the_building_machine():
    for archive in MANIFEST["archives"]:
        for kernel in (VARIANTS[0], *KERNELS[-4:]):
            image = Prebuilt().read(archive, kernel).image
            assert not any(x in image for x in (b"/home/", b"/tmp/", b".py"))


@has_triton
@pytest.mark.parametrize(
    ("archive", "name"),
    [
        ("sm_86", "d64_bf16_fp16_lists_mass"),
        ("sm_120", "d64_bf16_int8_e4m3_lists_mass"),  # by the other assembler
        ("sm_86", "d64_bf16_quantise_keys"),
        ("sm_86", "mark_tiles_1"),
    ],
)
def test_rebuilding_gives_the_same_bytes(tmp_path, archive, name):
    import triton

    if triton.__version__ != MANIFEST["triton"]:
        pytest.skip(f"built with triton {MANIFEST['triton']}, this is {triton.__version__}")
    run("build.py", "--archive", archive, "--only", name, "--out", tmp_path, "--jobs", 1)
    built = json.loads((tmp_path / "manifest.json").read_text())
    assert set(built["archives"]) == {archive, *(["ptx"] if archive == "sm_86" else [])}
    for made, contents in built["archives"].items():
        assert contents["kernels"][name] == MANIFEST["archives"][made]["kernels"][name]


@has_triton
def test_no_kernel_spills_and_every_one_fits_its_card():
    kernels = json.loads(run("inspect.py", "--json", "--no-code"))
    assert len(kernels) == sum(len(built_for(a.arch)) for a in ARCHIVES.values())
    assert not {name for name, kernel in kernels.items() if kernel["stack"]}
    assert all(k["blocks"] >= 1 and k["registers"] <= 255 for k in kernels.values())


@pytest.fixture(scope="module")
def inspected():
    """Those that matter most, on every card; to disassemble them all takes minutes."""
    return json.loads(run("inspect.py", "--json", "--modes"))


@has_triton
def test_tensor_cores_are_used_and_nothing_is_spilled(inspected):
    for name, kernel in inspected.items():
        native, int8 = INSTRUCTIONS.get(name.split("/")[0], ("HMMA", "IMMA"))
        tensor = kernel["tensor"]
        assert (tensor.get(int8, 0) > 0) == ("int8" in name), name
        assert (tensor.get("QMMA", 0) > 0) == ("e4m3" in name), name
        assert (tensor.get(native, 0) > 0) == ("e4m3" not in name), name
        assert kernel["spills"] == 0 and kernel["stack"] == 0, name


@has_triton
def test_the_table_of_modes_is_of_these_kernels(inspected):
    """Registers, memory and loops, as benchmarks/results has them and kernels/README.md shows."""
    assert inspected == json.loads(RESULTS.read_text())


@has_triton
def test_lists_and_scores_cost_few_instructions(inspected):
    """Per key tile, over the dense kernel without scores: at most 10 %.

    The score is a square root and three products a row, a maximum over 128 rows (six shuffles, one
    pass through shared memory) and one store.
    """
    for name, kernel in inspected.items():
        assert kernel["over_dense"] <= 0.10, name


def test_the_compiled_code_takes_the_arguments_that_the_launcher_packs():
    """Entry name, order and sizes of the parameters, as PTX declares them."""
    sizes = {"i32": "u32", "i64": "u64", "fp32": "f32"}
    for kernel in built_for(PTX_ARCH):
        types = [type_ for _, type_ in kernel.entry.parameters]
        want = [sizes.get(type_, "u64") for type_ in types] + ["u64"] * TRAILING_POINTERS
        ptx = Prebuilt().read("ptx", kernel).image.decode()
        assert f".target sm_{PTX_ARCH}\n" in ptx, "PTX for newer cards must not be tied to one"
        (signature,) = re.findall(rf"\.visible \.entry {kernel.entry.name}\((.*?)\)", ptx, re.S)
        found = re.findall(r"\.param \.([bufs]\d+)", signature)
        assert [f[1:] for f in found] == [w[1:] for w in want], kernel.name
