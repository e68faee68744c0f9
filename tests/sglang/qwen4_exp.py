"""A checkpoint of Qwen3.8-Flash-Next's multimodal class with the tensors of its MoE blocks alone.

The transformers of this environment does not know the model, and its hyper-connections ask CUDA for a device:
the model is built and loaded, its blocks are run, and nothing else of it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, WIDTH, EXPERTS = 2, 64, 32, 8
TEXT: dict[str, Any] = {
    "model_type": "qwen4_exp_text", "vocab_size": 256, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "hidden_act": "silu",
    "layer_types": ["linear_attention"] * LAYERS, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH, "num_experts": EXPERTS,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "hc_count": 2, "hc_lowrank": 32, "ple_layer_ids": [],
    "output_gate_type": "silu", "max_position_embeddings": 512, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
VISION = {
    "model_type": "qwen4_exp", "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
    "out_hidden_size": HIDDEN, "num_position_embeddings": 64, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "deepstack_visual_indexes": [],
}  # fmt: skip
IDS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}


def make(folder: Path) -> Path:
    """Write the checkpoint; returns its folder."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen4ExpForConditionalGeneration"],
        "model_type": "qwen4_exp",
        "dtype": "float32",
        "text_config": TEXT,
        "vision_config": VISION,
        "tie_word_embeddings": False,
        **IDS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in range(LAYERS):
        mlp = f"model.language_model.layers.{layer}.mlp"
        experts = [f"{mlp}.experts.{n}" for n in range(EXPERTS)]
        shapes = {f"{mlp}.gate": (EXPERTS, HIDDEN), f"{mlp}.shared_expert_gate": (1, HIDDEN)}
        for expert in (*experts, f"{mlp}.shared_expert"):
            shapes |= {f"{expert}.{name}_proj": (WIDTH, HIDDEN) for name in ("gate", "up")}
            shapes[f"{expert}.down_proj"] = (HIDDEN, WIDTH)
        tensors |= {
            f"{name}.weight": torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
