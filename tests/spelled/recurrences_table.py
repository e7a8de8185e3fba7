"""docs/recurrences.md, made by running every form and architecture:  python -m tests.spelled.recurrences_table

Programs are printed as equations: S' is S transposed, Diag(a) a factor for each row (or column). y1, y2, ... are reads.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from kvbuffer_compile.backend import GraphRecord, compile_graph, observers
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Map, Program, Read, Update, Var
from kvbuffer_compile.options import Options
from tests import zoo
from tests.spelled import block_forms, forms, graph_forms, near_misses, scan_forms
from tests.spelled.lifting import traced
from tests.support.steps import Sizes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recurrences.md"
COLUMNS = ("name", "token, or its code", "decay", "rank", "reads", "ops", "status", "reason")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
SIGNS = {"aten.mul.Tensor": " * ", "aten.add.Tensor": " + ", "aten.sub.Tensor": " - ", "aten.div.Tensor": " / "}
FAMILIES = {
    "Linear attention and its gates": "linear_attn linear_attn_normalised retention lightning simple_gla gla hgrn2",
    "RWKV": "rwkv6 rwkv7 rwkv7_products",
    "Delta rules": "delta_rule gated_delta_rule gated_delta_product2 gated_delta_product3 comba kda gdn2 "
    "gated_oja_rule longhorn longhorn_diagonal iplr dplr precond_gated_delta precond_kda",
    "Several states a token": "gsa abc",
    "Test-time training": "ttt ttt_layer_norm",
}
LONGEST = 160  # of a token's equations
WORDS = """\
A state S holds a matrix for each sequence and head: its rows belong to keys, its columns to values. A token may

- decay it (D): one factor a head, a row or a column, `decay` says which; `S = Diag(x0) S` scales rows, `S = S Diag(x0)`
  columns;
- be read from it (R): `y1 = S' x0`, a sum of its rows weighted by a key, or `S x0`, of its columns by a value;
- be added to it (U): `S += x1 x2'`, the product of a key and a value. `rank` is how many of them a token adds.

x0, x1, ... are values that the model computes from the token, y1, y2, ... what was read; ' is the transpose. `ops` is
the order, as `signature` in a report. Of a step that is declined its code is shown instead.

| status | meaning |
|---|---|
| buffered, recurrent | one token a call is served, by a buffer or by one kernel that writes the state |
| verify | several tokens a call, unrolled or by a scan: served as one step, any of them can be taken back |
| block | several tokens a call, which read the state by one product and are added to it by one: served as one step |
| kept | no matrix state: the compiler handles it as it is, and `on_decline` says nothing of it |
| declined | a matrix state that is not served: the reason says what stood in the way and what to write instead |

A reason with "there is nothing to be done" is about the recurrence, not about its spelling: such a state is left to
Inductor. In a report, reasons name your own tensors and the line of your model."""
ALONG = {"scalar": "head", "key": "row", "value": "column"}
OPTIONS = {"inner": "eager", "target": "aten", "flush": 4, "donate": True}


@dataclass(frozen=True)
class Row:
    """One line. token: the equations of one token; of what is declined, the step as it is written; "" otherwise."""

    name: str
    token: str = ""
    decay: str = ""
    rank: str = ""
    reads: str = ""
    ops: str = ""
    status: str = "declined"
    reason: str = ""

    def __str__(self) -> str:
        cells = (self.name, self.token and f"`{self.token}`", self.decay, self.rank, self.reads, self.ops, self.status)
        return f"| {' | '.join(cells)} | {self.reason} |"


# -------------------------------------------------------------------------------------------- equations


def token(program: Program) -> str:
    """One token as equations, values of the program written where they are used."""
    known: dict[str, str] = {}
    out = []
    for op in program.ops:
        match op:
            case Map(v, fn, args):
                known[v.name] = _call(fn, [_text(a, known) for a in args])
            case Read(v, x):
                known[v.name] = f"y{1 + sum(line.startswith('y') for line in out)}"
                state = "S'" if x.kind == "key" else "S"
                out.append(f"{known[v.name]} = {state} {_text(x, known)}")
            case Decay(a):
                factor = _text(a, known)
                out.append(
                    {"scalar": f"S *= {factor}", "key": f"S = Diag({factor}) S"}.get(a.kind, f"S = S Diag({factor})")
                )
            case Update(l, r):
                out.append(f"S += {_text(l, known)} {_text(r, known)}'")
    return _short("; ".join(out))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _text(x: Any, known: dict[str, str]) -> str:
    return known.get(x.name, x.name) if isinstance(x, Var) else f"{x:g}"


def _call(fn: str, args: list[str]) -> str:
    if fn in SIGNS and len(args) == 2:
        return f"({SIGNS[fn].join(args)})"
    return f"{fn.removeprefix('aten.').split('.')[0]}({', '.join(args)})"


def row(name: str, plan: Plan) -> Row:
    program = plan.program
    decays = [ALONG[op.factor.kind] for op in program.ops if isinstance(op, Decay)]
    reads = Counter(ALONG[op.x.kind] for op in program.ops if isinstance(op, Read))
    return Row(
        name,
        token(program),
        ", ".join(decays) or "none",
        str(sum(isinstance(op, Update) for op in program.ops)),
        ", ".join(f"{n} over {along}s" for along, n in reads.items()),
        program.signature,
        plan.variant,
    )


# ------------------------------------------------------------------------------------------------- rows


def of_records(name: str, records: Iterable[GraphRecord]) -> list[Row]:
    """A row for each kind of state that the graphs of one model hold."""
    found: list[Row] = []
    for record in records:
        for _, plan in record.states:
            found.append(row(name, plan) if isinstance(plan, Plan) else Row(name, reason=f"{plan.rule}: {plan.reason}"))
        for r in record.refused:
            status = "kept" if r.kept else "declined"
            found.append(Row(name, status=status, reason=f"{r.why.rule}: {record.told(r.why.reason)}"))
    return list(dict.fromkeys(found)) or [Row(name, status="", reason="nothing is written")]


def of_step(name: str, step: Any, args: tuple[torch.Tensor, ...]) -> list[Row]:
    """The rows of one plain function."""
    records: list[GraphRecord] = []
    observers.listeners.append(records.append)
    try:
        compile_graph(traced(step, args), list(args), ours=Options(**OPTIONS), is_inference=True)
    finally:
        observers.listeners.remove(records.append)
    return [replace(r, token=written(step)) if r.status == "declined" else r for r in of_records(name, records)]


def written(step: Any) -> str:
    """The statements of a plain function in one line."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(step))).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return _short("; ".join(" ".join(ast.unparse(x).split()) for x in body).replace("|", "\\|"))


