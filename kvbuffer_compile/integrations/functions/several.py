"""Recurrences of flash-linear-attention that keep more than one matrix, or sums beside it: as recurrences.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.integrations.functions import adapters
from kvbuffer_compile.integrations.functions.adapters import SUMMED
from kvbuffer_compile.integrations.functions.arguments import Unserved
from kvbuffer_compile.integrations.functions.recurrences import Given, delta, gated, scaled, state_of, unit


def additive_gate(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(x - z'), z - z', z' of the last token) with z' = log(exp(z) + exp(x)), token by token: weights that sum to
    1. x: [B, T, H, K]; z: [B, 1, H, K] or None, and then the first token forgets nothing."""
    x = x.float()
    if x.shape[1] == 1:  # without a sum over tokens, whose operands could not be told apart
        now = x if z is None else torch.logaddexp(z, x)
        return (x - now).exp(), (x if z is None else z) - now, now
    before = x[:, :0] if z is None else z
    sums = torch.logcumsumexp(torch.cat([before, x], 1), 1)
    now = sums[:, before.shape[1] :]
    earlier = sums[:, :-1] if z is not None else torch.cat([now[:, :1], now[:, :-1]], 1)
    return (x - now).exp(), earlier - now, now[:, -1:]


def slots(c: Given) -> Any:
    """Gated slot attention, two states: keys by slot [B, H, K, M], slots by value [B, H, M, V]; s [B, T, H, M] writes
    to slots, which a softmax over what the first state says then reads. Without g the slots' weights sum to 1."""
    s, g = c["s"], c.get("g")
    if g is None:
        s, g, _ = additive_gate(s, None)
    rows, columns = c["initial_state"] or (None, None)
    if c["k"].shape[1] == 1:
        return _slots_of_one_token(c, s, g, rows, columns)
    plain = {"output_final_state": c["output_final_state"]}
    first = {**plain, "q": c["q"], "k": c["k"], "v": s, "gv": g, "initial_state": rows, "scale": c.get("scale")}
    read, keys = gated({**first, "dtype": torch.float32})
    second = {**plain, "q": read.softmax(-1), "k": s, "v": c["v"], "gk": g, "initial_state": columns, "scale": 1.0}
    out, values = gated(second)
    return out.to(c["v"].dtype), (keys, values)


def _slots_of_one_token(c: Given, s: Tensor, g: Tensor, rows: Tensor | None, columns: Tensor | None) -> Any:
    """Spelled out: what one state says decides how the other is read, which two sequences beside each other hide."""
    heads, slots_ = c["k"].shape[2], s.shape[-1]
    k, v, write, factor = (x[:, 0].float() for x in (c["k"], c["v"], s, g.float().exp()))
    keys = (
        state_of(c, rows, heads, k.shape[-1], slots_).float() * factor[..., None, :]
        + k[..., None] * write[..., None, :]
    )
    values = state_of(c, columns, heads, slots_, v.shape[-1]).float() * factor[..., None]
    values = values + write[..., None] * v[..., None, :]
    outs = []
    for query in scaled(c, c["q"])[:, 0].float().unflatten(1, (heads, -1)).unbind(2):
        read = (keys * query[..., None]).sum(-2).softmax(-1)
        outs.append((values * read[..., None]).sum(-2))
    out = torch.stack(outs, 2).flatten(1, 2)[:, None].to(c["v"].dtype)
    return out, (keys, values) if c["output_final_state"] else (None, None)


def gated_slots(c: Given) -> Any:
    """The same where the library returns its states in a list."""
    out, states = slots(c)
    return out, list(states)


def lightnet(c: Given) -> Any:
    """Linear attention whose keys are weights that sum to 1; beside the state their logarithmic sums [B, 1, H, K]."""
    state, sums = c["initial_state"] or (None, None)
    k, gk, sums = additive_gate(c["k"], sums)
    out, state = gated({**c, "k": k, "gk": gk, "initial_state": state})
    return out, (state, sums)


def normalised_linear(c: Given) -> Any:
    """Linear attention, if `normalize` over the sum of keys [B, 1, H, K] that is kept beside the state."""
    state = c["initial_state"]
    if not c["normalize"]:
        return gated(c)
    state, before = state if isinstance(state, tuple) else (state, None)
    out, state = gated({**c, "initial_state": state})
    sums = c["k"].float().cumsum(1).to(c["k"].dtype)
    sums = sums if before is None else sums + before
    out = out / ((scaled(c, c["q"]) * sums).sum(-1, keepdim=True) + 1e-10)
    return out, (state, sums[:, -1:].contiguous())


def preconditioned(c: Given) -> Any:
    """A delta rule that writes with keys over what a running sum A [B, H, K] of their squares has seen:
    A <- exp(g_atk) A + beta_atk k^2; w = k x^(-r / (1 + |r|)), r = log(A + eps) - log_atk_scale."""
    if c["g_atk"] is None or c["beta_atk"] is None:
        return Unserved("no g_atk and beta_atk")
    if c["x"] <= 0:
        return Unserved("x is not positive")
    center: Any = -0.2 if c["log_atk_scale"] is None else c["log_atk_scale"].float()[:, None]
    heads = c["g_atk"].shape[2]  # of the sums: those of keys, or of values
    k = unit(c, c["k"]).float()
    own = k if k.shape[2] == heads else k.repeat_interleave(heads // k.shape[2], 2)
    before = c["initial_A_state"]
    before = k.new_zeros(k.shape[0], heads, k.shape[-1]) if before is None else before
    sums, after = _summed(before, c["g_atk"].float().exp(), own * own, c["beta_atk"].float())
    r = (sums + c["eps"]).log() - center
    write = own * c["x"] ** (-r / (1.0 + r.abs()))
    result = delta({**c, "w": write})
    return result if isinstance(result, Unserved) else (*result, after if c["output_final_state"] else None)


def preconditioned_in_chunks(c: Given) -> Any:
    """The same, with sums handed back in the dtype of the keys."""
    result = preconditioned(c)
    if isinstance(result, Unserved) or not c["output_final_state"]:
        return result
    out, state, sums = result
    return out, state, sums.to(c["k"].dtype)


def preconditioned_kda_in_chunks(c: Given) -> Any:
    """The same, queries and keys made unit vectors whatever the call says."""
    return preconditioned_in_chunks({**c, "use_qk_l2norm_in_kernel": True})


def _summed(state: Tensor, decay: Tensor, squares: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """A running sum [B, H, K] after every token [B, T, H, K], and after the last. decay, rate: [B, T, H]."""
    if squares.shape[1] == 1:
        after = state * decay[:, 0, :, None] + squares[:, 0] * rate[:, 0, :, None]
        return after[:, None], after
    column = [x.transpose(1, 2) for x in (decay, squares, rate[..., None], torch.ones_like(rate)[..., None])]
    after, (sums,) = adapters.sequence(SUMMED, state[..., None], column)
    return sums, after[..., 0]
