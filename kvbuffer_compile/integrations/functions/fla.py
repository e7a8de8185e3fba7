"""flash-linear-attention 0.6: for each function that hides a recurrence, which one, and its arguments.

A function that is not served has the reason in its place. The signatures are checked against the installed library by
tests/lift/test_fla.py.
"""

from __future__ import annotations

from kvbuffer_compile.integrations.functions import recurrences as r
from kvbuffer_compile.integrations.functions import several
from kvbuffer_compile.integrations.functions.known import Known, known

STATE = "scale=None initial_state=None output_final_state=False"
PACKED = "cu_seqlens=None cu_seqlens_cpu=None"
GATES = "g=None gk=None gv=None beta=None"
SIGMOID = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False"
NORM = "use_qk_l2norm_in_kernel=False"
IN_KERNEL = "use_gate_in_kernel=False"
BEHIND = "A_log=None dt_bias=None chunk_size=64"  # taken out of keyword arguments
SUMS = "initial_A_state=None"
SQUASH = "x=1.5 eps=1e-6 log_atk_scale=None"
FLIPPED = "transpose_state_layout>state_v_first=False"
CONJUGATE = (
    "reads one of its states some 30 times a token (conjugate gradients), so that writing it once is no matter; the "
    "other one, of keys and values, is buffered where the layer is written out in plain torch"
)
NO_STATE = "takes no state: it computes whole sequences at once"
VECTOR = "its state is a vector: a token's update would be as large as the state"
NO_RECURRENCE = "a sum over tokens, which keeps no state"
MOMENTUM = (
    "two matrices feed each other: every token adds the whole of one to the other, which no few rows can stand for; "
    "the delta rules without momentum are served"
)
LEVELS = "a state for each power of two tokens, merged as a counter says: no recurrence of one matrix"
NONLINEAR = (
    "a mini-batch of tokens takes a gradient step through a layer norm, and is not written down here; its token in "
    "plain torch is served"
)
TURNING = (
    "reads slots through a table that turns with a sum of angles beside the state, and is not written down here; its "
    "token in plain torch is studied like any other"
)
GDN_CHUNK = f"q k v g beta {STATE} {NORM} {SIGMOID} state_v_first=False {PACKED} chunk_indices=None cp_context=None"
GDN_STEP = (
    f"q k v {GATES} {STATE} {NORM} {IN_KERNEL} A_log=None dt_bias=None {SIGMOID} state_v_first=False cu_seqlens=None **"
)

