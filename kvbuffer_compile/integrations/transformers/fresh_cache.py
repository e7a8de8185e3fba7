"""A fresh cache as one whose states are zero: the graphs of later tokens serve its first ones as well.

What states a model makes is seen once, on one token and a cache to be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvbuffer_compile.integrations.transformers.rollback_cache import forget_attention
from kvbuffer_compile.runtime import by_hand


@dataclass(frozen=True)
class Blank:
    """A tensor of zeros, of one sequence."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def like(x: Tensor) -> Blank:
        return Blank(tuple(x.shape[1:]), x.dtype, x.device)


@dataclass(frozen=True)
class BlankLayer:
    """The states a layer makes at its first token: histories of convolutions, as wide as their kernels, and recurrent
    states."""

    convolutions: dict[int, Blank]
    recurrent: dict[int, Blank]


def blank_layers(call: Callable[..., Any], config: Any, inputs: dict[str, Any], cache_name: str) -> list[BlankLayer]:
    """One for each layer of a cache, empty for attention. call: the model as it is; inputs: of its first tokens."""
    scratch = DynamicCache(config=config)
    tokens = {n: inputs[n][:1, :1] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None}
    call(**tokens, **{cache_name: scratch}, use_cache=True)
    return [_blank(layer) for layer in scratch.layers]


def _blank(layer: Any) -> BlankLayer:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return BlankLayer({}, {})
    convolutions = {n: Blank.like(x) for n, x in layer.conv_states.items() if x is not None}
    return BlankLayer(convolutions, {n: Blank.like(x) for n, x in layer.recurrent_states.items() if x is not None})


def begin(cache: Cache, blanks: list[BlankLayer], batch: int, started: bool) -> None:
    """Let a cache that has seen no token have its states, all zero; recurrent ones take no memory yet.

    started: its next call reads them. Else it makes them itself, in this memory: their strides would depend on how many
    tokens it has, and graphs on the strides.
    """
    for layer, blank in zip(cache.layers, blanks, strict=True):
        forget_attention(layer)  # of a cache from which everything was taken back
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            with torch.inference_mode(False):
                _give_recurrent(layer, blank, batch)
                if started:
                    _give_convolutions(layer, blank, batch)
                    layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)


def _give_convolutions(layer: LinearAttentionCacheLayerMixin, blank: BlankLayer, batch: int) -> None:
    for index, conv in blank.convolutions.items():
        layer.conv_states[index] = torch.zeros(batch, *conv.sizes, dtype=conv.dtype, device=conv.device)
        layer.conv_kernel_size[index] = conv.sizes[-1]
        layer.is_conv_states_initialized[index] = True
        layer.dtype, layer.device = conv.dtype, conv.device  # type: ignore[assignment]


def _give_recurrent(layer: LinearAttentionCacheLayerMixin, blank: BlankLayer, batch: int) -> None:
    for index, state in blank.recurrent.items():
        known = layer.recurrent_states[index]
        if known is not None and known.shape == (batch, *state.sizes):
            by_hand.declare_zero(known)
        else:
            made = by_hand.zero_state((batch, *state.sizes), state.dtype, state.device)
            torch._dynamo.mark_static_address(made)  # as the library does with its own, for CUDA graphs
            layer.recurrent_states[index] = made
        layer.is_recurrent_states_initialized[index] = True
