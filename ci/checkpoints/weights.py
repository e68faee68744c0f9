"""Random weights by tensor name, the two expert layouts, and the tensors of MTP drafts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import torch

Tensors = dict[str, torch.Tensor]

# The usual 0.02 leaves a net this narrow nearly linear, its logits almost tied and its routing blind to the
# token.
INIT_STD = 0.2
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def random_tensor(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Return float32 values for the tensor ``name``: they depend on its name and the seed alone.

    So the same name has the same value in every layout, recipe and transformers release.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(like.shape, generator=generator).mul_(15).add_(1).log_()
    if name.endswith("e_score_correction_bias"):
        # Large against the gaps between sigmoid scores, so that leaving it out changes the choice.
        return torch.rand(like.shape, generator=generator).mul_(0.3)
    if name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight", "dt_bias")):
        # Around what the model class starts from: norms are centred on 1 or on 0, by family.
        return noise.mul_(0.1).add_(like.float().mean().round())
    if name.endswith(".bias"):
        return noise.mul_(0.1)
    return noise.mul_(INIT_STD)


def unstack(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return per-expert tensors in place of three-dimensional ones."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        if tensor.dim() == 3 and head.endswith(".mlp.experts") and last == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2, 0)
                out[f"{head}.{e}.gate_proj.weight"] = gate
                out[f"{head}.{e}.up_proj.weight"] = up
        elif tensor.dim() == 3 and head.endswith(".mlp.experts") and last == "down_proj":
            for e, down in enumerate(tensor):
                out[f"{head}.{e}.down_proj.weight"] = down
        else:
            out[name] = tensor
    return out


def stack(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] in place of per-expert tensors."""
    out: Tensors = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            out[name] = tensor
    for head, parts in experts.items():
        count = 1 + max(e for e, _ in parts)
        both = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(count)]
        out[f"{head}gate_up_proj"] = torch.stack(both)
        out[f"{head}down_proj"] = torch.stack([parts[e, "down_proj"] for e in range(count)])
    return out


def _layer(tensors: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Return tensors of main layer ``index``, by their name below the layer."""
    pattern = re.compile(rf"model\.(?:language_model\.)?layers\.{index}\.(.+)")
    return {m[1]: t for n, t in tensors.items() if (m := pattern.fullmatch(n))}


def mtp_shapes(tensors: Mapping[str, torch.Tensor], last: int) -> Tensors:
    """Return templates of a Qwen MTP draft of one layer, like the last (full-attention) main layer."""
    layer = _layer(tensors, last)
    norm = layer["input_layernorm.weight"]
    hidden = norm.numel()
    out = {f"mtp.layers.0.{name}": t for name, t in layer.items()}
    out["mtp.fc.weight"] = torch.zeros(hidden, 2 * hidden)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        out[f"mtp.{name}.weight"] = norm
    return out


def nextn_shapes(tensors: Mapping[str, torch.Tensor], last: int) -> Tensors:
    """Return templates of a GLM draft layer: it is numbered after the main ones and has names of its own."""
    layer = _layer(tensors, last)
    norm = layer["input_layernorm.weight"]
    prefix = f"model.layers.{last + 1}."
    out = {prefix + name: t for name, t in layer.items()}
    out[prefix + "eh_proj.weight"] = torch.zeros(norm.numel(), 2 * norm.numel())
    for name in ("enorm", "hnorm", "shared_head.norm"):
        out[f"{prefix}{name}.weight"] = norm
    return out


def tie_nextn(tensors: Tensors, last: int) -> None:
    """Repeat the main embedding and head, as published GLM drafts do; loaders take whichever comes last."""
    prefix = f"model.layers.{last + 1}."
    tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
