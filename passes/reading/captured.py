"""A captured graph as a whole: its copy, the inputs that may be states, the model line a node comes from."""

from __future__ import annotations

import copy
import os
import re

import torch
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvbuffer_compile.passes.reading.arguments import shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import Write


def copied(gm: GraphModule) -> GraphModule:
    """A copy whose graph may be changed; nodes keep their names and their meta, parameters are shared.

    Its code is generated when it is first called: half the time of lifting went into code that nobody ran.
    """
    with _use_lazy_graph_module(True):
        new = _make_graph_module(gm, copy.deepcopy(gm.graph))
    new.meta.update(gm.meta)
    return new


def written(gm: GraphModule) -> dict[Node, Node]:
    """What the graph writes to, each with (the last of) its writes."""
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {form.target: n for n in found if isinstance(form := read(n), Write)}


def candidates(gm: GraphModule) -> list[Node]:
    """Float inputs of at least two dims that are written, or have the shape of an output: no other filter is needed."""
    nodes = list(gm.graph.nodes)
    stored = written(gm)
    outputs = {shape(n) for n in _outputs(gm) if tensor(n) is not None}
    return [
        n
        for n in nodes
        if n.op == "placeholder"
        and (value := tensor(n)) is not None
        and value.dtype.is_floating_point
        and value.dim() >= 2
        and (n in stored or shape(n) in outputs)
    ]


def guards_of(gm: GraphModule) -> int:
    """How much is known about symbolic sizes: a number that grows with each guard."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for n in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(n, torch.SymInt):
                return len(n.node.shape_env.guards)
    return 0


def _outputs(gm: GraphModule) -> list[Node]:
    returned = gm.graph.output_node().args[0]
    return [n for n in returned if isinstance(n, Node)] if isinstance(returned, list | tuple) else []


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


def source(node: Node) -> str:
    """ "file:line" of the innermost frame of model code that made a node, "" when unknown."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_TORCH)]
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""