SERVED: dict[str, Known] = {
    # linear attention, with gates
    "fused_recurrent_gla": known(
        r.gated, f"q k v gk=None gv=None {STATE} reverse=False state_v_first=False cu_seqlens=None **"
    ),
    "chunk_gla": known(r.gated, f"q k v g>gk {STATE} state_v_first=False {PACKED}"),
    "fused_recurrent_simple_gla": known(
        r.gated, f"q k v g=None g_gamma=None {STATE} reverse=False state_v_first=False cu_seqlens=None **"
    ),
    "chunk_simple_gla": known(
        r.gated, f"q k v g=None g_gamma=None {STATE} state_v_first=False {PACKED} ** chunk_size=None"
    ),
    "fused_chunk_simple_gla": known(r.gated, f"q k v g=None g_gamma=None {STATE} cu_seqlens=None"),
    "fused_recurrent_retention": known(
        r.retention, f"q k v {STATE} reverse=False state_v_first=False cu_seqlens=None **"
    ),
    "chunk_retention": known(r.retention, f"q k v {STATE} cu_seqlens=None ** chunk_size=None"),
    "fused_chunk_retention": known(r.retention, f"q k v {STATE} cu_seqlens=None"),
    "fused_recurrent_lightning_attn": known(
        r.lightning, f"q k v layer_idx num_layers {STATE} reverse=False cu_seqlens=None"
    ),
    "chunk_lightning_attn": known(
        r.lightning, f"q k v layer_idx num_layers {STATE} cu_seqlens=None ** chunk_size=None"
    ),
    "fused_recurrent_linear_attn": known(
        several.normalised_linear, f"q k v {STATE} reverse=False normalize=False cu_seqlens=None"
    ),
    "chunk_linear_attn": known(several.normalised_linear, f"q k v {STATE} normalize=True cu_seqlens=None"),
    "fused_chunk_linear_attn": known(several.normalised_linear, f"q k v {STATE} normalize=True cu_seqlens=None"),
    "fused_recurrent_lightnet": known(several.lightnet, f"q k v {STATE} state_v_first=False cu_seqlens=None"),
    "chunk_lightnet": known(several.lightnet, f"q k v {STATE} state_v_first=False cu_seqlens=None"),
    # slots
    "fused_recurrent_gsa": known(several.gated_slots, f"q k v s g=None {STATE} reverse=False cu_seqlens=None"),
    "fused_recurrent_gsa_inference": known(
        several.slots, "q k v s g initial_state=None output_final_state=False scale=1.0"
    ),
    "chunk_gsa": known(several.gated_slots, f"q k v s g=None {STATE} checkpoint_level=2 {PACKED} ** chunk_size=None"),
    "chunk_abc": known(several.slots, "q k v s initial_state=None output_final_state=False"),
    # delta rules
    "fused_recurrent_delta_rule": known(r.delta, f"q k v beta=None {STATE} {NORM} cu_seqlens=None"),
    "chunk_delta_rule": known(r.delta, f"q k v beta {STATE} {NORM} {PACKED} ** chunk_size=64"),
    "fused_recurrent_gated_delta_rule": known(r.delta, GDN_STEP),
    "fused_recurrent_gdn": known(r.delta, GDN_STEP),
    "chunk_gated_delta_rule": known(r.delta, f"{GDN_CHUNK} ** {IN_KERNEL} {BEHIND}"),
    "chunk_gdn": known(r.delta, f"{GDN_CHUNK} ** {IN_KERNEL} {BEHIND}"),
    "fused_recurrent_kda": known(
        r.delta,
        f"q k v g>gk beta A_log=None dt_bias=None {STATE} {NORM} {IN_KERNEL} {SIGMOID} lower_bound=None "
        "state_v_first=False cu_seqlens=None **",
    ),
    "chunk_kda": known(
        r.delta,
        f"q k v g>gk beta {STATE} {NORM} {IN_KERNEL} {SIGMOID} safe_gate=False lower_bound=None "
        f"disable_recompute=False return_intermediate_states=False state_v_first=False {PACKED} cp_context=None "
        f"use_graph=False max_num_seqs=None ** {BEHIND}",
    ),
    "fused_recurrent_gdn2": known(
        r.gdn2,
        f"q k v g>gk b w>write_gate A_log=None dt_bias=None {STATE} {NORM} {IN_KERNEL} lower_bound=None "
        "state_v_first=False cu_seqlens=None **",
    ),
    "chunk_gdn2": known(
        r.gdn2,
        f"q k v g>gk b w>write_gate {STATE} {NORM} {IN_KERNEL} {PACKED} safe_gate=False lower_bound=None "
        f"disable_recompute=False return_intermediate_states=False state_v_first=False cp_context=None ** {BEHIND}",
    ),
    "fused_recurrent_comba": known(r.comba, f"q k p v g beta=None {STATE} {NORM} cu_seqlens=None"),
    "chunk_comba": known(r.comba, f"q k v p g beta=None {STATE} {NORM} {PACKED}"),
    "chunk_gated_delta_product": known(
        r.delta_product, f"q k v g beta num_householder {STATE} {NORM} {PACKED} cp_context=None"
    ),
    "fused_recurrent_gated_oja_rule": known(
        r.oja, f"q k v gv=None beta=None {STATE} use_q_l2norm=False use_k_l2norm=False cu_seqlens=None **"
    ),
    "chunk_gated_oja_rule": known(
        r.oja, f"q k v gv beta {STATE} use_q_l2norm=False use_k_l2norm=False {PACKED} ** chunk_size=64"
    ),
    "fused_recurrent_precond_gated_delta_rule": known(
        several.preconditioned,
        f"q k v {GATES} g_atk=None beta_atk=None scale=None initial_state=None {SUMS} output_final_state=False "
        f"use_qk_l2norm_in_kernel=True cu_seqlens=None {FLIPPED} {SQUASH}",
    ),
    "chunk_precond_gated_delta_rule": known(
        several.preconditioned_in_chunks,
        f"q k v g_atk g beta_atk beta scale=None initial_state=None {SUMS} output_final_state=False "
        f"use_qk_l2norm_in_kernel=True {PACKED} cp_context=None {FLIPPED} {SQUASH}",
    ),
    "fused_recurrent_precond_kda": known(
        several.preconditioned,
        f"q k v g>gk g_atk beta_atk beta A_log=None dt_bias=None scale=None initial_state=None {SUMS} "
        f"output_final_state=False use_qk_l2norm_in_kernel=True {IN_KERNEL} lower_bound=None cu_seqlens=None {FLIPPED} "
        f"{SQUASH} **",
    ),
    "chunk_precond_kda": known(
        several.preconditioned_kda_in_chunks,
        f"q k v g>gk g_atk beta_atk beta scale=None initial_state=None {SUMS} output_final_state=False {IN_KERNEL} "
        f"safe_gate=False lower_bound=None {PACKED} chunk_indices=None cp_context=None {FLIPPED} {SQUASH} "
        "solve_tril_precision=None disable_recompute=False return_intermediate_states=False ** A_log=None dt_bias=None "
        "use_qk_l2norm_in_kernel=True",
    ),
    # diagonal and low rank
    "fused_recurrent_dplr_delta_rule": known(r.low_rank, f"q k v a b gk {STATE} reverse=False cu_seqlens=None"),
    "chunk_dplr_delta_rule": known(
        r.low_rank,
        f"q k v a b gk {STATE} {PACKED} safe_gate=False chunk_size=None disable_recompute=False cp_context=None "
        "lower_bound>bound_of_gk=None **",
    ),
    "fused_recurrent_iplr_delta_rule": known(r.low_rank, f"q k v a b {STATE} cu_seqlens=None"),
    "chunk_iplr_delta_rule": known(r.low_rank, f"q k v a b {STATE} {PACKED} ** chunk_size=64"),
    "fused_recurrent_rwkv7": known(
        r.low_rank, "r>q w>gk k v a b scale=None initial_state=None output_final_state=True cu_seqlens=None"
    ),
    "chunk_rwkv7": known(
        r.low_rank,
        f"r>q w>gk k v a b scale=1.0 initial_state=None output_final_state=False {PACKED} safe_gate=False "
        "chunk_size=None disable_recompute=False cp_context=None lower_bound>bound_of_gk=None",
    ),
    "fused_mul_recurrent_rwkv7": known(
        r.rwkv7, "r>q w>gk k v kk a scale=1.0 initial_state=None output_final_state=False reverse=False cu_seqlens=None"
    ),
    "fused_recurrent_rwkv6": known(r.rwkv6, f"r>q k v w>gk u {STATE} reverse=False cu_seqlens=None"),
    "chunk_rwkv6": known(r.rwkv6, f"r>q k v w>gk u {STATE} {PACKED} ** chunk_size=None"),
}  # fmt: skip

