"""How compiled graphs are entered: what each is given in place of a guarded state, and how Dynamo comes to see none.

While Dynamo traces, a guarded state is an ordinary tensor. The guards of a graph that takes states look at them through
their aliases (`plain`), so that fresh and stepped states enter the same graph. A rewritten graph is given the aliases,
and its step finds the accounts by them. A graph of any other backend is given the user's own tensors, settled, and as
ordinary tensors for as long as it runs; nobody steps them meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
from torch._C._dynamo.guards import GuardManager
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.variables import builder as variables

from kvbuffer_compile.accounts.fresh import forget_fresh
from kvbuffer_compile.accounts.ledger import LEDGER, Ledger
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.aliases import forget, is_alias, owner_of, plain, quickly
from kvbuffer_compile.guard.guarded import GuardedState, inspecting, may_be_state, plain_calls
from kvbuffer_compile.guard.sharing import hand_out
from kvbuffer_compile.guard.wrapped import inside, is_wrapper
from kvbuffer_compile.process.locks import under_locks
from kvbuffer_compile.runtime.access import guard_views, touch, touched_below

Compiled = Callable[..., Any]


class _Thread(threading.local):
    rewritten = False  # whether the graph that is being compiled takes states without settling them


_thread = _Thread()


def enter_with_rows(compiled: Compiled, inputs: Sequence[Any], shared: Sequence[int]) -> Compiled:
    """A graph with rewritten steps, given the aliases of guarded states. inputs: examples of its own. shared: positions
    of outputs that may be inputs (`outputs_that_share_memory`)."""
    _thread.rewritten = True
    seen = dispatch_watch.watch(touched_below)
    positions = tuple(i for i, x in enumerate(inputs) if may_be_state(x))
    unseen = () if seen else _wrappers(inputs)
    plain_all = quickly()[1]
    compiled = _inside_of_disable(compiled)

    def enter(*args: Any) -> Any:
        for i in unseen:
            with plain_calls():
                for state in inside(args[i]):
                    hand_out(state, f"operations of {type(args[i]).__name__}, which are not seen without a compiler")
        given = plain_all(*args)
        out = compiled(*given)
        return _with_owners(out, shared, [args[i] for i in positions]) if shared else out

    return enter


def _inside_of_disable(compiled: Compiled) -> Compiled:
    """What `torch.compiler.disable` was put around: Dynamo puts it around `enter` too."""
    is_disable = getattr(compiled, "_torchdynamo_wrapper_id", None) == id(compiled)  # and no copy of its attributes
    return compiled._torchdynamo_orig_callable if is_disable else compiled  # type: ignore[attr-defined]


def outputs_that_share_memory() -> list[int]:
    """Positions of the outputs of the graph compiled last, or now, that are inputs, or views of such."""
    context = torch._guards.TracingContext.try_get()
    outputs = [] if context is None or context.fw_metadata is None else context.fw_metadata.output_info
    return [i for i, output in enumerate(outputs) if output.output_type.name in ("is_input", "alias_of_input")]


def _with_owners(out: Any, shared: Sequence[int], states: list[Tensor]) -> Any:
    """Outputs with the user's tensors in place of their aliases, and views of them guarded."""
    given = list(out)
    with plain_calls():
        for i in shared:
            if is_alias(given[i]):
                given[i] = owner_of(given[i])
            else:
                guard_views(given[i], [s for s in states if type(s) is GuardedState])
    return type(out)(given)


