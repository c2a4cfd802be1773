"""Weights in GGUF, through the node pack that people load them with.

Runs where ``COMFYUI_GGUF_PATH`` names a checkout of ComfyUI-GGUF and ``gguf`` is installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import tiny_comfy
import torch
from safetensors.torch import load_file

from comfyui_liteattention.settings import Settings

PACK = os.environ.get("COMFYUI_GGUF_PATH")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not PACK, reason="COMFYUI_GGUF_PATH is not set"),
]


@pytest.fixture(scope="module")
def pack(comfy):
    path = Path(PACK or "")
    spec = importlib.util.spec_from_file_location("comfyui_gguf", path / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The demo model with its matrices in eight bits, where the pack's loader looks."""
    import folder_paths
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "demo.gguf", "wan")
    for name, tensor in load_file(tiny_comfy.demo_weights()).items():
        matrix = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if matrix else gguf.GGMLQuantizationType.F32
        data = tensor.float().numpy()
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(tmp_path / name))
    return "demo.gguf"


def test_weights_in_gguf(pack, weights):
    (plain,) = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(weights)
    weight = plain.model.diffusion_model.blocks[0].self_attn.q.weight
    assert weight.dtype == torch.uint8
    settings = Settings(
        threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False
    )
    tiny_comfy.skips_and_stays_close(plain, settings)
