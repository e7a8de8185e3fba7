"""Mamba-2's functions, of transformers and of mamba_ssm 2.3.

hidden_states x: [B, T, H, P]; dt: [B, T, H]; A, dt_bias: [H]; D: [H] or [H, P]; B, C: [B, T, G, N]; z: as x;
states [B, H, P, N].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer_compile.integrations.functions.adapters import GATED, heads_first, most_tokens, sequence
from kvbuffer_compile.integrations.functions.arguments import Unserved
from kvbuffer_compile.integrations.functions.known import Known, known


def on_states(given: dict[str, Any]) -> Unserved | None:
    """A few tokens on a state that exists."""
    if torch.is_grad_enabled():
        return Unserved("gradients may be needed")
    if given["initial_states"] is None:
        return Unserved("there is no state yet: a prefill")
    if given["x"].shape[1] > most_tokens():
        return Unserved("more tokens than a buffer has slots: a prefill")
    return None


def scan(c: dict[str, Any], dt: Tensor) -> tuple[Tensor, Tensor]:
    """(what is read with C and what D and z make of it [B, T, H, P] in float32, next state), from step sizes."""
    heads, x = c["x"].shape[2], c["x"].float()
    step = dt.float()
    decay = (c["A"].float() * step).exp().transpose(1, 2)
    operands = [decay, heads_first(c["B"], heads), (x * step[..., None]).transpose(1, 2), heads_first(c["C"], heads)]
    state, (out,) = sequence(GATED["s"], c["initial_states"], operands, flipped=True)
    if c["D"] is not None:
        skip = c["D"].float()
        out = out + (skip if skip.dim() == 2 else skip[..., None]) * x
    return out if c.get("z") is None else out * F.silu(c["z"].float()), state


def scan_of_transformers(c: dict[str, Any]) -> Any:
    """mamba2_chunk_scan: step sizes in their own dtype, outputs in float32."""
    dt = c["dt"] if c["dt_bias"] is None else c["dt"] + c["dt_bias"].to(c["dt"].dtype)
    dt = F.softplus(dt) if c["dt_softplus"] else dt
    out, state = scan(c, torch.clamp(dt, min=c["dt_limit"][0], max=c["dt_limit"][1]))
    return (out, state) if c["return_final_states"] else out


def scan_of_mamba(c: dict[str, Any]) -> Any:
    """mamba_chunk_scan_combined: step sizes in float32, outputs in the dtype of x."""
    dt = c["dt"].float() if c["dt_bias"] is None else c["dt"].float() + c["dt_bias"].float()
    dt = F.softplus(dt) if c["dt_softplus"] else dt
    out, state = scan(c, torch.clamp(dt, min=c["dt_limit"][0], max=c["dt_limit"][1]))
    out = out.to(c["x"].dtype)
    return (out, state) if c["return_final_states"] else out


def one_token(given: dict[str, Any]) -> Unserved | None:
    """A state for each head."""
    if torch.is_grad_enabled():
        return Unserved("gradients may be needed")
    return None if given["state"].dim() == 4 else Unserved("a state without heads: Mamba-1")


def selective_state_update(c: dict[str, Any]) -> Any:
    """mamba_ssm's step, in place: state [B, H, P, N]; x, z, dt [B, H, P]; A [H, P, N]; B, C [B, G, N];
    D, dt_bias [H, P]."""
    state, x = c["state"], c["x"]
    heads = state.shape[1]
    b, read = (y.float().repeat_interleave(heads // y.shape[1], dim=1) for y in (c["B"], c["C"]))
    step = c["dt"].float() if c["dt_bias"] is None else c["dt"].float() + c["dt_bias"].float()
    step = F.softplus(step) if c["dt_softplus"] else step
    new = state * (step[..., None] * c["A"].float()).exp() + (step * x.float())[..., None] * b[:, :, None]
    state.copy_(new)
    out = (new * read[:, :, None]).sum(-1)
    out = out if c["D"] is None else out + x.float() * c["D"].float()
    out = out if c["z"] is None else out * F.silu(c["z"].float())
    return out.to(x.dtype)


TRANSFORMERS: dict[str, Known] = {
    "mamba2_chunk_scan": known(
        scan_of_transformers,
        "hidden_states>x dt A B C chunk_size D=None dt_bias=None initial_states=None dt_softplus=False "
        "dt_limit=(0,inf) return_final_states=False ** seq_idx=None *",
        on_states,
    ),
}
MAMBA: dict[str, Known] = {
    "mamba_chunk_scan_combined": known(
        scan_of_mamba,
        "x dt A B C chunk_size D=None z=None dt_bias=None initial_states=None seq_idx=None cu_seqlens=None "
        "dt_softplus=False dt_limit=(0,inf) return_final_states=False return_varlen_states=False "
        "state_dtype=None",
        on_states,
    ),
    "selective_state_update": known(
        selective_state_update,
        "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
        one_token,
    ),
}
