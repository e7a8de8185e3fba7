"""Values that depend on a read of the state (the error of a delta rule) as calls the program itself can make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch.fx import Node

from kvbuffer_compile.passes.algebra.factor import Axes
from kvbuffer_compile.passes.algebra.refusals import called
from kvbuffer_compile.passes.algebra.terms import Call, Expr, Fetch, Leaf, Refusal, add, mul, where
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import (
    Cast,
    Choice,
    Contract,
    Operand,
    Pointwise,
    Product,
    Quotient,
    Reduce,
    Sum,
    Variance,
)
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, aligned, fresh, resolve, resolved
from kvbuffer_compile.passes.reading.variation import Values, unreduced
from kvbuffer_compile.passes.walk.order import SUM, DecayEvent, Event, ReadEvent, UpdateEvent

REDUCED = {
    "sum": SUM, "mean": "aten.mean.dim", "amax": "aten.amax.default", "amin": "aten.amin.default",
}  # fmt: skip


class Opening:
    """Replaces every leaf that depends on a read of the state by calls on reads and on leaves that do not.

    tainted: whether a node depends on a read of this state. Refusal("opaque-map") for what is not a call of the IR.
    """

    def __init__(
        self, values: Values, axes: Axes, reads: Mapping[Node, ReadOut], tainted: Callable[[Node], bool]
    ) -> None:
        self.values = values
        self.axes = axes
        self.reads = reads
        self.tainted = tainted
        self._free: set[Atom] = set()  # indices of reductions, not known yet to be an axis

    def event(self, event: Event) -> Event:
        """An event with all its values opened."""
        match event:
            case ReadEvent(node, value, stage):
                return ReadEvent(node, self.expr(value), stage)
            case UpdateEvent(left, right, node):
                return UpdateEvent(self.expr(left), self.expr(right), node)
            case DecayEvent(factor):
                return replace(event, factor=self.expr(factor))

    def expr(self, expr: Expr) -> Expr:
        """An expression with its leaves opened."""
        match expr:
            case Leaf(node, labels):
                return self.node(node, labels)
            case Call(fn, args):
                return Call(fn, tuple(self.expr(a) for a in args))
            case Fetch(x, key, stage):
                return Fetch(self.expr(x), key, stage)
            case _:
                return expr

    def node(self, node: Node, labels: Labels) -> Expr:
        """A node in labelled use."""
        node, labels = self.values.peel(node, labels)
        if node in self.reads:
            self._meet(node, labels)
            return Leaf(node, labels)
        if not self.tainted(node):
            self.values.vary(node, labels)  # now, because it may split indices
            return Leaf(node, labels)
        return self._opened(node, labels)

    def _opened(self, node: Node, labels: Labels) -> Expr:
        form = read(node)
        match form:
            case Product(x, y):
                return mul(self._operand(x, labels), self._operand(y, labels))
            case Quotient(x, y):
                return Call("aten.div.Tensor", (self._operand(x, labels), self._operand(y, labels)))
            case Sum(x, y, scale):
                return self._sum(self._operand(x, labels), self._operand(y, labels), scale)
            case Choice(condition, x, y):
                return where(*(self._operand(a, labels) for a in (condition, x, y)))
            case Pointwise(fn, args):
                return Call(fn, tuple(self._operand(a, labels) for a in args))
            case Cast(x, True):
                return self.node(x, labels)
            case Reduce(x, dims, keep, fn) if fn in REDUCED:
                inner = unreduced(shape(x), dims, keep, labels)
                index = tuple(a for i in dims for a in inner[i])
                return self._reduced(node, REDUCED[fn], [(x, inner)], index)
            case Variance():
                return self._variance(node, form, labels)
            case Contract(x, y, (left, right, out)):
                index = fresh([shape(x)[left.index("c")]])[0]
                env = dict(zip(out, labels, strict=True), c=index)
                uses = [(x, tuple(env[i] for i in left)), (y, tuple(env[i] for i in right))]
                return self._reduced(node, SUM, uses, index)
        raise self._opaque(node)

    def _variance(self, node: Node, form: Variance, labels: Labels) -> Expr:
        """mean((x - mean(x))^2), corrected."""
        sizes = [shape(form.x)[i] for i in form.dims]
        count = math.prod(n if isinstance(n, int) else 0 for n in sizes)  # 0: known only at run time
        if count <= form.correction and form.correction != 0:
            raise self._opaque(node)
        scale = count / (count - form.correction) if form.correction else 1
        inner = unreduced(shape(form.x), form.dims, form.keep, labels)
        index = tuple(a for i in form.dims for a in inner[i])
        mean = self._reduced(node, REDUCED["mean"], [(form.x, inner)], index)
        apart = self._sum(self.node(form.x, inner), mean, -1)
        return mul(Call(REDUCED["mean"], (mul(apart, apart),)), scale)

    def _operand(self, x: Operand, labels: Labels) -> Expr:
        return self.node(x, aligned(labels, shape(x))) if isinstance(x, Node) else x

    def _sum(self, x: Expr, y: Expr, scale: float) -> Expr:
        return Call("aten.sub.Tensor", (x, y)) if scale == -1 else add(x, mul(y, scale))

    def _reduced(self, node: Node, fn: str, uses: list[tuple[Node, Labels]], index: Dim) -> Expr:
        """A reduction of a product over an index, which must turn out to be one whole axis."""
        self._free |= set(index)
        value = mul(*(self.node(*use) for use in uses))
        if not index:
            return value
        if resolve(index) not in (resolve(self.axes.key), resolve(self.axes.value)):
            raise self._opaque(node)
        return Call(fn, (value,))

    def _meet(self, node: Node, labels: Labels) -> None:
        """A read is used: its own indices are what the free ones stand for."""
        natural = self.reads[node].labels
        if len(labels) == len(natural):  # else heads were taken apart on the way, or put together
            for used, own in zip(resolved(labels), resolved(natural), strict=True):
                if len(used) == 1 and used[0] in self._free and used != own:
                    used[0].parts = own
                    self._free.discard(used[0])
        if resolved(labels) != resolved(natural):
            reason = (
                "what was read of the state is used along its other axis, as a key of the next read (as in power "
                "iterations and conjugate gradients), or mixes heads: each read may change the next update element by "
                "element, head by head; keys must be made without it, else there is nothing to be done"
            )
            raise Refusal(node, "opaque-map", reason)

    def _opaque(self, node: Node) -> Refusal:
        reason = (
            f"{called(node)} takes a read of the state into its next update, and is not elementwise over the heads and "
            "one axis (or a sum, mean, maximum or minimum over that axis): write it with such operations, or apply it "
            "to the output"
        )
        return Refusal(node, "opaque-map", reason)
