"""Generated C++ kernels against the definition: exactly on integers, by the oracle on floats."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kvbuffer_compile.codegen import build, calls
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.memory import overload
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.process import disk
from kvbuffer_compile.steps import ops
from tests.support.daily import chosen, row
from tests.support.programs import NAMED, random_programs, vocabulary
from tests.support.sessions import Session, make_plan

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


def built(plan: Plan):
    """The plan's op, with the generated kernel behind it."""
    op = ops.step_op(plan)
    ops.use_cpp(plan)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kvbuffer::{plan.op_name}", "CPU")
    return op


def play(plan: Plan, steps: int = 11, **options) -> int:
    """Run one session; returns how many steps were compared."""
    session = Session(plan, built(plan), **options)
    while session.steps < steps and session.step():
        pass
    return session.steps


def is_exact(program) -> bool:
    return not any("exp" in str(op) for op in program.ops)


RECURRENT = ("gdn", "gla", "mamba2", "deltaproduct2", "oja", "rwkv6")
# Decays of a head, along keys and along values, corrections, two writes, values mapped before and after a read. The
# rest have a part of these.
DAILY = {"gdn", "kda", "mamba2", "deltaproduct2", "oja", "rwkv6"}


@pytest.mark.parametrize("name", chosen(NAMED, DAILY))
def test_buffered(name):
    """Ragged cursors, a forced flush at every fill level, padding, NaN in unused slots, any strides."""
    inner = "key" if len(name) % 2 else "value"
    plan = make_plan(NAMED[name], sizes=(20, 37), inner=inner)
    if is_exact(NAMED[name]):
        assert play(plan, limits=(1, 3, 2)) > 4
        play(plan, limits=(4, 2, 3), padded=(1,), strided=True)
    play(plan, exact=False, limits=(4, 3, 1))
    play(plan, exact=False, bare=True, strided=True)


@pytest.mark.parametrize("name", chosen(RECURRENT, {"gdn", "mamba2", "oja"}))
def test_recurrent(name):
    plan = make_plan(NAMED[name], "recurrent", sizes=(20, 37), inner="key" if len(name) % 2 else "value")
    if is_exact(NAMED[name]):
        assert play(plan) > 4
        play(plan, strided=True)
    play(plan, exact=False)


@pytest.mark.parametrize("name", chosen(["gdn", "kda", "mamba2", "rwkv7", "oja"], {"gdn", "rwkv7", "oja"}))
def test_verify(name):
    """Any number of tokens at once, some of them taken back after each round."""
    plan = make_plan(NAMED[name], "verify", sizes=(20, 37), capacity=7, inner="key" if len(name) % 2 else "value")
    if is_exact(NAMED[name]):
        assert play(plan, limits=(1, 3, 2)) > 2
        play(plan, limits=(4, 2, 3), padded=(1,), strided=True)
    play(plan, exact=False, limits=(4, 3, 1))
    play(plan, exact=False, bare=True)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(state):
    """16-bit and 64-bit states and rows; operands of every dtype against one kernel."""
    plan = make_plan(NAMED["kda"], sizes=(16, 48), state=state)
    for operands in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        play(plan, operands=operands, exact=False, limits=(4, 2, 3))
    play(plan, operands=state, exact=False, strided=True)


def test_rows_may_have_their_own_dtype():
    plan = make_plan(NAMED["gdn"], rows=torch.bfloat16)
    play(plan, exact=False, operands=torch.bfloat16, limits=(2, 4, 3))


VECTORS = {"-mno-avx512f": 32, "-mno-avx": 48}  # and a width that no other test has, so that the kernels are new


@pytest.mark.parametrize(
    ("flag", "state"),
    [
        row((flag, state), (flag, state) in (("-mno-avx512f", torch.bfloat16), ("-mno-avx", torch.float32)))
        for flag in VECTORS
        for state in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ],
)
def test_narrower_vectors(flag, state, monkeypatch):
    """What processors without AVX-512, and without AVX, run: other vectors, other conversions."""
    monkeypatch.setenv("CXX", f"g++ {flag}")
    wide = VECTORS[flag]
    plan = make_plan(NAMED["kda"], sizes=(24, wide + 9), state=state)
    play(plan, exact=False, operands=state, limits=(4, 2, 3))
    play(plan, exact=False, bare=True)
    for variant, inner in (("recurrent", "key"), ("verify", "value")):
        plan = make_plan(NAMED["gdn"], variant, sizes=(wide + 9, 24), state=state, capacity=7, inner=inner)
        play(plan, exact=False, operands=state)


