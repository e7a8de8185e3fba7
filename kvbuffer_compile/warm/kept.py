"""Compiled graphs that AOTAutograd's cache can keep, and what becomes of them in another process.

An entry holds what we made of a graph: what was said about it, and of a rewritten one the plans and how its step is
called. Inductor's part is kept by Inductor, and found by its key.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch._inductor.output_code import CompiledFxGraph, OutputCode

from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.process import fleeting
from kvbuffer_compile.runtime.step import Step
from kvbuffer_compile.said import Said
from kvbuffer_compile.steps import targets


class _Thread(threading.local):
    loaded: list[Kept] | None = None


_thread = _Thread()


@contextmanager
def listening() -> Iterator[list[Kept]]:
    """What is taken from the cache meanwhile, in this thread."""
    outer, loaded = _thread.loaded, list[Kept]()
    _thread.loaded = loaded
    try:
        yield loaded
    finally:
        _thread.loaded = outer


class Kept(OutputCode):
    """A compiled graph that went through our pipeline; as it is one that was left alone.

    said: what its user was told. shared: positions of outputs that are inputs or views of such (entry.py).
    """

    compiled: Callable[..., Any]
    states: list[Spliced]
    _boxed_call: bool

    def keep(self, said: Said, shared: Sequence[int]) -> Self:
        """Itself, with what is kept beside the graph."""
        self.said = said
        self.shared = list(shared)
        self.inductors: Any = None
        self.guarded = _has_guards() or fleeting.happened()
        return self

    @staticmethod
    def unchanged(compiled: Callable[..., Any]) -> Kept:
        """A graph without steps."""
        made = Kept()
        made._boxed_call = True
        made.compiled, made.states = compiled, []
        return made

    def __call__(self, inputs: Any) -> Any:
        return self.compiled(inputs)

    def prepare_for_serialization(self) -> None:
        """On a copy, before it is written. An exception, which torch expects, when it cannot be kept."""
        self.inductors = _of_inductor(self.compiled, self.guarded)
        self.compiled = cast(Any, None)

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """After it was read: make it run here. An exception, which torch takes for a miss, when it cannot."""
        from torch._functorch._aot_autograd.autograd_cache import FXGraphCacheMiss

        for plan in (state.plan for state in self.states):
            targets.step_op(plan)
            if targets.build(plan) != plan.target:  # and the graph that is made instead is not kept
                raise FXGraphCacheMiss(f"the kernel of {plan.op_name} cannot be had here")
        inductors, self.inductors = self.inductors, None  # it would hold on to the examples
        self.compiled = inductors.post_compile(inductors.load(example_inputs), graph_kwargs)
        if _thread.loaded is not None:
            _thread.loaded.append(self)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Inductor's own graph has it."""


class KeptStep(Step, Kept):  # type: ignore[misc]  # both are called with the inputs
    """A rewritten graph."""


def _has_guards() -> bool:
    """Whether AOTAutograd has made guards of how inputs share memory: an entry has none of them."""
    context = torch._guards.TracingContext.try_get()
    return context is None or bool(context.guards_context.aotautograd_guards)


def _of_inductor(compiled: Any, guarded: bool) -> Any:
    """How AOTAutograd's own entries name a graph of Inductor's."""
    from torch._functorch._aot_autograd.aot_autograd_result import CompiledForward
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache

    key = getattr(compiled, "_fx_graph_cache_key", None)
    if guarded or not isinstance(compiled, CompiledFxGraph) or key is None:
        raise BypassAOTAutogradCache("there are guards, something failed, or Inductor has not kept its part")
    lines = compiled._fx_graph_cache_debug_lines or []
    return CompiledForward(fx_graph_cache_info=(key, lines), fx_graph_guard_expr=compiled.guards_expr)
