"""Steps of several tokens that stream the state against the definition, through Triton's interpreter on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.drafts import drafts
from kvbuffer_compile.codegen.triton.launch import Config, configure
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.codegen.triton.tiles import rows as triton_rows
from kvbuffer_compile.codegen.triton.tiles.functions import FUNCTIONS
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from tests.kernels.test_stream import PROGRAMS
from tests.kernels.test_triton import Session, check_nothing_is_read, check_padding, draw, make_plan
from tests.support import sessions
from tests.support.daily import chosen, row
from tests.support.oracle import Oracle
from tests.support.programs import NAMED

TILES = Config(block=4, warps=4, stages=2, matrix=True, part=2)
WHOLE = Config(block=8, warps=4, stages=2, matrix=True, part=4)
DAILY = {"gdn", "kda", "deltaproduct2", "columns"}


def order_of(plan):
    return schedule(plan.program, in_place=True)


STREAMED = [n for n in PROGRAMS if drafts(p := make_plan(PROGRAMS[n], "verify"), order_of(p))]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    """Products take 16 slots at least; the interpreter, which adds numbers one by one, takes any."""
    monkeypatch.setattr(triton_rows, "LEAST", 4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(row((name, TILES), name in DAILY) for name in STREAMED),
        *(row((name, WHOLE), name in DAILY) for name in STREAMED),
    ],
    ids=lambda x: x if isinstance(x, str) else "tiles" if x == TILES else "whole",
)
def test_steps_are_exact_and_can_be_taken_back(name, config):
    session = Session(make_plan(PROGRAMS[name], "verify", flush=3, capacity=6), [3, 2], config=config)
    for tokens, dropped in [(3, [0, 2]), (4, [1, 0]), (2, [2, 1]), (1, [0, 1])]:
        session.check(draw(PROGRAMS[name], tokens))
        session.drop(torch.tensor(dropped))


@pytest.mark.parametrize("name", ["gdn", "mamba2", "gla", "kda", "mlstm", "rwkv7"])
def test_large_states_stream_by_default(name):
    """Those of a pool are held."""
    plan = make_plan(NAMED[name], "verify", 16, 24, sizes=(64, 64) if name == "rwkv7" else (128, 128))
    assert configure(plan, order_of(plan)).part > 0
    pool = replace(plan, slots=True)
    assert configure(pool, order_of(pool)).part == 0
    with pytest.raises(EmitError, match="streams"):
        triton.emit(pool, configure(plan, order_of(plan)))


@pytest.mark.parametrize(("name", "fill"), [row((n, f), f == 3) for n in ("gdn", "kda") for f in range(5)])
def test_flush_at_every_fill_level(name, fill):
    session = Session(make_plan(NAMED[name], "verify", flush=4, capacity=5), [4, 4], config=WHOLE)
    if fill:
        session.check(draw(NAMED[name], fill))
    session.cursor[1] = session.expected[1][1] = 0
    session.check(draw(NAMED[name], 2))
    assert session.cursor[:2].tolist() == [[2, 2], [4, 4]]


def test_padding_sequences_give_zero_and_touch_nothing():
    """Unrolled tokens, and more than are unrolled."""
    session = Session(make_plan(NAMED["gdn"], "verify", flush=9, capacity=10), [9, 9], config=WHOLE)
    check_padding(session, [draw(NAMED["gdn"], tokens) for tokens in (1, 9)])
    assert session.cursor[0].tolist() == [10, -1]


@pytest.mark.parametrize("name", chosen(["gdn", "kda"], {"kda"}))
def test_a_state_that_holds_nothing_is_not_read(name):
    nothing = torch.full_like(Session(make_plan(NAMED[name], "verify"), [3, 3]).state, torch.nan)
    session = Session(make_plan(NAMED[name], "verify", capacity=4), [3, 3], state=nothing, config=TILES)
    check_nothing_is_read(session, [draw(NAMED[name], 2) for _ in range(3)])


# -------------------------------------------------------------------------------------------- floating point


class Streamed:
    """The op of a plan by a kernel that streams the state, as tests/support/sessions.py calls it."""

    def __init__(self, plan: Plan, config: Config) -> None:
        self.plan, self.block = plan, config.block
        source = triton.emit(plan, config)
        assert "each_result" in source and "if DRAFTS" in source, "nothing is streamed"
        self.module = load(source, interpret=True)
        self.tokens: set[int] = set()

    def __call__(self, state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
        count, lanes = len(self.plan.program.logged), self.plan.layout.canonical(state).shape[:-2]
        tickets = torch.zeros(cursor.shape[1], self.module.ticket_count(lanes, self.block), dtype=torch.int32)
        self.tokens.add(rest[count].shape[len(lanes)])
        out = self.module.launch(state, cursor, tickets, rest[:count], list(rest[count:]))
        assert not tickets.any(), "tickets are zero between launches"
        return out[0] if len(out) == 1 else out


F, B, H = torch.float32, torch.bfloat16, torch.float16
SIZES = (5, 19)
WIDE = Config(block=32, warps=4, stages=2, matrix=True, part=4)
# Dtypes of the state, of rows and of operands.
STORED = {
    "f": (F, F, F),
    "fb": (F, B, B),
    "b": (B, B, B),
    "bf": (B, F, F),
    "bbf": (B, B, F),
    "h": (H, H, H),
    "hf": (H, F, F),
    "hb": (H, B, B),
}
REAL = ["gdn", "mamba2", "gla", "kda", "mlstm", "rwkv7"]
DAILY_STORED = {("gdn", "f"), ("mamba2", "bf"), ("gla", "h"), ("kda", "b"), ("mlstm", "hf"), ("rwkv7", "fb")}


@pytest.mark.parametrize(("name", "stored"), [row((n, s), (n, s) in DAILY_STORED) for n in REAL for s in STORED])
def test_real_numbers(name, stored):
    """Ragged cursors, flushes, a padding sequence, rows taken back, up to 6 tokens; KDA's tensors have gaps."""
    state, rows, operands = STORED[stored]
    inner = "key" if name == "gla" else "value"
    plan = sessions.make_plan(NAMED[name], "verify", SIZES, 4, 6, state, rows, inner)
    options = dict(limits=(4, 2, 3), padded=(1,), strided=name == "kda", bare=name == "mlstm")
    play(plan, WIDE, 4, operands=operands, **options)


