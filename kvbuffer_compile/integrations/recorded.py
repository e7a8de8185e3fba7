"""How a transformers model runs while its cache records: every token of a call must be one that can be taken back.

A prompt that the buffers have room for runs like any later call, on states that are zero and are neither read nor
written. Of a longer one the last tokens, at most MOST_TOKENS, run in a graph of our backend, where states owe rows for
them; what comes before them runs as the model is.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvbuffer_compile import runtime
from kvbuffer_compile.errors import Declined, StateError
from kvbuffer_compile.integrations.adapters import MOST_TOKENS
from kvbuffer_compile.integrations.fresh_cache import BlankLayer, begin, blank_layers
from kvbuffer_compile.integrations.rollback_cache import layers_of
from kvbuffer_compile.integrations.split_forward import (
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
from kvbuffer_compile.records import GraphRecord, observers

FLUSH = 16  # when it was left to the cost model, which does not know of drafts
BACKEND = "kvbuffer"

Call = Callable[..., Any]


@dataclass(frozen=True)
class Steps:
    """compiled: what model.compile() made of the model, None if it was not called. call: what runs instead, with room
    for drafts. capacity: of its buffers."""

    compiled: Call | None
    call: Call
    capacity: int


class RecordedForward:
    """Calls of one model on caches that record.

    candidates: how many of the tokens of the next call are drafts. steps: the compiled call. records: what was decided
    about its graphs. blanks: the states that the model makes. opening: a cache that has seen one token, and the call.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.candidates = 0
        self.steps: Steps | None = None
        self.records: list[GraphRecord] = []
        self.blanks: list[BlankLayer] | None = None
        self.opening: tuple[weakref.ref[Cache], dict[str, Any]] | None = None

    def __call__(self, cache: Cache, compiled: Call | None, inputs: dict[str, Any]) -> Any:
        """model(**inputs) on `cache`; compiled: what model.compile() made of the model, None if it was not called."""
        layers = layers_of(cache)
        if not layers:
            return (compiled or self.model._call_impl)(**inputs)
        if self.steps is None or self.steps.compiled is not compiled:
            self.steps = _with_room(self.model, compiled)
            self.records.clear()
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
        with observers.also(self.records.append):
            out = self.steps.call(**given)
        for layer in layers:
            layer.after(token_count(inputs))
        self._check(cache)
        return out

    def _check(self, cache: Cache) -> None:
        states = [state for layer in layers_of(cache) for state in layer.states]
        lost = [s for s in states if not any(a.dirty for a in runtime.accounts_of(s))]
        if not lost:
            return
        declined = [why for r in self.records for _, why in r.states if isinstance(why, Declined)]
        declined += [r.why for record in self.records for r in record.refused if not r.hopeless]
        declined += [record.why_not for record in self.records if record.why_not is not None]
        reasons = dict.fromkeys(why.reason for why in declined)
        raise StateError(
            f"speculation: {len(lost)} of {len(states)} states of {self._name} do not run buffered, so that no token "
            f"can be taken back from them: {'; '.join(reasons) or 'their memory is visible through other tensors'}"
        )


def _with_room(model: Any, compiled: Call | None) -> Steps:
    """The model compiled so that one-token and several-token graphs share rows, with slots for drafts."""
    if compiled is None:
        options = _room({"inner": "eager"})
        call = torch.compile(model._call_impl, backend=BACKEND, options=options)
        return Steps(None, call, options["capacity"])
    known = inspect.getclosurevars(compiled).nonlocals
    context, backend = known["self"], cast(Any, innermost_backend(known["callback"]))
    if not getattr(getattr(backend, "compiler_fn", None), "rewrites_recurrences", False):
        raise StateError("speculation: the model is compiled for another backend; its states are not buffered")
    given = dict(backend.kwargs.get("options", {}))
    options = _room(given)
    if options == given:
        return Steps(compiled, compiled, options["capacity"])
    patches = torch._inductor.list_mode_options(backend.kwargs["mode"]) if "mode" in backend.kwargs else {}
    call = torch.compile(
        model._call_impl,
        backend=backend.compiler_fn,
        fullgraph=context.fullgraph,
        dynamic=backend.dynamic,
        options={**patches, **options},
    )
    return Steps(compiled, call, options["capacity"])


def _room(options: dict[str, Any]) -> dict[str, Any]:
    """The options with an integer flush and room for drafts."""
    ours, _ = split_options(options)
    flush = ours.flush if isinstance(ours.flush, int) and ours.flush > 1 else FLUSH
    capacity = max(ours.capacity or 0, flush + MOST_TOKENS)
    return {**options, "flush": flush, "capacity": capacity}
