"""One Python file that holds the step of a plan, all it needs and its own check: `standalone(plan, drawn)`.

The file imports torch, and Triton for a Triton kernel, and nothing else of ours:

    the kernel      Triton functions and their launcher, or C++ source and how it is built
    run             one step, whatever the target: run(state, cursor, rows, operands) -> outputs
    reference       the recurrence in plain torch
    check           one against the other (standalone_check)
    __main__        runs the check
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from kvbuffer_compile.codegen import build
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.codegen.standalone import check
from kvbuffer_compile.codegen.standalone.reference import emit_reference
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.tiles.values import Python
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Var

CONTRACT = '''"""One {variant} step; the outputs {outputs}.

state     {state}, contiguous, changed in place
{log}operands  {operands}
"""'''
SHADOW = """, and behind them
          shadow {dtype}, of the state's shape: what is read in its place; shadow_scale float32 [{scale}], what
          one in it stands for. The latter is zero at first, and whenever anything else has written the state: there is
          no shadow then
"""
LOG = """cursor    int32 [4, b], zeros at first but for row 1. Row 0: how many tokens a sequence owes; subtract to take
          tokens back; -1 marks padding. Row 1: at how many the next step folds the rows into the state first;
          {flush} after that. Row 2: steps run. Row 3: 1 while the state holds nothing and is not read (buffer-only).
rows      {rows}"""


def standalone(plan: Plan, drawn: Mapping[str, str], tokens: int, title: str) -> str:
    """The file. drawn: what each input is like (standalone_check.draw), by name. tokens: of one step of the check.

    EmitError when the plan has no spelling in the target's language.
    """
    out = Python()
    out.line("# SPDX-License-Identifier: Apache-2.0")
    out.lines(triton.emit(plan) if plan.target == "triton" else _cpp(plan, title))
    _section(out, "One step.")
    _run(out, plan)
    _section(out, "The same in plain torch.")
    out.lines(emit_reference(plan.program))
    _section(out, "One held against the other.")
    out.lines(_text_of_check())
    _section(out)
    _subject(out, plan, drawn, tokens)
    out.lines(MAIN.replace("PLACE", PLACES["triton" if plan.target == "triton" else "cpp"]))
    return str(out)


def _section(out: Python, title: str = "") -> None:
    out.line()
    if title:
        out.line()
        out.line(f"# {title}")
    out.line()
    out.line()


def _text_of_check() -> str:
    """The module's text from its first definition on; what it imports stands here."""
    text = inspect.getsource(check)
    imports = (
        "from collections.abc import Callable, Sequence\nfrom dataclasses import dataclass\nfrom typing import Any\n"
    )
    return f"{imports}\nfrom torch import Tensor\n\n{text[text.index('FACTOR, ULPS') :]}"


# ---------------------------------------------------------------------------------------------- running


def _run(out: Python, plan: Plan) -> None:
    with out.block("def run(state, cursor, rows, operands)"):
        out.lines(_contract(plan))
        if plan.target == "cpp":
            logged = "" if plan.variant == "recurrent" else "cursor, *rows, "
            out.line(f"outputs = STEP(state, {logged}*operands)")
            one = len(plan.program.outputs) == 1
            out.line(f"return {'[outputs]' if one else 'list(outputs)'}")
            return
        tickets = "None"
        if plan.variant != "recurrent":
            out.comment("Zeros that a server allocates once: a launch leaves them as it found them.")
            heads = f"state.shape[1:{plan.layout.lanes}]"
            block = "launch.__defaults__[0]"
            out.line(f"count = ticket_count((state.shape[0], *{heads}), {block})")
            out.line("tickets = torch.zeros(state.shape[0], count, dtype=torch.int32, device=state.device)")
            tickets = "tickets"
        out.line(f"return launch(state, cursor, {tickets}, rows, operands)")


