"""Fused functions of other libraries: opaque to Dynamo, replaced by the recurrence they hide, then lifted.

The libraries are not installed: modules of their names hold functions of their signatures that Dynamo cannot trace, as
theirs, and that compute the documented recurrence token by token.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, silu, softplus

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.integrations.functions import substitution
from tests.support.oracle import check, check_steps

FAST = {"inner": "eager", "target": "aten", "flush": 4, "capacity": 20}
B, H, K, V = 2, 3, 4, 5
CALLS = 6


def _tokens(q: Tensor, v: Tensor, S: Tensor, token: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> tuple:
    outs, S = [], S.to(_wide(v))
    for t in range(q.shape[1]):
        S, out = token(S, t)
        outs.append(out)
    return torch.stack(outs, 1).to(v.dtype), S


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., None] * v[..., None, :]


def _read(S: Tensor, x: Tensor) -> Tensor:
    return (S * x[..., None]).sum(-2)


def fused_recurrent_gla(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, **_):
    scale = K**-0.5 if scale is None else scale

    def token(S, t):
        S = S * gk[:, t].exp()[..., None] if gk is not None else S
        S = S * gv[:, t].exp()[..., None, :] if gv is not None else S
        S = S + _outer(k[:, t], v[:, t])
        return S, _read(S, q[:, t] * scale)

    return _tokens(q, v, initial_state, token)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, **_):
    return fused_recurrent_gla(q, k, v, g, None, scale, initial_state, output_final_state)


def fused_recurrent_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, **_):
    gate = g if g is not None else g_gamma.expand(q.shape[:3])
    return fused_recurrent_gla(q, k, v, gate[..., None].expand_as(k), None, scale, initial_state)


def fused_recurrent_retention(q, k, v, scale=None, initial_state=None, **_):
    gamma = (1 - 2.0 ** (-5.0 - torch.arange(H, dtype=torch.float32))).log()
    return fused_recurrent_simple_gla(q, k, v, None, gamma, scale, initial_state)


def fused_recurrent_gated_delta_rule(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, **_):
    def token(S, t):
        S = S * g[:, t].exp()[..., None, None] if g is not None else S
        S = S * gk[:, t].exp()[..., None] if gk is not None else S
        rate = beta[:, t] if beta.dim() == 4 else beta[:, t, :, None]
        S = S + _outer(k[:, t], (v[:, t] - _read(S, k[:, t])) * rate)
        return S, _read(S, q[:, t] * K**-0.5)

    return _tokens(q, v, initial_state, token)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, **_):
    return fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=initial_state)


def fused_recurrent_kda(q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, **_):
    return fused_recurrent_gated_delta_rule(q, k, v, gk=g, beta=beta, initial_state=initial_state)


def fused_recurrent_delta_rule(q, k, v, beta=None, scale=None, initial_state=None, **_):
    return fused_recurrent_gated_delta_rule(q, k, v, beta=beta, initial_state=initial_state)


def fused_recurrent_comba(q, k, p, v, g, beta=None, scale=None, initial_state=None, **_):
    def token(S, t):
        error = (v[:, t] - _read(S, p[:, t])) * (1 if beta is None else beta[:, t, :, None])
        S = S * g[:, t].exp()[..., None, None] + _outer(k[:, t], error)
        return S, _read(S, q[:, t] * K**-0.5)

    return _tokens(q, v, initial_state, token)


def fused_recurrent_rwkv7(r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=True, **_):
    def token(S, t):
        old = _read(S, a[:, t])
        S = S * w[:, t].exp()[..., None] + _outer(k[:, t], v[:, t]) + _outer(b[:, t], old)
        return S, _read(S, r[:, t] * K**-0.5)

    return _tokens(r, v, initial_state, token)


def fused_recurrent_rwkv6(r, k, v, w, u, scale=None, initial_state=None, **_):
    def token(S, t):
        new = _outer(k[:, t], v[:, t])
        out = _read(S + u[..., None] * new, r[:, t] * K**-0.5)
        return S * w[:, t].exp()[..., None] + new, out

    return _tokens(r, v, initial_state, token)


FLA = {
    f.__name__: f
    for f in (
        fused_recurrent_gla, chunk_gla, fused_recurrent_simple_gla, fused_recurrent_retention,
        fused_recurrent_gated_delta_rule, chunk_gated_delta_rule, fused_recurrent_kda, fused_recurrent_delta_rule,
        fused_recurrent_comba, fused_recurrent_rwkv7, fused_recurrent_rwkv6,
    )
}  # fmt: skip


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    step = softplus(dt + dt_bias) if dt_softplus else dt
    groups = state.shape[1] // B.shape[1]
    B, C = (y.repeat_interleave(groups, 1) for y in (B, C))
    state.copy_(state * (step[..., None] * A).exp() + (step * x)[..., None] * B[:, :, None])
    return ((state * C[:, :, None]).sum(-1) + x * D) * silu(z)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False
):  # fmt: skip
    """Outputs in the dtype of x, states in float32; D: [H] or [H, P]."""
    wide = _wide(x)
    step = softplus(dt.to(wide) + dt_bias)
    groups = x.shape[2] // B.shape[2]
    B, C = (y.to(wide).repeat_interleave(groups, 2) for y in (B, C))

    def token(S, t):
        S = S * (step[:, t] * A)[..., None, None].exp() + _outer((step[..., None] * x.to(wide))[:, t], B[:, t])
        return S, (S * C[:, t, :, None]).sum(-1)

    out, S = _tokens(x.to(wide), x.to(wide), initial_states, token)
    out = (out + x.to(wide) * (D if D.dim() == 2 else D[:, None])) * silu(z.to(wide))
    return out.to(x.dtype), S


MAMBA = {f.__name__: f for f in (selective_state_update, mamba_chunk_scan_combined)}


@pytest.fixture
def libraries() -> Iterator[dict[str, Any]]:
    """Functions by name, from modules of the libraries' names."""
    held: dict[str, Any] = {}
    for module, known in (("fla.ops", FLA), ("mamba_ssm.ops", MAMBA)):
        sys.modules[module] = types.ModuleType(module)
        for name, function in known.items():
            function.__module__ = module
            held[name] = torch.compiler.disable(function)
            setattr(sys.modules[module], name, held[name])
        substitution._searched.discard(module)
    substitution.watch()
    yield held
    for module in ("fla.ops", "mamba_ssm.ops"):
        del sys.modules[module]
        substitution._searched.discard(module)