def _wrappers(inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of inputs that have what may be a state inside."""
    return tuple(i for i, x in enumerate(inputs) if is_wrapper(x) and may_be_state(x))


def enter_settled(compiled: Compiled, held: Sequence[Tensor], wrappers: Sequence[int] = ()) -> Compiled:
    """A graph that knows nothing of rows. held: states it has as constants. wrappers: positions of `_wrappers`."""

    @functools.wraps(compiled)
    def enter(*args: Any) -> Any:
        wrapped = itertools.chain.from_iterable(inside(args[i]) for i in wrappers)
        states = [a for a in (*args, *held, *wrapped) if type(a) is GuardedState]
        if not states:
            return compiled(*args)
        with plain_calls():
            return under_locks(LEDGER.reached(states), lambda: _settled(compiled, args, states))

    return enter


def _settled(compiled: Compiled, args: tuple[Any, ...], states: Sequence[Tensor]) -> Any:
    for state in states:
        touch(state)
    try:
        for state in states:
            state.__class__ = Tensor
        with dispatch_watch.unwatched():
            out = compiled(*args)
    finally:
        for state in states:
            state.__class__ = GuardedState
    guard_views(out, states)
    return out


# ------------------------------------------------------------------------------------------------ Dynamo


def install() -> None:
    """Teach Dynamo about guarded states. Once for a process; without such a state nothing is different."""
    if not hasattr(variables.infer_subclass_type, "of_guarded"):
        variables.infer_subclass_type = _as_plain(variables.infer_subclass_type)  # type: ignore[assignment]
        tracing = variables.VariableBuilder
        tracing.wrap_tensor = _without_looking(tracing.wrap_tensor)  # type: ignore[method-assign]
        OutputGraph.call_user_compiler = _entered(OutputGraph.call_user_compiler)  # type: ignore[method-assign]
        GuardBuilder.TENSOR_MATCH = _through_alias(GuardBuilder.TENSOR_MATCH)  # type: ignore[method-assign]
        keep_out(*(f for f in vars(GuardedState).values() if hasattr(getattr(f, "__func__", f), "__code__")))
        keep_out(plain, forget, Ledger.owner_died, forget_fresh)


def _as_plain(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def infer_subclass_type(value: Any) -> Any:
        return None if type(value) is GuardedState else original(value)

    infer_subclass_type.of_guarded = True  # type: ignore[attr-defined]
    return infer_subclass_type


def _without_looking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrap_tensor(self: Any, value: Any) -> Any:
        if type(value) is not GuardedState:
            return original(self, value)
        with inspecting():
            return original(self, value)

    return wrap_tensor


def _entered(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_user_compiler(self: OutputGraph, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        outer, _thread.rewritten = _thread.rewritten, False
        try:
            with inspecting():
                compiled = original(self, gm, example_inputs)
            rewritten = _thread.rewritten
        finally:
            _thread.rewritten = outer
        held = [t for t in (*gm.buffers(), *gm.parameters()) if type(t) is GuardedState]
        takes_states = bool(held) or any(type(x) is GuardedState for x in example_inputs)
        self.takes_states = rewritten or takes_states  # type: ignore[attr-defined]
        wrappers = _wrappers(example_inputs)
        return enter_settled(compiled, held, wrappers) if (takes_states or wrappers) and not rewritten else compiled

    return call_user_compiler


def _through_alias(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def TENSOR_MATCH(self: GuardBuilder, guard: Any, value: Any = None) -> None:
        given = value() if callable(value) else value
        given = self.get(guard) if given is None else given
        graph: Any = self.check_fn_manager.output_graph
        if not getattr(graph, "takes_states", False) or graph.export or not _class_may_change(given):
            return original(self, guard, value)
        manager = _manager_of_alias(self.get_guard_manager(guard), given)
        self.get_guard_manager = lambda guard: manager  # type: ignore[method-assign]
        try:
            with inspecting():
                original(self, guard, plain(given))
        finally:
            del self.get_guard_manager

    return TENSOR_MATCH


def _class_may_change(x: object) -> bool:
    return type(x) in (Tensor, GuardedState) and may_be_state(x)


def _manager_of_alias(manager: GuardManager, example: Tensor) -> GuardManager:
    return manager.lambda_manager(
        python_lambda=quickly()[0],
        source=f"plain({manager.get_source()})",
        example_value=plain(example),
        guard_manager_enum=torch._dynamo.guards.GuardManagerType.GUARD_MANAGER,
    )


def keep_out(*functions: Callable[..., Any]) -> None:
    """Let Dynamo neither compile these functions nor what they call."""
    for function in functions:
        plainly: Any = getattr(function, "__func__", function)
        plainly._torchdynamo_disable = True  # where it would be inlined
        code = plainly.__code__
        torch._C._dynamo.eval_frame.set_code_exec_strategy(
            code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        )
