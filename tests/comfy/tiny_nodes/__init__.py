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
from comfy_execution.graph_utils import GraphBuilder  # noqa: E402

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


class TinyLoop:
    """Samples ``turns`` times, each time from what came out, by nodes that it puts in its place."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "expand"
    CATEGORY = "LiteAttention/tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        required = {name: (name.upper(),) for name in ("model", "latent")}
        required |= dict.fromkeys(("positive", "negative"), ("CONDITIONING",))
        return {"required": required | {"turns": ("INT",)}}

    def expand(self, model, latent, positive, negative, turns):
        graph = GraphBuilder()
        for turn in range(turns):
            given = dict(model=model, positive=positive, negative=negative, latent_image=latent)
            how = dict(seed=turn, steps=3 + turn, cfg=3.0, denoise=1.0)
            how |= dict(sampler_name="euler", scheduler="simple")
            latent = graph.node("KSampler", **given, **how).out(0)
        return {"result": (latent,), "expand": graph.finalize()}


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


NODES = (TinyModel, TinyText, TinyLatent, TinyLoop, Leftovers)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