@pytest.mark.parametrize("flag", ["", *VECTORS])
def test_rounding_to_bfloat16_is_that_of_torch(flag, monkeypatch):
    """A step on a state of zeros with a key of one stores its value. NaN stays NaN, ties go to even."""
    monkeypatch.setenv("CXX", f"g++ {flag}")
    columns = 64 + len(flag)
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ties = torch.nextafter(numbers, numbers * 2)  # a little more than what 16 bits hold
    halves = (numbers.view(torch.int32) + 0x8000).view(torch.float32)  # in the middle between two neighbours
    values = torch.cat([numbers, ties, halves])
    values = torch.nn.functional.pad(values, (0, -len(values) % (2 * columns))).view(-1, 2, columns)
    plan = make_plan(NAMED["gla"], "recurrent", sizes=(1, columns), state=torch.bfloat16)
    state, ones = torch.zeros(len(values), 2, 1, columns, dtype=torch.bfloat16), torch.ones(len(values), 2, 1)
    inputs = {"q": ones, "k": ones, "v": values, "a": ones}
    built(plan)(state, *(inputs[v.name] for v in plan.program.inputs))
    normal = values.abs().view(-1) >= torch.finfo(torch.float32).tiny  # kernels take subnormal numbers for zero
    got, expected = state.view(-1), values.to(torch.bfloat16).view(-1)
    kept = normal | values.isnan().view(-1)
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=0, equal_nan=True)
    assert kept.sum() > 190_000


# ------------------------------------------------------------------------------------------------ random


def sweep(program, variant, inner, merged, sizes, exact):
    plan = make_plan(program, variant, sizes=sizes, inner=inner, merged=merged, capacity=6)
    padded = () if variant == "recurrent" else (1,)
    if exact:
        play(plan, limits=(4, 1, 3))
        play(plan, limits=(2, 3, 1), padded=padded, strided=True)
    else:
        play(plan, exact=False, limits=(4, 2, 1), padded=padded)
        if variant != "recurrent":
            play(plan, exact=False, bare=True)


shapes = st.sampled_from([(5, 19), (17, 4), (16, 33), (1, 1)])
variants = st.sampled_from(["buffered", "recurrent", "verify"])
inners = st.sampled_from(["value", "key"])
lenient = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@seed(4)
@settings(max_examples=5, **lenient)
@given(random_programs(), variants, inners, st.booleans(), shapes)
def test_random_programs(program, variant, inner, merged, sizes):
    sweep(program, variant, inner, merged, sizes, exact=True)


@pytest.mark.nightly
@settings(max_examples=300, **lenient)
@given(random_programs(), variants, inners, st.booleans(), shapes)
def test_many_random_programs(program, variant, inner, merged, sizes):
    sweep(program, variant, inner, merged, sizes, exact=True)


@pytest.mark.nightly
@settings(max_examples=200, **lenient)
@given(random_programs(exact=False), variants, inners, st.booleans(), shapes)
def test_many_random_float_programs(program, variant, inner, merged, sizes):
    sweep(program, variant, inner, merged, sizes, exact=False)


@pytest.mark.parametrize("inner", [row("value", True), row("key", False)])
@pytest.mark.parametrize("variant", ["recurrent", "buffered"])
@pytest.mark.parametrize("columns", [row(n, n in (32, 128)) for n in (16, 32, 64, 128)])
@pytest.mark.parametrize("name", [row(name, name == "gdn") for name in ("gdn", "gla", "mamba2", "oja", "rwkv7")])
def test_rows_that_are_a_few_vectors_long(name, columns, variant, inner):
    """2, 4 or 8 vectors: their sums stay in registers. Passes that read, that fold, forwards, backwards; no state."""
    sizes = (7, columns) if inner == "value" else (columns, 7)
    for dtype in (torch.float32, torch.bfloat16):
        plan = make_plan(NAMED[name], variant, sizes=sizes, inner=inner, state=dtype)
        exact = is_exact(NAMED[name])
        assert play(plan, exact=exact and dtype == torch.float32, limits=(2, 3, 1)) > 1
    if variant == "buffered":
        play(make_plan(NAMED[name], variant, sizes=sizes, inner=inner), exact=False, bare=True)


# ------------------------------------------------------------------------------------------ tile and threads


@pytest.mark.parametrize("inner", ["value", "key"])
def test_threads_share_a_lane(inner):
    """More threads than lanes: the state is cut into tiles, and rows that tiles share are stored once."""
    plan = make_plan(NAMED["gdn"], sizes=(96, 150), inner=inner)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        play(plan, limits=(1, 2, 3))
        play(plan, exact=False, limits=(4, 2, 3))
    finally:
        torch.set_num_threads(threads)


