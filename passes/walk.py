"""Looking forwards from one state: every value is a linear image of it (`Lin`), plain, or the state is refused.

A Lin is version * factors. Multiplications stay pending in the factors: in sum(S * g * k) nothing says which factor is
a decay and which a key. An addition makes a new version, so a chain of tokens is a chain of small steps and never
expands. A contraction over an index of the state makes a read, and ends the walk there: reads are plain.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch.fx import Node

from kvbuffer_compile.passes.forms import (
    Cast,
    Choice,
    Contract,
    Expand,
    Form,
    Metadata,
    Opaque,
    Operand,
    Permute,
    Pointwise,
    Product,
    Quotient,
    Reduce,
    Regroup,
    Select,
    Slice,
    Sum,
    Token,
    Variance,
    Write,
    operands,
)
from kvbuffer_compile.passes.graph import read, shape
from kvbuffer_compile.passes.labels import (
    Atom,
    Dim,
    Labels,
    aligned,
    atoms_of,
    broadcast,
    fresh,
    regroup,
    resolve,
    resolved,
)
from kvbuffer_compile.passes.terms import Call, Expr, Leaf, Mask, Refusal, Term, held, mean, times
from kvbuffer_compile.passes.transition import applied
from kvbuffer_compile.passes.vary import is_zero
from kvbuffer_compile.passes.versions import Lin, ReadOut, Version


class Walk:
    """All uses of one state. Raises Refusal at the first that is not algebra.

    reads: by node; write: the copy_ that stores the next state; after: the next state; returned: its position among
    the outputs when it is not stored; active: an addition or a contraction was met; sequence: the call that decodes
    several tokens at once, of which one was walked through.
    """

    def __init__(self, state: Node, order: dict[Node, int]) -> None:
        self.state = state
        self.home = fresh(shape(state))
        self.root = Version(state)
        self.values: dict[Node, Lin] = {state: Lin(self.root, self.home)}
        self.reads: dict[Node, ReadOut] = {}
        self.write: Node | None = None
        self.after: Lin | None = None
        self.returned: int | None = None
        self.active = False
        self.sequence: Node | None = None
        self.order = order

    def run(self) -> Walk:
        """Visit every use, in graph order."""
        pending: list[tuple[int, Node]] = []
        queued: set[Node] = set()

        def push(users: Iterable[Node]) -> None:
            for user in users:
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(pending, (self.order[user], user))

        push(self.state.users)
        while pending:
            _, node = heapq.heappop(pending)
            if node.op == "output":
                self._output(node)
                continue
            lin = self._visit(node)
            if lin is not None:
                self.values[node] = lin
                push(node.users)
        self._finish()
        return self

    def own(self, atoms: Iterable[Atom]) -> bool:
        """Whether any of these is an index of the state."""
        return not atoms_of(self.home).isdisjoint(resolve(atoms))

    # ------------------------------------------------------------------------------------------- rules

    def _visit(self, node: Node) -> Lin | None:
        form = read(node)
        if isinstance(form, Metadata):
            return None
        if isinstance(form, Opaque):
            raise self._nonlinear(node)
        if isinstance(form, Write):
            self._write(node, form)
            return None
        if all(x not in self.values for x in operands(form)):
            return None  # the state only lends its shape
        return self._arithmetic(node, form)

    def _arithmetic(self, node: Node, form: Form) -> Lin | None:
        match form:
            case Product(x, y):
                return self._product(node, x, y)
            case Quotient(x, y):
                return self._quotient(node, x, y)
            case Sum(x, y, scale):
                return self._sum(node, [(x, ()), (y, () if scale == 1 else (scale,))])
            case Choice(condition, x, y):
                return self._choice(node, condition, x, y)
            case Contract():
                return self._contract(node, form)
            case Reduce():
                return self._reduce(node, form)
            case Pointwise() | Variance():
                raise self._nonlinear(node)
            case _:
                return self._view(node, form)

    def _view(self, node: Node, form: Form) -> Lin:
        lin = self.values[operands(form)[0]]
        labels: Labels | None = lin.labels
        match form:
            case Regroup():
                labels = regroup(lin.labels, shape(node))
            case Permute(_, order):
                labels = tuple(lin.labels[i] for i in order)
            case Expand():
                labels = broadcast(lin.labels, shape(node))
            case Select(_, dim, index):
                return self._select(node, lin, dim, index)
            case Slice() | Token():
                raise self._part(node)
            case Cast(_, exact) if not exact:
                raise self._nonlinear(node)
        if labels is None:
            raise Refusal(node, "reshape", "the state is reshaped across its axes in a way that cannot be followed")
        return Lin(lin.version, labels, lin.factors)

    def _select(self, node: Node, lin: Lin, dim: int, index: int) -> Lin:
        """One position of an index along which the state is constant. Of its own indices: a part of the state."""
        atoms, factors = lin.labels[dim], lin.factors
        if self.own(atoms):
            raise self._part(node)
        for atom in reversed(resolve(atoms)):
            if not isinstance(atom.size, int):
                raise self._part(node)
            factors = tuple(held(f, atom, index % atom.size) for f in factors)
            index //= atom.size
        return Lin(lin.version, lin.labels[:dim] + lin.labels[dim + 1 :], factors)

    def _product(self, node: Node, x: Operand, y: Operand) -> Lin:
        if self._is_lin(x) and self._is_lin(y):
            raise self._nonlinear(node)
        return self._scaled(node, *((x, y) if self._is_lin(x) else (y, x)))

    def _quotient(self, node: Node, x: Operand, y: Operand) -> Lin:
        if self._is_lin(y):
            raise self._nonlinear(node)
        if isinstance(y, Node):
            return self._scaled(node, x, y, reciprocal=True)
        return self._scaled(node, x, 1 / y)

    def _scaled(self, node: Node, x: Operand, y: Operand, reciprocal: bool = False) -> Lin:
        assert isinstance(x, Node)
        lin = self.values[x]
        labels = broadcast(lin.labels, shape(node))
        factor = _plain(y, labels)
        factor = Call("aten.reciprocal.default", (factor,)) if reciprocal else factor
        return Lin(lin.version, labels, times(lin.factors, factor))

    def _sum(self, node: Node, parts: list[tuple[Operand, Term]]) -> Lin:
        """A new version, unless only zeros are added to the state."""
        lins = [(self.values[x], rest) for x, rest in parts if isinstance(x, Node) and x in self.values]
        plain = [(x, rest) for x, rest in parts if not self._is_lin(x) and not _zero(x)]
        labels = broadcast(lins[0][0].labels, shape(node))
        wide = not atoms_of(labels) <= atoms_of(self.home)
        if wide or any(resolved(lin.labels) != resolved(labels) for lin, _ in lins):
            raise Refusal(node, "wider-sum", "a value with more indices than the state is added to it")
        if len(lins) == 1 and not plain:
            lin, rest = lins[0]
            return Lin(lin.version, labels, (*lin.factors, *rest))
        self.active = True
        terms = tuple((lin.version, (*lin.factors, *rest)) for lin, rest in lins)
        addends = tuple((_plain(x, labels), *rest) for x, rest in plain)
        return Lin(Version(node, terms, addends), labels)

    def _choice(self, node: Node, condition: Node, x: Operand, y: Operand) -> Lin:
        if self._is_lin(condition):
            raise self._nonlinear(node)
        lin = next(self.values[z] for z in (x, y) if isinstance(z, Node) and z in self.values)
        chosen = _plain(condition, broadcast(lin.labels, shape(node)))
        return self._sum(node, [(x, (Mask(chosen, True),)), (y, (Mask(chosen, False),))])

    def _contract(self, node: Node, form: Contract) -> Lin | None:
        left, right, out = form.letters
        if self._is_lin(form.x) and self._is_lin(form.y):
            raise self._nonlinear(node)
        mine, theirs, other = (left, right, form.y) if self._is_lin(form.x) else (right, left, form.x)
        lin = self.values[form.x if self._is_lin(form.x) else form.y]
        env: dict[str, Dim] = dict(zip(theirs, fresh(shape(other)), strict=True))
        env.update(zip(mine, lin.labels, strict=True))
        factor = Leaf(other, tuple(env[i] for i in theirs))
        labels = tuple(env[i] for i in out)
        free = [env[i] for i in theirs if i not in mine]
        if self.own(env["c"]) and (moved := applied(node, lin, factor, env["c"], free, labels)):
            self.active = True
            self.reads.update({r.node: r for r in moved[1]})
            return moved[0]
        return self._summed(node, lin, (*lin.factors, factor), env["c"], labels)

    def _reduce(self, node: Node, form: Reduce) -> Lin | None:
        lin = self.values[form.x]
        if form.fn not in ("sum", "mean"):
            raise self._nonlinear(node)
        contracted = tuple(a for i in form.dims for a in lin.labels[i])
        kept = [() if i in form.dims else dim for i, dim in enumerate(lin.labels)]
        labels = tuple(d for i, d in enumerate(kept) if form.keep or i not in form.dims)
        factors = lin.factors if form.fn == "sum" else (*lin.factors, mean(node, contracted))
        return self._summed(node, lin, factors, contracted, labels)

    def _summed(self, node: Node, lin: Lin, factors: Term, contracted: Dim, labels: Labels) -> Lin | None:
        contracted = resolve(contracted)
        if not contracted:
            return Lin(lin.version, labels, factors)
        if not frozenset(contracted) <= atoms_of(self.home):
            raise Refusal(node, "wider-read", "a sum runs over an index of the state and one of its operand at once")
        self.active = True
        self.reads[node] = ReadOut(node, lin.version, factors, contracted, labels)
        return None

    # ------------------------------------------------------------------------------------------- ends

    def _write(self, node: Node, form: Write) -> None:
        if form.target is not self.state or self.write is not None or node.users:
            raise Refusal(node, "partial-write", "the state is written elsewhere, in part, or twice")
        if form.x not in self.values:
            raise Refusal(node, "overwritten", "the next state is not a sum with the old one: the state is overwritten")
        self.write, self.after = node, self.values[form.x]

    def _output(self, node: Node) -> None:
        outputs = node.args[0]
        assert isinstance(outputs, list | tuple)
        at = {i: x for i, x in enumerate(outputs) if isinstance(x, Node) and x in self.values}
        if self.write is not None or len(at) > 1 or self.state in at.values():
            value = next(iter(at.values()))
            raise Refusal(value, "escapes", "the state itself is returned from the graph, which needs it in memory")
        ((self.returned, value),) = at.items()
        self.after = self.values[value]

    def _finish(self) -> None:
        if self.after is None:
            raise Refusal(self.state, "not-written", "no next state is stored or returned")
        if resolved(self.after.labels) != resolved(self.home):
            raise Refusal(self.state, "layout", "the next state is stored with its axes in another order")

    # ---------------------------------------------------------------------------------------- reasons

    def _is_lin(self, x: Operand) -> bool:
        return isinstance(x, Node) and x in self.values

    def _nonlinear(self, node: Node) -> Refusal:
        reason = f"{node.target} is applied to the state; it may only be scaled, contracted with a key and added to"
        return Refusal(node, "nonlinear", reason)

    def _part(self, node: Node) -> Refusal:
        return Refusal(node, "partial", "a part of the state is taken; only the whole state may be used")


def _plain(x: Operand, labels: Labels) -> Expr:
    return Leaf(x, aligned(labels, shape(x))) if isinstance(x, Node) else x


def _zero(x: Operand) -> bool:
    return is_zero(x) if isinstance(x, Node) else x == 0
