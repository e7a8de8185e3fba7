"""Warm starts: what another process has made of a graph is used where all is as it was, and nowhere else.

Here `torch._dynamo.reset()` stands in for another process: every graph is captured anew, and what was made of it comes
from disk. One test starts processes.
"""

import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import kvbuffer_compile
from kvbuffer_compile import Options, backend
from kvbuffer_compile.errors import DeclinedError
from kvbuffer_compile.records import observers
from kvbuffer_compile.steps import targets
from kvbuffer_compile.warm import kept
from kvbuffer_compile.warm import key as keys

TOKENS = 7
Step = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared_cache))
    monkeypatch.setenv("KVBUFFER_CACHE", "1")
    return shared_cache


def gla(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    state.mul_(decay[..., None, None]).add_(k[..., None] * v[..., None, :])
    return (state * q[..., None]).sum(-2)


def operands(shape: tuple[int, ...] = (2, 3, 8), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, decay; each in memory of its own."""
    return [torch.randn(shape, dtype=dtype) for _ in range(3)] + [torch.rand(shape[:-1], dtype=dtype)]


def run(step: Step, made: Callable[[], list[Tensor]] = operands, state: Tensor | None = None) -> list[Tensor]:
    """Outputs of some tokens, and the state."""
    torch.manual_seed(0)
    given = made()
    width = given[0].shape[-1]
    state = torch.zeros(*given[0].shape, width, dtype=given[0].dtype) if state is None else state
    outputs = [step(state, *given)]
    for _ in range(TOKENS - 1):
        outputs.append(step(state, *made()))
    return [*outputs, state.clone()]


@contextmanager
def counted(**expected: int) -> Iterator[None]:
    """With so many hits (and so on) of AOTAutograd's cache."""
    counters.clear()
    yield
    found = counters["aot_autograd"]
    assert {name: found[f"autograd_cache_{name}"] for name in expected} == expected


def compiled(step: Step, **options: Any) -> Step:
    torch._dynamo.reset()
    return torch.compile(step, backend="kvbuffer", options={"flush": 3, "target": "aten", **options}, dynamic=False)


@torch.no_grad()
def agrees(step: Step, made: Callable[[], list[Tensor]] = operands, **options: Any) -> int:
    """Compile a step anew, compare its numbers with eager's, and say how often it flushed."""
    wanted, given = run(step, made), made()
    state = torch.zeros(*given[0].shape, given[0].shape[-1], dtype=given[0].dtype)
    found = run(compiled(step, **options), made, state)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    return int(kvbuffer_compile.stats(state).to_dict()["totals"]["flushes"])


def warm(step: Step = gla, made: Callable[[], list[Tensor]] = operands, **options: Any) -> int:
    """The same, where all comes from the cache."""
    with counted(hit=1, miss=0, bypass=0):
        return agrees(step, made, **options)


# ----------------------------------------------------------------------------------------------- another process

CHILD = textwrap.dedent(
    """
    import logging, sys, warnings
    import torch
    import kvbuffer_compile
    from torch._dynamo.utils import counters
    from kvbuffer_compile.codegen.cpp import compiler
    from tests.product.test_warm import gla, run, operands

    warm = sys.argv[1] == "warm"
    asked = []
    original = compiler.run
    compiler.run = lambda words, arguments: asked.append(list(arguments)) or original(words, arguments)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("kvbuffer_compile")
    log.addHandler(handler), log.setLevel(logging.INFO)
    with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = run(torch.compile(gla, backend="kvbuffer", options={"flush": 3}))
        for ours, theirs in zip(found, run(gla), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counters["aot_autograd"]["autograd_cache_hit"] == warm, dict(counters["aot_autograd"])
    assert not warm or asked == [["--version"]], asked
    steps = kvbuffer_compile.stats().to_dict()["gone"]
    assert steps["steps"] == 7 and steps["flushes"] == 2, steps
    assert any("DUR buffered L=3" in line and "target=cpp" in line for line in said), said
    assert any("flush=3 is predicted" in str(w.message) for w in warned)
    with torch.no_grad():
        report = kvbuffer_compile.explain(gla, torch.zeros(2, 3, 8, 8), *operands(), options={"flush": 3})
    assert [state.status for state in report.states] == ["buffered"]
    print("well")
    """
)


def test_a_second_process_takes_everything_from_disk(tmp_path: Path) -> None:
    for way in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, way], capture_output=True, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "KVBUFFER_CACHE": "1"},
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "well\n", done.stderr[-3000:]


