"""diffusers: how the attention of one module reaches us for the duration of its call.

If the module's processor goes through diffusers' dispatch, the call runs on a stand-in for the
module whose processor has a backend of ours. If it calls PyTorch's attention itself, or dispatches
to the globally set backend, the call runs in a PyTorch function mode that intercepts that function.
Either way, a call that we decline goes where it would have gone without us.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet, finalize

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

try:
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )
except ImportError as error:
    raise ImportError(
        f"LiteAttention: diffusers 0.40 or newer is needed (pip install -U diffusers): {error}"
    ) from error

from ...never_slower.dense import Dense
from .parallel import attend_across, declined

NAME = "liteattention"
ELSEWHERE = "this model attends through the attention backend that is set for all models"


class Extra(NamedTuple):
    """What a call of attention asks for besides plain attention over all tokens.

    ``mask`` as PyTorch's attention takes it, or None. ``reason``: why the call has to stay dense.
    ``row`` counts the attention calls in one call of a module, since some models attend to one row
    of the batch after the other. ``dense`` does the call as it would have been done without us.
    ``across``: the sequence was gathered from several processes; the queries may be only a part of
    it, beginning with the token ``first``.
    """

    mask: Any = None
    reason: str | None = None
    row: int = 0
    dense: Dense | None = None
    across: bool = False
    first: int = 0


class Call(Protocol):
    """One call of a transformer, for its self-attention layers."""

    def attend(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, extra: Extra
    ) -> Tensor | None:
        """Attention of ``q [B, H, Lq, D]``, ``k, v [B, H, L, D]``; None: do it densely."""
        ...

    def decline(self, reason: str) -> None:
        """Count an attention call that stays dense."""
        ...

    def end(self, seconds: float) -> bool:
        """The transformer returned; False: don't use its result, see :meth:`.Run.end_call`."""
        ...


Forward = Callable[..., Any]


def routed(
    module: nn.Module, forward: Forward, call: Call, layer: str
) -> AbstractContextManager[Forward]:
    """The module's ``forward``, with its attention going to ``call`` as that of ``layer``."""
    own = isinstance(forward, MethodType) and forward.__self__ is module
    if own and hasattr(module.processor, "_attention_backend"):
        return _dispatched(module, forward, call, layer)
    return _intercepted(forward, call, layer)


def attention_in_use(root: nn.Module) -> str:
    """The name of the attention that is used where LiteAttention isn't."""
    processors = (getattr(module, "processor", None) for module in root.modules())
    chosen = (getattr(processor, "_attention_backend", None) for processor in processors)
    backend = next((one for one in chosen if one is not None), None)
    return str(backend or _AttentionBackendRegistry.get_active_backend()[0])


class _Site(NamedTuple):
    """Which layer of which call asks for attention, and the backend that it would have used."""

    call: Call
    layer: str
    backend: AttentionBackendName | None


_site: ContextVar[_Site] = ContextVar(f"{NAME}_site")


@contextmanager
def _dispatched(module: Any, forward: Any, call: Call, layer: str) -> Iterator[Forward]:
    """The module's own ``forward``, bound to a stand-in whose processor dispatches to our backend.

    The module and its processor are not changed, because other threads may be using them.
    """
    token = _site.set(_Site(call, layer, module.processor._attention_backend))
    try:
        yield MethodType(forward.__func__, _stand_in(module))
    finally:
        _site.reset(token)


def _stand_in(module: nn.Module) -> nn.Module:
    """A shallow copy of the module with the same weights, whose processor has our backend."""
    twin: nn.Module = object.__new__(type(module))
    processor: Any = copy.copy(module.processor)
    processor._attention_backend = LITE
    vars(twin).update(vars(module), processor=processor)
    return twin


@contextmanager
def _intercepted(forward: Forward, call: Call, layer: str) -> Iterator[Forward]:
    with _Interception(call, layer) as mode:
        yield forward
    if mode.ran and not mode.seen:
        call.decline(ELSEWHERE)


