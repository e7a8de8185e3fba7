"""Speculative decoding for transformers models with recurrent states: `enable_speculation(model)`.

transformers refuses assisted generation for them, because a state cannot forget the drafts that were not accepted.
Buffered states can: their last tokens are rows. Only attributes of the model instance are set; `disable_speculation`
removes them again. What speculation needs beside the model is kept here, not in the model, and goes with it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.functions.adapters import MOST_TOKENS
from kvbuffer_compile.integrations.transformers import standins
from kvbuffer_compile.integrations.transformers.recorded import RecordedForward
from kvbuffer_compile.integrations.transformers.rollback_cache import adopt, layers_of, release

MOST_DRAFTS = MOST_TOKENS - 1  # a verify step takes the last accepted token as well
COMPILED = "_compiled_call_impl"  # the one place where a call can be intercepted, whether the model is compiled or not

_speculations: weakref.WeakKeyDictionary[Any, Speculation] = weakref.WeakKeyDictionary()


def enable_speculation(model: Any) -> None:
    """Let `model.generate` take `prompt_lookup_num_tokens=` and `assistant_model=`.

    The model may be compiled for this backend, before or after, or not at all; then its decode steps are compiled here,
    without Inductor. Drafts are cut to 15 tokens. An assistant with recurrent states of its own is enabled while it
    serves. A second call changes nothing.

    Copies of the model, pickled and saved ones among them, are ordinary models: as with `model.compile()`, this is to
    be called for each. ValueError for what is no model of transformers, or a compiled one in its wrapper.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = isinstance(getattr(model, "_orig_mod", None), PreTrainedModel)
        hint = "; compile it in place, by model.compile(backend='kvbuffer'), and give the model itself" * wrapped
        raise ValueError(f"enable_speculation(model): model is a {type(model).__name__}, no PreTrainedModel{hint}")
    if speculation_of(model) is None:
        _speculations[model] = Speculation(model)


def disable_speculation(model: Any) -> None:
    """Undo `enable_speculation`; a model it was not called for is left alone."""
    speculation = _speculations.pop(model, None)
    if speculation is not None:
        speculation.release()
        standins.take_off(model, speculation.standins)


def speculation_of(model: Any) -> Speculation | None:
    return _speculations.get(model)