def test_a_state_without_a_sequence_lane_has_one_cursor():
    text = str(NAMED["gdn"]).replace("over b h", "over h").replace("(b h)", "(h)")
    layout = Layout(((5,), (2,), (19,)), (1, 0, 2))
    dtypes = (torch.float32,) * 3
    plan = Plan(parse(text), layout, "buffered", (5, 19), 3, 3, torch.float32, dtypes, torch.float32, "cpp")
    assert play(plan) == 11


def test_a_state_without_lanes():
    text = str(NAMED["kda"]).replace("over b h", "over -").replace("(b h)", "()")
    plan = make_plan(parse(text))
    assert play(plan) > 4 and play(plan, strided=True) > 4
    assert play(make_plan(parse(text), "recurrent")) > 4


def test_no_sequences():
    plan = make_plan(NAMED["gdn"])
    session = Session(plan, built(plan))
    inputs = [x[:0] for x in session.draw().values()]
    out = session.op(session.state[:0], session.cursor[:, :0], *(r[:0] for r in session.rows), *inputs)
    assert out.shape == (0, 2, 19)


@pytest.mark.nightly
def test_states_beyond_two_to_the_31_elements():
    """Lanes so far apart that a 32-bit offset would wrap; only the pages in use exist."""
    plan = make_plan(NAMED["gdn"], state=torch.bfloat16)
    session = Session(plan, built(plan))
    room = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = room.as_strided(session.state.shape, (2**30, 2**18, *session.state.stride()[2:]))
    session.state = far.copy_(session.state)
    while session.step() and session.steps < 6:
        pass
    assert session.steps == 6


@pytest.mark.parametrize("variant", ["recurrent", "buffered", "verify"])
def test_opcheck(variant):
    plan = make_plan(NAMED["mamba2"], variant)
    session = Session(plan, built(plan), exact=False)
    inputs = [torch.stack([x] * 2, dim=2) if variant == "verify" else x for x in session.draw().values()]
    side = [] if variant == "recurrent" else [session.cursor, *(r.nan_to_num() for r in session.rows)]
    torch.library.opcheck(session.op, (session.state, *side, *inputs))


@pytest.mark.parametrize("outputs", ["", "o, y"])
def test_any_number_of_outputs(outputs):
    plan = make_plan(parse(str(NAMED["gdn"]).replace("return o", f"return {outputs}")))
    assert play(plan) > 4


# --------------------------------------------------------------------------------------------- vocabulary

ONE = torch.tensor([-2.5, -1.0, -0.0, 0.0, 0.3, 1.0, 7.5, 100.0, -100.0, float("inf"), -float("inf"), float("nan")])


def spellable(fn: str) -> bool:
    """Whether torch has the overload and takes the arguments by position."""
    try:
        arguments = overload(fn)._schema.arguments
    except AttributeError:
        return False
    call = calls.CALLS[fn]
    return call.arity - len(call.defaults) <= sum(not a.kwarg_only for a in arguments)


def test_vocabulary():
    """Every row of the table against its ATen op, in one kernel, on values that include inf and NaN."""
    assert all(map(spellable, calls.CALLS)), [fn for fn in calls.CALLS if not spellable(fn)]
    values = {"x": ONE, "z": ONE.roll(5), "c": ONE > 0.5, "w": ONE.roll(5) > 0.5}
    program, made = vocabulary()
    plan = make_plan(program, "recurrent", sizes=(1, len(ONE)))
    outs = built(plan)(torch.zeros(3, 1, len(ONE)), values["x"].expand(3, -1), values["z"].expand(3, -1))
    for (fn, words), got in zip(made.values(), outs, strict=True):
        want = overload(fn)(*(values.get(w, 0.75) for w in words)).float()
        keep = ONE.isfinite() if "gelu" in fn else slice(None)  # torch's gelu(inf) is NaN
        torch.testing.assert_close(got[0][keep], want[keep], rtol=5e-6, atol=1e-7, equal_nan=True, msg=fn)


def test_exp_is_as_good_as_torchs():
    x = torch.cat([torch.linspace(-110, 95, 4001), torch.linspace(-1, 1, 4001), torch.tensor([-1e30, 1e30, -88.9])])
    text = "program over b tokens 1\n  input x: value(b)\n  y = aten.exp.default(x)\n  return y"
    plan = make_plan(parse(text), "recurrent", sizes=(1, len(x)))
    got = built(plan)(torch.zeros(3, 1, len(x)), x.expand(3, -1))[0]
    exact = x.double().exp()
    exact = exact.where(exact >= torch.finfo(torch.float32).tiny, 0)  # kernels know no subnormal numbers
    finite = exact < torch.finfo(torch.float32).max
    assert ((got.double() - exact).abs() <= torch.finfo(torch.float32).eps * exact)[finite].all()
    assert got[~finite].isinf().all()


