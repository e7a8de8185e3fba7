"""Recurrences whose calls take a block of tokens: one product with the state for all reads, one for all updates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

B, H, K, V = 2, 3, 8, 12
Step = Callable[..., Tensor]


def linear(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Every token reads all tokens of its block."""
    S.add_(k.mT @ v)
    return q @ S


def gated(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One decay a block, and one of each row behind the update."""
    S.mul_(g[..., :1, None]).add_(torch.einsum("bhtk,bhtv->bhkv", k, v)).mul_(g[..., 1, None, None])
    return 0.5 * torch.einsum("bhtk,bhkv->bhtv", q, S)


def retention(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Chunkwise, with a decay for each token (arXiv 2307.08621, section 2.3)."""
    c = g.log().cumsum(-1)
    inside = (c[..., :, None] - c[..., None, :]).tril().exp().tril() * (q @ k.mT)
    out = (q * c.exp()[..., None]) @ S + inside @ v
    S.mul_(c[..., -1, None, None].exp()).add_((k * (c[..., -1:] - c).exp()[..., None]).mT @ v)
    return out


def delta(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule in chunks (arXiv 2406.06484, equations 8 to 11)."""
    scaled, eye = k * g[..., None], torch.eye(k.shape[-2], dtype=S.dtype)
    solved = torch.linalg.solve_triangular(
        (scaled @ k.mT).tril(-1) + eye, torch.cat([scaled, v * g[..., None]], -1), upper=False
    )
    w, u = solved.split([K, V], -1)
    new = u - w @ S
    out = q @ S + (q @ k.mT).tril() @ new
    S.add_(k.mT @ new)
    return out


def batched(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """All tokens take one gradient step from the same state, and read where it leads to."""
    error = (v - k @ S) * g[..., None]
    S.add_(torch.bmm(k.mT.reshape(-1, K, k.shape[2]), error.flatten(0, 1)).view_as(S))
    return torch.bmm(q.reshape(B * H, -1, K), S.reshape(B * H, K, V)).unflatten(0, (B, H))


def columns(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Reads over the other axis, of a state whose columns forget."""
    S.mul_(g[..., :1, None] * v[..., 0, None, :].sigmoid()).add_(k.mT @ v)
    return v @ S.mT


def once_beside(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Something is added once beside what each token adds: four tokens are taken apart instead."""
    S.add_(k.mT @ v).add_(k[..., 0, :, None] * v[..., 1, None, :])
    return q @ S


def mixed_after_the_read(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What one token stores depends on what others read."""
    S.add_(k.mT @ ((q @ k.mT).tril() @ (k @ S)))
    return q @ S


def twice(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A second block that begins where the first one ends."""
    S.add_(k.mT @ v)
    out = q @ S
    S.add_(v.mT[..., :K, :] @ (v - k @ S))
    return out


STEPS = {f.__name__: f for f in (linear, gated, retention, delta, batched, columns)}
NONE = {f.__name__: f for f in (once_beside, mixed_after_the_read, twice)}


def operands(tokens: int, g: torch.Generator) -> list[Tensor]:
    q, k, v = (torch.randn(B, H, tokens, n, generator=g) for n in (K, K, V))
    return [q, normalize(k, dim=-1), v, 0.5 + 0.5 * torch.rand(B, H, tokens, generator=g)]
