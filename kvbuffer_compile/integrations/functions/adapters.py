"""What functions that hide a recurrence compute, as a `kvbuffer::sequence`; their own arguments and results.

Each adapter takes the arguments of the function it stands for and returns what that would, or None for a call that it
does not serve. Operands are brought to [B, H, T(, K or V)]; gates are formed in float32, as those functions do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.symbolic_convert import InstructionTranslator

MOST_TOKENS = 16  # of one call that is buffered, unless the buffer was asked to hold more


def _text(inputs: str, body: str) -> str:
    kinds = {"s": "scalar", "k": "key", "v": "value"}
    lines = [f"  input {name}: {kinds[kind]}(b h)" for name, kind in (word.split(":") for word in inputs.split())]
    return "\n".join(["program over b h tokens 1", *lines, *(f"  {line.strip()}" for line in body.split(";"))])


# The programs, by the kind of their gate (s: a head, k: a key channel, v: a value channel), or of beta.
_DELTA = "y = read {p}; e = aten.sub.Tensor(v, y); u = aten.mul.Tensor(e, beta); update k, u; o = read q; return o"
LINEAR = _text("k:k v:v q:k", "update k, v; o = read q; return o")
GATED = {kind: _text(f"a:{kind} k:k v:v q:k", "decay a; update k, v; o = read q; return o") for kind in ("s", "k", "v")}
DELTA = {kind: _text(f"k:k v:v beta:{kind} q:k", _DELTA.format(p="k")) for kind in ("s", "v")}
GATED_DELTA = {
    kind: _text(f"a:{kind} k:k v:v beta:s q:k", "decay a; " + _DELTA.format(p="k")) for kind in ("s", "k", "v")
}
COMBA = {
    kind: _text(f"a:{kind} k:k v:v beta:s q:k p:k", "decay a; " + _DELTA.format(p="p")) for kind in ("s", "k", "v")
}
LOW_RANK = _text("a:k w:k k:k v:v b:k q:k", "y = read a; decay w; update k, v; update b, y; o = read q; return o")
BONUS = _text("q:k w:k k:k v:v", "o = read q; decay w; update k, v; return o")


def backend_of_trace() -> Any:
    """The backend that the graph being traced goes to, as `torch.compile` holds it."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    return innermost_backend(backend)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def most_tokens() -> int:
    """How many tokens of one call may be buffered: what there are slots for, by the options of the trace at hand."""
    options = getattr(backend_of_trace(), "kwargs", {}).get("options") or {}
    return max(MOST_TOKENS, int(options.get("capacity") or 0))


def serves(state: Tensor | None, tokens: int, packed: Any) -> bool:
    """Whether a call is one that a sequence can stand for. packed: boundaries of sequences packed into one."""
    return state is not None and not torch.is_grad_enabled() and packed is None and tokens <= most_tokens()


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, ...] in float32 as [B, heads, T, ...], each of G groups serving consecutive heads."""
    x = x.transpose(1, 2).float()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def normalised(x: Tensor) -> Tensor:
    """Unit vectors along the last dim, as fla makes them."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def sequence(
    program: str, state: Tensor | None, operands: list[Tensor], dtype: torch.dtype, keep: bool, flipped: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(outputs [B, T, H, V] in the dtype given, the next state or None). flipped: the state is [B, H, V, K]."""
    assert state is not None
    given = state.transpose(-1, -2) if flipped else state
    new, out = torch.ops.kvbuffer.sequence(given, operands, program)
    new = new.transpose(-1, -2) if flipped else new
    return out.transpose(1, 2).contiguous().to(dtype), new if keep else None