def _standin(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a model in place of `name`: what `method` of its speculation does."""

    def standin(model: Any, *args: Any, **kwargs: Any) -> Any:
        speculation = speculation_of(model)
        if speculation is not None:
            return method(speculation, *args, **kwargs)
        # somebody has kept it since speculation was enabled
        return (standins.original(model, name) or model._call_impl)(*args, **kwargs)

    standin.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]  # the library looks at it
    return standin


class Speculation:
    """What stands in for some methods of one model, and goes with it.

    forward: how its calls run while tokens are recorded. stateful: whether the model has states, as the library
    says. caches: those being recorded.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.forward = RecordedForward(model)
        self.stateful = bool(model._is_stateful)
        arguments = inspect.signature(model.forward).parameters
        self.takes_cache_params = "cache_params" in arguments
        self.takes_cache = self.takes_cache_params or "past_key_values" in arguments
        self.caches: list[Cache] = []
        methods = METHODS | (CACHE_PARAMS_METHODS if self.takes_cache_params else {})
        made: dict[str, Any] = {name: _standin(name, method) for name, method in methods.items()}
        self.standins = ("_is_stateful", *made)
        standins.put(model, {"_is_stateful": False, **made})

    @property
    def model(self) -> Any:
        return self._model()

    def before(self, name: str) -> Any:
        """What an attribute of the model is without us."""
        return standins.original(self.model, name)

    def release(self) -> None:
        """Stop recording."""
        for cache in self.caches:
            release(cache)
        self.caches.clear()
        self.forward.candidates = 0
        self.forward.opening = None

    # ------------------------------------------------------------------------------------- in place of methods

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin.generate, with an assistant that can take back its own tokens."""
        standins.go_under(self.model, COMPILED)  # model.compile() may have been called since
        assistant = kwargs.get("assistant_model")
        serving = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
        enabled_here = assistant is not None and assistant._is_stateful and speculation_of(assistant) is None
        if enabled_here:
            enable_speculation(assistant)
        try:
            return self.before("generate")(*args, **kwargs)
        finally:
            if not serving:
                self.release()
            speculation = None if assistant is None else speculation_of(assistant)
            if speculation is not None:
                speculation.release()
            if enabled_here:
                disable_speculation(assistant)

    def prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The cache under the name that assisted decoding knows, whatever the model calls it. Any other decoding is
        left as it is."""
        if self.takes_cache_params and model_kwargs.get("past_key_values") is not None:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        self.before("_prepare_cache_for_generation")(generation_config, model_kwargs, mode, *args, **kwargs)
        assisted = mode == GenerationMode.ASSISTED_GENERATION
        if not (assisted or generation_config.is_assistant):
            return
        if self.takes_cache_params and "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")
        cache = model_kwargs.get("past_key_values")
        if assisted and generation_config.use_cache is not False:
            if not isinstance(cache, Cache):
                raise self._elsewhere("a cache of its own kind" if cache is None else f"a {type(cache).__name__}")
            if not self.takes_cache:
                raise self._elsewhere("its modules")
        if generation_config.is_assistant and isinstance(cache, Cache):
            self.record(cache)  # the library asks it for its length before it is used

    def prepare_inputs(
        self, input_ids: Any, past_key_values: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """prepare_inputs_for_generation of a model that calls its cache cache_params. The library looks at the names of
        these arguments."""
        if past_key_values is not None:
            kwargs["cache_params"] = past_key_values
        return self.before("prepare_inputs_for_generation")(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """The library's generator, its drafts cut to what can be taken back; called before the first token."""
        self.record(kwargs["model_kwargs"]["past_key_values"])
        generator = self.before("_get_candidate_generator")(*args, **kwargs)
        draft = generator.get_candidates

        def get_candidates(input_ids: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
            if hasattr(generator, "num_assistant_tokens"):
                generator.num_assistant_tokens = min(generator.num_assistant_tokens, MOST_DRAFTS)
            ids, logits = draft(input_ids, **given)
            known = input_ids.shape[1]
            self.forward.candidates = min(ids.shape[1] - known, MOST_DRAFTS)
            return ids[:, : known + MOST_DRAFTS], None if logits is None else logits[:, :MOST_DRAFTS]

        generator.get_candidates = get_candidates
        return generator

    def record(self, cache: Cache) -> None:
        """Make a cache one whose tokens can be taken back. StateError when the model keeps its states elsewhere."""
        if any(cache is known for known in self.caches):
            return
        adopt(cache)
        self.caches.append(cache)
        if self.stateful and not layers_of(cache):
            raise self._elsewhere(f"a {type(cache).__name__} without layers for them")

    def _elsewhere(self, where: str) -> StateError:
        return StateError(
            f"speculation: {type(self.model).__name__} keeps its states outside the cache layers of transformers, in "
            f"{where}, where no token is taken back"
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """model(...): as it was, except on a cache that is being recorded."""
        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        before = self.before(COMPILED)
        if not args and isinstance(cache, Cache) and any(getattr(x, "record_past", False) for x in cache.layers):
            self.record(cache)
            out = self.forward(cache, before, kwargs)
            if self.takes_cache_params:
                out.past_key_values = cache
            return out
        return (before or self.model._call_impl)(*args, **kwargs)


METHODS: dict[str, Callable[..., Any]] = {
    COMPILED: Speculation.call,
    "generate": Speculation.generate,
    "_get_candidate_generator": Speculation.candidate_generator,
    "_prepare_cache_for_generation": Speculation.prepare_cache,
}
CACHE_PARAMS_METHODS: dict[str, Callable[..., Any]] = {"prepare_inputs_for_generation": Speculation.prepare_inputs}
