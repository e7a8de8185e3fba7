"""What a CUDA graph can record of a Triton step: one launch, views, and the outputs' memory; nothing else, ever.

No GPU is needed: a dispatch mode sees every ATen call of the launch path, and on meta tensors nothing can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton import load as triton_load
from kvbuffer_compile.codegen.triton import triton, tune
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.steps import ops
from tests.kernels.test_triton import EXACT, LANES, draw, draw_numbers, make_plan

TOKENS = 2
STEPS = [("gdn", "recurrent"), ("gdn", "buffered"), ("gdn", "verify"), ("kda", "verify"), ("everything", "buffered")]


class Capture(TorchDispatchMode):
    """Lets views and allocations pass and counts these; any other ATen call waits for the device or is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            self.allocated.append(tuple(args[0]))
        elif not func.is_view:
            raise AssertionError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for the kernel: runs it, unseen by the mode around it, and notes where the tensors it is given lie."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.addresses = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            self.addresses.append([x.data_ptr() for x in args if isinstance(x, Tensor)])
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return run


@pytest.fixture
def launches(monkeypatch) -> Callable[[str], Launches]:
    """Makes the kernel of a source text one that is watched."""

    def watched(source: str) -> Launches:
        module = load(source, interpret=True)
        found = Launches(module.step)
        monkeypatch.setattr(module, "step", found)
        return found

    return watched


def buffers(plan: Plan) -> list[Tensor]:
    """State, and cursor and rows where there are some, as a step op takes them."""
    lanes = tuple(LANES[x] for x in plan.program.lanes)
    state = draw_numbers(*lanes, *plan.sizes)
    if plan.variant == "recurrent":
        return [state]
    cursor = ops.new_cursor(plan, lanes, torch.device("cpu"))
    cursor[1] = plan.flush
    return [state, cursor, *(torch.zeros(plan.row_shape(v, lanes)) for v in plan.program.logged)]


def inputs(plan: Plan) -> list[Tensor]:
    return draw(plan.program, *((TOKENS,) if plan.variant == "verify" else ()))


@pytest.mark.parametrize(("name", "variant"), STEPS)
def test_a_step_is_one_launch_and_its_outputs(name, variant, launches, monkeypatch):
    """Of the registered op, over a flush; from the second step on there is nothing to emit, load or tune."""
    plan = make_plan(EXACT[name], variant, capacity=5)
    op = ops.step_op(plan)
    ops.use_triton(plan, interpret=True)
    kernel, kept = launches(triton.emit(plan)), buffers(plan)
    for step in range(1, 5):
        given = inputs(plan)
        with Capture() as capture:
            op._op_dk(DispatchKey.CPU, *kept, *given)
        assert len(kernel.addresses) == step, "one launch a step"
        assert len(capture.allocated) == len(plan.program.outputs), capture.allocated
        if variant != "recurrent":
            owed, limit, steps = kept[1][0].tolist(), kept[1][1].tolist(), kept[1][2].tolist()
            assert len({*owed}) == 1 and {*limit} == {plan.flush}
            assert owed[0] == expected_owed(plan, step) and {*steps} == {step}, "one advance of the cursor a step"
        monkeypatch.setattr(triton, "emit", forbidden)
        monkeypatch.setattr(triton_load, "load", forbidden)
        monkeypatch.setattr(tune, "tuned", forbidden)
        ops.use_triton(plan, interpret=True)
    own = {x.data_ptr() for x in kept}
    assert all(own <= {*seen} for seen in kernel.addresses), "buffers are passed as they lie, step after step"


def expected_owed(plan: Plan, steps: int) -> int:
    """Tokens owed after some steps: a step that finds plan.flush of them or more folds them in first."""
    owed = 0
    for _ in range(steps):
        owed = (0 if owed >= plan.flush else owed) + (TOKENS if plan.variant == "verify" else 1)
    return owed


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a step that has run before is not built again")


@pytest.mark.parametrize(("name", "variant"), STEPS)
def test_a_launch_reads_no_values(name, variant):
    """On meta tensors there are none."""
    plan = make_plan(EXACT[name], variant, capacity=5)
    args, options = launched(triton.emit(plan), plan)
    assert {x.device.type for x in args if isinstance(x, Tensor)} == {"meta"} and options["num_warps"]


def launched(source: str, plan: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return aot.launched(load(source, interpret=True), plan, tuple(LANES[x] for x in plan.program.lanes), TOKENS)


# ------------------------------------------------------------------------------ the tests above must be able to fail


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cursor[0, 0].item()", "_local_scalar_dense"),
        ("bool((cursor[0] > 2).any())", "gt.Scalar"),
        ("cursor[0].nonzero()", "nonzero"),
        ("state = state.clone()", "clone"),
        ("operands = [x.double() for x in operands]", "_to_copy"),
        ("rows = [x + 0 for x in rows]", "add.Tensor"),
        ("state.new_empty(3)", "new_empty"),
    ],
)
def test_a_launcher_that_does_more_is_caught(line, message, launches):
    plan = make_plan(EXACT["gdn"], "buffered")
    run, kept, given = mutant(plan, line, launches), buffers(plan), inputs(plan)
    with pytest.raises(AssertionError, match=message), Capture():
        run(kept, given)


def test_a_launcher_that_allocates_is_caught(launches):
    plan = make_plan(EXACT["gdn"], "buffered")
    run, kept, given = mutant(plan, "torch.empty(3)", launches), buffers(plan), inputs(plan)
    with Capture() as capture:
        run(kept, given)
    assert len(capture.allocated) == len(plan.program.outputs) + 1


def mutant(plan: Plan, line: str, launches: Any) -> Callable[[list[Tensor], list[Tensor]], Any]:
    source = with_line(triton.emit(plan), line)
    launches(source)
    launch = load(source, interpret=True).launch
    return lambda kept, given: launch(kept[0], kept[1], ops.tickets_of(kept[1]), kept[2:], given)


def with_line(source: str, line: str) -> str:
    assert source.count("    view = state.view(") == 1
    return source.replace("    view = state.view(", f"    {line}\n    view = state.view(")


@pytest.mark.parametrize("line", ["cursor[0, 0].item()", "cursor.tolist()", "cursor.numpy()", "int(cursor[1, 0])"])
def test_a_launcher_that_reads_values_is_caught(line):
    plan = make_plan(EXACT["gdn"], "buffered")
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, AssertionError), match="(?i)meta"):
        launched(with_line(triton.emit(plan), line), plan)
