"""Prove a lifted program on numbers: the original nodes and the program, side by side in float64.

The slice of the graph that makes the reads and the next state from the state is cut where computation becomes opaque
(matrix products with weights, convolutions, embeddings, inputs); random values are put there. Two checks:

    values   every output of the program and the next state equal the original's
    order    no operand depends on the state, and the program runs on a really mutable memory, so that a read of an old
             state placed behind an update is seen
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir import run
from kvbuffer_compile.memory import Dense, run_tokens
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.reduced import Sizes, small_batches
from kvbuffer_compile.plan import Layout

aten = torch.ops.aten
TOLERANCE = 1e-9  # of float64 arithmetic on a few hundred terms; a wrong factor is off by 1e-2 and more
DRAWS = 2
LARGE, TOO_LARGE = 8e6, 2e9  # bytes of a state in float64; evaluating holds about four times as much at once

# Where the slice is cut: what these compute is an operand, whatever it was made from.
_OPAQUE = frozenset(
    {
        aten.mm, aten.addmm, aten.convolution, aten.embedding, aten.index, aten.index_select, aten.gather,
        aten.topk, aten.sort, aten.scatter, aten.index_put, aten._grouped_mm,
        aten._scaled_dot_product_flash_attention_for_cpu, aten._softmax,
    }
)  # fmt: skip
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, aten._to_copy.default})


def validate(graph: LiftedGraph, lifted: Lifted) -> Declined | None:
    """None when the program does what the graph does; a Declined with the difference otherwise."""
    below = _below(lifted.state)
    shape_of_it = _fingerprint(lifted, below)
    if shape_of_it in _proved:
        return None
    with unset_fake_temporarily(), torch.no_grad():  # the compiler runs us under its fake tensors
        try:
            problem = _entangled(lifted, below) or _problem(lifted, below)
        except RuntimeError as error:  # of torch: the program's operands do not even fit together
            problem = str(error)
    if problem is None:
        _proved.add(shape_of_it)
        return None
    reason = f"the lifted program disagrees with the graph ({problem}); please report this model"
    return Declined(lifted.state.name, "validation", reason, lifted.source)


def _problem(lifted: Lifted, below: set[Node]) -> str | None:
    """What differs between program and graph; large states are tried with a batch of two first."""
    size = 8 * int(Sizes().of(lifted.state.meta["val"].numel()))
    given = (n.meta.get("val") for n in lifted.state.graph.find_nodes(op="placeholder"))
    for smaller in small_batches(lifted.state.meta["val"], lifted.layout, given) if size > LARGE else ():
        try:
            if _differs(lifted, below, smaller) is None:
                return None
        except (RuntimeError, ValueError):
            pass  # a size that only looked like the batch
    if size > TOO_LARGE:
        return f"its {size / 1e6:.0f} MB in float64 are too much to check"
    return _differs(lifted, below, Sizes())


def _differs(lifted: Lifted, below: set[Node], sizes: Sizes) -> str | None:
    for seed in range(DRAWS):
        pair = (_Evaluator(draw, seed, below, sizes) for draw in (torch.randn, torch.rand))
        if (problem := _compare(lifted, *pair)) is not None:
            return problem
    return None


_proved: set[str] = set()  # what was validated in this process: the layers of a model are alike


def _fingerprint(lifted: Lifted, below: set[Node]) -> str:
    """The program with the part of the graph it stands for, up to names: equal text, equal computation."""
    ends = [*lifted.operands, *(o.node for o in lifted.outputs), _next_state(lifted)]
    number: dict[Node, int] = {}
    lines = [str(lifted.program), str(lifted.layout), str(lifted.sizes), str(lifted.several)]
    for n in _slice([lifted.state, *ends], {}, below):
        number[n] = len(number)
        value = n.meta.get("val")
        what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(Sizes().of(value))
        call = "cut" if _is_cut(n, below) else f"{n.target} {_numbered(n.args, number)} {_numbered(n.kwargs, number)}"
        lines.append(f"{call} {what}")
    entangled = _entangled(lifted, below)
    lines.append(
        f"{[number[n] for n in ends]} {[(o.perm, len(o.shape), o.index, o.token) for o in lifted.outputs]} {entangled}"
    )
    return "\n".join(lines)


def _numbered(args: Any, number: dict[Node, int]) -> str:
    return str(torch.fx.node.map_arg(args, lambda n: f"%{number[n]}"))


def _below(state: Node) -> set[Node]:
    """Every node whose values depend on the state's."""
    below = {state}
    for node in state.graph.nodes:
        if _is_tensor(node) and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return below


def _entangled(lifted: Lifted, below: set[Node]) -> str | None:
    """An operand that depends on the state's values would be needed before the step that makes it."""
    for operand in lifted.operands:
        if operand in below:
            return f"operand {operand} depends on the state"
    return None


