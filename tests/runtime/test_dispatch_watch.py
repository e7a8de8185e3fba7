"""A call with a marked tensor is reported, once, however the tensor is passed and whoever makes the call."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils._python_dispatch import TorchDispatchMode

from kvbuffer_compile.codegen import build
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.dispatch_watch import mark, marked, unmark, unwatched, watch
from kvbuffer_compile.native.library import built_once

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

OPS = torch.library.Library("test_watch", "FRAGMENT")
OPS.define("outer(Tensor x, Tensor other) -> Tensor")


class Seen(list):
    """The names of the ops that were reported; `tensors` holds what they got."""

    def __init__(self) -> None:
        self.tensors = []

    def __call__(self, op, tensors):
        self.append(op)
        self.tensors.append(tensors)


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(dispatch_watch, "_callback", None)  # put back afterwards
    found = Seen()
    assert watch(found)
    return found


def state(*sizes, **kwargs):
    tensor = torch.rand(*(sizes or (2, 3)), **kwargs)
    mark(tensor)
    return tensor


def test_the_callback_gets_the_op_and_the_tensor(seen):
    s = state()
    s.sum(0)
    assert seen == ["aten::sum.dim_IntList"]
    ((got,),) = seen.tensors
    assert got is s


def test_unmarked_tensors_are_not_reported(seen):
    s = state()
    unmark(s)
    assert not marked(s)
    s.sum()
    torch.randn(2).sum()
    assert not seen


def test_once_for_a_call_and_all_the_calls_it_makes(seen):
    s = state(3, 3)
    torch.einsum("ij,jk->ik", s, s)  # made of views, permutations and a product
    assert seen == ["aten::einsum"]
    torch.nn.functional.linear(s, torch.randn(4, 3))
    assert seen == ["aten::einsum", "aten::linear"]


def test_another_tensor_met_on_the_way_is_reported(seen):
    """Not in the arguments: the body of an op that is written in Python has it from elsewhere."""
    s, other = state(), state()
    OPS.impl("outer", lambda x, y: x + torch.tensor(other) * y, "CompositeExplicitAutograd", allow_override=True)
    torch.ops.test_watch.outer(s, torch.randn(2, 3))
    assert seen[0] == "test_watch::outer" and seen[1] == "aten::detach"
    assert [t[0] is s for t in seen.tensors] == [True] + [False] * (len(seen) - 1)


LISTS = {
    "tensors": lambda s, x: torch.stack([x, s]),
    "by keyword": lambda s, x: torch.cat(tensors=[s, x]),
    "optional tensors": lambda s, x: x[None, s.long()],
    "several lists": lambda s, x: torch._foreach_add([x, x], [x, s]),
    "out": lambda s, x: torch.add(x, x, out=s),
    "attention": lambda s, x: attention(query=x[None], key=s[None], value=x[None]),
}


@pytest.mark.parametrize("name", LISTS)
def test_however_it_is_passed(seen, name):
    x, plain = torch.rand(2, 3), torch.rand(2, 3)
    want = LISTS[name](plain, x)
    s = plain.clone()
    mark(s)
    got = LISTS[name](s, x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert seen


# What the class of a tensor is never asked about.
BELOW_PYTHON = {
    "torch.tensor": lambda s: torch.tensor(s),
    "new_tensor": lambda s: torch.zeros(1).new_tensor(s),
    "torch.Tensor": lambda s: torch.Tensor(s).clone(),
    "FloatTensor": lambda s: torch.FloatTensor(s).clone(),
    "new": lambda s: torch.zeros(1).new(s).clone(),
    "as_subclass": lambda s: s.as_subclass(torch.Tensor).clone(),
    "as_tensor": lambda s: torch.as_tensor(s, dtype=torch.float64).float(),
    "asarray": lambda s: torch.asarray(s, copy=True),
    "nested_tensor": lambda s: torch.nested.nested_tensor([s]).to_padded_tensor(0.0)[0],
    "sparse_coo_tensor": lambda s: torch.sparse_coo_tensor(torch.arange(2)[None], s).to_dense(),
    "vmap": lambda s: torch.vmap(lambda x: x * 1.0)(s),
    "vmap over another": lambda s: torch.vmap(lambda x: x * s)(torch.ones(1))[0],
    "grad": lambda s: torch.func.grad(lambda x: (x * x).sum() / 2)(s),
    "vjp": lambda s: torch.func.vjp(lambda x: x * 1.0, s)[0],
    "jvp": lambda s: torch.func.jvp(lambda x: x * 1.0, (s,), (torch.ones(2, 3),))[0],
    "jacrev": lambda s: torch.func.jacrev(lambda x: (x * x).sum() / 2)(s),
    "functionalize": lambda s: torch.func.functionalize(lambda x: x * 1.0)(s),
    "map": lambda s: torch._higher_order_ops.map(lambda x: x * 1.0, s),
    "script": lambda s: scripted(s),
    "trace": lambda s: torch.jit.trace(lambda x: x * 1.0, torch.rand(2, 3))(s),
}


@torch.jit.script
def scripted(x):
    return x * 1.0


@pytest.mark.parametrize("name", BELOW_PYTHON)
def test_calls_below_python(seen, name):
    """The callback changes the tensor, as settling does: the call must get what it has become."""
    dispatch_watch._callback = lambda op, tensors: (seen(op, tensors), s.fill_(7.0))
    s = state()
    assert torch.equal(BELOW_PYTHON[name](s), torch.full((2, 3), 7.0))
    assert seen


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_take_marked_tensors(seen, backend):
    s = state()
    want = s.clone() * 2 + 1
    torch.testing.assert_close(torch.compile(lambda x: x * 2 + 1, backend=backend, fullgraph=True)(s), want)
    torch.compile(lambda x: x.mul_(2), backend=backend, fullgraph=True)(s)
    torch.testing.assert_close(s.clone() + 1, want)
    assert marked(s)


def test_views_are_marked_and_copies_are_not(seen):
    s = state()
    views = [s[0], s.view(6), s.T, s.detach(), s.data, s.expand(4, 2, 3), *s.unbind(), s.contiguous(), s.to(s.dtype)]
    assert all(map(marked, views))
    with torch.inference_mode():
        assert marked(s[0])
    copies = [s.clone(), s + 0, torch.empty_like(s), s.to(torch.float64), s.T.contiguous(), s.to("meta")]
    assert not any(map(marked, [*copies, copy.deepcopy(s), torch.tensor(s)]))


def test_tensors_that_are_pointed_at_its_memory_are_marked(seen):
    s = state()
    by_set, by_data = torch.empty(0), torch.empty(0)
    by_set.set_(s)
    by_data.data = s
    nested = torch.nested.as_nested_tensor(state(2, 2, 3))
    assert marked(by_set) and marked(by_data) and marked(nested)


def test_autograd_and_autocast_still_act(seen):
    s = state(3, 3).requires_grad_()
    (s[0] * 2).sum().backward()
    assert torch.equal(s.grad, torch.tensor([[2.0] * 3, [0.0] * 3, [0.0] * 3])) and not marked(s.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (s @ s).dtype == torch.bfloat16


def test_modes_see_each_call_once(seen):
    class Count(TorchDispatchMode):
        calls = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += (str(func),)
            return func(*args, **(kwargs or {}))

    s = state()
    with Count():
        s * 2
    assert Count.calls == ("aten.mul.Tensor",) and seen == ["aten::mul.Tensor"]


def test_marked_tensors_become_fake_ones(seen):
    with torch._subclasses.FakeTensorMode() as mode:
        assert not marked(mode.from_tensor(state()))


class Refused(Exception):
    pass


def test_exceptions_come_through_as_they_are(seen):
    s = state()

    def refuse(op, tensors):
        raise Refused(op)

    dispatch_watch._callback = refuse
    for call, op in ((s.sum, "aten::sum"), (lambda: torch.vmap(lambda x: x + 1)(s), "aten::add.Tensor")):
        with pytest.raises(Refused, match=op):
            call()
    dispatch_watch._callback = seen
    s.sum()
    assert seen == ["aten::sum"], "a call that failed must not hide later ones"


def test_what_the_callback_does_is_not_reported(seen):
    s = state()
    dispatch_watch._callback = lambda op, tensors: (seen(op, tensors), s.sum(), s.mul_(2))
    s.sum()
    assert seen == ["aten::sum"]


def test_unwatched(seen):
    s = state()
    with unwatched():
        s.sum()
        assert marked(s[0])
    assert not seen
    s.sum()
    assert seen == ["aten::sum"]


def test_threads(seen):
    """Four threads that hold the lock of the interpreter, and one of TorchScript's that does not."""
    s = state()
    loops = [threading.Thread(target=lambda: [s.sum() for _ in range(200)]) for _ in range(4)]
    for thread in loops:
        thread.start()
    forked(s)
    for thread in loops:
        thread.join()
    assert seen.count("aten::sum") == 800 and seen.count("aten::neg") == 1


@torch.jit.script
def forked(x):
    return torch.jit.wait(torch.jit.fork(torch.neg, x))


AT_EXIT = """
import atexit, torch
from kvbuffer_compile.guard.dispatch_watch import mark, watch
s = torch.ones(3)
atexit.register(lambda: print("after", s.sum().item()))  # runs after what watch registers
assert watch(lambda op, tensors: print(op))
mark(s)
s.sum()
"""


def test_nothing_is_reported_while_the_interpreter_exits():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["aten::sum", "after 3.0"], done.stderr
    assert done.returncode == 0


def test_no_compiler_is_said_once(monkeypatch, request):
    built_once.cache_clear()
    request.addfinalizer(built_once.cache_clear)
    for name, value in (("_extension", None), ("_failed", False), ("_callback", None)):
        monkeypatch.setattr(dispatch_watch, name, value)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not watch(print)
        assert not watch(print)
    (warning,) = told
    assert "install a C++ compiler" in str(warning.message) and "README" in str(warning.message)
    s = torch.ones(2)
    mark(s)
    assert not marked(s)
    assert s.sum() == 2
