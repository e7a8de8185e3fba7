"""One-token steps of the linear-attention family, written plainly from their equations: what must be buffered.

Every `Form` is a function step(states, *inputs) -> output that updates its states in place. S is [B, H, K, V] unless
said otherwise, S^T q is read as the sum over K. Nothing here knows about the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.steps import Sizes, gates, unit

SIZES = Sizes(2, 3, 4, 5)
SLOTS = 6  # of the two-pass forms (GSA, ABC)
Draw = Callable[[Sizes, torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Form:
    """step(*states, *inputs); kept: the ops on each of its states in turn, "" for one that stays as it is.

    states: for each the letters of its dims (B, H, K, V of Sizes, M slots), several for a merged dim; inputs: the
    operands of one token.
    """

    name: str
    kept: tuple[str, ...]
    step: Callable[..., Tensor]
    states: tuple[str | tuple[str, ...], ...]
    inputs: Draw

    def start(self, generator: torch.Generator, sizes: Sizes = SIZES) -> list[Tensor]:
        """Random states."""
        return [torch.randn([_size(sizes, dim) for dim in dims], generator=generator) for dims in self.states]


def _size(sizes: Sizes, dim: str) -> int:
    return math.prod(SLOTS if letter == "M" else getattr(sizes, letter) for letter in dim)


# -------------------------------------------------------------------------------------------------- words


def outer(l: Tensor, r: Tensor) -> Tensor:
    return l.unsqueeze(-1) * r.unsqueeze(-2)


def read(S: Tensor, x: Tensor) -> Tensor:
    """S^T x."""
    return (S * x.unsqueeze(-1)).sum(-2)


def rows(a: Tensor) -> Tensor:
    """One factor a row: Diag(a) S."""
    return a.unsqueeze(-1)


# ------------------------------------------------------------------------------------------------ additive


def linear_attn(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S.add_(torch.einsum("bhk,bhv->bhkv", k, v))
    return torch.einsum("bhk,bhkv->bhv", q, S)


def linear_attn_normalised(S: Tensor, z: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The normaliser z sums the keys, each read is divided by z^T q."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    S.add_(torch.einsum("bhk,bhv->bhkv", k, v))
    z.add_(k)
    return torch.einsum("bhk,bhkv->bhv", q, S) / ((z * q).sum(-1, keepdim=True) + 1e-10)


def simple_gla(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    S.copy_(S * g.exp()[..., None, None] + outer(k, v))
    return read(S, q * q.shape[-1] ** -0.5)


def retention(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads decay by constants of the layer."""
    decay = 1 - 2.0 ** (-1 - torch.arange(S.shape[1], dtype=S.dtype))
    S.copy_(decay[:, None, None] * S + k.unsqueeze(-1) @ v.unsqueeze(-2))
    return (q.unsqueeze(-2) @ S).squeeze(-2)


