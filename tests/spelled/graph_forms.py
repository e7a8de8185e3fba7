"""One Gated-DeltaNet-like token in the forms that graphs give it: what surrounds the algebra, not the algebra itself.

All take step(state, q, k, v, g, beta) with q, k [B, H, K], v [B, H, V], g, beta [B, H] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.spelled.forms import Draw, Form, operands, outer, read
from tests.support.steps import Sizes


def _token(S: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = S * g.exp()[..., None, None]
    return S + outer(k, (v - read(S, k)) * beta[..., None])


# ------------------------------------------------------------------------------------ masks on the state


def multiplied_mask(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, keep: Tensor) -> Tensor:
    """Sequences that have ended keep their state."""
    m = keep[:, None, None, None].to(S.dtype)
    S.copy_(m * _token(S, k, v, g, beta) + (1 - m) * S)
    return read(S, q)


def chosen(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, keep: Tensor) -> Tensor:
    S.copy_(torch.where(keep[:, None, None, None], _token(S, k, v, g, beta), S))
    return read(S, q)


def reset(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, keep: Tensor) -> Tensor:
    """Sequences that begin forget what their slot held, whatever it was."""
    S.copy_(_token(S.masked_fill(~keep[:, None, None, None], 0), k, v, g, beta))
    return read(S, q)


def mixed(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_(torch.lerp(S, outer(k, v), beta[..., None, None]))
    return read(S, q)


def mixed_by_a_number(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.lerp_(_token(S, k, v, g, beta), 0.25)
    return read(S, q)


def scaled_in_place(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.mul_(g.exp()[..., None, None]).addcmul_(k[..., None], v[..., None, :], value=0.5)
    return torch.matmul(S.mT, q[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------- autocast


def autocast(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Products in bfloat16, the state in float32: what reads it is cast, and what is read."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=S.dtype == torch.float32):
        new = S * g.exp()[..., None, None]
        error = (v - torch.matmul(k.unsqueeze(-2), new).squeeze(-2)) * beta[..., None]
        S.copy_(new + torch.einsum("bhk,bhv->bhkv", k, error))
        return torch.matmul(q.unsqueeze(-2), S).squeeze(-2).to(q.dtype)


# ------------------------------------------------------------------------------------------- merged dims


def merged_lanes(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Sequences and heads as one dim of the computation."""
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    new = torch.mul(S.flatten(0, 1), g.exp()[:, None, None])
    error = (v - torch.bmm(k.unsqueeze(1), new).squeeze(1)) * beta[:, None]
    new = torch.baddbmm(new, k.unsqueeze(2), error.unsqueeze(1))
    S.copy_(new.view_as(S))
    return torch.bmm(q.unsqueeze(1), new).view(*S.shape[:2], -1)


