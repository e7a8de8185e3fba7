"""Continuous batching for transformers models with linear layers: `enable_continuous_batching(model)`.

transformers' own engine (its scheduler, pages, sampling, `transformers serve`) packs the tokens of many requests into
one sequence and keeps keys and values in pages; it refuses layers that keep a state. Here these get a slot for each
request. The engine is given the model behind a face of its own, which says what each batch is made of (packed.py), and
a cache that gives slots out with the pages (paged.py). Only attributes of instances are set.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

from kvbuffer_compile import options as backend_options
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers import standins, trial
from kvbuffer_compile.integrations.transformers.packed import Packed, PackedLayer, compiled_step, pieces
from kvbuffer_compile.integrations.transformers.paged import AttentionConfig, HybridCache
from kvbuffer_compile.integrations.transformers.pools import CacheShape, StatePools, shape_of_cache
from kvbuffer_compile.integrations.transformers.servable import (
    COMPILED,
    check_config,
    check_on_one_process,
    check_served,
    check_version,
    linear_layers,
)

SHARE = 0.5  # of the memory for caches that states may take, at most; the pages get the rest
ROWS = 1.25  # memory of a state with its rows, of that of the state alone
INIT, CACHED = "init_continuous_batching", "_cached_continuous_batching_manager"

_enabling = threading.Lock()
_served: weakref.WeakKeyDictionary[Any, Served] = weakref.WeakKeyDictionary()


def enable_continuous_batching(model: Any, *, slots: int | None = None, options: dict[str, Any] | None = None) -> None:
    """Let `model.generate_batch`, `model.init_continuous_batching` and `transformers serve` serve a model with linear
    layers.

    slots: requests that have states at a time, others wait; None for as many as half of the engine's memory for caches
    holds, and no more than it takes into one batch. options: of this backend, for the decode steps of linear layers.
    The model decodes as before beside it. A second call changes nothing. `disable_continuous_batching` undoes it.

    ValueError for an argument that is not allowed. StateError, with the reason and before anything is changed, for
    another version of transformers and for a model that cannot be served.
    """
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool) or slots < 1):
        raise ValueError(
            f"enable_continuous_batching: slots={slots!r} is not allowed: it must be None or an integer > 0"
        )
    backend_options.split(options)
    with _enabling:
        if model not in _served:
            _served[model] = Served(model, slots, options)


def disable_continuous_batching(model: Any) -> None:
    """Undo `enable_continuous_batching`; a model it was not called for is left alone. StateError while it serves."""
    served = _served.get(model)
    if served is not None:
        served.release()
        del _served[model]


def _init(model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a model's init_continuous_batching."""
    served = _served.get(model)
    return (standins.original(model, INIT) if served is None else served.manager)(*args, **kwargs)


