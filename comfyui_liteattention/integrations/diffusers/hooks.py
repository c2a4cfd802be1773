"""diffusers: how calls of a transformer and of its self-attention reach us, and how we leave.

No class is patched. PyTorch's own hooks on the transformer see each of its calls (a wrapper around
its ``forward`` would be lost when accelerate's CPU offload rebuilds that after every run). Each
self-attention module gets a ``forward`` of ours around its own, inside all other wrappers
(:mod:`.places`); it routes the module's attention to us (:mod:`.routes`). A listener among
diffusers' hooks is told of cache contexts and of the end of a run.

The state of a call belongs to the thread that makes it, because several pipelines in several
threads may share one transformer. Copies of a transformer, pickled ones too, are not enabled: in a
copy, our wrappers are replaced by what they wrap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable
from contextlib import ExitStack
from functools import partial, update_wrapper
from inspect import signature
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

# Before the other imports: it raises a clear error where diffusers is too old.
from .routes import (  # isort: split
    NAME,
    Call,
    register_backend,
    routed,
    unregister_backend,
)

from diffusers.hooks.hooks import (
    BaseState,
    HookFunctionReference,
    HookRegistry,
    ModelHook,
    StateManager,
)

from .places import own_place, place_of

__all__ = ["Begin", "Call", "TransformerHook", "register_backend", "unregister_backend"]

RESET = "_reset_stateful_cache"


class Context(NamedTuple):
    """The cache context of a transformer's call; in diffusers 0.40 only its name."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None


#: Called as (arguments of forward by name, cache context) before each call of a transformer.
Begin = Callable[[dict[str, Any], Context | None], Call | None]


def _outside_graphs(reason: str) -> Callable[[Any], Any]:
    """``torch.compiler.disable``, with the reason where this version of torch accepts one."""
    takes = "reason" in signature(torch.compiler.disable).parameters
    return torch.compiler.disable(**({"reason": reason} if takes else {}))


class TransformerHook:
    """Hooks on one transformer: its calls, and its self-attention modules' calls.

    ``layers`` are the names of those modules; ``processors`` are the attention processor classes
    known to compute plain attention over all tokens. ``end`` is called when a pipeline signals the
    end of its run.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: list[str],
        processors: Collection[str],
        begin: Begin,
        end: Callable[[], None],
    ) -> None:
        self.root = root
        self.processors = processors
        self.contexts = Contexts()
        self._begin = begin
        self._signature = signature(type(root).forward)
        self._mine = _OfThread()
        self._blocks = _around(root, layers)
        sweep(root)
        with ExitStack() as undo:
            self._put_on(layers, end, undo)
            self._undo = undo.pop_all()

    def _put_on(self, layers: list[str], end: Callable[[], None], undo: ExitStack) -> None:
        """Put all hooks on, adding to ``undo`` how each is taken off."""
        root, listener = self.root, _Listener(self.contexts, end)
        listener.put_on(root)
        undo.callback(listener.take_off, root)
        if not hasattr(root, RESET):  # models without step caches lack it
            setattr(root, RESET, Callback(end))
            undo.callback(delattr, root, RESET)
        for layer in layers:
            undo.callback(AttentionForward(root.get_submodule(layer), layer, self).take_off)
        before = root.register_forward_pre_hook(Callback(self._before), with_kwargs=True)
        undo.callback(before.remove)
        after = root.register_forward_hook(Callback(self._after), with_kwargs=True)
        undo.callback(after.remove)

    def remove(self) -> None:
        """Take all hooks off."""
        self._undo.close()

    @property
    def call(self) -> Call | None:
        """The call of the transformer that this thread is in."""
        return self._mine.call

    def form(self) -> Hashable:
        """Which hooks of others are on the blocks: with them, guiders change what a single pass
        computes."""
        return tuple(
            (index, name)
            for index, module in enumerate(self._blocks)
            if (registry := vars(module).get("_diffusers_hook")) is not None
            for name in registry.hooks
        )

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._mine.call = None
        arguments = self._signature.bind_partial(module, *args, **kwargs).arguments
        self._mine.call = self._begin(arguments, self.contexts.told())
        self._mine.started = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call, self._mine.call = self._mine.call, None
        if call is None or call.end(time.perf_counter() - self._mine.started):
            return output
        return module.forward(*args, **kwargs)  # bypasses these hooks, so it runs without us


class _OfThread(threading.local):
    """The transformer call that a thread is in, and when it started."""

    call: Call | None = None
    started = 0.0


class AttentionForward:
    """The ``forward`` of one self-attention module, while LiteAttention is on."""

    def __init__(self, module: nn.Module, layer: str, transformer: TransformerHook) -> None:
        self._module = module
        self._layer = layer
        self._transformer = transformer
        holder, name = own_place(module)
        self._own = getattr(holder, name)
        update_wrapper(self, self._own)  # for those who ask for its signature
        setattr(holder, name, self)

    @_outside_graphs("LiteAttention decides at every call which tiles to skip")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, processor = self._transformer.call, self._module.processor
        if call is None:
            return self._own(*args, **kwargs)
        if type(processor).__name__ not in self._transformer.processors:
            call.decline(f"attention processor {type(processor).__name__} is not known")
            return self._own(*args, **kwargs)
        with routed(self._module, self._own, call, self._layer) as forward:
            return forward(*args, **kwargs)

    def take_off(self) -> None:
        """Restore the module's own ``forward``. If someone has wrapped this one, it has to stay; it
        then only calls the module's own, since from now on no call is open."""
        place = place_of(self, self._module)
        if place is None:
            return
        holder, name = place
        setattr(holder, name, self._own)
        if holder is self._module and _is_of_class(self._own, self._module):
            del holder.forward

    def __reduce__(self) -> Any:
        """In a copy, the module's own ``forward`` takes the place of this one."""
        own = self._own
        return own.__reduce__() if isinstance(own, MethodType) else (partial, (own,))


