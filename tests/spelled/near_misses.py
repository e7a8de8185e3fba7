"""Steps that look like a linear recurrence and are none: each must be declined, with the rule named beside it.

All take the inputs of Gated DeltaNet: step(state [B, H, K, V], q, k, v, g, beta) -> output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.steps import FAMILIES, Case, Step


def _outer(l: Tensor, r: Tensor) -> Tensor:
    return l.unsqueeze(-1) * r.unsqueeze(-2)


def _read(S: Tensor, x: Tensor) -> Tensor:
    return (S * x.unsqueeze(-1)).sum(-2)


def _decayed(S: Tensor, g: Tensor) -> Tensor:
    return S * g.exp()[..., None, None]


def tanh_of_state(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(torch.tanh(_decayed(state, g) + _outer(k, v)))
    return _read(state, q)


def clamped_state(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_((_decayed(state, g) + _outer(k, v)).clamp(-3, 3))
    return _read(state, q)


def full_decay(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(state * torch.sigmoid(_outer(k, v)) + _outer(k, v))
    return _read(state, q)


def additive_full_decay(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(state * (k.unsqueeze(-1) + v.unsqueeze(-2)) + _outer(k, v))
    return _read(state, q)


def state_in_output(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    state.copy_(_decayed(state, g) + _outer(k, v))
    return _read(state, q), state * 2


def decay_from_read(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    forget = torch.sigmoid(_read(state, q).mean(-1))
    state.copy_(state * forget[..., None, None] + _outer(k, v))
    return _read(state, q)


def decay_from_norm(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(state / (1 + state.square().sum((-1, -2), keepdim=True)) + _outer(k, v))
    return _read(state, q)


def read_after_norm(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(_decayed(state, g) + _outer(k, v))
    return _read(torch.nn.functional.normalize(state, dim=-1), q)


def read_of_abs(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(_decayed(state, g) + _outer(k, v))
    return _read(state.abs(), q)


def full_rank_update(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(_decayed(state, g) + torch.relu(_outer(k, v) + 1))
    return _read(state, q)


def shift_register(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(torch.cat([state[:, :, 1:], v.unsqueeze(-2)], dim=-2))
    return _read(state, q)


def rolled_state(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(_decayed(state, g).roll(1, dims=-1) + _outer(k, v))
    return _read(state, q)


def product_of_reads(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(state * state + _outer(k, v))
    return _read(state, q)


def overwritten(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    out = _read(state, q)
    state.copy_(_outer(k, v))
    return out


def heads_mixed(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = _decayed(state, g) + _outer(k, v)
    state.copy_(new + new.mean(1, keepdim=True))
    return _read(state, q)


def part_written(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state[:, :1].mul_(g[:, :1].exp()[..., None, None])
    state.add_(_outer(k, v))
    return _read(state, q)


def rounded_state(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_((_decayed(state, g) + _outer(k, v)).to(torch.int32).to(state.dtype))
    return _read(state, q)


def state_as_condition(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state.copy_(torch.where(state > 0, state, _decayed(state, g)) + _outer(k, v))
    return _read(state, q)


def old_state_read_late(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = _decayed(state, g) + _outer(k, v)
    key = torch.sigmoid(_read(new.transpose(-1, -2), v))  # runs along K
    state.copy_(new)
    return _read(state * 1.0, q) + _read(new, q * key)


def read_of_old_with_new(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = _decayed(state, g) + _outer(k, v)
    weight = torch.sigmoid(_read(new, q).mean(-1, keepdim=True))
    out = _read(state, q * weight)
    state.copy_(new)
    return out


NEAR_MISSES: dict[str, tuple[Step, set[str]]] = {
    "tanh": (tanh_of_state, {"nonlinear"}),
    "clamp": (clamped_state, {"nonlinear"}),
    "full decay": (full_decay, {"full-decay"}),
    "additive full decay": (additive_full_decay, {"full-decay"}),
    "state in output": (state_in_output, {"escapes"}),
    "decay from read": (decay_from_read, {"decay-from-read"}),
    "decay from norm": (decay_from_norm, {"nonlinear"}),
    "read after norm": (read_after_norm, {"nonlinear"}),
    "read of abs": (read_of_abs, {"nonlinear"}),
    "full rank": (full_rank_update, {"full-rank"}),
    "shift register": (shift_register, {"cache"}),
    "roll": (rolled_state, {"nonlinear", "partial"}),
    "square": (product_of_reads, {"nonlinear"}),
    "overwritten": (overwritten, {"overwritten"}),
    "heads mixed": (heads_mixed, {"both-axes", "full-rank", "layout", "opaque-map", "read-order", "three-axes"}),
    "part written": (part_written, {"partial"}),
    "rounded": (rounded_state, {"nonlinear"}),
    "condition": (state_as_condition, {"nonlinear"}),
    "old read needs new": (read_of_old_with_new, {"read-order"}),
}


def near_misses() -> list[tuple[Case, set[str]]]:
    """Cases, and the rules that may decline each."""
    inputs = FAMILIES["gated_delta"][2]
    return [(Case(name, "", step, inputs), rules) for name, (step, rules) in NEAR_MISSES.items()]
