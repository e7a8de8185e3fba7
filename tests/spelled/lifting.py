"""Capture a function as the backend would see it, lift it, and compare program and graph in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from kvbuffer_compile.ir.memory import Dense, run_block
from kvbuffer_compile.ir.program import Kind, run, verify
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph, Part

TOLERANCE = 1e-10
COPY = torch.ops.aten.copy_.default
CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> list[GraphModule]:
    """The ATen graphs that Inductor's inner compile receives for one call of fn without gradients."""
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return lambda *a: gm.forward(*a)

    def backend(gm: GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, inputs, inner_compile=inner)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return graphs


def capture_plain(fn: Callable[..., Any], *args: Any) -> GraphModule:
    """The same without Inductor: no decompositions, no passes."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    backend = aot_autograd(fw_compiler=inner, inference_compiler=inner, keep_inference_input_mutations=True)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def traced(step: Callable[..., Any], args: tuple[Tensor, ...], table: dict[Any, Any] | None = None) -> GraphModule:
    """A functional graph of a step, without Dynamo and AOTAutograd: each op is traced once instead of five times.

    table: decompositions, Inductor's when None.
    """
    table = select_decomp_table() if table is None else table
    given = [x.new_empty_strided(x.shape, x.stride()) for x in args]  # clone would fill in what is expanded
    with torch.no_grad():
        gm = make_fx(functionalize(step), decomposition_table=table, tracing_mode="fake")(*given)
    end = gm.graph.output_node()
    if not isinstance(end.args[0], list | tuple):
        end.args = ((end.args[0],),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


class Wide(Interpreter):
    """Runs a graph in float64, keeps every value, and writes to nothing."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is COPY:
            return None
        self.values[n] = super().run_node(n)
        return self.values[n]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        dtype = args[1] if len(args) > 1 else kwargs.get("dtype")
        if target in CASTS and dtype.is_floating_point:
            return args[0].double()
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return super().call_function(target, args, kwargs)


