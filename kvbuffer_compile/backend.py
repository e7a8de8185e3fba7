"""The torch.compile backend: captured graph -> lift -> choose -> validate -> splice -> Inductor."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.fx import GraphModule, Node

from kvbuffer_compile import options
from kvbuffer_compile.capture import gradients, loops
from kvbuffer_compile.errors import Declined, DeclinedError, IRError, OptionError
from kvbuffer_compile.integrations.functions import substitution
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.working_set import call_of
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.lifted import LiftedGraph, Part
from kvbuffer_compile.passes.rewrite import Spliced, splice
from kvbuffer_compile.passes.storage import pools
from kvbuffer_compile.passes.tokens import composites
from kvbuffer_compile.passes.tokens.sequences import spelled_out
from kvbuffer_compile.planning import plan_for
from kvbuffer_compile.process import callers, fleeting, progress
from kvbuffer_compile.records import GraphRecord, observers
from kvbuffer_compile.report import dump
from kvbuffer_compile.runtime import entry
from kvbuffer_compile.runtime.step import Step
from kvbuffer_compile.said import Said
from kvbuffer_compile.steps import targets
from kvbuffer_compile.warm import kept
from kvbuffer_compile.warm import key as keys


def kvbuffer(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Backend for torch.compile(backend="kvbuffer"). options: fields of Options, and options of Inductor.

    ValueError for an unknown option, or a value that is not allowed. What is decided is logged, at INFO, under the name
    "kvbuffer_compile", and what happens at run time at DEBUG: TORCH_LOGS="kvbuffer_compile" or "+kvbuffer_compile" (the
    backend's own name is none that torch accepts there). On a terminal a line tells how a long compilation gets on,
    unless KVBUFFER_QUIET=1.
    """
    substitution.watch()
    entry.install()
    operations = sum(node.op.startswith("call") for node in gm.graph.nodes)
    with progress.compiling(f"a graph of {operations} operations"):
        return _backend(gm, example_inputs, mode, options)


def _backend(
    gm: GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    ours, inductor = _split_options(options)
    if mode and mode.startswith("max-autotune"):
        ours = replace(ours, tune=True)
    patches = {**_mode_options(mode), **inductor}
    sources = _sources(gm)
    inner = functools.partial(compile_graph, ours=ours, sources=sources)
    if gradients.may_be_needed(gm, example_inputs):

        def compile(gm: GraphModule, inputs: Sequence[Any], inner: Callable[..., Any]) -> Callable[..., Any]:
            return _compile(gm, inputs, inner, patches)[0]

        decline = functools.partial(_decline_for_gradients, ours=ours, sources=sources)
        return gradients.compile_beside(gm, example_inputs, compile, inner, decline, ours.donate)
    written_out = loops.unrolled(gm)
    if written_out is not None:
        key = keys.key_for(written_out, example_inputs, ours, patches)
        compiled, rewritten = _compile(written_out, example_inputs, inner, patches, key)
        if rewritten:
            return compiled
    return _compile(gm, example_inputs, inner, patches, keys.key_for(gm, example_inputs, ours, patches))[0]


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    inner: Callable[..., Any],
    patches: dict[str, Any],
    key: keys.Key | None = None,
) -> tuple[Callable[..., Any], bool]:
    """The compiled graph, and whether it was rewritten. key: what it is kept under for other processes, and taken from
    where one has kept it; None when AOTAutogradCache must not have it, which knows nothing of our inner compile: a hit
    would hand back a graph that was never rewritten, or one that was."""
    from torch._inductor.compile_fx import compile_fx

    progress.stage("tracing")
    records: list[GraphRecord] = []
    settings = patches if key is None else {**patches, keys.PASS: key}
    with fleeting.watched(), keys.kept_by(key), kept.listening() as loaded, observers.also(records.append):
        compiled: Any = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=cast(Any, inner),
            config_patches=settings or None,
        )
    if not records and loaded:
        loaded[-1].said.say()
        rewritten, shared = bool(loaded[-1].states), loaded[-1].shared
    else:
        rewritten, shared = any(record.rewritten for record in records), entry.outputs_that_share_memory()
    if not rewritten:
        return cast(Callable[..., Any], compiled), False
    return entry.enter_with_rows(compiled, example_inputs, shared), True


