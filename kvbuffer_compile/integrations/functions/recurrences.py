"""The recurrences that functions of flash-linear-attention hide, from their arguments by our names.

Each takes the arguments of a call as a dict and returns what the function would: (outputs, next state). Shapes as the
library documents: q, k [B, T, H, K]; v [B, T, HV, V]; gates are log-decays, g [B, T, HV], g_gamma [HV],
gk [B, T, HV, K], gv [B, T, HV, V]; states [B, HV, K, V]. An argument that a function does not have is not in the dict.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer_compile.integrations.functions import adapters
from kvbuffer_compile.integrations.functions.adapters import (
    BONUS,
    DIAGONAL_AND_LOW_RANK,
    IDENTITY_AND_LOW_RANK,
    heads_first,
    normalised,
)
from kvbuffer_compile.integrations.functions.arguments import Unserved

Given = dict[str, Any]


# ------------------------------------------------------------------------------------------- arguments


def scaled(c: Given, x: Tensor) -> Tensor:
    """Queries with their factor, 1 / sqrt(K) unless the call says another."""
    factor: float = x.shape[-1] ** -0.5 if c.get("scale") is None else c["scale"]
    return x * factor


def unit(c: Given, x: Tensor) -> Tensor:
    """A query or key, made a unit vector where the kernel does that."""
    return normalised(x) if c.get("use_qk_l2norm_in_kernel") else x


def gates(c: Given, heads: int) -> tuple[str, list[Tensor]] | Unserved:
    """The decays of a call, in the order in which they are applied: their kinds, and factors [B, HV, T(, K or V)]."""
    made = in_kernel(c) if c.get("use_gate_in_kernel") else c
    if isinstance(made, Unserved):
        return made
    found = [(kind, made[name]) for name, kind in (("g", "s"), ("gk", "k"), ("gv", "v")) if made.get(name) is not None]
    if c.get("g_gamma") is not None:
        found.insert(0, ("s", c["g_gamma"].expand(*c["v"].shape[:2], heads)))
    return "".join(kind for kind, _ in found), [heads_first(gate, heads).exp() for _, gate in found]


def in_kernel(c: Given) -> Given | Unserved:
    """Gates from what the kernel would make them of: -exp(A_log) softplus(x + dt_bias), with A_log a number a head;
    with a lower bound, bound * sigmoid(exp(A_log) (x + dt_bias))."""
    name = "gk" if c.get("gk") is not None else "g"
    x, rate, bound = c.get(name), c.get("A_log"), c.get("lower_bound")
    if x is None or (rate is None and bound is None):
        return Unserved("use_gate_in_kernel without g and A_log")
    x = x.float()
    shape = [x.shape[2], *[1] * (x.dim() - 3)]
    if c.get("dt_bias") is not None:
        x = x + c["dt_bias"].float().reshape(x.shape[2:])
    factor = 1.0 if rate is None else rate.float().reshape(shape).exp()
    return {**c, name: -factor * F.softplus(x) if bound is None else bound * torch.sigmoid(factor * x)}


def rate_of(c: Given) -> Tensor | Unserved | None:
    """Beta of a delta rule, [B, T, HV] or [B, T, HV, V]; None is 1."""
    beta = c.get("beta")
    if c.get("allow_neg_eigval") and not c.get("use_beta_sigmoid_in_kernel"):
        return Unserved("allow_neg_eigval without use_beta_sigmoid_in_kernel")
    if beta is not None and c.get("use_beta_sigmoid_in_kernel"):
        beta = torch.sigmoid(beta.float()) * (2.0 if c.get("allow_neg_eigval") else 1.0)
    return beta


def state_of(c: Given, state: Tensor | None, heads: int, rows: int, columns: int) -> Tensor:
    """The state of a call [B, heads, rows, columns], or as it lies; zeros where there is none."""
    if state is not None:
        return state
    sizes = (columns, rows) if c.get("state_v_first") else (rows, columns)
    v: Tensor = c["v"]
    return v.new_zeros(v.shape[0], heads, *sizes, dtype=torch.float32)


def run(
    c: Given, program: str, operands: list[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """(outputs [B, T, HV, V], next state or None) of a call with one query."""
    v = c["v"]
    state = state_of(c, c["initial_state"], v.shape[2], c["k"].shape[-1], v.shape[-1])
    new, (out,) = adapters.sequence(program, state, operands, bool(c.get("state_v_first")))
    return out.to(dtype or v.dtype), new if c["output_final_state"] else None


# ------------------------------------------------------------------------------------------- recurrences


def gated(c: Given) -> Any:
    """S <- gates S + k v', o = S' q: linear attention with any gates. Queries may have more heads than states."""
    k, v = c["k"], c["v"]
    heads = v.shape[2]
    decays = gates(c, heads)
    if isinstance(decays, Unserved):
        return decays
    kinds, factors = decays
    queries = max(1, c["q"].shape[2] // heads)
    asked = scaled(c, c["q"]).unflatten(2, (-1, queries)).unbind(3) if queries > 1 else [scaled(c, c["q"])]
    operands = [*factors, *(heads_first(x, heads) for x in (k, v, *asked))]
    state = state_of(c, c["initial_state"], heads, k.shape[-1], v.shape[-1])
    new, outs = adapters.sequence(adapters.linear(kinds, queries), state, operands, bool(c.get("state_v_first")))
    out = torch.stack(outs, 3).flatten(2, 3) if queries > 1 else outs[0]
    return out.to(c.get("dtype", v.dtype)), new if c["output_final_state"] else None


def retention(c: Given) -> Any:
    """A constant decay of 1 - 2^(-5 - head)."""
    heads = torch.arange(c["q"].shape[2], dtype=torch.float32, device=c["q"].device)
    return gated({**c, "g_gamma": (1 - 2.0 ** (-5.0 - heads)).log()})


def lightning(c: Given) -> Any:
    """A constant decay of exp(-8 head / H (1 - layer / layers))."""
    heads = c["q"].shape[2]
    slope = -(8 / heads * (1 - c["layer_idx"] / c["num_layers"]))
    return gated({**c, "g_gamma": slope * torch.arange(heads, dtype=torch.float32, device=c["q"].device)})


def delta(c: Given) -> Any:
    """S <- gates S; S <- S + w (beta (v - S' p))', o = S' q. p, w: the keys to read and to write with, or k."""
    v = c["v"]
    heads = v.shape[2]
    decays, beta = gates(c, heads), rate_of(c)
    if isinstance(decays, Unserved):
        return decays
    if isinstance(beta, Unserved):
        return beta
    kinds, factors = decays
    read, write = c.get("p"), c.get("w")
    used = [unit(c, c["k"]), v, *([] if beta is None else [beta]), scaled(c, unit(c, c["q"]))]
    used += [] if read is None else [unit(c, read)]
    used += [] if write is None else [write]
    keys = ("" if read is None else "p") + ("" if write is None else "w")
    program = adapters.delta(kinds, _kind_of(beta), keys, bool(c.get("before")))
    return run(c, program, [*factors, *(heads_first(x, heads) for x in used)], c.get("dtype"))


def _kind_of(beta: Tensor | None) -> str:
    return "" if beta is None else "v" if beta.dim() == 4 else "s"


def comba(c: Given) -> Any:
    """p reads the state before its decay: so do both kernels, though not the library's naive reference."""
    return delta({**c, "before": True})


def gdn2(c: Given) -> Any:
    """Gated DeltaNet 2: erases what is read with b k, writes w v. b: [B, T, HV, K]; w: [B, T, HV, V]."""
    heads = c["v"].shape[2]
    given = {n: x for n, x in c.items() if n not in ("b", "write_gate", "use_qk_l2norm_in_kernel")}
    k, q = (unit(c, x) for x in (c["k"], c["q"]))
    k, q = (x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2) for x in (k, q))
    value = c["v"].float() * c["write_gate"].float()
    return delta({**given, "q": q, "k": k, "v": value, "p": c["b"].float() * k.float(), "dtype": c["v"].dtype})


def delta_product(c: Given) -> Any:
    """n delta rules a token: k, v, beta [B, T n, H(, K or V)], one decay and one query a token."""
    steps, heads = c["num_householder"], c["v"].shape[2]
    decays = gates(c, heads)
    if isinstance(decays, Unserved):
        return decays
    kinds, factors = decays
    each = (heads_first(x, heads).unflatten(2, (-1, steps)).unbind(3) for x in (unit(c, c["k"]), c["v"], c["beta"]))
    operands = [x for step in zip(*each, strict=True) for x in step]
    query = heads_first(scaled(c, unit(c, c["q"])), heads)
    return run(c, adapters.delta_product(steps, kinds), [*factors, *operands, query], c["q"].dtype)


def low_rank(c: Given) -> Any:
    """S <- diag(gk) S + b (a' S) + k v', o = S' q: a reads the state as it was. Without gk nothing decays."""
    heads = c["v"].shape[2]
    if c.get("gk") is None:
        operands, program = [c["a"], c["k"], c["v"], c["b"], scaled(c, c["q"])], IDENTITY_AND_LOW_RANK
    else:
        operands = [c["a"], c["gk"].float().exp(), c["k"], c["v"], c["b"], scaled(c, c["q"])]
        program = DIAGONAL_AND_LOW_RANK
    return run(c, program, [heads_first(x, heads) for x in operands])


def rwkv7(c: Given) -> Any:
    """RWKV-7 in its own parts: kk [B, T, H, K], a unit vector that is erased at the rate a [B, T, H, K]."""
    kk = c["kk"].float()
    return low_rank({**c, "a": -kk, "b": kk * c["a"].float()})


def rwkv6(c: Given) -> Any:
    """Reads the old state, with a bonus u [H, K] for the token itself."""
    heads = c["v"].shape[2]
    q, gate, key, value = (heads_first(x, heads) for x in (scaled(c, c["q"]), c["gk"].float().exp(), c["k"], c["v"]))
    out, state = run(c, BONUS, [q, gate, key, value], torch.float32)
    bonus = (q * c["u"].float()[:, None] * key).sum(-1, keepdim=True) * value
    return (out + bonus.transpose(1, 2)).to(c["v"].dtype), state


def oja(c: Given) -> Any:
    """Gated Oja rule: S <- S diag(gv); S <- S + (k - S v) (beta v)', o = S' q."""
    heads = c["v"].shape[2]
    decays = gates(c, heads)
    if isinstance(decays, Unserved):
        return decays
    kinds, factors = decays
    q, k = (
        normalised(c[name]) if c[flag] else c[name] for name, flag in (("q", "use_q_l2norm"), ("k", "use_k_l2norm"))
    )
    beta, v = c.get("beta"), c["v"].float()
    write = v if beta is None else v * (beta if beta.dim() == 4 else beta[..., None]).float()
    operands = [*factors, *(heads_first(x, heads) for x in (k, v, write, scaled(c, q)))]
    return run(c, adapters.oja(kinds), operands)