class Draws:
    """Random arguments of one call, by letter."""

    def __init__(self, tokens: int, generator: torch.Generator) -> None:
        self.tokens, self.g = tokens, generator

    def __getitem__(self, kind: str) -> Tensor:
        sizes = {"k": (K,), "v": (V,), "s": ()}[kind[-1]]
        shape = (B, self.tokens, H, *sizes)
        if kind.startswith("unit"):
            return normalize(torch.randn(shape, generator=self.g), dim=-1)
        if kind.startswith("gate"):
            return -torch.rand(shape, generator=self.g)
        return torch.rand(shape, generator=self.g) if kind == "s" else torch.randn(shape, generator=self.g)


CASES: dict[str, tuple[str, str, dict[str, str], str]] = {  # name -> function, kinds in order, keyword kinds, signature
    "gla": ("fused_recurrent_gla", "k k v gate-k", {}, "DUR"),
    "gla of values": ("fused_recurrent_gla", "k k v", {"gv": "gate-v"}, "DUR"),
    "linear": ("fused_recurrent_gla", "k k v", {}, "UR"),
    "gla in chunks": ("chunk_gla", "k k v gate-k", {}, "DUR"),
    "simple gla": ("fused_recurrent_simple_gla", "k k v gate-s", {}, "DUR"),
    "retention": ("fused_recurrent_retention", "k k v", {}, "DUR"),
    "gated delta rule": ("fused_recurrent_gated_delta_rule", "k unit-k v gate-s", {"beta": "s"}, "DRUR"),
    "gated delta rule in chunks": ("chunk_gated_delta_rule", "k unit-k v gate-s s", {}, "DRUR"),
    "kda": ("fused_recurrent_kda", "k unit-k v gate-k s", {}, "DRUR"),
    "delta rule": ("fused_recurrent_delta_rule", "k unit-k v s", {}, "RUR"),
    "comba": ("fused_recurrent_comba", "k unit-k unit-k v gate-s s", {}, "RDUR"),
    "comba without beta": ("fused_recurrent_comba", "k unit-k unit-k v gate-s", {}, "RDUR"),
    "rwkv7": ("fused_recurrent_rwkv7", "k gate-k k v unit-k unit-k", {}, "RDUUR"),
}  # fmt: skip


