"""What reports say of tensors that are written: one row each, by the user's name, and nothing of other tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kvbuffer_compile
from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import DeclinedError
from tests.lift.test_forms import FAST, signatures
from tests.spelled.forms import outer, read

B, H, K, V = 2, 3, 4, 5


def rows(fn: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[str, str, str]]:
    """Name, status and rule of each row."""
    with torch.no_grad():
        report = kvbuffer_compile.explain(fn, *args, options={**FAST, **options})
    assert all(state.source for state in report.states), "each at a line of the model"
    return [(state.name, state.status, state.rule) for state in report.states]


def draw(*letters: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"S": (B, H, K, V), "k": (B, H, K), "v": (B, H, V), "g": (B, H)}
    return [torch.rand(sizes[letter], generator=g) for letter in letters]


def everything(
    S: Tensor, z: Tensor, window: Tensor, cache: Tensor, count: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """A matrix state beside all that models keep besides."""
    window.copy_(window.roll(-1, -1))
    window[..., -1] = v
    cache[:, :, 1] = k
    count.add_(1)
    S.add_(outer(k, window.sum(-1)))
    z.add_(k)
    out = read(S, q) / (z * q).sum(-1, keepdim=True)
    return out + (torch.softmax(q.unsqueeze(2) @ cache.mT, -1) @ cache[..., :1].expand(B, H, 6, V)).squeeze(2)


def beside() -> list[Tensor]:
    S, z, q, k, v = draw("S", "k", "k", "k", "v")
    return [S, z, torch.zeros(B, H, V, 4), torch.zeros(B, H, 6, K), torch.zeros((), dtype=torch.int64), q, k, v]


def test_each_tensor_that_is_written_has_one_row() -> None:
    first, *others = rows(everything, *beside())
    assert first == ("S", "buffered", "")
    assert sorted(others) == [
        ("cache", "kept", "cache"),
        ("count", "kept", "counter"),
        ("window", "kept", "cache"),
        ("z", "kept", "vector"),
    ]


def test_what_is_kept_is_no_decline(records: list[GraphRecord]) -> None:
    run = torch.compile(everything, backend="kvbuffer", options={**FAST, "on_decline": "raise"})
    with torch.no_grad():
        run(*beside())
    assert [signatures(record) for record in records] == [["UR"]] and not records[0].declined


def test_operands_of_the_size_of_an_output_have_no_row() -> None:
    """K = V: every operand could be a state that is returned. Donated lists and stacks too."""
    x = torch.rand(3, B, H, K)

    def lists(states: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        new = [S * 0.9 + outer(k[i], v[i]) for i, S in enumerate(states)]
        return torch.stack([read(S, q[i]) for i, S in enumerate(new)]), new

    found = rows(lists, [torch.zeros(B, H, K, K) for _ in range(3)], x, x, x, donate=True)
    assert found == [(f"states[{i}]", "buffered", "") for i in range(3)]


def residual(x: Tensor, w: Tensor) -> Tensor:
    return x + torch.nn.functional.layer_norm(x, x.shape[-1:]) @ w


def test_a_residual_stream_has_no_row() -> None:
    assert rows(residual, torch.rand(B, H, K), torch.rand(K, K), donate=True) == []


def returned(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of rows turn into each other."""
    even, odd = S[..., ::2, :], S[..., 1::2, :]
    c, s = g.cos()[..., None, None], g.sin()[..., None, None]
    new = torch.stack([c * even - s * odd, s * even + c * odd], -2).flatten(-3, -2) + outer(k, v)
    return read(new, q), new


