"""C++ text of the step op of a plan: `emit(plan)`.

The text is one translation unit without dependencies but the C++ library and OpenMP:

    numbers.h       types, conversions, pointwise functions            (the same for every plan, like all headers)
    rows.h          vectors along an axis, what owed rows add to reads
    state.h         passes over the state
    shadow.h        the state in 16 bits, which is read in its place (only where the plan has it)
    abi.h           tensors through PyTorch's stable C ABI
    slots.h         which sequences of a pool a step works on       (only for pools)
    Call            the arguments of one call as pointers and strides
    run_item        one lane, or one tile of a lane: the recurrence itself (cpp_item, cpp_rows)
    append_shared   rows that several items share, after a flush
    step            the boxed op: checks, threads, cursors

The last four once for each piece of a step that is cut by calls without a C++ spelling (cut.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import resources

import torch

from kvbuffer_compile.codegen.cpp import entry
from kvbuffer_compile.codegen.cpp.block import BlockItem
from kvbuffer_compile.codegen.cpp.item import Item
from kvbuffer_compile.codegen.cpp.log import axes, row_types, updates
from kvbuffer_compile.codegen.cpp.tree import TreeItem
from kvbuffer_compile.codegen.cpp.values import FULL
from kvbuffer_compile.codegen.cpp.verify import VerifyItem
from kvbuffer_compile.codegen.cut import Piece, pieces
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Read, result
from kvbuffer_compile.ir.shadow import may_have_shadow

SCALARS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "Bf16", torch.float16: "F16"}
HEADERS = ("numbers.h", "rows.h", "state.h", "abi.h")
INCLUDES = ("algorithm", "cmath", "cstdint", "cstring", "stdexcept", "string", "type_traits", "omp.h")
# Bytes of the vectors of one token, which lie on the stack; g++ takes up to twice as many, and 8 MB is what there is.
MOST_VECTORS = 1 << 20
MOST_ROOM = 1 << 26  # bytes of Room: the loader makes all of it zero, for each thread


def emit(plan: Plan) -> str:
    """The source of the plan's op. EmitError when the plan says something that has no C++ spelling."""
    _check(plan)
    out = Source()
    cut = pieces(plan.program, in_place=plan.variant == "recurrent")
    if plan.several and len(cut) > 1:
        raise EmitError(f"no C++ kernel for several tokens and {cut[0].calls[0].fn}\n{plan.program}")
    _head(out, plan)
    with out.block("namespace"):
        _constants(out, plan)
        for name in (*HEADERS, *(["shadow.h"] if plan.shadowed else []), *(["slots.h"] if plan.slots else [])):
            out.line()
            out.lines(resources.files("kvbuffer_compile.codegen.cpp").joinpath(name).read_text(encoding="utf-8"))
        out.line()
        _types(out, plan, cut[0])
        for n, piece in enumerate(cut):
            with nullcontext() if piece.whole else out.block(f"namespace piece_{n}"):
                _emit_piece(out, plan, piece)
        names = [""] if len(cut) == 1 else [f"piece_{n}::" for n in range(len(cut))]
        entry.register(out, [(_op(n, len(cut)), f"{name}step") for n, name in enumerate(names)])
    entry.export(out, plan.op_name, [f"{name}step" for name in names])
    return str(out)


def _op(n: int, count: int) -> str:
    return "OP_NAME" if count == 1 else f'OP_NAME "_{n}"'


def _emit_piece(out: Source, plan: Plan, piece: Piece) -> None:
    _call(out, plan, piece)
    kind = {"verify": VerifyItem, "block": BlockItem, "tree": TreeItem}.get(plan.variant, Item)
    item = kind(out, plan, piece)
    item.emit()
    if entry.shared(plan, piece):
        item.rows.emit_append_shared()
    entry.emit_step(out, plan, piece)


