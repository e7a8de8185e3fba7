"""The guard: whoever looks at a state, from wherever, sees the truth, and the class of a state makes no graph."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import pickle
import resource
import signal
import sys
import threading

import numpy as np
import pytest
import torch
import torch._dynamo.convert_frame as convert_frame
import torch.nn.functional as F
from torch._dynamo.utils import counters

from kvbuffer_compile import explain, kvbuffer, materialize
from kvbuffer_compile.accounts.ledger import LEDGER, Phases
from kvbuffer_compile.guard import sharing
from kvbuffer_compile.guard.aliases import plain
from kvbuffer_compile.guard.guarded import GuardedState
from kvbuffer_compile.runtime import by_hand
from tests.support.oracle import check

B, H, K, V = 2, 2, 4, 4
L = 8
OPTIONS = {"flush": L, "inner": "eager", "target": "aten"}


def step(state, q, k, v, gate):
    """Gated linear attention, one token, in place."""
    new = state * gate[..., None] + k[..., None] * v[..., None, :]
    state.copy_(new)
    return (q[..., None] * new).sum(-2)


def operands():
    return torch.randn(B, H, K), torch.randn(B, H, K), torch.randn(B, H, V), torch.rand(B, H, K) / 2 + 0.5


class Pair:
    """A state that is stepped buffered, and eager and exact ones beside it."""

    def __init__(self, state=None, compiled=None, steps=0):
        self.compiled = compiled or torch.compile(step, backend="kvbuffer", options=OPTIONS)
        self.state = torch.randn(B, H, K, V) if state is None else state
        self.eager, self.exact = self.state.clone(), self.state.double()
        self.run(steps)

    def run(self, steps=1):
        with torch.no_grad():
            for _ in range(steps):
                given = operands()
                self.compiled(self.state, *given)
                step(self.eager, *given)
                step(self.exact, *(x.double() for x in given))
        return self

    @property
    def owed(self):
        return sum(int(a.cursor[0].max()) for a in by_hand.accounts_of(self.state))

    def apply(self, write):
        for state in (self.state, self.eager, self.exact):
            write(state)

    def check(self, got, read=lambda s: s):
        check(got, read(self.eager), read(self.exact))


@pytest.fixture
def pair():
    p = Pair(steps=3)
    assert p.owed == 3
    return p


# ------------------------------------------------------------------------------- graphs of other backends

READS = {
    "positional": lambda s: torch.sum(s, -1),
    "keyword": lambda s: torch.sum(input=s, dim=-1),
    "other=": lambda s: torch.mul(torch.ones(V, dtype=s.dtype), other=s),
    "list": lambda s: torch.stack([s, s]),
    "tuple": lambda s: torch.cat((s, s), 1),
    "einsum": lambda s: torch.einsum("bhkv,bhkw->bhvw", [s, s]),
    "attention": lambda s: F.scaled_dot_product_attention(query=torch.ones(B, H, 3, V, dtype=s.dtype), key=s, value=s),
    "foreach": lambda s: torch._foreach_mul([s], 2)[0],
    "1 - s": lambda s: 1 - s,
    "2 ** s": lambda s: 2**s,
    "s // x": lambda s: s // 0.3,
    "norm": lambda s: s.norm(),
    "split": lambda s: s.split(2, 2)[0] * 1,
    "unflatten": lambda s: s.unflatten(2, (2, 2)) * 1,
    "pad": lambda s: F.pad(s, (0, 1)),
    "rms_norm": lambda s: F.rms_norm(s, (V,)),
    "reversed": lambda s: next(iter(reversed(s))) * 1,
    "grad is None": lambda s: s * 1 if s.grad is None else s,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graphs_of_other_backends_settle_what_they_are_given(backend):
    for read in READS.values():
        p = Pair(steps=3)
        other = torch.compile(read, backend=backend, fullgraph=True)
        with torch.no_grad():
            for _ in range(3):
                assert p.owed
                p.check(other(p.state), read)
                assert type(p.state) is GuardedState
                p.run()


@pytest.mark.parametrize("write", [lambda s: torch._foreach_mul_([s], 0.5), lambda s: s.add_(other=s)])
def test_what_graphs_of_other_backends_write_is_honoured(pair, write):
    with torch.no_grad():
        torch.compile(write, backend="aot_eager")(pair.state)
    write(pair.eager)
    write(pair.exact)
    pair.run(3)
    pair.check(pair.state.clone())


def test_views_that_other_graphs_return_are_guarded(pair):
    view = torch.compile(lambda s: s[1], backend="aot_eager")(pair.state)
    itself = torch.compile(lambda s: s.mul_(1), backend="aot_eager")(pair.state)
    assert itself is pair.state and type(view) is GuardedState
    pair.run(2)
    pair.check(view.clone(), lambda s: s[1])


def test_views_that_a_rewritten_graph_returns_are_guarded():
    def both(state, *given):
        out = step(state, *given)
        return out, state[0], state.mul_(1)

    compiled = torch.compile(both, backend="kvbuffer", options=OPTIONS)
    state = torch.zeros(B, H, K, V)
    with torch.no_grad():
        for _ in range(3):
            _, view, itself = compiled(state, *operands())
    assert itself is state
    torch.testing.assert_close(view.clone(), state.clone()[0])


def test_dynamo_sees_none_of_our_code(monkeypatch):
    frames = []
    original = convert_frame.log_dynamo_start
    monkeypatch.setattr(
        convert_frame, "log_dynamo_start", lambda code, *a, **k: (frames.append(code), original(code, *a, **k))[1]
    )

    def breaks(s):
        torch._dynamo.graph_break()
        seen = (s * 2).sum().item()
        materialize(s)
        copy.deepcopy(s)
        return s * seen

    p = Pair(steps=2)
    for backend, options in (("eager", None), ("kvbuffer", OPTIONS)):
        torch.compile(breaks, backend=backend, options=options)(p.run(2).state)
    ours = [c.co_qualname for c in frames if os.sep + "kvbuffer_compile" + os.sep in c.co_filename]
    assert frames and not ours


# --------------------------------------------------------------------------------------- one graph for all


def test_a_list_of_fresh_and_stepped_states_has_one_graph():
    def steps(states, *given):
        return sum(step(s, *given) for s in states)

    compiled = torch.compile(steps, backend="kvbuffer", options=OPTIONS, fullgraph=True)
    counters.clear()
    states = [torch.randn(B, H, K, V) for _ in range(8)]
    twins = [s.double() for s in states]
    with torch.no_grad():
        for mix in (0, 255, 0b10101010, 0b00010000, 0b01111111, 0):
            for i in range(8):
                if mix >> i & 1:
                    states[i] = torch.randn(B, H, K, V)
                    twins[i] = states[i].double()
            given = operands()
            compiled(states, *given)
            steps(twins, *(x.double() for x in given))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert sum(type(s) is GuardedState for s in states) == 8
    for got, want in zip(states, twins, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_six_kinds_of_layer_have_six_graphs():
    def layer(state, q, k, v, normal):
        state.copy_(state * 0.9 + k[..., None] * v[..., None, :])
        out = (q[..., None] * state).sum(-2)
        return F.normalize(out, dim=-1) if normal else out

    kinds = [(3, 8, False), (3, 8, True), (5, 8, False), (5, 8, True), (4, 16, False), (4, 16, True)]
    compiled = torch.compile(layer, backend="kvbuffer", options=OPTIONS, fullgraph=True)
    counters.clear()
    states = [torch.zeros(2, h, k, 6) for h, k, _ in kinds]
    with torch.no_grad():
        for _ in range(4):
            for s, (h, k, normal) in zip(states, kinds, strict=True):
                compiled(s, torch.randn(2, h, k), torch.randn(2, h, k), torch.randn(2, h, 6), normal)
    assert counters["stats"]["unique_graphs"] == 6
    assert all(type(s) is GuardedState for s in states)


def test_a_backend_around_ours_is_one_graph_as_well():
    def around(gm, inputs):
        compiled = kvbuffer(gm, inputs, options=OPTIONS)
        return lambda *args: compiled(*args)

    counters.clear()
    p = Pair(compiled=torch.compile(step, backend=around), steps=3)
    assert p.owed == 3 and counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------------------------- memory others can reach


def _numpy(make):
    array = np.random.randn(B, H, K, V).astype(np.float32)
    return make(array), lambda: torch.tensor(array)


def _buffer():
    memory = bytearray(4 * B * H * K * V)
    return torch.frombuffer(memory, dtype=torch.float32).view(B, H, K, V), lambda: torch.tensor(
        np.frombuffer(memory, np.float32).copy().reshape(B, H, K, V)
    )


def _dlpack():
    source = torch.randn(B, H, K, V)
    return torch.from_dlpack(source), source.clone


def _exported_before():
    state = torch.randn(B, H, K, V)
    other = torch.from_dlpack(state)
    return state, other.clone


def _storage_before():
    state = torch.randn(B, H, K, V)
    storage = state.untyped_storage()
    return state, lambda: torch.frombuffer(bytearray(bytes(storage)), dtype=torch.float32).view(B, H, K, V)


def _file(tmp_path):
    path = str(tmp_path / "state")
    state = torch.from_file(path, shared=True, size=B * H * K * V).view(B, H, K, V)
    return state, lambda: torch.tensor(np.fromfile(path, np.float32).reshape(B, H, K, V))


def _mapped(tmp_path):
    path = str(tmp_path / "state")
    array = np.memmap(path, np.float32, "w+", shape=(B, H, K, V))
    return torch.from_numpy(array), lambda: torch.tensor(np.fromfile(path, np.float32).reshape(B, H, K, V))


FOREIGN = {
    "from_numpy": lambda _: _numpy(torch.from_numpy),
    "as_tensor": lambda _: _numpy(torch.as_tensor),
    "from_dlpack of an array": lambda _: _numpy(torch.from_dlpack),
    "frombuffer": lambda _: _buffer(),
    "from_dlpack": lambda _: _dlpack(),
    "exported before": lambda _: _exported_before(),
    "storage before": lambda _: _storage_before(),
    "from_file": _file,
    "memmap": _mapped,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_memory_that_others_can_reach_is_true_after_every_step(make, tmp_path):
    state, look = make(tmp_path)
    p = Pair(state)
    for flush in (L, 2 * L, L):  # an account of each is opened anew
        p.compiled = torch.compile(step, backend="kvbuffer", options={**OPTIONS, "flush": flush})
        for _ in range(3):
            p.run()
            p.check(look())
            assert not p.owed


def test_the_report_says_who_shares_the_memory():
    def told(state):
        with torch.no_grad():
            return explain(step, state, *operands(), options={"flush": L}).states[0].reason

    assert "shared with whoever made it: NumPy" in told(torch.from_numpy(np.zeros((B, H, K, V), np.float32)))
    assert "shared with other processes" in told(torch.zeros(B, H, K, V).share_memory_())
    p = Pair(steps=1)
    assert "shared" not in told(p.state)
    p.state.data_ptr()
    assert "shared with whoever called data_ptr() on it" in told(p.state)


def test_what_is_written_into_memory_of_others_counts():
    array = np.zeros((B, H, K, V), np.float32)
    p = Pair(torch.from_numpy(array), steps=3)
    array.fill(0)
    p.eager.zero_()
    p.exact.zero_()
    p.run(2)
    p.check(p.state.clone())


EXPORTS = {
    "data_ptr": lambda s: s.data_ptr(),
    "untyped_storage": lambda s: s.untyped_storage().data_ptr(),
    "numpy": lambda s: s.numpy(),
    "dlpack": lambda s: torch.from_dlpack(s),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_memory_that_is_handed_out_later_is_true_from_then_on(pair, export):
    found = export(pair.state)
    pointer = found if isinstance(found, int) else found.ctypes.data if hasattr(found, "ctypes") else found.data_ptr()
    memory = np.ctypeslib.as_array((ctypes.c_float * (B * H * K * V)).from_address(pointer)).reshape(B, H, K, V)
    for flush in (L, 2 * L):
        pair.compiled = torch.compile(step, backend="kvbuffer", options={**OPTIONS, "flush": flush})
        pair.run(3)
        pair.check(torch.tensor(memory))


def test_tensors_of_ours_that_die_hide_no_others():
    """Others are told from ours by counting: two come while two go."""
    p = Pair(steps=1)
    assert p.owed == 1
    copied = copy.copy(p.state)
    with torch.no_grad():
        some = [x[:1] for x in operands()]
        p.compiled(p.state[:1], *some)
        step(p.eager[:1], *some)
        step(p.exact[:1], *(x.double() for x in some))
    kept = p.state.unbind(0)[1]
    for _ in range(3):
        p.run()
        p.check(copied)
        p.check(kept, lambda s: s[1])


LOOKS = {
    "clone": torch.clone,
    "torch.tensor": torch.tensor,
    "torch.Tensor": lambda s: torch.Tensor(s).clone(),
    "functionalize": lambda s: torch.func.functionalize(lambda x: x * 1.0)(s),
    "vmap": torch.vmap(lambda x: x * 2),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda s: torch.save({"state": s}, io.BytesIO()),
    "repr": repr,
    "tolist": lambda s: s.tolist(),
    "array": lambda s: s.numpy().sum(),
    "np.save": lambda s: np.save(io.BytesIO(), s),
    "new_tensor": lambda s: s.new_tensor([1.0]),
    "another backend": lambda s: torch.compile(lambda x: x * 2, backend="eager")(s),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_state_that_was_looked_at_is_buffered_as_before(pair, look):
    look(pair.state)
    pair.run(2)
    assert pair.owed == 2


@pytest.mark.parametrize("when", [0, 2])
def test_another_process_reads_the_truth_in_shared_memory(when):
    """A child that was forked before the steps and reads when it is asked to."""
    p = Pair(steps=0)
    p.run(when)
    p.state.share_memory_()
    ask, answer = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(ask[0], 1)
            torch.set_num_threads(1)
            os.write(answer[1], p.state.clone().numpy().tobytes())
        finally:
            os._exit(0)
    p.run(5)
    os.write(ask[1], b"x")
    os.waitpid(child, 0)
    seen = torch.frombuffer(bytearray(os.read(answer[0], 4 * p.eager.numel())), dtype=torch.float32)
    p.check(seen.view(B, H, K, V))


def test_a_forked_child_reads_what_is_owed():
    p = Pair(torch.randn(B, 64, 64, 64), compiled=lambda *_: None)  # large: settling it takes OpenMP's threads
    compiled = torch.compile(step, backend="kvbuffer", options=OPTIONS)
    given = torch.randn(B, 64, 64), torch.randn(B, 64, 64), torch.randn(B, 64, 64), torch.rand(B, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            compiled(p.state, *given)
            step(p.eager, *given)
    assert p.owed == 3
    answer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(answer[1], np.float64(p.state.double().sum().item()).tobytes())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert np.frombuffer(os.read(answer[0], 8))[0] == pytest.approx(p.eager.double().sum().item(), rel=1e-4)
    assert p.owed == 3


def test_a_view_that_is_made_within_a_call_is_true_behind_it():
    """Of the ordinary tensor that compiled code is given, by a compiler that keeps it: nobody has asked the state."""
    kept, keep = [], False

    def inner(gm, inputs):
        (position,) = [i for i, x in enumerate(inputs) if x.shape == (B, H, K, V)]

        def run(*args):
            if keep:
                kept.append(args[position].view(-1))
            return gm(*args)

        return run

    p = Pair(compiled=torch.compile(step, backend="kvbuffer", options={**OPTIONS, "inner": inner}), steps=3)
    keep = True
    p.run()
    keep = False
    p.check(kept[0].view(B, H, K, V).clone())
    p.run(2)
    p.check(kept[0].view(B, H, K, V).clone())


def test_a_child_steps_on_though_another_thread_was_stepping_at_the_fork(pair):
    """Its locks are its own: the thread that held them stayed behind."""
    (account,) = by_hand.accounts_of(pair.state)
    lock = account.lock
    pair.run(2)
    held, ended = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # instead of waiting for ever
            pair.run(2)
            pair.check(pair.state.clone())
            os._exit(7)
        finally:
            os._exit(1)
    ended.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_copies_share_memory_as_their_originals_do(pair):
    state, view = copy.deepcopy((pair.state, pair.state[0]))
    pair.check(state.clone())
    state.zero_()
    assert bool((view == 0).all()) and bool((pair.state != 0).any())


# ------------------------------------------------------------------------------------------------ threads


def in_thread(work):
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failed


def test_a_read_while_another_thread_compiles(pair):
    inside, go = threading.Event(), threading.Event()

    def slow(gm, inputs):
        inside.set()
        go.wait(60)
        return gm.forward

    thread, failed = in_thread(lambda: torch.compile(lambda x: x.sin(), backend=slow)(torch.randn(3)))
    assert inside.wait(60)
    try:
        pair.check(pair.state * 1)
        pair.apply(lambda s: s[0].zero_())
        pair.check(pair.state.clone())
    finally:
        go.set()
        thread.join()
    assert not failed


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def whole_operands(g):
    """Small whole numbers, and gates that are 0 or 1: float32 is exact, whatever is folded in when."""
    gate = (torch.rand(B, H, K, generator=g) > 0.1).float()
    return *(torch.randint(-2, 3, (B, H, n), generator=g).float() for n in (K, K, V)), gate


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_a_reader_leaves_a_state_as_it_is(steps, switching):
    compiled = torch.compile(step, backend="kvbuffer", options=OPTIONS)
    state, alone = torch.zeros(B, H, K, V), torch.zeros(B, H, K, V)
    stop, reads = threading.Event(), []

    def monitor():
        with torch.no_grad():
            while not stop.is_set():
                reads.append(float(state.sum()))

    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        compiled(state, *whole_operands(g))
        alone.copy_(state)
        thread, failed = in_thread(monitor)
        try:
            for _ in range(steps):
                given = whole_operands(g)
                compiled(state, *given)
                step(alone, *given)
        finally:
            stop.set()
            thread.join()
    (account,) = by_hand.accounts_of(state)
    assert int(account.cursor[2].min()) == steps + 1, "every step was buffered"
    assert not failed and len(reads) > 10 and alone.count_nonzero() and float(alone.abs().max()) < 2**20
    assert torch.equal(state, alone)


@pytest.mark.nightly
def test_many_steps_leave_nothing_behind(pair):
    """10,000 steps with a look now and then: no more memory, accounts or graphs than after the first."""
    for n in range(10_000):
        pair.run()
        if n % 100 == 50:
            pair.state.sum()
        if n == 1_000:
            gc.collect()
            counters.clear()
            before = len(LEDGER.accounts), len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    accounts, objects, peak = before
    assert len(LEDGER.accounts) == accounts and counters["stats"]["unique_graphs"] == 0
    assert len(gc.get_objects()) < objects + 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 20_000, "in KiB"


def test_threads_open_accounts_beside_each_other(switching):
    compiled = torch.compile(step, backend="kvbuffer", options=OPTIONS)
    Pair(compiled=compiled, steps=1)

    def work():
        with torch.no_grad():
            for _ in range(150):
                state = torch.zeros(B, H, K, V)
                q, k, v, gate = operands()
                compiled(state, q, k, v, gate)
                torch.testing.assert_close(state.clone(), k[..., None] * v[..., None, :])

    running = [in_thread(work) for _ in range(4)]
    for thread, _ in running:
        thread.join()
    assert not [error for _, failed in running for error in failed]


def test_garbage_may_be_collected_at_any_time():
    compiled = torch.compile(step, backend="kvbuffer", options=OPTIONS)

    def in_a_cycle():
        cache = {"state": torch.zeros(B, H, K, V)}
        cache["me"] = cache
        with torch.no_grad():
            compiled(cache["state"], *operands())

    before = gc.get_threshold()
    try:
        for threshold in (5, 7, 11, 13):
            gc.set_threshold(threshold, 2, 2)
            for _ in range(40):
                in_a_cycle()
    finally:
        gc.set_threshold(*before)


def test_a_thousand_caches_leave_nothing_behind():
    compiled = torch.compile(step, backend="kvbuffer", options=OPTIONS)
    Pair(compiled=compiled, steps=1)
    gc.collect()
    counters.clear()
    before = len(LEDGER.accounts), len(LEDGER.allocations), len(LEDGER._numbers)  # what other tests left among them
    for _ in range(250):
        states = [torch.zeros(B, H, K, V) for _ in range(4)]
        with torch.no_grad():
            for state in states:
                compiled(state, *operands())
    del states, state
    gc.collect()
    after = len(LEDGER.accounts), len(LEDGER.allocations), len(LEDGER._numbers)
    assert all(now <= was for now, was in zip(after, before, strict=True))
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("flush", [1, 2, 3, 7, 8, 16, 48])
def test_first_flushes_are_spread(flush):
    phases = Phases(flush)
    taken = [phases.take() for _ in range(3 * flush)]
    assert sorted(p for _, p in taken) == sorted(list(range(1, flush + 1)) * 3)
    for number, _ in taken[: 2 * flush]:
        phases.give_back(number)
    again = [phases.take()[1] for _ in range(flush)]
    assert sorted(again) == list(range(1, flush + 1))


def test_a_call_of_another_thread_is_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the tensor while it runs; who holds it for longer is told from that."""
    state = torch.zeros(2, 3)
    assert sharing.shared_with(state) is None
    held = iter([True, True, False])
    monkeypatch.setattr(sharing, "_is_held_below_python", lambda owner, storage: next(held))
    assert sharing.shared_with(state) is None and next(held, None) is None
    monkeypatch.setattr(sharing, "_is_held_below_python", lambda owner, storage: True)
    assert "C++ code that holds the tensor" in str(sharing.shared_with(state))


def test_memory_that_was_handed_out_before_is_exported_once_more(pair):
    """Who got it first is remembered; that the open account owes nothing from now on does not depend on it."""
    sharing.hand_out(plain(pair.state), "somebody")
    pair.state.data_ptr()
    (account,) = by_hand.accounts_of(pair.state)
    assert account.shared is not None and "data_ptr() on it" in account.shared
    pair.run()
    assert int(account.cursor[0].max()) == 0
    pair.check(pair.state)
