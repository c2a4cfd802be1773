"""diffusers: how calls of a transformer and of its self-attention reach us, and how we leave.

Nothing is patched. PyTorch's own hooks on the transformer see each of its calls (accelerate's CPU
offload rebuilds ``forward`` after every run, and would lose a hook there). A diffusers hook on each
self-attention module routes the module's attention, for the length of its call, to a backend of
ours in diffusers' dispatch. What we decline goes on to the backend that would have been used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

try:
    from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )
except ImportError as error:
    raise ImportError(
        f"LiteAttention: diffusers 0.42 or newer is needed (pip install -U diffusers): {error}"
    ) from error

NAME = "liteattention"


class Call(Protocol):
    """One call of a transformer, for its self-attention layers."""

    def attend(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, extra: str | None
    ) -> Tensor | None:
        """Attention of ``q, k, v [B, H, L, D]``; None: do it densely. ``extra`` is a reason to."""
        ...

    def decline(self, reason: str) -> None:
        """Count an attention call that stays dense."""
        ...

    def end(self, seconds: float) -> None:
        """The transformer returned."""
        ...


#: Called as (arguments of forward by name, cache context) before each call of a transformer.
Begin = Callable[[dict[str, Any], CacheContext | None], Call | None]


class TransformerHook:
    """Hooks on one transformer: its calls, and its self-attention modules' calls.

    ``layers`` are the names of those modules; ``processor`` is the only class of attention
    processor that we know to do plain attention over all tokens.
    """

    def __init__(
        self, root: nn.Module, layers: list[str], processor: str, begin: Begin, end: Callable
    ) -> None:
        self.root = root
        self.layers = layers
        self.processor = processor
        self.end_of_run = end
        self.call: Call | None = None
        #: diffusers puts the cache context in here, by way of the layers' hooks.
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # its hint is wrong
        self._begin = begin
        self._started = 0.0
        self._signature = signature(type(root).forward)
        for layer in layers:
            registry = HookRegistry.check_if_exists_or_initialize(root.get_submodule(layer))
            registry.register_hook(_LayerHook(layer, self), NAME)
        self._forget_children()
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            HookRegistry.check_if_exists_or_initialize(self.root.get_submodule(layer)).remove_hook(
                NAME, recurse=False
            )
        self._forget_children()

    def _forget_children(self) -> None:
        """diffusers caches which modules carry hooks, and would miss a change."""
        HookRegistry.check_if_exists_or_initialize(self.root).invalidate_child_registries_cache()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = None
        arguments = self._signature.bind_partial(module, *args, **kwargs).arguments
        self._started = time.perf_counter()
        self.call = self._begin(arguments, _context(self.contexts))

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self.call = self.call, None
        if call is not None:
            call.end(time.perf_counter() - self._started)


class _LayerHook(ModelHook):
    """Routes the attention of one self-attention module to our backend."""

    _is_stateful = True

    def __init__(self, layer: str, transformer: TransformerHook) -> None:
        super().__init__()
        self.layer = layer
        self.transformer = transformer
        self.contexts = transformer.contexts

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        call = self.transformer.call
        if call is None:
            return forward(*args, **kwargs)
        processor: Any = module.processor
        if type(processor).__name__ != self.transformer.processor:
            call.decline(f"attention processor {type(processor).__name__} is not known")
            return forward(*args, **kwargs)
        with _routed(processor, call, self.layer):
            return forward(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline does this when its run has ended."""
        self.contexts.reset()
        self.transformer.end_of_run()
        return module


class _Site(NamedTuple):
    """Who is asking for attention, and which backend would have served them."""

    call: Call
    layer: str
    backend: AttentionBackendName | None


_site: ContextVar[_Site] = ContextVar(f"{NAME}_site")


@contextmanager
def _routed(processor: Any, call: Call, layer: str) -> Iterator[None]:
    """Let ``processor`` dispatch to our backend, then put back exactly what was there."""
    own = vars(processor)
    before = {name: own[name] for name in ("_attention_backend",) if name in own}
    token = _site.set(_Site(call, layer, processor._attention_backend))
    processor._attention_backend = LITE
    try:
        yield
    finally:
        del processor._attention_backend
        own.update(before)
        _site.reset(token)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The backend: ``query, key, value [B, L, H, D]`` -> ``[B, L, H, D]``."""
    site = _site.get()
    extra = _ineligible(attn_mask, dropout_p, is_causal, enable_gqa, _parallel_config)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = site.call.attend(site.layer, q, k, v, scale, extra)
    if out is not None:
        return out.transpose(1, 2)
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        backend=site.backend,
        parallel_config=_parallel_config,
    )


def _ineligible(mask: Any, dropout: float, causal: bool, gqa: bool, parallel: Any) -> str | None:
    """Why diffusers' own arguments rule this call out, or None."""
    if mask is not None:
        return "an attention mask"
    if causal:
        return "causal attention"
    if dropout:
        return "dropout (training)"
    if gqa:
        return "grouped or uneven heads (q, k and v have different shapes)"
    if parallel is not None:
        return "context parallelism"
    return None


def _context(contexts: StateManager) -> CacheContext | None:
    try:
        return contexts.context
    except ValueError:  # none is set
        return None


def _backend_name() -> AttentionBackendName:
    """A name that dispatch accepts; it doesn't join the names that users can set."""
    name = str.__new__(AttentionBackendName, NAME)
    name._name_ = name._value_ = NAME
    return name


LITE = _backend_name()


def register_backend() -> None:
    _AttentionBackendRegistry.register(LITE)(_attend)


def unregister_backend() -> None:
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(_AttentionBackendRegistry, table).pop(LITE, None)
