"""The states of T tokens at once by an associative scan, and what is read of them: T tokens in one graph.

All take step(state [B, H, K, V], q, k [B, T, H, K], v [B, T, H, V], g, beta [B, T, H]) -> output [B, T, H, V].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan, associative_scan_op

from tests.spelled.forms import Form, outer
from tests.support.steps import Sizes, gates, unit

Pair = tuple[Tensor, Tensor]
scan = partial(associative_scan, combine_mode="generic")


def combine(x: Pair, y: Pair) -> Pair:
    return x[0] * y[0], y[0] * x[1] + y[1]


def first(x: Tensor) -> Tensor:
    """Tokens in front."""
    return x.transpose(0, 1)


def read_all(states: Tensor, q: Tensor) -> Tensor:
    """[T, B, H, K, V] by one query each."""
    return first((states * first(q)[..., None]).sum(-2))


def gated(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The state comes in afterwards; all elements have its shape."""
    decay = first(g).exp()[..., None, None].expand(-1, *S.shape).contiguous()
    kept, added = scan(combine, (decay, first(outer(k, v)).contiguous()), 0)
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def gla(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A decay of channels, the scan along dim 1, an einsum that reads."""
    decay = (g[..., None] * torch.sigmoid(k)).exp()[..., None]
    kept, added = scan(combine, (decay, torch.einsum("bthk,bthv->bthkv", k, beta[..., None] * v)), 1)
    states = kept * S[:, None] + added
    S.copy_(states[:, -1])
    return torch.einsum("bthk,bthkv->bthv", q, states)


def state_in_the_first(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The old state is added to the first element."""
    decay, added = first(g).exp()[..., None, None], first(outer(k, v))
    added = torch.cat([added[:1] + decay[:1] * S, added[1:]])
    _, states = scan(combine, (decay, added), 0)
    S.copy_(states[-1])
    return read_all(states, q)


def state_added_in_place(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    decay, added = first(g).exp()[..., None, None], first(outer(k, v)).contiguous()
    added[0] += decay[0] * S
    states = scan(combine, (decay, added), 0)[1]
    S.copy_(states[-1])
    return read_all(states, q)


def state_in_front(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The old state is an element of its own."""
    decay = first(g).exp()[..., None, None]
    decay = torch.cat([torch.ones_like(decay[:1]), decay])
    states = scan(combine, (decay, torch.cat([S[None], first(outer(k, v))])), 0)[1][1:]
    S.copy_(states[-1])
    return read_all(states, q)


def logarithms(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gates are summed up, not multiplied."""
    sums, added = scan(
        lambda x, y: (x[0] + y[0], y[0].exp() * x[1] + y[1]), (first(g)[..., None, None], first(outer(k, v))), 0
    )
    states = sums.exp() * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def running_products(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The old state by products of its own."""
    decay = first(g).exp()[..., None, None]
    added = scan(combine, (decay, first(outer(k, v))), 0)[1]
    states = added + decay.cumprod(0) * S
    S.copy_(states[-1])
    return read_all(states, q)


def running_sums(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    decay = first(g).exp()[..., None, None]
    added = scan(combine, (decay, first(outer(k, v))), 0)[1]
    states = added + first(g.cumsum(1)).exp()[..., None, None] * S
    S.copy_(states[-1])
    return read_all(states, q)


def retention(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One decay for each head, the same for all tokens."""
    decay = (1 - 2.0 ** (-2 - torch.arange(S.shape[1], dtype=S.dtype)))[:, None, None]
    kept, added = scan(combine, (decay.expand(q.shape[1], 1, -1, 1, 1), first(outer(k, v))), 0)
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def no_decay(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    states = S + scan(lambda x, y: x + y, first(outer(k, v)), 0)
    S.copy_(states[-1])
    return read_all(states, q)


def as_an_op(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What combine_mode="pointwise" captures."""
    given = (first(g).exp()[..., None, None].expand(-1, *S.shape), first(outer(k, v)))
    kept, added = associative_scan_op(lambda a, b, c, d: (a * c, c * b + d), given, ())
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def unrolled(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Stacked by hand, then read at once."""
    states, last = [], S
    for t in range(q.shape[1]):
        last = last * g[:, t].exp()[..., None, None] + outer(k[:, t], v[:, t])
        states.append(last)
    S.copy_(last)
    return torch.einsum("bhtk,bhtkv->bthv", q.transpose(1, 2), torch.stack(states, 2))


# ------------------------------------------------------------------------------------------ near-misses


def greatest(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    states = torch.maximum(S, scan(torch.maximum, first(outer(k, v)), 0))
    S.copy_(states[-1])
    return read_all(states, q)


def mixed_tokens(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The states of all tokens are added up."""
    states = S + scan(lambda x, y: x + y, first(outer(k, v)), 0)
    S.copy_(states[-1])
    return read_all(states.sum(0, keepdim=True), q[:, :1]).expand(-1, q.shape[1], -1, -1).clone()


def states_returned(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    states = S + scan(lambda x, y: x + y, first(outer(k, v)), 0)
    S.copy_(states[-1])
    return first(states[..., 0, :]).contiguous()


def full_decay(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    kept, added = scan(combine, (first(torch.sigmoid(outer(q, v))), first(outer(k, v))), 0)
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def full_update(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    kept, added = scan(combine, (first(g).exp()[..., None, None], first(torch.relu(outer(k, v)))), 0)
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(states, q)


def norms(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    kept, added = scan(combine, (first(g).exp()[..., None, None], first(outer(k, v))), 0)
    states = kept * S + added
    S.copy_(states[-1])
    return read_all(torch.nn.functional.normalize(states, dim=-1), q)


def several(tokens: int) -> Callable[[Sizes, torch.Generator], tuple[Tensor, ...]]:
    """Operands of several tokens, with gates that remember."""

    def draw(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
        lanes = (s.B, tokens, s.H)
        q, k = unit(g, *lanes, s.K), unit(g, *lanes, s.K)
        beta = torch.sigmoid(torch.randn(lanes, generator=g))
        return q, k, torch.randn(*lanes, s.V, generator=g), gates(g, *lanes).log(), beta

    return draw


STEPS = (
    gated, gla, state_in_the_first, state_added_in_place, state_in_front, logarithms, running_products, running_sums,
    retention, no_decay, as_an_op, unrolled,
)  # fmt: skip
CAPTURED = tuple(step for step in STEPS if step is not as_an_op)  # which is written out on Dynamo's graph
NEAR = {
    greatest: "", mixed_tokens: "wider-read", states_returned: "partial", full_decay: "full-rank",
    full_update: "full-rank", norms: "nonlinear",
}  # fmt: skip


def form(step: Callable[..., Tensor], tokens: int) -> Form:
    return Form(step.__name__, ("UR" if step is no_decay else "DUR",), step, ("BHKV",), several(tokens))