def compare(step: Callable[..., Tensor], state: Tensor, draw: Callable[[], list[Tensor]]) -> None:
    """CALLS calls of the compiled step, the eager one and the eager one in float64."""
    dtypes = (torch.float32, torch.float32, torch.float64)
    states = [state.to(d).clone() for d in dtypes]
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(CALLS):
            given = draw()
            for call, S, dtype, kept in zip((compiled, step, step), states, dtypes, outs, strict=True):
                kept.append(call(S, *(x.to(dtype) for x in given)))
    check_steps(*outs, "outputs")
    check(states[0] + 0, states[1], states[2], "state")


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_flash_linear_attention(name: str, tokens: int, libraries: dict[str, Any], records: list[GraphRecord]) -> None:
    function, kinds, named, signature = CASES[name]
    g = torch.Generator().manual_seed(0)

    def step(S: Tensor, *given: Tensor) -> Tensor:
        keywords = dict(zip(named, given[len(given) - len(named) :], strict=True))
        out, new = libraries[function](
            *given[: len(given) - len(named)], **keywords, initial_state=S, output_final_state=True
        )
        S.copy_(new)
        return out

    draws = Draws(tokens, g)
    compare(step, torch.randn(B, H, K, V, generator=g), lambda: [draws[k] for k in [*kinds.split(), *named.values()]])
    assert records
    for record in records:
        ((_, plan),) = record.rewritten
        assert (plan.program.signature, plan.variant) == (signature, "buffered" if tokens == 1 else "verify")


