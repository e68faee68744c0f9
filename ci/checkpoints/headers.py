"""A checkpoint of real size that has headers only, to time whoever reads headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .raw import write_index, write_sparse

# Published dimensions of Qwen3-Next 80B-A3B.
_HIDDEN, _WIDTH, _VOCAB = 2048, 512, 151936
_FIXED = 3  # embedding, head, final norm
_PER_LAYER = 3 + 1 + 2 + 6  # shared projections, shared gate, router and its neighbour norms, attention


def huge_headers(out: str | Path, tensors: int = 60000, shards: int = 40) -> Path:
    """Write a qwen3_next-shaped checkpoint of exactly ``tensors`` tensors whose data are holes.

    The number of experts is set so that it fits; the last layer's attention gets padding tensors for the
    rest.
    """
    folder = Path(out)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    layers = 48
    experts = ((tensors - _FIXED) // layers - _PER_LAYER) // 3
    entries = list(_entries(layers, experts))
    if experts < 1 or len(entries) > tensors:
        raise ValueError(f"{tensors} tensors are too few for {layers} layers")
    padding = tensors - len(entries)
    entries += [(f"model.layers.{layers - 1}.self_attn.extra.{i}", (64,)) for i in range(padding)]
    files: dict[str, str] = {}
    total = 0
    for number in range(shards):
        part = entries[len(entries) * number // shards : len(entries) * (number + 1) // shards]
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        total += write_sparse(folder / name, [(n, "BF16", shape) for n, shape in part])
        files |= {n: name for n, _ in part}
    write_index(folder, files, total)
    (folder / "config.json").write_text(json.dumps(_config(layers, experts), indent=1) + "\n")
    return folder


def _entries(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (_VOCAB, _HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (_HIDDEN,)
        for name, shape in (
            ("q_proj", (8192, _HIDDEN)),
            ("k_proj", (512, _HIDDEN)),
            ("v_proj", (512, _HIDDEN)),
            ("o_proj", (_HIDDEN, 4096)),
        ):
            yield f"{prefix}self_attn.{name}.weight", shape
        yield f"{prefix}mlp.gate.weight", (experts, _HIDDEN)
        yield f"{prefix}mlp.shared_expert_gate.weight", (1, _HIDDEN)
        for module in ["shared_expert", *(f"experts.{e}" for e in range(experts))]:
            yield f"{prefix}mlp.{module}.gate_proj.weight", (_WIDTH, _HIDDEN)
            yield f"{prefix}mlp.{module}.up_proj.weight", (_WIDTH, _HIDDEN)
            yield f"{prefix}mlp.{module}.down_proj.weight", (_HIDDEN, _WIDTH)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_VOCAB, _HIDDEN)


def _config(layers: int, experts: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "vocab_size": _VOCAB,
        "intermediate_size": 5120,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": experts,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": _WIDTH,
        "shared_expert_intermediate_size": _WIDTH,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "layer_types": ["full_attention"] * layers,
    }
