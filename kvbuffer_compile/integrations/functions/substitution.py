"""Functions that hide a recurrence, replaced while Dynamo traces for this backend by the recurrence itself.

Chunked functions of transformers pad a few tokens to a block of 64 and solve a triangular system; fused ones of other
libraries are opaque. Where a state exists and no more tokens follow than a buffer has slots, each becomes one
`kvbuffer::sequence` (ir/sequence.py), the same for every number of tokens. Long prefills, calls without a state, graphs
that need gradients and every other backend get the function they asked for; only on a CPU, where Triton kernels have
nothing to run on, the functions of flash-linear-attention are replaced in every call, and so are its norms and
convolutions (plain.py).
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._dynamo.eval_frame import innermost_fn

from kvbuffer_compile.integrations.functions import fla, plain, recurrences, state_space
from kvbuffer_compile.integrations.functions.adapters import backend_of_trace
from kvbuffer_compile.integrations.functions.arguments import Unserved
from kvbuffer_compile.integrations.functions.known import Known, few_on_a_state, known

log = logging.getLogger("kvbuffer_compile")
Adapter = Callable[..., Any]  # what a function returns, from its arguments, or Unserved
CHUNKED = (
    "query>q key>k value>v g beta chunk_size=64 initial_state=None output_final_state=False "
    "use_qk_l2norm_in_kernel=False ** cu_seqlens=None *"
)


def _left_alone(reason: str) -> Adapter:
    """An adapter that serves no call. The reason is made while it is traced: a closure over one cannot be."""
    return lambda *_, **__: Unserved(reason)


# By the library that a module belongs to: the functions that modules of it hold under these names.
LIBRARIES: dict[str, dict[str, Adapter | Known]] = {
    "transformers": {
        "torch_chunk_gated_delta_rule": known(recurrences.delta, CHUNKED, few_on_a_state),
        "chunk_kimi_delta_attention": known(recurrences.delta, CHUNKED.replace(" g ", " g>gk "), few_on_a_state),
        **state_space.TRANSFORMERS,
    },
    "fla": {
        **fla.SERVED,
        **{name: _left_alone(why) for name, why in fla.UNSERVED.items()},
        **plain.SERVED,
    },
    "mamba_ssm": dict(state_space.MAMBA),
}
# Where transformers hands one token to a fused function of a library, its own plain function is traced instead.
ONE_TOKEN = ("torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention", "mamba2_selective_state_update")

_seen: set[int] = set()  # functions that were substituted; Dynamo keeps them alive
_searched: set[str] = set()  # modules
_listeners: list[Callable[[str, str], None]] = []


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def traced_for_us() -> bool:
    """Whether the graph at hand goes to a backend that says so: it has an attribute `rewrites_recurrences`."""
    backend = backend_of_trace()
    backend = getattr(backend, "compiler_fn", backend)
    return bool(getattr(backend, "rewrites_recurrences", False))


@contextmanager
def left_alone(listener: Callable[[str, str], None]) -> Iterator[None]:
    """With a listener that is told the name of each known function that a trace leaves as it is, and why."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(name: str, reason: str) -> None:
    log.info("%s is left as it is: %s", name, reason)
    for listener in _listeners:
        listener(name, reason)


def watch() -> None:
    """Have `substitute_known` called before each tracing. torch._dynamo.reset() forgets that, and needs this again."""
    callbacks = torch._dynamo.callback.callback_handler.start_callbacks
    if substitute_known not in callbacks:
        callbacks.append(substitute_known)
    substitute_known()


def substitute_known(*_: Any) -> None:
    """Substitute the known functions of every module that was imported since the last time."""
    for name in [n for n in list(sys.modules) if n not in _searched]:  # another thread may import
        _searched.add(name)
        root, module = name.partition(".")[0], sys.modules.get(name)
        if root in LIBRARIES and isinstance(module, types.ModuleType):  # None stands for one that must not be imported
            _substitute_in(module, LIBRARIES[root])


def _substitute_in(module: types.ModuleType, known: dict[str, Adapter | Known]) -> None:
    plain = {n: vars(module)[n].__wrapped__ for n in ONE_TOKEN if hasattr(vars(module).get(n), "__wrapped__")}
    for name, adapter in (known | plain).items():
        original = vars(module).get(name)
        if isinstance(original, types.FunctionType) and _is_its_own(original, module) and id(original) not in _seen:
            _seen.add(id(original))
            substitute(original, adapter.adapter(original) if isinstance(adapter, Known) else adapter)


def _is_its_own(function: types.FunctionType, module: types.ModuleType) -> bool:
    """Whether the library wrote it. Someone else's, put in its place, may mean something else under the same name."""
    return function.__module__.partition(".")[0] == module.__name__.partition(".")[0]


def substitute(original: types.FunctionType, adapter: Adapter) -> None:
    """Trace `adapter` instead of `original` under our backends; what it does not serve is left to the original."""
    untouched, name = _twin(original), original.__name__

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not traced_for_us():
            return untouched(*args, **kwargs)
        result = adapter(*args, **kwargs)
        if isinstance(result, Unserved):
            _tell(name, result.reason)
            return untouched(*args, **kwargs)
        return result

    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(traced)


def _twin(function: types.FunctionType) -> types.FunctionType:
    """The same function as another object, which Dynamo traces, or leaves to Python, as it is."""
    if getattr(function, "_torchdynamo_disable", False):
        return cast(types.FunctionType, torch.compiler.disable(innermost_fn(function)))
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
