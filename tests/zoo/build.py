"""Models of the tiny configurations, with the library's own random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.zoo.configs import BASE, BUFFERED, VOCAB
from tests.zoo.declined import DECLINED

# name -> what its classes in transformers begin with
PREFIXES = {
    "qwen3_next": "Qwen3Next",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
    "olmo_hybrid": "OlmoHybrid",
    "qwen4_exp": "Qwen4Exp",
    "kimi_linear": "KimiLinear",
    "glm5_next": "Glm5Next",
    "bailing_hybrid": "BailingHybrid",
    "mamba2": "Mamba2",
    "bamba": "Bamba",
    "falcon_h1": "FalconH1",
    "granitemoehybrid": "GraniteMoeHybrid",
    "nemotron_h": "NemotronH",
    "zamba2": "Zamba2",
    "minimax": "MiniMax",
    "xlstm": "xLSTM",
    "mamba": "Mamba",
    "falcon_mamba": "FalconMamba",
    "jamba": "Jamba",
    "zamba": "Zamba",
    "rwkv": "Rwkv",
    "recurrent_gemma": "RecurrentGemma",
    "lfm2": "Lfm2",
    "zaya": "Zaya",
}


def bare_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with the library's own random weights, in eval mode."""
    prefix = PREFIXES[name]
    if not any(hasattr(transformers, f"{prefix}{kind}") for kind in ("TextConfig", "Config")):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    config = config_class(**_arguments(name))
    if prefix == "Glm5Next":
        return transformers.Glm5NextForConditionalGeneration._from_config(_with_vision(config), dtype=dtype).eval()
    return getattr(transformers, f"{prefix}ForCausalLM")._from_config(config, dtype=dtype).eval()


def skip_where_nothing_compiles(name: str) -> None:
    """Skip a test of torch.compile where the library itself rules it out, whatever the backend."""
    if name == "recurrent_gemma":
        from transformers.models.recurrent_gemma import modeling_recurrent_gemma as modeling

        if hasattr(modeling, "_get_mask_sizes"):
            pytest.skip(
                f"transformers {transformers.__version__} binds functions to the cache in forward under other names "
                "than their own: torch.compile cannot write that back (AttributeError, with backend='eager' too)"
            )


def _arguments(name: str) -> dict[str, Any]:
    return {**BASE, **(BUFFERED | DECLINED)[name]}


def _with_vision(text: Any) -> Any:
    """GLM-5-Next has no text-only class: the smallest image tower it accepts is added and never used."""
    vision = dict(
        depth=1,
        hidden_size=16,
        num_heads=2,
        image_size=28,
        patch_size=14,
        out_hidden_size=32,
        intermediate_size=16,
        projection_intermediate_size=16,
    )
    tokens = {f"{kind}_token_id": VOCAB - 1 for kind in ("image", "video")}
    return transformers.Glm5NextConfig(
        text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=False, **tokens
    )