def lightning(S: Tensor, q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """As MiniMax has it: slope [H, 1, 1] of the layer."""
    S.copy_(torch.exp(-slope) * S + torch.matmul(k.unsqueeze(-2).transpose(-1, -2), v.unsqueeze(-2)))
    return torch.matmul(q.unsqueeze(-2), S)[..., 0, :]


def gla(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    S.mul_(rows(g.exp())).add_(outer(k, v))
    return read(S, q)


def hgrn2(S: Tensor, q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    """The key is what the forget gate leaves."""
    f = 0.3 + 0.7 * torch.sigmoid(f)
    S.copy_(rows(f) * S + outer(1 - f, v))
    return read(S, torch.sigmoid(q))


def rwkv6(S: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The output reads the old state, and the present token with a bonus."""
    kv = outer(k, v)
    out = read(S + u[..., None] * kv, r)
    S.copy_(rows(torch.exp(-torch.exp(w))) * S + kv)
    return out


def gsa(K_: Tensor, V_: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Two passes over slots with a softmax between: K_ [B, H, K, M], V_ [B, H, M, V]."""
    K_.copy_(K_ * g.exp().unsqueeze(-2) + outer(k, s))
    p = torch.softmax(read(K_, q), -1)
    V_.copy_(V_ * g.exp().unsqueeze(-1) + outer(s, v))
    return read(V_, p)


def abc(K_: Tensor, V_: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """The same without a decay: writes are normalised instead."""
    s = torch.softmax(s, -1)
    K_.add_(torch.einsum("bhk,bhm->bhkm", k, s))
    p = torch.einsum("bhk,bhkm->bhm", q, K_).softmax(-1)
    V_.add_(torch.einsum("bhm,bhv->bhmv", s, v))
    return torch.einsum("bhm,bhmv->bhv", p, V_)


# -------------------------------------------------------------------------------------------------- deltas


def delta_rule(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    v = (v - read(S, k)) * beta[..., None]
    S.add_(outer(k, v))
    return read(S, q)


def gated_delta_rule(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = S.clone() * g.exp()[..., None, None]
    v = (v.clone() - read(new.clone(), k)) * beta[..., None]
    new = new.clone() + outer(k, v)
    S.copy_(new)
    return torch.einsum("bhd,bhdm->bhm", q, new)


def comba(S: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The error is read with a key of its own."""
    new = S * g.exp()[..., None, None]
    new = new + outer(k, (v - read(new, p)) * beta[..., None])
    S.copy_(new)
    return read(new, q)


def kda(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = S * rows(g.exp())
    error = v - (k[..., None] * new).sum(-2)
    new = new + torch.einsum("bhk,bhv->bhkv", beta[..., None] * k, error)
    S.copy_(new)
    return torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, new)


def gdn2(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Channels of the key (b) and of the value (w) have gates of their own."""
    new = S * rows(g.exp())
    new = new + outer(k, w * v - read(new, b * k))
    S.copy_(new)
    return read(new, q)


def gated_delta_product(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """n delta steps a token: k [B, H, n, K], v [B, H, n, V], beta [B, H, n]; beta multiplies the whole product."""
    new = S * g.exp()[..., None, None]
    for j in range(k.shape[2]):
        error = v[:, :, j] - read(new, k[:, :, j])
        new = new + k[:, :, j, :, None] * error[..., None, :] * beta[:, :, j, None, None]
    S.copy_(new)
    return read(new, q)


def iplr(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Identity plus low rank: S' = S + b (a^T S) + k v^T."""
    kept = (S * a.unsqueeze(-1)).sum(-2, keepdim=True)
    S.copy_(S + b.unsqueeze(-1) * kept + outer(k, v))
    return read(S, q)


def dplr(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Diagonal plus low rank; a reads the state before its decay."""
    kept = (S * a.unsqueeze(-1)).sum(-2, keepdim=True)
    S.copy_(S * rows(g.exp()) + b.unsqueeze(-1) * kept + outer(k, v))
    return read(S, q)


def rwkv7(S: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Stored as [B, H, V, K], the rank-one transition in one einsum of three."""
    kept = torch.einsum("bhvk,bhk,bhj->bhvj", S, a, b)
    S.copy_(S * torch.exp(-torch.exp(w))[..., None, :] + kept + torch.einsum("bhk,bhv->bhvk", k, v))
    return torch.einsum("bhk,bhvk->bhv", r, S)


def rwkv7_products(S: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As RWKV-LM writes it: the transition is made as a matrix, S * w + S @ ab + vk."""
    vk, ab = v.unsqueeze(-1) @ k.unsqueeze(-2), a.unsqueeze(-1) @ b.unsqueeze(-2)
    S.copy_(S * torch.exp(-torch.exp(w)).unsqueeze(-2) + S @ ab + vk)
    return (S @ r.unsqueeze(-1)).squeeze(-1)


def gated_oja_rule(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Delta and decay on the value axis."""
    new = S * g.exp().unsqueeze(-2)
    error = k - (new * v.unsqueeze(-2)).sum(-1)
    new = new + outer(error, beta[..., None] * v)
    S.copy_(new)
    return read(new, q)


def longhorn(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The closed form of its online regression: a step size for each value channel."""
    size = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    S.add_(outer(k, size * (v - read(S, k))))
    return read(S, q)


def longhorn_diagonal(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """k k^T replaced by its diagonal; one step size a head (one a channel would make the decay dense)."""
    size = beta / (1 + beta * k.square().sum(-1))
    S.copy_((1 - size[..., None] * k.square())[..., None] * S + outer(k, size[..., None] * v))
    return read(S, q)


# --------------------------------------------------------------------------------- more than one memory


def precond_gated_delta(
    S: Tensor, A: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ga: Tensor, ba: Tensor
) -> Tensor:
    """A vector state preconditions the write key."""
    A.copy_(A * ga.exp()[..., None] + ba[..., None] * k.square())
    squashed = k / (1 + A.abs()).sqrt()
    new = S * g.exp()[..., None, None]
    new = new + outer(squashed, beta[..., None] * (v - read(new, k)))
    S.copy_(new)
    return read(new, q)


def precond_kda(
    S: Tensor, A: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ga: Tensor, ba: Tensor
) -> Tensor:
    A.copy_(A * ga.exp()[..., None] + ba[..., None] * k * k)
    new = S * rows(g.exp())
    new = new + outer(k * torch.rsqrt(1 + A.abs()), (v - read(new, k)) * beta[..., None])
    S.copy_(new)
    return read(new, q)


def ttt(S: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """One step of gradient descent on |LN(S^T k + b) - (v - k)|^2: nonlinear in the read. K = V."""
    z = read(S, k) + b
    width = z.shape[-1]
    deviation = torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + 1e-6)
    hat = (z - z.mean(-1, keepdim=True)) / deviation
    error = (w * hat + c - (v - k)) * w
    inner = width * error - error.sum(-1, keepdim=True) - hat * (error * hat).sum(-1, keepdim=True)
    gradient = inner / (width * deviation)
    S.sub_(outer(eta[..., None] * k, gradient))
    b.sub_(eta[..., None] * gradient)
    return read(S, q) + b


def ttt_layer_norm(S: Tensor, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The same target, its gradient cut at the normalised prediction."""
    error = torch.nn.functional.layer_norm(read(S, k), v.shape[-1:]) * w + c - v
    S.sub_(outer(k, eta[..., None] * w * error))
    return torch.nn.functional.layer_norm(read(S, q), v.shape[-1:])


# ------------------------------------------------------------------------------------------------ inputs


def operands(letters: str) -> Draw:
    """One random input a letter of `_OPERANDS`."""

    def draw(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(_OPERANDS[letter](s, g) for letter in letters)

    return draw


_OPERANDS: dict[str, Callable[[Sizes, torch.Generator], Tensor]] = {
    # along K, V and the slots
    "q": lambda s, g: torch.randn(s.B, s.H, s.K, generator=g),
    "v": lambda s, g: torch.randn(s.B, s.H, s.V, generator=g),
    "s": lambda s, g: torch.randn(s.B, s.H, SLOTS, generator=g),
    # vectors of length 1 along K and V
    "k": lambda s, g: unit(g, s.B, s.H, s.K),
    "j": lambda s, g: unit(g, s.B, s.H, s.V),
    # log-decays of heads, along K, V and the slots; as exp(-exp(w))
    "g": lambda s, g: gates(g, s.B, s.H).log(),
    "G": lambda s, g: gates(g, s.B, s.H, s.K).log(),
    "V": lambda s, g: gates(g, s.B, s.H, s.V).log(),
    "M": lambda s, g: gates(g, s.B, s.H, SLOTS).log(),
    "w": lambda s, g: torch.log(-gates(g, s.B, s.H, s.K).log()),
    # between 0 and 1: of heads, along K and V; the slopes of a layer
    "b": lambda s, g: torch.rand(s.B, s.H, generator=g),
    "c": lambda s, g: torch.rand(s.B, s.H, s.K, generator=g),
    "d": lambda s, g: torch.rand(s.B, s.H, s.V, generator=g),
    "l": lambda s, g: torch.rand(s.H, 1, 1, generator=g),
    # parameters of the layer along K and V
    "u": lambda s, g: torch.randn(s.H, s.K, generator=g),
    "z": lambda s, g: torch.randn(s.H, s.V, generator=g),
}


def several(n: int) -> Draw:
    """q, n keys and values, a decay, n betas."""

    def draw(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
        q, decay = operands("qg")(s, g)
        k, v = unit(g, s.B, s.H, n, s.K), torch.randn(s.B, s.H, n, s.V, generator=g)
        return q, k, v, decay, torch.rand(s.B, s.H, n, generator=g)

    return draw


def low_rank(letters: str) -> Draw:
    """Inputs followed by a and b = -beta a of a rank-one transition."""

    def draw(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
        a = unit(g, s.B, s.H, s.K)
        return (*operands(letters)(s, g), a, -a * torch.rand(s.B, s.H, 1, generator=g))

    return draw


def forms() -> Iterable[Form]:
    """All of them, with the ops each must lift to."""
    yield from (Form(step.__name__, kept, step, states, operands(x)) for step, kept, states, x in _PLAIN)
    for n in (2, 3):
        yield Form(f"gated_delta_product{n}", ("D" + n * "RU" + "R",), gated_delta_product, ("BHKV",), several(n))
    yield Form("iplr", ("RUUR",), iplr, ("BHKV",), low_rank("qkv"))
    yield Form("dplr", ("RDUUR",), dplr, ("BHKV",), low_rank("qkvG"))
    for step in (rwkv7, rwkv7_products):
        yield Form(step.__name__, ("RDUUR",), step, ("BHVK",), low_rank("qkvw"))


_ONE = ("BHKV",)
_PLAIN: tuple[tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...], str], ...] = (
    (linear_attn, ("UR",), _ONE, "qkv"),
    (linear_attn_normalised, ("UR", ""), ("BHKV", "BHK"), "qkv"),
    (simple_gla, ("DUR",), _ONE, "qkvg"),
    (retention, ("DUR",), _ONE, "qkv"),
    (lightning, ("DUR",), _ONE, "qkvl"),
    (gla, ("DUR",), _ONE, "qkvG"),
    (hgrn2, ("DUR",), _ONE, "qqv"),
    (rwkv6, ("RDU",), _ONE, "qkvwu"),
    (gsa, ("DUR", "DUR"), ("BHKM", "BHMV"), "qkvsM"),
    (abc, ("UR", "UR"), ("BHKM", "BHMV"), "qkvs"),
    (delta_rule, ("RUR",), _ONE, "qkvb"),
    (gated_delta_rule, ("DRUR",), _ONE, "qkvgb"),
    (comba, ("DRUR",), _ONE, "qkvkgb"),
    (kda, ("DRUR",), _ONE, "qkvGb"),
    (gdn2, ("DRUR",), _ONE, "qkvGcd"),
    (gated_oja_rule, ("DRUR",), _ONE, "qqjVb"),
    (longhorn, ("RUR",), _ONE, "qkvd"),
    (longhorn_diagonal, ("DUR",), _ONE, "qkvb"),
    (precond_gated_delta, ("DRUR", ""), ("BHKV", "BHK"), "qkvgbgb"),
    (precond_kda, ("DRUR", ""), ("BHKV", "BHK"), "qkvGbgb"),
    (ttt, ("RUR", ""), ("BHKV", "BHV"), "qkvbzz"),
    (ttt_layer_norm, ("RUR",), _ONE, "qkvbzz"),
)