kvbuffer.rewrites_recurrences = True  # type: ignore[attr-defined]
substitution.watch()
entry.install()


def _mode_options(mode: str | None) -> dict[str, Any]:
    if not mode or mode == "default":
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known:
        raise OptionError(f"mode={mode!r} is not allowed: it must be one of {', '.join(known)}")
    return dict(known[mode])


def _split_options(given: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    return options.split(given)


def _sources(gm: GraphModule) -> list[str]:
    """How the user's code reaches each input of a captured graph, "" where unknown."""
    sources = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", "")
            text = str(name() if callable(name) else name)
            sources.append(re.sub(r"L\['(\w+)'\]|\._(?:buffers|modules)\['(\w+)'\]", _plain_name, text).lstrip("."))
    return sources


def _plain_name(match: re.Match[str]) -> str:
    return match[1] or f".{match[2]}"


def _names(gm: GraphModule, sources: Sequence[str], parts: Sequence[Part], pools: Mapping[str, Node]) -> dict[str, str]:
    """The user's name of each placeholder of the graph that AOTAutograd made of a captured one, and of those that stand
    for slices or for rows of pools while it is lifted."""
    names = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in inputs:
        index, inside = _input(node.meta.get("desc"))
        if isinstance(index, int) and index < len(sources) and sources[index]:
            names[node.name] = sources[index] + inside
    for part in parts:
        whole = inputs[part.index].name
        names[part.name] = part.named(names.get(whole, whole))
    return names | {rows: names.get(pool.name, pool.name) for rows, pool in pools.items()}


def _input(desc: Any) -> tuple[Any, str]:
    """Which captured input AOTAutograd says a placeholder is, and what inside of it: a DTensor is taken apart."""
    if hasattr(desc, "base") and hasattr(desc, "attr"):
        index, path = _input(desc.base)
        return index, f"{path}.{desc.attr}"
    return getattr(desc, "idx", None), ""


def compile_graph(
    gm: GraphModule, example_inputs: list[Any], *, ours: Options, sources: Sequence[str] = (), **kwargs: Any
) -> Callable[..., Any]:
    """Inductor's inner compile with our rewrite in front of it. sources: the user's names of the captured inputs."""
    key = keys.active()
    compile_inner = _inner_compiler(ours, key)
    progress.stage("looking for states")
    if not kwargs.get("is_inference"):
        return cast(Callable[..., Any], compile_inner(spelled_out(gm), example_inputs, **kwargs))
    try:
        record, rewritten, spliced, given = rewrite_graph(gm, ours)
    except OptionError:
        raise
    except Exception as error:
        _failed(error, ours)
        record, rewritten, spliced = GraphRecord(why_not=Declined("", "internal-error", str(error))), gm, []
        given = LiftedGraph(gm, gm)
    parts = given.parts
    record = replace(record, names=_names(gm, sources, (*parts, *given.named), record.pools))
    observers.tell(record)
    said = Said.of(record, ours)
    said.say()
    if not spliced:
        plain = cast(Callable[..., Any], compile_inner(spelled_out(gm), example_inputs, **kwargs))
        if key is None:
            return plain
        return kept.Kept.unchanged(plain).keep(said, entry.outputs_that_share_memory())
    from torch._inductor import config

    inputs = [n.meta["val"] for n in rewritten.graph.nodes if n.op == "placeholder"]
    static = list(kwargs.get("static_input_idxs", ()))
    static += [len(example_inputs) + i for i, part in enumerate(parts) if part.index in static]
    kwargs["static_input_idxs"] = [*static, *range(len(example_inputs) + len(parts), len(inputs))]
    with config.patch(size_asserts=False):  # 0.5 us for each cursor and row, at every step
        compiled = compile_inner(rewritten, [*example_inputs, *inputs[len(example_inputs) :]], **kwargs)
    arguments = (compiled, spliced, gm if ours.check else None, len(example_inputs), parts, given.donated)
    if key is None:
        return Step(*arguments)
    return kept.KeptStep(*arguments).keep(said, entry.outputs_that_share_memory())


def _failed(error: Exception, ours: Options) -> None:
    """An internal error leaves a graph to Inductor, unless the user wants to know."""
    fleeting.mark()
    if os.environ.get("KVBUFFER_STRICT") == "1":  # as an IRError: Dynamo takes some exceptions for a graph break
        raise IRError(f"internal error while rewriting a graph: {error!r}") from error
    if ours.on_decline == "raise":
        raise DeclinedError(f"kvbuffer failed on a graph, please report this model: {error!r}") from error
    callers.warn(f"kvbuffer left a graph to Inductor after an internal error: {error!r}")


def _decline_for_gradients(gm: GraphModule | None, ours: Options, sources: Sequence[str]) -> None:
    """A graph needs gradients. gm: as it would be without, if it may hold states. Only those that it would buffer are
    declined: nothing else in it is anything to us."""
    record = GraphRecord(why_not=gradients.WHY)
    try:
        lifted = None if gm is None else lift(gm, ours.donate)
    except Exception as error:
        _failed(error, ours)
        lifted = None
    if gm is not None and lifted is not None:
        found = [one for one in lifted.found if one.write is not None or ours.donate]
        states = tuple((one, replace(gradients.WHY, node=one.state.name, source=one.source)) for one in found)
        whose = {pool.rows.name: pool.state for pool in lifted.pools}
        record = replace(record, states=states, names=_names(gm, sources, lifted.parts, whose), pools=whose)
    observers.tell(record)
    Said.of(record, ours).say()


def rewrite_graph(gm: GraphModule, ours: Options) -> tuple[GraphRecord, GraphModule, list[Spliced], LiftedGraph]:
    """The pipeline: what was decided, the rewritten copy of the graph, and what its step needs at run time."""
    lifted = lift(gm, ours.donate)
    call = call_of(lifted.gm, len(lifted.found))
    outcomes = [(found, *plan_for(lifted, found, ours, call)) for found in lifted.found]
    states = tuple((found, decision) for found, decision, _ in outcomes)
    predictions = {found.state.name: seen for found, _, seen in outcomes if seen is not None}
    whose = {pool.rows.name: pool.state for pool in lifted.pools}
    record = GraphRecord(states, tuple(lifted.refused), pools=whose, call=call, predictions=predictions)
    composites.put_back(lifted, [one for one, _ in record.rewritten])
    spliced = splice(lifted.gm, pools.put_back(lifted.pools, record.rewritten), targets.step_op)
    folder = ours.dump or os.environ.get("KVBUFFER_DUMP")
    if folder:
        dump.write(folder, gm, lifted.gm, record.rewritten)
    return record, lifted.gm, spliced, lifted


def _inner_compiler(ours: Options, key: keys.Key | None) -> Callable[..., Any]:
    if ours.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx_inner

        return _staged(compile_fx_inner, key)
    if ours.inner == "eager":
        return lambda gm, inputs, **kwargs: _boxed(_without_fakes(gm).forward)
    given = ours.inner
    return lambda gm, inputs, **kwargs: _boxed(given(gm, inputs))  # type: ignore[operator]


def _staged(compile_inner: Callable[..., Any], key: keys.Key | None) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        progress.stage("Inductor")
        with keys.left_to_inductor(key):
            return compile_inner(*args, **kwargs)

    return inner


def _without_fakes(gm: GraphModule) -> GraphModule:
    """Forget the fake tensors of a graph that will only be run: views among them outlive their bases at exit."""
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    return gm


def _boxed(fn: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(fn, "_boxed_call", False):
        return fn
    return cast(Callable[..., Any], make_boxed_func(fn))


__all__ = ["GraphRecord", "IRError", "kvbuffer", "observers"]
