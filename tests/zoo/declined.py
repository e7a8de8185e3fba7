"""Tiny configurations of the architectures that must be declined, each for another reason.

mamba, falcon_mamba, jamba and zamba: the decay is dense over the state. rwkv and recurrent_gemma: vectors.
lfm2: a shift register. zaya: a "recurrent state" that is overwritten by every token.
"""

from __future__ import annotations

from typing import Any

from tests.zoo.configs import ATTENTION, FULL, HYBRID, LINEAR

DECLINED: dict[str, dict[str, Any]] = {
    "mamba": dict(state_size=8, num_hidden_layers=2, time_step_rank=4),
    "falcon_mamba": dict(state_size=8, num_hidden_layers=2, time_step_rank=4),
    "jamba": dict(
        **ATTENTION,
        intermediate_size=48,
        num_hidden_layers=3,
        num_experts=4,
        attn_layer_period=3,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "zamba": dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        intermediate_size=48,
        num_hidden_layers=3,
        layers_block_type=[LINEAR, HYBRID, LINEAR],
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "rwkv": dict(num_hidden_layers=2, context_length=2048, attention_hidden_size=32, intermediate_size=48),
    "recurrent_gemma": dict(
        num_attention_heads=4,
        intermediate_size=96,
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=64,
    ),
    "lfm2": dict(
        **ATTENTION,
        intermediate_size=48,
        block_multiple_of=16,
        num_hidden_layers=3,
        layer_types=["conv", "conv", FULL],
    ),
    "zaya": dict(
        **ATTENTION,
        head_dim=8,
        num_hidden_layers=2,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=1,
        router_hidden_size=16,
    ),
}
