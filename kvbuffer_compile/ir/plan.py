"""What was decided about one state: how its tensor is laid out, which variant runs, how many rows it may owe.

The calling convention of every step op, whoever implements it (ATen, C++, Triton):

    recurrent   step(state!, *operands)                         -> [outputs]
    buffered    step(state!, cursor!, *rows!, *operands)        -> [outputs]
    shadowed    all but recurrent, with read_dtype: step(state!, cursor!, *rows!, shadow!, shadow_scale!, ...)
    verify      the same for T tokens in one call, T >= 1 known at run time from the operands
    block       the same for T tokens that all read the state as it was before the call, and its rows owed
    tree        verify for a tree of T drafts: step(state!, cursor!, *rows!, parents, *operands) -> [outputs]
    slots       each but tree with one more operand in front of the others: step(..., slots, *operands)

    state      the user's tensor, any strides; Layout.canonical(state) is [*lanes, K, V]
    cursor     int32 [4, N], N sequences (lane 0; 1 when the layout has no sequence lane).
               cursor[0, b] = tokens owed; -1 marks a padding sequence: its outputs are zero, nothing is touched.
               cursor[1, b] = the count at which the next step flushes first (staggers layers; L after a flush)
               cursor[2, b] = steps run so far, for padding sequences too: tells after an exception who has stepped
               cursor[3, b] = 1 while the state is known to be zero and holds nothing: it is not read
    rows       one tensor for each of program.logged, [N, *other lanes, capacity(, K or V)];
               size 1 along the lanes where the value does not vary; slots >= cursor[0] hold garbage (NaN in tests)
    shadow     of the state's shape in read_dtype: the state in units of `scale`, rounded (shadow.py). Read, where it is
               there, in the state's place
    scale      float32 [*lanes, V], or [*lanes, K] where reads contract V: what one in the shadow stands for; 0 where
               there is no shadow; NaN where there is none and none is to be made before the next flush
    operands   one tensor for each of program.inputs, [*lanes(, K or V)], size 1 along lanes where it does not vary,
               any strides and float dtype; for verify and block [*lanes, T(, K or V)]
    outputs    one contiguous tensor for each of program.outputs, [*lanes(, K or V)], in the plan's compute dtype;
               for verify and block [*lanes, T(, K or V)]
    slots      int32 or int64 [B]: the state is a pool of N slots, of which the step takes these as its B sequences and
               leaves all others alone. cursor and rows are those of all N slots, operands and outputs of the B.
               Negative ones count from the end; of equal ones each sees the same state, and the last is stored
    parents    int32 [N, T] or [1, T]: the node that each draft follows, which comes before it; -1 the last committed
               token

A buffered step, for every sequence with cursor[0] >= 0: if cursor[0] >= cursor[1] or cursor[0] + T > capacity, fold
the rows into the state and set cursor[0] = 0, cursor[1] = L, cursor[3] = 0; run the program T times on (state, rows);
store the program's logged values in slots cursor[0], cursor[0] + 1, ...; add T to cursor[0]. cursor[2] grows by 1 for
every sequence, with slots for those of the step. Rolling back is subtracting from cursor[0].

With a shadow, a step that flushes makes it anew from the state it has written, and one that finds none makes it from
the state it reads, unless that holds nothing. Both read the state itself; every other step reads the shadow, never the
state. Rows are always folded into the state itself. A kernel may read the state where the shadow would do.

In a block step no token sees another: reads are of (state, rows) alone, whatever the tokens in front add. No read of
its program stands behind a decay or an update, and what is stored is stored as in a verify step.

A tree step flushes in the same way. Each node sees the state, the rows owed and its ancestors, in order of the path.
All T rows are stored in node order behind the owed ones, and cursor[0] stays: whatever comes next, be it a step, a
flush or a read, finds every draft rejected. Accepting a path is moving its rows to follow the owed ones, in order, and
adding its length to cursor[0], before anything else happens to the state.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvbuffer_compile.ir.program import Program, Var
from kvbuffer_compile.ir.shadow import scale_kind

SHADOW = ("shadow", "shadow_scale")  # the step op's arguments for one
Variant = Literal["recurrent", "buffered", "verify", "block", "tree"]


@dataclass(frozen=True)
class Layout:
    """How a state tensor is seen as [*lanes, K, V]: split its dims into `dims`, then permute the parts by `order`.

    dims: for each dim of the tensor, the sizes of its parts, outermost first; None for a size known at run time.
    order: the parts (numbered across all dims) of the lanes in physical order, then the key part, then the value part.
    """

    dims: tuple[tuple[int | None, ...], ...]
    order: tuple[int, ...]

    @property
    def lanes(self) -> int:
        """How many lane axes there are."""
        return len(self.order) - 2

    @property
    def sequence(self) -> bool:
        """Whether lane 0 is the outermost part of dim 0, by convention the sequences of a batch."""
        return self.lanes > 0 and self.order[0] == 0

    def at_run_time(self) -> Layout:
        """The same with every size left to run time that may be: one kernel serves any batch and number of heads."""
        last = max(self.order, default=0)
        kept = set(self.order[-2:])
        numbers = iter(range(last + 1))
        dims = []
        for parts in self.dims:
            named = [(next(numbers), n) for n in parts]
            free = next((i for i, n in named if i not in kept and None not in parts), None)
            dims.append(tuple(None if i == free else n for i, n in named))
        return Layout(tuple(dims), self.order)

    def canonical(self, state: Tensor) -> Tensor:
        """The state as a view [*lanes, K, V]; never a copy."""
        return state.view(self._parts(state.shape)).permute(self.order)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of `canonical` for a state of this shape."""
        parts = self._parts(shape)
        return tuple(parts[i] for i in self.order)

    def _parts(self, shape: Sequence[int]) -> list[int]:
        sizes: list[int] = []
        for n, parts in zip(shape, self.dims, strict=True):
            known = math.prod(p for p in parts if p is not None)
            sizes += [n // known if p is None else p for p in parts]
        return sizes

    def __str__(self) -> str:
        dims = " x ".join("(" + " ".join("?" if p is None else str(p) for p in d) + ")" for d in self.dims)
        return f"{dims} as {self.order}"


@dataclass(frozen=True)
class Plan:
    """One state's plan. Equal plans share one op and one kernel.

    sizes: (K, V). flush: the flush length L in tokens; capacity: slots a buffer has (>= L).
    row_dtypes: one for each of program.logged. compute: dtype of arithmetic and outputs (float32; float64 for
    float64 states). target: who implements the op. slots: the state is a pool, an operand says which slots.
    read_dtype: of the shadow that steps read instead of the state; None for no shadow.
    why: one line of the cost model for people; does not take part in equality.
    """

    program: Program
    layout: Layout
    variant: Variant
    sizes: tuple[int, int]
    flush: int
    capacity: int
    state_dtype: torch.dtype
    row_dtypes: tuple[torch.dtype, ...]
    compute: torch.dtype = torch.float32
    target: str = "aten"
    slots: bool = False
    read_dtype: torch.dtype | None = None
    why: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """A content hash that names the op and the kernels of this plan, equal in every process."""
        return _hash(self.program, self.layout, self.variant, self.sizes, self.flush, self.capacity,
                     self.state_dtype, self.row_dtypes, self.compute, self.target, self.slots,
                     self.read_dtype)  # fmt: skip

    @functools.cached_property
    def rows_key(self) -> str:
        """A content hash of all that says what rows mean: asked at every step, for every state. Rows have a lane of
        sequences in any case, so whether operands have it as well does not matter: of one sequence they have none."""
        program = str(self.program)
        if self.layout.sequence:
            alone = re.compile(rf"^(  input .*\(){re.escape(self.program.lanes[0])}\b ?", re.MULTILINE)
            program = alone.sub(r"\1", program)
        return _hash(program, self.layout, self.sizes, self.flush, self.capacity,
                     self.state_dtype, self.row_dtypes, self.compute, self.read_dtype)  # fmt: skip

    @property
    def several(self) -> bool:
        """Whether operands and outputs have an axis of tokens behind the lanes."""
        return self.variant in ("verify", "block", "tree")

    def shares_rows(self, other: Plan) -> bool:
        """Whether rows written under one plan can be read under the other (decode and verify of one recurrence)."""
        return self.rows_key == other.rows_key

    @property
    def op_name(self) -> str:
        """The step op's name in the kvbuffer namespace, as profilers show it: variant, recurrence in letters, L."""
        letters = self.program.signature
        letters = letters if len(letters) <= 12 else f"{letters[:12]}etc"
        return f"step_{self.variant}_{letters}_L{self.flush}_{self.key}"

    @property
    def shadowed(self) -> bool:
        """Whether steps read a shadow of the state."""
        return self.read_dtype is not None

    @property
    def sides(self) -> int:
        """How many of the step op's arguments lie between the cursor and what is not the state's own: rows, shadow."""
        return len(self.program.logged) + 2 * self.shadowed

    def parted(self, sides: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Rows, and the shadow with its scale; the latter may be missing."""
        return sides[: len(self.program.logged)], sides[len(self.program.logged) :]

    @property
    def side_arguments(self) -> tuple[str, ...]:
        """The step op's arguments in front of the operands. What it writes is marked, so that functionalisation and
        Inductor keep the order."""
        written = ["state"]
        if self.variant != "recurrent":
            written += ["cursor", *(f"row_{v}" for v in self.program.logged), *SHADOW[: 2 * self.shadowed]]
        marked = [f"Tensor(a{i}!) {name}" for i, name in enumerate(written)]
        return (*marked, *["Tensor parents"] * (self.variant == "tree"), *["Tensor slots"] * self.slots)

    @property
    def schema(self) -> str:
        """The step op's schema."""
        return self.schema_of(self.op_name, self.program.inputs, self.program.outputs)

    def schema_of(self, name: str, inputs: tuple[Var, ...], outputs: tuple[Var, ...]) -> str:
        """The schema of an op on this state with these operands."""
        args = (*self.side_arguments, *(f"Tensor {v}" for v in inputs))
        returns = "Tensor" if len(outputs) == 1 else "(" + ", ".join(["Tensor"] * len(outputs)) + ")"
        return f"{name}({', '.join(args)}) -> {returns}"

    def row_shape(self, v: Var, lanes: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the rows of one logged value for a state whose lanes have these sizes."""
        sizes = [n if name in v.lanes else 1 for name, n in zip(self.program.lanes, lanes, strict=True)]
        if self.layout.sequence:
            sizes[0] = lanes[0]  # cursors differ per sequence, so slots do too
        else:
            sizes = [1, *sizes]
        tail = {"scalar": (), "key": self.sizes[:1], "value": self.sizes[1:]}[v.kind]
        return (*sizes, self.capacity, *tail)

    def scale_shape(self, lanes: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a shadow, for a state whose lanes have these sizes."""
        return (*lanes, self.sizes[0] if scale_kind(self.program) == "key" else self.sizes[1])

    def shadow_bytes(self, lanes: tuple[int, ...]) -> int:
        """Memory that a shadow takes, its scale included."""
        if self.read_dtype is None:
            return 0
        return math.prod((*lanes, *self.sizes)) * self.read_dtype.itemsize + 4 * math.prod(self.scale_shape(lanes))

    def fresh_rows(self, lanes: tuple[int, ...]) -> int:
        """How many rows a state that is known to be zero owes before its first flush.

        Rows alone pay until they take as many bytes as one pass over the state (cost.break_even), if the buffer has
        room for them.
        """
        state = math.prod((*lanes, *self.sizes)) * self.state_dtype.itemsize
        logged = zip(self.program.logged, self.row_dtypes, strict=True)
        row = sum(math.prod(self.row_shape(v, lanes)) // self.capacity * dtype.itemsize for v, dtype in logged)
        return max(1, min(self.capacity, state // max(row, 1)))

    def sequences(self, lanes: tuple[int, ...]) -> int:
        """How many cursors a state with these lane sizes needs."""
        return lanes[0] if self.layout.sequence else 1

    def tickets(self, lanes: tuple[int, ...]) -> int:
        """How many tickets a sequence has room for, whatever the launch: Triton kernels count with them
        (codegen/triton/tickets.py says for what). One for each group and one of equal slots, by lane and tile of 16."""
        tiles = -(-max(self.sizes) // 16)
        return (2 + len(self.program.logged)) * math.prod(lanes) // max(self.sequences(lanes), 1) * tiles

    @property
    def settings(self) -> str:
        """What equal plans have in common, for people: the text of kernels, which are kept by their text, holds this
        and nothing that was measured."""
        dtypes = (str(d).removeprefix("torch.") for d in self.row_dtypes)
        rows = ", ".join(f"{v}:{d}" for v, d in zip(self.program.logged, dtypes, strict=True))
        sizes = f"K={self.sizes[0]} V={self.sizes[1]}"
        head = f"{self.variant} L={self.flush} capacity={self.capacity} {sizes} target={self.target}"
        shadow = f"\n  reads {str(self.read_dtype).removeprefix('torch.')}" if self.shadowed else ""
        return f"{head}\n  rows {rows or '-'}{shadow}"

    def __str__(self) -> str:
        return f"{self.settings}\n  {self.why}".rstrip()


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
