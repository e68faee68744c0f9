"""Sizes that the engines' GPU kernels take: the recipes' own are the smallest for a CPU."""

from __future__ import annotations

from . import models, weights


def enlarge(width: int = 128) -> None:
    """Make checkpoints of about 20 MB from here on: hidden size 256, 32 experts of ``width``."""
    models.VOCAB, models.HIDDEN, models.MOE_WIDTH, models.EXPERTS = 1024, 256, width, 32
    models.HEAD_DIM = 128
    models.COMMON.update(vocab_size=models.VOCAB, hidden_size=models.HIDDEN)
    models.LINEAR_ATTENTION.update(
        head_dim=models.HEAD_DIM, linear_key_head_dim=128, linear_value_head_dim=128
    )
    models.QWEN_MOE.update(
        moe_intermediate_size=models.MOE_WIDTH,
        shared_expert_intermediate_size=models.MOE_WIDTH,
        num_experts=models.EXPERTS,
    )
    weights.INIT_STD = 0.1
