"""Tiny configurations of the architectures that are buffered: few layers, and K != V where the class allows.

Keyword arguments only; `build.py` makes models of them.
"""

from __future__ import annotations

from typing import Any

VOCAB = 97
LINEAR, FULL, INDEXED, HYBRID = "linear_attention", "full_attention", "indexed_attention", "hybrid"

# Without an end of text, so that greedy text has the length that was asked for.
BASE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
ATTENTION: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
EXPERTS: dict[str, Any] = dict(moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4)
# Gated DeltaNet: 2 key heads serve 4 value heads, K = 8, V = 12.
GDN: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12
)
# Multi-head latent attention, as the models with KDA layers use it.
LATENT: dict[str, Any] = dict(kv_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8, n_group=1, topk_group=1)
# The SSD layers of the Bamba family: 4 heads of V = 16, K = 8, two groups of keys.
BAMBA: dict[str, Any] = dict(
    mamba_n_heads=4, mamba_d_state=8, mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=8
)

BUFFERED: dict[str, dict[str, Any]] = {
    "qwen3_next": dict(
        **ATTENTION,
        **GDN,
        **EXPERTS,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=3,
        shared_expert_intermediate_size=16,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "qwen3_5": dict(
        **ATTENTION,
        **GDN,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "qwen3_5_moe": dict(
        **ATTENTION,
        **GDN,
        **EXPERTS,
        head_dim=8,
        num_hidden_layers=3,
        shared_expert_intermediate_size=16,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "olmo_hybrid": dict(
        **ATTENTION,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_allow_neg_eigval=True,
        intermediate_size=48,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "qwen4_exp": dict(
        **ATTENTION,
        **GDN,
        **EXPERTS,
        head_dim=8,
        num_hidden_layers=3,
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=16,
        indexer_compress_ratio=4,
        layer_types=[LINEAR, LINEAR, INDEXED],
    ),
    "kimi_linear": dict(
        **LATENT,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        qk_rope_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_experts_per_tok=2,
        num_local_experts=4,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "glm5_next": dict(
        **LATENT,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        qk_rope_head_dim=0,
        q_lora_rank=16,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        linear_head_dim=8,
        linear_num_heads=4,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        index_topk=16,
        index_kpool=4,
        index_head_dim=8,
        index_n_heads=2,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=[LINEAR, LINEAR, INDEXED],
    ),
    "bailing_hybrid": dict(
        **LATENT,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        qk_rope_head_dim=8,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_local_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8, n_groups=2, expand=2, num_hidden_layers=2, chunk_size=8),
    "bamba": dict(**ATTENTION, **BAMBA, intermediate_size=48, num_hidden_layers=3, attn_layer_indices=[2]),
    "falcon_h1": dict(**ATTENTION, **BAMBA, mamba_d_ssm=64, intermediate_size=48, num_hidden_layers=2, head_dim=8),
    "granitemoehybrid": dict(
        **ATTENTION,
        **BAMBA,
        intermediate_size=16,
        shared_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
    ),
    "nemotron_h": dict(
        **ATTENTION,
        layers_block_type=[LINEAR, "moe", FULL, LINEAR],
        head_dim=8,
        intermediate_size=48,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
    ),
    "zamba2": dict(
        num_attention_heads=4,
        max_position_embeddings=2048,
        num_hidden_layers=3,
        layers_block_type=[LINEAR, HYBRID, LINEAR],
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=4,
        chunk_size=8,
        intermediate_size=48,
        adapter_rank=4,
    ),
    # Attention first: with a linear layer 0 the library's own mask for T > 1 on a cache is wrong.
    "minimax": dict(
        **ATTENTION,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        block_size=8,
        layer_types=[FULL, LINEAR, LINEAR],
    ),
    # The widths of keys and values must be multiples of 64: K = 16, V = 32.
    "xlstm": dict(hidden_size=64, num_heads=4, qk_dim_factor=1.0, v_dim_factor=2.0, num_hidden_layers=2, chunk_size=16),
}
