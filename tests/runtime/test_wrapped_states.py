"""States inside of other tensors, as DTensor has them: stepped by rows like any other, and never seen stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map

from kvbuffer_compile import explain, materialize, rollback, stats
from kvbuffer_compile.codegen import build
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.aliases import plain
from kvbuffer_compile.runtime.by_hand import accounts_of
from tests.support.owing import owed

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
FAST: dict[str, Any] = {"inner": "eager", "target": "aten", "flush": 8}
SIZES = (2, 4, 8, 12)  # batch, heads, K, V


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    state.mul_(decay[..., None, None])
    delta = beta[..., None] * (v - (state * k[..., None]).sum(-2))
    state.add_(k[..., None] * delta[..., None, :])
    return (state * q[..., None]).sum(-2)


def tokens(count: int) -> Iterator[tuple[Tensor, ...]]:
    batch, heads, keys, values = SIZES
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        q, k = (normalize(torch.randn(batch, heads, keys, generator=draw), dim=-1) for _ in range(2))
        yield q, k, torch.randn(batch, heads, values, generator=draw), *torch.rand(2, batch, heads, generator=draw)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One rank: what is inside of a tensor is told from what it is part of all the same."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Pair:
    """A state as a DTensor, stepped by the backend, and the same stepped as it is."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.want = mesh, torch.randn(SIZES)
        self.state = self.sharded(self.want.clone())
        self.step = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)

    def sharded(self, x: Tensor) -> DTensor:
        return distribute_tensor(x, self.mesh, [Shard(1)])

    def run(self, count: int = 3) -> None:
        for token in tokens(count):
            got = self.step(self.state, *map(self.sharded, token))
            torch.testing.assert_close(got.full_tensor(), step(self.want, *token))
        assert self.owed > 0

    @property
    def owed(self) -> int:
        (account,) = accounts_of(self.state)
        return int(account.cursor[0].max())

    def check(self, seen: Any) -> None:
        got = seen.full_tensor() if isinstance(seen, DTensor) else seen
        torch.testing.assert_close(got + 0, self.want)