class _Interception(TorchFunctionMode):
    """While it is entered, calls of PyTorch's attention in this thread are offered to us.

    ``seen`` counts them. ``ran``: the module really ran (a step cache may answer in its place),
    which its projections show.
    """

    def __init__(self, call: Call, layer: str) -> None:
        super().__init__()
        self.call = call
        self.layer = layer
        self.seen = 0
        self.ran = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.ran |= func is F.linear
        if func is F.scaled_dot_product_attention:
            dense = Dense(partial(func, *args, **kwargs))
            out = self._attend(dense, *args, **kwargs)
            return dense() if out is None else out
        return func(*args, **kwargs)

    def _attend(
        self,
        dense: Dense,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Ours, from the arguments of PyTorch's function; None: that has to do the call itself."""
        reason = _ineligible(dropout_p, is_causal, enable_gqa) or _others_step_in()
        extra = Extra(attn_mask, reason, self.seen, dense)
        self.seen += 1
        return self.call.attend(self.layer, query, key, value, scale, extra)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The backend: ``query, key, value [B, L, H, D]`` -> ``[B, L, H, D]``. With a
    ``_parallel_config``, each of several processes has a piece of the sequence."""
    site = _site.get()
    reason = _ineligible(dropout_p, is_causal, enable_gqa) or _others_step_in()
    asked = partial(
        dispatch_attention_fn,
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
    dense = Dense(asked)
    if _parallel_config is None:
        return _answer(site, query, key, value, scale, dense, Extra(attn_mask, reason))
    reason = reason or declined(_parallel_config, query, key, value, attn_mask)
    if reason is not None:
        site.call.decline(reason)
        return dense()

    def attend(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
        # Without a parallel config: the exchange is already done.
        asked = partial(dispatch_attention_fn, q, k, v, scale=scale, backend=site.backend)
        return _answer(site, q, k, v, scale, Dense(asked), Extra(across=True, first=first))

    return attend_across(_parallel_config, query, key, value, attend)


def _answer(
    site: _Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    dense: Dense,
    extra: Extra,
) -> Tensor:
    """Attention of ``query, key, value [B, L, H, D]`` without communication: ours, or dense."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = site.call.attend(site.layer, q, k, v, scale, extra._replace(dense=dense))
    return dense() if out is None else out.transpose(1, 2)


def _ineligible(dropout: float, causal: bool, gqa: bool) -> str | None:
    """Why the arguments of attention rule a call out, or None."""
    if causal:
        return "causal attention"
    if dropout:
        return "dropout (training)"
    if gqa:
        return "grouped or uneven heads (q, k and v have different shapes)"
    return None


def _others_step_in() -> str | None:
    """The reason to stay dense if another function mode is active, which may change what attention
    computes, as perturbed-attention guidance does; or None."""
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, (_Interception, DeviceContext)):
            return f"{type(mode).__name__} steps in at PyTorch's own attention"
    return None


def _backend_name() -> AttentionBackendName:
    """A name that dispatch accepts, but that users can't choose as a backend."""
    name = str.__new__(AttentionBackendName, NAME)
    name._name_ = name._value_ = NAME
    return name


LITE = _backend_name()


#: Sessions that need our backend. It stays registered with diffusers as long as there is one.
_users: WeakSet[Any] = WeakSet()


def register_backend(user: object) -> None:
    """Register our backend for ``user``, until it unregisters or is garbage-collected."""
    # Before adding to the set: weak references call back in reverse order of their creation, and
    # ``user`` has to have left the set by then.
    finalize(user, _unregister_unused).atexit = False
    _users.add(user)
    _AttentionBackendRegistry.register(LITE, supports_context_parallel=True)(_attend)


def unregister_backend(user: object) -> None:
    _users.discard(user)
    _unregister_unused()


def _unregister_unused() -> None:
    """Remove our backend from diffusers if no session needs it any more."""
    if next(iter(_users), None) is not None:
        return
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(_AttentionBackendRegistry, table).pop(LITE, None)
    _AttentionBackendRegistry._supports_context_parallel.discard(LITE.value)
