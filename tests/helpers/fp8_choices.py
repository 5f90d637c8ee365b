"""Sets of layers in FP8, for tests of the planner."""

from deepseek_v3.planning.fp8_choice import DENSE_NETWORK, ROUTED_EXPERTS, SHARED_EXPERTS

PROJECTIONS = frozenset(
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
NETWORKS = frozenset((DENSE_NETWORK, SHARED_EXPERTS, ROUTED_EXPERTS))
EVERY_LAYER = PROJECTIONS | NETWORKS
