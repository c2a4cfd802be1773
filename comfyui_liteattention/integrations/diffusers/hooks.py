"""diffusers: how calls of a transformer and of its self-attention reach us, and how we leave.

Nothing is patched. PyTorch's own hooks on the transformer see each of its calls (accelerate's CPU
offload rebuilds ``forward`` after every run, and would lose a hook there). A diffusers hook on each
self-attention module routes the module's attention to us (:mod:`.routes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn

# First: it says which diffusers is needed where this one is too old.
from .routes import (  # isort: split
    NAME,
    Call,
    register_backend,
    routed,
    unregister_backend,
)

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

__all__ = ["Begin", "Call", "TransformerHook", "register_backend", "unregister_backend"]

RESET = "_reset_stateful_cache"


class Context(NamedTuple):
    """What a pipeline says about a call of its transformer; in diffusers 0.40 only the name."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None


#: Called as (arguments of forward by name, cache context) before each call of a transformer.
Begin = Callable[[dict[str, Any], Context | None], Call | None]


class TransformerHook:
    """Hooks on one transformer: its calls, and its self-attention modules' calls.

    ``layers`` are the names of those modules; ``processors`` are the only classes of attention
    processors that we know to do plain attention over all tokens.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: list[str],
        processors: Collection[str],
        begin: Begin,
        end: Callable,
    ) -> None:
        self.root = root
        self.layers = layers
        self.processors = processors
        self.end_of_run = end
        self.call: Call | None = None
        #: diffusers puts the cache context in here, by way of the layers' hooks.
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # its hint is wrong
        self._begin = begin
        self._started = 0.0
        self._signature = signature(type(root).forward)
        self._hooks = [_LayerHook(layer, self) for layer in layers]
        for hook in self._hooks:
            hook.put_on(self._registry(hook.layer))
        self._forget_children()
        # A pipeline calls this on its parts when a run has ended; some models have no caches, and
        # so don't have it.
        self._lacked_reset = not hasattr(root, RESET)
        if self._lacked_reset:
            setattr(root, RESET, end)
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        if self._lacked_reset:
            delattr(self.root, RESET)
        for hook in self._hooks:
            hook.take_off(self._registry(hook.layer))
        self._forget_children()

    def _registry(self, layer: str) -> HookRegistry:
        return HookRegistry.check_if_exists_or_initialize(self.root.get_submodule(layer))

    def _forget_children(self) -> None:
        """diffusers caches which modules carry hooks, and would miss a change."""
        registry = HookRegistry.check_if_exists_or_initialize(self.root)
        if hasattr(registry, "invalidate_child_registries_cache"):
            registry.invalidate_child_registries_cache()
            return
        for module in self.root.modules():  # diffusers 0.40
            its_own: Any = getattr(module, "_diffusers_hook", None)
            if its_own is not None:
                its_own._child_registries_cache = None

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = None
        for hook in self._hooks:
            hook.relink()
        arguments = self._signature.bind_partial(module, *args, **kwargs).arguments
        self._started = time.perf_counter()
        self.call = self._begin(arguments, _context(self.contexts))

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self.call = self.call, None
        if call is not None:
            call.end(time.perf_counter() - self._started)


class _LayerHook(ModelHook):
    """Routes the attention of one self-attention module to us."""

    _is_stateful = True

    def __init__(self, layer: str, transformer: TransformerHook) -> None:
        super().__init__()
        self.layer = layer
        self.transformer = transformer
        self.contexts = transformer.contexts
        self._routed: Any = None

    def put_on(self, registry: HookRegistry) -> None:
        registry.register_hook(self, NAME)
        self._routed = self.fn_ref.forward

    def take_off(self, registry: HookRegistry) -> None:
        """Whatever wraps us wraps what we wrapped from now on.

        diffusers would put that in place of the other hook, if it is one that replaces ``forward``.
        """
        self.relink()
        outer = registry._fn_refs[registry._hook_order.index(NAME) + 1 :][:1]
        theirs = [ref.forward for ref in outer if ref.original_forward is not None]
        registry.remove_hook(NAME, recurse=False)
        for ref, forward in zip(outer, theirs, strict=False):
            ref.original_forward, ref.forward = ref.forward, forward

    def relink(self) -> None:
        """When diffusers takes off a hook that we wrap (a cache was disabled), it puts what that
        one wrapped in our place. Put it where it belongs."""
        ref = self.fn_ref
        if ref.forward is not self._routed:
            ref.original_forward, ref.forward = ref.forward, self._routed

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        call = self.transformer.call
        if call is None:
            return forward(*args, **kwargs)
        processor: Any = module.processor
        if type(processor).__name__ not in self.transformer.processors:
            call.decline(f"attention processor {type(processor).__name__} is not known")
            return forward(*args, **kwargs)
        with routed(processor, call, self.layer):
            return forward(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline does this when its run has ended."""
        self.contexts.reset()
        self.transformer.end_of_run()
        return module


def _context(contexts: StateManager) -> Context | None:
    name = getattr(contexts, "_current_context", None)  # diffusers 0.40
    if name is not None:
        return Context(name)
    try:
        found = contexts.context
    except (AttributeError, ValueError):  # none is set
        return None
    return Context(found.name, found.step_index, found.num_inference_steps)