def _check(plan: Plan) -> None:
    dtypes = {"state": plan.state_dtype, "compute": plan.compute}
    dtypes |= {f"row {v}": d for v, d in zip(plan.program.logged, plan.row_dtypes, strict=True)}
    for what, dtype in dtypes.items():
        if dtype not in SCALARS or (what == "compute" and dtype.itemsize < 4):
            raise EmitError(f"no C++ kernel for {what} of {dtype}\n{plan.program}")
    _check_sizes(plan)
    if plan.shadowed and not may_have_shadow(plan.program, plan.state_dtype):
        raise EmitError(f"no C++ kernel for a shadow of {plan.state_dtype} with these reads\n{plan.program}")
    for op in plan.program.ops:
        if isinstance(op, Read) and set(op.out.lanes) != set(plan.program.lanes):
            raise EmitError(f"{op.out} is a read of the state and runs along other lanes\n{plan.program}")


def _check_sizes(plan: Plan) -> None:
    sizes = " x ".join(map(str, plan.sizes))
    if min(plan.sizes) < 1:
        raise EmitError(f"no C++ kernel for a state of {sizes}, which has no elements\n{plan.program}")
    length = {"scalar": 0, "key": plan.sizes[0], "value": plan.sizes[1]}
    vectors = [*plan.program.inputs, *filter(None, map(result, plan.program.ops))]
    if sum(length[v.kind] for v in vectors) * plan.compute.itemsize > MOST_VECTORS:
        raise EmitError(f"no C++ kernel for a state of {sizes}, its vectors have no room on the stack\n{plan.program}")
    reads = sum(isinstance(op, Read) for op in plan.program.ops) if plan.several else 0
    room = 2 * plan.capacity * (len(updates(plan)) + reads) * sum(plan.sizes) * plan.compute.itemsize
    if plan.variant != "recurrent" and room > MOST_ROOM:
        raise EmitError(
            f"no C++ kernel for {plan.capacity} rows of a state of {sizes}, a thread would take {room >> 20} MiB for "
            f"them: use a smaller flush or capacity\n{plan.program}"
        )


def _head(out: Source, plan: Plan) -> None:
    out.comment(f"Generated by kvbuffer_compile.\n\n{plan.program}\n\n{plan.settings}")
    out.comment(f"\nstate {plan.state_dtype}, {plan.layout}")
    for name in (*INCLUDES, *(["list", "vector"] if plan.slots else [])):
        out.line(f"#include <{name}>")
    if plan.compute == torch.float32 and any(d.itemsize == 2 for d in _stored(plan)):
        out.lines("#define SIXTEEN_BIT\n#ifdef __AVX2__\n#include <immintrin.h>\n#endif")
    if plan.read_dtype == torch.float16:
        out.lines("#ifndef __FLT16_MAX__\n#error this compiler has no float16\n#endif")
    out.line(f'#define OP_NAME "{plan.op_name}"')
    out.line()


def _stored(plan: Plan) -> list[torch.dtype]:
    return [plan.state_dtype, *plan.row_dtypes, *([plan.read_dtype] if plan.read_dtype else [])]


def _constants(out: Source, plan: Plan) -> None:
    out.line(f"using Real = {SCALARS[plan.compute]};")
    out.line(f"constexpr int LANES = {plan.layout.lanes};")
    out.line(f"constexpr int64_t K = {plan.sizes[0]}, V = {plan.sizes[1]};")


# ------------------------------------------------------------------------------------------------- Call


def _types(out: Source, plan: Plan, piece: Piece) -> None:
    out.line(f"using State = {'Real' if plan.state_dtype == plan.compute else SCALARS[plan.state_dtype]};")
    if plan.variant != "recurrent":
        out.line(
            f"constexpr int64_t CAPACITY = {plan.capacity}, FLUSH = {plan.flush}, ROWS = {max(1, len(updates(plan)))};"
        )
        for v, dtype in zip(plan.program.logged, plan.row_dtypes, strict=True):
            out.line(f"using Row_{v} = {SCALARS[dtype]};")
        if plan.read_dtype is not None:
            out.line(f"using Half = {SCALARS[plan.read_dtype]};")
        left, right = row_types(plan)
        out.line(f"using Left = {left}; using Right = {right};")
        _room(out, plan, piece)


