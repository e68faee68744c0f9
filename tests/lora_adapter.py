"""Small real LoRA adapters of a checkpoint, in PEFT's format: random, and large enough to change answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# By what they change: modules of the attention, of routed experts, of shared ones.
MODULES: Mapping[str, str] = {
    "attention": rf"self_attn\.({'|'.join(ATTENTION)})$",
    "routed": r"mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$",
    "shared": r"mlp\.shared_experts?\.(gate_proj|up_proj|down_proj)$",
}


def make(
    checkpoint: Path, out: Path, changes: str, declares: tuple[str, ...] = (), scale: float = 0.3
) -> Path:
    """Write an adapter of every module of ``checkpoint`` that ``changes`` names, a key of MODULES.

    Args:
        declares: modules that its config names in place of those.
    """
    out.mkdir(parents=True)
    draw, tensors, targets = torch.Generator().manual_seed(1), {}, set()
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118 -- no mapping
                module = name.removesuffix(".weight")
                if name == module or not re.search(MODULES[changes], module):
                    continue
                rows, columns = held.get_slice(name).get_shape()
                stem = f"base_model.model.{module}"
                tensors[f"{stem}.lora_A.weight"] = scale * torch.randn(RANK, columns, generator=draw)
                tensors[f"{stem}.lora_B.weight"] = scale * torch.randn(rows, RANK, generator=draw)
                targets.add(module.rpartition(".")[2])
    assert tensors, f"{checkpoint} has no modules of {changes}"
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(declares or targets),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return out