def of_forms(given: Iterable[forms.Form]) -> Iterator[Row]:
    for form in given:
        sizes = Sizes(2, 3, 4, 4) if form.name == "ttt" else forms.SIZES
        g = torch.Generator().manual_seed(0)
        yield from of_step(form.name, form.step, (*form.start(g, sizes), *form.inputs(sizes, g)))


def _of_family(names: str) -> Iterator[Row]:
    known = {form.name: form for form in forms.forms()}
    return of_forms(known[name] for name in names.split())


def of_scans(steps: Iterable[Any]) -> Iterator[Row]:
    """Three tokens each."""
    return of_forms(scan_forms.form(step, 3) for step in steps)


def of_blocks() -> Iterator[Row]:
    """The reads of a block are of the state before it; where a token reads others of its block, the graph adds that."""
    for name, step in block_forms.STEPS.items():
        g = torch.Generator().manual_seed(0)
        state = torch.randn(block_forms.B, block_forms.H, block_forms.K, block_forms.V, generator=g)
        yield from of_step(name, step, (state, *block_forms.operands(16, g)))


def of_near_misses() -> Iterator[Row]:
    yield from of_forms(form for form, _ in graph_forms.NEAR)
    yield from of_scans(scan_forms.NEAR)
    for name, (step, _) in near_misses.NEAR_MISSES.items():
        g = torch.Generator().manual_seed(0)
        state = torch.randn(2, 3, 4, 5, generator=g)
        yield from of_step(name, step, (state, *forms.operands("qkvgb")(forms.SIZES, g)))


def of_architecture(arch: zoo.Arch) -> list[Row]:
    """One decode step of the tiny model, compiled without Inductor."""
    records: list[GraphRecord] = []
    torch._dynamo.reset()
    step = zoo.prefilled(arch.make(), zoo.prompt(1, 6), "dynamic")
    options = {**OPTIONS, "donate": arch.name == "minimax"}
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=arch.fullgraph, options=options)
    observers.listeners.append(records.append)
    try:
        with torch.no_grad():
            compiled(zoo.prompt(1, 1, seed=5))
    finally:
        observers.listeners.remove(records.append)
    return of_records(arch.name, records)


# ------------------------------------------------------------------------------------------------- page


def versions() -> str:
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def table(rows: Iterable[Row]) -> str:
    return HEAD + "\n".join(map(str, rows)) + "\n"


def sections() -> dict[str, Any]:
    """Title of each section -> what makes its rows."""
    return {
        **{title: partial(_of_family, names) for title, names in FAMILIES.items()},
        "In the forms that graphs give them": lambda: of_forms(graph_forms.GRAPH_FORMS),
        "Blocks of 16 tokens": of_blocks,
        "Several tokens by an associative scan": lambda: of_scans(scan_forms.CAPTURED),
        "Near-misses": of_near_misses,
        "Architectures of transformers": lambda: (r for a in zoo.ARCHS.values() for r in of_architecture(a)),
    }


def page() -> str:
    parts = [
        "# Recurrences",
        "What `explain` says of recurrences from papers and libraries, a row for each tensor that is written. Made by "
        f"`python -m tests.spelled.recurrences_table` with {versions()}: every row was captured, lifted and, where it "
        "is served, proved on numbers. Functions and layers of flash-linear-attention: "
        "[flash-linear-attention.md](flash-linear-attention.md).",
        WORDS,
    ]
    for title, rows in sections().items():
        parts += [f"## {title}", table(rows()).rstrip()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
