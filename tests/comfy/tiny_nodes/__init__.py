"""Nodes for tests, for a real server: a tiny model of every family, with its text and its latent.

They stand in for loaders, text encoders and VAEs; everything between them is ComfyUI's own.
"""

import gc
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path += [str(TESTS / "tiny"), str(TESTS.parent)]

import comfy.model_patcher  # noqa: E402
import tiny_comfy  # noqa: E402
import torch  # noqa: E402

NAMES = list(tiny_comfy.SAMPLED)


class TinyModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "LiteAttention/tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": (NAMES,)}}

    def make(self, name):
        cpu = torch.device("cpu")
        model = tiny_comfy.make_model(tiny_comfy.find(name))
        return (comfy.model_patcher.ModelPatcher(model, cpu, cpu),)


class TinyText:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "LiteAttention/tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": (NAMES,), "seed": ("INT",)}}

    def make(self, name, seed):
        return (tiny_comfy.conditioning(tiny_comfy.find(name), seed),)


class TinyLatent:
    """``frames`` times as long as the case's own, ``batch`` of them."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "LiteAttention/tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": (NAMES,), "frames": ("INT",), "batch": ("INT",)}}

    def make(self, name, frames, batch):
        _, channels, *size = tiny_comfy.find(name).latent
        size[0] *= frames
        return ({"samples": torch.zeros(batch, channels, *size)},)


class Leftovers:
    """How many objects of LiteAttention's runs are still in the server's memory, by class."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "count"
    CATEGORY = "LiteAttention/tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def count(self):
        gc.collect()
        found = {
            kind.__name__: number
            for kind, number in Counter(map(type, gc.get_objects())).items()
            if kind.__name__ in ("Run", "LayerState", "Forward")
            and "comfyui_liteattention" in kind.__module__
        }
        return {"ui": {"leftovers": [found]}}


NODES = (TinyModel, TinyText, TinyLatent, Leftovers)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
