"""A packed batch, the tokens of many requests in one sequence, through one linear layer.

Attention in the engine of transformers reads and writes pages; a linear layer knows of one sequence after another. Here
each request has its own: all that decode one token are one batch of slots, in a compiled step that takes the states of
its slots from the pools and puts them back (which this backend buffers), and each piece of a prompt runs through the
layer's own path on the states of its slot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers.pools import LayerPools, StatePools
from kvbuffer_compile.process.afresh import afresh

Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of a packed batch, which are those of one request. started: whether it has a past."""

    slot: int
    begin: int
    end: int
    started: bool


@dataclass
class Packed:
    """Whose the tokens of one batch are. layers: which have seen it."""

    pieces: Sequence[Piece]
    device: torch.device
    layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        some = [p for p in self.pieces if p.end > p.begin]  # a request that forks may wait with its last token
        decoding = [p for p in some if p.started and p.end - p.begin == 1]
        self.prompts = [p for p in some if not (p.started and p.end - p.begin == 1)]
        self.slots = torch.tensor([p.slot for p in decoding], device=self.device)
        self.places = torch.tensor([p.begin for p in decoding], device=self.device)


class OneLayer:
    """The cache of a model as one linear layer sees it: its own states, whatever index it asks for."""

    def __init__(self, layer: LinearAttentionLayer) -> None:
        self.layer = layer

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.layer.conv_states[state_idx] if self.layer.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.layer.recurrent_states[state_idx] if self.layer.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.layer.update_conv_state(conv_states, state_idx=state_idx, **kwargs)

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.layer.update_recurrent_state(states, state_idx=state_idx, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.layer.has_previous_state[state_idx or 0])

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class Gathered:
    """The cache of a model as one linear layer sees it that decodes a token for each of some slots."""

    def __init__(self, convolutions: list[Tensor], recurrent: list[Tensor]) -> None:
        self.convolutions, self.recurrent = convolutions, recurrent

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.convolutions[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.recurrent[state_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        kept = self.convolutions[state_idx]
        whole = torch.cat([kept, conv_states], dim=-1)
        self.convolutions[state_idx] = whole[..., -kept.shape[-1] :]
        return whole

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.recurrent[state_idx] = states
        return states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


def _step(mixer: Any, hidden: Tensor, convolutions: list[Tensor], recurrent: list[Tensor], slots: Tensor) -> Tensor:
    """One token for each of some slots. hidden: [N, 1, hidden]; pools: [slots, ...]; slots: [N], each once."""
    states = Gathered([pool[slots] for pool in convolutions], [pool[slots] for pool in recurrent])
    out = mixer(hidden, cache_params=states)
    for pools, new in ((convolutions, states.convolutions), (recurrent, states.recurrent)):
        for pool, state in zip(pools, new, strict=True):
            pool[slots] = state.to(pool.dtype)
    return out  # type: ignore[no-any-return]


def compiled_step(name: str, options: dict[str, Any] | None) -> Step:
    """The step of all linear layers of a model: layers of one kind share its graphs. name: of the model."""
    return torch.compile(afresh(_step, f"step_of_{name}"), backend="kvbuffer", fullgraph=True, options=options)


class PackedLayer:
    """One linear layer of a model on packed batches. mixer: the module; pools: its states."""

    def __init__(self, mixer: Any, pools: LayerPools, step: Step) -> None:
        self.pools, self.step = pools, step
        self.index = mixer.layer_idx
        # Graphs know the index of a layer as a number; the states that a step is given are those of one layer.
        self.alike = copy.copy(mixer)
        self.alike.layer_idx = 0

    def __call__(self, batch: Packed, hidden: Tensor) -> Tensor:
        """hidden: [1, tokens, hidden], of the whole batch. What lies behind its tokens is padding."""
        if hidden.dim() != 3 or hidden.shape[0] != 1:
            raise StateError(f"a packed batch is one sequence, here of shape {tuple(hidden.shape)}")
        batch.layers.append(self.index)
        out: Tensor | None = None
        if len(batch.slots):
            decoded = self._decode(batch, hidden[0].index_select(0, batch.places)[:, None])
            out = hidden.new_zeros(1, hidden.shape[1], decoded.shape[-1])
            out[0].index_copy_(0, batch.places, decoded[:, 0])
        for piece in batch.prompts:
            layer = self.pools.resumed(piece.slot) if piece.started else self.pools.begun()
            part = self.alike(hidden[:, piece.begin : piece.end], cache_params=OneLayer(layer))
            self.pools.keep(piece.slot, layer)
            out = hidden.new_zeros(1, hidden.shape[1], part.shape[-1]) if out is None else out
            out[:, piece.begin : piece.end] = part
        return torch.zeros_like(hidden) if out is None else out

    def _decode(self, batch: Packed, hidden: Tensor) -> Tensor:
        slots = batch.slots
        if len(slots) > 1:  # one graph for any number but one, which torch.compile knows as a number
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            torch._dynamo.maybe_mark_dynamic(slots, 0)
        return self.step(self.alike, hidden, self.pools.convolutions, self.pools.recurrent, slots)


def pieces(requests: Any, pools: StatePools) -> Iterator[Piece]:
    """Which tokens of a batch are whose. The engine has counted these tokens as past already."""
    begin = 0
    for request in requests:
        count = request.query_length
        past = request.state.position_offset - count
        yield Piece(pools.slots[request.state.request_id], begin, begin + count, past > 0)
        begin += count
