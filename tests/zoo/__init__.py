"""Real transformers architectures, tiny, with random weights that remember.

    model = make_model("qwen3_next")
    step, states = decode_step(model, batch=2, cache="static")
    tokens = greedy(model, prompt(2, 8), 64)

`ARCHS` says of each what the compiler should do with it: how many states it buffers and what touches each one
(D decay, R read, U update), or that it has to decline. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tests.zoo.build import bare_model, skip_where_nothing_compiles
from tests.zoo.configs import VOCAB
from tests.zoo.decoding import DecodeStep, decode_step, greedy, prefilled, prompt, states_of
from tests.zoo.measure import Text, greedy_text
from tests.zoo.weights import remember

__all__ = [
    "ARCHS",
    "VOCAB",
    "Arch",
    "DecodeStep",
    "Text",
    "decode_step",
    "greedy",
    "greedy_text",
    "make_model",
    "prefilled",
    "prompt",
    "skip_where_nothing_compiles",
    "states_of",
]


@dataclass(frozen=True)
class Arch:
    """One architecture and what is expected of the compiler.

    states: matrix states of the tiny model that are buffered; 0 where everything is declined.
    signature: the ops on each state, "" where declined.
    static_cache: its decode step runs with a StaticCache (the others bring a cache of their own).
    fullgraph: one decode step is one graph.
    remembers: it has a recurrent state at all (shift registers and overwritten states are not).
    seed: of the weights behind make_model(seed=0), chosen so that the greedy text of 256 tokens after
        prompt(3, 8) in float32 has no loop within 200 tokens and no choice by less than 1e-4 of the
        largest logit. Other prompts and seeds were not searched and may hold a near-tie.
    """

    name: str
    states: int
    signature: str
    static_cache: bool = True
    fullgraph: bool = True
    remembers: bool = True
    seed: int = 0

    def make(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return make_model(self.name, dtype)


_ROWS = (
    Arch("qwen3_next", 2, "DRUR"),
    Arch("qwen3_5", 2, "DRUR"),
    Arch("qwen3_5_moe", 2, "DRUR"),
    Arch("olmo_hybrid", 2, "DRUR", seed=1),
    Arch("qwen4_exp", 2, "DRUR", fullgraph=False, seed=1),
    Arch("kimi_linear", 2, "DRUR"),
    Arch("glm5_next", 2, "DRUR", seed=2),
    Arch("bailing_hybrid", 2, "DRUR", seed=2),
    Arch("mamba2", 2, "DUR"),
    Arch("bamba", 2, "DUR"),
    Arch("falcon_h1", 2, "DUR", seed=1),
    Arch("granitemoehybrid", 2, "DUR"),
    Arch("nemotron_h", 2, "DUR"),
    Arch("zamba2", 3, "DUR", seed=1),
    Arch("minimax", 2, "DUR", static_cache=False, seed=3),
    Arch("xlstm", 2, "DUR", static_cache=False),
    Arch("mamba", 0, "", seed=1),
    Arch("falcon_mamba", 0, ""),
    Arch("jamba", 0, "", seed=1),
    Arch("zamba", 0, "", seed=4),
    Arch("rwkv", 0, "", static_cache=False, seed=1),
    Arch("recurrent_gemma", 0, ""),
    Arch("lfm2", 0, "", remembers=False),
    Arch("zaya", 0, "", remembers=False, seed=13),
)
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ROWS}


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The tiny model of `name` in eval mode: same name and seed, same weights, in every dtype."""
    seed += ARCHS[name].seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = bare_model(name, torch.float32)
        remember(model, seed)
        return model if dtype == torch.float32 else _in_dtype(model, name, dtype)


@torch.no_grad()
def _in_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The rounded weights, each tensor in the dtype that the library gives it in a model of `dtype`."""
    rounded = bare_model(name, dtype)
    for target, source in ((rounded.parameters(), model.parameters()), (rounded.buffers(), model.buffers())):
        for new, old in zip(target, source, strict=True):
            new.copy_(old)
    return rounded
