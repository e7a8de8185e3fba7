"""Calls of the functions and layers of flash-linear-attention, and what they compute without a GPU.

Its Triton kernels run in Triton's interpreter here, which needs TRITON_INTERPRET=1 before triton is imported: in
processes of their own, python -m tests.spelled.fla_table.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

B, H, K, V, M = 2, 2, 16, 16, 16
TOKENS = 32  # of a run
DRAWS = {  # argument -> its kind, unless a function says another
    "q": "k", "r": "k", "k": "unit-k", "p": "unit-k", "kk": "unit-k", "v": "v", "s": "m", "g": "gate-s", "gk": "gate-k",
    "w": "gate-k", "beta": "rate-s", "g_atk": "gate-s", "beta_atk": "rate-s", "a": "unit-k", "b": "rate-k",
}  # fmt: skip
FIXED = {"layer_idx": 1, "num_layers": 4, "num_householder": 2}
OTHER: dict[str, dict[str, str]] = {  # function -> argument -> kind, "" for none
    **dict.fromkeys(("fused_recurrent_kda", "chunk_kda", "chunk_gla"), {"g": "gate-k"}),
    **dict.fromkeys(("fused_recurrent_precond_kda", "chunk_precond_kda"), {"g": "gate-k"}),
    **dict.fromkeys(("fused_recurrent_gdn2", "chunk_gdn2"), {"g": "gate-k", "w": "rate-v"}),
    **dict.fromkeys(("fused_recurrent_gsa", "fused_recurrent_gsa_inference", "chunk_gsa"), {"g": "gate-m"}),
    **dict.fromkeys(("fused_recurrent_gated_oja_rule", "chunk_gated_oja_rule"), {"v": "unit-v", "gv": "gate-v"}),
    **dict.fromkeys(("chunk_linear_attn", "fused_chunk_linear_attn"), {"q": "rate-k", "k": "rate-k"}),
    "fused_recurrent_gla": {"gk": "gate-k"},
    "fused_mul_recurrent_rwkv7": {"a": "rate-k"},
}  # fmt: skip
NO_PROMPT = {"ABCAttention": "Triton's interpreter cannot run it"}  # layers that are only run compiled
HALF = ("chunk_delta_rule", "chunk_gated_delta_product")  # refuse float32: against the fused function of their kind
REFUSED = {
    "chunk_abc": "Triton's interpreter cannot run it",
    "chunk_dplr_delta_rule": "Triton's interpreter cannot run it",
    "chunk_rwkv7": "Triton's interpreter cannot run it",
    **dict.fromkeys(HALF, "refuses float32"),
}
SMALL = {"hidden_size": 32, "num_heads": 2}
HEADS = {**SMALL, "head_dim": 16}
LOW = {"decay_low_rank_dim": 8, "gate_low_rank_dim": 8, "a_low_rank_dim": 8, "v_low_rank_dim": 8}
LAYERS: dict[str, dict[str, Any]] = {
    "ABCAttention": {**SMALL, "num_slots": 16, "expand_k": 1, "expand_v": 1, "use_rope": False},
    "Comba": {**HEADS, "expand_v": 1},
    "DeltaNet": SMALL,
    "GatedDeltaNet": {**HEADS, "expand_v": 1},
    "GatedDeltaNet2": {**HEADS, "expand_v": 1},
    "GatedDeltaProduct": {**HEADS, "expand_v": 1, "num_householder": 2},
    "GatedLinearAttention": {**SMALL, "expand_k": 1},
    "GatedSlotAttention": {**SMALL, "num_slots": 16},
    "HGRN2Attention": {"hidden_size": 32, "expand_ratio": 16},
    "KimiDeltaAttention": HEADS,
    "LightNetAttention": {"hidden_size": 32, "expand_ratio": 16},
    "LinearAttention": {**SMALL, "mode": "fused_recurrent"},
    "PrecondGatedDeltaNet": {**HEADS, "expand_v": 1},
    "PrecondKDA": HEADS,
    "RWKV6Attention": {**SMALL, "proj_low_rank_dim": 8, "gate_low_rank_dim": 8},
    "RWKV7Attention": {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, **LOW},
    "RodimusAttention": {"hidden_size": 32},
    "SimpleGatedLinearAttention": SMALL,
    "MultiScaleRetention": SMALL,
    "Raven": {**SMALL, "num_slots": 16, "topk": 4},
    "YOCOGatedRetention": SMALL,
    "Mamba2": {"hidden_size": 32, "head_dim": 16, "state_size": 16},
    "Mamba": {"hidden_size": 32, "state_size": 8, "intermediate_size": 48},
    "HGRNAttention": {"hidden_size": 32},
    "MesaNet": HEADS,
    "MomentumDeltaNet": HEADS,
}
WITHOUT = {  # layers with a recurrent state that are not run here -> why
    "CyclicFlowAttention": "fused_recurrent_cyfa: see there; it wants CUDA tensors",
    "LogLinearMamba2": "chunk_log_linear_attn: see there; the layer has no other path than CUDA kernels of mamba_ssm",
    "Mamba3": "the layer has no other path than CUDA kernels of mamba_ssm",
    "MomAttention": "which memory takes a token is chosen by its values, and the lengths of the sequences that this "
    "makes are read on the host: no graph holds a step, under any backend",
}


def interpret() -> None:
    """Import all of fla.ops so that its kernels run in Triton's interpreter, and fill in what that lacks."""
    import fla.ops
    from fla.ops.utils import op
    from triton import language as tl
    from triton.runtime import autotuner

    for found in pkgutil.iter_modules(fla.ops.__path__):
        importlib.import_module(f"fla.ops.{found.name}")
    autotuner.Autotuner.run = _first_config
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops", "fla.modules")):
            vars(module)["range"] = _range  # kernels call methods of a loop's counter
    known = {name: getattr(op.tldevice, name) for name in dir(op.tldevice) if not name.startswith("_")}
    op.tldevice = types.SimpleNamespace(**{**known, "log1p": lambda x: tl.log(1 + x)})