def test_an_unknown_op_is_named():
    text = "program over b tokens 1\n  input x: value(b)\n  y = aten.digamma.default(x)\n  return y"
    with pytest.raises(EmitError, match="digamma"):
        cpp.emit(make_plan(parse(text), "verify"))


def test_reserved_words_may_be_names():
    names = {
        "q": "float",
        "k": "block",
        "v": "at",
        "g": "std",
        "u": "K",
        "beta": "m",
        "d": "NAN",
        "o": "Row_k",
        "y": "_",
    }
    text = str(NAMED["gdn"])
    for old, new in names.items():
        text = re.sub(rf"\b{old}\b", new, text)
    assert play(make_plan(parse(text))) > 4


# ------------------------------------------------------------------------------------------------ refusals


def test_wrong_tensors_are_refused():
    plan = make_plan(NAMED["retnet"], "recurrent")
    op = built(plan)
    session = Session(plan, op)
    good = list(session.draw().values())
    op(session.state, *good)
    with pytest.raises(RuntimeError, match="q has the wrong width"):
        op(session.state, good[0][..., :-1], *good[1:])
    with pytest.raises(RuntimeError, match="state must be f32"):
        op(session.state.double(), *good)
    with pytest.raises(RuntimeError, match="k has a lane"):
        op(session.state, good[0], good[1].repeat(2, 1, 1), *good[2:])
    with pytest.raises(RuntimeError, match="v must be a floating point tensor"):
        op(session.state, *good[:2], good[2].long(), *good[3:])


# ---------------------------------------------------------------------------------------------- build, cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert disk.folder() == tmp_path / "kvbuffer"
    return tmp_path / "kvbuffer"


SOURCE = 'extern "C" int answer() { return 42; }\n'


def test_a_library_is_built_once(cache):
    path = build.library(SOURCE)
    stamp = path.stat().st_mtime_ns
    assert build.library(SOURCE) == path and path.stat().st_mtime_ns == stamp
    assert path.with_suffix(".cpp").read_text() == SOURCE
    assert sorted(p.suffix for p in cache.iterdir()) == [".cpp", ".so"], "no temporary files stay behind"


@pytest.mark.parametrize("harm", ["truncated", "empty", "changed", "gone"])
def test_a_broken_entry_is_rebuilt(cache, harm):
    path = build.library(SOURCE)
    data = path.read_bytes()
    broken = {"truncated": data[: len(data) // 2], "empty": b"", "changed": b"x" + data[1:]}
    path.unlink() if harm == "gone" else path.write_bytes(broken[harm])
    assert build.library(SOURCE).read_bytes()[:4] == b"\x7fELF"
    assert build.is_whole(path)


def _race(folder: str, ready) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    ready.wait()
    build.library(SOURCE)


@pytest.mark.nightly  # eight of them want one in `test_disk`, without the seconds that a fresh interpreter takes
def test_two_processes_may_build_at_once(cache):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    workers = [context.Process(target=_race, args=(str(cache.parent), ready)) for _ in range(2)]
    for w in workers:
        w.start()
    ready.set()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0, 0]
    (library,) = cache.glob("*.so")
    assert build.is_whole(library)


def test_no_compiler_says_what_to_install(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiler() is None
    with pytest.raises(EmitError, match="install a C"):
        build.library(SOURCE)


def test_a_failing_compiler_is_quoted(cache):
    with pytest.raises(EmitError, match="nonsense"):
        build.library("nonsense;")
    assert not list(cache.glob("*.so"))


def test_flags_and_compiler_are_part_of_the_key(cache, monkeypatch):
    first = build.library(SOURCE)
    monkeypatch.setenv("CXX", "g++ -DOTHER")
    assert build.library(SOURCE) != first


STEPS = "buffered or recurrent or verify"
CACHE = "library or entry or process or compiler or folder"
LONG = "many or elements or sanitizers or few_vectors"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("test_cpp.py", f"({STEPS}) and not ({LONG})"),
        ("test_cpp.py", f"not ({STEPS} or {CACHE} or {LONG})"),
        ("test_cut.py", f"not ({LONG})"),
        ("test_tree_cpp.py", f"not ({LONG})"),
    ],
)
def test_under_the_sanitizers(file, names):
    """The tests of kernels once more with AddressSanitizer and UBSan in these."""
    libraries = ["libasan.so", "libstdc++.so"]  # without the second, AddressSanitizer fails at the first exception
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in libraries
    ]
    env = {**os.environ, "KVBUFFER_SANITIZE": "1", "LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(file)), "-m", "", "-k", names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
