"""What the nodes' schemas share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "model/LiteAttention"
Control = io.Custom("LITEATTENTION_CONTROL")


def control_output() -> io.Output:
    """The output of the nodes that choose settings."""
    return Control.Output(
        display_name="control",
        tooltip="Connect it to the control input of a LiteAttention node.",
    )


def after_sampling() -> list[io.Input]:
    """The inputs of a node that reports on a run; the latent makes it wait for the run."""
    return [
        io.Model.Input("model", tooltip="The model that came out of the LiteAttention node."),
        io.Latent.Input(
            "latent", tooltip="The sampler's output: makes this node wait for it. Passed on."
        ),
    ]


def latent_output() -> io.Output:
    return io.Latent.Output(display_name="latent", tooltip="The latent, unchanged.")


def advanced(*inputs: io.Input) -> list[io.Input]:
    """Inputs that few people need: newer front ends fold them away, older ones show them."""
    for one in inputs:
        one.extra_dict["advanced"] = True  # 0.3.75 has no argument of this name
    return list(inputs)


def schema(**declared: Any) -> io.Schema:
    """An ``io.Schema``, without the fields that this version of ComfyUI does not know yet."""
    known = {f.name for f in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in declared.items() if name in known})
