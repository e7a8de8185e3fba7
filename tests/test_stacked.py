"""One tensor that holds the states of several layers, each a constant slice of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from tests.forms import operands, outer, read
from tests.lifting import capture, lifted_and_right
from tests.steps import DISTINCT

FAST = {"inner": "eager", "target": "aten", "flush": 4}
LAYERS = 3


def layers_first(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[L, B, H, K, V]; every layer's output is the next one's value."""
    for layer in range(states.shape[0]):
        S = states[layer] * g.exp()[..., None, None]
        S = S + outer(k, (v - read(S, k)) * beta[..., None])
        states[layer] = S
        v = torch.tanh(read(states[layer], q))
    return v


def layers_inside(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[B, L, H, K, V], written in place."""
    for layer in range(states.shape[1]):
        S = states[:, layer]
        S.mul_(g.exp()[..., None, None])
        S.add_(outer(k, (v - read(S, k)) * beta[..., None]))
        v = torch.tanh(read(S, q))
    return v


def uneven(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The same, but the whole stack is used at the end."""
    return layers_first(states, q, k, v, g, beta) + states.sum(0).mean(-2)


STACKS = {"first": (layers_first, 0), "inside": (layers_inside, 1)}


def start(dim: int, g: torch.Generator) -> Tensor:
    s = DISTINCT
    return torch.randn(LAYERS, s.B, s.H, s.K, s.V, generator=g).movedim(0, dim).contiguous()


@pytest.mark.parametrize("name", STACKS)
def test_each_slice_is_a_state_with_a_reason_of_its_own(name: str) -> None:
    step, dim = STACKS[name]
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(step, start(dim, g), *operands("qkvgb")(DISTINCT, g))
    graph = lifted_and_right(gm)
    assert not graph.found
    visible = [r.why for r in graph.refused if not r.hopeless]
    assert [why.rule for why in visible] == ["stacked"] * LAYERS
    assert all(why.source.rpartition(":")[0].endswith("test_stacked.py") for why in visible)


def test_a_stack_that_is_used_whole_is_no_stack() -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(uneven, start(0, g), *operands("qkvgb")(DISTINCT, g))
    graph = lifted_and_right(gm)
    assert not graph.found
    assert [r.why.rule for r in graph.refused if not r.hopeless] == ["partial"]


@pytest.mark.parametrize("name", STACKS)
def test_stacks_run_as_they_are(name: str, records: list[GraphRecord]) -> None:
    step, dim = STACKS[name]
    g = torch.Generator().manual_seed(0)
    states = start(dim, g)
    expected = states.clone()
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(6):
            token = operands("qkvgb")(DISTINCT, g)
            torch.testing.assert_close(compiled(states, *token), step(expected, *token))
    torch.testing.assert_close(states, expected)
    assert records and not any(r.rewritten for r in records)
