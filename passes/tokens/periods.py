"""The tokens of a program: equal periods of its ops on the state become one program of one token, run several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvbuffer_compile.ir.program import Map, Op, Program, Read, Var, operands, rename, result


@dataclass(frozen=True)
class Tokens:
    """program: of one token, canonical. inputs, outputs: for each token the variables of the whole program that its
    inputs and outputs stand for."""

    program: Program
    inputs: tuple[tuple[Var, ...], ...]
    outputs: tuple[tuple[Var, ...], ...]

    @property
    def count(self) -> int:
        return len(self.inputs)


def tokens(program: Program) -> Tokens:
    """The most tokens that a program can be taken apart into: 1 when it cannot.

    Every period must be alike in all its calls, hand something to the outside, and use no read of another one.
    Equal algebra gives equal programs: calls stand where they are first needed, inputs in order of use.
    """
    state = _State(program)
    for period in _periods(state.ops, program):
        parts = [state.token(range(i, i + period)) for i in range(0, len(state.ops), period)]
        found = [part for part in parts if part is not None and part.outputs]
        programs = {rename(part) for part in found}
        if len(programs) == 1 and len(found) == len(parts):
            return Tokens(programs.pop(), tuple(p.inputs for p in found), tuple(p.outputs for p in found))
    entangled = next(_periods(state.ops, program), len(state.ops))  # several tokens, one feeding the next
    return whole(replace(program, tokens=len(state.ops) // entangled if entangled else 1))


def whole(program: Program) -> Tokens:
    """A program that is not taken apart, canonical."""
    state = _State(program)
    one = state.token(range(len(state.ops)))
    assert one is not None, "a program uses no reads but its own"
    return Tokens(replace(rename(one), tokens=program.tokens), (one.inputs,), (one.outputs,))


def _periods(ops: Sequence[Op], program: Program) -> Iterator[int]:
    """The lengths of periods alike in ops and kinds, each of which hands a read to the outside."""
    shapes = [_shape(op) for op in ops]
    for period in range(1, len(ops)):
        if len(ops) % period == 0 and shapes[period:] == shapes[:-period]:
            parts = [ops[i : i + period] for i in range(0, len(ops), period)]
            if all(any(_is_shown(op, program) for op in part) for part in parts):
                yield period


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


class _State:
    """A program as ops on its state and the calls that feed them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ops = [op for op in program.ops if not isinstance(op, Map)]
        self.made = {v: op for op in program.ops if (v := result(op)) is not None}
        self.position = {v: i for i, op in enumerate(self.ops) if (v := result(op)) is not None}
        self.last = {v: self._last_read(v) for v in program.outputs}

    def _last_read(self, v: Var) -> int:
        """The position of the last read that a value depends on, 0 for none."""
        op = self.made.get(v)
        if op is None or not isinstance(op, Map):
            return self.position.get(v, 0)
        return max((self._last_read(x) for x in operands(op)), default=0)

    def token(self, span: range) -> Program | None:
        """The program of some consecutive ops, and of the outputs that are complete with them."""
        token = _Token(self)
        for i in span:
            if not all(token.need(v) for v in operands(self.ops[i])):
                return None
            token.ops.append(self.ops[i])
            token.known |= {v for v in [result(self.ops[i])] if v is not None}
        outputs = sorted((v for v in self.program.outputs if self.last[v] in span), key=self.last.__getitem__)
        if not all(token.need(v) for v in outputs):
            return None
        return Program(self.program.lanes, tuple(token.inputs), tuple(token.ops), tuple(outputs))


class _Token:
    """The ops of one token, and the calls they need."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.inputs: list[Var] = []
        self.ops: list[Op] = []
        self.known: set[Var] = set()

    def need(self, v: Var) -> bool:
        """Define a value here; False when it depends on a read of another token."""
        if v in self.known:
            return True
        op = self.state.made.get(v)
        if isinstance(op, Read):
            return False
        if op is None:
            self.inputs.append(v)
        elif not all(self.need(x) for x in operands(op)):
            return False
        else:
            self.ops.append(op)
        self.known.add(v)
        return True
