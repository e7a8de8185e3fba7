"""The engine's paged cache for models of which only some layers have keys and values.

The other layers keep states of one size, in a slot for each request (pools.py). A request has its slot for as long as
it has pages: it waits when none is free, and one that is put off loses both and is computed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers.pools import CacheShape, StatePools


class AttentionConfig:
    """A model's configuration as the engine should see it: of the layers with keys and values alone."""

    def __init__(self, config: Any, shape: CacheShape) -> None:
        self._config = config
        self.layer_types = [shape.attention[index] for index in sorted(shape.attention)]
        self.num_hidden_layers = len(self.layer_types)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class HybridCache(PagedAttentionCache):
    """A paged cache with states beside it. Made of one that the engine has made: `adopted`."""

    pools: StatePools
    places: dict[int, int]  # of each layer with keys and values among all of those
    forks: list[tuple[str, list[str]]]  # states that are to be copied with the pages

    @classmethod
    def adopted(cls, cache: PagedAttentionCache, shape: CacheShape, pools: StatePools) -> HybridCache:
        """The same cache, which from now on knows of the states."""
        cache.__class__ = cls
        assert isinstance(cache, HybridCache)
        cache.pools = pools
        cache.places = {index: place for place, index in enumerate(sorted(shape.attention))}
        cache.forks = []
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        if layer_idx not in self.places:
            raise StateError(
                f"continuous batching: an attention module calls itself layer {layer_idx}, pages are those of layers "
                f"{sorted(self.places)}: it is not served"
            )
        return super().update(key_states, value_states, self.places[layer_idx], kwargs)

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        slots = self.pools.slots
        if state.request_id not in slots and not slots.free:
            return False
        fits = bool(super().can_store_request_tokens(state, request_len, dry_run))
        if fits and not dry_run:
            slots.take(state.request_id)
        return fits

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        super().free_blocks(request_id, no_cache)
        self.pools.slots.release(request_id)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        super().free_all_requests(clear_ledgers)
        self.forks.clear()
        for request in self.pools.slots.requests:
            self.pools.slots.release(request)

    def prepare_fork_request(self, src_state: Any, dst_req_ids: list[str], copy_src_and_dst: Any) -> list[str]:
        slots = self.pools.slots
        forked = super().prepare_fork_request(src_state, dst_req_ids[: slots.free], copy_src_and_dst)
        for request in forked:
            slots.take(request)
        if forked:
            self.forks.append((src_state.request_id, forked))
        return forked

    @torch.no_grad()
    def perform_cache_copy(self, copy_src_and_dst: Any) -> None:
        super().perform_cache_copy(copy_src_and_dst)
        while self.forks:
            self.pools.copy(*self.forks.pop())
