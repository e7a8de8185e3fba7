"""Norms, convolutions and activations of flash-linear-attention in plain torch ops, for tensors on a CPU.

Its layers call Triton kernels around their recurrence, which have nothing to run on there. Sums are taken in float32
and results rounded to the dtype of the input, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer_compile.integrations.functions import recurrences, several
from kvbuffer_compile.integrations.functions.arguments import Unserved
from kvbuffer_compile.integrations.functions.known import Known, known
from kvbuffer_compile.integrations.functions.recurrences import Given


def on_a_cpu(given: Given) -> Unserved | None:
    """A tensor that no Triton kernel can reach."""
    return None if given["x"].device.type == "cpu" else Unserved("there is a device for its kernel")


# --------------------------------------------------------------------------------------------------- norms


def _norm(c: Given, rms: bool, groups: int = 1) -> Tensor:
    """The last dim of x, in groups, with mean 0 (unless rms) and mean square 1; then weight and bias. float32."""
    x: Tensor = c["x"].float().unflatten(-1, (groups, -1))
    x = x if rms else x - x.mean(-1, keepdim=True)
    x = (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c["eps"])).flatten(-2)
    x = x if c["weight"] is None else x * c["weight"].float()
    return x if c["bias"] is None else x + c["bias"].float()


def _normed(rms: bool | None) -> Callable[[Given], Any]:
    """A norm of x and what is left beside it, with a gate g if there is one and a linear layer behind if that has
    weights. With prenorm the sum that was normed is handed back too. rms: None if the call says."""

    def compute(c: Given) -> Any:
        x, beside = c["x"], c["residual"]
        total = x.float() if beside is None else x.float() + beside.float()
        y = _norm({**c, "x": total}, c["is_rms_norm"] if rms is None else rms, c.get("num_groups", 1))
        if c.get("g") is not None:
            y = y * (torch.sigmoid if c.get("activation") == "sigmoid" else F.silu)(c["g"].float())
        y = y.to(x.dtype)
        if c.get("linear_weight") is not None:
            y = F.linear(y.to(c["linear_weight"].dtype), c["linear_weight"], c["linear_bias"])
        wide = torch.float32 if c["residual_in_fp32"] else x.dtype
        kept = wide if beside is None else beside.dtype
        return (y, total.to(kept)) if c["prenorm"] else y

    return compute


def grouped_norm(c: Given) -> Tensor:
    """Mamba-2's norm: with a gate z before or after it, and groups of a given size."""
    x, z = c["x"].float(), c["z"]
    gate = None if z is None else F.silu(z.float())
    if gate is not None and not c["norm_before_gate"]:
        x = x * gate
    groups = 1 if c["group_size"] is None else x.shape[-1] // c["group_size"]
    out = _norm({**c, "x": x}, c.get("is_rms_norm", True), groups)
    out = out * gate if gate is not None and c["norm_before_gate"] else out
    return out.to(c["x"].dtype)


def l2_norm(c: Given) -> Any:
    x = c["x"].float()
    return (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + c["eps"])).to(c["output_dtype"] or c["x"].dtype)


# -------------------------------------------------------------------------------------------- convolutions


def convolution(c: Given) -> tuple[Tensor, Tensor | None]:
    """A causal depthwise convolution. x: [B, T, D]; weight: [D, W]; states, the last W inputs: [B, D, W]."""
    x, weight = c["x"], c["weight"]
    width = weight.shape[-1]
    state = x.new_zeros(x.shape[0], x.shape[2], width) if c["initial_state"] is None else c["initial_state"]
    seen = torch.cat([state.to(x.dtype), x.transpose(1, 2)], -1)
    bias = None if c["bias"] is None else c["bias"].float()
    y = F.conv1d(seen[..., 1:].float(), weight.float()[:, None], bias, groups=x.shape[2])
    y = (y if c["activation"] is None else F.silu(y)).transpose(1, 2)
    y = (y if c["residual"] is None else y + c["residual"].float()).to(x.dtype)
    return y, seen[..., -width:].contiguous() if c["output_final_state"] else None


