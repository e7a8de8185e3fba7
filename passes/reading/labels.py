"""Which index each dim of a value runs over.

An `Atom` is one indivisible index: a dim of the state, or a part of one. `Labels` name, for each dim of a value, the
atoms it runs over, outermost first; a dim of size 1 runs over none. A reshape deals the atoms out anew and splits an
atom where a size falls inside it; atoms are never merged, merged dims are dims with several atoms. Splitting
replaces the atom by its parts everywhere: labels are `resolved` when they are used.

Labels are positions in one use of a node, not a property of it: the same tensor may be key here and value there.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

Size: TypeAlias = int | sympy.Expr  # symbolic sizes are compared as expressions: `==` on a SymInt would add a guard


class Atom:
    """One index. `at`: its position where it is fixed (one slice, one term of a contraction). Compared by identity."""

    __slots__ = ("at", "parts", "size")

    def __init__(self, size: Size, at: int | None = None) -> None:
        self.size = size
        self.at = at
        self.parts: tuple[Atom, ...] | None = None

    def __repr__(self) -> str:
        return f"<{self.size}>" if self.at is None else f"<{self.size}@{self.at}>"


class TokenAtom(Atom):
    """The index that counts the tokens of a sequence, or of a block, held at whichever is studied."""

    def __init__(self, size: Size) -> None:
        super().__init__(size, 0)


Dim = tuple[Atom, ...]
Labels = tuple[Dim, ...]


@functools.cache
def _pin(size: Size, at: int) -> Atom:
    return Atom(size, at)


def pinned(size: Size, at: int) -> Dim:
    """A dim of this size held at a position. Equal ones are the same atom."""
    return () if size == 1 else (_pin(size, at),)


def position(dim: Dim) -> int | None:
    """Where a dim is held, None when it is not."""
    at = 0
    for atom in resolve(dim):
        if atom.at is None or not isinstance(atom.size, int) or isinstance(atom, TokenAtom):
            return None
        at = at * atom.size + atom.at
    return at


def size_of(size: Any) -> Size:
    """The size of a dim as an int, or as an expression where it is symbolic."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.has(FloorDiv):
        expression = _without_quotients(expression, size.node.shape_env)
    return int(expression) if expression.is_Integer else expression


def _without_quotients(expression: Any, environment: Any) -> Any:
    """The expression with quotients that are a number or a symbol by the guards so far, as heads in a size that holds a
    batch are."""
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val  # the older name
    for part in sorted(expression.atoms(FloorDiv), key=str):
        value = part.xreplace(values)
        alike = [s for s, n in values.items() if n == value and s not in environment.replacements]
        for simple in (value, *alike):
            if environment._maybe_evaluate_static(sympy.Eq(part, simple)) == sympy.true:
                expression = expression.xreplace({part: simple})
                break
    return expression


def specialised(size: Size, near: Iterable[Any]) -> int:
    """A size as a number: a guard where it is symbolic. near: sizes of the same graph, one of them symbolic."""
    if isinstance(size, int):
        return size
    environment = next(n.node.shape_env for n in near if not isinstance(n, int))
    return int(environment.evaluate_expr(size))


def hint(size: Size, near: Iterable[Any]) -> int:
    """What a size was when the graph was captured."""
    if isinstance(size, int):
        return size
    environment = next(n.node.shape_env for n in near if not isinstance(n, int))
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return int(size.xreplace(values))


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where it is a whole number for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    result = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    whole = sympy.fraction(result)[1] == 1
    return (int(result) if result.is_Integer else result) if whole else None


def fresh(sizes: Iterable[Size]) -> Labels:
    """New atoms for dims of these sizes."""
    return tuple(() if size == 1 else (Atom(size),) for size in sizes)


def resolve(atoms: Iterable[Atom]) -> Dim:
    """The atoms with every split one replaced by its parts."""
    out: list[Atom] = []
    for atom in atoms:
        out += [atom] if atom.parts is None else resolve(atom.parts)
    return tuple(out)