def _call(out: Source, plan: Plan, piece: Piece) -> None:
    buffered = plan.variant != "recurrent"
    logged = plan.program.logged if buffered else ()
    out.comment("The arguments of one call.")
    with out.block("struct Call", ";"):
        out.line("State* state;")
        out.line("int64_t lanes[AXES] = {1}, state_lane[AXES] = {}, state_key, state_value;")
        if buffered:
            out.line("int32_t* cursor;")
            out.line("int64_t cursor_row, cursor_sequence, sequences, tokens = 1;")
        if plan.shadowed:
            out.line("Half* shadow;")
            out.line("int64_t shadow_lane[AXES] = {}, shadow_key, shadow_value;")
            out.line("View scale;")
        for v in logged:
            out.line(f"View row_{v};")
        for v in piece.inputs:
            out.line(f"View in_{v};")
        for v in piece.outputs:
            out.line(f"Real* out_{v};")
        if plan.slots:
            _begins(out, plan)
        out.lines(LANE_METHODS)
        for name in ("state", *(["shadow"] if plan.shadowed else [])):
            out.lines(OFFSET % (name, f"{name}_begin[at[0]]" if plan.slots else "0", name))
        if plan.variant == "tree":
            out.line("const int32_t* parents;")
            out.line("int64_t parents_sequence, parents_token;")
            out.line("int64_t parent(int64_t b, int64_t t) const {")
            out.line("  return parents[b * parents_sequence + t * parents_token];")
            out.line("}")
        if buffered:
            out.lines(CURSOR_METHODS % ("cursor_begin[b]" if plan.slots else "b * cursor_sequence"))


def _begins(out: Source, plan: Plan) -> None:
    names = ["state"]
    if plan.variant != "recurrent":
        names += ["cursor", *(f"row_begin_{v}" for v in plan.program.logged), *["shadow", "scale"] * plan.shadowed]
    out.comment("Where the sequences of a pool begin.")
    for name in names:
        out.line(f"const int64_t* {name if name.startswith('row_') else f'{name}_begin'};")


LANE_METHODS = """\
void split_lane(int64_t lane, int64_t* at) const {
  for (int i = LANES - 1; i >= 0; --i) at[i] = lane % lanes[i], lane /= lanes[i];
}"""
OFFSET = """\
int64_t %s_at(const int64_t* at) const {
  int64_t offset = %s;
  for (int i = 0; i < LANES; ++i) offset += at[i] * %s_lane[i];
  return offset;
}"""
CURSOR_METHODS = """\
int32_t& mark(int64_t row, int64_t b) const { return cursor[row * cursor_row + %s]; }
int64_t owed(int64_t b) const { return mark(0, b); }
bool flushes(int64_t b) const { return owed(b) >= 0 && (owed(b) >= mark(1, b) || owed(b) + tokens > CAPACITY); }"""


def _room(out: Source, plan: Plan, piece: Piece) -> None:
    outer, inner = (FULL[kind] for kind in axes(plan))
    out.comment("Owed rows of one item: pointers into the log where it can be read as it is, copies where not.")
    with out.block("struct Room", ";"):
        out.line("Real weight[CAPACITY * ROWS];")
        out.line("const Left* left[CAPACITY * ROWS];")
        out.line("const Right* right[CAPACITY * ROWS];")
        out.line("alignas(64) Left left_copy[CAPACITY * ROWS * K];")
        out.line("alignas(64) Right right_copy[CAPACITY * ROWS * V];")
        out.line(f"alignas(64) Real outer[CAPACITY * ROWS * {outer}], inner[CAPACITY * ROWS * {inner}];")
        if plan.several:
            for kind, x, y in (("key", "K", "V"), ("value", "V", "K")):
                count = max(1, sum(r.x.kind == kind for r in piece.schedule.stages[0].reads))
                out.line(f"alignas(64) Real x_{kind}[CAPACITY * {count} * {x}], y_{kind}[CAPACITY * {count} * {y}];")
        if plan.variant == "tree":
            out.line("alignas(64) Real path_key[CAPACITY * K], path_value[CAPACITY * V];")
            for v in plan.program.logged:
                out.line(f"alignas(64) Real kept_{v}[CAPACITY{'' if v.kind == 'scalar' else f' * {FULL[v.kind]}'}];")
