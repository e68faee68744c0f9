"""4-bit routed experts as checkpoints have them, beside a shared expert that stays as it is.

Numbers are rounded to the nearest: how well they were chosen does not matter here, how they are packed does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# The order of 8 columns in a word of AWQ, lowest bits first.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Numbers:
    """A matrix of 4 bits: numbers [N, K] from 0 to 15, scales and zero points [N, groups]."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dense(self) -> torch.Tensor:
        """Return the weights in float32."""
        size = self.numbers.shape[1] // self.scales.shape[1]
        zeros = self.zeros.float().repeat_interleave(size, 1)
        return (self.numbers.float() - zeros) * self.scales.float().repeat_interleave(size, 1)


def rounded(weight: torch.Tensor, group: int, zeros: bool, dtype: torch.dtype) -> Numbers:
    """Round a matrix [N, K] to 4 bits in groups of ``group`` columns; scales are in ``dtype``."""
    groups = weight.float().unflatten(1, (-1, group))
    if zeros:
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scales = ((high - low) / 15).clamp_min(1e-6).to(dtype)
        points = (-low / scales.float()).round().clamp(0, 15)
    else:
        scales = (groups.abs().amax(2) / 7.5).clamp_min(1e-6).to(dtype)
        points = torch.full_like(scales, 8, dtype=torch.float32)
    numbers = (groups / scales.float()[..., None] + points[..., None]).round().clamp(0, 15)
    return Numbers(numbers.flatten(1).to(torch.uint8), scales, points.to(torch.uint8))


def words(numbers: torch.Tensor) -> torch.Tensor:
    """Pack 8 numbers a word, the first one lowest: [..., n] to int32 [..., n / 8]."""
    parts = numbers.long().unflatten(-1, (-1, 8))
    packed = (parts << torch.arange(0, 32, 4, device=numbers.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def gptq(held: Numbers) -> Tensors:
    """Pack as GPTQ: along K; zero points along N, less one."""
    columns = held.numbers.shape[1]
    group = columns // held.scales.shape[1]
    return {
        "qweight": words(held.numbers).t().contiguous(),
        "qzeros": words((held.zeros - 1).t().contiguous()),
        "scales": held.scales.t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def auto_round(held: Numbers) -> Tensors:
    """Pack as AutoRound does in GPTQ's packing: without an order of columns."""
    return {name: tensor for name, tensor in gptq(held).items() if name != "g_idx"}


def awq(held: Numbers) -> Tensors:
    """Pack as AWQ: along N, in an order of its own."""

    def ordered(numbers: torch.Tensor) -> torch.Tensor:
        return words(numbers.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1))

    return {
        "qweight": ordered(held.numbers),
        "qzeros": ordered(held.zeros),
        "scales": held.scales.t().contiguous(),
    }


def packed(held: Numbers) -> Tensors:
    """Pack as compressed-tensors: along K, rows as they are."""
    return {
        "weight_packed": words(held.numbers),
        "weight_scale": held.scales.contiguous(),
        "weight_shape": torch.tensor(held.numbers.shape, dtype=torch.int64),
    }


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Args:
        pack: packs a matrix.
        group: columns that share a scale; zeros: whether they have a zero point too.
        dtype: of scales; None: the model's.
        config: ``quantization_config``, of the names of modules that stay as they are.
    """

    pack: Callable[[Numbers], Tensors]
    group: int
    zeros: bool
    dtype: torch.dtype | None
    config: Callable[[list[str], int], dict[str, Any]]


# Parts of names, as tools write them: engines match these against merged modules too, such as qkv_proj.
_KEPT = ("self_attn", "linear_attn", "mlp.gate", "shared_expert", "shared_expert_gate", "shared_experts")


def _gptq_config(plain: list[str], group: int) -> dict[str, Any]:
    excluded = {rf"-:.*\.{part.replace('.', chr(92) + '.')}(\.|$).*": {} for part in _KEPT}
    head = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
    return head | {"checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False, "dynamic": excluded}


def _awq_config(plain: list[str], group: int) -> dict[str, Any]:
    head = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return head | {"modules_to_not_convert": [*_KEPT, "lm_head"]}


def _auto_round_config(plain: list[str], group: int) -> dict[str, Any]:
    head = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    kept = {name: {"bits": 16, "data_type": "float"} for name in plain}
    return head | {"bits": 4, "group_size": group, "sym": True, "extra_config": kept}


def _packed_config(plain: list[str], group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    weights |= {"dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {}}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights | {"block_structure": None},
            "input_activations": None,
            "output_activations": None,
        }
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }


KINDS: dict[str, Kind] = {
    "gptq": Kind(gptq, 128, False, torch.float16, _gptq_config),
    "awq": Kind(awq, 128, True, torch.float16, _awq_config),
    "auto_round": Kind(auto_round, 128, False, torch.float16, _auto_round_config),
    "packed": Kind(packed, 32, False, None, _packed_config),
}


def is_routed(name: str) -> bool:
    """Return whether a tensor is a projection of one routed expert."""
    return ".mlp.experts." in name and name.endswith("_proj.weight")


def stored(kind: Kind, name: str, weight: torch.Tensor, group: int) -> Tensors:
    """Return what a checkpoint has in place of ``weight``; itself where it stays as it is."""
    if not is_routed(name):
        return {name: weight}
    held = rounded(weight, group, kind.zeros, kind.dtype or weight.dtype)
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in kind.pack(held).items()}


def declared(kind: Kind, names: Iterable[str], group: int) -> dict[str, Any]:
    """Return ``quantization_config`` of a checkpoint that has tensors of these ``names`` as plain ones."""
    plain = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    kept = sorted(name for name in plain if not is_routed(f"{name}.weight") and "norm" not in name)
    return kind.config([name for name in kept if "embed" not in name], group)


@dataclass(frozen=True)
class Packed:
    """Stores routed experts as a kind does; what `benchmarks/checkpoint.py` takes."""

    kind: Kind

    def stored(self, name: str, weight: torch.Tensor) -> Tensors:
        """Return what is stored in place of ``weight``."""
        return stored(self.kind, name, weight, self.kind.group)

    def declared(self, names: Iterable[str]) -> dict[str, Any]:
        """Return ``quantization_config`` of a checkpoint of tensors of these names."""
        return declared(self.kind, names, self.kind.group)


def to_int4(folder: Path, name: str, group: int = 0) -> None:
    """Rewrite a plain checkpoint of one file with 4-bit routed experts of the kind ``name``.

    Args:
        group: columns that share a scale; 0: those of the kind, or of the widest that the experts have.
    """
    kind = KINDS[name]
    path = folder / "model.safetensors"
    plain = load_file(path)
    columns = min(tensor.shape[1] for tensor_name, tensor in plain.items() if is_routed(tensor_name))
    group = group or min(kind.group, columns)
    tensors: Tensors = {}
    for tensor_name, tensor in plain.items():
        tensors |= stored(kind, tensor_name, tensor, group)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = declared(kind, plain, group)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
