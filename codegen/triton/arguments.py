"""The arguments of a generated Triton kernel, and the Python function that launches it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from kvbuffer_compile.codegen.triton.drafts import MOST
from kvbuffer_compile.codegen.triton.launch import Config
from kvbuffer_compile.codegen.triton.tickets import Tickets
from kvbuffer_compile.codegen.triton.tiles.values import Python, Values, power_of_two
from kvbuffer_compile.codegen.triton.tiles.vectors import LINES
from kvbuffer_compile.codegen.triton.tree import NODES
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind, Var


@dataclass(frozen=True)
class Argument:
    """One parameter of the kernel, and the launcher's expression for it."""

    name: str
    value: str
    constant: bool = False


def arguments(plan: Plan, split: Kind | None, streamed: bool = False) -> list[Argument]:
    """What the kernel takes. Strides of the state's and the rows' own axes are constants: they hardly ever change,
    and constant offsets cost no registers. All other strides and sizes are run-time numbers."""
    found = [*_state(plan)]
    if plan.slots:
        found += [Argument("slots", "slots"), Argument("slots_entry", "slots.stride(0)")]
        found += [Argument("pool", "view.shape[0]"), Argument("ENTRIES", "entries", True)]
    if plan.variant != "recurrent":
        found += [*_log(plan)]
    elif plan.slots:
        found += [*_tickets()]
    for v in plan.program.inputs:
        found += _operand(plan, v)
    if plan.variant == "tree":
        found += [Argument("parents", "parents"), Argument("parents_sequence", "stride(parents, 0)")]
        found += [Argument("parents_t", "parents.stride(1)")]
    found += [Argument(f"out_{n}", f"outputs[{n}]") for n, _ in enumerate(plan.program.outputs)]
    if plan.several:
        found += [Argument("T", "tokens"), Argument("TOKENS", "triton.next_power_of_2(tokens)", True)]
        found += [Argument("QUERIES", "queries", True), Argument("MATRIX", "True" if streamed else "matrix", True)]
        found += [Argument("DRAFTS", "drafts", True)] if streamed else []
    if streamed:
        found += [Argument("STAGES", "stages", True)]
    if streamed or plan.several:
        found += [Argument("PRECISION", "precision", True)]
    if plan.variant != "recurrent":
        found += [Argument("EVICT", '"evict_first" if state.nbytes > 2**25 else ""', True)]
        found += [] if streamed else [Argument("FOLD", "min(fold, block)", True)]
    found += [Argument("TILES", "tiles", True), Argument("BLOCK", "block", True)]
    return found


def _state(plan: Plan) -> Iterator[Argument]:
    lanes = plan.program.lanes
    yield Argument("state", "state")
    for n, lane in enumerate(lanes):
        yield Argument(f"size_{lane}", f"lanes[{n}]")
        yield Argument(f"state_{lane}", f"view.stride({n})")
    yield Argument("STATE_KEY", f"view.stride({len(lanes)})", True)
    yield Argument("STATE_VALUE", f"view.stride({len(lanes) + 1})", True)


def _log(plan: Plan) -> Iterator[Argument]:
    yield Argument("cursor", "cursor")
    yield Argument("cursor_row", "cursor.stride(0)")
    yield Argument("cursor_sequence", "cursor.stride(1)")
    yield from _tickets()
    shift = 0 if plan.layout.sequence else 1
    slot = len(plan.program.lanes) + shift
    for n, v in enumerate(plan.program.logged):
        yield Argument(f"row_{v}", f"rows[{n}]")
        for m, lane in enumerate(plan.program.lanes):
            if lane in v.lanes or (m == 0 and plan.layout.sequence):
                yield Argument(f"row_{v}_{lane}", f"stride(rows[{n}], {m + shift})")
        yield Argument(f"ROW_{v}_SLOT", f"rows[{n}].stride({slot})", True)
        if v.kind != "scalar":
            yield Argument(f"ROW_{v}_LAST", f"rows[{n}].stride({slot + 1})", True)
    if plan.shadowed:
        yield from _shadow(plan)


def _tickets() -> Iterator[Argument]:
    yield Argument("tickets", "tickets")
    yield Argument("tickets_sequence", "tickets.stride(0)")


def _shadow(plan: Plan) -> Iterator[Argument]:
    """Behind the rows; the scale is contiguous."""
    lanes, first = plan.program.lanes, len(plan.program.logged)
    yield Argument("shadow", f"rows[{first}]")
    yield Argument("shadow_scale", f"rows[{first + 1}]")
    for n, lane in enumerate(lanes):
        yield Argument(f"half_{lane}", f"half.stride({n})")
        yield Argument(f"scale_{lane}", f"rows[{first + 1}].stride({n})")
    yield Argument("SHADOW_KEY", f"half.stride({len(lanes)})", True)
    yield Argument("SHADOW_VALUE", f"half.stride({len(lanes) + 1})", True)


