"""Graphs that need gradients are left as they are; which states that costs is found out on their account.

Whether gradients are needed is known when AOTAutograd has looked at the graph. It is then looked at a second time, as
it would be under `torch.no_grad()`, if it writes to an input at all: training itself pays nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from kvbuffer_compile.capture import loops
from kvbuffer_compile.errors import Declined
from kvbuffer_compile.passes.reading.captured import copied, written

Inner = Callable[..., Callable[..., Any]]
Compile = Callable[[GraphModule, Sequence[Any], Inner], Callable[..., Any]]

WHY = Declined(
    "", "gradients", "the call needs gradients, which buffered states do not have: call it under torch.no_grad()"
)

IN_PLACE = "modified by an inplace operation"  # of autograd's error
HINT = (
    "kvbuffer: autograd cannot go back through a state that is read and then written to, whatever the backend. "
    "To decode, call it under torch.no_grad()."
)


def may_be_needed(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the gradient of an output of a captured graph may be asked for."""
    known = [*inputs, *gm.parameters(), *gm.buffers()]
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in known)


def compile_beside(
    gm: GraphModule,
    inputs: Sequence[Any],
    compile: Compile,
    inner: Inner,
    decline: Callable[[GraphModule | None], None],
    donate: bool,
) -> Callable[..., Any]:
    """What `compile(gm, inputs, inner)` gives. If the graph needs gradients, `decline` is told, with the graph that it
    would be without them if that may hold states. donate: also a graph that writes to nothing may."""
    before, needed = copied(gm), []  # compiling changes gm

    def noting(graph: GraphModule, given: list[Any], **kwargs: Any) -> Callable[..., Any]:
        if not kwargs.get("is_inference") and not kwargs.get("is_backward"):
            needed.append(donate or _writes(graph))
        return inner(graph, given, **kwargs)

    def look(graph: GraphModule, given: list[Any], **kwargs: Any) -> Callable[..., Any]:
        decline(graph)
        return make_boxed_func(graph.forward)

    def look_without() -> None:
        context = copy.copy(TracingContext.try_get())  # what is noted there of the graph is to be that of the true one
        with torch.no_grad(), tracing(context):
            compile(loops.unrolled(before) or before, inputs, look)

    try:
        compiled = compile(gm, inputs, noting)
    except TorchDynamoException:  # for the user, or for Dynamo to begin anew
        raise
    except Exception as error:
        look_without()
        if IN_PLACE not in str(error):
            raise
        raise RuntimeError(f"{error}\n\n{HINT}") from error
    if any(needed):
        look_without()
    elif needed:
        decline(None)
    return compiled


def _writes(forward: GraphModule) -> bool:
    """Whether an input is written to, in AOTAutograd's graph itself or by the caller, who gets the new value."""
    outputs = forward.graph.output_node().meta.get("desc", ())
    return bool(written(forward)) or any(isinstance(what, InputMutationAOTOutput) for what in outputs)
