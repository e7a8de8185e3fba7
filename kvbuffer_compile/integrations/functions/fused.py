"""Fused functions of flash-linear-attention and mamba_ssm as a `kvbuffer::sequence`, by the adapters' contract.

Shapes as those libraries document: q, k [B, T, H, K]; v [B, T, HV, V]; gates [B, T, HV(, K or V)], log-decays;
states [B, HV, K, V]. Options of their kernels that change the computation and are not listed here leave a call alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer_compile.integrations.functions.adapters import (
    BONUS,
    COMBA,
    DELTA,
    GATED,
    GATED_DELTA,
    LINEAR,
    LOW_RANK,
    heads_first,
    normalised,
    sequence,
    serves,
)

HARMLESS = {"cu_seqlens_cpu", "head_first", "disable_recompute", "checkpoint_level", "chunk_size", "safe_gate"}


def _unknown(options: dict[str, Any]) -> bool:
    """Whether a call asks for something beside what the adapter knows."""
    return any(value not in (None, False) and name not in HARMLESS for name, value in options.items())


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    **options: Any,
) -> Any:
    """fused_recurrent_gla; simple_gla and retention by way of g [B, T, H] and g_gamma [H]. One gate at most."""
    gates = [x for x in (gk, gv, g, g_gamma) if x is not None]
    if not serves(initial_state, q.shape[1], cu_seqlens) or reverse or len(gates) > 1 or _unknown(options):
        return None
    heads = v.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    operands = [heads_first(k, heads), heads_first(v, heads), heads_first(q, heads) * scale]
    program = LINEAR
    if gates:
        program = GATED["k" if gk is not None else "v" if gv is not None else "s"]
        gate = gates[0].expand(q.shape[0], q.shape[1], heads) if g_gamma is not None else gates[0]
        operands = [heads_first(gate, heads).exp(), *operands]
    return sequence(program, initial_state, operands, v.dtype, output_final_state, state_v_first)


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *args: Any, **options: Any) -> Any:
    """chunk_gla(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens)."""
    names = ("scale", "initial_state", "output_final_state", "state_v_first", "cu_seqlens")
    return gated_linear_attention(q, k, v, g, **dict(zip(names, args, strict=False)), **options)


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """fused_recurrent_simple_gla and chunk_simple_gla."""
    names = ("scale", "initial_state", "output_final_state")
    given = dict(zip(names, args, strict=False))
    return gated_linear_attention(q, k, v, g=g, g_gamma=g_gamma, **given, **options) if len(args) < 4 else None


def retention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
    """fused_recurrent_retention and chunk_retention: a constant decay of 1 - 2^(-5 - head)."""
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    return simple_gla(q, k, v, None, (1 - 2.0 ** (-5.0 - heads)).log(), *args, **options)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """fused_recurrent_delta_rule and chunk_delta_rule. beta: [B, T, H] or [B, T, H, V]; None is 1."""
    if not serves(initial_state, q.shape[1], cu_seqlens) or _unknown(options):
        return None
    q, k = (normalised(x.float()) if use_qk_l2norm_in_kernel else x for x in (q, k))
    heads = v.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    beta = torch.ones_like(q[..., 0]) if beta is None else beta
    key, value, rate, query = (heads_first(x, heads) for x in (k, v, beta, q))
    operands = [key, value, rate, query * scale]
    return sequence(DELTA["v" if beta.dim() == 4 else "s"], initial_state, operands, v.dtype, output_final_state)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    read_key: Tensor | None = None,
    **options: Any,
) -> Any:
    """fused_recurrent_gated_delta_rule: one gate, of heads, key or value channels. read_key: Comba's p."""
    gates = [x for x in (g, gk, gv) if x is not None]
    if not serves(initial_state, q.shape[1], cu_seqlens) or len(gates) != 1 or _unknown(options):
        return None
    heads = v.shape[2]
    vectors = [x for x in (q, k, read_key) if x is not None]
    if use_qk_l2norm_in_kernel:
        vectors = [normalised(x.float()) for x in vectors]
    query, *keys = (heads_first(x, heads) for x in vectors)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if beta.dim() != 3:
        return None
    a, value, rate = (heads_first(x, heads) for x in (gates[0], v, beta))
    query = query * (k.shape[-1] ** -0.5 if scale is None else scale)
    kind = "k" if gates[0] is gk or gates[0].dim() == 4 and gv is None else "s" if gv is None else "v"
    program = (GATED_DELTA if read_key is None else COMBA)[kind]
    operands = [a.exp(), keys[0], value, rate, query, *keys[1:]]
    return sequence(program, initial_state, operands, v.dtype, output_final_state, state_v_first)


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *args: Any, **options: Any) -> Any:
    """chunk_gated_delta_rule, chunk_kda and fused_recurrent_kda called by name behind beta: a gate [B, T, HV(, K)]."""
    return None if args else gated_delta_rule(q, k, v, g, beta=beta, **options)


def comba(q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor, *args: Any, **options: Any) -> Any:
    """chunk_comba: what is read with differs from what is written with."""
    return None if args else gated_delta_rule(q, k, v, g, beta=beta, read_key=p, **options)


def fused_comba(q: Tensor, k: Tensor, p: Tensor, v: Tensor, g: Tensor, beta: Tensor, *args: Any, **options: Any) -> Any:
    """fused_recurrent_comba has p in front of v."""
    return comba(q, k, v, p, g, beta, *args, **options)


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """fused_recurrent_rwkv7: diagonal plus low rank, a reads the undecayed state. w: log-decay [B, T, H, K]."""
    if not serves(initial_state, r.shape[1], cu_seqlens) or _unknown(options):
        return None
    heads = v.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    operands = [heads_first(x, heads) for x in (a, w.float().exp(), k, v, b, r * scale)]
    return sequence(LOW_RANK, initial_state, operands, v.dtype, output_final_state)


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """fused_recurrent_rwkv6 and chunk_rwkv6: reads the old state, with a bonus u [H, K] for the token itself."""
    if not serves(initial_state, r.shape[1], cu_seqlens) or reverse or _unknown(options):
        return None
    heads = v.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, gate, key, value = (heads_first(x, heads) for x in (r * scale, w.float().exp(), k, v))
    out, state = sequence(BONUS, initial_state, [q, gate, key, value], torch.float32, output_final_state)
    bonus = (q * u.float()[:, None] * key).sum(-1, keepdim=True) * value
    return (out + bonus.transpose(1, 2)).to(v.dtype), state


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Any:
    """mamba_ssm's one-token step, in place: state [B, H, P, N]; x, dt [B, H, P]; A [H, P, N]; B, C [B, G, N]."""
    if state.dim() != 4 or state_batch_indices is not None or torch.is_grad_enabled():
        return None
    heads = state.shape[1]
    b, c = (y.float().repeat_interleave(heads // y.shape[1], dim=1) for y in (B, C))
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    new = state * (step[..., None] * A.float()).exp() + (step * x.float())[..., None] * b[:, :, None]
    state.copy_(new)
    out = (new * c[:, :, None]).sum(-1)
    out = out if D is None else out + x.float() * D.float()
    out = out if z is None else out * F.silu(z.float())
    return out.to(x.dtype)