def _first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """There is nothing to time."""
    return self.fn.run(*args, **{**self.configs[0].all_kwargs(), **kwargs})


class _Counter(int):
    def to(self, *_: Any) -> _Counter:
        return self


def _range(*bounds: Any) -> list[_Counter]:
    return [_Counter(i) for i in builtins.range(*(int(x) for x in bounds))]


def exported() -> dict[str, Callable[..., Any]]:
    """Every function that fla.ops and its packages export as one that steps or chunks through tokens, and not as the
    forward or backward half of one."""
    import fla.ops

    packages = [fla.ops] + [
        importlib.import_module(f"fla.ops.{m.name}") for m in pkgutil.iter_modules(fla.ops.__path__)
    ]
    starts = ("fused_recurrent_", "fused_mul_recurrent_", "chunk_", "fused_chunk_", "mesa_net_decoding")
    names = {
        (package, name) for package in packages for name in getattr(package, "__all__", ()) if name.startswith(starts)
    }
    found = {n: getattr(package, n) for package, n in names if not re.search("_(fwd|bwd)(_|$)", n)}
    return {name: found[name] for name in sorted(found)}


def draw(kind: str, tokens: int, g: torch.Generator) -> Tensor:
    """kind: a size (k, v, m a slot, s a head), behind what the values are: unit vectors, gates (log-decays that keep
    most of a state for dozens of tokens) or rates."""
    what, _, size = kind.rpartition("-")
    x = torch.randn(B, tokens, H, *{"k": (K,), "v": (V,), "m": (M,), "s": ()}[size], generator=g)
    changes = {
        "unit": lambda: normalize(x, dim=-1),
        "gate": lambda: logsigmoid(x + 3.0),
        "rate": lambda: torch.sigmoid(x),
    }
    return changes[what]() if what else x


def inputs(function: Callable[..., Any], tokens: int, g: torch.Generator) -> dict[str, Any]:
    """Arguments of one call, without its states."""
    name = function.__name__
    kinds = OTHER.get(name, {})
    found: dict[str, Any] = {}
    for p in inspect.signature(function).parameters.values():
        if p.name in kinds or (
            p.name in DRAWS and (p.default is p.empty or p.name in ("g", "beta", "g_atk", "beta_atk"))
        ):
            steps = FIXED["num_householder"] if "product" in name and p.name in ("k", "v", "beta") else 1
            found[p.name] = draw(kinds.get(p.name, DRAWS.get(p.name, "")), tokens * steps, g)
        elif p.name in FIXED:
            found[p.name] = FIXED[p.name]
        elif p.name == "u":
            found["u"] = torch.randn(H, K, generator=torch.Generator().manual_seed(1))
    if "rwkv7" in name and "mul" not in name or "plr" in name:
        found["b"] = -found["a"] * found["b"]
    return found


def states(name: str, g: torch.Generator) -> dict[str, Any]:
    """What a call begins with, by argument."""
    if "gsa" in name or "abc" in name:
        return {"initial_state": (torch.randn(B, H, K, M, generator=g), torch.randn(B, H, M, V, generator=g))}
    matrix = torch.randn(B, H, K, V, generator=g)
    if "lightnet" in name:
        return {"initial_state": (matrix, torch.randn(B, 1, H, K, generator=g))}
    if name in ("chunk_linear_attn", "fused_chunk_linear_attn"):
        return {"initial_state": (matrix, torch.rand(B, 1, H, K, generator=g))}
    sums = {"initial_A_state": torch.rand(B, H, K, generator=g)} if "precond" in name else {}
    return {"initial_state": matrix, **sums}
