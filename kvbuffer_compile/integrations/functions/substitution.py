"""Functions that hide a recurrence, replaced while Dynamo traces for this backend by the recurrence itself.

Chunked functions of transformers pad a few tokens to a block of 64 and solve a triangular system; fused ones of other
libraries are opaque. Where a state exists and no more tokens follow than a buffer has slots, each becomes one
`kvbuffer::sequence` (sequence.py), the same for every number of tokens. Long prefills, calls without a state, graphs
that need gradients and every other backend get the function they asked for.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._dynamo.eval_frame import innermost_fn

from kvbuffer_compile.integrations.functions import chunked, fused
from kvbuffer_compile.integrations.functions.adapters import backend_of_trace

Adapter = Callable[..., Any]
# By the library that a module belongs to: the functions that modules of it hold under these names.
LIBRARIES: dict[str, dict[str, Adapter]] = {
    "transformers": {
        "torch_chunk_gated_delta_rule": chunked.gated_delta_rule,
        "chunk_kimi_delta_attention": chunked.gated_delta_rule,
        "mamba2_chunk_scan": chunked.state_space_scan,
    },
    "fla": {
        **dict.fromkeys(("fused_recurrent_simple_gla", "chunk_simple_gla"), fused.simple_gla),
        **dict.fromkeys(("fused_recurrent_retention", "chunk_retention"), fused.retention),
        **dict.fromkeys(("fused_recurrent_delta_rule", "chunk_delta_rule"), fused.delta_rule),
        **dict.fromkeys(("fused_recurrent_rwkv6", "chunk_rwkv6"), fused.rwkv6),
        **dict.fromkeys(("chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"), fused.chunk_gated_delta_rule),
        "fused_recurrent_gla": fused.gated_linear_attention,
        "chunk_gla": fused.chunk_gla,
        "fused_recurrent_gated_delta_rule": fused.gated_delta_rule,
        "fused_recurrent_comba": fused.fused_comba,
        "chunk_comba": fused.comba,
        "fused_recurrent_rwkv7": fused.rwkv7,
        "chunk_rwkv7": fused.rwkv7,
    },
    "mamba_ssm": {
        "selective_state_update": fused.selective_state_update,
        "mamba_chunk_scan_combined": chunked.state_space_scan,
    },
}
# Where transformers hands one token to a fused function of a library, its own plain function is traced instead.
ONE_TOKEN = ("torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention", "mamba2_selective_state_update")

_seen: set[int] = set()  # functions that were substituted; Dynamo keeps them alive
_searched: set[str] = set()  # modules


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def traced_for_us() -> bool:
    """Whether the graph at hand goes to a backend that says so: it has an attribute `rewrites_recurrences`."""
    backend = backend_of_trace()
    backend = getattr(backend, "compiler_fn", backend)
    return bool(getattr(backend, "rewrites_recurrences", False))


def watch() -> None:
    """Have `substitute_known` called before each tracing. torch._dynamo.reset() forgets that, and needs this again."""
    callbacks = torch._dynamo.callback.callback_handler.start_callbacks
    if substitute_known not in callbacks:
        callbacks.append(substitute_known)
    substitute_known()


def substitute_known(*_: Any) -> None:
    """Substitute the known functions of every module that was imported since the last time."""
    for name in [n for n in sys.modules if n not in _searched]:
        _searched.add(name)
        root = name.partition(".")[0]
        if root in LIBRARIES:
            _substitute_in(sys.modules[name], LIBRARIES[root])


def _substitute_in(module: types.ModuleType, known: dict[str, Adapter]) -> None:
    plain = {n: vars(module)[n].__wrapped__ for n in ONE_TOKEN if hasattr(vars(module).get(n), "__wrapped__")}
    for name, adapter in (known | plain).items():
        original = vars(module).get(name)
        if isinstance(original, types.FunctionType) and id(original) not in _seen:
            _seen.add(id(original))
            substitute(original, adapter)


def substitute(original: types.FunctionType, adapter: Adapter) -> None:
    """Trace `adapter` instead of `original` under our backends, where it gives a result; None leaves the original."""
    untouched = _twin(original)

    def traced(*args: Any, **kwargs: Any) -> Any:
        result = adapter(*args, **kwargs) if traced_for_us() else None
        return untouched(*args, **kwargs) if result is None else result

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
