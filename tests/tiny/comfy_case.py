"""A tiny model of ComfyUI: what it is built from and called with, and, written down by hand, what
its attention over the video must look like."""

from dataclasses import dataclass, field

import torch
from packaging.version import parse

from demo.comfy_server import comfyui_path

NEWER = parse("0.19")  # the oldest newer version that this was run with


@dataclass
class Case:
    """A model, what it is called with, and what its video attention must look like.

    ``config`` is the class in ``comfy.supported_models``; ``conds`` are shapes of further inputs,
    or functions that make them.
    ``before`` and ``after``: tokens beside the ``video`` in the sequence; ``joint``: text tokens
    that older versions put behind it and newer ones in front. ``hidden`` of the other tokens are
    padding that a mask hides. ``since``: first version known; ``newer_*``: what the newer versions
    need besides.
    """

    name: str
    config: str
    unet: dict
    latent: tuple
    text: tuple
    video: int
    layers: int
    before: int = 0
    after: int = 0
    conds: dict = field(default_factory=dict)
    joint: int = 0
    hidden: int = 0
    since: str = "0.3.75"
    newer_unet: dict = field(default_factory=dict)
    newer_conds: dict = field(default_factory=dict)

    def inputs(self):
        shapes = {"c_crossattn": self.text, **self.conds}
        if version() >= NEWER:
            shapes |= self.newer_conds
        return {name: made(value, i) for i, (name, value) in enumerate(shapes.items())}


def made(value, seed=1):
    """What a description stands for: a shape for noise, a function for what it makes."""
    if isinstance(value, tuple):
        return noise(value, seed)
    return value() if callable(value) else value


def version():
    """The version of the ComfyUI under test."""
    text = (comfyui_path() / "comfyui_version.py").read_text()
    return parse(text.split('"')[1])


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100))