def convolution_step(c: Given) -> tuple[Tensor, Tensor]:
    """One token each, the state in place. x: [B, 1, D], or [1, B, D] where B sequences are packed."""
    x, cache, residual = c["x"], c["cache"], c["residual"]
    sizes = (cache.shape[0], 1, -1)
    given = {**c, "x": x.reshape(sizes), "residual": None if residual is None else residual.reshape(sizes)}
    y, new = convolution({**given, "initial_state": cache, "output_final_state": True})
    assert new is not None
    cache.copy_(new)
    return y.reshape(x.shape), cache


def token_shift(c: Given) -> Any:
    """The token before minus this one. x: [B, T, D]; cache, the token before the first: [B, 1, D] or [B, D]."""
    x = c["x"]
    before = torch.zeros_like(x[:, :1]) if c["cache"] is None else c["cache"].reshape(x.shape[0], 1, -1).to(x.dtype)
    shifted = torch.cat([before, x[:, :-1]], 1) - x
    return (shifted, x[:, -1:].contiguous()) if c["output_cache"] else shifted


# ----------------------------------------------------------------------------------- rotations, activations


def rotary(c: Given) -> Tensor | Unserved:
    """Pairs of the first R features turned by their token's angle. x: [B, T, H, D]; cos, sin: [tokens, R / 2]."""
    x, offset = c["x"], c["seqlen_offsets"]
    if c["inplace"]:
        return Unserved("a rotation in place")
    half = c["cos"].shape[1]
    places = torch.arange(x.shape[1], device=x.device)
    if isinstance(offset, Tensor):
        places = places + offset[:, None]
    else:
        places = places + offset
    cos, sin = (table[places].float()[..., None, :] for table in (c["cos"], c["sin"]))
    turned = x[..., : 2 * half].float()
    a, b = (turned[..., ::2], turned[..., 1::2]) if c["interleaved"] else turned.chunk(2, -1)
    pairs = a * cos - b * sin, a * sin + b * cos
    whole = torch.stack(pairs, -1).flatten(-2) if c["interleaved"] else torch.cat(pairs, -1)
    return torch.cat([whole.to(x.dtype), x[..., 2 * half :]], -1)


def swish(c: Given) -> Tensor:
    return F.silu(c["x"].float()).to(c["x"].dtype)


def sigmoid(c: Given) -> Tensor:
    return torch.sigmoid(c["x"].float()).to(c["x"].dtype)


def log_sigmoid(c: Given) -> Any:
    return (F.logsigmoid(c["x"].float()) / c["temperature"]).to(c["x"].dtype)


def swiglu(c: Given) -> Any:
    return (F.silu(c["x"].float()) * c["y"].float()).to(c["x"].dtype)


def swiglu_linear(c: Given) -> Tensor:
    return F.linear(swiglu(c).to(c["weight"].dtype), c["weight"], c["bias"])


# ------------------------------------------------------------------------------------------ parts of layers


def kda_gate(c: Given) -> Tensor | Unserved:
    """KDA's gate in the log domain. x: [..., H, K]."""
    made = recurrences.in_kernel({"gk": c["x"], **c})
    return made if isinstance(made, Unserved) else made["gk"].to(c["output_dtype"])


def additive_gate(c: Given) -> tuple[Tensor, Tensor, Tensor]:
    k, g, z = several.additive_gate(c["x"], c["initial_state"])
    return k.to(c["output_dtype"] or c["x"].dtype), g.to(c["gate_dtype"] or c["x"].dtype), z


def mixed_tokens(c: Given) -> tuple[Tensor | None, ...]:
    """RWKV-7: x + delta * weight for each of its weights."""
    return tuple(
        None if c[n] is None else torch.addcmul(c["x"], c["delta"], c[n]) for n in ("xr", "xw", "xk", "xv", "xa", "xg")
    )


def key_of_rwkv7(c: Given) -> Any:
    return c["x"].addcmul(c["x"] * (c["a"] - 1), c["ka"])


def corrected_output(c: Given) -> Any:
    """RWKV-7's bonus of the token itself, and its gate. x, g: [B, T, H V]; r, k: [B, T, H, K]; v: [B, T, H, V]."""
    own = ((c["r"] * c["k"] * c["r_k"]).sum(-1, keepdim=True) * c["v"]).reshape(c["x"].shape)
    return (c["x"] + own) * c["g"]


