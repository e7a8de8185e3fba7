"""What the rewrite adds to compiling: seconds by stage for decode graphs of Qwen3-Next, and their share of the compile.

    python -m benchmarks.lift --layers 12 24 48 --out benchmarks/results/lift.json
    python -m benchmarks.lift --layers 48 --inner eager --kda        without Inductor: the stages alone

Widths are tiny: the graph has the nodes of a real model. kernels: the time to build the steps' C++ kernels, which is
no part of lifting. Each count of layers compiles once, Inductor's caches off. --kda adds five tokens of KDA (Kimi
Linear's layers with the recurrence unrolled) in one graph.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, StaticCache

from benchmarks.run import machine
from kvbuffer_compile import backend, planning
from kvbuffer_compile.steps import targets

STAGES = {"lift": (backend, "lift"), "choose": (planning, "explain_choice"), "validate": (planning, "validate"),
          "splice": (backend, "splice"), "kernels": (targets, "build")}  # fmt: skip
CAPACITY = 64


class Stages:
    """Seconds spent in each stage while it is entered; nodes and buffered states of the graphs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.nodes = self.states = 0
        self._original: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Stages:
        for name, (module, attribute) in STAGES.items():
            self._original[name] = getattr(module, attribute)
            setattr(module, attribute, self._timed(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, self._original[name])

    def _timed(self, name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "lift" and isinstance(args[0], GraphModule):
                self.nodes = max(self.nodes, len(args[0].graph.nodes))
            start = time.perf_counter()
            try:
                out = self._original[name](*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
            self.states = max(self.states, len(out.found) if name == "lift" else 0)
            return out

        return run


def qwen3_next(layers: int, batch: int) -> Callable[[], Tensor]:
    """One decode step: three layers of Gated DeltaNet for each of attention, four small experts in all."""
    config = Qwen3NextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen3NextForCausalLM._from_config(config, dtype=torch.float32).eval()
    cache = StaticCache(config=config, max_cache_len=CAPACITY)
    model(torch.zeros(batch, 8, dtype=torch.long), past_key_values=cache, use_cache=True)
    position = torch.tensor([[8]]).expand(batch, 1)
    token = torch.zeros(batch, 1, dtype=torch.long)
    return lambda: model(token, past_key_values=cache, position_ids=position, use_cache=True).logits


def kda(tokens: int = 5, layers: int = 8) -> Callable[[], Tensor]:
    """Tokens of Kimi Delta Attention, unrolled, layer after layer, each with a convolution and a gated norm."""
    B, H, K, V, D = 1, 4, 16, 16, 64
    g = torch.Generator().manual_seed(0)
    weights = [[torch.randn(D, n, generator=g) / 8 for n in (H * K, H * K, H * V, H * K, H)] for _ in range(layers)]
    back = [torch.randn(H * V, D, generator=g) / 8 for _ in range(layers)]
    states = [torch.randn(B, H, K, V, generator=g) for _ in range(layers)]
    x = torch.randn(B, tokens, D, generator=g)

    def layer(x: Tensor, S: Tensor, w: list[Tensor], out: Tensor) -> Tensor:
        q, k, v, a, b = ((x @ y).unflatten(-1, (H, -1)).transpose(1, 2) for y in w)
        q, k = (torch.nn.functional.normalize(torch.nn.functional.silu(y), dim=-1) for y in (q, k))
        decay, beta, rows, new = -torch.nn.functional.softplus(a), torch.sigmoid(b), [], S
        for t in range(tokens):
            new = new * decay[:, :, t, :, None].exp()
            error = v[:, :, t] - (new * k[:, :, t, :, None]).sum(-2)
            new = new + (k[:, :, t] * beta[:, :, t])[..., None] * error[..., None, :]
            rows.append((new * q[:, :, t, :, None]).sum(-2))
        S.copy_(new)
        y = torch.stack(rows, 1) * torch.sigmoid(v.transpose(1, 2))
        return x + torch.nn.functional.rms_norm(y, (V,)).flatten(-2) @ out

    def run() -> Tensor:
        y = x
        for S, w, out in zip(states, weights, back, strict=True):
            y = layer(y, S, w, out)
        return y

    return run


@torch.no_grad()
def measure(name: str, step: Callable[[], Tensor], inner: str) -> dict[str, Any]:
    """One compilation, cold."""
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options={"flush": 16, "inner": inner})
    with Stages() as stages, fresh_cache():
        start = time.perf_counter()
        compiled()
        total = time.perf_counter() - start
    ours = sum(s for stage, s in stages.seconds.items() if stage != "kernels")
    row = {"name": name, "inner": inner, "nodes": stages.nodes, "states": stages.states, "compile_s": total}
    row |= {f"{stage}_s": s for stage, s in stages.seconds.items()}
    row |= {"ours_s": ours, "share": ours / total}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[12, 24, 48])
    parser.add_argument("--inner", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--kda", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="rows of the same name and inner are replaced")
    args = parser.parse_args()
    measure("warm-up", kda(2, 1), "eager")  # imports and one-time work of Dynamo
    cases = [(f"qwen3_next, {n} layers", lambda n=n: qwen3_next(n, 2)) for n in args.layers]
    cases += [("kda, 5 tokens", kda)] if args.kda else []
    rows = []
    for name, make in cases:
        rows.append(measure(name, make(), args.inner))
        print(rows[-1], flush=True)
    if args.out is not None:
        known = json.loads(args.out.read_text())["cases"] if args.out.exists() else []
        new = {(r["name"], r["inner"]) for r in rows}
        kept = [r for r in known if (r["name"], r["inner"]) not in new]
        args.out.write_text(json.dumps({"machine": machine(), "cases": kept + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