def _operand(plan: Plan, v: Var) -> Iterator[Argument]:
    n, lanes = plan.program.inputs.index(v), plan.program.lanes
    yield Argument(f"in_{v}", f"operands[{n}]")
    for m, lane in enumerate(lanes):
        if lane in v.lanes:
            yield Argument(f"in_{v}_{lane}", f"stride(operands[{n}], {m})")
    if plan.several:
        yield Argument(f"in_{v}_t", f"stride(operands[{n}], {len(lanes)})")
    if v.kind != "scalar":
        yield Argument(f"in_{v}_last", f"operands[{n}].stride(-1)")


# ------------------------------------------------------------------------------------------- the launcher

CONTRACT = '''"""Run one {variant} step; returns its outputs: {outputs}.

state    {state}, read and written in place
{log}operands {operands}
block, warps, fold, stages: how much of an axis one program takes, also at once in a flush, and how it is compiled
{matrix}{parents}{slots}
One launch; nothing waits for the device.
"""'''
MATRIX = "matrix: whether reads are matrix products\n"
REGISTERS = "registers: that a thread may have, on NVIDIA's GPUs\n"
SLOTS = """slots    int32 or int64 [entries], 32768 at most: slots of the pool to step, negative ones from its end; of
         equal ones the last is stored. Lane 0 of operands and outputs are the entries, of all else the slots
"""
PARENTS = """parents  int32 [sequences or 1, T], T at most {nodes}: the node before that each follows, or -1
"""
LOG = """cursor   int32 [4, sequences]: tokens owed (-1: padding), flush at, steps run, state known to be zero
tickets  int32 [sequences, at least ticket_count(...)], zero; zero again when the launch is done
rows     {rows}{shadow}
"""


