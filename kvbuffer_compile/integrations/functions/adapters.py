"""What functions that hide a recurrence compute, as a `kvbuffer::sequence`: programs, operands, results.

Operands are brought to [B, H, T(, K or V)]; gates are formed in float32, as those functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.symbolic_convert import InstructionTranslator

MOST_TOKENS = 16  # of one call that is buffered, unless the buffer was asked to hold more
KINDS = {"s": "scalar", "k": "key", "v": "value"}
constant = torch._dynamo.assume_constant_result  # for what a trace need not look into


def text(inputs: str, body: str, decays: str = "") -> str:
    """A program of one token. inputs: name:kind, a kind being s, k or v (a head, a key, a value channel); body: its
    ops. decays: the kinds of the gates among its operands, which are its first inputs, a, a1, a2."""
    gates = [f"a{i or ''}:{kind}" for i, kind in enumerate(decays)]
    words = (word.split(":") for word in [*gates, *inputs.split()])
    lines = [f"  input {name}: {KINDS[kind]}(b h)" for name, kind in words]
    return "\n".join(["program over b h tokens 1", *lines, *(f"  {op.strip()}" for op in body.split(";"))])


def _after(decays: str, body: str) -> str:
    """The decays, then the ops of a body."""
    return "; ".join([*(f"decay a{i or ''}" for i in range(len(decays))), body])


@constant  # type: ignore[untyped-decorator]
def linear(decays: str = "", queries: int = 1) -> str:
    """The program of k, v and some queries: what gated linear attention is."""
    reads = "; ".join(f"o{i or ''} = read q{i or ''}" for i in range(queries))
    names = [f"o{i or ''}" for i in range(queries)]
    inputs = " ".join(f"q{i or ''}:k" for i in range(queries))
    return text(f"k:k v:v {inputs}", _after(decays, f"update k, v; {reads}; return {', '.join(names)}"), decays)


@constant  # type: ignore[untyped-decorator]
def delta(decays: str = "", beta: str = "", keys: str = "", before: bool = False) -> str:
    """The program of a delta rule: k, v, beta if it has a kind, q, and a key p of its own to read or w to write with.
    before: reads the state as it was before its decays, as Comba does."""
    inputs = ["k:k", "v:v", *([f"beta:{beta}"] if beta else []), "q:k", *(f"{name}:k" for name in keys)]
    read, write = ("p" if "p" in keys else "k"), ("w" if "w" in keys else "k")
    change = ["e = aten.sub.Tensor(v, y)", *(["u = aten.mul.Tensor(e, beta)"] if beta else [])]
    change += [f"update {write}, {'u' if beta else 'e'}", "o = read q", "return o"]
    decay = [f"decay a{i or ''}" for i in range(len(decays))]
    ops = [f"y = read {read}", *decay] if before else [*decay, f"y = read {read}"]
    return text(" ".join(inputs), "; ".join([*ops, *change]), decays)


@constant  # type: ignore[untyped-decorator]
def delta_product(steps: int, decays: str = "") -> str:
    """The program of `steps` delta rules a token, each with k, v and beta of its own, and one q."""
    inputs = " ".join(f"k{i}:k v{i}:v beta{i}:s" for i in range(steps))
    one = (
        "y{i} = read k{i}; e{i} = aten.sub.Tensor(v{i}, y{i}); u{i} = aten.mul.Tensor(e{i}, beta{i}); update k{i}, u{i}"
    )
    body = "; ".join(one.format(i=i) for i in range(steps))
    return text(f"{inputs} q:k", _after(decays, f"{body}; o = read q; return o"), decays)


@constant  # type: ignore[untyped-decorator]
def oja(decays: str) -> str:
    """The program of Oja's rule, which reads with a value: k, v, u = beta v, q."""
    body = "y = read v; e = aten.sub.Tensor(k, y); update e, u; o = read q; return o"
    return text("k:k v:v u:v q:k", _after(decays, body), decays)


LOW_RANK = "update k, v; update b, y; o = read q; return o"  # behind y = read a, of the state as it was
GATED = {kind: linear(kind) for kind in KINDS}
GATED_DELTA = {kind: delta(kind, "s") for kind in KINDS}
DIAGONAL_AND_LOW_RANK = text("a:k w:k k:k v:v b:k q:k", f"y = read a; decay w; {LOW_RANK}")
IDENTITY_AND_LOW_RANK = text("a:k k:k v:v b:k q:k", f"y = read a; {LOW_RANK}")
BONUS = text("q:k w:k k:k v:v", "o = read q; decay w; update k, v; return o")
SUMMED = text("a:s k:k v:v one:v", "decay a; update k, v; z = read one; return z")  # a vector state as one column


def backend_of_trace() -> Any:
    """The backend that the graph being traced goes to, as `torch.compile` holds it."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    return innermost_backend(backend)


@constant  # type: ignore[untyped-decorator]
def most_tokens() -> int:
    """How many tokens of one call may be buffered: what there are slots for, by the options of the trace at hand."""
    options = getattr(backend_of_trace(), "kwargs", {}).get("options") or {}
    return max(MOST_TOKENS, int(options.get("capacity") or 0))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, ...] in float32 as [B, heads, T, ...], each of G groups serving consecutive heads."""
    x = x.transpose(1, 2).float()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def normalised(x: Tensor) -> Tensor:
    """Unit vectors along the last dim, in float32, as fla makes them."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def sequence(
    program: str, state: Tensor, operands: Sequence[Tensor], flipped: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """(the next state, outputs [B, T, H, V] in float32). flipped: the state is [B, H, V, K]."""
    given = state.transpose(-1, -2) if flipped else state
    new, *outs = torch.ops.kvbuffer.sequence(given, list(operands), program)
    return new.transpose(-1, -2) if flipped else new, [out.transpose(1, 2).contiguous() for out in outs]