def evaluate(gm: GraphModule, seed: int = 0, given: dict[str, Tensor] | None = None) -> dict[Node, Any]:
    """Every value of the graph in float64 on random positive inputs, of hinted sizes where they are symbolic.

    given: inputs that are not drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    known = given or {}
    inputs = [
        known[n.name] if n.name in known else _random(n.meta["val"], generator)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    interpreter = Wide(gm)
    interpreter.run(*inputs)
    return interpreter.values


def _random(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value.node.hint
    shape = [n if isinstance(n, int) else n.node.hint for n in value.shape]
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not value.dtype.is_floating_point:
        return torch.arange(value.numel(), dtype=value.dtype).view(shape)  # distinct slots
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1


def full_shape(lifted: Lifted, lanes: list[int], kind: Kind) -> list[int]:
    return [*lanes, *{"scalar": [], "key": [lifted.sizes[0]], "value": [lifted.sizes[1]]}[kind]]


def distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def next_state(graph: LiftedGraph, lifted: Lifted) -> Node:
    if lifted.write is not None:
        return lifted.write.args[1]
    return graph.gm.graph.output_node().args[0][lifted.returned]


def disagreement(graph: LiftedGraph, lifted: Lifted, values: dict[Node, Any], scale: str = "") -> float:
    """Largest relative difference between the program on its operand nodes' values and the graph's own values.

    scale: name of an operand that is made 1 % too large first: the comparison must notice.
    """
    memory = Dense(lifted.layout.canonical(values[lifted.state]).clone())
    lanes = list(memory.state.shape[:-2])
    at = len(lanes)
    assert tuple(memory.state.shape[-2:]) == lifted.sizes
    count = values[lifted.operands[0]].shape[at] if lifted.several else 1
    inputs: dict[str, Tensor] = {}
    for v, node in zip(lifted.program.inputs, lifted.operands, strict=True):
        inputs[v.name] = values[node] * (1.01 if v.name == scale else 1)
        own = [n if name in v.lanes else 1 for name, n in zip(lifted.program.lanes, lanes, strict=True)]
        own += [count] if lifted.several else []
        assert list(values[node].shape) == full_shape(lifted, own, v.kind), f"{v} of {node}"
        assert node.meta["val"].dtype.is_floating_point
        assert lifted.state not in ancestors(node), f"{node} depends on the state"
    tokens = [{n: x.select(at, t) if lifted.several else x for n, x in inputs.items()} for t in range(count)]
    if lifted.block:
        outs = run_block(verify(lifted.program), memory, list(inputs.values()), at)
        by_token = [dict(zip((v.name for v in lifted.program.outputs), (x.select(at, t) for x in outs), strict=True))
                    for t in range(count)]  # fmt: skip
    runs = by_token if lifted.block else [run(verify(lifted.program), memory, token) for token in tokens]
    worst = 0.0
    for output in lifted.outputs:
        shape = [n if isinstance(n, int) else values[n] for n in output.shape]
        v = lifted.program.outputs[output.index]
        each = [env[v.name].expand(full_shape(lifted, lanes, v.kind)) for env in runs]
        got = each[output.token or 0] if not lifted.several or output.token is not None else torch.stack(each, at)
        got = got if output.plus is None else got + values[output.plus]
        worst = max(worst, distance(got.permute(output.perm).reshape(shape), values[output.node]))
    after = lifted.layout.canonical(values[next_state(graph, lifted)].contiguous())
    return max(worst, distance(memory.state, after))


def unlike(graph: LiftedGraph) -> float:
    """Largest relative difference between what a captured graph and its lifted copy return and store."""
    old = evaluate(graph.original)
    before = {n.name: value for n, value in old.items()}
    copy = graph.gm.graph
    inputs = [n.name for n in copy.find_nodes(op="placeholder")]
    taken: dict[str, Tensor] = {}
    for part in graph.parts:
        taken[part.name] = slice_of(before[inputs[part.index]], part)
    for pool in graph.pools:
        state = taken.get(pool.state.name, before.get(pool.state.name))
        taken[pool.rows.name] = state[before[pool.slots.name]]
    new = evaluate(graph.gm, 0, taken)
    stored = {n.args[0].name: new[n.args[1]] for n in copy.find_nodes(op="call_function", target=COPY)}
    for pool in graph.pools:
        state = taken.get(pool.state.name, before.get(pool.state.name)).clone()
        state[before[pool.slots.name]] = stored[pool.rows.name]
        stored[pool.state.name] = state
    for part in graph.parts:
        name = inputs[part.index]
        whole = stored.setdefault(name, before[name].clone())
        slice_of(whole, part).copy_(stored.get(part.name, taken[part.name]))
    pairs = [
        (stored[n.args[0].name], old[n.args[1]])
        for n in graph.original.graph.find_nodes(op="call_function", target=COPY)
    ]
    returned = zip(copy.output_node().args[0], graph.original.graph.output_node().args[0], strict=True)
    pairs += [(new[x], old[y]) for x, y in returned if isinstance(x, Node) and x in new]
    return max((distance(x, y) for x, y in pairs if isinstance(y, Tensor) and y.is_floating_point()), default=0.0)


def ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [node]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in found:
                found.add(x)
                stack.append(x)
    return found


def slice_of(whole: Tensor, part: Part) -> Tensor:
    for dim, at in part.place:
        whole = whole.select(dim, at)
    return whole


def lifted_and_right(gm: GraphModule) -> LiftedGraph:
    """Lift a graph; every program found must agree with it, its copy too, and the graph must be left as it was."""
    before = str(gm.graph)
    graph = lift(gm)
    assert str(gm.graph) == before
    assert unlike(graph) < TOLERANCE
    values = evaluate(graph.gm)
    for lifted in graph.found:
        assert disagreement(graph, lifted, values) < TOLERANCE, str(lifted.program)
    return graph