class Callback:
    """A function of ours registered with someone else's module; in a copy of it, a no-op."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @_outside_graphs("LiteAttention follows the steps of a run")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return Callback, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a copy's hooks do."""


class Contexts(StateManager):
    """The cache context that diffusers sets, kept per thread."""

    def __init__(self) -> None:
        self._mine = threading.local()
        super().__init__(BaseState)  # type: ignore[arg-type]  # its hint is wrong

    def set_context(self, context: Any) -> None:
        self._mine.context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._mine.context = None

    def told(self) -> Context | None:
        """The cache context of this thread, or None."""
        found = getattr(self._mine, "context", None)
        if found is None or isinstance(found, str):  # diffusers 0.40 gives the name alone
            return None if found is None else Context(found)
        return Context(found.name, found.step_index, found.num_inference_steps)


class _Listener(ModelHook):
    """A diffusers hook that wraps nothing, but is told of cache contexts and of a run's end."""

    _is_stateful = True

    def __init__(self, contexts: Contexts, end: Callable[[], None]) -> None:
        super().__init__()
        self.contexts = contexts
        self._end = end

    def put_on(self, root: nn.Module) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(root)
        # First in the list: removing a hook, diffusers relinks those after it, never those before.
        registry.hooks[NAME] = self
        registry._hook_order.insert(0, NAME)
        registry._fn_refs.insert(0, HookFunctionReference())

    @staticmethod
    def take_off(root: Any) -> None:
        registry = root._diffusers_hook
        index = registry._hook_order.index(NAME)
        del registry.hooks[NAME], registry._hook_order[index], registry._fn_refs[index]

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by a pipeline when its run has ended."""
        self.contexts.reset()
        self._end()
        return module

    def __reduce__(self) -> Any:
        return ModelHook, ()


def sweep(root: nn.Module) -> None:
    """Remove the no-op remains of our hooks from a copy of an enabled transformer."""
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if _is_left_over(hook)]:
            del hooks[key]
    if _is_left_over(vars(root).get(RESET)):
        delattr(root, RESET)
    registry = vars(root).get("_diffusers_hook")
    if registry is not None and NAME in registry.hooks:
        _Listener.take_off(root)


def _is_left_over(hook: object) -> bool:
    return isinstance(hook, Callback) and hook.function is _nothing


def _is_of_class(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward`` is simply the one of the module's class."""
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward


def _around(root: nn.Module, layers: list[str]) -> list[nn.Module]:
    """The blocks that contain these layers, and all modules inside."""
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in layers)
    return [module for name in blocks for module in root.get_submodule(name).modules()]