@pytest.mark.nightly
@pytest.mark.parametrize("name", REAL)
def test_many_tokens(name):
    """Up to 12 tokens: 8 are unrolled, or fewer where a token has several queries, more take the loop."""
    plan = sessions.make_plan(NAMED[name], "verify", SIZES, 6, 12)
    streamed = play(plan, WIDE, 8, limits=(6, 1, 3), padded=(2,))
    assert max(streamed.tokens) > 8 and min(streamed.tokens) <= 4


def play(plan: Plan, config: Config, steps: int, **options: Any) -> Streamed:
    streamed = Streamed(plan, config)
    session = sessions.Session(plan, streamed, exact=False, **options)
    while session.steps < steps and session.step():
        pass
    assert session.steps > 2
    return streamed


@pytest.mark.parametrize(
    ("name", "what"), [row((n, w), n == "gdn") for n in ("gdn", "gla", "mlstm") for w in ("state", "operand")]
)
def test_what_is_not_finite_stays_so(name, what):
    """An inf or NaN is in the same places as in the definition, though an inf may have become NaN."""
    session = Session(make_plan(NAMED[name], "verify", flush=3, capacity=5), [3, 2], config=TILES)
    if what == "state":
        for state in (session.state, session.expected[0]):
            state[0, 0, 1, 2], state[1, 1, 0, 3] = torch.inf, torch.nan
    for _ in range(3):
        inputs = [x + 2 for x in draw(NAMED[name], 2)]
        if what == "operand":
            inputs[2][0, 0, 1, 2], inputs[1][-1, -1, 0, 1] = torch.inf, -torch.inf
        got, expected = session.step(inputs)
        pairs = [*zip(got, expected, strict=True), (session.state, session.expected[0])]
        for x, y in pairs:
            assert torch.equal(x.isfinite(), y.isfinite())
            torch.testing.assert_close(x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0))
        assert not got[0].isfinite().all() and got[0].isfinite().any()


# ------------------------------------------------------------------------------------------------- products

MULTIPLY = f"""import triton
import triton.language as tl


{FUNCTIONS}


@triton.jit
def multiply(x, s, total, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(total + at, product(tl.load(x + at), tl.load(s + at), tl.load(total + at), PRECISION))


def launch(x, s, total):
    multiply[(1,)](x, s, total, "tf32x3")
"""
PAIRS = [(x, s) for x in (F, B, H) for s in (F, B, H)]


def check_products(source: str, x_dtype: torch.dtype, s_dtype: torch.dtype) -> None:
    """Eight products of random matrices: as exact as in float32."""
    launch = load(source, interpret=True).launch
    generator = torch.Generator().manual_seed(0)
    with Oracle() as oracle:
        for _ in range(8):
            x, s, total = (torch.randn(16, 16, generator=generator) for _ in range(3))
            x, s = x.to(x_dtype), s.to(s_dtype)
            got = total.clone()
            launch(x, s, got)
            oracle.add(got, total + x.float() @ s.float(), total.double() + x.double() @ s.double())


@pytest.mark.parametrize(("x", "s"), PAIRS)
def test_products_are_as_exact_as_float32(x, s):
    """Of what tensor cores see of the parts: the interpreter takes as much of float32 in tf32 as they do."""
    check_products(MULTIPLY, x, s)


def test_every_part_of_a_product_counts():
    body = FUNCTIONS[FUNCTIONS.index("def product(") : FUNCTIONS.index("def stack(")]
    parts = [line for line in body.splitlines() if "total = tl.dot(" in line and "PRECISION" not in line]
    assert len(parts) == 12
    for part in parts:
        source = MULTIPLY.replace(f"\n{part}", f"\n{part[: -len(part.lstrip())]}total = total")
        assert source != MULTIPLY and not all(passes(source, *pair) for pair in PAIRS), part


def passes(source: str, *dtypes: torch.dtype) -> bool:
    try:
        check_products(source, *dtypes)
    except AssertionError:
        return False
    return True
