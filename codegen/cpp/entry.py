"""The boxed op in C++: arguments in, checks, threads, cursors, outputs out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from kvbuffer_compile.codegen.cpp.log import axes, owned
from kvbuffer_compile.codegen.cpp.values import FULL
from kvbuffer_compile.codegen.cut import Piece
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir.plan import SHADOW, Plan
from kvbuffer_compile.ir.program import Var
from kvbuffer_compile.ir.shadow import scale_kind

DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def shared(plan: Plan, piece: Piece) -> list[Var]:
    """Logged values whose rows are read by more items than one, and overwritten after a flush by the same piece."""
    if plan.variant == "recurrent" or not piece.whole:
        return []
    return [v for v in plan.program.logged if not owned(plan, v, piece.schedule.split)]


def emit_step(out: Source, plan: Plan, piece: Piece) -> None:
    """`step`, the op of one piece."""
    program, buffered = plan.program, plan.variant != "recurrent"
    with out.block("void step(uint64_t* stack, uint64_t, uint64_t)"):
        names = ["state", *(["cursor", *(f"row_{v}" for v in program.logged)] if buffered else [])]
        names += [*SHADOW] * plan.shadowed
        names += ["parents"] * (plan.variant == "tree") + ["slots"] * plan.slots + [f"in_{v}" for v in piece.inputs]
        for n, name in enumerate(names):
            out.line(f"const Argument arg_{name}(stack[{n}]);")
        out.line("Call call;")
        _state(out, plan, "state", plan.state_dtype)
        if buffered:
            _cursor_and_rows(out, plan)
        if plan.read_dtype is not None:
            _shadow(out, plan, plan.read_dtype)
        if plan.slots:
            _slots(out, plan)
        _operands(out, plan, piece)
        _outputs(out, plan, piece)
        _threads(out, plan, piece)
        if buffered:
            _advance(out, plan, piece)


PARENTS = """\
const int64_t *forest = arg_parents.sizes(), *parents = arg_parents.strides();
check(arg_parents.type() == aoti_torch_dtype_int32() && arg_parents.dims() == 2, "parents", "must be int32 [N, T]");
check(forest[0] == 1 || forest[0] == call.sequences, "parents", "must be those of one sequence, or of each");
check(forest[1] == call.tokens, "parents", "must be one for each token");
call.parents = arg_parents.data<int32_t>();
call.parents_sequence = forest[0] == 1 ? 0 : parents[0], call.parents_token = parents[1];
for (int64_t b = 0; b < forest[0]; ++b)
  for (int64_t t = 0; t < call.tokens; ++t)
    check(-1 <= call.parent(b, t) && call.parent(b, t) < t, "parents", "must come before their children");"""


def _operands(out: Source, plan: Plan, piece: Piece) -> None:
    tokens = "-1"
    if plan.several:
        tokens, first = "call.tokens", f"arg_in_{piece.inputs[0]}"
        out.line(f"call.tokens = {first}.dims() > LANES ? {first}.sizes()[LANES] : 0;")
        out.line('check(0 < call.tokens && call.tokens <= CAPACITY, "the number of tokens", "must be 1 ... capacity");')
    if plan.variant == "tree":
        out.lines(PARENTS)
    for v in piece.inputs:
        out.line(f'call.in_{v} = view(arg_in_{v}, "{v}", call.lanes, 0, {tokens}, {_size(v)});')


def _outputs(out: Source, plan: Plan, piece: Piece) -> None:
    for n, v in enumerate(piece.outputs):
        tail = [*(["call.tokens"] if plan.several else []), *([_size(v)] if v.kind != "scalar" else [])]
        sizes = ", ".join([*(f"call.lanes[{i}]" for i in range(plan.layout.lanes)), *tail])
        dims = plan.layout.lanes + len(tail)
        with out.block():
            out.line(f"const int64_t sizes[LANES + 2] = {{{sizes}}};")
            out.line(f"stack[{n}] = new_tensor(sizes, {dims}, &call.out_{v});")


def _size(v: Var) -> str:
    return {"scalar": "-1", "key": "K", "value": "V"}[v.kind]


def _state(out: Source, plan: Plan, name: str, dtype: torch.dtype) -> None:
    """The tensor of the state, or of its shadow, as [*lanes, K, V], as Layout.canonical sees it."""
    out.line(f"const int64_t *sizes = arg_{name}.sizes(), *strides = arg_{name}.strides();")
    short = DTYPES[dtype]
    out.line(f'check(dtype_of(arg_{name}, "{name}") == Dtype::{short}, "{name}", "must be {short}");')
    out.line(f'check(arg_{name}.dims() == {len(plan.layout.dims)}, "{name}", "has the wrong number of dims");')
    parts: list[tuple[str, str]] = []
    for d, sizes in enumerate(plan.layout.dims):
        known = prod(s for s in sizes if s is not None)
        if known != 1 or None not in sizes:
            exact = f"sizes[{d}] % {known} == 0" if None in sizes else f"sizes[{d}] == {known}"
            out.line(f'check({exact}, "{name}", "has the wrong size in dim {d}");')
        for p, size in enumerate(sizes):
            parts.append((f"sizes[{d}] / {known}" if size is None else str(size), _stride(d, sizes[p + 1 :], known)))
    *lanes, key, value = plan.layout.order
    for n, part in enumerate(lanes):
        if name == "state":
            out.line(f"call.lanes[{n}] = {parts[part][0]};")
        else:
            out.line(f'check(call.lanes[{n}] == {parts[part][0]}, "{name}", "has other lanes than the state");')
        out.line(f"call.{name}_lane[{n}] = {parts[part][1]};")
    out.line(f'check({parts[key][0]} == K && {parts[value][0]} == V, "{name}", "has other sizes than K x V");')
    out.line(f"call.{name}_key = {parts[key][1]}, call.{name}_value = {parts[value][1]};")
    out.line(f"call.{name} = arg_{name}.data<{'State' if name == 'state' else 'Half'}>();")


def _shadow(out: Source, plan: Plan, dtype: torch.dtype) -> None:
    with out.block():
        _state(out, plan, "shadow", dtype)
    size = FULL[scale_kind(plan.program) or "value"]
    out.line(f'call.scale = view(arg_shadow_scale, "scale", call.lanes, 0, -1, {size});')
    out.line('check(call.scale.dtype == Dtype::f32 && call.scale.last == 1, "scale", "must be contiguous float32");')


def _stride(d: int, later: tuple[int | None, ...], known: int) -> str:
    """The stride of a part of dim d that has these parts behind it."""
    factors = [str(prod(s for s in later if s is not None))] if later else []
    factors += [f"(sizes[{d}] / {known})"] if None in later else []
    return " * ".join([f"strides[{d}]", *(f for f in factors if f != "1")])


def _cursor_and_rows(out: Source, plan: Plan) -> None:
    out.line("call.sequences = " + ("call.lanes[0];" if plan.layout.sequence else "1;"))
    out.line('check(arg_cursor.type() == aoti_torch_dtype_int32(), "cursor", "must be int32");')
    out.line(
        "check(arg_cursor.dims() == 2 && arg_cursor.sizes()[0] == 4 && arg_cursor.sizes()[1] == call.sequences, "
        '"cursor", "must be [4, sequences]");'
    )
    out.line("call.cursor = arg_cursor.data<int32_t>();")
    out.line("call.cursor_row = arg_cursor.strides()[0], call.cursor_sequence = arg_cursor.strides()[1];")
    skip = 0 if plan.layout.sequence else 1
    for v, dtype in zip(plan.program.logged, plan.row_dtypes, strict=True):
        out.line(f'call.row_{v} = view(arg_row_{v}, "rows of {v}", call.lanes, {skip}, CAPACITY, {_size(v)});')
        out.line(f'check(call.row_{v}.dtype == Dtype::{DTYPES[dtype]}, "rows of {v}", "must be {DTYPES[dtype]}");')


def _slots(out: Source, plan: Plan) -> None:
    """From here on lane 0 runs over the chosen slots: what lies in the pool begins where its slot does."""
    out.line("Slots slots(arg_slots, call.lanes[0]);")
    out.line("call.lanes[0] = int64_t(slots.at.size());")
    inner = [f"(call.lanes[{i}] - 1) * call.state_lane[{i}]" for i in range(1, plan.layout.lanes)]
    span = " + ".join(["1", *inner, "(K - 1) * call.state_key", "(V - 1) * call.state_value"])
    _begin(out, "state_begin", "call.state", "call.state_lane[0]", span)
    if plan.variant == "recurrent":
        return
    _begin(out, "cursor_begin", "call.cursor", "call.cursor_sequence", "3 * call.cursor_row + 1")
    out.line("call.sequences = call.lanes[0];")
    for v in plan.program.logged:
        row = f"call.row_{v}"
        inner = [f"(call.lanes[{i}] - 1) * {row}.lane[{i}]" for i in range(1, plan.layout.lanes)]
        last = [f"({_size(v)} - 1) * {row}.last"] if v.kind != "scalar" else []
        span = " + ".join(["1", *inner, f"(CAPACITY - 1) * {row}.slot", *last])
        _begin(out, f"row_begin_{v}", f"static_cast<Row_{v}*>({row}.data)", f"{row}.lane[0]", span)
    if plan.shadowed:
        inner = [f"(call.lanes[{i}] - 1) * call.shadow_lane[{i}]" for i in range(1, plan.layout.lanes)]
        span = " + ".join(["1", *inner, "(K - 1) * call.shadow_key", "(V - 1) * call.shadow_value"])
        _begin(out, "shadow_begin", "call.shadow", "call.shadow_lane[0]", span)
        inner = [f"(call.lanes[{i}] - 1) * call.scale.lane[{i}]" for i in range(1, plan.layout.lanes)]
        span = " + ".join([FULL[scale_kind(plan.program) or "value"], *inner])
        _begin(out, "scale_begin", "static_cast<float*>(call.scale.data)", "call.scale.lane[0]", span)


def _begin(out: Source, name: str, data: str, stride: str, span: str) -> None:
    out.line(f"const std::vector<int64_t> {name} = slots.begins({data}, {stride}, {span});")
    out.line(f"call.{name} = {name}.data(), {stride} = 0;")


def _threads(out: Source, plan: Plan, piece: Piece) -> None:
    order = piece.schedule
    out.line("int64_t lanes = 1;")
    out.line("for (int i = 0; i < LANES; ++i) lanes *= call.lanes[i];")
    full = "1" if order.split is None else "K" if order.split == "key" else "V"
    out.comment("Small work stays on one thread; with fewer lanes than threads a lane is cut into tiles.")
    out.line("const int64_t work = lanes * K * V;")
    out.line("const int threads = work < 16384 || omp_in_parallel() ? 1 : omp_get_max_threads();")
    out.line(f"int64_t tile = {_tile(plan, piece) or full};")
    if order.split:
        out.line(f"const int64_t share = {full} * lanes / (2 * threads) / 16 * 16;")
        out.line("if (threads > 1 && lanes < 2 * threads) tile = std::max<int64_t>(16, share);")
    out.line(f"const int64_t tiles = ({full} + tile - 1) / tile, items = lanes * tiles;")
    out.line("const bool large = work * int64_t(sizeof(State)) > threads * (int64_t(1) << 22);")
    with out.block("each_item(items, threads, large, [&](int64_t i)", ");"):
        out.line("const int64_t first = i % tiles * tile;")
        out.line(f"run_item(call, i / tiles, first, std::min<int64_t>(tile, {full} - first));")
    if shared(plan, piece):
        out.line("bool flushed = false;")
        out.line("for (int64_t b = 0; b < call.sequences; ++b) flushed |= call.flushes(b);")
        with out.block("if (flushed)"):
            out.line("each_item(lanes, threads, false, [&](int64_t lane) { append_shared(call, lane); });")


def _tile(plan: Plan, piece: Piece) -> int | None:
    """Size of a tile that stays in the first-level cache (16 KB), for plain steps that meet their state twice.

    Only where a tile is contiguous: 1.32 -> 1.17 times a copy of 67 MB. Tiles of columns made it slower.
    """
    outer, inner = axes(plan)
    order = piece.schedule
    twice = piece.whole and plan.variant == "recurrent" and order.fold_stage >= len(order.stages) - 1 > 0
    if order.split != outer or not twice:
        return None
    sizes = dict(zip(("key", "value"), plan.sizes, strict=True))
    rows = 16384 // (sizes[inner] * plan.state_dtype.itemsize) // 16 * 16
    return rows if 0 < rows < sizes[outer] else None


def _advance(out: Source, plan: Plan, piece: Piece) -> None:
    with out.block("for (int64_t b = 0; b < call.sequences; ++b)"):
        if piece.first:
            out.line("if (call.flushes(b)) call.mark(0, b) = 0, call.mark(1, b) = FLUSH, call.mark(3, b) = 0;")
        if piece.last and plan.variant != "tree":
            out.line("if (call.owed(b) >= 0) call.mark(0, b) += int32_t(call.tokens);")
        if piece.last:
            out.line("++call.mark(2, b);")


def register(out: Source, steps: Sequence[tuple[str, str]]) -> None:
    """The functions as implementations of ops on CPUs. steps: the op's name as C++ has it, and the function."""
    with out.block("struct Registration", " registration;"):
        with out.block("Registration()"):
            out.line("TorchLibraryOpaque* library;")
            out.line('done(aoti_torch_library_init_impl("kvbuffer", "CPU", __FILE__, __LINE__, &library));')
            for name, function in steps:
                out.line(f"done(aoti_torch_library_impl(library, {name}, {function}));")


def export(out: Source, op_name: str, functions: Sequence[str]) -> None:
    """The functions by names that a loader can look up: `exported`."""
    for n, function in enumerate(functions):
        arguments = "uint64_t* stack, uint64_t arguments, uint64_t outputs"
        out.line(f'extern "C" void {exported(op_name, n)}({arguments}) {{ {function}(stack, arguments, outputs); }}')


def exported(op_name: str, n: int = 0) -> str:
    """What a library calls the n-th piece of an op's step."""
    return f"kvbuffer_{op_name}_{n}"
