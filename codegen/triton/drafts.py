"""A verify step that streams the state and knows its tokens when it is compiled.

The reads of all tokens are one tile of matrix products (matrix.py), taken part by part as stream.py does: parts of the
state are on their way through shared memory, one program takes a whole head or a wide tile of it, and a step that
flushes folds each part and reads it in one go.

    steady   result = queries s; met_n = queries met-side of the owed rows; then result faded + (met_n weight_n) free_n
    flush    s = s faded + met_n^T free_n, stored; result = queries s

Up to MOST tokens are printed one after the other. The rows of `result` are split off in halves, so that a thread has
all of its columns; the sums over the contracted axis that no read has part in (a token's queries with the rows of
the tokens before it, and within the token) are numbers that are reduced eight at a time: warps wait once for eight.
More tokens take the loop of verify.py.

given_<name>      an operand, one for each token
each_sum          the sums, token by token
each_free_n       the free side of the rows of the tokens so far
each_weight       what scalar decays leave of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvbuffer_compile.codegen.schedule import Dot, Old, Schedule
from kvbuffer_compile.codegen.triton.tiles.matrix import applies, known, needed
from kvbuffer_compile.codegen.triton.tiles.rows import SLOT, Rows
from kvbuffer_compile.codegen.triton.tiles.values import DTYPES, Python, Values
from kvbuffer_compile.codegen.triton.tiles.vectors import Vectors
from kvbuffer_compile.codegen.triton.verify import Fresh
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import REDUCTIONS, Map, Var

MOST = 8  # tokens that are unrolled


def drafts(plan: Plan, schedule: Schedule) -> bool:
    """Whether a step of several tokens can be streamed: by matrix products, and no row that reads meet needs a read.

    Pools of slots are held: their verify steps have not been looked at in this form. Nor have trees.
    """
    if not applies(plan, schedule) or plan.shadowed or plan.slots or schedule.fold is None or plan.variant == "tree":
        return False
    kind = schedule.stages[0].reads[0].x.kind
    steps = [step for stage in schedule.stages for step in stage.steps]
    met = {row[0 if kind == "key" else 1] for row in schedule.fold.rows}
    whole = any(isinstance(s, Dot) or (isinstance(s, Map) and s.fn in REDUCTIONS) for s in needed(steps, met))
    return not whole and met <= known(plan.program.inputs, steps)


class Drafts:
    """Prints the reads and the unrolled tokens of a step for which `drafts` holds.

    part: elements of the contracted axis at a time.
    """

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values, rows: Rows, part: int) -> None:
        self.fresh = Fresh(out, plan, schedule, values, rows)
        assert schedule.fold is not None and self.fresh.matrix
        self.out, self.plan, self.values, self.rows, self.part = out, plan, values, rows, part
        self.matrix, self.fold, self.stages, self.reads = (
            self.fresh.matrix,
            schedule.fold,
            schedule.stages,
            schedule.stages[0].reads,
        )
        self.kind, self.other, self.width = self.matrix.kind, self.matrix.other, self.matrix.width
        self.met, self.free = ("left", "right") if self.kind == "key" else ("right", "left")
        self.updates = range(len(rows.updates))
        self.factor, self.gated = self.matrix.factor, self.kind in rows.fades
        self.vectors = Vectors(out, plan, values, rows, self.matrix)
        self.sides = [self.matrix.met(n) for n in range(len(self.fresh.seen))]
        before = known(plan.program.inputs, self.matrix.steps)
        self.dots = [s for s in self.matrix.steps if isinstance(s, Dot) and before >= {s.left, s.right}]
        self.ahead = needed(self.matrix.steps, self._roots())
        self.dots = [s for s in self.dots if s not in self.ahead]

    def _roots(self) -> list[Var]:
        """What the sums of a token are made of."""
        roots = [*self.sides, *([self.factor] if self.factor else [])]
        roots += [r.x for r in self.reads] if self.sides else []
        return roots + [v for s in self.dots for v in (s.left, s.right)]

    # ------------------------------------------------------------------------------------------- the reads

    def give(self, inputs: Sequence[Var]) -> None:
        """Ask for the operands of all tokens; they are used behind the state."""
        self.given = list(inputs)
        with self.out.block("if DRAFTS"):
            for v in inputs:
                self.out.line(f"given_{v} = ()")
            with self.out.block("for j in tl.static_range(DRAFTS)"):
                for v in inputs:
                    self.out.line(f"given_{v} = given_{v} + ({self.values.operand(v, 'j')},)")

    def read(self) -> None:
        """`result`, a row for each query. `kept` rows are owed afterwards."""
        self.matrix.start()
        self.out.line("token = tl.arange(0, TOKENS)")
        if self.matrix.grams:
            with self.out.block("if not DRAFTS"):
                self.matrix.multiply_fresh()
        if self.gated:
            self.vectors.stack_rows()
            self.vectors.stack_queries()
        with self.out.block("if flush"):
            self._flush()
            self.out.line("kept = 0")
        with self.out.block("else"):
            self._steady()

    def _steady(self) -> None:
        late = self.rows.at_once(("scalar", self.other), SLOT, ahead=True)
        for n in self.updates:
            self.matrix.empty(f"met_{n}", "QUERIES", str(self.rows.all_slots))
        if self.gated:
            self.vectors.meet()
            self.out.line(f"queries = queries * fade_{self.kind}[:, None]")
        with self._parts("STAGES"):
            if not self.gated:
                self.rows.at_once((self.kind,), SLOT)
                for n in self.updates:
                    self._product(f"met_{n}", "queries", f"tl.trans({self._exact(self.met, n)})")
            self._read_part(self.values.load_raw("live", "EVICT"))
        self.out.lines("\n".join(late))
        self.matrix.fade_result()
        for n in self.updates:
            weight = f" * weight_{n}[None, :]" if "scalar" in self.rows.fades else ""
            self._product("result", f"met_{n}{weight}", self._exact(self.free, n))

    def _flush(self) -> None:
        self.rows.at_once(("scalar", self.other), SLOT)
        weighted = "scalar" in self.rows.fades
        for n in self.updates:
            if weighted:
                self.out.line(f"{self.free}_{n} = {self.free}_{n} * weight_{n}[:, None]")
        names = {k: f"fade_{k}" for k in self.rows.fades}
        with self._parts("1"):
            if self.gated:
                names[self.kind] = f"fade_{self.kind}_part"
                self.out.line(f"{names[self.kind]} = tl.gather(fade_{self.kind}, here, 0)")
            else:
                self.rows.at_once((self.kind,), SLOT)
            fades = "".join(f" * {name}{'' if k == 'scalar' else self.values.across(k)}" for k, name in names.items())
            self.out.line(f"s = {self.values.load_state('live', 'EVICT')}{fades}")
            for n in self.updates:
                met = f"some({self.met}_{n}, here)" if self.gated else f"tl.trans({self._exact(self.met, n)})"
                free = f"{self.free}_{n}" if weighted else self._exact(self.free, n)
                left, right = (met, free) if self.kind == "key" else (f"tl.trans({free})", f"tl.trans({met})")
                self._product("s", left, right)
            self.values.store_state()
            self._read_part(f"s.to({DTYPES[self.plan.state_dtype]})")

    def _read_part(self, tile: str) -> None:
        """What a part of the state gives to all reads."""
        queries = "tl.trans(some(queries, here))" if self.gated else "queries"
        self._product("result", queries, tile if self.kind == "key" else f"tl.trans({tile})")

    @contextmanager
    def _parts(self, stages: str) -> Iterator[None]:
        """The loop over parts of the contracted axis; within it `queries` are those of the part, or `here` is where in
        all of them."""
        size, index = self.values.size(self.kind), f"{self.kind}_part"
        self.matrix.empty("result", "QUERIES", self.values.length(self.other))
        with self.values.part(self.kind, self.part):
            with self.out.block(f"for start in tl.range(0, {size}, {self.part}, num_stages={stages})"):
                self.out.line(f"{index} = (start + tl.arange(0, {self.part})).to(tl.int64)")
                if self.values.padded(self.kind):
                    self.out.line(f"{index}_ok = {index} < {size}")
                if self.gated:
                    self.out.line(f"here = {index}.to(tl.int32)")
                else:
                    self.matrix.lay(stored=True)
                yield

    def _product(self, total: str, left: str, right: str) -> None:
        self.out.line(f"{total} = product({left}, {right}, {total}, PRECISION)")

    def _exact(self, side: str, n: int) -> str:
        """A tile of rows as it is stored, where nothing fades it: then products take fewer parts."""
        v = self.rows.side(n, side)
        bare = v.kind != "scalar" and v.kind not in self.rows.fades
        dtype = self.plan.row_dtypes[self.plan.program.logged.index(v)]
        return f"{side}_{n}" + (f".to({DTYPES[dtype]})" if bare and dtype.itemsize == 2 else "")

    # ---------------------------------------------------------------------------------------- the tokens

    def tokens(self, store: Callable[[], None]) -> None:
        """The tokens one after the other. store: prints what is stored of token t."""
        if self.dots or self.sides:
            self._sum()
        self.out.line("each_result = columns(tl.trans(result))")
        fold, seen = self.fold, range(len(self.fresh.seen))
        self.out.line("each_weight = ()")
        for n in seen:
            self.out.line(f"each_free_{n} = ()")
        self.fresh.start_fading()
        with self.out.block("for t in tl.static_range(DRAFTS)"):
            self.values.take(self.given)
            for stage in self.stages:
                for step in stage.steps:
                    if step in self.dots:
                        assert isinstance(step, Dot)
                        self.out.line(
                            f"{self.values.name(step.out)} = each_sum[{self._at()} + {self.dots.index(step)}]"
                        )
                    else:
                        self.values.steps([step])
                for read in stage.reads:
                    self._read(read)
            store()
            self.fresh.fade_on()
            if self.sides and fold.scalar:
                self._append("each_weight", fold.scalar, f"(tl.full([], 1.0, {self.values.real}),)")
            for n in seen:
                free = self.fresh.seen[n][1 if self.kind == "key" else 0]
                self._append(
                    f"each_free_{n}", fold.value if self.kind == "key" else fold.key, f"({self.values.name(free)},)"
                )
        self.out.line("t = 0  # a name for loops at run time again")

    def _sum(self) -> None:
        """each_sum: of the queries of each token and the rows that they meet."""
        used = self.values.operands(self.ahead, self._roots())
        self.out.line("each_sum = ()")
        for n, _ in enumerate(self.sides):
            self.out.line(f"each_met_{n} = ()")
        with self.out.block("for t in tl.static_range(DRAFTS)"):
            self.values.take(used)
            self.values.steps(self.ahead)
            for dot in self.dots:
                self._add_sum(f"{self.values.name(dot.left)} * {self.values.name(dot.right)}")
            if self.sides:
                with self.out.block("for j in tl.static_range(t)"):
                    for n, _ in enumerate(self.sides):
                        for read in self.reads:
                            self._add_sum(f"each_met_{n}[j] * {self.values.name(read.x)}")
            for n, side in enumerate(self.sides):
                self._append(f"each_met_{n}", self.factor, f"({self.values.name(side)},)")
        self.out.line(f"each_sum = totals(each_sum, {self._at('DRAFTS')})")

    def _add_sum(self, text: str) -> None:
        self.out.line(f"each_sum = each_sum + ({self.values.inside(text, self.kind)},)")

    def _at(self, t: str = "t") -> str:
        """How many sums there are of the tokens before t."""
        pairs = len(self.sides) * len(self.reads)
        return f"{t} * {len(self.dots)} + {t} * ({t} - 1) // 2 * {pairs}"

    def _append(self, name: str, factor: Var | None, last: str) -> None:
        """What a decay leaves of a tuple of earlier tokens, and the token's own behind it."""
        if factor is None:
            self.out.line(f"{name} = {name} + {last}")
            return
        self.out.line("faded = ()")
        with self.out.block("for j in tl.static_range(t)"):
            self.out.line(f"faded = faded + ({name}[j] * {self.values.name(factor)},)")
        self.out.line(f"{name} = faded + {last}")

    def _read(self, read: Old) -> None:
        """One read of token t: of the state, and of the rows of the tokens before."""
        out, place = self.values.name(read.out), self.reads.index(read)
        self.out.line(f"{out} = each_result[t * {self.width} + {place}]")
        self.fresh.fade(out, read)
        if not self.sides:
            return
        weight = " * each_weight[j]" if self.fold.scalar else ""
        with self.out.block("for j in tl.static_range(t)"):
            for n, _ in enumerate(self.sides):
                at = f"{self._at()} + {len(self.dots)} + (j * {len(self.sides)} + {n}) * {len(self.reads)} + {place}"
                self.out.line(f"{out} += each_sum[{at}]{weight} * each_free_{n}[j]")
