"""Prompts, one-token decode steps and the recurrent states behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

from tests.zoo.configs import VOCAB

CACHE_LENGTH = 512  # of a StaticCache: prompt and new tokens together


def prompt(batch: int, length: int, seed: int = 0) -> LongTensor:
    """[batch, length] token ids; the last id of the vocabulary is never used (it stands for an image)."""
    return torch.randint(0, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


class DecodeStep:
    """step(token [batch, 1]) -> logits [batch, vocab] of the next token. The cache is inside.

    Fit for torch.compile(step, fullgraph=True) where the architecture is. Nothing but the model's own
    cache is mutated; positions are read from the cache, because Bamba's own default ignores the past.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, argument: str) -> None:
        self.model = model
        self.cache = cache
        self.argument = argument

    def __call__(self, token: Tensor) -> Tensor:
        extra: dict[str, Any] = {self.argument: self.cache}
        if self.argument == "past_key_values" and not isinstance(self.cache, MiniMaxCache):
            length = token.shape[1]
            start = self.cache.get_seq_length()
            positions = torch.arange(length, device=token.device) + start
            extra["position_ids"] = positions.expand(token.shape[0], length)
        out = self.model(token, use_cache=True, **extra)
        if self.argument == "state":  # RWKV takes None and returns its list of states
            self.cache = out.state
        return out.logits[:, -1]


def new_cache(model: PreTrainedModel, batch: int, kind: str = "dynamic") -> tuple[Any, str]:
    """An empty cache and the name of the forward argument that takes it."""
    family = model.config.model_type
    if family == "xlstm":
        return xLSTMCache(model.config, batch, dtype=model.dtype), "cache_params"
    if family == "minimax":
        return MiniMaxCache(), "past_key_values"
    if family == "rwkv":
        return None, "state"
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    else:
        cache = DynamicCache(config=model.config)
    return cache, "cache_params" if family in ("mamba", "mamba2", "falcon_mamba") else "past_key_values"


def decode_step(
    model: PreTrainedModel, batch: int, cache: str = "dynamic", prompt_len: int = 5, seed: int = 0
) -> tuple[DecodeStep, list[Tensor]]:
    """A one-token step after an eager prefill of `prompt(batch, prompt_len, seed)`, and its state tensors.

    The tensors are the live ones for caches that are written in place. MiniMax and RecurrentGemma replace
    theirs at every step: ask `states_of(step)` for the present ones.
    """
    step = prefilled(model, prompt(batch, prompt_len, seed), cache)
    return step, [tensor for _, tensor in states_of(step)]


@torch.no_grad()
def prefilled(model: PreTrainedModel, ids: Tensor, cache: str = "dynamic") -> DecodeStep:
    """A decode step whose cache has seen `ids`."""
    _forget(model)
    step = DecodeStep(model, *new_cache(model, ids.shape[0], cache))
    step(ids)
    return step


def _forget(model: nn.Module) -> None:
    """RecurrentGemma keeps its states in its modules: drop those of the last sequence."""
    for module in model.modules():
        for attribute in ("recurrent_states", "conv1d_state"):
            if hasattr(module, attribute):
                setattr(module, attribute, None)


def states_of(owner: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) of each recurrent state in a step, cache or model, in the order of the layers.

    Matrix states where there are any (of xLSTM only C, not its normaliser and stabiliser); the vectors
    of the architectures that have nothing else. Shift registers of convolutions are left out.
    """
    if isinstance(owner, DecodeStep):
        return states_of(owner.cache) or states_of(owner.model)
    if isinstance(owner, nn.Module):
        named = ((name, getattr(module, "recurrent_states", None)) for name, module in owner.named_modules())
        return [(f"{name}.recurrent_states", t) for name, t in named if isinstance(t, Tensor)]
    return [(name, t) for name, t in _cached(owner) if isinstance(t, Tensor)]


def _cached(cache: Any) -> list[tuple[str, Any]]:
    if isinstance(cache, xLSTMCache):
        return [(f"rnn_state[{i}][0]", state[0]) for i, state in cache.rnn_state.items()]
    if isinstance(cache, MiniMaxCache):
        return [(f"linear_cache[{i}]", state) for i, state in enumerate(cache.linear_cache)]
    if isinstance(cache, list):  # RWKV: numerator, denominator and maximum are its states 2 to 4
        return [(f"state[{i}]", cache[i]) for i in (2, 3)]
    return [
        (f"layers[{i}].recurrent_states[{j}]", state)
        for i, layer in enumerate(cache.layers)
        for j, state in getattr(layer, "recurrent_states", {}).items()
    ]


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, n: int, **generate_kwargs: Any) -> LongTensor:
    """[batch, n] new tokens by `generate`, without sampling and without an end of text."""
    if model.config.model_type == "rwkv" and ids.shape[0] > 1:  # its one-token step is wrong for batch > 1
        return torch.cat([greedy(model, row[None], n, **generate_kwargs) for row in ids])
    _forget(model)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": n, "do_sample": False, "eos_token_id": None, **generate_kwargs},
    )
    return out[:, ids.shape[1] :]