def resolved(labels: Labels) -> Labels:
    """`resolve` for each dim."""
    return tuple(resolve(dim) for dim in labels)


def atoms_of(labels: Labels) -> frozenset[Atom]:
    """All atoms the dims run over, without the fixed ones."""
    return frozenset(a for dim in labels for a in resolve(dim) if a.at is None)


def regroup(labels: Labels, sizes: Sequence[Size]) -> Labels | None:
    """The labels after a reshape to `sizes`; None when the sizes cut an atom unevenly."""
    rest = deque(a for dim in labels for a in resolve(dim))
    out: list[Dim] = []
    for i, size in enumerate(sizes):
        before = tuple(rest)
        dim = _deal(rest, size)
        if dim is None:
            end = _unequal(before, sizes[i:])
            return None if end is None else (*out, *end)
        out.append(dim)
    return None if rest else tuple(out)


def _unequal(rest: Dim, sizes: Sequence[Size]) -> Labels | None:
    """Labels where one atom becomes several dims, though its symbolic size is not seen to be their product."""
    after = 0
    while after < min(len(rest), len(sizes)) - 1 and rest[-1 - after].size == sizes[-1 - after]:
        after += 1
    inner = [n for n in sizes[: len(sizes) - after] if n != 1]
    if after != len(rest) - 1 or len(inner) < 2 or isinstance(rest[0].size, int) or rest[0].at is not None:
        return None
    rest[0].parts = tuple(Atom(n) for n in inner)
    parts = iter(resolve(rest))
    return tuple(() if n == 1 else (next(parts),) for n in sizes)


def _deal(rest: deque[Atom], size: Size) -> Dim | None:
    """Take atoms that together have this size off the front, splitting the last one where need be."""
    dim: list[Atom] = []
    while size != 1:
        if not rest:
            return None
        atom = rest.popleft()
        left = quotient(size, atom.size)
        if left is None:
            inner = quotient(atom.size, size)
            parts = None if inner is None else _split(atom, size, inner)
            if parts is None:
                return None
            atom, left = parts[0], 1
            rest.appendleft(parts[1])
        dim.append(atom)
        size = left
    return tuple(dim)


def _split(atom: Atom, outer: Size, inner: Size) -> tuple[Atom, Atom] | None:
    """An atom in two: a free one everywhere, a held one here. None when its position cannot be split."""
    if atom.at is None:
        atom.parts = (Atom(outer), Atom(inner))
        return atom.parts
    if isinstance(atom, TokenAtom) or not isinstance(inner, int):
        return None
    return _pin(outer, atom.at // inner), _pin(inner, atom.at % inner)


def fixed(labels: Labels, atom: Atom, at: int) -> Labels:
    """The labels with one index held at a position."""
    where: dict[Atom, Atom] = {}
    for part in reversed(resolve([atom])):
        assert isinstance(part.size, int)
        where[part] = _pin(part.size, at % part.size)
        at //= part.size
    return tuple(tuple(where.get(a, a) for a in resolve(dim)) for dim in labels)


def renamed(labels: Labels, atom: Atom, other: Atom) -> Labels:
    """The labels with another atom in the place of one that was not split."""
    return tuple(tuple(other if a is atom else a for a in resolve(dim)) for dim in labels)


def aligned(labels: Labels, sizes: Sequence[Size]) -> Labels:
    """The labels of an operand of these sizes that is broadcast to a value with `labels`."""
    tail = labels[len(labels) - len(sizes) :]
    return tuple(() if size == 1 else dim for dim, size in zip(tail, sizes, strict=True))


def broadcast(labels: Labels, sizes: Sequence[Size]) -> Labels:
    """The labels of a value after broadcasting to `sizes`: new atoms where it was of size 1 or had no dim."""
    grown = ((),) * (len(sizes) - len(labels)) + labels
    return tuple(dim or new for dim, new in zip(grown, fresh(sizes), strict=True))
