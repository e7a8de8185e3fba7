"""The states of linear layers for many requests: a slot of each pool for each request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.runtime.slots import read_slots, write_slots

ATTENTION = {False: "full_attention", True: "sliding_attention"}  # the engine's names, by whether there is a window


@dataclass(frozen=True)
class StateShape:
    """The states of one linear layer for one request: sizes behind the batch, and dtypes."""

    convolutions: tuple[tuple[torch.Size, torch.dtype], ...]
    recurrent: tuple[tuple[torch.Size, torch.dtype], ...]

    @property
    def bytes(self) -> int:
        return sum(shape.numel() * dtype.itemsize for shape, dtype in (*self.convolutions, *self.recurrent))


@dataclass(frozen=True)
class CacheShape:
    """What the layers of a model keep. attention: the engine's name of each layer with keys and values, by its index.
    states: by the index of the layer; a layer may have both."""

    attention: dict[int, str]
    states: dict[int, StateShape]

    @property
    def state_bytes(self) -> int:
        """Of the states of one request."""
        return sum(shape.bytes for shape in self.states.values())


@torch.no_grad()
def shape_of_cache(model: Any) -> CacheShape:
    """What a model keeps of the past, seen from one token. StateError for a cache of another kind."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    out = model._call_impl(input_ids=ids, use_cache=True)
    cache = out.get("past_key_values", out.get("cache_params"))
    if cache is None or not hasattr(cache, "layers"):
        raise StateError(
            f"{type(model).__name__} keeps its past in {type(cache).__name__}, not in the cache layers of transformers"
        )
    attention, states = {}, {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            kept = [_present(x) for x in (layer.conv_states, layer.recurrent_states)]
            if any(kept):
                states[index] = StateShape(*kept)
        if getattr(layer, "keys", None) is not None:
            _check_pages(model, layer)
            attention[index] = ATTENTION[isinstance(layer, DynamicSlidingWindowLayer)]
    return CacheShape(attention, states)


def _check_pages(model: Any, layer: Any) -> None:
    """StateError for attention whose keys and values the engine's pages do not hold: they are made for one size."""
    config = model.config.get_text_config()
    pages = (find_num_key_value_heads(config), find_head_dim(config))
    kept = [(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)]
    if kept != [pages, pages]:
        raise StateError(
            f"continuous batching: the attention of {type(model).__name__} keeps keys of {kept[0][0]} x {kept[0][1]} "
            f"and values of {kept[1][0]} x {kept[1][1]}, the engine's pages hold {pages[0]} x {pages[1]} of both"
        )


def _present(tensors: dict[int, Tensor | None]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((t.shape[1:], t.dtype) for t in tensors.values() if t is not None)


class LayerPools:
    """The states of one linear layer for all requests: tensors [slots, ...]."""

    def __init__(self, shape: StateShape, slots: int, device: torch.device) -> None:
        self.convolutions, self.recurrent = (
            [torch.zeros(slots, *size, dtype=dtype, device=device) for size, dtype in kind]
            for kind in (shape.convolutions, shape.recurrent)
        )

    @property
    def all(self) -> list[Tensor]:
        return [*self.convolutions, *self.recurrent]

    def begun(self) -> LinearAttentionLayer:
        """A cache layer of a request that has no past."""
        return LinearAttentionLayer(number_of_states=max(len(self.convolutions), len(self.recurrent), 1))

    def resumed(self, slot: int) -> LinearAttentionLayer:
        """A cache layer with the states of one request."""
        layer = self.begun()
        for n, pool in enumerate(self.convolutions):
            layer.conv_states[n] = read_slots(pool, slot)
            layer.conv_kernel_size[n] = pool.shape[-1]
            layer.is_conv_states_initialized[n] = layer.has_previous_state[n] = True
        for n, pool in enumerate(self.recurrent):
            layer.recurrent_states[n] = read_slots(pool, slot)
            layer.is_recurrent_states_initialized[n] = layer.has_previous_state[n] = True
        return layer

    def keep(self, slot: int, layer: LinearAttentionLayer) -> None:
        """The states of a cache layer become those of a request."""
        for pools, states in ((self.convolutions, layer.conv_states), (self.recurrent, layer.recurrent_states)):
            for n, pool in enumerate(pools):
                state = states[n]
                if state is None:
                    raise StateError(f"a linear layer has left its state {n} out")
                write_slots(pool, slot, state)


class Slots:
    """Which slot each request has."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._taken: dict[str, int] = {}

    def __contains__(self, request: str) -> bool:
        return request in self._taken

    def __getitem__(self, request: str) -> int:
        return self._taken[request]

    @property
    def free(self) -> int:
        """How many nobody has."""
        return len(self._free)

    @property
    def requests(self) -> list[str]:
        return list(self._taken)

    def take(self, request: str) -> None:
        """Give a request a slot if it has none. IndexError when there is none."""
        if request not in self._taken:
            self._taken[request] = self._free.pop()

    def release(self, request: str) -> None:
        """Give the slot of a request back, if it has one."""
        if request in self._taken:
            self._free.append(self._taken.pop(request))


class StatePools:
    """The states of every linear layer, and whose they are."""

    def __init__(self, shape: CacheShape, slots: int, device: torch.device) -> None:
        self.slots = Slots(slots)
        self.layers = {index: LayerPools(state, slots, device) for index, state in shape.states.items()}

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers.values() for tensor in layer.all]

    def copy(self, source: str, destinations: Sequence[str]) -> None:
        """Other requests go on from the states of one."""
        places = [self.slots[request] for request in destinations]
        for pool in self.tensors:
            write_slots(pool, places, read_slots(pool, self.slots[source])[0])
