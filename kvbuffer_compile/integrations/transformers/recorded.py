"""How a transformers model runs while its cache records: every token of a call must be one that can be taken back.

A prompt that the buffers have room for runs like any later call, on states that are zero and are neither read nor
written. Of a longer one the last tokens, at most MOST_TOKENS, run in a graph of our backend, where states owe rows for
them; what comes before them runs as the model is.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.functions.adapters import MOST_TOKENS
from kvbuffer_compile.integrations.transformers.fresh_cache import BlankLayer, begin, blank_layers
from kvbuffer_compile.integrations.transformers.rollback_cache import layers_of
from kvbuffer_compile.integrations.transformers.split_forward import (
    first_token,
    followed_by,
    joined,
    keep_logits,
    last_tokens,
    mark_sizes,
    split,
    token_batch,
    token_count,
    twice,
)
from kvbuffer_compile.options import split as split_options
from kvbuffer_compile.process.afresh import afresh
from kvbuffer_compile.records import GraphRecord, observers
from kvbuffer_compile.runtime import by_hand

FLUSH = 16  # when it was left to the cost model, which does not know of drafts
BACKEND = "kvbuffer"

Call = Callable[..., Any]


@dataclass(frozen=True)
class Steps:
    """The model compiled with room for drafts.

    call: of the model and its inputs; it does not keep the model. capacity: of its buffers. compiled: what
    model.compile() had made of the model, None if it was not called.
    """

    call: Call
    capacity: int
    compiled: weakref.ref[Call] | None

    def made_of(self, compiled: Call | None) -> bool:
        return compiled is (self.compiled and self.compiled())


class RecordedForward:
    """Calls of one model, which it does not keep, on caches that record.

    candidates: how many of the tokens of the next call are drafts. steps: the compiled call. declines: why states in
    its graphs are not buffered. blanks: the states that the model makes. placed: where and in which dtypes the model
    was for all of these. opening: a cache that has seen one token, and the call.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.candidates = 0
        self.steps: Steps | None = None
        self.declines: dict[str, None] = {}
        self.blanks: list[BlankLayer] | None = None
        self.placed: list[Any] = []
        self.opening: tuple[weakref.ref[Cache], dict[str, Any]] | None = None

    @property
    def model(self) -> Any:
        return self._model()

    def __call__(self, cache: Cache, compiled: Call | None, inputs: dict[str, Any]) -> Any:
        """model(**inputs) on `cache`; compiled: what model.compile() made of the model, None if it was not called."""
        layers = layers_of(cache)
        if not layers:
            return (compiled or self.model._call_impl)(**inputs)
        self.steps = self._prepared(compiled, layers[0].empty)
        count, keep = token_count(inputs), inputs.get("logits_to_keep", 0)
        known = count - min(self.candidates, count - 1)
        opening, self.opening = self.opening, None
        if layers[0].empty and known <= self.steps.capacity:
            return keep_logits(self._begin(cache, inputs, known), keep)
        if layers[0].tokens == 1 and opening is not None and opening[0]() is cache:
            cache.crop(-1)
            whole = followed_by(opening[1], inputs)
            return keep_logits(last_tokens(self._begin(cache, whole, token_count(whole)), count), keep)
        tail = min(count, MOST_TOKENS, count if not layers[0].empty else max(self.candidates + 1, 2))
        if tail == count:
            return keep_logits(self._verify(cache, inputs), keep)
        first, last = split(inputs, tail)
        before = self._prompt(cache, first)
        cache.crop(0)
        return keep_logits(joined(before, self._verify(cache, last)), keep)

    def _prepared(self, compiled: Call | None, starts: bool) -> Steps:
        """What the model is compiled to. starts: a cache, after which the model stays as it is."""
        placed = [(p.dtype, p.device) for p in self.model.parameters()] if starts or self.steps is None else self.placed
        if self.steps is not None and self.steps.made_of(compiled) and placed == self.placed:
            return self.steps
        self.declines.clear()
        self.blanks, self.placed = None, placed
        return _with_room(self.model, compiled)

    def _begin(self, cache: Cache, inputs: dict[str, Any], known: int) -> Any:
        """The first call on a cache, of which the first `known` tokens fit in the buffers."""
        assert self.steps is not None
        count = token_count(inputs)
        if count == 1:
            return self._begin_with_one(cache, inputs)
        self._make_states(cache, inputs, started=True)
        if count <= self.steps.capacity:
            return self._verify(cache, inputs)
        first, last = split(inputs, count - known)
        before = self._verify(cache, first)
        cache.crop(0)
        return joined(before, self._verify(cache, last))

    def _begin_with_one(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        """One token, with a second one that is taken back: attention over no past, or of one token, is a graph of its
        own, for this call alone and for the next one. That begins again, for the same reason."""
        self._make_states(cache, inputs, started=True)
        out = first_token(self._verify(cache, twice(inputs)))
        cache.crop(-1)
        if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            self.opening = weakref.ref(cache), {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
        return out

    def _make_states(self, cache: Cache, inputs: dict[str, Any], started: bool) -> None:
        """Let a cache that has seen nothing have states that are zero."""
        if self.blanks is None:
            name = next(name for name, value in inputs.items() if value is cache)
            config = self.model.config.get_text_config(decoder=True)
            blanks = blank_layers(self.model._call_impl, config, inputs, name)
            if not any(blank.convolutions or blank.recurrent for blank in blanks):
                raise StateError(
                    f"speculation: {self._name} keeps its states outside the cache layers of transformers, where no "
                    "token is taken back"
                )
            self.blanks = blanks
        begin(cache, self.blanks, token_batch(inputs), started)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _prompt(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        """The model as it is, on tokens that are known to stay."""
        if layers_of(cache)[0].empty:
            self._make_states(cache, inputs, started=False)
        out = self.model._call_impl(**inputs)
        for layer in layers_of(cache):
            layer.tokens += token_count(inputs)
        return out

    def _verify(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        """A compiled step. StateError when its tokens could not be taken back."""
        assert self.steps is not None
        given = mark_sizes(inputs, cache)
        if "logits_to_keep" in given:
            given["logits_to_keep"] = 0  # another number would be another graph
        layers = layers_of(cache)
        for layer in layers:
            layer.before()
        with observers.also(self._note):
            out = self.steps.call(self.model, given)
        for layer in layers:
            layer.after(token_count(inputs))
        self._check(cache)
        return out

    def _note(self, record: GraphRecord) -> None:
        """Remember reasons, not records: those hold graphs."""
        whole = [] if record.why_not is None else [record.why_not]
        anew = [one.why for one in record.refused if one.kept and one.why.rule == "overwritten"]
        self.declines |= dict.fromkeys(why.reason for why in record.declined + whole + anew)

    def _check(self, cache: Cache) -> None:
        states = [state for layer in layers_of(cache) for state in layer.states]
        lost = [s for s in states if not any(a.dirty for a in by_hand.accounts_of(s))]
        if lost:
            raise StateError(
                f"speculation: {len(lost)} of {len(states)} states of {self._name} do not run buffered, so that no "
                f"token can be taken back from them: {'; '.join(self.declines) or _otherwise(lost)}"
            )


def _otherwise(states: list[Tensor]) -> str:
    """Why states that no graph declined owe no rows after a step."""
    if any(a.aliased or a.shared is not None for a in by_hand.accounts_of(states)):
        return "their memory is visible through other tensors"
    limit = torch._dynamo.config.recompile_limit
    return f"the model ran without a graph; torch.compile makes {limit} (torch._dynamo.config.recompile_limit)"


# --------------------------------------------------------------------------------------------------- compiling

_numbers = itertools.count()
# What a graph break leaves of the model is compiled by parts, and their code is that of other models as well.
APART: dict[str, Any] = {
    name: True for name in inspect.signature(torch.compile).parameters if name == "isolate_recompiles"
}


def _step(model: Any, inputs: dict[str, Any]) -> Any:
    return model._call_impl(**inputs)


def _apart(model: Any) -> Call:
    """`_step` for one model alone: graphs for others do not count against its own."""
    return afresh(_step, f"step_{next(_numbers)}_of_{type(model).__name__}")


def _with_room(model: Any, compiled: Call | None) -> Steps:
    """The model compiled so that one-token and several-token graphs share rows, with slots for drafts."""
    if compiled is None:
        options = _room({"inner": "eager"})
        call = torch.compile(_apart(model), backend=BACKEND, options=options, **APART)
        return Steps(call, options["capacity"], None)
    known = inspect.getclosurevars(compiled).nonlocals
    context, backend = known["self"], cast(Any, innermost_backend(known["callback"]))
    if not getattr(getattr(backend, "compiler_fn", None), "rewrites_recurrences", False):
        raise StateError("speculation: the model is compiled for another backend; its states are not buffered")
    options = _room(dict(backend.kwargs.get("options", {})))
    patches = torch._inductor.list_mode_options(backend.kwargs["mode"]) if "mode" in backend.kwargs else {}
    call = torch.compile(
        _apart(model),
        backend=backend.compiler_fn,
        fullgraph=context.fullgraph,
        dynamic=backend.dynamic,
        options={**patches, **options},
        **APART,
    )
    return Steps(call, options["capacity"], weakref.ref(compiled))


def _room(options: dict[str, Any]) -> dict[str, Any]:
    """The options with an integer flush and room for drafts."""
    ours, _ = split_options(options)
    flush = ours.flush if isinstance(ours.flush, int) and ours.flush > 1 else FLUSH
    capacity = max(ours.capacity or 0, flush + MOST_TOKENS)
    return {**options, "flush": flush, "capacity": capacity}
