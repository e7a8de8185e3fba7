"""Cache layers of transformers whose tokens can be taken back: convolutions as the library does it, states by rollback.

While a cache is adopted its linear attention layers have another class, made from their own; nothing else in them
changes. `release` gives the classes back.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.runtime import by_hand


class RollbackLayer(LinearAttentionCacheLayerMixin):
    """What is put in front of the class of a linear attention layer.

    tokens: what the layer has seen since it was adopted. since_start: whether that is all it has ever seen.
    uncropped: tokens since the last crop; they must stay rows, for the next crop may take back any of them.
    """

    is_croppable = True
    own_class: type
    tokens: int
    since_start: bool
    uncropped: int

    @property
    def states(self) -> list[Tensor]:
        """The recurrent states the layer has; there may be layers with convolutions only."""
        return [s for s in self.recurrent_states.values() if s is not None]

    @property
    def empty(self) -> bool:
        """Whether no token is left of what the layer may have seen."""
        return self.since_start and self.tokens == 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number; 0 shortens what convolutions have recorded."""
        count = abs(tokens_to_remove)
        if count and self.since_start and count == self.tokens:
            self._forget()
        elif self.tokens or not self.since_start:
            if count:
                for state in self.states:
                    by_hand.rollback(state, count)
            super().crop(tokens_to_remove)
            self._widen()
        self.tokens -= count
        self.uncropped = 0
        for account in self._accounts():
            account.release()

    def _forget(self) -> None:
        """As before the first token."""
        for state in self.states:
            by_hand.declare_zero(state)
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)
        forget_attention(self)

    def _widen(self) -> None:
        """Histories of convolutions are always of one width, so that no graph is compiled for a short one."""
        for index, conv in self.conv_states.items():
            if conv is not None:
                missing = int(self.conv_kernel_size[index] or 0) - conv.shape[-1]
                self.conv_states[index] = torch.nn.functional.pad(conv, (missing, 0)).contiguous()

    def before(self) -> None:
        """To be called before each step: rows of tokens that may yet be taken back are not folded in."""
        if self.uncropped:
            for account in self._accounts():
                account.hold()

    def _accounts(self) -> list[Account]:
        return [account for state in self.states for account in by_hand.accounts_of(state)]

    def after(self, tokens: int) -> None:
        """To be called after a step of so many tokens."""
        self.tokens += tokens
        self.uncropped += tokens


def forget_attention(layer: object) -> None:
    """Let the attention of a layer, if it has one, be as before the first token: without keys, not with none."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        DynamicLayer.reset(layer)


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
            for account in layer._accounts():
                account.release()
            for name in ("tokens", "uncropped", "since_start"):
                delattr(layer, name)
            layer.__class__ = layer.own_class