def saved(x: DTensor) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LOOKS: dict[str, Callable[[DTensor], Any]] = {
    "full_tensor": lambda x: x.full_tensor(),
    "to_local": lambda x: x.to_local(),
    "inside": lambda x: x._local_tensor + 0,
    "sum": lambda x: x + 0,
    "clone": lambda x: x.clone(),
    "stack": lambda x: torch.stack([x])[0],
    "redistribute": lambda x: x.redistribute(placements=[Replicate()]),
    "slice": lambda x: x[:],
    "list": lambda x: torch.tensor(x.to_local().tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": saved,
    "compiled": lambda x: torch.compile(lambda x: x * 1.0, backend="aot_eager")(x),
    "compiled here": lambda x: torch.compile(lambda x: x * 1.0, backend="kvbuffer", options={"inner": "eager"})(x),
}


@torch.no_grad()
def test_who_looks_sees_the_truth(mesh: DeviceMesh, records: list[Any]) -> None:
    for look in LOOKS.values():
        pair = Pair(mesh)
        pair.run()
        pair.check(look(pair.state))
    assert len([r for r in records if r.rewritten]) == 1


HOLDS: dict[str, Callable[[DTensor], Any]] = {
    "copy": copy.copy,
    "detach": lambda x: x.detach(),
    "view": lambda x: x.view(SIZES),
    "local": lambda x: x.to_local(),
    "wrapped anew": lambda x: DTensor.from_local(x.to_local(), x.device_mesh, x.placements),
}


@torch.no_grad()
@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_held_stays_true(hold: str, mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    pair.run()
    held = HOLDS[hold](pair.state)
    for token in tokens(5):
        pair.step(pair.state, *map(pair.sharded, token))
        step(pair.want, *token)
        pair.check(held.clone())
        pair.check(held)


@torch.no_grad()
def test_who_writes_is_heard(mesh: DeviceMesh) -> None:
    writes: list[Callable[[Any], Any]] = [
        lambda x: x.mul_(0.5),
        lambda x: x.copy_(x * 2.0),
        lambda x: x[0].mul_(0.5),
        lambda x: x.zero_(),
        lambda x: (x._local_tensor if isinstance(x, DTensor) else x).add_(1.0),
    ]
    pair = Pair(mesh)
    for write in writes:
        pair.run()
        write(pair.state), write(pair.want)
        pair.run()
        pair.check(pair.state)


@torch.no_grad()
def test_by_hand(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    for n, token in enumerate(tokens(5)):
        pair.step(pair.state, *map(pair.sharded, token))
        if n < 3:
            step(pair.want, *token)
    assert pair.owed == 5 and "1 buffered state" in str(stats(pair.state))
    rollback(pair.state, 2)
    assert pair.owed == 3
    materialize({"layers": [pair.state]})
    assert pair.owed == 0
    torch.testing.assert_close(plain(pair.state._local_tensor), pair.want)
    report = explain(step, pair.state, *map(pair.sharded, next(tokens(1))), options=FAST)
    assert [(s.name, s.status) for s in report.states] == [("state._local_tensor", "buffered")]


class Wrapper(torch.Tensor):
    """A tensor that has another one inside, of which nobody but itself knows."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, args), **(kwargs or {}))
        return out


@torch.no_grad()
@pytest.mark.parametrize("call", [lambda x: x + 0, torch.clone, lambda x: torch.empty(SIZES).copy_(x), torch.sum])
def test_an_ordinary_state_inside_of_any_tensor(call: Callable[[Tensor], Tensor]) -> None:
    """Wrapped by the user after it was stepped."""
    state = torch.randn(SIZES)
    want = state.clone()
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    for token in tokens(3):
        compiled(state, *token)
        step(want, *token)
    assert int(accounts_of(state)[0].cursor[0].max()) == 3
    torch.testing.assert_close(call(Wrapper(state)), call(want))


@torch.no_grad()
def test_where_they_cannot_be_seen(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension rows are folded in after every step."""
    monkeypatch.setattr(dispatch_watch, "watch", lambda callback: False)
    monkeypatch.setattr(dispatch_watch, "_extension", None)
    pair = Pair(mesh)
    for token in tokens(3):
        pair.step(pair.state, *map(pair.sharded, token))
        step(pair.want, *token)
        assert "operations of DTensor" in (accounts_of(pair.state)[0].shared or "")
        pair.check((pair.state + 0).full_tensor())


# ------------------------------------------------------------------------------------ calls that call others


def stepped() -> tuple[Callable[..., Tensor], Tensor, Tensor, Iterator[tuple[Tensor, ...]]]:
    """A compiled step, a state that owes rows, the same stepped as it is, and tokens to come."""
    want = torch.randn(SIZES)
    state, given = want.clone(), tokens(16)
    run = torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for one in (next(given), next(given)):
            run(state, *one)
            step(want, *one)
    assert owed(state) > 0
    return run, state, want, given


@torch.no_grad()
def test_an_operator_of_the_users_may_step_a_state_and_read_it() -> None:
    run, state, want, given = stepped()
    with torch.library._scoped_library("kvbuffer_users_test", "DEF") as library:
        library.define("decode(Tensor(a!) state, Tensor[] token) -> Tensor")

        def decode(state: Tensor, token: list[Tensor]) -> Tensor:
            return run(state, *token).sum() + state.sum()

        library.impl("decode", decode, "CompositeExplicitAutograd")
        for token in (next(given), next(given), next(given)):
            found = torch.ops.kvbuffer_users_test.decode(state, list(token))
            torch.testing.assert_close(found, step(want, *token).sum() + want.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state + 0, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_beside_one_inside_of_another_tensor() -> None:
    (_, inner, want_inner, _), (_, outer, want_outer, _) = stepped(), stepped()
    found = torch.add(Wrapper(inner), outer)
    torch.testing.assert_close(found, want_inner + want_outer, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_new_data_keeps_a_state_watched() -> None:
    """`state.data = x` takes the dispatch keys of x."""
    run, state, want, given = stepped()
    state.data, want = state.data[[1, 0]], want[[1, 0]]
    for token in (next(given), next(given)):
        run(state, *token)
        step(want, *token)
    assert owed(state) > 0 and dispatch_watch.marked(state)
    torch.testing.assert_close(torch.func.vmap(lambda x: x * 1)(state), want, rtol=1e-4, atol=1e-4)
