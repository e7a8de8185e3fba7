"""Cache layers of transformers whose tokens can be taken back: convolutions as the library does it, states by rollback.

While a cache is adopted its linear attention layers have another class, made from their own; nothing else in them
changes. `release` gives the classes back.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvbuffer_compile import runtime


class RollbackLayer(LinearAttentionCacheLayerMixin):
    """What is put in front of the class of a linear attention layer.

    tokens: what the layer has seen since it was adopted. since_start: whether that is all it has ever seen.
    uncropped: tokens since the last crop; they must stay rows, for the next crop may take back any of them.
    holding: whether states flush only when their buffers are full, for that reason.
    """

    is_croppable = True
    own_class: type
    tokens: int
    since_start: bool
    uncropped: int
    holding: bool

    @property
    def states(self) -> list[Tensor]:
        """The recurrent states the layer has; there may be layers with convolutions only."""
        return [s for s in self.recurrent_states.values() if s is not None]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number; 0 shortens what convolutions have recorded."""
        count = abs(tokens_to_remove)
        if count and self.since_start and count == self.tokens:
            for state in self.states:
                state.zero_()
            self.has_previous_state = dict.fromkeys(self.has_previous_state, False)
        elif count:
            for state in self.states:
                runtime.rollback(state, count)
        super().crop(tokens_to_remove)
        self.tokens -= count
        self.uncropped = 0
        if self.holding:
            self._flush_at_capacity(False)
        for index, conv in self.conv_states.items():
            if conv is not None:  # always of one width, so that no graph is compiled for a short one
                missing = int(self.conv_kernel_size[index] or 0) - conv.shape[-1]
                self.conv_states[index] = torch.nn.functional.pad(conv, (missing, 0)).contiguous()

    def before(self) -> None:
        """To be called before each step: rows of tokens that may yet be taken back are not folded in."""
        if self.uncropped and not self.holding:
            self._flush_at_capacity(True)

    def _flush_at_capacity(self, holding: bool) -> None:
        self.holding = holding
        for state in self.states:
            for account in runtime.accounts_of(state):
                account.cursor[1].fill_(account.plan.capacity if holding else account.plan.flush)

    def after(self, tokens: int) -> None:
        """To be called after a step of so many tokens."""
        self.tokens += tokens
        self.uncropped += tokens


@functools.cache
def _rollback_class(own: type) -> type:
    return type(f"Rollback{own.__name__}", (RollbackLayer, own), {"own_class": own})


def layers_of(cache: Cache) -> list[RollbackLayer]:
    """The adopted layers of a cache."""
    return [layer for layer in cache.layers if isinstance(layer, RollbackLayer)]


def adopt(cache: Cache) -> None:
    """Make the linear attention layers of a cache croppable."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, RollbackLayer):
            layer.__class__ = _rollback_class(type(layer))
            assert isinstance(layer, RollbackLayer)
            layer.tokens = layer.uncropped = 0
            layer.holding = False
            layer.since_start = not any(layer.has_previous_state.values())
    layers = layers_of(cache)
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        vars(cache)["get_seq_length"] = lambda layer_idx=0: layers[0].tokens


def release(cache: Cache) -> None:
    """Undo `adopt` and stop recording; what the cache holds stays."""
    cache.__dict__.pop("get_seq_length", None)
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False
        if isinstance(layer, RollbackLayer):
            for name in ("tokens", "uncropped", "holding", "since_start"):
                delattr(layer, name)
            layer.__class__ = layer.own_class