# --------------------------------------------------------------------------------------------- what is parted


def test_what_is_the_same_is_found_and_flushes_as_before() -> None:
    first = agrees(gla)
    assert first > 0
    assert warm() == first


def test_other_options_are_other_graphs() -> None:
    agrees(gla)
    assert agrees(gla, flush=2) > warm()
    with counted(hit=0):
        assert agrees(gla, flush=1) == 0  # recurrent: nothing is owed
    for given in ({"row_dtype": torch.float64}, {"capacity": 5}, {"target": "cpp"}, {"donate": True}):
        with counted(hit=0, saved=1):
            agrees(gla, **given)
        warm(**given)


def scaled(factor: float) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return gla(state, q, k, v, decay * factor)

    return step


def test_another_number_in_the_model_is_another_graph() -> None:
    for factor in (0.5, 0.25, 0.5):
        agrees(scaled(factor))
    warm(scaled(0.25))


class Gated(torch.nn.Module):
    """A model whose decay is a buffer."""

    decay: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.register_buffer("decay", torch.full((3,), decay))

    def forward(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return gla(state, q, k, v, self.decay.expand_as(decay))


def test_the_values_of_buffers_are_never_kept() -> None:
    for decay in (0.9, 0.3):
        agrees(Gated(decay))


def test_operators_of_the_users_are_never_kept() -> None:
    """A graph's text has their names only, and torch traces into them."""
    for factor in (0.5, 0.25):
        with torch.library._scoped_library("kvbuffer_warm_test", "DEF") as library:
            library.define("gate(Tensor x) -> Tensor")
            library.impl("gate", lambda x, factor=factor: x * factor, "CompositeImplicitAutograd")

            def gated(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
                return gla(state, q, k, v, torch.ops.kvbuffer_warm_test.gate(decay))

            with counted(hit=0, miss=0, saved=0):
                assert agrees(gated) > 0


def test_bounds_of_sizes_are_in_the_key() -> None:
    """They decide whether the tokens of a call fit in a buffer; which guards there are comes from them."""
    seen = set()
    for most in (None, 8, 16):

        def keep(gm: Any, inputs: list[Any]) -> Any:
            found = keys.key_for(gm, inputs, Options(flush=3, cache=True), {})
            assert found is not None
            seen.add(found.uuid())
            return gm.forward

        torch._dynamo.reset()
        x = torch.ones(2, 4)
        torch._dynamo.mark_dynamic(x, 1, **({} if most is None else {"min": 1, "max": most}))
        torch.compile(lambda x: x * 2, backend=keep)(x)
    assert len(seen) == 3


def test_what_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of kernels, for one: the next process tries again."""
    with monkeypatch.context() as patch, counted(saved=0):
        patch.setattr(targets, "_built", lambda plan: False)
        agrees(gla, target="cpp", flush=2)
    with counted(hit=0, miss=1, saved=1):
        assert agrees(gla, target="cpp", flush=2) > 0
    monkeypatch.delenv("KVBUFFER_STRICT", raising=False)  # else it is raised
    with monkeypatch.context() as patch, counted(saved=0), pytest.warns(UserWarning, match="internal error"):
        patch.setattr(backend, "rewrite_graph", Mock(side_effect=MemoryError("none left")))
        agrees(gla, flush=6)


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVBUFFER_CACHE")
    assert [_key(Options(cache=asked)) is not None for asked in (None, False, True)] == [False, False, True]
    monkeypatch.setenv("KVBUFFER_CACHE", "0")
    assert _key(Options(cache=True)) is None
    monkeypatch.setenv("KVBUFFER_CACHE", "1")
    assert [_key(Options(cache=asked)) is not None for asked in (None, False, True)] == [True, False, True]


def test_other_inputs_are_other_graphs() -> None:
    def turned() -> list[Tensor]:
        return [x.mT.contiguous().mT if x.dim() == 3 else x for x in operands()]

    others = (lambda: operands((4, 3, 8)), lambda: operands((2, 3, 16)), lambda: operands(dtype=torch.float64))
    for made in (*others, turned, operands):
        agrees(gla, made)
    for made in (turned, operands):
        warm(gla, made)


def halves(q: Tensor, state: Tensor, other: Tensor) -> Tensor:
    """What it returns depends on whether `other` is the state's memory."""
    state.mul_(0.5).add_(q[..., None] * q[..., None, :])
    return other + state.sum()


@torch.no_grad()
def test_how_inputs_share_memory_is_seen() -> None:
    def both(step: Step, shared: bool | None) -> list[Tensor]:
        memory = torch.ones(2, 2, 3, 8, 8)
        state, other = memory[0], memory[0 if shared else 1]
        other = other.clone() if shared is None else other
        return [step(torch.ones(2, 3, 8), state, other), state.clone()]

    for shared in (False, True, None, False, True, None):  # parts of one memory, the same, and strangers
        for ours, theirs in zip(both(compiled(halves), shared), both(halves, shared), strict=True):
            torch.testing.assert_close(ours, theirs)


def _key(ours: kvbuffer_compile.Options = kvbuffer_compile.Options(flush=3), **patches: Any) -> Any:  # noqa: B008
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    found = keys.key_for(gm, [torch.ones(2, 2)], ours, patches)
    return None if found is None else found.uuid()


def test_what_the_process_is_like_is_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = _key()
    assert first is not None and first == _key()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert _key() not in (None, first)
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(keys, "source", lambda: "of another version")
        assert _key() not in (None, first)
    for name, value in (("KVBUFFER_TUNE", "0"), ("TRITON_INTERPRET", "1"), ("CXX", "/no/such/compiler")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert _key() not in (None, first), name
    assert _key() == first


def test_the_measured_machine_is_in_the_key_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from kvbuffer_compile.machine import stored

    auto = kvbuffer_compile.Options()
    asked, chosen = _key(), _key(auto)
    known = stored.machine_for("cpu")
    monkeypatch.setitem(stored._machines, ("cpu", known.name), replace(known, launch=2 * known.launch))
    assert _key() == asked and _key(auto) not in (None, chosen)


def test_the_source_is_all_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editing any file of the package, C++ headers included, makes another key; edited after it was imported, none."""
    package = Path(kvbuffer_compile.__file__).parent
    for folder in ("passes", "codegen", "warm", "runtime"):
        shutil.copytree((package / folder).resolve(), tmp_path / "package" / folder)
    monkeypatch.setattr(keys, "OURS", tmp_path / "package")
    monkeypatch.setattr(keys, "_mapped", list)
    seen = {_source_now(monkeypatch)}
    for file in ("codegen/cpp/rows.h", "passes/walk/walk.py"):
        path = tmp_path / "package" / file
        path.write_text(path.read_text() + "\n")
        keys.source.cache_clear()
        with pytest.raises(keys.Unknown, match="changed since"):
            keys.source()
        seen.add(_source_now(monkeypatch))
    assert len(seen) == 3
    (tmp_path / "package" / "warm" / "key.py").unlink()
    with pytest.raises(keys.Unknown, match="not on disk"):
        _source_now(monkeypatch)


def _source_now(monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash that a process has which imports the package now."""
    monkeypatch.setattr(keys, "_IMPORTED", keys._stamps())
    keys.source.cache_clear()
    return keys.source()


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    keys.source.cache_clear()


# ------------------------------------------------------------------------------------------- what is still told


def nonlinear(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    state.copy_(torch.tanh(state) * decay[..., None, None] + k[..., None] * v[..., None, :])
    return (state * q[..., None]).sum(-2)


@torch.no_grad()
def test_declines_are_told_and_raised_from_the_cache_too(caplog: pytest.LogCaptureFixture) -> None:
    for hit in (0, 1):
        with caplog.at_level(logging.INFO, "kvbuffer_compile"), counted(hit=hit, bypass=0):
            agrees(nonlinear)
        assert "declined state: " in caplog.text
        caplog.clear()
        with pytest.warns(UserWarning, match="kvbuffer declined state"), counted(hit=hit):
            agrees(nonlinear, on_decline="warn")
        with pytest.raises(Exception, match="state") as raised, counted(hit=0):
            agrees(nonlinear, on_decline="raise")
        assert isinstance(raised.value.__cause__ or raised.value, DeclinedError)


def test_who_wants_to_see_a_graph_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    agrees(gla)
    warm()
    with counted(hit=0, miss=0):
        with observers.also(seen.append):
            agrees(gla)
        assert len(seen) == 1 and seen[0].rewritten
        agrees(gla, dump=tmp_path / "dump")
        assert list((tmp_path / "dump").iterdir())
        agrees(gla, check=True)
        agrees(gla, cache=False)
        with monkeypatch.context() as patch:
            patch.setenv("KVBUFFER_CACHE", "0")
            agrees(gla)
        with torch._functorch.config.patch(enable_autograd_cache=False):
            agrees(gla)
    warm()


# ------------------------------------------------------------------------------------------- files in the cache


def entries(cache: Path) -> list[Path]:
    return [path for path in (cache / "aotautograd").rglob("*") if path.is_file()]


class Foreign:
    """What somebody else has left."""

    guards_expr = None


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", None, pickle.dumps(Foreign()), pickle.dumps({"a": 1})],
    ids=["empty", "text", "torn", "of another class", "a dict"],
)
def test_files_that_are_no_entries_are_passed_by(
    content: bytes | None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agrees(gla)
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("aotautograd"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    agrees(gla)
    found = entries(tmp_path / "cache")
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    agrees(gla)


def test_what_inductor_lost_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    agrees(gla)
    shutil.rmtree(tmp_path / "fxgraph")
    with counted(hit=0, miss=1):
        agrees(gla)
    warm()


def test_a_kernel_that_is_gone_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees(gla, target="cpp")
    warm(target="cpp")
    monkeypatch.setattr(kept.targets, "build", lambda plan: "aten")
    with counted(hit=0, miss=1):
        agrees(gla, target="cpp")


def test_a_folder_of_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = _key()
    assert first is not None and (tmp_path / "aotautograd").stat().st_mode & 0o777 == 0o700
    (tmp_path / "aotautograd").chmod(0o777)
    assert _key() is None
    (tmp_path / "aotautograd").rmdir()
    (tmp_path / "aotautograd").write_text("a file")
    assert _key() is None
    with counted(hit=0, miss=0, saved=0):
        agrees(gla)


def test_a_disk_without_room_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch._aot_autograd import autograd_cache

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch, counted(saved=0):
        patch.setattr(autograd_cache, "write_atomic", full)
        agrees(gla)
    with counted(hit=0, saved=1):
        agrees(gla)


def unwritable(*_: object) -> Any:
    raise TypeError("cannot pickle '_thread.lock' object")


def test_what_cannot_be_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch, counted(saved=0):
        patch.setattr(kept.KeptStep, "__getstate__", unwritable)
        agrees(gla)
    assert not entries(tmp_path)


# ------------------------------------------------------------------------------------------------- other cases


@torch.no_grad()
def test_sizes_that_change_are_kept_with_their_guards() -> None:
    def of(n: int) -> Callable[[], list[Tensor]]:
        return lambda: operands((n, 3, 8))

    wanted = {n: run(gla, of(n)) for n in (2, 5, 9)}
    for order, hit in (((2, 5, 9), False), ((2, 5, 9), True), ((9, 2, 5), False)):
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(gla, backend="kvbuffer", options={"flush": 3, "target": "aten"}, dynamic=True)
        for n in order:
            for ours, theirs in zip(run(step, of(n)), wanted[n], strict=True):
                torch.testing.assert_close(ours, theirs)
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
        assert not hit or counters["aot_autograd"]["autograd_cache_hit"]


def test_training_is_left_to_torch() -> None:
    weight = torch.rand(8, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return ((x * weight) ** 2).sum()

    for _ in range(2):
        torch._dynamo.reset()
        weight.grad = None
        with counted(hit=0, miss=0):
            torch.compile(loss, backend="kvbuffer")(torch.ones(8)).backward()
        torch.testing.assert_close(weight.grad, 2 * weight.detach())


class Counting(CustomGraphPass):
    seen = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        Counting.seen += 1

    def uuid(self) -> str:
        return "counting"


def test_a_pass_of_the_users_still_runs_and_parts_entries() -> None:
    agrees(gla)
    Counting.seen = 0
    with counted(hit=0, saved=1):
        agrees(gla, post_grad_custom_pre_pass=Counting())
    assert Counting.seen == 1
    warm(post_grad_custom_pre_pass=Counting())
    assert _key(post_grad_custom_pre_pass=lambda graph: None) is None