def _contract(plan: Plan) -> str:
    lanes = plan.program.lanes

    def shape(v: Var, *middle: str) -> str:
        along = [lane if lane in v.lanes else "1" for lane in lanes]
        tail = {"scalar": [], "key": [str(plan.sizes[0])], "value": [str(plan.sizes[1])]}[v.kind]
        return f"{v} [{', '.join([*along, *middle, *tail])}]"

    tokens = ("T",) if plan.variant == "verify" else ()
    sizes = [*lanes, *(str(plan.sizes[i - len(lanes)]) for i in plan.layout.order[len(lanes) :])]
    dtypes = zip(plan.program.logged, plan.row_dtypes, strict=True)
    rows = ", ".join(f"{shape(v, str(plan.capacity))} {_short(d)}" for v, d in dtypes)
    return CONTRACT.format(
        variant=plan.variant,
        outputs=", ".join(shape(v, *tokens) for v in plan.program.outputs) or "-",
        state=f"{_short(plan.state_dtype)} [{', '.join(sizes)}]",
        log="" if plan.variant == "recurrent" else LOG.format(rows=rows, flush=plan.flush) + _shadow(plan),
        operands=", ".join(shape(v, *tokens) for v in plan.program.inputs) + ", any float dtype",
    )


def _shadow(plan: Plan) -> str:
    """The end of what is said about rows."""
    if not plan.shadowed:
        return "\n"
    scale = ", ".join([*plan.program.lanes, *map(str, plan.scale_shape(()))])
    return SHADOW.format(dtype=_short(plan.read_dtype), scale=scale)


# --------------------------------------------------------------------------------------------------- C++


BUILD = '''

def built():
    """Compile SOURCE and register it; the op. Takes about two seconds, once a process."""
    import os
    import shlex
    import subprocess
    import tempfile
    from pathlib import Path

    library = torch.library.Library("kvbuffer", "FRAGMENT")
    library.define(SCHEMA)
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "step.cpp"), Path(folder, "step.so")
        text.write_text(SOURCE, encoding="utf-8")
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        subprocess.run([*compiler, *FLAGS, str(text), "-o", str(binary), *libraries], check=True)
        torch.ops.load_library(str(binary))
    return getattr(torch.ops.kvbuffer, SCHEMA.split("(")[0]).default, library


STEP, _LIBRARY = built()'''


def _cpp(plan: Plan, title: str) -> str:
    """The source as a string and how it becomes an op, under a name that is not that of a compiled graph's."""
    name = f"{title}_{plan.key}"
    source = cpp.emit(plan).replace(f'"{plan.op_name}"', f'"{name}"')
    assert "'''" not in source
    out = Python()
    out.lines(f'"""Generated by kvbuffer_compile.\n\n{plan.program}\n\n{plan.settings}\n"""')
    out.line()
    out.line("import torch")
    out.line()
    out.line(f"FLAGS = {build.FLAGS}")
    out.line(f'SCHEMA = "{plan.schema.replace(plan.op_name, name)}"')
    out.lines(f"SOURCE = r'''{source}'''")
    return str(out) + BUILD


# -------------------------------------------------------------------------------------------------- check


PLACES = {
    "cpp": """
    place = "cpu"
""",
    "triton": """    import os

    place = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    if place == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: set TRITON_INTERPRET=1 to check in Triton's interpreter")
""",
}
MAIN = '''

def main():
    """Check the step on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter; C++ on the CPU."""
    import argparse
PLACE    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=3, help="sequences; the first begins empty, the third is padding")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0: twice the flush length")
    args = parser.parse_args()
    torch.manual_seed(0)
    error = check(SUBJECT, torch.device(place), args.batch, args.heads, args.steps)
    print(f"agrees with the reference: largest relative error {error:.3g} ({SUBJECT.allowed})")


if __name__ == "__main__":
    main()'''


def _subject(out: Python, plan: Plan, drawn: Mapping[str, str], tokens: int) -> None:
    inputs = {v.name: (v.kind, drawn[v.name]) for v in plan.program.inputs}
    logged = zip(plan.program.logged, plan.row_dtypes, strict=True) if plan.variant != "recurrent" else ()
    rows = ", ".join(f'"{v}": ("{v.kind}", {d})' for v, d in logged)
    shadow = ""
    if plan.shadowed:
        shadow = f"\n    read_dtype={plan.read_dtype},\n    scale={plan.scale_shape(())[0]},"
    out.lines(f"""SUBJECT = Subject(
    run,
    reference,
    variant="{plan.variant}",
    sizes={plan.sizes},
    flush={plan.flush},
    capacity={plan.capacity},
    tokens={tokens},
    state_dtype={plan.state_dtype},
    state_order={plan.layout.order},
    inputs={str(inputs).replace("'", '"')},
    rows={{{rows}}},{shadow}
)""")


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
