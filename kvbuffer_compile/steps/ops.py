"""The registered step ops: one mutable op per plan, opaque to Dynamo and Inductor, with a fake kernel.

The composite implementation serves every device; a generated kernel takes precedence on its own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbuffer_compile.codegen.cpp.entry import exported
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import composite, slots, tree

if TYPE_CHECKING:
    from kvbuffer_compile.codegen.cut import Piece

LIBRARY = torch.library.Library("kvbuffer", "FRAGMENT")


@functools.cache
def step_op(plan: Plan) -> Any:
    """The op of a plan, registered on first use; returns its OpOverload."""
    name = plan.op_name
    LIBRARY.define(plan.schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, torch.compiler.disable(neutral(_composite(plan))), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvbuffer::{name}", _fake(plan), lib=LIBRARY)
    return getattr(torch.ops.kvbuffer, name).default


@functools.cache
def use_cpp(plan: Plan) -> None:
    """Let a generated C++ kernel implement the plan's op on CPUs, or several with the calls between them that have no
    C++ spelling. EmitError when that cannot be."""
    from kvbuffer_compile.codegen import build
    from kvbuffer_compile.codegen.cut import built_as, pieces
    from kvbuffer_compile.native.direct import call_directly
    from kvbuffer_compile.steps import cut_step

    op = step_op(plan)
    one = built_as(plan)
    cut = pieces(plan.program, in_place=plan.variant == "recurrent")
    if len(cut) == 1:
        call_directly(op, _address(build.load(plan), plan.op_name))
        return
    if plan.variant in ("tree", "block") or (plan.variant == "verify" and plan.slots):
        raise EmitError(f"no C++ kernel for {plan.variant} steps with {cut[0].calls[0].fn} on {plan}")
    kernels = [_piece_op(one, n, piece) for n, piece in enumerate(cut)]
    library = build.load(one)
    for n, kernel in enumerate(kernels):
        call_directly(kernel, _address(library, one.op_name, n))
    step = cut_step.one_token(one, cut, kernels)
    if plan.variant == "verify":
        step = cut_step.several_tokens(plan, step)
    LIBRARY.impl(plan.op_name, torch.compiler.disable(neutral(lambda *args: _returned(step(*args)))), "CPU")


def _address(library: ctypes.CDLL, op_name: str, n: int = 0) -> int:
    """Of the n-th piece of a step that a kernel's library exports."""
    return ctypes.cast(library[exported(op_name, n)], ctypes.c_void_p).value or 0


@functools.cache
def _piece_op(plan: Plan, n: int, piece: Piece) -> Any:
    """The op of one piece of a step that is cut: registered by the kernels' library under this name."""
    name = f"{plan.op_name}_{n}"
    LIBRARY.define(plan.schema_of(name, piece.inputs, piece.outputs))
    return getattr(torch.ops.kvbuffer, name).default


@functools.cache
def use_triton(plan: Plan, interpret: bool = False) -> None:
    """Let a generated Triton kernel implement the plan's op on a GPU, launched as is best on this one (codegen/tune).

    interpret: run it on CPU tensors in Triton's interpreter instead, for tests. EmitError when it cannot be said in
    Triton.
    """
    from kvbuffer_compile.codegen.triton import load, triton, tune
    from kvbuffer_compile.codegen.triton.tree import NODES

    step_op(plan)
    config = None if interpret else tune.tuned(plan, torch.cuda.get_device_name(), tune.on_gpu)
    launch = load.load(triton.emit(plan, config), interpret).launch
    split, more = plan.sides, plan.slots + (plan.variant == "tree")

    def recurrent(state: Tensor, *rest: Tensor) -> Any:
        return _returned(tuple(launch(state, None, None, (), rest[plan.slots :], *rest[: plan.slots])))

    def buffered(state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
        if not has_memory(state):  # the kernel wants its strides; this is neither read nor written, and gone at once
            state = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=state.device)
        given, operands = rest[split : split + more], rest[split + more :]
        return _returned(tuple(launch(state, cursor, tickets_of(cursor), rest[:split], operands, *given)))

    def drafted(state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
        large = rest[split].shape[1] > NODES
        return composite_step(state, cursor, *rest) if large else buffered(state, cursor, *rest)

    composite_step = neutral(_composite(plan))
    step = {"recurrent": recurrent, "tree": drafted}.get(plan.variant, buffered)
    LIBRARY.impl(plan.op_name, torch.compiler.disable(step), "CPU" if interpret else "CUDA")


def new_cursor(plan: Plan, lanes: tuple[int, ...], device: torch.device) -> Tensor:
    """A cursor of zeros, [4, N]. Behind it in the same storage lie the tickets that Triton kernels count with."""
    n = plan.sequences(lanes)
    slab = torch.zeros(n * (4 + plan.tickets(lanes)), dtype=torch.int32, device=device)
    return slab[: 4 * n].view(4, n)


def tickets_of(cursor: Tensor) -> Tensor:
    """The tickets behind a cursor, [N, tickets a sequence]: zero between launches."""
    n = cursor.shape[1]
    count = (cursor.untyped_storage().nbytes() // 4 - 4 * n) // max(n, 1)
    return cursor.as_strided((n, count), (count, 1), 4 * n)


def _composite(plan: Plan) -> Callable[..., Any]:
    rows = plan.sides

    def recurrent(state: Tensor, *operands: Tensor) -> Any:
        if plan.slots:
            return _returned(slots.recurrent_step(plan, state, operands[0], operands[1:]))
        return _returned(composite.recurrent_step(plan, state, operands))

    def buffered(state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
        log, operands = rest[:rows], rest[rows:]
        if plan.slots:
            return _returned(slots.buffered_step(plan, state, cursor, log, operands[0], operands[1:]))
        return _returned(composite.buffered_step(plan, state, cursor, log, operands))

    def drafted(state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
        return _returned(tree.tree_step(plan, state, cursor, rest[:rows], rest[rows], rest[rows + 1 :]))

    if plan.variant == "tree":
        return drafted
    return recurrent if plan.variant == "recurrent" else buffered


def _fake(plan: Plan) -> Callable[..., Any]:
    before = 1 if plan.variant == "recurrent" else 2 + plan.sides  # state, cursor, rows and shadow

    def fake(*args: Tensor) -> Any:
        state = args[0]
        view = plan.layout.canonical(state)
        lanes = (args[before].shape[0], *view.shape[1:-2]) if plan.slots else view.shape[:-2]
        first = before + plan.slots + (plan.variant == "tree")  # operand
        tokens = (args[first].shape[len(lanes)],) if plan.several else ()
        tails = {"scalar": (), "key": view.shape[-2:-1], "value": view.shape[-1:]}
        shapes = [(*lanes, *tokens, *tails[v.kind]) for v in plan.program.outputs]
        return _returned(tuple(state.new_empty(s, dtype=plan.compute) for s in shapes))

    return fake


def _returned(outputs: tuple[Tensor, ...]) -> Any:
    """What a schema with these many returns expects of a Python implementation."""
    if not outputs:
        return None
    return outputs[0] if len(outputs) == 1 else outputs
