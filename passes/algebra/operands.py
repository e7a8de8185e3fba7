"""Operand nodes: values from outside of the program, brought to state coordinates by nodes inserted in the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from kvbuffer_compile.ir.memory import overload
from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.passes.algebra.coordinates import Coordinates
from kvbuffer_compile.passes.algebra.factor import Axes
from kvbuffer_compile.passes.algebra.terms import Call, Expr, Leaf, Number, Ones, Refusal, leaves
from kvbuffer_compile.passes.reading.arguments import shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import Constant
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, Size, TokenAtom, resolved
from kvbuffer_compile.passes.reading.variation import Values

aten = torch.ops.aten


class Inserter:
    """Inserts calls into a graph, each behind the last of its operands and at most once, with their fake values."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._order = {node: (i, 0) for i, node in enumerate(graph.nodes)}
        self._made: dict[Any, Node] = {}
        self._inputs: list[Node] = [n for n in graph.nodes if n.op == "placeholder"]
        self._mode = _fake_mode(self._inputs)
        self.meta: dict[str, Any] = {}  # of every node inserted from now on

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """The node target(*args, **kwargs)."""
        key = (target, repr(args), repr(kwargs))  # nodes have unique names
        if key not in self._made:
            self._made[key] = self._insert(target, args, kwargs)
        return self._made[key]

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        inputs: list[Node] = []
        map_arg((args, kwargs), inputs.append)
        last = max(inputs or self._inputs, key=lambda n: self._order[n])
        if last.op == "placeholder":
            last = self._inputs[-1]
        at = (self._order[last][0], len(self._order))
        with self.graph.inserting_after(self._tail(last, at)):
            node = self.graph.call_function(target, args, kwargs)
        self._order[node] = at
        with self._mode:
            node.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        for name in ("stack_trace", "nn_module_stack"):
            if name in last.meta:
                node.meta[name] = last.meta[name]
        node.meta.update(self.meta)
        return node

    def _tail(self, last: Node, at: tuple[int, int]) -> Node:
        """The last of the nodes inserted behind an original one, so that they stay in the order they were made."""
        while last.next in self._order and self._order[last.next][0] == at[0]:
            last = last.next
        return last

    def size(self, size: Size) -> int | Node:
        """A size as an int or as a node that computes it."""
        size = self._specialised(size)
        if isinstance(size, int):
            return size
        for node in self._inputs:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and bool(value.node.expr == size):
                return node
        for node in self._inputs:
            for dim, found in enumerate(shape(node)):
                if found == size:
                    return self.call(aten.sym_size.int, node, dim)
        factors = sympy.Mul.make_args(size)
        if len(factors) < 2:
            reason = f"no input has the size {size}, which is known at run time only: compile with dynamic=False"
            raise Refusal(self._inputs[0], "dynamic-size", reason)
        return self._times([int(f) if f.is_Integer else f for f in factors])

    def _specialised(self, size: Size) -> Size:
        """The size after guards on its symbols."""
        environment = getattr(self._mode, "shape_env", None)
        if isinstance(size, int) or environment is None:
            return size
        known = environment.replace(size)
        return int(known) if known.is_Integer else known

    def _times(self, factors: list[Size]) -> int | Node:
        import operator

        out: int | Node = 1
        for f in factors:
            size = self.size(f)
            if isinstance(out, int) and isinstance(size, int):
                out = out * size
            else:
                out = size if out == 1 else self.call(operator.mul, out, size)
        return out

    def product(self, atoms: Iterable[Atom]) -> int | Node:
        """The size of several atoms together."""
        sizes = [a.size for a in atoms]
        whole = math.prod(sizes)
        return self.size(whole) if isinstance(whole, int) else self.size(sympy.expand(whole))


def _value(node: Node) -> Any:
    return node.meta["val"]


def _fake_mode(inputs: list[Node]) -> Any:
    from contextlib import nullcontext

    mode = torch._guards.detect_fake_mode([n.meta.get("val") for n in inputs])
    return mode if mode is not None else nullcontext()


