"""Sizes that the engines' GPU kernels take: the recipes' own are the smallest for a CPU."""

from __future__ import annotations

from . import recipes, weights


def enlarge() -> None:
    """Make checkpoints of about 20 MB from here on: hidden size 256, 32 experts of width 128."""
    recipes.VOCAB, recipes.HIDDEN, recipes.MOE_WIDTH, recipes.EXPERTS = 1024, 256, 128, 32
    recipes.HEAD_DIM = 128
    recipes._COMMON.update(vocab_size=recipes.VOCAB, hidden_size=recipes.HIDDEN)
    recipes._LINEAR_ATTENTION.update(
        head_dim=recipes.HEAD_DIM, linear_key_head_dim=128, linear_value_head_dim=128
    )
    recipes._QWEN_MOE.update(
        moe_intermediate_size=recipes.MOE_WIDTH,
        shared_expert_intermediate_size=recipes.MOE_WIDTH,
        num_experts=recipes.EXPERTS,
    )
    weights.INIT_STD = 0.1