NORM = "residual=None eps={eps} prenorm=False residual_in_fp32=False"
BEFORE = "residual=None prenorm=False residual_in_fp32=False eps=1e-06"
LINEAR = "norm_weight>weight norm_bias>bias linear_weight linear_bias"
GROUPS = "eps=1e-06 group_size=None norm_before_gate=True"
WEIGHTS = "xr xw xk xv xa xg=None"


def _plain(compute: Callable[[Given], Any], text: str) -> Known:
    return known(compute, text, on_a_cpu)


SERVED: dict[str, Known] = {
    "layer_norm": _plain(_normed(None), f"x weight bias {NORM.format(eps='1e-05')} is_rms_norm=False"),
    "group_norm": _plain(_normed(None), f"x weight bias {NORM.format(eps='1e-05')} is_rms_norm=False num_groups=1"),
    "rms_norm": _plain(_normed(True), f"x weight bias {NORM.format(eps='1e-05')}"),
    "layer_norm_linear": _plain(_normed(None), f"x {LINEAR} {NORM.format(eps='1e-05')} is_rms_norm=False num_groups=1"),
    "group_norm_linear": _plain(_normed(None), f"x {LINEAR} {NORM.format(eps='1e-05')} is_rms_norm=False num_groups=1"),
    "rms_norm_linear": _plain(_normed(True), f"x {LINEAR} {NORM.format(eps='1e-05')}"),
    "layer_norm_gated": _plain(_normed(False), f"x g weight bias activation='swish' {BEFORE}"),
    "rms_norm_gated": _plain(_normed(True), f"x g weight bias activation='swish' {BEFORE}"),
    "layer_norm_swish_gate_linear": _plain(_normed(False), f"x g {LINEAR} {BEFORE}"),
    "rms_norm_swish_gate_linear": _plain(_normed(True), f"x g {LINEAR} {BEFORE}"),
    "layernorm_fn": _plain(grouped_norm, f"x weight bias z=None {GROUPS} is_rms_norm=False"),
    "rmsnorm_fn": _plain(grouped_norm, f"x weight bias z=None {GROUPS}"),
    "l2norm": _plain(l2_norm, "x eps=1e-06 output_dtype=None"),
    "causal_conv1d": _plain(
        convolution,
        "x weight=None bias=None residual=None initial_state=None output_final_state=False activation=None "
        "backend>said='triton' cu_seqlens=None cu_seqlens_cpu=None chunk_indices=None cp_context=None **",
    ),
    "causal_conv1d_update": _plain(convolution_step, "x cache residual=None weight=None bias=None activation=None"),
    "token_shift": _plain(token_shift, "x cu_seqlens=None cache=None output_cache=False chunk_indices=None"),
    "rotary_embedding": _plain(
        rotary, "x cos sin interleaved=False inplace=False seqlen_offsets=0 cu_seqlens=None chunk_indices=None"
    ),
    "swish_fwd": _plain(swish, "x output_contiguous>said=False"),
    "sigmoid_fwd": _plain(sigmoid, "x output_contiguous>said=False"),
    "logsigmoid_fwd": _plain(log_sigmoid, "x temperature=1.0 output_contiguous>said=False"),
    "swiglu_fwd": _plain(swiglu, "x y output_contiguous>said=False"),
    "swiglu_linear": _plain(swiglu_linear, "x y weight bias"),
    "fused_kda_gate": _plain(kda_gate, "g>x A_log=None dt_bias=None lower_bound=None output_dtype=float32"),
    "fused_additive_gate": _plain(
        additive_gate, "x initial_state=None cu_seqlens=None output_dtype=None gate_dtype=None"
    ),
    "fused_addcmul_rwkv7": _plain(mixed_tokens, f"hidden_states>x delta {WEIGHTS}"),
    "fused_k_rwkv7": _plain(key_of_rwkv7, "k>x a ka cu_seqlens=None cu_seqlens_cpu=None"),
    "gate_output_correction": _plain(corrected_output, "o>x r k r_k v g"),
}
