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

from tests.zoo.build import bare_model
from tests.zoo.configs import VOCAB
from tests.zoo.decoding import DecodeStep, decode_step, greedy, prefilled, prompt, states_of
from tests.zoo.weights import remember

__all__ = [
    "ARCHS",
    "VOCAB",
    "Arch",
    "DecodeStep",
    "decode_step",
    "greedy",
    "make_model",
    "prefilled",
    "prompt",
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
    """

    name: str
    states: int
    signature: str
    static_cache: bool = True
    fullgraph: bool = True
    remembers: bool = True

    def make(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return make_model(self.name, dtype)


_ROWS = (
    Arch("qwen3_next", 2, "DRUR"),
    Arch("qwen3_5", 2, "DRUR"),
    Arch("qwen3_5_moe", 2, "DRUR"),
    Arch("olmo_hybrid", 2, "DRUR"),
    Arch("qwen4_exp", 2, "DRUR", fullgraph=False),
    Arch("kimi_linear", 2, "DRUR"),
    Arch("glm5_next", 2, "DRUR"),
    Arch("bailing_hybrid", 2, "DRUR"),
    Arch("mamba2", 2, "DUR"),
    Arch("bamba", 2, "DUR"),
    Arch("falcon_h1", 2, "DUR"),
    Arch("granitemoehybrid", 2, "DUR"),
    Arch("nemotron_h", 2, "DUR"),
    Arch("zamba2", 3, "DUR"),
    Arch("minimax", 2, "DUR", static_cache=False),
    Arch("xlstm", 2, "DUR", static_cache=False),
    Arch("mamba", 0, ""),
    Arch("falcon_mamba", 0, ""),
    Arch("jamba", 0, ""),
    Arch("zamba", 0, ""),
    Arch("rwkv", 0, "", static_cache=False),
    Arch("recurrent_gemma", 0, ""),
    Arch("lfm2", 0, "", remembers=False),
    Arch("zaya", 0, "", remembers=False),
)
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ROWS}


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The tiny model of `name` in eval mode: same name and seed, same weights, in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = bare_model(name, dtype)
    remember(model, seed)
    return model
