"""End to end for benchmarks.gpu: decode steps of a Qwen3.5-style hybrid, 4B shape, random weights, CUDA graphs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache

from benchmarks.gpu_sides import Place
from examples.batch_model import remembering
from kvbuffer_compile.backend import GraphRecord, observers

PROMPT, LONGEST = 4, 256
WARM = 6  # both sides compile in the first steps, kvbuffer once more when its states are guarded
SHAPE = {
    "vocab_size": 32768, "hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
LITTLE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip


def build(place: Place, layers: int) -> Qwen3_5ForCausalLM:
    """The model, the same weights at every call; decays that remember (0.5 to 0.999 a token)."""
    torch.manual_seed(0)
    period = min(4, layers)
    kinds = ["linear_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    config = Qwen3_5TextConfig(num_hidden_layers=layers, layer_types=kinds, **(LITTLE if place.dry else SHAPE))
    with torch.device(place.device):
        model = Qwen3_5ForCausalLM(config).eval()
    return remembering(model.to(torch.float32 if place.dry else torch.bfloat16))


class Decoder:
    """One side: a model with its cache, decoding given tokens."""

    def __init__(self, place: Place, batch: int, layers: int, **compile_arguments: Any) -> None:
        self.model, self.place, self.position = build(place, layers), place, 0
        self.cache = StaticCache(config=self.model.config, max_cache_len=LONGEST)
        self.forward(torch.arange(PROMPT, device=place.device).expand(batch, PROMPT))
        self.model.compile(**compile_arguments)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(self.position, self.position + length, device=self.place.device).expand(tokens.shape)
        self.position += length
        torch.compiler.cudagraph_mark_step_begin()
        out = self.model(tokens, past_key_values=self.cache, position_ids=positions, use_cache=True)
        return out.logits[:, -1].clone()  # type: ignore[no-any-return]

    def timed(self, tokens: Tensor) -> tuple[float, Tensor]:
        start = time.perf_counter()
        logits = self.forward(tokens)
        if not self.place.dry:
            torch.cuda.synchronize()
        return time.perf_counter() - start, logits


def sides(place: Place, batch: int, layers: int) -> dict[str, Decoder]:
    if place.dry:
        ours = {"flush": place.flush, "target": "triton", "inner": "eager"}
        return {
            "inductor": Decoder(place, batch, layers, backend="eager"),
            "kvbuffer": Decoder(place, batch, layers, backend="kvbuffer", options=ours),
        }
    return {
        name: Decoder(place, batch, layers, backend=name, mode="reduce-overhead") for name in ("inductor", "kvbuffer")
    }


def measure(place: Place, batch: int, layers: int) -> dict[str, Any]:
    """Milliseconds a step of both sides in turn, logits compared, and how many states were rewritten how."""
    layers, steps = (2, place.flush + 2) if place.dry else (layers, 34)
    torch._dynamo.reset()
    records: list[GraphRecord] = []
    observers.listeners.append(records.append)
    times: dict[str, list[float]] = {"inductor": [], "kvbuffer": []}
    both = sides(place, batch, layers)
    worst = 0.0
    try:
        for t in range(WARM + steps):
            token = torch.randint(0, 64, (batch, 1), generator=torch.Generator().manual_seed(t)).to(place.device)
            logits = {}
            for name, side in both.items():
                seconds, logits[name] = side.timed(token)
                if t >= WARM:
                    times[name].append(seconds * 1e3)
            scale = logits["inductor"].abs().max()
            worst = max(worst, float((logits["kvbuffer"] - logits["inductor"]).abs().max() / scale))
    finally:
        observers.listeners.remove(records.append)
    assert worst < (1e-4 if place.dry else 5e-2), f"logits differ by {worst:.3g} of the largest"
    rewritten = sorted({f"{plan.variant} L={plan.flush} {plan.target}" for r in records for _, plan in r.rewritten})
    mean = {name: statistics.mean(found) for name, found in times.items()}
    return {
        "layers": layers, "error": worst, "plans": rewritten,
        **{f"{name}_ms": value for name, value in mean.items()}, "gain": mean["inductor"] / mean["kvbuffer"],
    }  # fmt: skip