def test_a_bonus_of_the_token_itself(libraries: dict[str, Any], records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(H, K, generator=g)

    def step(S: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        rwkv6 = libraries["fused_recurrent_rwkv6"]
        out, new = rwkv6(r, k, v, w, u.to(v.dtype), initial_state=S, output_final_state=True)
        S.copy_(new)
        return out

    draws = Draws(3, g)
    compare(step, torch.randn(B, H, K, V, generator=g), lambda: [draws[x] for x in ("k", "k", "v", "gate-k")])
    assert records and all(r.rewritten[0][1].program.signature == "RDU" for r in records)


def test_selective_state_update(libraries: dict[str, Any], records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    A, D, bias = -torch.rand(H, generator=g), torch.randn(H, V, generator=g), torch.randn(H, generator=g)

    def step(S: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        wide = [y.to(x.dtype)[:, None].expand(H, V) for y in (bias,)]
        decay = A.to(x.dtype)[:, None, None].expand(H, V, K)
        dt = dt[..., None].expand(B, H, V)
        update = libraries["selective_state_update"]
        return update(S, x, dt, decay, b, c, D.to(x.dtype), z, dt_bias=wide[0], dt_softplus=True)

    def draw() -> list[Tensor]:
        shapes = ((B, H, V), (B, H), (B, 1, K), (B, 1, K), (B, H, V))
        return [torch.randn(shape, generator=g) for shape in shapes]

    compare(step, torch.randn(B, H, V, K, generator=g), draw)
    assert records and all(r.rewritten[0][1].program.signature == "DUR" for r in records)


@pytest.mark.parametrize("skip", ["a number a head", "a number a channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_chunk_scan_combined(
    skip: str, dtype: torch.dtype, libraries: dict[str, Any], records: list[GraphRecord]
) -> None:
    g = torch.Generator().manual_seed(0)
    A, bias = -torch.rand(H, generator=g), torch.randn(H, generator=g)
    D = torch.randn((H,) if "head" in skip else (H, V), generator=g)
    scan = libraries["mamba_chunk_scan_combined"]

    def step(S: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        a, d, by = (y.to(S.dtype) for y in (A, D, bias))
        out, new = scan(
            x, dt, a, b, c, 64, d, z, dt_bias=by, initial_states=S, dt_softplus=True, return_final_states=True
        )
        S.copy_(new)
        return out

    shapes = ((B, 3, H, V), (B, 3, H), (B, 3, 1, K), (B, 3, 1, K), (B, 3, H, V))
    if dtype == torch.float32:
        compare(step, torch.randn(B, H, V, K, generator=g), lambda: [torch.randn(s, generator=g) for s in shapes])
    else:
        state, given = torch.randn(B, H, V, K, generator=g), [torch.randn(s, generator=g).to(dtype) for s in shapes]
        with torch.no_grad():
            got = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)(state.clone(), *given)
            want = step(state.clone(), *given)
        assert got.dtype == want.dtype == dtype
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert records and all(r.rewritten[0][1].program.signature == "DUR" for r in records)


def test_options_that_are_not_known_leave_the_call(libraries: dict[str, Any], records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    given = [Draws(2, g)[k] for k in ("k", "k", "v", "gate-k")]

    def step(S: Tensor, *given: Tensor) -> Tensor:
        out, new = libraries["fused_recurrent_gla"](*given, initial_state=S, a_new_option=True)
        S.copy_(new)
        return out

    state = torch.randn(B, H, K, V, generator=g)
    expected = state.clone()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(step, backend="kvbuffer", options=FAST)(state, *given), step(expected, *given)
        )
    torch.testing.assert_close(state, expected)
    assert not any(r.rewritten for r in records)


def test_a_single_token_that_is_left_alone_is_spelled_out(libraries: dict[str, Any]) -> None:
    """Nothing to gain on a small state: the inner compiler gets ordinary calls, not an opaque one."""
    seen: list[str] = []

    def inner(gm: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    g = torch.Generator().manual_seed(0)
    given = [Draws(1, g)[k] for k in ("k", "k", "v", "gate-k")]

    def step(S: Tensor, *given: Tensor) -> Tensor:
        out, new = libraries["fused_recurrent_gla"](*given, initial_state=S, output_final_state=True)
        S.copy_(new)
        return out

    state = torch.randn(B, H, K, V, generator=g)
    expected = state.clone()
    with torch.no_grad():
        out = torch.compile(step, backend="kvbuffer", options={"inner": inner})(state, *given)
        torch.testing.assert_close(out, step(expected, *given))
    torch.testing.assert_close(state, expected)
    assert seen and not any("kvbuffer" in target for target in seen)


def test_what_someone_else_put_in_its_place_is_traced_as_it_is(
    libraries: dict[str, Any], records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may mean something else: here there is no scale unless one is asked for."""

    def fused_recurrent_gla(q, k, v, gk, initial_state, scale=None, output_final_state=True):
        S = initial_state * gk[:, 0].exp()[..., None] + _outer(k[:, 0], v[:, 0])
        return _read(S, q[:, 0])[:, None], S

    def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Tensor:
        out, new = sys.modules["fla.ops"].fused_recurrent_gla(q, k, v, gk, S)
        S.copy_(new)
        return out

    monkeypatch.setattr(sys.modules["fla.ops"], "fused_recurrent_gla", fused_recurrent_gla)
    substitution._searched.discard("fla.ops")
    substitution.substitute_known()
    q, k, gk = torch.randn(3, B, 1, H, K)
    v, state = torch.randn(B, 1, H, V), torch.randn(B, H, K, V)
    expected = state.clone()
    with torch.no_grad():
        got = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)(state, q, k, v, -gk.exp())
        torch.testing.assert_close(got, step(expected, q, k, v, -gk.exp()))
    torch.testing.assert_close(state + 0, expected)
    assert [plan.program.signature for r in records for _, plan in r.rewritten] == ["DUR"]
