"""How many tokens a program stands for: the number of equal periods its ops on the state fall into."""

from __future__ import annotations

from kvbuffer_compile.ir import Map, Op, Program, Read, operands


def tokens(program: Program) -> int:
    """The largest number of periods alike in ops and kinds, each of which hands a read of its own to the outside."""
    ops = [op for op in program.ops if not isinstance(op, Map)]
    shapes = [_shape(op) for op in ops]
    for period in range(1, len(ops)):
        if len(ops) % period == 0 and shapes[period:] == shapes[:-period]:
            parts = [ops[i : i + period] for i in range(0, len(ops), period)]
            if all(any(_is_shown(op, program) for op in part) for part in parts):
                return len(parts)
    return 1


def _shape(op: Op) -> tuple[str, ...]:
    return (type(op).__name__, *(v.kind for v in operands(op)))


def _is_shown(op: Op, program: Program) -> bool:
    """A read that is an output itself, or by way of calls without other reads."""
    if not isinstance(op, Read):
        return False
    made = {op.out}
    for later in program.ops:
        if isinstance(later, Map) and not made.isdisjoint(operands(later)):
            made.add(later.out)
    return not made.isdisjoint(program.outputs)
