"""Other people's attention, where it is installed: ``q, k, v [1, H, L, D]`` -> the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .bench import Call


def _sdpa(choice: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(choice):
        return scaled_dot_product_attention(q, k, v)


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Any:
    function = import_module("flash_attn_interface").flash_attn_func
    out = function(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return import_module("sageattention").sageattn(q, k, v, tensor_layout="HND")


def _kitchen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return import_module("comfy_kitchen").int8_attention(q, k, v)


RIVALS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "SDPA flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "FlashAttention 3": _flash_attention_3,
    "SageAttention": _sage,
    "comfy-kitchen INT8": _kitchen,
}


def working(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that take these tensors, and why the others don't."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name, function in RIVALS.items():
        call = partial(function, q, k, v)
        try:
            call()
        except Exception as error:  # someone else's package: whatever it raises, we go on without
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[name] = call
    return calls, reasons