def squashed(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.tanh(S) + outer(k, v)
    return read(new, q), new


@pytest.mark.parametrize(("step", "rule"), [(returned, "rotation"), (squashed, "nonlinear")])
def test_states_that_are_returned_have_a_row(step: Callable[..., Any], rule: str) -> None:
    """Whether it is a state is known where its user says that it may be overwritten."""
    assert rows(step, *draw("S", "k", "k", "v", "g"), donate=True) == [("S", "declined", rule)]
    assert rows(step, *draw("S", "k", "k", "v", "g")) == [("S", "kept", rule)]


def complex_gates(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S.copy_(q.unsqueeze(-1) * S + outer(k, v))
    return read(S, q.conj()).real


def test_complex_states_are_declined_as_such() -> None:
    args = [torch.complex(x, x) for x in draw("S", "k", "k", "v")]
    assert rows(complex_gates, *args) == [("S", "declined", "complex")]
    run = torch.compile(complex_gates, backend="kvbuffer", options={**FAST, "on_decline": "raise"})
    with torch.no_grad(), pytest.raises(DeclinedError, match="S: complex: .*rotate keys and queries"):
        run(*args)


def leaks(fast: Tensor, slow: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slow.mul_(0.9).add_(fast * 0.1)
    fast.mul_(0.8).add_(outer(k, v))
    return read(slow + fast, q)


def takes_turns(old: Tensor, new: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new.copy_(old * 0.9 + outer(k, v))
    return read(new, q)


def added_to_rows(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = k.topk(2, -1).indices
    S.scatter_add_(2, at[..., None].expand(B, H, 2, V), v[..., None, :].expand(B, H, 2, V))
    return read(S, q)


def in_integers(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S.copy_(((S.float() * 0.9 + outer(k, v)) * 8).round().clamp(-127, 127).to(torch.int8))
    return read(S.float(), q)


def mixed_heads(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S.copy_(torch.einsum("bgh,bhkv->bgkv", torch.softmax(q @ q.mT, -1), S) + outer(k, v))
    return read(S, q)


def in_softmax(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S.add_(outer(k, v))
    return read(S.softmax(-2), q)


DECLINED = {  # step -> rows, and what the reason of the first must say: of others by the user's names, never by ours
    leaks: ([("fast", "coupled"), ("slow", "full-rank")], "another state (`slow`)"),
    takes_turns: ([("new", "elsewhere")], "another state (`old`) becomes is stored here"),
    added_to_rows: ([("S", "partial")], "a key that is zero in the other rows"),
    in_integers: ([("S", "quantised")], "in floating point"),
    mixed_heads: ([("S", "full-transition")], "mixes its rows, its columns or its heads"),
    in_softmax: ([("S", "nonlinear")], "softmax is applied to the state"),
}


@pytest.mark.parametrize("step", DECLINED, ids=lambda step: step.__name__)
def test_each_decline_says_what_to_write_instead(step: Callable[..., Any]) -> None:
    expected, said = DECLINED[step]
    states = draw("S", "S") if step in (leaks, takes_turns) else draw("S")
    states = [x.to(torch.int8) for x in states] if step is in_integers else states
    with torch.no_grad():
        report = kvbuffer_compile.explain(step, *states, *draw("k", "k", "v"), options=FAST)
    assert [(row.name, row.status, row.rule) for row in report.states] == [(n, "declined", r) for n, r in expected]
    assert said in report.states[0].reason and all(row.source for row in report.states)
    assert not [row.reason for row in report.states if re.search(r"arg\d", row.reason)]


def test_layers_alike_are_one_kind_of_row() -> None:
    """Though each names the tensor of its own layer."""

    def layers(fast: list[Tensor], slow: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sum(leaks(f, s, q, k, v) for f, s in zip(fast, slow, strict=True))

    with torch.no_grad():
        report = kvbuffer_compile.explain(
            layers, *([x.clone() for x in draw("S", "S", "S")] for _ in range(2)), *draw("k", "k", "v"), options=FAST
        )
    assert [names for _, names in report.groups()] == [[f"{n}[{i}]" for i in range(3)] for n in ("fast", "slow")]


def snapshot(S: Tensor, kept: Tensor, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept.copy_(S)
    table.scatter_add_(1, k.flatten(1).argsort(-1), k.flatten(1))
    S.add_(outer(k, v))
    return read(S, q)


def test_copies_and_counts_are_kept() -> None:
    given = [*draw("S", "S"), torch.zeros(B, H * K), *draw("k", "k", "v")]
    assert ("table", "kept", "vector") in rows(snapshot, *given)
    assert ("kept", "kept", "overwritten") in rows(snapshot, *given)


def test_wide_calls_are_called_a_prefill() -> None:
    def block(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S.add_(k.mT @ v)
        return q @ S

    shapes = [(B, H, K, V), (B, H, 65, K), (B, H, 65, K), (B, H, 65, V)]
    (state,) = kvbuffer_compile.explain(block, *map(torch.rand, shapes), options=FAST).states
    assert state.rule == "prefill" and "65 queries" in state.reason and "at most 16 tokens" in state.reason


def positions(x: Tensor, pos: Tensor, freq: Tensor) -> Tensor:
    return torch.relu(x + pos[:, None] * freq[None, :])


def scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid(bias * 2 + q[..., None] @ k[..., None, :])


@pytest.mark.parametrize(
    ("fn", "shapes"), [(positions, ((6, 8), (6,), (8,))), (scores, ((2, 3, 8), (2, 3, 8), (2, 3, 8, 8)))]
)
def test_sums_that_nobody_keeps_are_no_declines(fn: Callable[..., Any], shapes: Any) -> None:
    given = [torch.rand(shape) for shape in shapes]
    run = torch.compile(fn, backend="kvbuffer", options={**FAST, "on_decline": "raise"})
    with torch.no_grad():
        torch.testing.assert_close(run(*given), fn(*given))


def groups_mixed(S: Tensor, x: Tensor, k: Tensor, w: Tensor, b: Tensor, mask: Tensor) -> None:
    """A whole matrix, then a delta rule whose keys serve two heads each."""
    k = k[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2)
    s = (x @ x.mT) @ S
    s = (torch.eye(4) - b[..., None, None] * k.unsqueeze(-1) * k.unsqueeze(-2)) @ s + outer(k, w)
    S.copy_(mask * s + (1 - mask) * S)


def test_a_read_that_comes_back_with_its_heads_taken_apart_is_declined() -> None:
    """With B = H = K = V it can be read as other things than it is; an internal error is none."""
    args = [torch.rand(4, *shape) for shape in ((4, 4, 4), (4, 4, 4), (2, 4), (4, 4), (1,), (4, 1, 1))]
    assert rows(groups_mixed, *args) == [("S", "declined", "opaque-map")]
