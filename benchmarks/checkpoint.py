"""Writes a checkpoint with the dimensions of a published model, fewer layers and random weights.

    python benchmarks/checkpoint.py OUT [--shape qwen3_next] [--layers 4] [--quant fp8-block|fp8-routed]
        [--config-only]
    python benchmarks/checkpoint.py OUT --config benchmarks/shapes/SHAPE/config.json [--layers 24]

Tensors have their published names, an expert and projection each. They are drawn on the GPU where there
is one: a layer of Qwen3-Next has 3.2 GB. In FP8 the experts, routed and shared, have a scale for each block;
`fp8-routed` leaves the shared one in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

# Bytes of one file; published ones are about as large.
SHARD = 4 << 30
VOCAB = 32000
# Rows and columns of a block with a scale of its own, and the largest number of e4m3.
BLOCK, E4M3_MAX = 128, 448.0

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "vocab_size": VOCAB,
        "hidden_size": 2048,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 5120,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "full_attention_interval": 4,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": False,
    },
}


class Packer(Protocol):
    """Stores tensors of a checkpoint in a way of its own."""

    def stored(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is stored in place of ``weight``."""

    def declared(self, names: Iterable[str]) -> dict[str, Any]:
        """Return ``quantization_config`` of a checkpoint of tensors of these names."""


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Qwen3-Next checkpoint, layer by layer."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        head = f"model.layers.{layer}."
        yield head + "input_layernorm.weight", (hidden,)
        yield head + "post_attention_layernorm.weight", (hidden,)
        full = (layer + 1) % config["full_attention_interval"] == 0
        attention = full_attention(config) if full else linear_attention(config)
        yield from ((head + name, shape) for name, shape in attention.items())
        yield from sparse_shapes(config, layer)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def sparse_shapes(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a layer's MoE block."""
    hidden, experts, head = config["hidden_size"], config["num_experts"], f"model.layers.{layer}.mlp."
    yield f"{head}gate.weight", (experts, hidden)
    yield f"{head}shared_expert_gate.weight", (1, hidden)
    widths = {f"experts.{e}": config["moe_intermediate_size"] for e in range(experts)}
    widths["shared_expert"] = config["shared_expert_intermediate_size"]
    for name, width in widths.items():
        yield f"{head}{name}.gate_proj.weight", (width, hidden)
        yield f"{head}{name}.up_proj.weight", (width, hidden)
        yield f"{head}{name}.down_proj.weight", (hidden, width)


def full_attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Gated full attention: the query projection holds the gate too."""
    hidden, width = config["hidden_size"], config["head_dim"]
    heads, kept = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "self_attn.q_proj.weight": (2 * heads * width, hidden),
        "self_attn.k_proj.weight": (kept * width, hidden),
        "self_attn.v_proj.weight": (kept * width, hidden),
        "self_attn.o_proj.weight": (hidden, heads * width),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
    }


def linear_attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Gated delta net."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def values(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Random values that keep states of the usual size, so that a layer's output counts beside its input."""
    if name.endswith("A_log"):
        return torch.rand(shape, generator=draw, device=draw.device).mul_(15).add_(1).log_()
    noise = torch.randn(shape, generator=draw, device=draw.device)
    if name.endswith("linear_attn.norm.weight"):
        return noise.mul_(0.1).add_(1)
    if len(shape) == 1:
        return noise.mul_(0.1)  # norms of this family are centred on zero
    if name.endswith("embed_tokens.weight"):
        return noise
    if "mlp.gate." in name or "conv1d" in name:
        return noise.mul_(0.3 if "conv1d" in name else 0.05)
    return noise.mul_(1.5 * shape[-1] ** -0.5)


# What each choice of --quant stores in FP8.
QUANTISED = {"fp8-block": (".mlp.experts.", ".mlp.shared_expert."), "fp8-routed": (".mlp.experts.",)}


def is_quantised(name: str, quant: str) -> bool:
    """Whether a tensor is one of an expert's projections that is stored in FP8."""
    return name.endswith("_proj.weight") and any(part in name for part in QUANTISED.get(quant, ()))


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in e4m3, and a float32 scale for each block; the last blocks may be smaller."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-12) / E4M3_MAX
    held = (blocks / scale).to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns]
    return held.contiguous(), scale[:, 0, :, 0].contiguous()


def config_of(shape: str, layers: int, quant: str = "") -> dict[str, Any]:
    """The checkpoint's config.json."""
    config = {**SHAPES[shape], "num_hidden_layers": layers}
    if not quant:
        return config
    plain = [name.removesuffix(".weight") for name, size in shapes_of(config) if len(size) > 1]
    return config | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [name for name in plain if not is_quantised(f"{name}.weight", quant)],
        }
    }


def write(
    out: Path, shape: str, layers: int, quant: str = "", seed: int = 0, packer: Packer | None = None
) -> int:
    """Write the checkpoint; returns its bytes.

    Args:
        packer: stores tensors in a way of its own, in place of ``quant``.
    """
    config = config_of(shape, layers, quant)
    if packer is not None:
        config["quantization_config"] = packer.declared(name for name, _ in shapes_of(config))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    draw = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    where: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    held = total = number = 0

    def flush() -> None:
        nonlocal held, number
        file = f"model-{number:05d}.safetensors"
        save_file(part, out / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
        part.clear()
        held, number = 0, number + 1

    for name, size in shapes_of(config):
        tensor = values(name, size, draw).to(torch.bfloat16)
        found = {name: tensor}
        if is_quantised(name, quant):
            found = dict(zip((name, f"{name}_scale_inv"), fp8_blocks(tensor), strict=True))
        if packer is not None:
            found = packer.stored(name, tensor)
        part.update({name: tensor.cpu() for name, tensor in found.items()})
        size_here = sum(tensor.nbytes for tensor in found.values())
        held += size_here
        total += size_here
        if held >= SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with so many layers, of the same kinds in turn."""
    interval = config.get("full_attention_interval", 0)
    kinds = ["linear_attention", "full_attention"]
    types = {"layer_types": [kinds[(n + 1) % interval == 0] for n in range(layers)]} if interval else {}
    return {**config, "num_hidden_layers": layers, **types}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_next")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quant", choices=QUANTISED, default="", help="of the experts")
    parser.add_argument("--config-only", action="store_true", help="for engines that make up the weights")
    parser.add_argument("--config", type=Path, help="in place of a shape; writes the configuration alone")
    args = parser.parse_args()
    if args.config_only or args.config:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.config:
            config = with_layers(json.loads(args.config.read_text()), args.layers)
        else:
            config = config_of(args.shape, args.layers, args.quant)
        (args.out / "config.json").write_text(json.dumps(config, indent=1))
        return
    size = write(args.out, args.shape, args.layers, args.quant)
    print(f"{args.out}: {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