def flat_state(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Stored as [B, H * K, V]."""
    heads = S.view(*k.shape, -1)
    S.copy_(_token(heads, k, v, g, beta).flatten(1, 2))
    return read(S.view_as(heads), q)


def flat_lanes(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Stored as [B * H, K, V]."""
    heads = S.view(*k.shape, -1)
    S.copy_(_token(heads, k, v, g, beta).flatten(0, 1))
    return read(S.view_as(heads), q)


# ------------------------------------------------------------------------------------------ transitions


def matrix(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The transition written out: (I - b k k^T) S."""
    eye = torch.eye(k.shape[-1], dtype=S.dtype)
    transition = g.exp()[..., None, None] * (eye - beta[..., None, None] * outer(k, k))
    S.copy_(transition @ S + outer(k, beta[..., None] * v))
    return read(S, q)


def matrix_on_the_right(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The same for a state stored as [B, H, V, K], with a decay of channels."""
    eye = torch.eye(k.shape[-1], dtype=S.dtype)
    transition = eye - beta[..., None, None] * outer(k, k)
    S.copy_(torch.einsum("bhvk,bhkj->bhvj", S * torch.sigmoid(q + 2).unsqueeze(-2), transition) + outer(v, k))
    return (S @ q.unsqueeze(-1)).squeeze(-1)


def diagonal_and_low_rank(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Diag(a) - b c^T with a diagonal of its own."""
    transition = torch.diag_embed(torch.sigmoid(q + 2)) - outer(k, beta[..., None] * torch.tanh(k + q) / 2)
    S.copy_(transition @ S + outer(q / 2, v))
    return read(S, q)


def two_products(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A matrix of rank two on the left, beside the decayed state; what it makes is used once more."""
    low = -beta[..., None, None] * outer(k, k) + torch.stack([q, k], -1)[..., :1] @ torch.tanh(q).unsqueeze(-2) / 4
    moved = low @ S
    S.copy_(S * g.exp()[..., None, None] + moved + outer(k, v))
    return read(S, q) + moved[..., 0, :]


# ------------------------------------------------------------------------------- lists, loops, broadcasts


def lists_of_tensors(S: Tensor, T: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """All layers by one call each."""
    states, products = [S, T], [outer(k, v), outer(q, v)]
    torch._foreach_mul_(states, 0.9)
    torch._foreach_add_(states, products, alpha=0.5)
    torch._foreach_addcmul_(states, products, [beta[..., None, None]] * 2)
    torch._foreach_lerp_(states, products, 0.25)
    return read(S, q) + read(T, k)


# -------------------------------------------------------------------------------------- several queries


def several_queries(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Grouped queries: q [B, H, n, K], one state serves n of them."""
    S.copy_(_token(S, k, v, g, beta))
    return q @ S


def grouped_queries(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The same with the state repeated for each query."""
    S.copy_(_token(S, k, v, g, beta))
    return torch.einsum("bhnk,bhnkv->bhnv", q, S[:, :, None].expand(-1, -1, q.shape[2], -1, -1))


# ------------------------------------------------------------------------------------------ several states


def one_feeds_the_next(S: Tensor, T: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What is read of the first state [.., K, V] is the key of the second, [.., V, V]."""
    S.copy_(_token(S, k, v, g, beta))
    key = torch.nn.functional.normalize(torch.tanh(read(S, q)), dim=-1)
    T.copy_(_token(T, key, v, g, beta))
    return read(T, key)


# ------------------------------------------------------------------------------------------ near-misses


def full_transition(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A matrix without the identity."""
    S.copy_(torch.tanh(outer(q, k)) @ S + outer(k, v))
    return read(S, q)


def identity_and_full(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_((torch.eye(k.shape[-1]) - torch.relu(outer(k, q))) @ S + outer(k, v))
    return read(S, q)


def function_of_identity(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_(torch.exp(torch.eye(k.shape[-1]) * beta[..., None, None]) @ S + outer(k, v))
    return read(S, q)


def shifted_identity(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Rows move up by one."""
    rows = torch.arange(k.shape[-1])
    shift = (rows[:, None] + 1 == rows[None, :]).to(S.dtype)
    S.copy_((shift - outer(k, k)) @ S + outer(k, v))
    return read(S, q)


def triangle(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    rows = torch.arange(k.shape[-1])
    S.copy_(((rows[:, None] <= rows[None, :]).to(S.dtype) - outer(k, k)) @ S + outer(k, v))
    return read(S, q)


def mixed_by_the_state(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_(torch.lerp(S, outer(k, v), torch.sigmoid(S)))
    return read(S, q)


def masked_by_both_axes(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_(torch.where(outer(q, v) > 0, S, 0.0) + outer(k, v))
    return read(S, q)


def queries_of_the_state(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """As many queries as the state has rows, made of the state itself."""
    S.copy_(_token(S, k, v, g, beta))
    return torch.softmax(S @ S.transpose(-1, -2), -1) @ v[..., :1, None].expand(*k.shape, 1)


def hgrn(h: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """A vector of channels."""
    f = torch.sigmoid(f)
    h.copy_(f * h + (1 - f) * x)
    return torch.tanh(h)


def longhorn_of_channels(S: Tensor, q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """A step size for each value channel and k k^T replaced by its diagonal: each element decays for itself."""
    S.copy_((1 - outer(k.square(), size)) * S + outer(k, size * v))
    return read(S, q)


def titans(G: Tensor, M: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Descent with momentum: two coupled matrices, the one added whole to the other."""
    error = read(M, k) - v
    G.copy_(G * beta[..., None, None] - 2 * outer(k, error))
    M.copy_(M * g.exp()[..., None, None] + G)
    return read(M, q)


def previous_product(S: Tensor, P: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The trapezoid of Mamba-3, the product of the token before kept as a matrix."""
    product = outer(k, v)
    S.copy_(S * g.exp()[..., None, None] + beta[..., None, None] * P + product)
    P.copy_(product)
    return read(S, q)


def rotated(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Pairs of columns turn into each other, as with complex gates."""
    turned = torch.stack([S[..., 0] * g.cos()[..., None] - S[..., 1], S[..., 1] * g.cos()[..., None] + S[..., 0]], -1)
    S.copy_(torch.cat([turned, S[..., 2:]], -1) + outer(k, v))
    return read(S, q)


def rotated_and_returned(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    even, odd = S[..., ::2, :], S[..., 1::2, :]
    c, s = g.cos()[..., None, None], g.sin()[..., None, None]
    new = torch.stack([c * even - s * odd, s * even + c * odd], -2).flatten(-3, -2) + outer(k, v)
    return read(new, q), new


def prompt(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k [B, H, 65, K]: more tokens than a block has."""
    S.add_(k.mT @ v)
    return q @ S


def cached(S: Tensor, W: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A window of the last values: a shift register, read by a sum over it; S is a recurrence all the same."""
    W.copy_(torch.cat([W[:, :, 1:], v.unsqueeze(2)], 2))
    S.copy_(torch.tanh(S) + outer(k, W.sum(2)))
    return read(S, q)


# ----------------------------------------------------------------------------------------------- tables


def _with_mask(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*operands("qkvgb")(s, g), torch.rand(s.B, generator=g) < 0.6)


def _queries(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(s.B, s.H, 3, s.K, generator=g), *operands("kvgb")(s, g))


def _prompt(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s.B, s.H, 65, n, generator=g) for n in (s.K, s.K, s.V))


_TOKEN = operands("qkvgb")


def _form(
    step: Callable[..., Tensor], ops: str, letters: str | tuple[str, ...] = "BHKV", inputs: Draw = _TOKEN
) -> Form:
    return Form(step.__name__, (ops,), step, (letters,), inputs)


GRAPH_FORMS = (
    _form(multiplied_mask, "RDUR", inputs=_with_mask),
    _form(chosen, "RDUR", inputs=_with_mask),
    _form(reset, "DRUR", inputs=_with_mask),
    _form(mixed, "DUUR"),
    _form(mixed_by_a_number, "RDUR"),
    _form(scaled_in_place, "DUR"),
    _form(autocast, "DRUR"),
    _form(merged_lanes, "DRUR"),
    _form(flat_state, "DRUR", ("B", "HK", "V")),
    _form(flat_lanes, "DRUR", ("BH", "K", "V")),
    _form(matrix, "DRUR"),
    _form(matrix_on_the_right, "DRUR", "BHVK"),
    _form(diagonal_and_low_rank, "RDUUR"),
    _form(two_products, "RRDUUUR"),
    Form("lists_of_tensors", ("DUDUR", "DUDUR"), lists_of_tensors, ("BHKV", "BHKV"), _TOKEN),
    _form(several_queries, "DRURRR", inputs=_queries),
    _form(grouped_queries, "DRURRR", inputs=_queries),
    Form("one_feeds_the_next", ("DRUR", "DRUR"), one_feeds_the_next, ("BHKV", "BHVV"), _TOKEN),
)

NEAR = (
    (_form(full_transition, ""), "full-transition"),
    (_form(identity_and_full, ""), "full-transition"),
    (_form(function_of_identity, ""), "full-transition"),
    (_form(shifted_identity, ""), "full-transition"),
    (_form(triangle, ""), "full-transition"),
    (_form(mixed_by_the_state, ""), "nonlinear"),
    (_form(masked_by_both_axes, ""), "full-decay"),
    (_form(queries_of_the_state, ""), "nonlinear"),
    (Form("hgrn", (), hgrn, ("BHK",), operands("qq")), "vector"),
    (_form(longhorn_of_channels, "", inputs=operands("qkvd")), "full-decay"),
    (Form("previous_product", (), previous_product, ("BHKV", "BHKV"), _TOKEN), "full-rank overwritten"),
    (_form(rotated, ""), "rotation"),
    (_form(prompt, "", inputs=_prompt), "prefill"),
    (Form("cached", (), cached, ("BHKV", "BHKV"), _TOKEN), "cache nonlinear"),
    (Form("titans", (), titans, ("BHKV", "BHKV"), operands("qkvgb")), "coupled full-rank"),
)
