"""Tiny models of transformers, a builder each: the architecture and its config.

The dimensions are the smallest that the engines' CPU kernels take: attention head_dim 32, linear-attention
head dims 64 (32 is refused by the C++ kernel), hidden size a multiple of 32.
"""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, MOE_WIDTH, EXPERTS, HEAD_DIM = 256, 64, 32, 8, 32

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    # Room for the prompts and answers of `fse-patch compare`.
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_MOE: dict[str, Any] = {
    "moe_intermediate_size": MOE_WIDTH,
    "shared_expert_intermediate_size": MOE_WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
}
# Sizes that two ranks share without padding, which SGLang would add on a CPU.
FOR_TWO_RANKS: dict[str, Any] = {"num_key_value_heads": 2, "moe_intermediate_size": 2 * MOE_WIDTH}


def qwen2_moe(shared_times: int = 1, renormalize: bool = False, two_ranks: bool = False) -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    dims = {**COMMON, **QWEN_MOE, "num_experts_per_tok": 2, **(FOR_TWO_RANKS if two_ranks else {})}
    dims["shared_expert_intermediate_size"] = shared_times * dims["moe_intermediate_size"]
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**dims, intermediate_size=128, decoder_sparse_step=1, norm_topk_prob=renormalize)
    )


def qwen3_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **COMMON,
            **LINEAR_ATTENTION,
            **QWEN_MOE,
            intermediate_size=128,
            decoder_sparse_step=1,
            norm_topk_prob=True,
        )
    )


def qwen3_5_text_config() -> dict[str, Any]:
    # Rotary part: a quarter of head_dim, two numbers a frequency; sections must add up to the frequencies.
    side = HEAD_DIM // 32
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2 * side, side, side],
        "mrope_interleaved": True,
    }
    return {**COMMON, **LINEAR_ATTENTION, **QWEN_MOE, "rope_parameters": rope}


def qwen3_5_text(sections: bool = True) -> Any:
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = qwen3_5_text_config()
    if not sections:
        rope = config["rope_parameters"]
        config["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith("mrope")}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config))


def qwen3_5_vl() -> Any:
    from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    ids = {
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
    }
    config = Qwen3_5MoeConfig(
        text_config=qwen3_5_text_config(), vision_config=vision, tie_word_embeddings=False, **ids
    )
    return Qwen3_5MoeForConditionalGeneration(config)


def glm4_moe(
    shared: int = 1,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    draft: int = 0,
    two_ranks: bool = False,
) -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    dims = {**COMMON, "moe_intermediate_size": MOE_WIDTH, **(FOR_TWO_RANKS if two_ranks else {})}
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **{**dims, "num_hidden_layers": 3},
            head_dim=HEAD_DIM,
            intermediate_size=128,
            n_routed_experts=EXPERTS,
            n_shared_experts=shared,
            num_experts_per_tok=2,
            routed_scaling_factor=scale,
            n_group=groups,
            topk_group=top_groups,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            use_qk_norm=True,
            num_nextn_predict_layers=draft,
        )
    )


def glm4v_moe() -> Any:
    from transformers.models.glm4v_moe import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    text = {
        **COMMON,
        "num_hidden_layers": 3,
        "head_dim": HEAD_DIM,
        "intermediate_size": 128,
        "moe_intermediate_size": MOE_WIDTH,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "rope_parameters": {**rope, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {
        "image_token_id": 250,
        "video_token_id": 251,
        "image_start_token_id": 252,
        "image_end_token_id": 253,
    }
    config = Glm4vMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return Glm4vMoeForConditionalGeneration(config)


def glm4_moe_lite() -> Any:
    from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    return Glm4MoeLiteForCausalLM(
        Glm4MoeLiteConfig(
            **{**COMMON, "num_key_value_heads": 2},
            q_lora_rank=32,
            # The CPU kernel of latent attention takes 512 + 64 and nothing else.
            kv_lora_rank=512,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            intermediate_size=128,
            moe_intermediate_size=MOE_WIDTH,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            num_experts_per_tok=2,
            routed_scaling_factor=1.8,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            mlp_layer_types=["dense", "sparse"],
        )
    )


def qwen4_exp() -> Any:
    from transformers.models.qwen4_exp import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

    config = qwen3_5_text_config() | {"layer_types": ["linear_attention"] * 2}
    rope = config["rope_parameters"]
    config["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith("mrope")}
    return Qwen4ExpForCausalLM(
        Qwen4ExpTextConfig(**config, hc_count=2, hc_lowrank=32, norm_topk_prob=True, output_gate_type="silu")
    )


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    dims = {k: v for k, v in QWEN_MOE.items() if not k.startswith("shared")}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, **dims, head_dim=32, intermediate_size=128, norm_topk_prob=True)
    )
