"""What the C++ kernels promise besides right results: threads, memory, how many there are, what they cost to build."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvbuffer_compile.codegen import build
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.steps import ops
from tests.kernels.test_cpp import built, play
from tests.runtime.test_runtime import step
from tests.support.programs import NAMED, gated_deltanet
from tests.support.sessions import Session, make_plan

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

GROUPED = gated_deltanet("b h g", keys="b h")


@pytest.mark.parametrize("variant", ["buffered", "verify"])
def test_heads_of_a_group_share_the_rows_of_their_key(variant):
    plan = make_plan(GROUPED, variant, sizes=(16, 20), capacity=6)
    shapes = {v.name: plan.row_shape(v, (3, 2, 2)) for v in plan.program.logged}
    assert shapes == {"g": (3, 2, 2, 6), "k": (3, 2, 1, 6, 16), "u": (3, 2, 2, 6, 20)}
    assert play(plan, limits=(1, 3, 2)) > 2
    play(plan, exact=False, limits=(4, 2, 3), padded=(1,), strided=True)


THREADS = """\
import os, torch
from tests.support.sessions import Session, make_plan
from tests.support.programs import NAMED
from tests.kernels.test_cpp import built
def threads():
    session.op(session.state, *session.draw().values())
    return len(os.listdir("/proc/self/task"))
plan = make_plan(NAMED["retnet"], "recurrent", sizes=(64, 64))
op = built(plan)
torch.set_num_threads(1)
session = Session(plan, op)
before = threads()
torch.set_num_threads(3)
print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_threads_follow_torch():
    root = Path(__file__).parent
    paths = os.pathsep.join([str(root), str(root.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True)
    assert done.stdout == "2\n", done.stdout + done.stderr


@pytest.mark.parametrize("variant", ["recurrent", "buffered", "verify"])
def test_a_step_allocates_its_outputs_and_nothing_else(variant):
    plan = make_plan(NAMED["gdn"], variant)
    code = re.sub("//.*", "", cpp.emit(plan))
    assert not re.search(r"\bnew\b|alloc\(|std::vector|std::function", code)
    session = Session(plan, built(plan))
    inputs = [torch.stack([x] * 2, dim=2) if variant == "verify" else x for x in session.draw().values()]
    side = [] if variant == "recurrent" else [session.cursor, *session.rows]
    with torch.profiler.profile(profile_memory=True) as profile:
        out = session.op(session.state, *side, *inputs)
    taken = [e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0]
    assert sum(taken) == -(-out.nbytes // 64) * 64 or sum(taken) == out.nbytes


def test_one_kernel_serves_every_batch_and_number_of_heads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    build._loaded.clear()
    names = set()
    for batch, heads in ((2, 3), (4, 3), (2, 5)):
        torch._dynamo.reset()
        state = torch.randn(batch, heads, 8, 24)
        inputs = [torch.randn(batch, heads, n) for n in (8, 8, 24)] + [torch.rand(batch, heads) for _ in range(2)]
        expected = state.clone()
        compiled = torch.compile(step, backend="kvbuffer", dynamic=False, options={"inner": "eager", "flush": 5})
        with torch.no_grad():
            torch.testing.assert_close(compiled(state, *inputs), step(expected, *inputs))
        names |= {p.name for p in (tmp_path / "kvbuffer").glob("*.cpp") if "kvbuffer_watch" not in p.read_text()}
    assert len(names) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["recurrent", "buffered", "verify"])
@pytest.mark.parametrize("name", ["gdn", "kda", "mamba2", "rwkv7", "deltaproduct2"])
def test_a_kernel_compiles_within_three_seconds(name, variant, tmp_path, monkeypatch):
    """Processor time of the compiler: the machine may have other work."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plan = make_plan(NAMED[name], variant, sizes=(128, 128), flush=16, state=torch.bfloat16)
    ops.step_op(plan)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    build.library(cpp.emit(plan))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3