class Operands:
    """Expressions without reads as nodes in state coordinates. compute: the dtype of arithmetic done for them.

    token: the index of tokens, which has a dim of its own behind the lanes; None for no such dim.
    """

    def __init__(
        self, inserter: Inserter, place: Coordinates, values: Values, state: Node, token: TokenAtom | None
    ) -> None:
        self.token = token
        self.inserter = inserter
        self.place = place
        self.values = values
        self.axes = Axes(place.key, place.value)
        value = tensor(state)
        assert value is not None
        self.device = value.device
        self.compute = torch.float64 if value.dtype == torch.float64 else torch.float32

    def kind(self, expr: Expr) -> Kind:
        """The kind of a value. Refusal when it runs along both axes."""
        if isinstance(expr, Ones):
            return "key" if expr.key else "value"
        kinds = self.axes.of(self.atoms(expr))
        kinds |= {"key" if o.key else "value" for o in _ones(expr)}
        if len(kinds) > 1:
            reason = "a value that depends on what was read runs along rows and columns of the state at once"
            raise Refusal(leaves(expr)[0].node, "opaque-map", reason)
        return "key" if "key" in kinds else "value" if "value" in kinds else "scalar"

    def atoms(self, expr: Expr) -> frozenset[Atom]:
        """The atoms along which a value varies."""
        return frozenset(a for leaf in leaves(expr) for a in self.values.vary(leaf.node, leaf.labels))

    def node(self, expr: Expr, kind: Kind) -> Node:
        """The node of a value, [*lanes(, K or V)] with size 1 along lanes where it does not vary."""
        match expr:
            case Leaf(node, labels):
                return self._leaf(node, labels, kind)
            case Call(fn, args):
                return self._call(fn, args, kind)
            case Ones(key):
                return self._filled(1.0, [self.place.sizes[0 if key else 1]])
            case int() | float():
                return self._filled(float(expr), [])
        raise AssertionError(expr)

    def floating(self, node: Node) -> Node:
        """The node, as numbers of the compute dtype if it holds truth values or integers."""
        return node if node.meta["val"].dtype.is_floating_point else self.converted(node)

    def converted(self, node: Node) -> Node:
        """The node as numbers of the compute dtype."""
        if node.meta["val"].dtype == self.compute:
            return node
        return self.inserter.call(torch.ops.prims.convert_element_type.default, node, self.compute)

    def _filled(self, number: Number, tail: list[int]) -> Node:
        tokens = [] if self.token is None else [self.inserter.size(self.token.size)]
        sizes = [1] * len(self.place.lanes) + tokens + tail
        return self.inserter.call(aten.full.default, sizes, number, dtype=self.compute, device=self.device)

    def _call(self, fn: str, args: tuple[Expr, ...], kind: Kind) -> Node:
        given: list[Any] = []
        for a in args:
            number = isinstance(a, int | float)
            if number and not fn.startswith("aten.where"):
                given.append(a)
                continue
            own: Kind = "scalar" if number else self.kind(a)
            node = self.node(a, own)
            if node.meta["val"].dtype != torch.bool:
                node = self.converted(node)
            given.append(self.inserter.call(aten.unsqueeze.default, node, -1) if own != kind else node)
        return self.inserter.call(overload("aten.where.self" if fn.startswith("aten.where") else fn), *given)

    def _leaf(self, node: Node, labels: Labels, kind: Kind) -> Node:
        """Split merged dims, hold what is constant, bring the rest in order, and give it the canonical shape."""
        if tensor(node) is None:
            return self._filled_with(node)
        form = read(node)
        value = form.value if isinstance(form, Constant) and kind == "scalar" else None
        if value is not None and _is_exact(value, node):
            return self._filled(value, [])  # not by its node: full_like of the state would need the state
        node, labels = self._of_all_tokens(node, resolved(labels))
        flat = [a for dim in labels for a in dim]
        varying = self.values.vary(node, labels)
        free = [a for a in flat if a.at is None or a is self.token]
        if len(set(free)) < len(free):
            raise Refusal(
                node, "diagonal", "an operand is a matrix over one axis of the state: take its diagonal first"
            )
        if any(len(dim) > 1 for dim in labels):
            node = self.inserter.call(aten.reshape.default, node, [self.inserter.size(a.size) for a in flat])
            labels = tuple((a,) for a in flat)
        axis = self.place.axis(kind)
        kept = varying.union(axis)
        kept |= self._counting
        for i in reversed(range(len(labels))):
            if not labels[i] or labels[i][0] not in kept:
                at = (labels[i][0].at or 0) if labels[i] else 0
                node = self.inserter.call(aten.select.int, node, i, at)
        have = [dim[0] for dim in labels if dim and dim[0] in kept]
        for atom in (*axis, *self._counting):
            if atom not in have:
                node = self._repeated(node, atom)
                have.append(atom)
        return self._placed(node, have, axis)

    @property
    def _counting(self) -> frozenset[Atom]:
        return frozenset() if self.token is None else frozenset({self.token})

    def _of_all_tokens(self, node: Node, labels: Labels) -> tuple[Node, Labels]:
        """The value of every token behind that of one."""
        if self.token is None:
            return node, labels
        node, labels = self.values.peel(node, labels)
        if "sequence" in node.meta:
            raise Refusal(node, "one-token", "an operand is computed for one token only")
        token = self.token  # alone or beside others in a dim, as in the rows of a linear layer's [B * T, H * V]
        return node, tuple(tuple(token if isinstance(a, TokenAtom) else a for a in dim) for dim in resolved(labels))

    def _repeated(self, node: Node, atom: Atom) -> Node:
        """The node with a last dim along which it is constant."""
        sizes = [-1] * len(shape(node))
        node = self.inserter.call(aten.unsqueeze.default, node, -1)
        return self.inserter.call(aten.expand.default, node, [*sizes, self.inserter.size(atom.size)])

    def _filled_with(self, node: Node) -> Node:
        scalar = self.inserter.call(aten.scalar_tensor.default, node, dtype=self.compute, device=self.device)
        one = self.inserter.call(aten.reshape.default, scalar, [1] * len(self.place.lanes))
        return one if self.token is None else self._repeated(one, self.token)

    def _placed(self, node: Node, have: list[Atom], axis: Dim) -> Node:
        """A node whose dims are single atoms, in canonical order, with dims of size 1 for the lanes it lacks."""
        groups = [tuple(a for a in lane if a in have) for lane in self.place.lanes]
        groups += [(atom,) for atom in self._counting]
        wanted = [a for g in groups for a in g] + list(axis)
        if set(wanted) != set(have):
            raise Refusal(node, "wider-operand", "an operand of an update has more indices than the state")
        if wanted != have:
            node = self.inserter.call(aten.permute.default, node, [have.index(a) for a in wanted])
        if any(len(g) > 1 for g in (*groups, axis)):
            tail = [self.inserter.product(axis)] if axis else []
            return self.inserter.call(aten.reshape.default, node, [self.inserter.product(g) for g in groups] + tail)
        for i, group in enumerate(groups):
            if not group:
                node = self.inserter.call(aten.unsqueeze.default, node, i)
        return node


def _ones(expr: Expr) -> list[Ones]:
    if isinstance(expr, Call):
        return [o for a in expr.args for o in _ones(a)]
    return [expr] if isinstance(expr, Ones) else []


def _is_exact(value: float, node: Node) -> bool:
    """Whether a node's dtype holds this number as it is: else the graph computes with the rounded one."""
    return torch.tensor(value, dtype=node.meta["val"].dtype).item() in (value, _single(value))


def _single(value: float) -> float:
    """Float32 is what everything is computed in at least."""
    return float(torch.tensor(value, dtype=torch.float32).item())