def _forward(mixer: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a linear layer's forward: packed batches of the engine, and everything else as it was."""
    batch = None if torch.compiler.is_compiling() else _thread.batch
    if batch is None:
        return standins.original(mixer, "forward")(*args, **kwargs)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return _thread.layers[mixer.layer_idx](batch, hidden)


class _Thread(threading.local):
    """batch: what the engine computes on this thread at the moment; layers: by their index."""

    batch: Packed | None = None
    layers: dict[int, PackedLayer] = {}  # set as a whole


_thread = _Thread()


class Served:
    """A model that the engine may serve, which is not kept."""

    def __init__(self, model: Any, slots: int | None, options: dict[str, Any] | None) -> None:
        check_version()
        check_on_one_process(model)
        self._model = weakref.ref(model)
        self.slots = slots
        self.mixers = linear_layers(model)
        self.shape = shape_of_cache(model)
        check_served(model, self.shape, [mixer.layer_idx for mixer in self.mixers])
        self.step = compiled_step(type(model).__name__, options)
        self.managers: weakref.WeakSet[Manager] = weakref.WeakSet()
        standins.put(model, {INIT: _init})
        for mixer in self.mixers:
            standins.put(mixer, {"forward": _forward})

    @property
    def model(self) -> Any:
        return self._model()

    def release(self) -> None:
        if any(manager.is_running() for manager in self.managers):
            raise StateError("disable_continuous_batching: the model is being served, stop the manager first")
        standins.take_off(self.model, [INIT])
        for mixer in self.mixers:
            standins.take_off(mixer, ["forward"])
        if isinstance(getattr(self.model, CACHED, None), Manager):
            self.model.destroy_cached_continuous_batching_manager()

    @torch.no_grad()
    def manager(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """GenerationMixin.init_continuous_batching, of a manager that knows of states."""
        kept = getattr(self.model, CACHED, None)
        if isinstance(kept, Manager):
            return standins.original(self.model, INIT)()
        generation_config = generation_config if generation_config is not None else self.model.generation_config
        within = getattr(generation_config, "continuous_batching_config", None)  # where older versions have it
        config = continuous_batching_config or within or transformers.ContinuousBatchingConfig()
        check_config(config)
        config = transformers.ContinuousBatchingConfig(
            **{**vars(config), "allow_block_sharing": False, "use_cuda_graph": False, "use_async_batching": False}
        )
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1
        self.shape = shape_of_cache(self.model)  # it may have another dtype or device by now
        check_served(self.model, self.shape, [mixer.layer_idx for mixer in self.mixers])
        with torch.inference_mode(False), torch.no_grad():  # its thread is in no mode
            manager = Manager(self, generation_config, config, workload_hints)
        self.managers.add(manager)
        return manager


class Face:
    """A served model as the engine sees it: with a configuration of the layers that have pages, and called with packed
    batches."""

    def __init__(self, served: Served) -> None:
        vars(self).update(served=served, model=served.model, batch=None, layers={})

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    @property
    def config(self) -> Any:
        return _Config(self.model.config, self.served.shape)

    def eval(self) -> Face:
        self.model.eval()
        return self

    def serve(self, pools: StatePools, batch: Callable[[], Packed]) -> None:
        """Serve batches on these states. batch: that of the call that comes next."""
        step = self.served.step
        layers = {m.layer_idx: PackedLayer(m, pools.layers[m.layer_idx], step) for m in self.served.mixers}
        vars(self).update(batch=batch, layers=layers)

    def __call__(self, **kwargs: Any) -> Any:
        """The model on one packed batch."""
        batch = self.batch()
        before = _thread.batch, _thread.layers
        _thread.batch, _thread.layers = batch, self.layers
        try:
            out = self.model._call_impl(**kwargs)
        finally:
            _thread.batch, _thread.layers = before
        if sorted(batch.layers) != sorted(self.layers):
            raise StateError(
                f"continuous batching: the linear layers {sorted(self.layers)} of {type(self.model).__name__} should "
                f"see a batch once each, {batch.layers} did: do not compile the model or its layers while it is served"
            )
        return out


class _Config:
    """A model's configuration, whose text part is that of the layers with pages."""

    def __init__(self, config: Any, shape: CacheShape) -> None:
        self._config, self._shape = config, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args: Any, **kwargs: Any) -> AttentionConfig:
        return AttentionConfig(self._config.get_text_config(*args, **kwargs), self._shape)


class Manager(ContinuousBatchingManager):
    """The engine, with states beside its pages."""

    def __init__(self, served: Served, generation_config: Any, config: Any, hints: Any) -> None:
        self.served = served
        self.trial = trial.Trial(served.model)  # before attention is switched to pages
        try:
            super().__init__(cast(Any, Face(served)), generation_config, config, hints)
            self._use_prefix_sharing = False
            if self.continuous_batching_config.varlen_compile_config is not None:
                raise ValueError(f"continuous batching: compile_config {COMPILED}")
            self.batch_processor = self._create_batch_processor()  # here, where the caller hears of what cannot be
        except BaseException:
            self._give_back()
            raise

    def add_request(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As the library does, whose thread would end at more tokens than all pages hold: a ValueError."""
        given = kwargs.get("max_new_tokens", args[1] if len(args) > 1 else None)
        asked = len(input_ids) + (self.generation_config.max_new_tokens if given is None else given)
        if self.batch_processor is not None and asked > (most := self.batch_processor.cache.max_tokens_read):
            raise ValueError(
                f"continuous batching: a request of {len(input_ids)} tokens and {asked - len(input_ids)} new ones is "
                f"longer than all pages, which hold {most} tokens: ask for fewer, or give the engine more num_blocks"
            )
        return super().add_request(input_ids, *args, **kwargs)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As the library does, and the states go with the pages."""
        keeps = bool(kwargs.get("keep_for_next_session", args[2] if len(args) > 2 else False))
        super().stop(*args, **kwargs)
        if not self.is_running() and not (keeps and getattr(self.served.model, CACHED, None) is self):
            self._give_back()

    def _give_back(self) -> None:
        """Memory, and the attention that the model had."""
        self.batch_processor = None
        face = vars(self).get("model")
        if face is not None:
            vars(face).update(batch=None, layers={})
        before = vars(self).get("_original_attn_impl")
        if before is not None:
            self.served.model.set_attn_implementation(before)
            self._original_attn_impl = None
        gc.collect()  # processor, pages and states know each other

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        if isinstance(self.batch_processor, ContinuousBatchProcessor):
            return super()._create_batch_processor()
        config: Any = self.continuous_batching_config
        share = config.max_memory_percent
        count, taken = self._slots(config)
        config.max_memory_percent = share - taken
        try:
            processor = super()._create_batch_processor()
        finally:
            config.max_memory_percent = share
        pools = StatePools(self.served.shape, count, self.served.model.device)
        HybridCache.adopted(processor.cache, self.served.shape, pools)

        def batch() -> Packed:
            ours: Any = processor.inputs_and_outputs
            return Packed(list(pieces(ours.requests_in_batch, pools)), self.served.model.device)

        cast(Any, self.model).serve(pools, batch)
        self.trial.check(self.model, processor, min(count, config.max_requests_per_batch))
        processor.reset()
        return processor

    def _slots(self, config: Any) -> tuple[int, float]:
        """How many slots there is memory for, and their share of what is unused; the engine's pages get the rest."""
        gc.collect()
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        unused = total - max(reserved, allocated)
        each = int(self.served.shape.state_bytes * ROWS)
        most = int(unused * config.max_memory_percent * SHARE) // each
        count = self.served.slots or min(config.max_requests_per_batch, most)
        if count < 1 or count * each > unused * config.max_memory_percent:
            raise MemoryError(
                f"continuous batching: the states of a request take {each / 1e6:.1f} MB, those of {max(count, 1)} more "
                f"than the {unused * config.max_memory_percent / 1e6:.1f} MB that there are for caches (on a CPU "
                "psutil tells of them)"
            )
        return count, count * each / unused
