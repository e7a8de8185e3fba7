"""Chunked functions of transformers as a `kvbuffer::sequence`, by the adapters' contract."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer_compile.integrations.functions import fused
from kvbuffer_compile.integrations.functions.adapters import GATED, heads_first, sequence, serves


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
    return fused.gated_delta_rule(
        query, key, value, g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=kwargs.get("cu_seqlens"),
    )  # fmt: skip


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
    out, state = sequence(GATED["s"], initial_states, operands, torch.float32, keep=return_final_states, flipped=True)
    if D is not None:
        out = out + D[..., None] * x
    return (out, state) if return_final_states else out