def _compare(lifted: Lifted, original: _Evaluator, positive: _Evaluator) -> str | None:
    """One draw. positive: a second draw of numbers in (0, 1), taken where the first leaves the domain of a function."""
    next_state = _next_state(lifted)
    # evaluate the operands first: what both sides share is computed once
    operands = [original.value(n) for n in lifted.operands]
    wanted = [original.value(o.node) for o in lifted.outputs]
    after = original.value(next_state)
    if not all(bool(x.isfinite().all()) for x in (*wanted, after)):
        return "it computes no finite numbers" if original is positive else _compare(lifted, positive, positive)

    state = original.value(lifted.state)
    layout = original.layout(lifted.layout)
    memory = Dense(layout.canonical(state))
    outputs = _run(lifted, memory, operands)
    for output, want in zip(lifted.outputs, wanted, strict=True):
        value = outputs[output.index]
        got = value if output.token is None else value.select(lifted.layout.lanes, output.token)
        got = got.permute(output.perm).reshape(want.shape)
        if (error := _distance(got, want)) > TOLERANCE:
            return f"read {output.node} differs by {error:.1e}"
    error = _distance(memory.state, layout.canonical(after.contiguous()))
    return f"the next state differs by {error:.1e}" if error > TOLERANCE else None


def _run(lifted: Lifted, memory: Dense, operands: list[Tensor]) -> list[Tensor]:
    """The program's outputs on a dense memory, token after token; [*lanes, T(, K or V)] for several."""
    program, axis = lifted.program, lifted.layout.lanes
    if not lifted.several:
        env = run(program, memory, {v.name: x for v, x in zip(program.inputs, operands, strict=True)})
        return [_full(env[v.name], memory.state, v.kind) for v in program.outputs]
    return run_tokens(program, memory, operands, axis)


def _next_state(lifted: Lifted) -> Node:
    """The node that holds the state after the step."""
    if lifted.write is not None:
        return cast(Node, lifted.write.args[1])
    returned: Any = lifted.state.graph.output_node().args[0]
    return cast(Node, returned[lifted.returned])


def _full(value: Tensor, state: Tensor, kind: str) -> Tensor:
    tail = {"scalar": (), "key": state.shape[-2:-1], "value": state.shape[-1:]}[kind]
    return value.expand(*state.shape[:-2], *tail)


def _distance(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; infinite when one side is not finite where the other is."""
    if not want.numel():
        return 0.0
    scale = want.abs().max().clamp_min(1e-30)
    distance = ((got - want).abs().max() / scale).item()
    return float("inf") if distance != distance else distance


class _Evaluator:
    """Evaluates nodes in float64 on random values for everything opaque. One value a node, made once.

    below: what depends on the state, and is evaluated whatever it is.
    """

    def __init__(self, draw: Callable[..., Tensor], seed: int, below: set[Node], sizes: Sizes) -> None:
        self.draw, self.below, self.sizes = draw, below, sizes
        self.generator = torch.Generator().manual_seed(seed)
        self.values: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        for n in _slice([node], self.values, self.below):
            self.values[n] = self._random(n) if _is_cut(n, self.below) else self._call(n)
        return self.values[node]

    def _call(self, node: Node) -> Any:
        args: Any = torch.fx.node.map_arg(node.args, lambda n: self.values[n])
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, lambda n: self.values[n])
        if node.target in _CASTS and _is_float(node):
            return args[0].double()
        if "dtype" in kwargs and _is_float(node):
            kwargs = {**kwargs, "dtype": torch.float64}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        # a cast that copies in the graph does not copy here, and leaves other strides: views may have to copy
        target: Any = aten.reshape.default if node.target in _VIEWS else node.target
        out = target(*self._sized(args), **self._sized(kwargs))
        return out.double() if isinstance(out, Tensor) and out.dtype.is_floating_point else out

    def layout(self, given: Layout) -> Layout:
        """The layout of a state whose batch was replaced."""
        return replace(given, dims=tuple(tuple(self.sizes.of(n) for n in part) for part in given.dims))

    def _sized(self, x: Any) -> Any:
        """Arguments with concrete sizes; numbers outside of lists are none."""
        if isinstance(x, list | tuple):
            return [self.sizes.of(y) if isinstance(y, int | torch.SymInt) else self._sized(y) for y in x]
        if isinstance(x, dict):
            return {n: self._sized(y) for n, y in x.items()}
        return x if isinstance(x, int) else self.sizes.of(x)

    def _random(self, node: Node) -> Any:
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return self.sizes.of(val)
        shape = self._sized(val.shape)
        if val.dtype.is_floating_point:
            return self.draw(shape, generator=self.generator, dtype=torch.float64)
        if val.dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.5
        return torch.randint(0, 2, shape, generator=self.generator, dtype=val.dtype)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_float(node: Node) -> bool:
    return _is_tensor(node) and bool(node.meta["val"].dtype.is_floating_point)


def _is_cut(node: Node, below: set[Node]) -> bool:
    """What depends on the state is evaluated whatever it is: a read may be a plain matrix product."""
    opaque = getattr(node.target, "overloadpacket", None) in _OPAQUE and node not in below
    return node.op != "call_function" or opaque


def _slice(ends: Iterable[Node], known: dict[Node, Any], below: set[Node]) -> list[Node]:
    """The nodes to evaluate for `ends`, operands before users, without those that are known."""
    order: list[Node] = []
    seen = set(known)
    stack: list[tuple[Node, bool]] = [(n, False) for n in ends]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not _is_cut(node, below):
                stack.extend((n, False) for n in node.all_input_nodes)
    return order