UNSERVED: dict[str, str] = {
    **dict.fromkeys(("fused_recurrent_momentum_delta_rule", "chunk_momentum_delta_rule"), MOMENTUM),
    "chunk_momentum_delta_rule_ref": MOMENTUM,
    **dict.fromkeys(("chunk_mesa_net", "mesa_net_decoding_one_step"), CONJUGATE),
    **dict.fromkeys(("fused_recurrent_hgrn", "chunk_hgrn", "fused_recurrent_rwkv4"), VECTOR),
    **dict.fromkeys(("fused_recurrent_cyfa", "chunk_cyfa"), TURNING),
    **dict.fromkeys(("chunk_ttt_linear", "fused_chunk_ttt_linear"), NONLINEAR),
    "chunk_titans_linear": MOMENTUM,
    "chunk_log_linear_attn": LEVELS,
    "fused_chunk_based": NO_STATE,
    **{f"chunk_local_cumsum{of}": NO_RECURRENCE for of in ("", "_scalar", "_vector")},
    **{f"chunk_global_cumsum{of}": NO_RECURRENCE for of in ("", "_scalar", "_vector")},
    **dict.fromkeys(("fused_chunk_gla", "fused_chunk_delta_rule"), "the library itself raises: it was removed"),
}  # fmt: skip
