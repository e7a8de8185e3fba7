"""Looking forwards from one state: every value is a linear image of it (`Lin`), plain, or the state is refused.

A Lin is version * factors. Multiplications stay pending in the factors: in sum(S * g * k) nothing says which factor is
a decay and which a key. An addition makes a new version, so a chain of tokens is a chain of small steps and never
expands. A contraction over an index of the state makes a read, and ends the walk there: reads are plain.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from torch.fx import Node

from kvbuffer_compile.passes.algebra.refusals import in_part, mentioned, nonlinear, rounded
from kvbuffer_compile.passes.algebra.terms import Call, Expr, Leaf, Mask, Refusal, Term, mean, times
from kvbuffer_compile.passes.algebra.transition import applied
from kvbuffer_compile.passes.algebra.versions import Lin, ReadOut, Version
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import (
    Blocks,
    Cast,
    Choice,
    Contract,
    Cumulative,
    Expand,
    Form,
    Join,
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
from kvbuffer_compile.passes.reading.labels import (
    Atom,
    Dim,
    Labels,
    TokenAtom,
    aligned,
    atoms_of,
    broadcast,
    fresh,
    regroup,
    resolve,
    resolved,
)
from kvbuffer_compile.passes.reading.variation import is_zero
from kvbuffer_compile.passes.walk import words
from kvbuffer_compile.passes.walk.images import Pieces, rearranged, together

Case = Mapping[Operand, Lin]


class Walk:
    """All uses of one state. Raises Refusal at the first that is not algebra.

    values: what depends on the state, as one image of it, or as several with an index held at different positions
    (images.py). reads: by node; apart: reads of several pieces in one node; write: the copy_ that stores the next
    state; after: the next state; returned: its position among the outputs if it is not stored; active: something was
    added or contracted; sequence: the call of several tokens of which one was walked; block: their index (blocks.py).
    """

    def __init__(self, state: Node, order: dict[Node, int]) -> None:
        self.state = state
        self.home = fresh(shape(state))
        self.root = Version(state)
        self.values: dict[Node, Pieces] = {state: (Lin(self.root, self.home),)}
        self.reads: dict[Node, ReadOut] = {}
        self.apart: dict[Node, list[ReadOut]] = {}
        self.write: Node | None = None
        self.after: Lin | None = None
        self.returned: int | None = None
        self.active = False
        self.sequence: Node | None = None
        self.block: TokenAtom | None = None
        self.order = order

    def run(self) -> Walk:
        """Visit every use, in graph order."""
        pending, queued = list[tuple[int, Node]](), set[Node]()

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
            pieces = self._visit(node)
            if any(not lin.version.plain for lin in pieces):
                self.values[node] = pieces
                push(node.users)
        self._finish()
        return self

    def own(self, atoms: Iterable[Atom]) -> bool:
        """Whether any of these is an index of the state."""
        return not self.own_atoms.isdisjoint(resolve(atoms))

    @property
    def own_atoms(self) -> frozenset[Atom]:
        """The indices of the state."""
        return atoms_of(self.home)

    # ------------------------------------------------------------------------------------------- rules

    def _visit(self, node: Node) -> Pieces:
        form = read(node)
        if isinstance(form, Metadata):
            return ()
        if isinstance(form, Opaque):
            raise nonlinear(node)
        if isinstance(form, Write):
            self._write(node, form)
            return ()
        known = [x for x in operands(form) if x in self.values]
        if not known:
            return ()  # the state only lends its shape
        if isinstance(form, Slice | Blocks | Join | Select):
            return rearranged(node, form, {x: self.values[x] for x in known}, self.own_atoms)
        if isinstance(form, Sum | Choice):
            whose = list(dict.fromkeys(known))
            meeting = together(node, [self.values[x] for x in whose], self.own_atoms)
            cases: list[Case] = [dict(zip(whose, lins, strict=True)) for lins in meeting]
        else:
            cases = [dict.fromkeys(known, lin) for lin in self.values[known[0]]]
        found = [self._arithmetic(node, form, case) for case in cases]
        return tuple(lin for lin in found if lin is not None)

    def _arithmetic(self, node: Node, form: Form, lins: Case) -> Lin | None:
        """lins: the image of each operand that depends on the state."""
        match form:
            case Product(x, y):
                return self._product(node, x, y, lins)
            case Quotient(x, y):
                return self._quotient(node, x, y, lins)
            case Sum(x, y, scale):
                return self._sum(node, [(x, ()), (y, () if scale == 1 else (scale,))], lins)
            case Choice(condition, x, y):
                return self._choice(node, condition, (x, y), lins)
            case Contract():
                return self._contract(node, form, lins)
            case Reduce(x):
                return self._reduce(node, form, lins[x])
            case Pointwise() | Variance() | Cumulative():
                raise nonlinear(node)
            case _:
                return self._view(node, form, next(iter(lins.values())))

    def _view(self, node: Node, form: Form, lin: Lin) -> Lin:
        labels: Labels | None = lin.labels
        match form:
            case Regroup():
                labels = regroup(lin.labels, shape(node))
            case Permute(_, order):
                labels = tuple(lin.labels[i] for i in order)
            case Expand():
                labels = broadcast(lin.labels, shape(node))
            case Token():
                raise in_part(node)
            case Cast(_, exact) if not exact:
                raise rounded(node)
        if labels is None:
            raise Refusal(node, "reshape", words.RESHAPED)
        if len(labels) == len(shape(node)):
            return Lin(lin.version, labels, lin.factors)
        raise Refusal(node, "vector", words.VECTOR)  # a token's sum over one column, which contracts nothing

    def _product(self, node: Node, x: Operand, y: Operand, lins: Case) -> Lin:
        if x in lins and y in lins:
            raise nonlinear(node, met=True)
        return self._scaled(node, *((x, y) if x in lins else (y, x)), lins)

    def _quotient(self, node: Node, x: Operand, y: Operand, lins: Case) -> Lin:
        if y in lins:
            raise nonlinear(node)
        factor, reciprocal = (y, True) if isinstance(y, Node) else (1 / y, False)
        return self._scaled(node, x, factor, lins, reciprocal)

    def _scaled(self, node: Node, x: Operand, y: Operand, lins: Case, reciprocal: bool = False) -> Lin:
        lin = lins[x]
        labels = broadcast(lin.labels, shape(node))
        factor = _plain(y, labels)
        factor = Call("aten.reciprocal.default", (factor,)) if reciprocal else factor
        return Lin(lin.version, labels, times(lin.factors, factor))

    def _sum(self, node: Node, parts: list[tuple[Operand, Term]], lins: Case) -> Lin:
        """A new version, unless only zeros are added to the state."""
        labels = next(iter(lins.values())).labels
        given = [(lins[x], rest) for x, rest in parts if x in lins]
        carried = [(lin, rest) for lin, rest in given if not lin.version.plain]
        plain = [(x, rest) for x, rest in parts if x not in lins and not is_zero(x)]
        addends = [(_plain(x, labels), *rest) for x, rest in plain]
        addends += [(*a, *lin.factors, *rest) for lin, rest in given if lin.version.plain for a in lin.version.addends]
        if len(carried) == 1 and not addends:
            lin, rest = carried[0]
            return Lin(lin.version, labels, (*lin.factors, *rest))
        self.active = True
        terms = tuple((lin.version, (*lin.factors, *rest)) for lin, rest in carried)
        return Lin(Version(node, terms, tuple(addends), plain=not terms), labels)

    def _choice(self, node: Node, condition: Node, sides: tuple[Operand, Operand], lins: Case) -> Lin:
        if condition in lins:
            raise nonlinear(node, met=True)
        labels = next(iter(lins.values())).labels
        chosen = _plain(condition, labels)
        return self._sum(node, [(x, (Mask(chosen, keep),)) for x, keep in zip(sides, (True, False), strict=True)], lins)

    def _contract(self, node: Node, form: Contract, lins: Case) -> Lin | None:
        left, right, out = form.letters
        if form.x in lins and form.y in lins:
            raise nonlinear(node, met=True)
        mine, theirs, other = (left, right, form.y) if form.x in lins else (right, left, form.x)
        lin = lins[form.x if form.x in lins else form.y]
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

    def _reduce(self, node: Node, form: Reduce, lin: Lin) -> Lin | None:
        if form.fn not in ("sum", "mean"):
            raise nonlinear(node)
        contracted = tuple(a for i in form.dims for a in lin.labels[i])
        kept = [() if i in form.dims else dim for i, dim in enumerate(lin.labels)]
        labels = tuple(d for i, d in enumerate(kept) if form.keep or i not in form.dims)
        factors = lin.factors if form.fn == "sum" else (*lin.factors, mean(node, contracted))
        return self._summed(node, lin, factors, contracted, labels)

    def _summed(self, node: Node, lin: Lin, factors: Term, contracted: Dim, labels: Labels) -> Lin | None:
        contracted = resolve(contracted)
        if not contracted:
            return Lin(lin.version, labels, factors)
        if not frozenset(contracted) <= self.own_atoms:
            raise Refusal(node, "wider-read", words.WIDER)
        if lin.version.plain:
            raise Refusal(node, "wider-read", "values of the state are read together with values that are none")
        self.active = True
        found = ReadOut(node, lin.version, factors, contracted, labels)
        if any(a.at is not None for dim in labels for a in resolve(dim)):
            self.apart.setdefault(node, []).append(found)
        else:
            self.reads[node] = found
        return None

    def _write(self, node: Node, form: Write) -> None:
        if form.target is not self.state:
            raise Refusal(node, "coupled", words.COUPLED.format(mentioned(form.target)))
        if self.write is not None or node.users:
            raise Refusal(node, "written-twice", words.TWICE)
        if form.x not in self.values:
            raise Refusal(node, "overwritten", "the next state is not a sum with the old one: the state is overwritten")
        self.write, self.after = node, self._whole(form.x)

    def _output(self, node: Node) -> None:
        outputs = node.args[0]
        assert isinstance(outputs, list | tuple)
        at = {i: x for i, x in enumerate(outputs) if isinstance(x, Node) and x in self.values}
        if self.write is not None or len(at) > 1 or self.state in at.values():
            raise Refusal(next(iter(at.values())), "escapes", words.RETURNED)
        ((self.returned, value),) = at.items()
        self.after = self._whole(value)

    def _whole(self, node: Node) -> Lin:
        if len(self.values[node]) > 1:
            raise Refusal(node, "escapes", words.ALL_RETURNED)
        return self.values[node][0]

    def _finish(self) -> None:
        if self.after is None:
            raise Refusal(self.state, "not-written", "no next state is stored or returned")
        if resolved(self.after.labels) != resolved(self.home):
            raise Refusal(self.state, "layout", words.TRANSPOSED)


def _plain(x: Operand, labels: Labels) -> Expr:
    return Leaf(x, aligned(labels, shape(x))) if isinstance(x, Node) else x
