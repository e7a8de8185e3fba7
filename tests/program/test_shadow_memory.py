"""What a shadow is: exact where its numbers fit, within the bound where not, and no shadow where there can be none."""

from __future__ import annotations

import pytest
import torch

from kvbuffer_compile.ir.memory import Buffered, Dense
from kvbuffer_compile.ir.program import run
from kvbuffer_compile.ir.shadow import READ_DTYPES, Shadow, scale_kind, shadow_of
from tests.program.test_memory import K, V, draw_inputs, integers, lane_sizes
from tests.support.programs import NAMED

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def exact_run(name: str, dtype: torch.dtype, shade=shadow_of, flush=lambda memory, base: memory.flushed(base)) -> bool:
    """Whether a buffered memory that reads shadows of integers agrees with a dense one."""
    program, generator = NAMED[name], torch.Generator().manual_seed(1)
    kind = scale_kind(program)
    assert kind is not None
    base = 8.0 * integers((*lane_sizes(program), K, V), generator)
    dense = Dense(base)
    for _ in range(3):
        memory = Buffered(shade(base, kind, dtype), (K, V))
        for _ in range(2):
            inputs = {n: x.float() / 4 for n, x in draw_inputs(program, generator).items()}
            want, got = run(program, dense, inputs), run(program, memory, inputs)
            if any(not torch.equal(*torch.broadcast_tensors(got[v.name], want[v.name])) for v in program.outputs):
                return False
        base = flush(memory, base)
        if not torch.equal(base, dense.state):
            return False
        base = dense.state = base.clamp(-31, 31).round()
    return True


@pytest.mark.parametrize("dtype", READ_DTYPES)
@pytest.mark.parametrize("name", ["gdn", "kda", "gla", "rwkv6"])
def test_a_shadow_that_rounds_nothing_changes_nothing(name: str, dtype: torch.dtype) -> None:
    assert exact_run(name, dtype)


def test_a_forgotten_scale_is_noticed() -> None:
    def unscaled(base, kind, dtype):
        found = shadow_of(base, kind, dtype)
        return Shadow(found.values, torch.ones_like(found.scale), kind)

    assert not exact_run("gdn", torch.float16, unscaled)


def test_a_stale_shadow_is_noticed() -> None:
    first: list[Shadow] = []

    def stale(base, kind, dtype):
        first.append(shadow_of(base, kind, dtype))
        return first[0]

    assert not exact_run("gdn", torch.float16, stale)


def test_a_flush_from_the_shadow_is_noticed() -> None:
    def coarse(base, kind, dtype):
        return shadow_of(base, kind, dtype)

    def from_shadow(memory, base):
        return memory.flushed(memory.base.state(base.dtype) + 0.25)

    assert not exact_run("gla", torch.float16, coarse, from_shadow)


def some_state(generator: torch.Generator) -> torch.Tensor:
    """Columns from 1e30 to 1e-30 and of zeros, subnormal numbers, and columns of mixed sizes."""
    state = torch.randn(3, 16, 8, generator=generator)
    state *= torch.tensor([1e30, 1e-30, 1.0, 3e38 / 8, 1e-37, 0.0, 1.0, 1.0])
    state[:, ::2, 6] *= 1e-6
    state[:, 1, 7] = 1e30
    return state


@pytest.mark.parametrize("dtype", READ_DTYPES)
@pytest.mark.parametrize("kind", ["value", "key"])
def test_reads_err_within_the_bound_whatever_the_range(kind, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    state = some_state(generator)
    query = torch.randn(3, 16, generator=generator).double()
    if kind == "key":
        state = state.transpose(-1, -2).contiguous()
    met = "key" if kind == "value" else "value"
    shadow = shadow_of(state, kind, dtype)
    assert shadow.scale.isfinite().all() and shadow.values.isfinite().all()
    error = (shadow.read(query, met) - Dense(state.double()).read(query, met)).abs()
    size, query = state.double().abs(), query.abs()
    largest = size.amax(-2 if kind == "value" else -1)
    bound = UNIT[dtype] * Dense(size).read(query, met) + 2.0**-39 * largest * query.sum(-1, keepdim=True)
    assert (error <= bound * (1 + 1e-12) + 2.0**-149).all()
    assert (error > 0).any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_has_no_shadow(bad: float) -> None:
    state = torch.randn(2, 4, 6)
    state[1, 2, 3] = bad
    scale = shadow_of(state, "value", torch.float16).scale
    assert scale.isnan().nonzero().tolist() == [[1, 3]]


def test_only_reads_over_one_axis_leave_another_free() -> None:
    assert scale_kind(NAMED["gdn"]) == "value"
    assert scale_kind(NAMED["oja"]) is None
