"""What functions that hide a recurrence compute, as a `kvbuffer::sequence`; their own arguments and results.

Each adapter takes the arguments of the function it stands for and returns what that would, or None for a call that it
does not serve. Operands are brought to [B, H, T(, K or V)]; gates are formed in float32, as those functions do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_TOKENS = 16

DELTA_RULE = """program over b h tokens 1
  input g: {gate}(b h)
  input k: key(b h)
  input v: value(b h)
  input beta: scalar(b h)
  input q: key(b h)
  decay g
  y = read k
  e = aten.sub.Tensor(v, y)
  u = aten.mul.Tensor(e, beta)
  update k, u
  o = read q
  return o"""
GATED_DELTA_RULE, KIMI_DELTA_ATTENTION = DELTA_RULE.format(gate="scalar"), DELTA_RULE.format(gate="key")
STATE_SPACE = """program over b h tokens 1
  input a: scalar(b h)
  input B: key(b h)
  input x: value(b h)
  input C: key(b h)
  decay a
  update B, x
  o = read C
  return o"""


def serves(state: Tensor | None, tokens: int, packed: Any) -> bool:
    """Whether a call is one that a sequence can stand for. packed: boundaries of sequences packed into one."""
    return state is not None and not torch.is_grad_enabled() and packed is None and tokens <= MOST_TOKENS


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, ...] in float32 as [B, heads, T, ...], each of G groups serving consecutive heads."""
    x = x.transpose(1, 2).float()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def normalised(x: Tensor) -> Tensor:
    """Unit vectors along the last dim, as fla makes them."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> Any:
    """chunk_gated_delta_rule and, with a gate for each channel, chunk_kda, as transformers spells them.

    query, key: [B, T, G, K]; value: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], log-decay; beta: [B, T, H].
    """
    if not serves(initial_state, query.shape[1], kwargs.get("cu_seqlens")):
        return None
    heads, dtype = value.shape[2], query.dtype
    q, k, v, a, b = (heads_first(x, heads) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = normalised(q), normalised(k)
    program = GATED_DELTA_RULE if g.dim() == 3 else KIMI_DELTA_ATTENTION
    operands = [a.exp(), k, v, b, q * q.shape[-1] ** -0.5]
    state, out = torch.ops.kvbuffer.sequence(initial_state, operands, program)
    return out.transpose(1, 2).contiguous().to(dtype), state if output_final_state else None


def state_space_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """mamba2_chunk_scan: Mamba-2 with its skip connection, the step size clamped as the chunked function does.

    hidden_states: [B, T, H, P]; dt: [B, T, H]; A, D, dt_bias: [H]; B, C: [B, T, G, N]; state [B, H, P, N].
    """
    if not serves(initial_states, hidden_states.shape[1], kwargs.get("seq_idx")) or kwargs.get("z") is not None:
        return None
    assert initial_states is not None
    heads = hidden_states.shape[2]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x = hidden_states.float()
    step = dt.float()
    decay = (A.float() * step).exp().transpose(1, 2)
    operands = [decay, heads_first(B, heads), (x * step[..., None]).transpose(1, 2), heads_first(C, heads)]
    state, out = torch.ops.kvbuffer.sequence(initial_states.transpose(-1, -2), operands, STATE_SPACE)
    out = out.transpose(1, 2).contiguous()
    if D is not None:
        out = out + D[..., None] * x
    return (out, state.transpose(-1, -2)) if return_final_states else out