class Launcher:
    """Prints `ticket_count` and `launch`. width: rows that a token has among the queries (triton_matrix)."""

    def __init__(self, out: Python, plan: Plan, values: Values, config: Config, width: int) -> None:
        self.out, self.plan, self.values, self.config, self.width = out, plan, values, config, width

    def emit(self) -> None:
        if self.plan.variant != "recurrent" or self.plan.slots:
            self._ticket_count()
        with self.out.block("def stride(x, dim)"):
            self.out.line('"""The stride of a dim along which x may be constant."""')
            self.out.line("return x.stride(dim) if x.shape[dim] > 1 else 0")
        self.out.line()
        self.out.line()
        c = self.config
        head = f"state, cursor, tickets, rows, operands, {'slots, ' * self.plan.slots}"
        head += "parents, " * (self.plan.variant == "tree")
        head += f"block={c.block}, warps={c.warps}, fold={c.fold}, stages={c.stages}"
        head += f", matrix={c.matrix}" if self.plan.several and not c.part else ""
        head += f", registers={c.registers}" if c.registers else ""
        with self.out.block(f"def launch({head})"):
            self._contract()
            self._canonical()
            self._outputs()
            split = self.values.split
            if split:
                self.out.line(f"block = min(block, {power_of_two(self.values.size(split))})")
            self.out.line(f"tiles = {f'triton.cdiv({self.values.size(split)}, block)' if split else '1'}")
            self.out.line("programs = lanes.numel() * tiles")
            if self.plan.slots and self.plan.variant == "recurrent":
                self.out.line("count = ticket_count(lanes, block)")
                self.out.line("tickets = torch.zeros((len(view), count), dtype=torch.int32, device=state.device)")
            with self.out.block("if programs"):
                self._call()
            self.out.line("return outputs")

    def _ticket_count(self) -> None:
        tickets = Tickets(self.plan, self.values)
        names = ", ".join(f"size_{x}" for x in tickets.lanes)
        with self.out.block("def ticket_count(lanes, block)"):
            self.out.line('"""How many tickets a sequence needs, for a state whose lanes have these sizes."""')
            if names:
                self.out.line(f"{names}, = lanes[{int(self.plan.layout.sequence)}:]")
            split = self.values.split
            if split and (self.plan.slots or any("tile" in group.lanes for group in tickets.groups)):
                self.out.line(f"TILES = triton.cdiv({self.values.size(split)}, block)")
            self.out.line(f"return {tickets.count()}")
        self.out.line()
        self.out.line()

    def _contract(self) -> None:
        plan, lanes = self.plan, self.plan.program.lanes

        def shape(v: Var, batch: tuple[str, ...], *middle: str) -> str:
            dims = [lane if lane in v.lanes else "1" for lane in batch]
            dims += [*middle, *([str(self.values.size(v.kind))] if v.kind != "scalar" else [])]
            return f"{v} [{', '.join(dims)}]"

        middle = ("T",) if plan.several else ()
        rows = ", ".join(shape(v, lanes, str(plan.capacity)) for v in plan.program.logged)
        scale = ", ".join([*lanes, *map(str, plan.scale_shape(()))])
        shadow = f"; {_short(plan.read_dtype)} shadow of the state, its scale [{scale}]" if plan.shadowed else ""
        text = CONTRACT.format(
            variant=plan.variant,
            outputs=", ".join(shape(v, lanes, *middle) for v in plan.program.outputs) or "none",
            state=f"{_short(plan.state_dtype)}, {plan.layout}",
            log="" if plan.variant == "recurrent" else LOG.format(rows=rows, shadow=shadow),
            operands=", ".join(shape(v, lanes, *middle) for v in plan.program.inputs),
            matrix=(MATRIX if plan.several and not self.config.part else "")
            + (REGISTERS if self.config.registers else ""),
            parents=PARENTS.format(nodes=NODES) if plan.variant == "tree" else "",
            slots=SLOTS if plan.slots else "",
        )
        self.out.lines(text)

    def _canonical(self) -> None:
        """The state as [*lanes, K, V], as Layout.canonical sees it."""
        sizes: list[str] = []
        for d, parts in enumerate(self.plan.layout.dims):
            known = prod(p for p in parts if p is not None)
            rest = f"state.shape[{d}]" + (f" // {known}" if known != 1 else "")
            sizes += [rest if p is None else str(p) for p in parts]
        seen = f".view({', '.join(sizes)}).permute({', '.join(map(str, self.plan.layout.order))})"
        self.out.line(f"view = state{seen}")
        if self.plan.shadowed:
            self.out.line(f"half = rows[{len(self.plan.program.logged)}]{seen}")
        self.out.line(f"lanes = view.shape[:{self.plan.layout.lanes}]")
        if self.plan.slots:
            self.out.line("lanes = torch.Size((len(slots), *lanes[1:]))")
            self.out.line("slots = slots.to(state.device)")
            self.out.line("entries = max(128, triton.next_power_of_2(len(slots)))  # one kernel for up to 128")
            with self.out.block("if entries > 2**15"):
                self.out.line('raise ValueError(f"slots: {len(slots)} are too many for one step, 32768 at most")')

    def _outputs(self) -> None:
        tokens = ""
        if self.plan.several:
            self.out.line(f"tokens = max(x.shape[{self.plan.layout.lanes}] for x in operands)")
            if self.plan.variant == "tree":
                self._check_tree()
            self.out.line(f"queries = max(16, {self.width or 1} * triton.next_power_of_2(tokens))")
            if self.config.part:
                self.out.line(f"drafts = tokens if queries <= {LINES} and tokens <= {MOST} else 0")
            tokens = " tokens,"
        if self.plan.several or self.config.part:
            # Triton's interpreter multiplies the bits of bfloat16 numbers; float32 it takes as it is.
            self.out.line("exact = torch.version.hip or triton.knobs.runtime.interpret")
            self.out.line('precision = "ieee" if exact else "tf32x3"')
        real = _short(self.plan.compute)
        tails = {"scalar": "", "key": f" {self.plan.sizes[0]},", "value": f" {self.plan.sizes[1]},"}
        self.out.line("outputs = [")
        for v in self.plan.program.outputs:
            shape = f"(*lanes,{tokens}{tails[v.kind]})".replace(",)", ")" if tokens or tails[v.kind] else ",)")
            self.out.line(f"    torch.empty({shape}, dtype=torch.{real}, device=state.device),")
        self.out.line("]")

    def _check_tree(self) -> None:
        most = min(NODES, self.plan.capacity)
        with self.out.block(f"if tokens > {most} or parents.shape[1] != tokens"):
            self.out.line(
                f'raise ValueError(f"{{tokens}} drafts, {{parents.shape[1]}} parents; there may be {most} of them")'
            )

    def _call(self) -> None:
        if self.config.registers:
            self.out.line("most = min(registers, 2**16 // (32 * warps))")
            self.out.line('options = {} if torch.version.hip else {"maxnreg": most}')
        self.out.line("step[(programs,)](")
        for argument in arguments(self.plan, self.values.split, self.config.part > 0):
            self.out.line(f"    {argument.value},")
        rest = " debug=True, sanitize_overflow=False," * self.plan.slots  # for the assertion on slots
        rest += " **options," if self.config.registers else ""
        self.out.line(f"    num_warps=warps, num_stages=stages,{rest}")
        self.out.line(")")


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
