"""How a transformers model runs while its cache records: every token of a call must be one that can be taken back.

The last tokens of a call, at most MOST_TOKENS, run in a graph of our backend, where states owe rows for them. What
comes before them, a prompt, runs as the model is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from transformers import Cache, DynamicCache

from kvbuffer_compile import runtime
from kvbuffer_compile.errors import Declined, StateError
from kvbuffer_compile.integrations.adapters import MOST_TOKENS
from kvbuffer_compile.integrations.rollback_cache import adopt, layers_of
from kvbuffer_compile.integrations.split_forward import joined, keep_logits, mark_sizes, split, token_count
from kvbuffer_compile.options import split as split_options
from kvbuffer_compile.records import GraphRecord, observers

FLUSH = 16  # when it was left to the cost model, which does not know of drafts
BACKEND = "kvbuffer"

Call = Callable[..., Any]


class RecordedForward:
    """Calls of one model on caches that record.

    candidates: how many of the tokens of the next call are drafts. step: the compiled call, and what of the user's
    it was made from. records: what was decided about its graphs.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stateful = bool(model._is_stateful)
        self.candidates = 0
        self.step: tuple[Call | None, Call] | None = None
        self.records: list[GraphRecord] = []

    def __call__(self, cache: Cache, compiled: Call | None, inputs: dict[str, Any]) -> Any:
        """model(**inputs) on `cache`; compiled: what model.compile() made of the model, None if it was not called."""
        layers = layers_of(cache)
        if not layers and self.stateful:
            raise StateError(
                f"speculation: {self._name} keeps its states outside its cache, where no token is taken back"
            )
        if not layers:
            return (compiled or self.model._call_impl)(**inputs)
        count = token_count(inputs)
        keep = inputs.get("logits_to_keep", 0)
        started = any(any(layer.has_previous_state.values()) for layer in layers)
        tail = min(count, MOST_TOKENS) if started else min(count - 1, max(self.candidates + 1, 2))
        if tail == count:
            return keep_logits(self._verify(cache, compiled, inputs), keep)
        if tail == 0:
            self._rehearse(cache, compiled, inputs)
            return self._prompt(cache, inputs)
        first, last = split(inputs, tail)
        before = self._prompt(cache, first)
        cache.crop(0)
        return keep_logits(joined(before, self._verify(cache, compiled, last)), keep)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _prompt(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        """The model as it is, on tokens that are known to stay."""
        out = self.model._call_impl(**inputs)
        for layer in layers_of(cache):
            layer.tokens += token_count(inputs)
            for state in layer.states:
                runtime.guard(state)  # or the first step would compile a graph for plain states, used once
        return out

    def _verify(self, cache: Cache, compiled: Call | None, inputs: dict[str, Any]) -> Any:
        """A compiled step. StateError when its tokens could not be taken back."""
        count = token_count(inputs)
        step = self._step_of(compiled)
        given = mark_sizes(inputs, cache)
        if "logits_to_keep" in given:
            given["logits_to_keep"] = 0  # another number would be another graph
        layers = layers_of(cache)
        for layer in layers:
            layer.before()
        with observers.also(self.records.append):
            out = step(**given)
        for layer in layers:
            layer.after(count)
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

    def _rehearse(self, cache: Cache, compiled: Call | None, inputs: dict[str, Any]) -> None:
        """A prompt of one token shows nothing yet: see on a cache to be thrown away whether the next call will do."""
        scratch = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        scratch.activate_past_recording()
        adopt(scratch)
        twice = {
            name: scratch if value is cache else torch.cat([value] * 2, 1) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self(scratch, compiled, twice)

    def _step_of(self, compiled: Call | None) -> Call:
        """The call that verifies: the user's own, or one with room for drafts."""
        if self.step is None or self.step[0] is not compiled:
            self.step = compiled, _with_room(self.model, compiled)
            self.records.clear()
        return self.step[1]


def _with_room(model: Any, compiled: Call | None) -> Call:
    """The model compiled so that one-token and several-token graphs share rows, with slots for drafts."""
    if compiled is None:
        return torch.compile(model._call_impl, backend=BACKEND, options=_room({"inner": "eager"}))
    known = inspect.getclosurevars(compiled).nonlocals
    context, backend = known["self"], cast(Any, innermost_backend(known["callback"]))
    if not getattr(getattr(backend, "compiler_fn", None), "rewrites_recurrences", False):
        raise StateError("speculation: the model is compiled for another backend; its states are not buffered")
    given = dict(backend.kwargs.get("options", {}))
    options = _room(given)
    if options == given:
        return compiled
    patches = torch._inductor.list_mode_options(backend.kwargs["mode"]) if "mode" in backend.kwargs else {}
    return torch.compile(
        model._call_impl,
        backend=backend.compiler_fn,
        fullgraph=context.fullgraph,
        dynamic=backend.dynamic,
        options={**patches, **options},
    )


def _room(options: dict[str, Any]) -> dict[str, Any]:
    """The options with an integer flush and room for drafts."""
    ours, _ = split_options(options)
    flush = ours.flush if isinstance(ours.flush, int) and ours.flush > 1 else FLUSH
    capacity = max(ours.capacity or 0, flush + MOST_TOKENS)
    return {**options, "flush": flush, "capacity": capacity}
